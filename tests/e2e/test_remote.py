"""The same through fsspec URIs: file://, and s3:// against a server in Python on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.job import Job
from tests.e2e.harness import Run, program


@pytest.fixture(scope="module", autouse=True)
def unanswered(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Iterator[tuple[Run, Job]]:
    """A run whose store does not answer. It tries for half a minute: the other tests run meanwhile."""
    nobody = {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "a-very-secret-key",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }
    run = Run(tmp_path_factory.mktemp("outage") / "run", data, "s3://my-bucket/team/run-1", nobody)
    job = run.start(None, resume="latest", max_steps=2)
    yield run, job
    job.kill()


def train_stop_and_resume(run: Run, nproc: int | None, undisturbed: Run) -> None:
    """Stop at 5 and go on to 12, with retention at work; then read what was written in every other way."""
    run.train(nproc, dropout=0.1, max_steps=5, checkpoint_freq=2, keep_checkpoints=2)
    run.train(nproc, resume="latest", max_steps=12)
    assert run.restored_step() == 5
    assert run.losses() == undisturbed.losses()

    listed = run.listing()
    assert {c["status"] for c in listed} == {"committed"}
    assert sorted(c["step"] for c in listed) == [10, 12]
    for checkpoint in listed:
        # A file:// URI is a directory like any other, and is shown as one.
        assert checkpoint["path"].startswith(run.checkpoints.removeprefix("file://"))
    program("engine.checkpoints", "verify", run.checkpoints, env=run.env).ok()

    args = (f"--checkpoint_dir={run.checkpoints}", "--dry_run", "--reshard=3")
    assert "shard-00000.safetensors" in program("engine.resume", *args, env=run.env).ok().stdout


def test_file_uri(tmp_path: Path, data: Path, undisturbed_1: Run) -> None:
    run = Run(tmp_path / "run", data, checkpoints=f"file://{tmp_path}/elsewhere/checkpoints")
    train_stop_and_resume(run, None, undisturbed_1)


def test_s3(tmp_path: Path, data: Path, undisturbed_2: Run, s3_environment: dict[str, str]) -> None:
    run = Run(tmp_path / "run", data, checkpoints="s3://my-bucket/team/run-1", env=s3_environment)
    train_stop_and_resume(run, 2, undisturbed_2)
    # Named by its URI, and from another world size.
    run.train(None, resume=run.with_role("backup")["path"], max_steps=11, dropout=0.0)
    assert run.restored_step() == 10


def test_a_missing_bucket_is_named(s3_environment: dict[str, str]) -> None:
    ran = program("engine.checkpoints", "list", "s3://no-such-bucket-here/x", env=s3_environment)
    assert ran.status == 2
    assert "no-such-bucket-here" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_store_that_does_not_answer_is_not_an_empty_one(unanswered: tuple[Run, Job]) -> None:
    """Resuming from step 0 because of an outage would be the worst outcome."""
    run, job = unanswered
    status = job.wait(120.0)
    said = job.output()
    assert status == 2, said
    assert run.events("step") == []
    assert "s3://my-bucket/team/run-1" in said
    assert "a-very-secret-key" not in said
    assert "Traceback" not in said
