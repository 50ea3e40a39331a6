"""`bench/mirror.py`: a slow line is as slow as it says, ratios compare within a repeat, and it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.cases.mirror import Slow, main, verdicts
from engine.storage.base import WINDOW_BYTES
from tests.storage.buffers import pattern, source


def test_a_slow_line_waits_for_every_byte(tmp_path: Path) -> None:
    waits: list[float] = []
    size = 2 * WINDOW_BYTES + 1000
    slow = Slow(tmp_path, 5e6, waits.append)
    slow.write_shard("shard", source(pattern(size)))
    assert sum(waits) == pytest.approx(size / 5e6)
    assert (tmp_path / "shard").read_bytes() == pattern(size)


@pytest.mark.parametrize(("slower", "reached"), [(1.04, True), (1.06, False)])
def test_ratios_compare_within_a_repeat(slower: float, reached: bool) -> None:
    """The machine was three times slower in the second repeat; the ratio does not see it."""
    secs = {"alone": [1.0, 3.0, 1.0], "mirrored": [slower, 3 * slower, slower]}
    (verdict,) = verdicts({}, secs)
    assert verdict.value == pytest.approx(slower)
    assert verdict.reached is reached


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--state_mb=1", "--saves=1", "--repeats=1", "--mb_per_sec=1000"]
    assert main([*flags, f"--dir={tmp_path}", f"--json={tmp_path}/out.json"]) == 0
    document = json.loads((tmp_path / "out.json").read_text())
    assert len(document["alone"]) == len(document["mirrored"]) == 1
    assert f"{document['verdicts'][0]['value']:.3g} x" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json"], "it clears up"
