"""The benchmark of listing: what it measures, and its bar."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.cases.listing import ListingReport, main


def test_the_bar() -> None:
    secs = {"list_secs": [0.2, 0.5, 0.33], "bare_secs": [0.04, 0.05, 0.03]}
    report = ListingReport({}, {"checkpoints": 20, "tensors": 592, "repeats": 3}, {}, secs)
    assert report.more_secs == pytest.approx(0.29)
    assert "reached" in report.text()
    secs["list_secs"] = [0.35]
    assert "MISSED" in report.text()


def test_a_small_run_lists_every_checkpoint_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    flags = ["--checkpoints", "12", "--tensors", "3", "--repeats", "2", "--dir", str(tmp_path / "runs")]
    assert main([*flags, "--json", str(out)]) == 0
    assert "12 checkpoints, each 3 tensors; medians (lowest - highest) of 2" in capsys.readouterr().out
    document = json.loads(out.read_text())
    assert [len(document[f"{name}_secs"]) for name in ("list", "bare")] == [2, 2]
    assert document["listed"] == 12
    assert not any((tmp_path / "runs").iterdir())
