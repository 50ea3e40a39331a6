"""The demo's jobs: nothing is left running, whatever breaks the wait off; and where it may work."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.__main__ import OURS, prepare_folder
from demo.job import Job, JobError


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """It would run for ten minutes, in a session of its own."""
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    started = Job(command, log=tmp_path / "log", cwd=tmp_path)
    yield started
    started.kill()


def test_ctrl_c_while_a_condition_is_awaited_kills_the_job(job: Job) -> None:
    def interrupted() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.wait_until(interrupted, 60.0)
    assert job.pids() == []


def test_ctrl_c_while_the_end_is_awaited_kills_the_job(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    wait = subprocess.Popen.wait

    def interrupted(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        if timeout is not None:
            raise KeyboardInterrupt
        return wait(process)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        job.finish(60.0)
    assert job.pids() == []


def test_a_job_that_has_hardly_begun_is_killed(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its environment cannot be read yet, by which its processes are found."""
    monkeypatch.setattr(Job, "pids", lambda self: [])
    job.kill()
    assert job.process.returncode == -signal.SIGKILL


def test_only_a_folder_of_the_demos_own_is_emptied(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    prepare_folder(folder)
    (folder / "left over").touch()
    prepare_folder(folder)
    assert [path.name for path in folder.iterdir()] == [OURS]
    (folder / OURS).unlink()
    (folder / "somebody's").touch()
    with pytest.raises(JobError, match="not a demo's"):
        prepare_folder(folder)
    assert (folder / "somebody's").exists()


def test_a_file_in_the_way_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "demo"):
        with pytest.raises(JobError, match="cannot work in"):
            prepare_folder(folder)
