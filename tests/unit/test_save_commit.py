"""The commit: all receipts in, every file confirmed, the lease still held, and a complete manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.directory.listing import committed, list_checkpoints, read_manifest
from engine.errors import (
    AlreadyExistsError,
    LeaseLostError,
    NotFoundError,
    PeerFailedError,
    ReplicaMismatchError,
    SaveFailedError,
)
from engine.format.manifest import FileReceipt, ShardReceipt, TensorInfo
from engine.lease.lease import Lease
from engine.save.commit import SaveInfo, check_receipts, commit, confirm_files, software_versions
from engine.save.messages import Receipt
from engine.storage.local import LocalStorage

ATTEMPT = "step-00000007-aaaaaaaa"
DIGEST = "0123456789abcdef" * 2


def shard(rank: int, size: int = 10) -> ShardReceipt:
    return ShardReceipt(
        rank,
        (FileReceipt(f"shard-{rank:05d}.safetensors", size, DIGEST),),
        FileReceipt(f"shard-{rank:05d}.json", 3, DIGEST),
    )


def test_receipts_become_shards_in_rank_order() -> None:
    receipts = [Receipt(rank, ATTEMPT, shard(rank), {"loader": "same"}) for rank in range(3)]
    assert check_receipts(receipts, ATTEMPT) == (shard(0), shard(1), shard(2))


@pytest.mark.parametrize(
    ("receipts", "kind", "words"),
    [
        (
            [Receipt(0, ATTEMPT, shard(0)), Receipt(1, ATTEMPT, error="no space")],
            PeerFailedError,
            "rank 1: no space",
        ),
        (
            [Receipt(0, ATTEMPT, shard(0)), Receipt(1, "other", shard(1))],
            SaveFailedError,
            "rank 1 reported a different",
        ),
        # A failure is the cause; that the failed rank's values differ as well is noise.
        (
            [Receipt(0, ATTEMPT, shard(0), {"loader": "1"}), Receipt(1, "other", error="no space")],
            PeerFailedError,
            "no space",
        ),
    ],
)
def test_receipts_that_allow_no_commit(receipts: list[Receipt], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        check_receipts(receipts, ATTEMPT)


def test_values_that_differ_allow_no_commit() -> None:
    receipts = [Receipt(0, ATTEMPT, shard(0)), Receipt(1, ATTEMPT, shard(1))]
    with pytest.raises(ReplicaMismatchError, match=r"loader differs on rank 1.*per_rank"):
        check_receipts(receipts, ATTEMPT, ["loader differs on rank 1: 2 there, 1 on rank 0"])


class Nfs(LocalStorage):
    """Lists what it remembers: entries appear by name some looks before they appear in listings."""

    def __init__(self, root: Path, looks_until_seen: int) -> None:
        super().__init__(root)
        self.looks = looks_until_seen

    def list_dir(self, path: str = "") -> list[Any]:
        return [] if path == ATTEMPT else super().list_dir(path)

    def size(self, path: str) -> int:
        self.looks -= 1
        if self.looks >= 0:
            raise NotFoundError(f"{path}: not there yet")
        return super().size(path)


class Time:
    """A clock that only sleeping moves on."""

    def __init__(self) -> None:
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def sleep(self, secs: float) -> None:
        self.now += secs


def write_files(root: Path, ranks: int = 2, size: int = 10) -> None:
    (root / ATTEMPT).mkdir()
    for rank in range(ranks):
        (root / ATTEMPT / f"shard-{rank:05d}.safetensors").write_bytes(b"x" * size)
        (root / ATTEMPT / f"shard-{rank:05d}.json").write_bytes(b"{} ")


def test_files_that_are_all_there_need_one_listing(tmp_path: Path) -> None:
    write_files(tmp_path)
    storage, time = Nfs(tmp_path, 10**9), Time()
    storage.list_dir = lambda path="": LocalStorage.list_dir(storage, path)  # type: ignore[method-assign]
    confirm_files(storage, ATTEMPT, (shard(0), shard(1)), 5.0, clock=time.clock, sleep=time.sleep)
    assert time.now == 0
    assert storage.looks == 10**9, "nothing was looked up by name"


def test_a_cached_listing_is_not_believed(tmp_path: Path) -> None:
    write_files(tmp_path)
    time = Time()
    confirm_files(Nfs(tmp_path, 5), ATTEMPT, (shard(0), shard(1)), 60.0, clock=time.clock, sleep=time.sleep)
    assert 0 < time.now < 60


@pytest.mark.parametrize(
    ("present", "size", "words"),
    [
        (1, 10, "rank 1 wrote shard-00001.safetensors with 10 bytes, but rank 0 does not see it"),
        (2, 9, "rank 0 wrote shard-00000.safetensors with 10 bytes, but rank 0 sees 9 bytes"),
    ],
)
def test_a_file_that_rank_0_does_not_see_is_no_commit(
    present: int, size: int, words: str, tmp_path: Path
) -> None:
    write_files(tmp_path, present, size)
    time = Time()
    with pytest.raises(SaveFailedError, match=words) as caught:
        confirm_files(
            LocalStorage(tmp_path), ATTEMPT, (shard(0), shard(1)), 30.0, clock=time.clock, sleep=time.sleep
        )
    assert "share one checkpoint directory" in str(caught.value)
    assert time.now <= 30


def publish(storage: LocalStorage, lease: Lease | None = None, **more: Any) -> Any:
    info = SaveInfo(7, ATTEMPT, ("interval", "best"), **more)
    return commit(
        storage,
        lease,
        info,
        (shard(0),),
        {"t": TensorInfo("F32", (2,))},
        {"u": "t"},
        {"loader": {"n": 1}},
        sequence=4,
        parent="step-00000005-bbbbbbbb",
        now=lambda: 1.7e9,
    )


def test_the_manifest_says_it_all(tmp_path: Path) -> None:
    write_files(tmp_path, 1)
    storage = LocalStorage(tmp_path)
    record = publish(
        storage, epoch=2, tokens=9, metrics={"val_loss": 1.5, "x": float("inf")}, config={"lr": 0.1}
    )
    manifest = read_manifest(storage, ATTEMPT)
    assert (manifest.id, manifest.sequence, manifest.parent) == (ATTEMPT, 4, "step-00000005-bbbbbbbb")
    assert (manifest.step, manifest.epoch, manifest.tokens) == (7, 2, 9)
    assert (manifest.created, manifest.reasons) == (1.7e9, ("interval", "best"))
    assert manifest.metrics == {"val_loss": 1.5, "x": float("inf")}
    assert manifest.tensors == {"t": TensorInfo("F32", (2,))}
    assert manifest.aliases == {"u": "t"}
    assert manifest.objects == {"loader": {"n": 1}}
    assert manifest.config == {"lr": 0.1}
    assert manifest.shards == (shard(0),)
    assert [record] == committed(list_checkpoints(storage))


def test_a_manifest_is_never_replaced(tmp_path: Path) -> None:
    write_files(tmp_path, 1)
    storage = LocalStorage(tmp_path)
    publish(storage)
    before = (tmp_path / ATTEMPT / "manifest.json").read_bytes()
    with pytest.raises(AlreadyExistsError):
        publish(storage, tokens=1)
    assert (tmp_path / ATTEMPT / "manifest.json").read_bytes() == before


def test_whoever_has_lost_the_lease_commits_nothing(tmp_path: Path) -> None:
    write_files(tmp_path, 1)
    storage = LocalStorage(tmp_path)
    lease = Lease.acquire(storage, run_id="a")
    (tmp_path / "lease-00000099").write_text("{}")
    try:
        with pytest.raises(LeaseLostError):
            publish(storage, lease)
    finally:
        lease.release()
    assert not (tmp_path / ATTEMPT / "manifest.json").exists()


def test_the_software_is_named() -> None:
    versions = software_versions(torch="2.99")
    assert versions["torch"] == "2.99"
    assert versions["python"].startswith("3.")
