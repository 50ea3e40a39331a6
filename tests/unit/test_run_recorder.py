"""Where an event ends up: the log, the command, the console, and the record of the best loss."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from engine.run.config import TrainConfig
from engine.run.console import Console, checkpoint_line
from engine.run.events import MetricsLog
from engine.run.hook import EventHook
from engine.run.recorder import HOOK_CLOSE_SECS, Recorder, log_directory
from engine.run.schedule import BestLoss
from engine.run.trainer import time_for_the_command


class Desk:
    """A recorder with everything attached, and what came out of it."""

    def __init__(self, folder: Path) -> None:
        self.out = io.StringIO()
        self.now = 0.0
        self.commands: list[dict[str, Any]] = []
        self.folder = folder
        console = Console(speaks=True, out=self.out, clock=lambda: self.now)
        self.recorder = Recorder(console, BestLoss(4.0))
        hook = EventHook("cmd", run=lambda command, line: self.commands.append(json.loads(line)))
        self.recorder.open(MetricsLog(str(folder)), hook)

    def logged(self) -> list[dict[str, Any]]:
        self.recorder.close()
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


STEP = {
    "event": "step",
    "step": 1,
    "loss": 0.1,
    "tokens": 10,
    "step_secs": 0.5,
    "lr": 1e-3,
    "step_tokens": 10,
}


def test_steps_go_to_the_log_and_not_to_the_command(desk: Desk) -> None:
    desk.recorder.step(STEP, 5)
    (line,) = desk.logged()
    assert {key: line[key] for key in ("event", "step", "loss", "tokens", "step_secs")} == {
        "event": "step",
        "step": 1,
        "loss": 0.1,
        "tokens": 10,
        "step_secs": 0.5,
    }
    assert "step_tokens" not in line, "that one is for the console"
    assert desk.commands == []


def test_every_other_event_goes_to_both(desk: Desk) -> None:
    desk.recorder.evaluated(3, 2.5, best=True, secs=0.1)
    for kind in ("save_started", "save_snapshotted", "save_committed", "restored"):
        desk.recorder.from_engine({"event": kind, "step": 3, "bytes": 5, "secs": 1.0})
    kinds = ["eval", "save_started", "save_snapshotted", "save_committed", "restored"]
    assert [line["event"] for line in desk.logged()] == kinds
    assert [event["event"] for event in desk.commands] == kinds
    assert desk.commands[0] == {"event": "eval", "step": 3, "val_loss": 2.5, "best": True, "secs": 0.1}


def test_a_saves_events_say_why_and_with_which_loss(desk: Desk) -> None:
    """So a command can send mail about a best model and leave the others."""
    desk.recorder.announce_save(3, ("interval", "best"), {"val_loss": 2.5})
    desk.recorder.from_engine({"event": "save_started", "step": 3})
    desk.recorder.from_engine({"event": "save_committed", "step": 3, "path": "/c/step-3"})
    desk.recorder.from_engine({"event": "save_committed", "step": 4})
    started, committed, other = desk.logged()
    assert started["reasons"] == committed["reasons"] == ["interval", "best"]
    assert committed["metrics"] == {"val_loss": 2.5}
    assert "metrics" not in other


@pytest.mark.parametrize(("kind", "improves"), [("save_committed", False), ("save_failed", True)])
def test_the_best_loss_is_that_of_a_committed_checkpoint(desk: Desk, kind: str, improves: bool) -> None:
    desk.recorder.announce_save(3, ("best",), {"val_loss": 2.5})
    desk.recorder.from_engine({"event": kind, "step": 3})
    assert desk.recorder.improves(3.0) is improves


def test_before_it_is_opened_nothing_is_written(tmp_path: Path) -> None:
    """The directory may turn out to be another run's: its log is left alone until that is settled."""
    recorder = Recorder(Console(speaks=False))
    recorder.from_engine({"event": "save_committed", "step": 1})
    recorder.open(MetricsLog(str(tmp_path)), None)
    recorder.from_engine({"event": "restored", "step": 1})
    recorder.close()
    assert [json.loads(line)["event"] for line in (tmp_path / "metrics.jsonl").open()] == ["restored"]


def test_progress_is_shown_once_a_second_and_at_the_end(desk: Desk) -> None:
    for step, now in ((1, 0.0), (2, 0.4), (3, 1.1), (4, 1.2)):
        desk.now = now
        desk.recorder.step({**STEP, "step": step}, 4, force=step == 4)
    shown = [line.split(" | ")[0] for line in desk.out.getvalue().splitlines()]
    assert shown == ["step 1/4", "step 3/4", "step 4/4"]


def test_other_ranks_are_silent() -> None:
    out = io.StringIO()
    console = Console(speaks=False, out=out)
    console.say("x")
    console.progress(STEP, 5, force=True)
    assert out.getvalue() == ""


class Gone(io.StringIO):
    def flush(self) -> None:
        raise BrokenPipeError


def test_a_terminal_that_is_gone_stops_nothing() -> None:
    """The engine calls from its background thread, where an exception would fail the save."""
    Console(speaks=True, out=Gone()).checkpoint({"event": "save_committed", "step": 1})


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (
            {
                "event": "save_committed",
                "step": 3,
                "reasons": ["interval", "best"],
                "bytes": 1_490_000_000,
                "secs": 0.61,
                "blocked_secs": 0.1,
                "path": "/c/step-3",
            },
            "checkpoint: step 3 (interval, best) committed, 1.49 GB in 0.61 s, "
            "training waited 0.10 s -> /c/step-3",
        ),
        ({"event": "save_failed", "step": 3, "cause": "no space"}, "checkpoint: step 3 FAILED: no space"),
        ({"event": "restored", "step": 3, "path": "/c/step-3"}, "restored: step 3 from /c/step-3"),
        ({"event": "save_started", "step": 3}, None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_the_line_for_a_checkpoint(event: dict[str, Any], said: str | None) -> None:
    assert checkpoint_line(event) == said


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"checkpoint_dir": "/c/run"}, "/c/run/logs"),
        ({"checkpoint_dir": "file:///c/run"}, "/c/run/logs"),
        ({"checkpoint_dir": "s3://bucket/team/run-1/"}, "logs/run-1"),
        ({"checkpoint_dir": "/c/run", "log_dir": "/l"}, "/l"),
    ],
    ids=str,
)
def test_where_the_log_goes(flags: dict[str, Any], expected: str) -> None:
    assert log_directory(TrainConfig(**flags)) == expected


def test_what_a_save_usually_takes(desk: Desk) -> None:
    """The median of the last five that committed, without the time that they waited for the one before."""
    assert desk.recorder.usual_save_secs == 0.0

    def ended(kind: str, secs: float, waited: float) -> None:
        desk.recorder.from_engine({"event": kind, "step": 1, "secs": secs, "secs_by_cause": {"wait": waited}})

    ended("save_committed", 9.0, 8.0)
    assert desk.recorder.usual_save_secs == 1.0
    ended("save_failed", 50.0, 0.0)
    for secs in (2.0, 3.0, 4.0, 30.0):
        ended("save_committed", secs, 0.0)
    assert desk.recorder.usual_save_secs == 3.0
    for secs in (30.0, 31.0):
        ended("save_committed", secs, 0.0)
    assert desk.recorder.usual_save_secs == 30.0


@pytest.mark.parametrize(
    ("left", "secs"), [(None, HOOK_CLOSE_SECS), (25.0, HOOK_CLOSE_SECS), (8.0, 6.0), (1.0, 0.0), (0.0, 0.0)]
)
def test_after_a_signal_the_command_gets_what_is_left_of_the_grace_time(
    left: float | None, secs: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow command must not make a run that has saved one that was too late."""
    asked: list[float] = []
    recorder = Recorder(Console(speaks=False))
    hook = EventHook("cmd", run=lambda command, line: None)
    monkeypatch.setattr(hook, "close", lambda timeout_secs: asked.append(timeout_secs))
    monkeypatch.setattr(recorder, "_hook", hook)
    recorder.close(time_for_the_command(left))
    assert asked == [secs]
