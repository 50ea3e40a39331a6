"""The same through fsspec URIs: file://, and s3:// against a server in Python on loopback."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import Run, program

BUCKET = "holdfast"


@pytest.fixture(scope="module")
def s3_environment() -> Iterator[dict[str, str]]:
    """Environment variables for a fresh moto server with one empty bucket."""
    boto3 = pytest.importorskip("boto3")
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    env = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "not-a-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": ",".join(p for p in (os.environ.get("NO_PROXY", ""), host) if p),
    }
    client = boto3.client(
        "s3",
        endpoint_url=env["AWS_ENDPOINT_URL"],
        aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
        region_name=env["AWS_DEFAULT_REGION"],
    )
    client.create_bucket(Bucket=BUCKET)
    yield env
    server.stop()


def train_stop_and_resume(run: Run, undisturbed: Run) -> None:
    """Two ranks stop at 5 and go on to 12, with retention at work; then one rank reads what they wrote."""
    run.train(2, dropout=0.1, max_steps=5, checkpoint_freq=2, keep_checkpoints=2)
    run.train(2, resume="latest", max_steps=12)
    assert run.restored_step() == 5
    assert run.losses() == undisturbed.losses()

    listed = run.listing()
    assert {c["status"] for c in listed} == {"committed"}
    assert sorted(c["step"] for c in listed) == [10, 12]
    for checkpoint in listed:
        assert checkpoint["path"].startswith(run.checkpoints)
        program("engine.checkpoints", "verify", checkpoint["path"], env=run.env).ok()

    shown = program(
        "engine.resume", f"--checkpoint_dir={run.checkpoints}", "--dry_run", "--reshard=3", env=run.env
    )
    assert "shard-00001.safetensors" in shown.ok().stdout

    # Named by its URI, and from another world size.
    backup = run.with_role("backup")
    run.train(None, resume=backup["path"], max_steps=12, dropout=0.0)
    assert run.restored_step() == 10


def test_file_uri(tmp_path: Path, data: Path, undisturbed_2: Run) -> None:
    run = Run(tmp_path / "run", data, checkpoints=f"file://{tmp_path}/elsewhere/checkpoints")
    train_stop_and_resume(run, undisturbed_2)


def test_s3(tmp_path: Path, data: Path, undisturbed_2: Run, s3_environment: dict[str, str]) -> None:
    run = Run(tmp_path / "run", data, checkpoints=f"s3://{BUCKET}/team/run-1", env=s3_environment)
    train_stop_and_resume(run, undisturbed_2)


def test_a_store_that_does_not_answer_is_not_an_empty_one(tmp_path: Path, data: Path) -> None:
    """Resuming from step 0 because of an outage would be the worst outcome."""
    nobody = {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "a-very-secret-key",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }
    run = Run(tmp_path / "run", data, checkpoints="s3://holdfast/team/run-1", env=nobody)
    job = run.start(None, resume="latest", max_steps=2)
    status = job.wait(120.0)
    said = job.output()
    assert status == 2, said
    assert run.events("step") == []
    assert "s3://holdfast/team/run-1" in said
    assert "a-very-secret-key" not in said
    assert "Traceback" not in said


def test_a_missing_bucket_is_named(
    new_run: Callable[[str], Run], s3_environment: dict[str, str], tmp_path: Path, data: Path
) -> None:
    ran = program("engine.checkpoints", "list", "s3://no-such-bucket-here/x", env=s3_environment)
    assert ran.status == 2
    assert "no-such-bucket-here" in ran.stderr
    assert "Traceback" not in ran.stderr
