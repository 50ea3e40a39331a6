"""Decides where a run starts: at step 0 or at a checkpoint, and with which configuration. Imports no torch.

Rank 0 decides and broadcasts the result; `engine.resume` decides before it launches the ranks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from engine.directory.listing import Directory, Listed, committed
from engine.directory.record import CheckpointRecord
from engine.directory.resolve import checkpoint_at, resolve
from engine.directory.retention import best_first, by_sequence
from engine.directory.selectors import Selector, apply_best_rule, parse_selector
from engine.errors import ConfigError, NotFoundError, SelectorError
from engine.format.best import DEFAULT, BestRule, Mode
from engine.format.forms import without_order
from engine.format.manifest import Manifest
from engine.mirror.tiers import both_tiers
from engine.run.config import METRICS, TrainConfig
from engine.storage.base import Storage
from engine.storage.open import open_storage
from engine.storage.uris import split_uri

LAUNCH_KEY = "launch"
"""Key in a stored configuration: the torchrun launch that wrote it. Its restarted workers recognise it."""


@dataclass(frozen=True, slots=True)
class Start:
    """The decision. `selector`: None for a start from step 0. `stored`: the checkpoint's configuration."""

    checkpoint_dir: str
    selector: str | None = None
    home: str = ""
    """Address of the directory that holds the checkpoint, and the checkpoint's name there."""
    name: str = ""
    sentence: str = ""
    stored: Mapping[str, Any] = field(default_factory=dict)
    world_size: int | None = None
    fingerprint: str | None = None
    """Of the dataset that the checkpoint was trained on."""
    best_values: Mapping[str, float] = field(default_factory=dict)
    """Selector -> best value among the committed checkpoints of the directory; empty for a new run."""

    @property
    def best_val_loss(self) -> float | None:
        """The lowest validation loss among them."""
        return self.best_value(DEFAULT)

    def best_value(self, rule: BestRule) -> float | None:
        """The best value among them by a rule of this trainer, or None."""
        return self.best_values.get(rule.selector)


@dataclass(frozen=True, slots=True)
class Restart:
    """What torchrun says about this start of the worker."""

    count: int = 0
    launch: str | None = None
    """Identifies one torchrun launch with all its restarts; None if unknown."""

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> Restart:
        """Read TORCHELASTIC_RESTART_COUNT and TORCHELASTIC_RUN_ID."""
        count = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        launch = environ.get("TORCHELASTIC_RUN_ID")
        # "none" is torchrun's default outside --standalone, so it identifies no launch.
        return cls(int(count) if count.isdecimal() else 0, None if launch in (None, "", "none") else launch)


def find_start(config: TrainConfig, *, directory_given: bool, restart: Restart) -> Start:
    """Decide where to start, from the flags and the contents of the directory.

    Args:
        config: the flags over the defaults.
        directory_given: whether `--checkpoint_dir` was given. If not, a run resumed from a path continues in
            the directory that holds that checkpoint.

    Raises:
        SelectorError: no checkpoint matches `--resume`; the message lists those that exist.
        ConfigError: the directory holds checkpoints, and the flags do not say what to do with them.
        StorageError: the directory could not be listed, so it may not be empty.
    """
    selector = None
    if config.resume is not None:
        selector = parse_selector(apply_best_rule(config.resume, config.best_rule))
    path = selector.text if selector is not None and selector.kind == "path" else None
    if path is not None and not directory_given:
        config = replace(config, checkpoint_dir=split_uri(path)[0])
    storage = open_storage(config.checkpoint_dir, config.storage_mapping)
    here = look(storage)
    listed = [] if here is None else here.everything()
    records = committed(listed)
    if restart.count > 0 and records and here is not None:
        manifest = here.manifest(by_sequence(records)[-1].id)
        if _is_own(manifest, restart):
            sentence = f"restart {restart.count} by torchrun: resuming latest, step {manifest.step}"
            # By id if there is a mirror: its outage must not stop a restart from local checkpoints.
            selected = "latest" if config.mirror is None else manifest.id
            return _resumed(config, selected, sentence, manifest, records)
    if path is not None:
        return _start_at_path(path, config, records)
    mirror = None if config.mirror is None else open_storage(config.mirror, config.storage_mapping)
    there = None if mirror is None else look(mirror)
    mirrored = [] if there is None else there.everything()
    if selector is None:
        if not config.new_run:
            refuse_to_mix(listed, storage.uri)
            if mirror is not None:
                refuse_to_mix(mirrored, mirror.uri)
        return Start(config.checkpoint_dir, sentence="starting from step 0")
    tiers = both_tiers(listed, mirrored)
    listed, records = list(tiers.listed), committed(tiers.listed)
    if _is_fresh(selector, listed, restart):
        sentence = f"{storage.uri} holds no checkpoint: starting fresh from step 0"
        return Start(config.checkpoint_dir, sentence=sentence)
    record = pick(listed, selector, storage.uri)
    sentence = f"resuming {config.resume}, step {record.step}, from {record.path}"
    from_mirror = record.id in tiers.from_mirror
    directory = there if from_mirror else here
    assert directory is not None
    start = _resumed(config, selector.text, sentence, directory.manifest(record.id), records)
    return replace(start, home=config.mirror or "") if from_mirror else start


def _best_values(records: Sequence[CheckpointRecord]) -> dict[str, float]:
    found = {}
    for rule in (BestRule(metric, mode) for metric in METRICS for mode in get_args(Mode)):
        for record in best_first(records, rule)[:1]:
            found[rule.selector] = record.metrics[rule.metric]
    return found


def look(storage: Storage) -> Directory | None:
    """List the directory; None if it does not exist yet. An outage raises StorageError."""
    try:
        return Directory(storage)
    except NotFoundError:
        return None


def pick(listed: Sequence[Listed], selector: Selector, uri: str) -> CheckpointRecord:
    """The committed checkpoint that the selector names; otherwise SelectorError says why there is none."""
    try:
        return resolve(listed, selector, uri).record  # the restore logs the checkpoints it skips
    except SelectorError as error:
        if selector.kind != "latest":
            raise
        raise SelectorError(
            f"{error}. Nothing was deleted; --new_run starts a new run in the same directory"
        ) from None


def refuse_to_mix(listed: Sequence[Listed], uri: str) -> None:
    """Raises ConfigError if a new run would start among the checkpoints of another run."""
    there = [item for item in listed if item.status != "partial"]
    if not there:
        return
    steps = [item.step for item in there if item.step is not None]
    upto = f", up to step {max(steps)}" if steps else ""
    raise ConfigError(
        f"{uri} holds {len(there)} checkpoint{'s' * (len(there) > 1)}{upto}: continue that run with "
        "--resume latest, start a new run beside it with --new_run, or give another --checkpoint_dir"
    )


def _is_fresh(selector: Selector, listed: Sequence[Listed], restart: Restart) -> bool:
    """Whether `latest` means step 0: the directory is empty or, after a restart, no save ever committed."""
    if selector.kind != "latest":
        return False
    return not listed or (restart.count > 0 and all(item.status == "partial" for item in listed))


def _is_own(manifest: Manifest, restart: Restart) -> bool:
    """Whether this launch committed it: a launch that never saved must not continue another run."""
    theirs = manifest.config.get(LAUNCH_KEY)
    return restart.launch is None or theirs is None or theirs == restart.launch


def _start_at_path(path: str, config: TrainConfig, records: Sequence[CheckpointRecord]) -> Start:
    try:
        found = checkpoint_at(path, config.storage_mapping)
    except SelectorError as error:
        _refuse_directory(path, config, error)
        raise
    sentence = f"resuming step {found.manifest.step} from {found.storage.uri}/{found.name}"
    start = _resumed(config, path, sentence, found.manifest, records)
    return replace(start, home=found.parent, name=found.name)


def _refuse_directory(path: str, config: TrainConfig, cause: SelectorError) -> None:
    """If the path is a directory of checkpoints, raises a SelectorError that says what to type."""
    inside = open_storage(path, config.storage_mapping)
    if (found := look(inside)) is not None and found.names + found.others:
        raise SelectorError(
            f"{inside.uri} is a directory of checkpoints, not a checkpoint: "
            f"give --checkpoint_dir {inside.uri} --resume latest"
        ) from cause


def _resumed(
    config: TrainConfig, selector: str, sentence: str, manifest: Manifest, records: Sequence[CheckpointRecord]
) -> Start:
    loader = without_order(manifest.objects.get("loader"))
    return Start(
        checkpoint_dir=config.checkpoint_dir,
        selector=selector,
        home=config.checkpoint_dir,
        name=manifest.id,
        sentence=sentence,
        stored=dict(manifest.config),
        world_size=manifest.world_size,
        fingerprint=loader.get("fingerprint") if isinstance(loader, Mapping) else None,
        best_values=_best_values(records),
    )
