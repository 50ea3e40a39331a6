"""A checkpoint that a plain tool has copied, file by file, is a valid checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from engine.storage.client import StoreClient
from tests.e2e.harness import Run, program
from tests.services.runs import StoreRun
from tests.services.s3 import Bucket

pytestmark = pytest.mark.service


def verify(run: Run) -> None:
    program("engine.checkpoints", "verify", run.checkpoints, env=run.env).ok()
    steps = [c["step"] for c in run.listing()]
    assert sorted(steps) == [3, 6, 9, 12]


def go_on(run: Run, whole: Run) -> None:
    """Carry the copy of a finished run on from step 9, and compare with the original."""
    verify(run)
    run.train(None, resume="step:9", max_steps=12)
    assert run.restored_step() == 9
    losses = run.losses_since_restore()
    assert losses == {step: whole.losses()[step] for step in (10, 11, 12)}


def test_cp_r(undisturbed_1: Run, tmp_path: Path, data: Path) -> None:
    shutil.copytree(undisturbed_1.checkpoints, tmp_path / "copy" / "checkpoints")
    go_on(Run(tmp_path / "copy", data), undisturbed_1)


def test_objects_put_and_fetched_one_by_one_as_aws_s3_sync_does(
    undisturbed_1: Run, tmp_path: Path, data: Path, bucket: Bucket
) -> None:
    client, source = bucket.client(), Path(undisturbed_1.checkpoints)
    for path in sorted(source.rglob("*")):
        if path.is_file():
            client.upload_file(str(path), bucket.name, f"up/{path.relative_to(source)}")
    for key in bucket.objects("up/"):
        target = tmp_path / "down" / "checkpoints" / key.removeprefix("up/")
        target.parent.mkdir(parents=True, exist_ok=True)
        client.download_file(bucket.name, key, str(target))
    verify(Run(tmp_path / "down", data))
    go_on(StoreRun(tmp_path / "up", data, bucket), undisturbed_1)


def test_fsspec_put_and_get(undisturbed_1: Run, tmp_path: Path, data: Path, bucket: Bucket) -> None:
    fs = StoreClient(bucket.uri(), bucket.options).fs
    fs.put(undisturbed_1.checkpoints, f"{bucket.name}/put", recursive=True)
    fs.get(f"{bucket.name}/put", str(tmp_path / "got" / "checkpoints"), recursive=True)
    verify(StoreRun(tmp_path / "put", data, bucket))
    go_on(Run(tmp_path / "got", data), undisturbed_1)
