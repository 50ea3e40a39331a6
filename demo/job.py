"""A training job as a person would start it in a shell: launch, watch its metrics, kill, wait.

torchrun puts every worker into a session of its own, so killing torchrun's process group would miss them. So
each job carries a mark in its environment, which all its processes inherit, and is found again by that mark.
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
    """A job ended in a way that its caller did not expect; the message ends with the end of its log."""


def torchrun(nproc: int, *args: str) -> list[str]:
    """The command line of a single-node run; the script that pip put beside this interpreter."""
    return [str(Path(sys.executable).parent / "torchrun"), "--standalone", f"--nproc_per_node={nproc}", *args]


def read_metrics(log_dir: Path) -> list[Event]:
    """The events of metrics.jsonl; a last line that is still being written is left out."""
    path = log_dir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


class Job:
    """One running command, its processes and its output.

    Args:
        command: the program and its arguments.
        log: the file that takes standard output and standard error, opened for appending.
        cwd: the directory to run in.
        env: what to add to this process's environment.
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
        """Every living process of the job, orphans included."""
        wanted = f"{MARK}={self.mark}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                # A process that ends meanwhile, or is a zombie, has no environment to read.
                with contextlib.suppress(OSError):
                    if wanted in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found

    def kill(self, sig: int = signal.SIGKILL) -> None:
        """Send SIGKILL to every process of the job and wait until none is left."""
        # Its first process has no environment to be found by before its program has begun.
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
        """The exit status; kills the job and raises JobError when it takes longer than `timeout_secs`."""
        try:
            with self._killed_if_broken_off():
                return self.process.wait(timeout_secs)
        except subprocess.TimeoutExpired:
            raise JobError(f"{self.command} took longer than {timeout_secs} s\n{self.tail()}") from None

    def finish(self, timeout_secs: float) -> None:
        """Wait, and raise JobError unless the exit status is 0."""
        status = self.wait(timeout_secs)
        if status != 0:
            raise JobError(f"{' '.join(self.command)} ended with {status}\n{self.tail()}")

    def wait_until(
        self,
        condition: Callable[[], bool],
        timeout_secs: float,
        *,
        poll_secs: float = 0.02,
    ) -> None:
        """Wait until `condition` holds; JobError if the job ends, or the time is over, before it does."""
        deadline = time.monotonic() + timeout_secs
        with self._killed_if_broken_off():
            while not condition():
                ended = self.process.poll()
                if ended is not None and not condition():
                    raise JobError(f"the job ended with {ended} too early\n{self.tail()}")
                if time.monotonic() > deadline:
                    raise JobError(f"nothing came of it in {timeout_secs} s\n{self.tail()}")
                time.sleep(poll_secs)

    @contextlib.contextmanager
    def _killed_if_broken_off(self) -> Iterator[None]:
        """Its sessions are its own, so that a Ctrl+C in the terminal reaches none of its processes."""
        try:
            yield
        except BaseException:
            self.kill()
            raise


def steps_of(events: Iterable[Event]) -> dict[int, Event]:
    """step -> its last "step" event: a resumed run overwrites the steps the killed one did in vain."""
    return {e["step"]: e for e in events if e["event"] == "step"}


def committed_steps(events: Iterable[Event]) -> list[int]:
    """The steps whose checkpoints were reported as committed, in the order of the reports."""
    return [e["step"] for e in events if e["event"] == "save_committed"]
