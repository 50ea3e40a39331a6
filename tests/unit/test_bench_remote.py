"""The report of `bench/remote.py`: ratios, bars, and what a row that failed looks like."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.cases.remote.program import main
from bench.cases.remote.report import Figures, RemoteReport, read
from bench.cases.remote.rows import ROWS
from bench.harness.records import paired_ratio

MB = 1_000_000


def report(*rows: Figures) -> RemoteReport:
    return RemoteReport({"git": {}}, {}, 256 * MB, list(rows))


def upload(name: str, peer: str, secs: list[float], above_mb: int = 10) -> Figures:
    return Figures(name, "upload", peer, secs, above_mb * MB)


def test_ratios_compare_within_a_repeat() -> None:
    """The machine was three times slower in the second repeat; the ratio does not see it."""
    own, other = upload("own", "", [1.0, 3.0, 1.0]), upload("other", "obstore", [2.0, 6.0, 2.0])
    made = report(own, other)
    assert paired_ratio(other.secs, own.secs) == 2.0
    assert made.best("obstore", "upload") is other
    assert made.best("s3fs", "upload") is None
    assert own.mb_per_sec(256 * MB) == 256.0


@pytest.mark.parametrize(
    ("secs", "above_mb", "reached"),
    [
        (1.0, 10, [True, True]),
        (1.11, 67, [True, True]),
        (1.12, 68, [False, False]),
    ],
)
def test_bars(secs: float, above_mb: int, reached: list[bool]) -> None:
    made = report(
        upload("Holdfast", "", [secs], above_mb),
        upload("slower way", "obstore", [5.0]),
        upload("faster way", "obstore", [1.0]),
    )
    assert [verdict.reached for verdict in made.verdicts()] == reached
    assert made.verdicts()[0].value == pytest.approx(1 / secs)


def test_a_row_that_failed_shows_why_and_counts_for_nothing() -> None:
    broken = Figures("obstore put", "upload", "obstore", [], 0, "ImportError: obstore")
    made = report(upload("Holdfast", "", [1.0]), broken)
    assert made.verdicts() == []
    assert "ImportError: obstore" in made.text()


def test_written_and_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = report(upload("Holdfast", "", [1.0, 1.5]), upload("put", "obstore", [1.0, 1.0]))
    made.write(tmp_path / "r.json")
    assert read(tmp_path / "r.json") == made
    assert main(["--load", str(tmp_path / "r.json")]) == 0
    assert made.text() in capsys.readouterr().out
    (tmp_path / "r.json").write_text('{"version": 99}')
    with pytest.raises(ValueError, match="99"):
        read(tmp_path / "r.json")


def test_every_direction_has_a_row_of_each_kind() -> None:
    kinds = {(row.verb, row.peer) for row in ROWS}
    assert kinds == {(verb, peer) for verb in ("upload", "download") for peer in ("", "obstore", "s3fs")}
    assert len({row.name for row in ROWS}) == len(ROWS)
