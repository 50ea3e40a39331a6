"""The trainer's flags as one frozen value, and their JSON form in the manifest.

Imports no torch: `engine.resume` and `--list_checkpoints` must not wait for it to load.
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
"""Flags that a resumed run may not change: another value would make it a different run.

`data` is not among them: a dataset may move, so the loader compares fingerprints instead of paths.
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
"""Flags that belong to one invocation and are never taken from a checkpoint.

Storage options hold credentials. A checkpoint that named a mirror would send its user's data to its author.
`on_event` is a command: taking it from a checkpoint would run code that the checkpoint's author chose.
"""

METRICS = ("val_loss", "train_loss")
"""Metrics that the trainer records."""

Device = Literal["auto", "cpu", "cuda"]
SavePolicy = Literal["wait", "skip"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Train a GPT-2 with background checkpoints.

    On resume, explicit flags override the checkpoint's configuration, which overrides the defaults.
    """

    model: str = "gpt2"
    """Preset: nano, gpt2, gpt2-medium, gpt2-large or gpt2-xl."""
    data: str = "datasets/stdlib-gpt2"
    """Directory of token shards, as written by `python -m data.prepare`."""
    seed: int = 1337
    """Seed of the initial weights, the data order and dropout."""
    dropout: float = 0.0
    """Dropout probability during training."""
    seq_len: int | None = None
    """Tokens per sequence (default: the context length of the model)."""
    global_batch: int = 48
    """Sequences per optimizer step, over all ranks; the same at every world size."""
    micro_batch: int = 8
    """Most sequences that a rank runs through the model at once; gradients accumulate over the rest."""

    lr: float = 6e-4
    """Peak learning rate."""
    min_lr: float | None = None
    """Learning rate at the end of the cosine (default: a tenth of --lr)."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    lr_decay_steps: int | None = None
    """Step at which the cosine reaches --min_lr (default: the last step of the run)."""
    weight_decay: float = 0.1
    """Weight decay of matrices and embeddings; biases and norms are not decayed."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's two decay rates."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""

    max_steps: int | None = None
    """Stop after this step (default: set by --num_epochs; without either, one epoch)."""
    num_epochs: int | None = None
    """Stop after this many epochs, or at --max_steps if that comes first."""
    steps_per_epoch: int | None = None
    """Steps per epoch (default: one pass over the data)."""
    eval_freq: int = 250
    """Measure the validation loss every N steps; 0 turns validation off."""
    eval_batches: int = 20
    """Global batches per validation."""

    checkpoint_freq: int = 250
    """Save every N steps; 0 saves only at epochs, best losses, signals and the end."""
    keep_checkpoints: int = 10
    """Rolling checkpoints to keep besides latest, backup, best and epochs; the others are deleted."""
    best_metric: str = "val_loss"
    """The metric that decides which checkpoint is best: val_loss or train_loss."""
    best_mode: Mode = "min"
    """Whether the lowest (min) or highest (max) value of --best_metric is best."""
    checkpoint_dir: str = "./checkpoints"
    """Directory or fsspec URI of the checkpoints."""
    mirror: str | None = None
    """Second directory or URI; committed checkpoints are copied to it in the background."""
    mirror_freq: int = 1
    """Mirror interval checkpoints only every N steps (0: never); all others are always mirrored."""
    storage_options: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """KEY=VALUE option for the file system of a URI; repeatable; never stored in a checkpoint."""
    save_policy: SavePolicy = "wait"
    """If an interval save is due while the last save is still being written: wait, or skip it."""
    max_save_failures: int = 3
    """Stop after N failed saves in a row; 0 means 1."""
    check_replicas: bool = False
    """At every save, compare replicas in full instead of sampling the large tensors."""
    check_snapshots: bool = False
    """Read every save back and compare it with the state it was taken from (slow)."""

    resume: str | None = None
    """Resume from latest, backup, best, epoch:N, step:N, a path or a URI."""
    new_run: bool = False
    """Start from step 0 even if the directory holds checkpoints."""
    init_from: str | None = None
    """Checkpoint (path or URI) whose matching weights initialise a run that starts at step 0."""
    list_checkpoints: bool = False
    """List the checkpoints in the directory, and exit."""
    allow_data_change: bool = False
    """Resume even if the dataset is not the one that the checkpoint was trained on."""

    device: Device = "auto"
    """Device to train on; auto uses CUDA if available."""
    dp_replicate: int = 1
    """Replicas of the model: 1 shards it over all ranks; the number of ranks turns sharding off."""
    bf16: bool = False
    """Compute in bfloat16, with float32 weights and reductions."""
    compile: bool = False
    """Compile the model with torch.compile."""
    deterministic: bool = True
    """On CUDA, use deterministic kernels."""

    log_dir: str | None = None
    """Directory of metrics.jsonl (default: logs/ in a local --checkpoint_dir, else ./logs/NAME)."""
    on_event: str | None = None
    """Shell command that receives events (except `step`) as JSON on stdin; never taken from a checkpoint."""
    grace_secs: float = 25.0
    """Seconds to save and exit after a signal; at most 25 under torchrun, which kills workers after 30."""

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
        # Above this, listing the batch sizes that fit takes too long.
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
                f"--resume {self.resume} continues a run and --new_run starts one: give only one of them"
            )

    @property
    def best_rule(self) -> BestRule:
        """The rule that decides which checkpoint is best."""
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
                # The entry may be a secret, so the message gives only its position.
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
    # isinstance counts bool as int, and JSON writes 1.0 as 1.
    if isinstance(value, bool):
        return bool in options
    if float in options and isinstance(value, int):
        return True
    return isinstance(value, options)


def _check_types(config: TrainConfig) -> None:
    """A stored configuration is JSON from a file: catch a wrong type here, not deep inside the run."""
    for name, hint in _HINTS.items():
        value = getattr(config, name)
        if not _fits(value, hint):
            raise ConfigError(
                f"--{name} is {value!r}: a {type(value).__name__} is not valid for this flag"
            )
        if isinstance(value, int):
            _require(config, name, abs(value) < 2**63, "below 2**63")
        if isinstance(value, str):
            _require(config, name, _is_text(value), "valid UTF-8 text")


def _is_text(value: str) -> bool:
    """Whether it can be encoded: invalid UTF-8 on a command line becomes lone surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The configuration as JSON for the manifest, without the session's own flags."""
    stored = {key: value for key, value in dataclasses.asdict(config).items() if key not in SESSION}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in stored.items()}


def from_json(stored: Mapping[str, Any], session: TrainConfig) -> TrainConfig:
    """A checkpoint's configuration with the session's own flags.

    Unknown keys are ignored (a later version may have more flags); missing ones keep their defaults.
    Raises ConfigError for a value that is invalid for its flag.
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
    """Raises ConfigError, with both values, for a flag that would change a locked setting."""
    changed = [name for name in LOCKED if getattr(config, name) != getattr(stored, name)]
    if changed:
        listed = ", ".join(
            f"--{name} {getattr(config, name)} (checkpoint: {getattr(stored, name)})" for name in changed
        )
        raise ConfigError(
            "a resumed run cannot change its checkpoint's model, data order or batch size, but was given "
            f"{listed}; omit the flag, or start another run with --new_run"
        )


def complete(config: TrainConfig) -> TrainConfig:
    """Fill in the defaults that depend on the model.

    Raises ConfigError for an unknown model or for sequences longer than the model allows.
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
