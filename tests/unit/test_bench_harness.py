"""What the benchmarks share: turns that warm up, ranks that failed, and the folder that a run leaves."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.harness.launch import RanksFailed, temporary_folder
from bench.harness.passes import Benchmark, Passes, count
from bench.harness.report import Report, at_least, at_most, finish


def counting(turns: list[tuple[str, int]]) -> Benchmark:
    """A benchmark of two passes whose samples are the numbers of their turns."""

    @contextmanager
    def passes(options: Namespace, folder: Path) -> Iterator[Passes]:
        def run(name: str, turn: int) -> float:
            turns.append((name, turn))
            return float(turn)

        (folder / "left behind").write_text("x")
        yield {name: lambda turn, name=name: run(name, turn) for name in ("a_secs", "b_secs")}

    return Benchmark(
        name="counting",
        description="",
        repeats=3,
        flags={"size": count(1, 7, "of it")},
        title="size {size}",
        passes=passes,
        verdicts=lambda options, secs: [at_most("most", max(secs["a_secs"]), options["size"], "s")],
        untimed=2,
    )


def test_turns_that_warm_up_do_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns: list[tuple[str, int]] = []
    out = tmp_path / "out.json"
    assert counting(turns).main([f"--dir={tmp_path / 'runs'}", f"--json={out}", "--size=4"]) == 0
    document = json.loads(out.read_text())
    assert document["a_secs"] == document["b_secs"] == [3.0, 4.0, 5.0]
    assert sorted(turns) == [(name, turn) for name in ("a_secs", "b_secs") for turn in range(1, 6)]
    assert [turn for _, turn in turns] == sorted(turn for _, turn in turns), "turn after turn"
    shown = capsys.readouterr().out
    assert "size 4; medians (lowest - highest) of 3 repeats" in shown
    assert "4.0000 (3.0000 - 5.0000)" in shown
    assert "MISSED" in shown
    assert document["verdicts"][0]["reached"] is False
    assert not any((tmp_path / "runs").iterdir())


def test_a_run_whose_ranks_failed_shows_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure() -> Report:
        raise RanksFailed

    assert finish(Namespace(json=tmp_path / "out.json"), measure) == 1
    assert capsys.readouterr().out == ""
    assert not any(tmp_path.iterdir())


def test_the_folder_of_a_run_is_its_own_and_goes_with_an_error(tmp_path: Path) -> None:
    with temporary_folder(tmp_path / "new", "save") as one, temporary_folder(tmp_path / "new", "save") as two:
        assert one != two
        (one / "shard").write_bytes(b"x")
    assert not any((tmp_path / "new").iterdir())
    with pytest.raises(FileNotFoundError), temporary_folder(tmp_path / "new", "save") as folder:
        (folder / "shard").read_bytes()
    assert not any((tmp_path / "new").iterdir())


def test_bars_are_reached_at_their_limit() -> None:
    assert at_most("x", 1.0, 1.0).reached is True
    assert at_most("x", 1.01, 1.0).reached is False
    assert at_least("x", 1.0, 1.0).reached is True
    assert at_least("x", 0.99, 1.0).reached is False
    assert at_most("x", None, 1.0).reached is at_most("x", 1.0, None).reached is None
