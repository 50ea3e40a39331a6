"""Runs a training job as a person would in a shell: launch it, watch its metrics, kill it, wait.

torchrun starts each worker in its own session, so killing torchrun's process group would miss them. Each job
therefore has a mark in its environment, which all its processes inherit and by which they are found.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

MARK = "HOLDFAST_DEMO_JOB"
Event = dict[str, Any]


class JobError(RuntimeError):
    """A job ended unexpectedly; the message includes the end of its log."""


def torchrun(nproc: int, *args: str) -> list[str]:
    """The command line of a single-node run, with the torchrun script beside this interpreter."""
    return [str(Path(sys.executable).parent / "torchrun"), "--standalone", f"--nproc_per_node={nproc}", *args]


def read_metrics(log_dir: Path) -> list[Event]:
    """The events of metrics.jsonl, without a last line that is still being written."""
    path = log_dir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


class Job:
    """One running command, its processes and its output.

    Args:
        command: the program and its arguments.
        log: standard output and standard error are appended to this file.
        cwd: the working directory.
        env: variables to add to this process's environment.
    """

    def __init__(
        self, command: Sequence[str], *, log: Path, cwd: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.mark = uuid.uuid4().hex
        self.log = log
        self.command = list(command)
        log.parent.mkdir(parents=True, exist_ok=True)
        full_env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {}), MARK: self.mark}
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                self.command,
                cwd=cwd,
                env=full_env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def pids(self) -> list[int]:
        """Every living process of the job, including orphans."""
        wanted = f"{MARK}={self.mark}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                # A process that just ended, or is a zombie, has no readable environment.
                with contextlib.suppress(OSError):
                    if wanted in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found

    def kill(self, sig: int = signal.SIGKILL) -> None:
        """Send `sig` to every process of the job until none is left."""
        # The first process has no environment to be found by until its program has started.
        while pids := {*self.pids(), *([self.process.pid] if self.process.poll() is None else [])}:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, sig)
        self.process.wait()

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def tail(self, lines: int = 100) -> str:
        return "\n".join(self.output().splitlines()[-lines:])

    def wait(self, timeout_secs: float) -> int:
        """Wait for the exit status; kills the job and raises JobError after `timeout_secs`."""
        try:
            with self._killed_if_broken_off():
                return self.process.wait(timeout_secs)
        except subprocess.TimeoutExpired:
            raise JobError(f"{self.command} took longer than {timeout_secs} s\n{self.tail()}") from None

    def finish(self, timeout_secs: float) -> None:
        """Wait for the end; raises JobError unless the exit status is 0."""
        status = self.wait(timeout_secs)
        if status != 0:
            raise JobError(f"{' '.join(self.command)} exited with {status}\n{self.tail()}")

    def wait_until(
        self,
        condition: Callable[[], bool],
        timeout_secs: float,
        *,
        poll_secs: float = 0.02,
    ) -> None:
        """Wait until `condition` is true; JobError if the job ends or the time runs out first."""
        deadline = time.monotonic() + timeout_secs
        with self._killed_if_broken_off():
            while not condition():
                ended = self.process.poll()
                if ended is not None and not condition():
                    raise JobError(f"the job exited with {ended} too early\n{self.tail()}")
                if time.monotonic() > deadline:
                    raise JobError(f"the job did not get there within {timeout_secs} s\n{self.tail()}")
                time.sleep(poll_secs)

    @contextlib.contextmanager
    def _killed_if_broken_off(self) -> Iterator[None]:
        """The job has its own sessions, so Ctrl+C in the terminal does not reach it."""
        try:
            yield
        except BaseException:
            self.kill()
            raise


def steps_of(events: Iterable[Event]) -> dict[int, Event]:
    """step -> its last "step" event: a resumed run's steps replace the lost ones of the killed run."""
    return {e["step"]: e for e in events if e["event"] == "step"}


def committed_steps(events: Iterable[Event]) -> list[int]:
    """The steps of the committed checkpoints, in the order of their commits."""
    return [e["step"] for e in events if e["event"] == "save_committed"]
