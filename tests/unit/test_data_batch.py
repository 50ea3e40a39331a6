"""data.batch: dividing a global batch, and saying why not."""

import pytest

from data.batch import BatchSplit, divisors, fit_micro_batch, split_batch
from data.errors import BatchError


@pytest.mark.parametrize(
    ("global_batch", "world_size", "micro_batch", "expected"),
    [
        (12, 1, None, (12, 12, 1)),
        (12, 2, None, (6, 6, 1)),
        (12, 3, 2, (4, 2, 2)),
        (12, 4, 1, (3, 1, 3)),
        (12, 12, 1, (1, 1, 1)),
        (480, 8, 12, (60, 12, 5)),
    ],
)
def test_split(
    global_batch: int, world_size: int, micro_batch: int | None, expected: tuple[int, int, int]
) -> None:
    assert split_batch(global_batch, world_size, micro_batch) == BatchSplit(*expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 4), r"10 = 4 x 2 \+ 2; use 1, 2, 5, 10 ranks or, for a new run, --global_batch 8 or 12"),
        ((3, 4), r"3 = 4 x 0 \+ 3; use 1, 3 ranks or, for a new run, --global_batch 4$"),
        (
            (12, 2, 4),
            r"12 / 2 ranks = 6 sequences per rank, not a multiple of 4; use --micro_batch 1, 2, 3, 6",
        ),
        ((12, 2, 0), "a micro-batch of 0 sequences does not fit"),
        ((0, 2), "both must be at least 1"),
        ((4, 0), "both must be at least 1"),
    ],
)
def test_an_impossible_split_shows_the_arithmetic(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(BatchError, match=message):
        split_batch(*arguments)


@pytest.mark.parametrize(
    ("rows", "at_most", "fits"), [(6, 4, 3), (6, 6, 6), (6, 99, 6), (7, 6, 1), (6, 0, 1)]
)
def test_fit_micro_batch(rows: int, at_most: int, fits: int) -> None:
    assert fit_micro_batch(rows, at_most) == fits


def test_divisors() -> None:
    for number in range(1, 200):
        assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]
