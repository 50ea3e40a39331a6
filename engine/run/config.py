"""Every flag of the trainer as one frozen value, and its JSON form in the manifest.

Imports no torch: `engine.resume` and `--list_checkpoints` answer before torch would have been loaded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args, get_type_hints

import tyro

from engine.errors import ConfigError
from engine.format.best import BestRule, Mode
from model.config import GPT2Config

LOCKED = ("model", "seq_len", "global_batch", "seed", "steps_per_epoch")
"""What a resumed run may not change: another value would make it a different run.

`data` is not here: a dataset may be moved, so the loader compares fingerprints instead of paths.
"""

SESSION = (
    "checkpoint_dir",
    "mirror",
    "resume",
    "new_run",
    "init_from",
    "list_checkpoints",
    "storage_options",
    "on_event",
    "allow_data_change",
)
"""What belongs to one invocation and never comes out of a checkpoint.

Storage options hold credentials. A checkpoint that named a mirror would send the data of whoever loads it to
its author. `on_event` is a command: if it were taken from a checkpoint, loading one would run code that its
author chose.
"""

METRICS = ("val_loss", "train_loss")
"""What the trainer measures."""

Device = Literal["auto", "cpu", "cuda"]
SavePolicy = Literal["wait", "skip"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Train a GPT-2 with background checkpoints.

    On resume an explicit flag beats the checkpoint's configuration, which beats the default.
    """

    model: str = "gpt2"
    """Preset: nano, gpt2, gpt2-medium, gpt2-large or gpt2-xl."""
    data: str = "datasets/stdlib-gpt2"
    """Directory of token shards, as `python -m data.prepare` writes it."""
    seed: int = 1337
    """Seed of the initial weights, of the data order and of dropout."""
    dropout: float = 0.0
    """Dropout probability while training."""
    seq_len: int | None = None
    """Tokens per sequence (default: the context length of the model)."""
    global_batch: int = 48
    """Sequences per optimizer step, over all ranks; the same at every world size."""
    micro_batch: int = 8
    """Most sequences that a rank takes through the model at once; the rest is accumulated."""

    lr: float = 6e-4
    """Peak learning rate."""
    min_lr: float | None = None
    """Learning rate at the end of the cosine (default: a tenth of --lr)."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    lr_decay_steps: int | None = None
    """Step at which the cosine reaches --min_lr (default: the last step of the run)."""
    weight_decay: float = 0.1
    """Weight decay of matrices and embeddings; biases and norms have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's two decay rates."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""

    max_steps: int | None = None
    """Stop after this step (default: with --num_epochs; with neither, after one epoch)."""
    num_epochs: int | None = None
    """Stop after this many epochs, or at --max_steps if that comes first."""
    steps_per_epoch: int | None = None
    """Steps that count as an epoch (default: one pass over the data)."""
    eval_freq: int = 250
    """Measure the validation loss every so many steps; 0 never does."""
    eval_batches: int = 20
    """Global batches per validation."""

    checkpoint_freq: int = 250
    """Save every so many steps; 0 saves only at epochs, best losses, signals and the end."""
    keep_checkpoints: int = 10
    """How many rolling checkpoints to keep besides latest, backup, best and epochs; others are deleted."""
    best_metric: str = "val_loss"
    """The metric that decides which checkpoint is best: val_loss or train_loss."""
    best_mode: Mode = "min"
    """Whether the lowest (min) or the highest (max) value of it is best."""
    checkpoint_dir: str = "./checkpoints"
    """Directory or fsspec URI of the checkpoints."""
    mirror: str | None = None
    """Second directory or URI, to which every committed checkpoint is copied in the background."""
    mirror_freq: int = 1
    """Mirror interval checkpoints of every so many steps, others always; 0 mirrors only the others."""
    storage_options: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """KEY=VALUE option for the file system of a URI, may be repeated; never stored in a checkpoint."""
    save_policy: SavePolicy = "wait"
    """When an interval save is due and the one before is still being written: wait for it, or skip."""
    max_save_failures: int = 3
    """Stop after so many failed saves in a row; 0 stops at the first, as 1 does."""
    check_replicas: bool = False
    """At every save, compare all of what several ranks hold, instead of samples of the large tensors."""
    check_snapshots: bool = False
    """Read every save back and compare it with what the training held when it was taken (slow)."""

    resume: str | None = None
    """Carry on from latest, backup, best, epoch:N, step:N, a path or a URI."""
    new_run: bool = False
    """Start from step 0 although the directory holds checkpoints."""
    init_from: str | None = None
    """Checkpoint (path or URI) whose weights a run that starts at step 0 takes over, as far as they fit."""
    list_checkpoints: bool = False
    """Print what the directory holds, and exit."""
    allow_data_change: bool = False
    """Carry on although the dataset is not the one that the checkpoint was trained on."""

    device: Device = "auto"
    """Where to train; auto takes CUDA where there is one."""
    dp_replicate: int = 1
    """Replicas of the model: 1 shards it over all ranks, the number of ranks shards nothing."""
    bf16: bool = False
    """Compute in bfloat16, with float32 weights and reductions."""
    compile: bool = False
    """Compile the model with torch.compile."""
    deterministic: bool = True
    """On CUDA, take kernels that give the same bits every time."""

    log_dir: str | None = None
    """Where metrics.jsonl goes (default: logs/ in a local --checkpoint_dir, else ./logs/NAME)."""
    on_event: str | None = None
    """Shell command that gets each event but `step` as JSON on stdin; not taken from a checkpoint."""
    grace_secs: float = 25.0
    """Time to save and exit after a signal, at most 25 under torchrun, which kills at 30."""

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("global_batch", "micro_batch", "eval_batches", "dp_replicate", "keep_checkpoints"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("seq_len", "lr_decay_steps", "max_steps", "num_epochs", "steps_per_epoch"):
            value = getattr(self, name)
            _require(self, name, value is None or value >= 1, "at least 1")
        counts = ("warmup_steps", "eval_freq", "checkpoint_freq", "mirror_freq", "max_save_failures")
        for name in ("seed", *counts):
            _require(self, name, getattr(self, name) >= 0, "0 or more")
        # Above it, naming the batch sizes that would fit takes longer than anybody waits.
        _require(self, "global_batch", self.global_batch < 2**31, "below 2**31")
        _require(self, "grad_clip", 0 <= self.grad_clip < math.inf, "0 or more (0 does not clip)")
        _require(self, "lr", 0 < self.lr < math.inf, "above 0")
        _require(self, "min_lr", self.min_lr is None or 0 <= self.min_lr < math.inf, "0 or more")
        _require(self, "weight_decay", 0 <= self.weight_decay < math.inf, "0 or more")
        _require(self, "dropout", 0 <= self.dropout < 1, "in [0, 1)")
        _require(self, "betas", all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)")
        _require(self, "grace_secs", 0 < self.grace_secs < math.inf, "above 0")
        _require(self, "best_metric", self.best_metric in METRICS, " or ".join(METRICS))
        for name in ("data", "checkpoint_dir", "model", "init_from", "log_dir", "on_event", "mirror"):
            _require(self, name, getattr(self, name) != "", "not empty")
        if self.resume is not None and self.new_run:
            raise ConfigError(
                f"--resume {self.resume} carries a run on and --new_run starts one: give one of the two"
            )

    @property
    def best_rule(self) -> BestRule:
        """What decides which checkpoint is best."""
        return BestRule(self.best_metric, self.best_mode)

    @property
    def final_lr(self) -> float:
        """The learning rate after the cosine."""
        return self.lr / 10 if self.min_lr is None else self.min_lr

    @property
    def storage_mapping(self) -> dict[str, str]:
        """`storage_options` as a mapping; raises ConfigError for an entry without `=`."""
        pairs: dict[str, str] = {}
        for position, option in enumerate(self.storage_options, start=1):
            key, separator, value = option.partition("=")
            if not separator or not key:
                # The entry itself may be a secret, so only its place is named.
                raise ConfigError(f"--storage_options takes KEY=VALUE entries; entry {position} is not one")
            pairs[key] = value
        return pairs


def _require(config: TrainConfig, name: str, holds: bool, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"--{name} is {getattr(config, name)!r}, but must be {wanted}")


_HINTS: dict[str, Any] = get_type_hints(TrainConfig)


def _fits(value: Any, hint: Any) -> bool:
    options = get_args(hint) or (hint,)
    if hint in (Device, SavePolicy, Mode):
        return value in options
    if hint == tuple[float, float]:
        return isinstance(value, tuple) and len(value) == 2 and all(_fits(item, float) for item in value)
    if hint == tuple[str, ...]:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    # bool is an int to isinstance, and JSON writes 1.0 as 1: neither may pass or fail for the wrong reason.
    if isinstance(value, bool):
        return bool in options
    if float in options and isinstance(value, int):
        return True
    return isinstance(value, options)


def _check_types(config: TrainConfig) -> None:
    """A stored configuration is JSON from a file: a wrong type must not surface somewhere deep."""
    for name, hint in _HINTS.items():
        value = getattr(config, name)
        if not _fits(value, hint):
            raise ConfigError(
                f"--{name} is {value!r}, which is a {type(value).__name__} and does not fit the flag"
            )
        if isinstance(value, int):
            _require(config, name, abs(value) < 2**63, "below 2**63")
        if isinstance(value, str):
            _require(config, name, _is_text(value), "text in UTF-8")


def _is_text(value: str) -> bool:
    """Whether it can be written down: bytes of a command line that are no UTF-8 become lone surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The configuration as JSON for the manifest: everything but the session's own flags."""
    stored = {key: value for key, value in dataclasses.asdict(config).items() if key not in SESSION}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in stored.items()}


def from_json(stored: Mapping[str, Any], session: TrainConfig) -> TrainConfig:
    """A checkpoint's configuration with the session's own flags.

    Unknown keys are left alone (a later version may have more flags); missing ones keep their default.
    Raises ConfigError for a value that does not fit its flag.
    """
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    values = {key: value for key, value in stored.items() if key in names and key not in SESSION}
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    values |= {name: getattr(session, name) for name in SESSION}
    try:
        return TrainConfig(**values)
    except ConfigError as error:
        raise ConfigError(f"the checkpoint's configuration cannot be used: {error}") from error


def check_locked(config: TrainConfig, stored: TrainConfig) -> None:
    """Raises ConfigError, naming both values, where a flag would change what a checkpoint fixes."""
    changed = [name for name in LOCKED if getattr(config, name) != getattr(stored, name)]
    if changed:
        listed = ", ".join(
            f"--{name} {getattr(config, name)} (checkpoint: {getattr(stored, name)})" for name in changed
        )
        raise ConfigError(
            "a resumed run keeps the shape, the data order and the batch of its checkpoint, but was given "
            f"{listed}; leave the flag out, or start another run with --new_run"
        )


def complete(config: TrainConfig) -> TrainConfig:
    """The configuration with the defaults that depend on the model filled in.

    Raises ConfigError for a model that does not exist and for sequences longer than it can take.
    """
    try:
        preset = GPT2Config.preset(config.model)
    except ValueError as error:
        raise ConfigError(f"--model: {error}") from error
    seq_len = config.seq_len or preset.block_size
    if seq_len > preset.block_size:
        raise ConfigError(
            f"--seq_len {seq_len} is longer than the {preset.block_size} tokens of --model {config.model}"
        )
    return dataclasses.replace(config, seq_len=seq_len)
