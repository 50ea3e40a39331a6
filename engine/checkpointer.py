"""The Checkpointer: the one object that a training loop uses."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch

from engine.directory.listing import Listed, list_checkpoints
from engine.directory.record import CheckpointRecord
from engine.directory.retention import Retention
from engine.directory.selectors import apply_best_rule
from engine.errors import ConfigError, HoldfastError, NotFoundError, RestoreFailedError, SaveFailedError
from engine.forks import Home
from engine.format.best import DEFAULT
from engine.mirror.uploader import Patience, at_most, no_limit, open_mirror
from engine.options import (
    Checks,
    FailurePolicy,
    MirrorOptions,
    OnFailure,
    StorageOptions,
    check_switches,
    checks_of,
    failure_policy,
    mirror_options,
)
from engine.options import storage_options as store_options
from engine.ranks.agreement import all_make
from engine.ranks.calls import RESTORE, Calls, Request
from engine.ranks.connect import connect_ranks
from engine.restore.filters import Filter
from engine.restore.restorer import Restorer
from engine.save.arguments import (
    check_names,
    check_rename,
    check_save,
    check_selector,
    check_setup,
    plain_metrics,
    whole_numbers,
)
from engine.save.assembly import SaverOptions, make_saver
from engine.save.commit import SaveInfo, software_versions
from engine.save.declarations import all_declare_alike, declarations
from engine.save.events import Listener, guarded
from engine.save.outcomes import Outcomes, SaveHandle
from engine.save.plain_config import plain_config
from engine.save.run_directory import RunDirectory
from engine.save.saver import Busy, Saver, most_secs
from engine.save.unclosed import call_at_exit, close_unreferenced, forgetful
from engine.state.capture import StateCapture
from engine.storage.base import Storage
from engine.storage.open import open_storage

log = logging.getLogger(__name__)

_KEEP_DEFAULT = Retention()
MIRROR_AT_EXIT_SECS = 30.0


class Checkpointer:
    """Saves and restores training state: asynchronous, sharded, verified.

    Every rank makes one at the same point, after the process group, with the same arguments. It acquires the
    directory's lease, so that only one run at a time writes there.

    Args:
        directory: a path, or an fsspec URI such as "s3://bucket/run".
        state: name -> module, optimizer, object with `state_dict` and `load_state_dict`, tensor, dict or
            list. Optimizers need their module beside them. Random number generators are added automatically.
        per_rank: names whose values differ between ranks; all others must be equal on all ranks.
        rank0: names whose values are rank 0's alone, such as its log history or best loss: they are saved
            from rank 0, not compared, and restored on every rank.
        retention: which checkpoints to keep; the others are deleted after each commit. The default keeps the
            newest 10, the one with the lowest "val_loss", and all that end an epoch. None keeps all.
        config: the run's configuration, a dict, namespace or dataclass; the manifest carries it as JSON.
        seed: for the random streams of ranks after a restore at another world size.
        busy: what `save` does while the previous save is still being written: "wait", or "skip" this one.
        timeout_secs: how long ranks wait for each other within one save or restore.
        check_replicas: "sampled" compares the values that several ranks hold: all of them at the first save
            and the first after a restore, then small tensors and samples of large ones. "full" compares all
            of them at every save. "off" compares JSON values only.
        check_snapshots: read every save back and fail it unless it equals, to the bit, the state at the call
            of `save`. Slow; for finding code that changes weights while they are copied.
        memory_budget_bytes: the most host memory that this rank's snapshot may take.
        overlap: "auto", or False to finish the snapshot's copy before `save` returns, on CUDA as well.
        mirror: a second directory or URI for copies, in the background; a restore takes the newest of both.
        mirror_freq: mirror interval and manual checkpoints only at multiples of this step; others always.
        read_only: only restore and list; acquires no lease.
        on_failure: what happens after a save fails because of storage or coordination. "warn": the failure is
            logged and passed to `on_event`, the handle raises it, and the next save tries again. "raise": the
            next call raises it. A state that cannot be saved always raises.
        max_failures: with "warn", this many failures in a row raise, on all ranks alike.
        checks, failures: `Checks(...)` and `FailurePolicy(...)` in place of the keywords that they group;
            likewise mirror=MirrorOptions(...) and storage_options=StorageOptions(...).
        process_group: the torch.distributed.ProcessGroup of the ranks that save and restore together, if not
            all. Ranks are numbered as in the group. Each group of a job needs a directory of its own.
        on_event: called with one dict per event, possibly from a background thread.
    Raises: DirectoryHeldError when a live run writes to the directory; StorageError; ConfigError.
    """

    _closed = True  # until __init__ is through

    def __init__(
        self,
        directory: str | os.PathLike[str],
        state: Mapping[str, Any],
        *,
        per_rank: tuple[str, ...] = (),
        rank0: tuple[str, ...] = (),
        retention: Retention | None = _KEEP_DEFAULT,
        config: Any = None,
        seed: int = 0,
        busy: Busy = "wait",
        timeout_secs: float = 600.0,
        check_replicas: str | bool = "sampled",
        check_snapshots: bool = False,
        memory_budget_bytes: int | None = None,
        overlap: bool | str = "auto",
        storage_options: Mapping[str, str] | StorageOptions | None = None,
        mirror: str | os.PathLike[str] | MirrorOptions | None = None,
        mirror_freq: int = 1,
        read_only: bool = False,
        on_failure: OnFailure = "warn",
        max_failures: int = 3,
        process_group: Any = None,
        on_event: Listener | None = None,
        checks: Checks | None = None,
        failures: FailurePolicy | None = None,
    ) -> None:
        check_setup(
            directory,
            state,
            per_rank=per_rank,
            rank0=rank0,
            retention=retention,
            busy=busy,
            timeout_secs=timeout_secs,
            overlap=overlap,
            memory_budget_bytes=memory_budget_bytes,
            on_event=on_event,
            read_only=read_only,
        )
        store = store_options(storage_options)
        tier = mirror_options(mirror, mirror_freq)
        checks = checks_of(checks, check_replicas, check_snapshots)
        failures = failure_policy(failures, on_failure, max_failures)
        (seed,) = whole_numbers(seed=seed)
        self._config = plain_config(config)
        listener = guarded(on_event)
        ranks = connect_ranks(timeout_secs, process_group)
        self._ranks = ranks  # on rank 0 it hosts the store
        self.rank, self.world_size = ranks.rank, ranks.world_size
        channel = ranks.channel()
        calls = Calls(channel, timeout_secs, most_secs(timeout_secs))
        self._outcomes = Outcomes(failures)

        def open_all() -> tuple[Storage, Storage | None, StateCapture]:
            storage = open_storage(directory, store.client)
            second = open_mirror(tier.directory if tier else None, storage, store.client)
            return storage, second, StateCapture(state, per_rank, self.rank, rank0)

        opened = all_make(channel, "start/open", open_all, timeout_secs, what="the making of a Checkpointer")
        self._storage, second, capture = opened
        declared = declarations(list(state), per_rank, rank0)
        all_declare_alike(channel, declared, timeout_secs, read_only=read_only)
        self._restorer = Restorer(
            self._storage, capture, calls, seed, timeout_secs, store.client, listener, read_only, second
        )
        self._saver: Saver | None = None
        self._best_rule = DEFAULT if retention is None else retention.rule
        self._directory = RunDirectory(self._storage, second, ranks.run_id, retention, listener)
        if not read_only:
            options = SaverOptions(busy, timeout_secs, checks, memory_budget_bytes, overlap)
            saver = make_saver(ranks, calls, capture, self._directory, options, self._outcomes)
            try:  # last, so that an earlier failure leaves no lease behind
                self._directory.acquire(channel, tier.freq if tier else 1, timeout_secs)
            except HoldfastError:
                saver.copier.remove()
                raise
            self._saver = saver
        self._home = Home()
        self._cancel_at_exit = call_at_exit(forgetful(self._at_exit))
        self._closed = False

    def save(
        self,
        step: int,
        *,
        epoch: int = 0,
        tokens: int = 0,
        metrics: Mapping[str, float] | None = None,
        reasons: tuple[str, ...] = ("manual",),
    ) -> SaveHandle:
        """Snapshot the state of step `step` and write it in the background.

        Returns as soon as training may change the state again: after the copy into host memory, or earlier on
        CUDA, where the copy overlaps with training. Every rank calls it at the same step.
        Raises: StateError for state that cannot be saved; MemoryBudgetError; RestoreFailedError while the
            state is undefined; SaveFailedError when an earlier save has failed, no call has raised that yet,
            and `on_failure` and `max_failures` do not tolerate it: nothing is saved then.
        """
        saver = self._require_saver()
        if self._restorer.undefined:
            raise RestoreFailedError(
                "the last restore stopped halfway and left the state undefined: restore again before saving"
            )
        step, epoch, tokens = whole_numbers(step=step, epoch=epoch, tokens=tokens)
        reasons = check_save(step, epoch, tokens, reasons)
        info = SaveInfo(
            step=step,
            attempt="",
            reasons=reasons,
            epoch=epoch,
            tokens=tokens,
            metrics=plain_metrics(metrics),
            config=self._config,
            software=software_versions(torch=str(torch.__version__)),
        )
        return saver.save(info)

    def prepare(self) -> None:
        """Allocate the memory for snapshots now instead of in the first `save`. Optional.

        Worth a call once the state has its final structure: after a restore, or after the first optimizer
        step. Faulting the pages in can take seconds and happens in the background. Every rank calls it.
        Raises: StateError; MemoryBudgetError; CoordinationError.
        """
        self._require_saver().prepare()

    def restore(
        self,
        selector: str = "latest",
        *,
        model_only: bool = False,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        strict: bool = True,
        rename: Mapping[str, str] | None = None,
    ) -> CheckpointRecord | None:
        """Restore a checkpoint in place, whatever world size saved it. Every rank calls it.

        Args:
            selector: "latest", "backup", "best", "best:accuracy:max", "epoch:3", "step:250", an id, a
                path or a URI.
            model_only: restore only the modules and leave everything else unchanged.
            include, exclude: shell patterns for tensor names ("model.transformer.h.*") and state keys; what
                they leave out keeps its live value.
            strict: False loads what matches into a changed architecture, fills the first rows of tensors
                that have grown, and logs everything missing, unexpected and different in one message.
            rename: saved name -> live name ({"model.encoder": "model.backbone"}, {"ema": "model"}) of
                tensors, state keys, and all names below them; patterns apply to live names.
        Returns: the checkpoint's record, or None when "latest" finds no checkpoint at all.
        Raises: SelectorError; StateMismatchError, before anything was changed; DamagedError; StorageError;
            RestoreFailedError.
        """
        self._require_home()
        selector = apply_best_rule(check_selector(selector), self._best_rule)
        check_names(include=include, exclude=exclude)
        check_switches(model_only=model_only, strict=strict)
        if self._saver is not None:
            self._saver.settle(Request(RESTORE, selector))
            self._saver.planner.state_replaced()
        filter = Filter(model_only, tuple(include), tuple(exclude), strict, check_rename(rename))
        with torch.inference_mode(False):  # an optimizer cannot change tensors made in inference mode
            record = self._restorer.restore(selector, filter, self._directory.take_listing())
        if record is not None and filter.everything:
            self._directory.parent = record.id
        return record

    def read(self, selector: str = "latest", *, include: Sequence[str] = ()) -> dict[str, Any]:
        """Read a checkpoint's values by state key, without live objects to restore into. Fully verified.

        Rank-local: any rank may call it alone, and no live object changes. A module is returned as tensors by
        name, an optimizer as {"state": {parameter: ...}, "param_groups": [...]}, any other entry as the saved
        value. Per-rank values are this rank's own, and require the saved world size. Tensors are whole and in
        host memory.

        Args:
            selector: as for `restore`.
            include: shell patterns for tensor names and state keys, as for `restore`; () means everything.
        Returns: {} when "latest" finds no checkpoint at all.
        Raises: SelectorError, also when nothing matches `include`; DamagedError; StorageError.
        """
        check_names(include=include)
        return self._restorer.read(apply_best_rule(check_selector(selector), self._best_rule), include)

    def poll(self) -> None:
        """Raise the failure of an earlier save that the next `save` would raise. Cheap; call it every step.

        Ranks may see the same failure some steps apart.
        """
        failure = self._saver.flight.take_failure() if self._saver is not None else None
        if failure is not None:
            raise failure

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the save in flight. Raises its failure, or TimeoutError after `timeout` seconds."""
        if self._saver is not None:
            self._saver.wait(timeout)
            self._raise_newest()

    @property
    def failed_saves(self) -> int:
        """How many saves in a row have failed, up to and including the newest."""
        return self._outcomes.failed

    @property
    def last_committed(self) -> CheckpointRecord | None:
        """The newest checkpoint that this Checkpointer has committed."""
        return self._outcomes.last_committed

    def list(self) -> list[Listed]:
        """List the directory: committed, partial and damaged checkpoints. Rank-local; reads the storage."""
        try:
            return list_checkpoints(self._storage)
        except NotFoundError:
            return []

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Use around weight changes outside `optimizer.step()`: they wait for a snapshot's running copy."""
        if self._saver is not None:
            self._saver.copier.guard()
        yield

    def close(self, mirror_patience: Patience = no_limit) -> None:
        """Finish the save in flight, release the directory, and raise if the newest save has failed.

        A failure that `handle.result`, `wait`, `poll` or `save` has already raised is not raised again.
        `mirror_patience` returns how many seconds the mirror has left for its pending copies; None: no limit.
        In a forked child this does nothing: save, mirror and directory belong to the parent.
        Raises: SaveFailedError; SaveStuckError for a save that hangs: this run then keeps the directory.
        """
        if self._closed or self._home.left:
            return
        self._closed = True
        self._cancel_at_exit()
        saver = self._saver
        try:
            if saver is not None:
                saver.wait()
                saver.copier.remove()
                saver.snapshot.forget_plan()
        finally:
            self._directory.release(mirror_patience, stuck=saver is not None and saver.flight.stuck)
        self._raise_newest()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close() if error is None else self._close_quietly(0.0)

    def __del__(self) -> None:
        """No reference is left: release the directory. Unlike `close`, this raises nothing."""
        if not self._closed and not self._home.left:
            close_unreferenced(self._at_exit)

    def _raise_newest(self) -> None:
        failure = self._saver.flight.take_failure(newest=True) if self._saver is not None else None
        if failure is not None:
            raise failure

    def _require_home(self) -> None:
        if self._home.left:
            raise ConfigError(
                f"this Checkpointer belongs to process {self._home.pid}, and this is a forked child of it: "
                "save and restore in the parent; to read in a child, make a Checkpointer(..., read_only=True)"
            )

    def _require_saver(self) -> Saver:
        self._require_home()
        if self._closed:
            raise SaveFailedError("this Checkpointer is closed; make a new one to save")
        if self._saver is None:
            raise ConfigError("this Checkpointer was made with read_only=True and cannot save")
        return self._saver

    def _at_exit(self) -> None:
        """Close a Checkpointer that nobody closed: finish its save, and log its failure."""
        self._close_quietly(MIRROR_AT_EXIT_SECS)

    def _close_quietly(self, mirror_secs: float) -> None:
        try:
            self.close(at_most(mirror_secs))
        except HoldfastError as error:
            log.error("%s", error)
