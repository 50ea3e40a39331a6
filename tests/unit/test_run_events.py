"""metrics.jsonl: whole lines, every bit of a loss, a torn end cut off, a full disk survived."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from engine.errors import StorageError
from engine.run.events import MetricsLog, encode


def open_log(folder: Path, **given: Any) -> MetricsLog:
    return MetricsLog(str(folder), clock=lambda: 5.0, **given)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]


def test_one_write_a_line(tmp_path: Path) -> None:
    writes: list[bytes] = []

    def write(fd: int, data: bytes) -> int:
        writes.append(data)
        return os.write(fd, data)

    log = open_log(tmp_path, write=write)
    log.append({"event": "step", "step": 1, "loss": 0.1})
    log.append({"event": "step", "step": 2, "loss": 0.2})
    assert [line.count(b"\n") for line in writes] == [1, 1]
    assert all(line.endswith(b"\n") for line in writes)
    assert lines(tmp_path)[1] == {"event": "step", "step": 2, "loss": 0.2, "time": 5.0}


@pytest.mark.parametrize("loss", [0.1, 1 / 3, math.pi * 1e-7, 5e-324, 1.7976931348623157e308])
def test_a_loss_keeps_every_bit(loss: float) -> None:
    assert json.loads(encode({"loss": loss}))["loss"] == loss


def test_numbers_that_json_lacks_become_words() -> None:
    assert json.loads(encode({"loss": float("nan"), "m": [float("-inf")]})) == {"loss": "nan", "m": ["-inf"]}


@pytest.mark.parametrize(
    ("before", "kept"),
    [
        (b"", b""),
        (b'{"a":1}\n', b'{"a":1}\n'),
        (b'{"a":1}\n{"b":', b'{"a":1}\n'),
        (b'{"a":1}\n{"b":2}', b'{"a":1}\n'),
        (b'{"torn', b""),
        (b'{"a":1}\n' + b"x" * 200_000, b'{"a":1}\n'),
        (b"y" * 70_000 + b"\n" + b"x" * 70_000, b"y" * 70_000 + b"\n"),
    ],
    ids=["empty", "whole", "torn", "torn at the newline", "only a torn one", "long torn", "both long"],
)
def test_a_torn_last_line_is_cut_off(tmp_path: Path, before: bytes, kept: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(before)
    open_log(tmp_path).append({"event": "step"})
    written = (tmp_path / "metrics.jsonl").read_bytes()
    assert written == kept + encode({"event": "step", "time": 5.0})


def test_the_lines_of_an_abandoned_branch_stay(tmp_path: Path) -> None:
    for steps in ((1, 2, 3), (2, 3)):
        log = open_log(tmp_path)
        for step in steps:
            log.append({"event": "step", "step": step})
        log.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 2, 3]


def test_half_a_line_does_not_stay_in_the_middle(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A full disk takes a part of the line; what follows must still be readable."""
    room = [3, None, None]

    def write(fd: int, data: bytes) -> int:
        return os.write(fd, data[: room.pop(0)])

    log = open_log(tmp_path, write=write)
    for step in (1, 2, 3):
        log.append({"event": "step", "step": step})
    assert [line["step"] for line in lines(tmp_path)] == [2, 3]
    assert "3 of " in caplog.text


def test_a_failing_disk_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def write(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    log = open_log(tmp_path, write=write)
    log.append({"event": "step"})
    log.append({"event": "step"})
    assert caplog.text.count("No space left") == 1


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/logs/metrics\.jsonl.*--log_dir"):
        MetricsLog(str(tmp_path / "file" / "logs"))


def test_after_the_end_events_are_dropped(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.close()
    log.close()
    log.append({"event": "step"})
    assert lines(tmp_path) == []
