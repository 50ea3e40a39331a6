"""What a store refuses for good: one sentence with the address and the fix, before training starts."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from demo.job import Job
from tests.e2e.harness import program
from tests.services.rgw import OWNER, Gateway
from tests.services.runs import StoreRun
from tests.services.s3 import Account, Bucket

pytestmark = pytest.mark.service

READER = Account("readonly", "reader-secret-that-no-text-may-show")
LIMITED = Account("limited-access", "limited-secret-that-no-text-may-show")
STRANGER = Account("nobody-access", "stranger-secret-that-no-text-may-show")
SECRETS = [account.secret_key for account in (OWNER, READER, LIMITED, STRANGER)] + ["a-wrong-secret"]


@pytest.fixture(scope="module")
def accounts(rgw: Gateway) -> None:
    rgw.add_reader(READER)
    rgw.add_user("limited", LIMITED)
    rgw.limit_buckets("limited", objects=3)


@pytest.fixture
def full(rgw: Gateway, accounts: None) -> Bucket:
    """A bucket whose quota is used up."""
    made = Bucket(rgw.endpoint, new_name(), LIMITED).create()
    for key in "abc":
        made.client().put_object(Bucket=made.name, Key=key, Body=b"1")
    return made


def new_name() -> str:
    return f"bucket-{uuid.uuid4().hex[:12]}"


def assert_refused(status: int, said: str, uri: str, *words: str) -> None:
    assert status == 2, said
    (sentence,) = [line for line in said.splitlines() if line.startswith("error: ")]
    for part in (uri, *words):
        assert part in sentence
    assert "Traceback" not in said
    for secret in SECRETS:
        assert secret not in said


def test_what_can_be_known_before_training_is_said_before_training(
    new_run: Callable[[str], StoreRun], bucket: Bucket, full: Bucket
) -> None:
    run = new_run("refused")
    seen = {
        "wrong-secret": (bucket.seen_by(Account(OWNER.access_key, "a-wrong-secret")), "credentials"),
        "stranger": (bucket.seen_by(STRANGER), "credentials"),
        "reader": (bucket.seen_by(READER), "credentials"),
        "no-bucket": (Bucket(bucket.endpoint, "no-such-bucket", OWNER), "create it"),
        "full": (full, "quota"),
    }
    jobs: dict[str, tuple[StoreRun, Job]] = {}
    for name, (place, _) in seen.items():  # at once: most of their time they wait
        refused = StoreRun(run.folder / name, run.data, place)
        jobs[name] = refused, refused.start(None, max_steps=1)
    for name, (refused, job) in jobs.items():
        assert_refused(job.wait(90.0), job.output(), refused.checkpoints, seen[name][1])
        assert refused.events() == [], name
    assert bucket.objects() == {}


@pytest.mark.parametrize("command", ["list", "verify", "prune"])
def test_the_other_programs_say_the_same(command: str, bucket: Bucket) -> None:
    place = bucket.seen_by(Account(OWNER.access_key, "a-wrong-secret"))
    ran = program("engine.checkpoints", command, place.uri(), env=place.env)
    assert_refused(ran.status, ran.text, place.uri(), "credentials")


def test_a_reader_can_read(new_run: Callable[[str], StoreRun], accounts: None) -> None:
    """Whoever may not write can still list, verify and look."""
    run = new_run("read")
    run.train(None, max_steps=1)
    reader = run.bucket.seen_by(READER)
    for command in ("list", "verify"):
        program("engine.checkpoints", command, run.checkpoints, env=reader.env).ok()


def test_a_quota_that_is_used_up_in_mid_run(rgw: Gateway, accounts: None, data: Path, tmp_path: Path) -> None:
    """The save fails with the reason; training goes on until there are too many of these."""
    place = Bucket(rgw.endpoint, new_name(), LIMITED).create()
    run = StoreRun(tmp_path / "filling", data, place)
    job = run.start(None, max_steps=50, checkpoint_freq=1, max_save_failures=2)
    assert job.wait(120.0) == 2
    failed = run.events("save_failed")
    assert len(failed) == 2
    for event in failed:
        assert "quota" in event["cause"]
        assert run.checkpoints in event["cause"]
    assert len(run.events("step")) >= 2
    assert_refused(2, job.output(), run.checkpoints, "quota")
