"""Training over a bad network: requests refused, connections reset, delays, and a store that is away."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engine.storage.open import open_storage
from engine.storage.remote import FsspecStorage
from engine.storage.retry import Retry
from tests.e2e.harness import program
from tests.services.proxy import FaultProxy, Faults
from tests.services.rgw import OWNER, Gateway
from tests.services.runs import StoreRun
from tests.services.s3 import Bucket
from tests.storage.buffers import pattern, source

pytestmark = pytest.mark.service

FLAKY = Faults(latency_secs=0.05, answer_503=0.3, reset=0.02)
PATIENCE_SECS = 150.0
"""Bounds waits for what is tried again with pauses: some 25 s an operation."""


def assert_waits_for_the_save_in_flight_alone(run: StoreRun) -> list[tuple[str, int]]:
    """A save starts once the one before has ended, and training is held up by nothing else; the order."""
    kinds = ("step", "save_started", "save_committed")
    order = [(event["event"], event["step"]) for event in run.events() if event["event"] in kinds]
    saves = [event for event in order if event[0] != "step"]
    steps = [step for kind, step in saves if kind == "save_started"]
    assert saves == [(kind, step) for step in steps for kind in ("save_started", "save_committed")]
    for event in run.events("save_snapshotted"):
        assert set(event["secs_by_cause"]) - {"compare"} == {"wait", "capture", "copy"}
    return order


def test_every_save_commits_and_every_restore_verifies_over_a_flaky_network(
    new_run: Callable[[str], StoreRun], proxy: FaultProxy
) -> None:
    run = new_run("flaky").by_way_of(proxy.endpoint)
    proxy.faults = FLAKY
    keeping = {"checkpoint_freq": 2, "keep_checkpoints": 2, "save_policy": "wait"}
    run.train(2, max_steps=6, max_save_failures=1, dropout=0.0, **keeping)
    assert_waits_for_the_save_in_flight_alone(run)
    run.train(2, resume="latest", max_steps=7)
    assert run.events("save_failed") == []
    assert run.committed() == [2, 4, 6, 7]
    assert run.restored_step() == 6
    run.verify()
    assert proxy.refused > 20, "the network was not flaky: the test shows nothing"
    assert proxy.resets > 0
    assert "Traceback" not in (run.folder / "output.log").read_text()
    proxy.faults = Faults()
    assert sorted(c["step"] for c in run.listing()) == [6, 7]


def test_with_wait_training_waits_for_the_save_in_flight_and_for_nothing_else(
    new_run: Callable[[str], StoreRun], proxy: FaultProxy
) -> None:
    """The network takes half a shard and stands still: training goes on until the next save is due."""
    run = new_run("waiting").by_way_of(proxy.endpoint)
    proxy.faults = Faults(hold_at_bytes=1 << 20)
    job = run.start(None, max_steps=12, checkpoint_freq=4, save_policy="wait", max_save_failures=1)
    job.wait_until(lambda: proxy.holding.is_set() and len(run.events("step")) >= 8, PATIENCE_SECS)
    assert run.committed() == []
    proxy.faults = Faults()
    job.finish(PATIENCE_SECS)
    order = assert_waits_for_the_save_in_flight_alone(run)
    must = [("save_started", 4), ("step", 8), ("save_committed", 4), ("save_started", 8), ("step", 9)]
    assert [event for event in order if event in must] == must
    assert [step for kind, step in order if kind == "save_committed"] == [4, 8, 12]


def test_large_objects_pass_a_flaky_network_in_both_directions(bucket: Bucket, proxy: FaultProxy) -> None:
    """Uploads in many parts and ranged reads, each of them tried again by itself."""
    data = pattern(100 << 20)
    storage = open_storage(bucket.uri(), bucket.at(proxy.endpoint).options, create=True)
    proxy.faults = FLAKY
    storage.write_shard("shard", source(data))
    back = bytearray(len(data))
    storage.read_into("shard", 0, memoryview(back))
    assert bytes(back) == data
    assert proxy.refused > 0
    assert bucket.objects() == {"run/shard": len(data)}
    assert bucket.uploads() == []


def test_a_reset_in_the_middle_of_every_upload_fails_cleanly(bucket: Bucket, proxy: FaultProxy) -> None:
    data = pattern(40 << 20)
    options = {**bucket.at(proxy.endpoint).options, "config_kwargs.retries": {"total_max_attempts": 1}}
    storage = FsspecStorage(bucket.uri(), options, retry=Retry(sleep=lambda _: None))
    proxy.faults = Faults(reset_after_bytes=1 << 20, methods=("PUT",))
    with pytest.raises(OSError, match="could not write") as raised:
        storage.write_shard("shard", source(data))
    assert bucket.uri() in str(raised.value)
    assert bucket.objects() == {}
    assert bucket.uploads() == []
    proxy.faults = Faults()
    storage.write_shard("shard", source(data))
    assert bucket.objects() == {"run/shard": len(data)}


@pytest.mark.timeout(600)
def test_training_goes_on_while_the_store_is_away_and_nothing_starts_from_step_0(
    new_run: Callable[[str], StoreRun], proxy: FaultProxy, rgw: Gateway, data: Path, tmp_path: Path
) -> None:
    run = new_run("outage").by_way_of(proxy.endpoint)
    job = run.start(
        None,
        max_steps=100_000,
        checkpoint_freq=1,
        keep_checkpoints=2,
        save_policy="skip",
        max_save_failures=3,
    )
    job.wait_until(lambda: len(run.committed()) >= 2, 60.0)
    proxy.faults = Faults(reject=True)

    # Meanwhile two others want to carry on: what refuses them resets, what swallows them never answers.
    resumed = StoreRun(tmp_path / "outage-2", data, run.bucket, run.prefix)
    refused = resumed.start(None, resume="latest", max_steps=100_000)
    with FaultProxy(rgw.port) as hole:
        hole.faults = Faults(blackhole=True)
        options = 'config_kwargs={"read_timeout": 1, "retries": {"total_max_attempts": 1}}'
        swallowed = program(
            "engine.resume",
            f"--checkpoint_dir={run.checkpoints}",
            f"--storage_options={options}",
            env=run.bucket.at(hole.endpoint).env,
        )
    job.wait_until(lambda: len(run.events("save_failed")) >= 1, PATIENCE_SECS)
    during = len(run.events("step"))
    job.wait_until(lambda: len(run.events("step")) >= during + 20, 60.0)
    assert refused.wait(PATIENCE_SECS) == 2
    said_refused = refused.output()

    before = run.committed()
    proxy.faults = Faults()
    job.wait_until(lambda: len(run.committed()) > len(before), PATIENCE_SECS)
    failed = [event["step"] for event in run.events("save_failed")]
    job.process.terminate()
    assert job.wait(60.0) == 0, job.tail()

    said = job.output()
    assert run.committed()[-1] == max(run.losses()), "the signal's save too"
    for event in run.events("save_failed"):
        assert run.checkpoints in event["cause"]
    assert said.count("FAILED") == len(failed) <= 2, "one line for each"
    for text in (said_refused, swallowed.text):
        assert run.checkpoints in text
        assert "could not be reached" in text
        assert "Traceback" not in text
    assert swallowed.status == 2
    assert resumed.events("step") == []
    for text in (said, said_refused, swallowed.text):
        assert OWNER.secret_key not in text
        assert "Traceback" not in text
    run.verify()
