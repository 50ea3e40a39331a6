"""What one save compares, as a table: small tensors whole, large ones by blocks that reach every byte."""

from __future__ import annotations

import pytest

from engine.save import sampling
from engine.save.sampling import BLOCK_BYTES, MOST_ON_DEVICE, SMALL_BYTES, Run, Sampler

LARGE = 10 * BLOCK_BYTES + 100


def test_small_ones_are_compared_whole_at_every_save() -> None:
    sampler = Sampler([8, SMALL_BYTES, 0])
    for number in range(5):
        assert sampler.choose(number) == [Run(0, 0, 8), Run(1, 0, SMALL_BYTES), Run(2, 0, 0)]


@pytest.mark.parametrize("size", [SMALL_BYTES + 1, 10 * BLOCK_BYTES, LARGE, 1000 * BLOCK_BYTES])
def test_every_byte_of_a_large_one_has_its_turn(size: int) -> None:
    sampler = Sampler([size])
    blocks = -(-size // BLOCK_BYTES)
    runs = [run for number in range(blocks) for run in sampler.choose(number)]
    assert sorted((run.begin, run.end) for run in runs) == [
        (begin, min(size, begin + BLOCK_BYTES)) for begin in range(0, size, BLOCK_BYTES)
    ]


def test_samples_move_far_from_save_to_save() -> None:
    sampler = Sampler([1000 * BLOCK_BYTES])
    places = [sampler.choose(number)[0].begin // BLOCK_BYTES for number in range(20)]
    gaps = sorted(places)
    assert max(b - a for a, b in zip([0, *gaps], [*gaps, 1000], strict=True)) < 120


def test_fresh_ones_are_compared_whole_and_once() -> None:
    chosen = Sampler([8, LARGE, LARGE]).choose(0, fresh={0, 2})
    assert chosen == [Run(1, 0, BLOCK_BYTES), Run(0, 0, 8), Run(2, 0, LARGE)]


@pytest.mark.parametrize(("full", "fresh"), [(True, ()), (False, (0, 1))])
def test_everything(full: bool, fresh: tuple[int, ...]) -> None:
    assert Sampler([8, LARGE], full=full).choose(7, fresh) == [Run(0, 0, 8), Run(1, 0, LARGE)]


def test_so_many_that_they_take_turns() -> None:
    # 12 blocks each: a walk that moved at every save, and not at every third, would miss most of them.
    sampler = Sampler([8] * 10 + [LARGE + BLOCK_BYTES] * 5, most_runs=4, most_blocks=2)
    seen: set[int] = set()
    blocks: set[tuple[int, int]] = set()
    for number in range(12 * 3):
        runs = sampler.choose(number)
        assert len(runs) <= 4 + 2
        seen |= {run.item for run in runs}
        blocks |= {(run.item, run.begin) for run in runs if run.item >= 10}
    assert seen == set(range(15))
    assert len(blocks) == 5 * 12, "every block of each"


def test_bytes_take_turns_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "MOST_SMALL_BYTES", 1000)
    sampler = Sampler([400] * 9)
    chosen = [[run.item for run in sampler.choose(number)] for number in range(4)]
    assert sorted(item for items in chosen for item in items) == list(range(9))
    assert max(map(len, chosen)) == 3


LAYER = [36864, 12288, 16 << 20, 4096, 64 << 20, 16384, 64 << 20, 4096, 4096, 4096, 4096, 4096]
STATES = {
    "one that fills a device": [80 << 30],
    "a language model with its moments": [4, 1, 1]
    + [size for part in LAYER * 48 for size in (part, part, part, 4)],
    "a mixture of 20,000 experts": [3 << 20] * 20_000,
    "all of them just small": [SMALL_BYTES] * 40_000,
    "all of them just large": [SMALL_BYTES + 1] * 40_000,
    "counters": [4] * 100_000,
    "large ones among tiny ones": [SMALL_BYTES, 1, 1, 1] * 4_000,
}


@pytest.mark.parametrize("sizes", STATES.values(), ids=STATES)
def test_one_save_compares_so_much_and_no_more(sizes: list[int]) -> None:
    """Figures, not the module's constants: 25 MB in 18,432 digests take less than 5 ms."""
    sampler = Sampler(sizes)
    for number in range(30):
        runs = sampler.choose(number)
        assert sum(run.end - run.begin for run in runs) <= max(sum(sizes) // 100, 25_200_000)
        assert len(runs) <= 18_432
    device = Sampler(sizes, most_runs=MOST_ON_DEVICE, most_blocks=MOST_ON_DEVICE)
    for number in range(30):
        runs = device.choose(number)
        assert sum(run.end - run.begin for run in runs) <= max(sum(sizes) // 100, 5_500_000)
        assert len(runs) <= 512
