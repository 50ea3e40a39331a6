"""`engine.checkpoints selftest` passes what is safe and finds each kind of storage that is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoints.dispatch import main
from engine.errors import StorageError
from engine.storage.base import Storage
from engine.storage.local import LocalStorage
from engine.storage.open import open_storage
from engine.storage.selftest import selftest
from engine.storage.source import Source
from tests.faults.layer import FaultStorage, Trigger
from tests.support.storages import LastWriterWins

SMALL = 48 << 20


class LyingAboutRaces(LastWriterWins):
    """Says that it creates exclusively, and lets the last writer win."""

    @property
    def supports_exclusive_create(self) -> bool:
        return True


def only(name: str, instead: Callable[[Callable[[], Any]], Any]) -> Callable[[Path], Storage]:
    """A local storage, one operation of which does something else."""

    def make(root: Path) -> Storage:
        trigger = Trigger()
        trigger.arm(0, lambda called, real: instead(real) if called == name else real(), sticky=True)
        return FaultStorage(LocalStorage(root), trigger)

    return make


def flipped(real: Callable[[], bytes]) -> bytes:
    return bytes([real()[0] ^ 1])


def refused(real: Callable[[], None]) -> None:
    raise StorageError("could not sync: invalid argument")


UNSAFE: list[tuple[str, Callable[[Path], Storage]]] = [
    ("create", only("read_bytes", flipped)),
    ("list after write", only("list_dir", lambda real: [])),
    ("exclusive create", LyingAboutRaces),
    ("rename", only("rename", lambda real: True)),
    ("sync", only("sync_dir", refused)),
    ("speed", only("read_into", lambda real: None)),
    ("delete", only("delete_file", lambda real: None)),
    ("clean up", only("delete_tree", lambda real: None)),
    ("create", only("publish", lambda real: None)),
]


@pytest.mark.parametrize(("finds", "make"), UNSAFE)
def test_an_unsafe_storage_is_found(finds: str, make: Callable[[Path], Storage], root: Path) -> None:
    root.mkdir(parents=True)
    failed = [check.name for check in selftest(make(root), speed_bytes=1 << 20) if check.ok is False]
    assert finds in failed


def test_a_partial_upload_that_is_published_is_found(root: Path) -> None:
    class Publishing(LocalStorage):
        def write_shard(self, path: str, source: Source) -> Any:
            try:
                return super().write_shard(path, source)
            except BaseException:
                (Path(self.root) / path).write_bytes(b"half")
                raise

    root.mkdir(parents=True)
    failed = [check.name for check in selftest(Publishing(root), speed_bytes=SMALL) if check.ok is False]
    assert failed == ["partial upload"]


@pytest.mark.parametrize("address", ["memory://selftest/run", "local"])
def test_safe_storages_pass_and_are_left_clean(
    address: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = str(root) if address == "local" else address
    assert main(["selftest", target, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["safe"]
    assert {check["name"] for check in document["checks"]} >= {name for name, _ in UNSAFE}
    assert open_storage(target).list_dir() == []


def test_the_exit_code_of_an_unsafe_one(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root.mkdir(parents=True)
    monkeypatch.setattr(
        "engine.checkpoints.selftest_command.open_storage", lambda *_, **__: LyingAboutRaces(root)
    )
    assert main(["selftest", str(root)]) == 1
    assert "NOT SAFE" in capsys.readouterr().out
