"""The restore benchmark: flags, figures, bars and tables, and one real run in one process on a tiny model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.cases.modes.registry import HOLDFAST, LOADS, mode_class
from bench.cases.modes.registry import LOAD_REFERENCE as REFERENCE
from bench.cases.restore.program import parse
from bench.cases.restore.records import CACHES, FLOORS, Case, Load, Measured, items_of, verdicts
from bench.cases.restore.report import RestoreReport, bars, read
from bench.cases.restore.session import RestoreSession
from bench.harness.raw_read import RawRead, drop, warm
from bench.harness.records import Failure, shuffled
from engine.run.world import World
from model.config import GPT2Config

STOCK_READER, TORCH_LOAD = "HuggingFaceStorageReader", "torch.load"
TINY = GPT2Config(n_layer=1, n_head=1, n_embd=32, vocab_size=64, block_size=64)
PROVENANCE: dict[str, Any] = {
    "date": "2026-01-01",
    "git": {"revision": "0" * 40, "dirty": False},
    "machine": {"cores": 2},
    "file_system": {"type": "ext4"},
    "versions": {"torch": "2.13"},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other take seconds where other tests run beside these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_flags_have_defaults_and_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    options = parse([])
    assert options.cases == (Case(1, 1), Case(2, 4))
    assert options.rows == LOADS
    assert parse(["--rows", TORCH_LOAD, HOLDFAST]).rows == (HOLDFAST, TORCH_LOAD)
    for wrong in (
        ["--cases", "2"],
        ["--cases", "0:1"],
        ["--rows", "x"],
        ["--repeats", "0"],
        ["--state", "?"],
    ):
        with pytest.raises(SystemExit) as caught:
            parse(wrong)
        assert caught.value.code == 2
        assert wrong[0] in capsys.readouterr().err


def test_everything_is_measured_cold_and_warm_in_an_order_of_its_own() -> None:
    items = items_of([HOLDFAST, REFERENCE])
    first = shuffled(items, 1, 0)
    assert sorted(first) == sorted((row, cache) for row in (HOLDFAST, REFERENCE, *FLOORS) for cache in CACHES)
    assert first == shuffled(items, 1, 0)
    assert first != shuffled(items, 1, 1)


def measured(ours: float, *, asked: int = 1050, memory: int = 256_000_000) -> Measured:
    """Holdfast takes `ours` seconds; one thread reads in 1.0 s, two in 0.8 s, the reference takes 2.0 s."""
    secs = {HOLDFAST: ours, REFERENCE: 2.0, FLOORS[0]: 1.0, FLOORS[1]: 0.8}
    found = Measured(Case(2, 4), "cpu", 1000, memory={HOLDFAST: memory})
    for repeat, factor in enumerate((1.0, 0.5, 3.0)):
        for row, one in secs.items():
            for cache in CACHES:
                told = asked if row == HOLDFAST else None
                found.loads.append(Load(row, cache, repeat, one * factor, 2000, told))
    return found


def test_bars_compare_medians() -> None:
    found = verdicts(measured(0.9))
    assert [round(verdict.value or 0, 6) for verdict in found[:3]] == [0.9, 1.125, 0.45]
    assert [verdict.reached for verdict in found] == [True] * 8
    assert found[-1].value == 1.05


@pytest.mark.parametrize(
    ("missing", "case"),
    [
        ([0, 3], measured(0.91)),
        ([0, 1, 3, 4], measured(0.97)),
        ([0, 1, 2, 3, 4, 5], measured(1.21)),
        ([6], measured(0.1, memory=256_000_001)),
        ([7], measured(0.1, asked=1051)),
    ],
)
def test_bars_are_missed(missing: list[int], case: Measured) -> None:
    assert [n for n, verdict in enumerate(verdicts(case)) if not verdict.reached] == missing


def test_what_was_not_measured_is_not_judged() -> None:
    case = measured(0.5)
    case.loads = [load for load in case.loads if load.row == HOLDFAST]
    assert [verdict.reached for verdict in verdicts(case)] == [None] * 6 + [True] * 2
    case.loads = []
    assert verdicts(case) == []


def test_a_report_survives_the_disk_and_shows_everything(tmp_path: Path) -> None:
    case = measured(0.9)
    case.failures.append(Failure(STOCK_READER, "restoring", "ValueError: no"))
    report = RestoreReport(PROVENANCE, {"state": "gpt2"}, [case])
    report.write(tmp_path / "deep" / "result.json")
    again = read(tmp_path / "deep" / "result.json")
    assert again.text() == report.text()
    for text in ("Saved by 2 rank(s), restored by 4", "0.900 (0.450 - 2.700)", "ValueError: no", "reached"):
        assert text in again.text()
    names = [bar.name for bar in bars(case, "warm")]
    assert names == [FLOORS[1], "Holdfast, verified", FLOORS[0], REFERENCE]
    (tmp_path / "old").write_text('{"version": 0}')
    with pytest.raises(ValueError, match="version 0"):
        read(tmp_path / "old")


def test_the_picture_is_drawn_with_a_row_for_each_case(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = RestoreReport(PROVENANCE, {"state": "gpt2", "repeats": 3}, [measured(0.9), measured(0.5)])
    report.draw(tmp_path / "deep" / "picture.png")
    assert (tmp_path / "deep" / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("threads", [1, 2])
def test_the_floor_reads_every_byte_once(tmp_path: Path, threads: int) -> None:
    files = [tmp_path / name for name in ("a", "b", "c")]
    for file, size in zip(files, (1000, 1, 77_777), strict=True):
        file.write_bytes(os.urandom(size))
    drop(files)
    warm(files)
    whole = b"".join(file.read_bytes() for file in files)
    parts = []
    for part in range(3):
        floor = RawRead(files, part, 3)
        floor.read(threads)
        parts.append(bytes(floor._buffer.numpy()))
    assert b"".join(parts) == whole


@pytest.mark.parametrize("threads", [1, 2])
def test_a_floor_that_did_not_read_everything_is_none(tmp_path: Path, threads: int) -> None:
    file = tmp_path / "a"
    file.write_bytes(bytes(5000))
    floor = RawRead([file], 0, 1)
    os.truncate(file, 4000)
    with pytest.raises(AssertionError, match="shorter"):
        floor.read(threads)


def test_a_real_run(tmp_path: Path) -> None:
    rows = (HOLDFAST, REFERENCE, STOCK_READER, TORCH_LOAD)
    saving = RestoreSession(TINY, World(), torch.device("cpu"), tmp_path, seed=1)
    assert saving.save(rows) == []
    loading = RestoreSession(TINY, World(), torch.device("cpu"), tmp_path, seed=2)
    found = loading.measure(Case(1, 1), rows, repeats=1)
    assert found.failures == []
    assert sorted(found.rows()) == sorted((*rows, *FLOORS))
    assert len(found.loads) == 2 * (len(rows) + len(FLOORS))
    assert found.read_share(HOLDFAST) is not None
    assert set(found.memory) == set(rows)
    assert len(verdicts(found)) == 8


def test_a_row_that_restores_something_else_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = RestoreSession(TINY, World(), torch.device("cpu"), tmp_path, seed=1)
    session.save([HOLDFAST, REFERENCE])
    monkeypatch.setattr(mode_class(REFERENCE), "load", lambda row: None)
    found = session.measure(Case(1, 1), [HOLDFAST, REFERENCE], repeats=1)
    (failure,) = found.failures
    assert failure.row == REFERENCE
    assert "the state was not restored" in failure.error
    assert REFERENCE not in found.rows()
