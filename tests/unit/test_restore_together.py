"""A restore on several ranks, as threads: what one rank cannot do, all hear of at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine import Checkpointer
from engine.errors import StorageUnavailableError
from engine.ranks.calls import Calls
from engine.ranks.coordination import Channel
from engine.restore import chunk_locations
from engine.restore.chunk_locations import MOST_BYTES
from engine.restore.filters import Filter
from engine.restore.restorer import Restorer
from engine.state.capture import StateCapture
from engine.storage.local import LocalStorage
from tests.support.channels import on_ranks
from tests.support.tiny_checkpoint import BIAS, COLUMNS, write_checkpoint

ROWS = 4


class Tiny(torch.nn.Module):
    """What `write_checkpoint` writes."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(ROWS, COLUMNS))
        self.b = torch.nn.Parameter(torch.zeros(BIAS))


class Away(LocalStorage):
    """Does not answer when an index is read."""

    def read_bytes(self, path: str, *, max_bytes: int) -> bytes:
        if path.endswith("shard-00000.json"):
            raise StorageUnavailableError("503")
        return super().read_bytes(path, max_bytes=max_bytes)


@pytest.mark.parametrize("most_bytes", [0, MOST_BYTES], ids=["each reads all", "rank 0 tells"])
def test_an_index_that_one_rank_cannot_read_stops_all(
    most_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others would wait for it until the time-out, and then say that it was late."""
    monkeypatch.setattr(chunk_locations, "MOST_BYTES", most_bytes)
    write_checkpoint(tmp_path, rows=ROWS)

    def work(channel: Channel) -> Any:
        storage = Away(tmp_path) if channel.rank == 1 else LocalStorage(tmp_path)
        capture = StateCapture({"model": Tiny()}, (), channel.rank)
        restorer = Restorer(
            storage, capture, Calls(channel, 10.0, 10.0), 0, 10.0, None, lambda event: None, True
        )
        return restorer.restore("latest", Filter())

    results = on_ranks(3, work)
    assert [type(result) for result in results] == [StorageUnavailableError] * 3
    assert {str(result) for result in results} == {"503"}


def test_a_checkpoint_without_generators_leaves_them_as_they_are(tmp_path: Path) -> None:
    """One that was imported from a file of weights, or merged."""
    write_checkpoint(tmp_path, rows=ROWS)
    before = torch.get_rng_state()
    with Checkpointer(tmp_path, {"model": (net := Tiny())}) as checkpointer:
        record = checkpointer.restore("latest")
        assert record is not None
        assert net.w.any()
        assert torch.equal(torch.get_rng_state(), before)
        checkpointer.save(11).result()
