"""The end-to-end tests of the spine once more, with their checkpoints on a real S3 server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import REFERENCE_FLAGS
from tests.e2e.harness import Run
from tests.e2e.test_kill import go_on_after_kills, kill_everything
from tests.e2e.test_remote import train_stop_and_resume
from tests.e2e.test_resume import test_two_ranks_then_four_then_one_then_three  # noqa: F401
from tests.e2e.test_tiers import (  # noqa: F401
    HUNDRED_STEPS,
    test_an_improvement_saves_at_once_with_its_loss,
    test_epochs_are_numbered_and_can_be_asked_for,
    test_resume_best_takes_the_lowest_validation_loss,
    test_the_newest_three_the_best_and_the_epochs_remain,
)
from tests.services.conftest import new_bucket
from tests.services.rgw import Gateway
from tests.services.runs import StoreRun
from tests.services.s3 import Bucket

pytestmark = pytest.mark.service


@pytest.fixture(scope="module")
def shared_bucket(rgw: Gateway) -> Iterator[Bucket]:
    made = new_bucket(rgw)
    yield made
    made.remove()


# These take the place of the runs of the same names on a local disk.


@pytest.fixture(scope="module")
def hundred_steps(tmp_path_factory: pytest.TempPathFactory, data: Path, shared_bucket: Bucket) -> Run:
    run = StoreRun(tmp_path_factory.mktemp("tiers") / "hundred", data, shared_bucket)
    return run.train(None, **HUNDRED_STEPS)


@pytest.fixture(scope="module")
def undisturbed_2_no_dropout(
    tmp_path_factory: pytest.TempPathFactory, data: Path, shared_bucket: Bucket
) -> Run:
    run = StoreRun(tmp_path_factory.mktemp("two") / "two", data, shared_bucket)
    return run.train(2, dropout=0.0, **REFERENCE_FLAGS)


def test_stop_and_resume_is_bit_for_bit_that_of_a_local_run(
    new_run: Callable[[str], StoreRun], undisturbed_2: Run
) -> None:
    run = new_run("stopped")
    train_stop_and_resume(run, 2, undisturbed_2)
    assert run.bucket.uploads() == []


def test_kills_while_saving_lose_nothing_that_was_committed(new_run: Callable[[str], StoreRun]) -> None:
    """What was being written stays a partial attempt: on a store it may go only once nobody can commit it."""
    run = new_run("killed")
    go_on_after_kills(run, kill_everything, times=2)
    run.verify()
