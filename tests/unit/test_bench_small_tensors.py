"""The benchmark of many small tensors: what it measures, and its bars."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.cases.small_tensors import SmallTensorsReport, main


def test_the_bars() -> None:
    secs = {"save_secs": [0.03, 0.05, 0.04], "copy_secs": [0.015], "look_secs": [0.0009]}
    report = SmallTensorsReport({}, {"tensors": 1000, "bytes": 4096, "repeats": 3}, {}, secs)
    assert report.limit_secs == pytest.approx(0.040)
    assert report.text().count("reached") == 2
    secs |= {"save_secs": [0.041], "look_secs": [0.0011]}
    assert report.text().count("MISSED") == 2


def test_a_small_run_measures_everything_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    flags = ["--tensors", "20", "--bytes", "64", "--repeats", "3", "--dir", str(tmp_path / "runs")]
    assert main([*flags, "--json", str(out)]) == 0
    assert "20 tensors of 64 bytes; medians (lowest - highest) of 3" in capsys.readouterr().out
    document = json.loads(out.read_text())
    assert [len(document[f"{name}_secs"]) for name in ("save", "copy", "look")] == [3, 3, 3]
    assert document["provenance"]["git"]["revision"]
    assert not any((tmp_path / "runs").iterdir())
