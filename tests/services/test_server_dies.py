"""The server is killed in mid-upload, or the writer is: nothing partial is seen, and nothing stays."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.directory.reaper import reap_abandoned
from engine.lease.arrivals import QUIET_SECS
from engine.lease.lease import STALE_SECS, Lease
from engine.storage.open import open_storage
from tests.e2e.harness import program
from tests.services.conftest import new_bucket
from tests.services.proxy import FaultProxy, Faults
from tests.services.rgw import Gateway
from tests.services.runs import StoreRun
from tests.services.s3 import Bucket

pytestmark = pytest.mark.service

IN_THE_MIDDLE = Faults(hold_at_bytes=40 << 20, methods=("PUT",))
"""Of a shard of 85 MB."""


@pytest.fixture(scope="module")
def wide_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary of 50,257: the smallest model has a shard that goes up in several parts then."""
    out = tmp_path_factory.mktemp("data") / "wide"
    source = Path(sysconfig.get_path("stdlib")) / "json"
    program("data.prepare", f"--source={source}", f"--out={out}", "--tokenizer=gpt2").ok()
    return out


@pytest.fixture
def lasting(mortal_rgw: Gateway) -> Iterator[Bucket]:
    made = new_bucket(mortal_rgw)
    yield made
    made.remove()


def reap_as_of_later(run: StoreRun) -> None:
    """What retention does once it is sure that no earlier writer is left, without the wait for that."""
    now = 0.0
    storage = open_storage(run.checkpoints, run.bucket.options)
    with Lease.acquire(storage, run_id="tests", clock=lambda: now) as lease:
        for wait_secs in (STALE_SECS, QUIET_SECS):  # of a run that nobody remembers: once it is quiet
            now += wait_secs
            assert reap_abandoned(storage, lease=lease).failed == ()


def assert_nothing_partial_is_seen(run: StoreRun) -> None:
    listed = run.listing()
    whole = {c["path"].rpartition("/")[2] for c in listed if c["status"] == "committed"}
    assert {c["status"] for c in listed} <= {"committed", "partial"}
    assert {m["id"] for m in run.manifests()} == whole
    run.verify()


def test_the_server_is_killed_in_mid_upload_and_comes_back(
    mortal_rgw: Gateway, lasting: Bucket, wide_data: Path, tmp_path: Path
) -> None:
    run = StoreRun(tmp_path / "dying", wide_data, lasting)
    with FaultProxy(mortal_rgw.port) as proxy:
        job = run.by_way_of(proxy.endpoint).start(
            None, max_steps=100_000, checkpoint_freq=1, keep_checkpoints=2, save_policy="skip"
        )
        job.wait_until(lambda: len(run.committed()) >= 1, 90.0)
        proxy.faults = IN_THE_MIDDLE
        job.wait_until(proxy.holding.is_set, 60.0)
        before = run.committed()
        mortal_rgw.kill()
        proxy.faults = Faults()
        mortal_rgw.start()
        job.wait_until(lambda: len(run.committed()) >= len(before) + 2, 150.0)
        job.process.terminate()
        assert job.wait(90.0) == 0, job.tail()
    ended = {event["step"] for kind in ("save_committed", "save_failed") for event in run.events(kind)}
    assert ended == {event["step"] for event in run.events("save_started")}, (
        "each save ended, one way or other"
    )
    assert "Traceback" not in job.output()
    assert_nothing_partial_is_seen(run)
    reap_as_of_later(run)
    assert run.bucket.uploads() == []
    assert {c["status"] for c in run.listing()} == {"committed"}


def test_the_upload_of_a_killed_writer_disappears(
    bucket: Bucket, proxy: FaultProxy, wide_data: Path, tmp_path: Path
) -> None:
    run = StoreRun(tmp_path / "killed", wide_data, bucket)
    given = {"checkpoint_freq": 1, "keep_checkpoints": 2, "resume": "latest"}
    job = run.by_way_of(proxy.endpoint).start(None, max_steps=100_000, **given)
    job.wait_until(lambda: len(run.committed()) >= 1, 90.0)
    proxy.faults = IN_THE_MIDDLE
    job.wait_until(proxy.holding.is_set, 60.0)
    job.kill()
    proxy.faults = Faults()
    assert run.bucket.uploads(), "nothing was left behind: the test shows nothing"

    committed = max(run.committed())
    run.train(None, max_steps=committed + 1, **given)
    assert run.restored_step() == committed
    assert_nothing_partial_is_seen(run)
    reap_as_of_later(run)
    assert run.bucket.uploads() == []
    assert {c["status"] for c in run.listing()} == {"committed"}
