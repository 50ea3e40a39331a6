"""Runs the real programs on a tiny model and reads back what they left: metrics, listings, manifests.

Every run is a subprocess started as a person would start it. A `Run` is one checkpoint directory with its
logs; several launches, one after the other, may work on it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo.job import Event, Job, committed_steps, read_metrics, steps_of, torchrun
from tests.support.forked_train import run_ranks

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_SECS = 120.0
"""No test waits that long unless something hangs; it only bounds the wait."""

TINY: dict[str, Any] = {
    "model": "nano",
    "seq_len": 32,
    "global_batch": 12,
    "device": "cpu",
    "warmup_steps": 4,
    "lr_decay_steps": 40,
    "eval_freq": 0,
    "seed": 11,
}
"""Flags of every run unless a test gives others. 12 sequences split over 1, 2, 3 and 4 ranks."""


def flags(values: Mapping[str, Any]) -> list[str]:
    """{"max_steps": 4, "new_run": True} -> ["--max_steps=4", "--new_run"]; None leaves a flag out."""
    given = []
    for name, value in values.items():
        if isinstance(value, bool):
            given.append(f"--{name}" if value else f"--no_{name}")
        elif value is not None:
            given.append(f"--{name}={value}")
    return given


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """What the programs see on top of the tests' environment: this checkout, one thread a rank.

    A rank that crashes in native code prints the stacks of its threads.
    """
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    return {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1", **(extra or {})}


def program(module: str, *args: str, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> Finished:
    """Run `python -m module` to its end, whatever its exit status."""
    command = [sys.executable, "-m", module, *args]
    ran = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment(env)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECS,
        check=False,
    )
    return Finished(ran.returncode, ran.stdout, ran.stderr)


@dataclass(frozen=True)
class Finished:
    """How a program ended and what it printed."""

    status: int
    stdout: str
    stderr: str

    @property
    def text(self) -> str:
        return self.stdout + self.stderr

    def ok(self) -> Finished:
        """Itself, if the exit status is 0."""
        assert self.status == 0, f"ended with {self.status}\n{self.text}"
        return self


@dataclass
class Run:
    """One checkpoint directory and its logs.

    Args:
        folder: everything of this run lies below it, except the checkpoints when `checkpoints` is given.
        data: the prepared dataset.
        checkpoints: a directory or URI.
        env: added to the environment of every program.
    """

    folder: Path
    data: Path
    checkpoints: str = ""
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.checkpoints = self.checkpoints or str(self.folder / "checkpoints")

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    def copy_to(self, folder: Path) -> Run:
        """The same checkpoints and logs in another folder, to go on from there and leave this run alone."""
        shutil.copytree(self.folder, folder)
        return Run(folder, self.data, env=dict(self.env))

    def start(self, nproc: int | None, **given: Any) -> Job:
        """Start `engine.train` on `nproc` ranks under torchrun; None means without torchrun."""
        args = ["-m", "engine.train", *self._flags(given)]
        return self.launch([sys.executable, *args] if nproc is None else torchrun(nproc, *args))

    def launch(self, command: list[str]) -> Job:
        return Job(command, log=self.folder / "output.log", cwd=ROOT, env=environment(self.env))

    def train(self, nproc: int | None, **given: Any) -> Run:
        """Run the trainer to its end, forked and without torchrun, and insist on exit status 0."""
        log = self.folder / "output.log"
        status = run_ranks(
            nproc,
            self._flags(given),
            log=log,
            cwd=ROOT,
            env=environment(self.env),
            timeout_secs=PATIENCE_SECS,
        )
        assert status == 0, f"ended with {status}\n{log.read_text(errors='replace')[-8000:]}"
        return self

    def _flags(self, given: Mapping[str, Any]) -> list[str]:
        mine = {"data": self.data, "checkpoint_dir": self.checkpoints, "log_dir": self.logs}
        return flags({**TINY, **mine, **given})

    def resume(self, *args: str, **given: Any) -> Run:
        """`python -m engine.resume` on this run's directory."""
        command = [sys.executable, "-m", "engine.resume", f"--checkpoint_dir={self.checkpoints}", *args]
        self.launch([*command, *flags({"log_dir": self.logs, **given})]).finish(PATIENCE_SECS)
        return self

    def events(self, kind: str | None = None) -> list[Event]:
        return [e for e in read_metrics(self.logs) if kind is None or e["event"] == kind]

    def losses(self) -> dict[int, float]:
        """step -> loss; of a step that was done more than once, the last."""
        return {step: event["loss"] for step, event in steps_of(self.events()).items()}

    def losses_since_restore(self) -> dict[int, float]:
        """The same, of the steps after the last `restored` event."""
        events = self.events()
        last = max(i for i, e in enumerate(events) if e["event"] == "restored")
        return {step: event["loss"] for step, event in steps_of(events[last:]).items()}

    def committed(self) -> list[int]:
        return committed_steps(self.events())

    def restored_step(self) -> int:
        """The step of the last checkpoint that this run resumed from."""
        return int(self.events("restored")[-1]["step"])

    def listing(self) -> list[dict[str, Any]]:
        """`engine.checkpoints list --json`."""
        ran = program("engine.checkpoints", "list", self.checkpoints, "--json", env=self.env).ok()
        found: list[dict[str, Any]] = json.loads(ran.stdout)["checkpoints"]
        return found

    def reasons(self) -> dict[int, list[str]]:
        """step -> why it was saved, from the manifests of a local run."""
        found = [json.loads(path.read_bytes()) for path in Path(self.checkpoints).glob("*/manifest.json")]
        return {manifest["step"]: manifest["reasons"] for manifest in found}

    def with_role(self, role: str) -> dict[str, Any]:
        """The one listed checkpoint that serves as `role`."""
        (found,) = [c for c in self.listing() if role in c["roles"]]
        return found
