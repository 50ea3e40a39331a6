"""The mirror under faults: killed or failing at every operation, the next start completes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.directory.listing import list_checkpoints
from engine.directory.retention import Retention
from engine.errors import HoldfastError
from engine.format.names import MANIFEST
from engine.lease.lease import Lease
from engine.storage.base import Storage
from engine.storage.local import LocalStorage
from tests.faults.layer import STORAGE_FAULTS, Act, FaultStorage, Trigger
from tests.support.tiers import Desk, change_byte, second_storage, steps_in
from tests.support.tiny_checkpoint import write_checkpoint

KEEP_2 = Retention(rolling=2)
AGREED = [20, 30]
QUICK_FAULTS = ("503", "answer lost")

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
"""A process that is killed takes the thread of its lease with it."""


def _marked(fault: str) -> Any:
    return fault if fault in QUICK_FAULTS else pytest.param(fault, marks=pytest.mark.slow)


class Killed(BaseException):
    """The process is no more: nothing that it would still do happens."""


def dies_before(name: str, real: Callable[[], Any]) -> Any:
    raise Killed


class DiesAfter:
    """The k-th operation is done, and nothing after it."""

    def __init__(self) -> None:
        self.done = False

    def __call__(self, name: str, real: Callable[[], Any]) -> Any:
        if not self.done:
            self.done = True
            real()
        raise Killed


@pytest.fixture(autouse=True)
def _dead_holders(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was killed here has the same process as the next one: nobody who holds a lease is alive."""
    real = Lease.acquire
    monkeypatch.setattr(
        "engine.mirror.uploader.Lease.acquire",
        lambda *args, **kw: real(*args, **kw, alive=lambda process: False),
    )


class Place:
    """A local directory with three checkpoints, one of which an older run has brought to the mirror."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.local: Storage = LocalStorage(folder / "local")
        self.second = second_storage(kind, folder)
        write_checkpoint(self.local, sequence=1, rows=4)
        Desk(self.local, self.second).once()
        write_checkpoint(self.local, sequence=2, rows=4, world_size=2)
        write_checkpoint(self.local, sequence=3, rows=4)

    def run(self, here: Trigger, there: Trigger) -> None:
        """One run of the mirror, as far as it comes."""
        desk = Desk(FaultStorage(self.local, here), FaultStorage(self.second, there), retention=KEEP_2)
        mirror = desk.mirror
        try:
            mirror.open()
            mirror.catch_up()
            mirror.recheck_earlier_copies()
            mirror.try_release()
        except (Killed, HoldfastError):
            pass
        finally:
            if mirror._lease is not None:
                mirror._lease._stop.set()

    def check_and_complete(self) -> None:
        assert steps_in(self.local) == [10, 20, 30], "the local ones are untouched"
        assert set(steps_in(self.second)) <= {10, *AGREED}, "what is listed as committed is whole"
        Desk(self.local, self.second, retention=KEEP_2).once()
        assert steps_in(self.second) == AGREED
        if self.second.is_local:
            assert {item.status for item in list_checkpoints(self.second)} == {"committed"}


def points(folder: Path, kind: str, which: str, act: Callable[[], Act], *, sticky: bool) -> Iterator[Place]:
    """A fresh place for every operation, at which it was hit; ends when there was none left to hit."""
    k = 0
    while True:
        place = Place(kind, folder / str(k))
        here, there = Trigger(), Trigger()
        (here if which == "local" else there).arm(k, act(), sticky=sticky)
        place.run(here, there)
        hit = (here if which == "local" else there).fired
        if not hit:
            assert k > 10, "the sweep has to sweep over something"
            return
        yield place
        k += 1


@pytest.mark.usefixtures("nothing_arrives")
@pytest.mark.parametrize(
    ("kind", "when"),
    [
        ("directory", "before"),
        ("memory", "after"),
        pytest.param("directory", "after", marks=pytest.mark.slow),
        pytest.param("memory", "before", marks=pytest.mark.slow),
    ],
)
def test_killed_at_every_operation_the_next_start_completes_it(
    kind: str, when: str, root: Path, covered: Callable[[int], None]
) -> None:
    count = 0
    for place in points(
        root, kind, "mirror", lambda: dies_before if when == "before" else DiesAfter(), sticky=True
    ):
        place.check_and_complete()
        count += 1
    covered(count)


@pytest.mark.parametrize("fault", [_marked(fault) for fault in STORAGE_FAULTS])
@pytest.mark.parametrize("which", ["local", "mirror"])
def test_every_operation_of_a_mirror_fails_once(
    which: str, fault: str, root: Path, covered: Callable[[int], None]
) -> None:
    count = 0
    for place in points(root, "directory", which, lambda: STORAGE_FAULTS[fault], sticky=False):
        place.check_and_complete()
        count += 1
    covered(count)


@pytest.mark.parametrize("kind", ["directory", pytest.param("memory", marks=pytest.mark.slow)])
def test_killed_at_every_operation_of_mending(kind: str, root: Path, covered: Callable[[int], None]) -> None:
    """A committed copy that has changed is listed as damaged until it is whole again."""
    k = 0
    while True:
        place = Place(kind, root / str(k))
        Desk(place.local, place.second, retention=KEEP_2).once()
        (hurt,) = [item.id for item in list_checkpoints(place.second) if item.step == 20]
        change_byte(place.second, f"{hurt}/shard-00000.safetensors")
        there = Trigger()
        there.arm(k, dies_before, sticky=True)
        place.run(Trigger(), there)
        status = next(item.status for item in list_checkpoints(place.second) if item.id == hurt)
        if there.fired and status == "committed":
            # Not found yet, or mended: never half-mended and listed as whole.
            raw = place.second.read_bytes(f"{hurt}/shard-00000.safetensors", max_bytes=1 << 20)
            original = place.local.read_bytes(f"{hurt}/shard-00000.safetensors", max_bytes=1 << 20)
            assert len(raw) == len(original)
        desk = Desk(place.local, place.second, retention=KEEP_2)
        desk.mirror.open()
        desk.mirror.catch_up()
        desk.mirror.recheck_earlier_copies()
        desk.mirror.try_release()
        assert steps_in(place.second) == AGREED
        assert place.second.exists(f"{hurt}/{MANIFEST}")
        if not there.fired:
            break
        k += 1
    covered(k)
