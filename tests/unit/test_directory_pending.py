"""Pending checkpoints, as tables: which, in which order, and what retention keeps because of them."""

from __future__ import annotations

import pytest

from engine.directory.listing import Listed
from engine.directory.pending import PENDING, is_mirrored, keep_pending, pending_copies, pending_to_delete
from engine.directory.record import CheckpointRecord
from engine.directory.retention import Retention, decide_retention
from engine.mirror.tiers import both_tiers
from tests.support.records import record

KEEP_2 = Retention(rolling=2, best=1, epochs=True)


def records(*sequences: int) -> list[CheckpointRecord]:
    return [record(sequence) for sequence in sequences]


def numbers(found: list[CheckpointRecord]) -> list[int]:
    return [item.sequence for item in found]


@pytest.mark.parametrize(
    ("step", "reasons", "freq", "wanted"),
    [
        (20, ("interval",), 1, True),
        (20, ("interval",), 20, True),
        (30, ("interval",), 20, False),
        (30, ("manual",), 20, False),
        (30, ("interval", "manual"), 20, False),
        (30, ("interval", "best"), 20, True),
        (30, ("epoch",), 20, True),
        (30, ("signal",), 20, True),
        (30, ("final",), 0, True),
        (30, ("import",), 0, True),
        (20, ("interval",), 0, False),
    ],
)
def test_every_so_many_steps_and_always_for_a_reason_of_its_own(
    step: int, reasons: tuple[str, ...], freq: int, wanted: bool
) -> None:
    assert is_mirrored(record(1, step=step, reasons=reasons), freq) is wanted


@pytest.mark.parametrize(
    ("local", "mirror", "expected"),
    [
        ((), (), []),
        ((1, 2, 3), (), [3, 2, 1]),
        ((1, 2, 3), (2,), [3, 1]),
        ((1, 2, 3), (1, 2, 3), []),
        # The mirror alone has what the local retention has removed.
        ((3,), (1, 2), [3]),
        # It would expire at once: the mirror has two newer ones.
        ((1, 2, 3), (2, 3), []),
        ((1, 2, 3, 4), (3, 4), []),
        # One newer one there: it would be the backup.
        ((1, 2, 3), (3,), [2, 1]),
    ],
    ids=str,
)
def test_the_newest_is_first_and_what_would_expire_at_once_is_not_pending(
    local: tuple[int, ...], mirror: tuple[int, ...], expected: list[int]
) -> None:
    assert numbers(pending_copies(records(*local), records(*mirror), 1, KEEP_2)) == expected


def test_an_old_best_one_is_pending_even_with_newer_ones() -> None:
    best = record(1, loss=1.0)
    assert pending_copies([best, *records(2, 3)], records(2, 3), 1, KEEP_2) == [best]
    assert pending_copies([best, *records(2)], [*records(2, 3), record(4, loss=0.5)], 1, KEEP_2) == []


def test_without_a_policy_everything_is_pending() -> None:
    assert numbers(pending_copies(records(1, 2, 3), records(3), 1, None)) == [2, 1]


def test_order_is_by_number_not_by_step() -> None:
    branch = [record(1, step=500), record(2, step=100)]
    assert numbers(pending_copies(branch, [], 1, None)) == [2, 1]


def test_the_local_retention_keeps_pending_ones() -> None:
    policy = decide_retention(records(1, 2, 3, 4, 5), KEEP_2)
    decisions = keep_pending(policy, {"step-00000002-00000002", "step-00000005-00000005"})
    assert [(d.record.sequence, d.keep) for d in decisions] == [
        (1, False),
        (2, True),
        (3, False),
        (4, True),
        (5, True),
    ]
    assert decisions[1].why == PENDING
    assert decisions[4].why == "latest, among the newest 2", "the policy's own reason comes first"


@pytest.mark.parametrize(
    ("pending_numbers", "in_flight", "goes"),
    [
        # The only pending one is never deleted, nor the oldest.
        ((), None, None),
        ((1,), None, None),
        ((2,), None, None),
        ((1, 2), None, 2),
        ((1, 2, 3), None, 2),
        # What the policy keeps stays, pending or not: 4 is the backup, 5 the latest.
        ((4, 5), None, None),
        ((3, 4, 5), None, None),
        ((2, 3, 4, 5), None, 3),
        # What is being sent stays.
        ((1, 2, 3), 2, 3),
        ((1, 2), 2, None),
    ],
    ids=str,
)
def test_on_a_full_disk_one_is_deleted_that_has_an_older_pending_one(
    pending_numbers: tuple[int, ...], in_flight: int | None, goes: int | None
) -> None:
    policy = decide_retention(records(1, 2, 3, 4, 5), KEEP_2)
    ids = {record(number).id for number in pending_numbers}
    decision = pending_to_delete(policy, ids, None if in_flight is None else record(in_flight).id)
    assert (decision.record.sequence if decision else None) == goes
    if decision is not None:
        assert not decision.keep
        assert "the disk is full" in decision.why


def listed(sequence: int, status: str, root: str) -> Listed:
    item = record(sequence, root=root)
    return Listed(item.id, status, None if status == "partial" else item, 100, "")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("local", "mirror", "status", "tier"),
    [
        ("committed", "committed", "committed", "local"),
        ("committed", "damaged", "committed", "local"),
        ("committed", "partial", "committed", "local"),
        ("damaged", "committed", "committed", "mirror"),
        ("partial", "committed", "committed", "mirror"),
        ("damaged", "damaged", "damaged", "local"),
        (None, "committed", "committed", "mirror"),
        (None, "partial", "partial", "mirror"),
        ("damaged", None, "damaged", "local"),
    ],
)
def test_of_two_copies_the_local_one_unless_only_the_other_is_whole(
    local: str | None, mirror: str | None, status: str, tier: str
) -> None:
    here = [] if local is None else [listed(1, local, "/local")]
    there = [] if mirror is None else [listed(1, mirror, "/mirror")]
    tiers = both_tiers(here, there)
    (item,) = tiers.listed
    assert item.status == status
    assert (item.id in tiers.from_mirror) is (tier == "mirror")
    if item.record is not None:
        assert item.record.path.startswith(f"/{tier}/")


def test_both_tiers_are_one_listing_by_number() -> None:
    here = [
        listed(2, "committed", "/local"),
        listed(5, "partial", "/local"),
        listed(4, "committed", "/local"),
    ]
    there = [
        listed(1, "committed", "/mirror"),
        listed(3, "committed", "/mirror"),
        listed(2, "committed", "/mirror"),
    ]
    assert [item.record.sequence if item.record else None for item in both_tiers(here, there).listed] == [
        1,
        2,
        3,
        4,
        None,
    ]
