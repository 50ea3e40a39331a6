"""A local directory with a mirror on a real S3 server: slow, killed in the middle, and damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.harness import Run, program
from tests.services.proxy import FaultProxy, Faults
from tests.services.s3 import Bucket

pytestmark = pytest.mark.service

LOCAL_CAUSES = {"wait", "capture", "copy", "write", "digest", "fsync", "index", "receipts", "commit"}
"""What a save without a mirror spends its time on."""

KEEPING = {"checkpoint_freq": 1, "keep_checkpoints": 3, "max_steps": 100_000}


@pytest.fixture
def mirrored(tmp_path: Path, data: Path, bucket: Bucket, proxy: FaultProxy) -> Run:
    """A run with local checkpoints; its store is reached through the proxy."""
    return Run(tmp_path / "run", data, env=bucket.at(proxy.endpoint).env)


def manifests(bucket: Bucket) -> set[str]:
    """The ids of the checkpoints in the mirror."""
    return {key.split("/")[1] for key in bucket.objects("mirror/") if key.endswith("/manifest.json")}


def verify(bucket: Bucket) -> None:
    program("engine.checkpoints", "verify", bucket.uri("mirror"), env=bucket.env).ok()


def test_local_commits_do_not_wait_for_a_slow_mirror(
    mirrored: Run, bucket: Bucket, proxy: FaultProxy
) -> None:
    """First a mirror that stands still, then one of 5 MB/s, which gets there."""
    proxy.faults = Faults(hold_at_bytes=1 << 20, methods=("PUT",))
    job = mirrored.start(None, mirror=bucket.uri("mirror"), **KEEPING)
    job.wait_until(proxy.holding.is_set, 90.0)
    held = len(mirrored.committed())
    job.wait_until(lambda: len(mirrored.committed()) >= held + 10, 90.0)
    assert mirrored.events("mirror_copied") == []
    assert manifests(bucket) == set()

    proxy.faults = Faults(bytes_per_sec=5e6)
    job.wait_until(lambda: len(mirrored.events("mirror_copied")) >= 1, 90.0)
    job.process.terminate()
    assert job.wait(60.0) == 0, job.tail()
    assert mirrored.events("save_failed") == []
    assert {cause for e in mirrored.events("save_committed") for cause in e["secs_by_cause"]} == LOCAL_CAUSES
    assert "Traceback" not in job.output()
    program("engine.checkpoints", "verify", mirrored.checkpoints).ok()
    copied = {event["id"] for event in mirrored.events("mirror_copied")}
    assert manifests(bucket) <= copied
    verify(bucket)


def test_a_copy_that_was_killed_is_completed_by_the_next_start(
    mirrored: Run, bucket: Bucket, proxy: FaultProxy, tmp_path: Path, data: Path
) -> None:
    mirror = bucket.uri("mirror")
    for bytes_up in (2 << 20, 6 << 20, 14 << 20):
        proxy.faults = Faults(hold_at_bytes=bytes_up, methods=("PUT",))
        job = mirrored.start(None, mirror=mirror, resume="latest", **KEEPING)
        job.wait_until(lambda: proxy.holding.is_set() and bool(mirrored.committed()), 90.0)
        job.kill()
        proxy.faults = Faults()
        for name in manifests(bucket):
            program("engine.checkpoints", "verify", f"{mirror}/{name}", env=bucket.env).ok()
    last = max(mirrored.committed()) + 1
    mirrored.train(None, mirror=mirror, resume="latest", **{**KEEPING, "max_steps": last})
    here = sorted(c["path"].rpartition("/")[2] for c in mirrored.listing() if c["status"] == "committed")
    assert set(here[-3:]) <= manifests(bucket) <= set(here), "the newest, and nothing that is not there"
    assert bucket.uploads() == []
    verify(bucket)

    # A node that is lost with its disk goes on from the mirror alone.
    elsewhere = Run(tmp_path / "elsewhere", data, env=mirrored.env)
    elsewhere.train(None, mirror=mirror, resume="latest", **{**KEEPING, "max_steps": last + 1})
    assert elsewhere.restored_step() == last


def test_a_damaged_object_in_the_mirror_is_noticed_and_sent_again(mirrored: Run, bucket: Bucket) -> None:
    mirror = bucket.uri("mirror")
    mirrored.train(None, mirror=mirror, **{**KEEPING, "max_steps": 3})
    client = bucket.client()
    keys = sorted(key for key in bucket.objects("mirror/") if key.endswith("shard-00000.safetensors"))
    body = bytearray(client.get_object(Bucket=bucket.name, Key=keys[-1])["Body"].read())
    body[len(body) // 2] ^= 1
    client.put_object(Bucket=bucket.name, Key=keys[-1], Body=bytes(body))
    damaged = program("engine.checkpoints", "verify", mirror, env=bucket.env)
    assert damaged.status != 0, "the damage is not seen: the test shows nothing"

    job = mirrored.start(None, mirror=mirror, resume="latest", **{**KEEPING, "checkpoint_freq": 0})
    job.wait_until(lambda: len(mirrored.events("mirror_copied")) > 3, 90.0)
    job.process.terminate()
    assert job.wait(60.0) == 0, job.tail()
    verify(bucket)
