"""The benchmark of many small tensors: what it measures, and its bars."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.cases.small_tensors import main, verdicts


def test_the_bars() -> None:
    secs = {"save_secs": [0.03, 0.05, 0.04], "copy_secs": [0.015], "look_secs": [0.0009]}
    found = verdicts({"tensors": 1000}, secs)
    assert found[0].limit == pytest.approx(40.0), "ms"
    assert [verdict.reached for verdict in found] == [True, True]
    found = verdicts({"tensors": 1000}, {**secs, "save_secs": [0.041], "look_secs": [0.0011]})
    assert [verdict.reached for verdict in found] == [False, False]


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
