"""The benchmark of listing: what it measures, and its bar."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.cases.listing import main, verdicts


def test_the_bar() -> None:
    secs = {"list_secs": [0.2, 0.5, 0.33], "bare_secs": [0.04, 0.05, 0.03]}
    (verdict,) = verdicts({}, secs)
    assert verdict.value == pytest.approx(0.29)
    assert verdict.reached
    (verdict,) = verdicts({}, {**secs, "list_secs": [0.35]})
    assert verdict.reached is False


def test_a_small_run_lists_every_checkpoint_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    flags = ["--checkpoints", "12", "--tensors", "3", "--repeats", "2", "--dir", str(tmp_path / "runs")]
    assert main([*flags, "--json", str(out)]) == 0
    assert "12 checkpoints, each 3 tensors; medians (lowest - highest) of 2" in capsys.readouterr().out
    document = json.loads(out.read_text())
    assert [len(document[f"{name}_secs"]) for name in ("list", "bare")] == [2, 2]
    assert document["options"]["checkpoints"] == 12
    assert not any((tmp_path / "runs").iterdir())
