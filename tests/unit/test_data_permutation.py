"""data.permutation: a bijection for every size and key, stable for ever, without much memory."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.permutation import MAX_SIZE, Permutation

GOLDEN_SMALL = [5, 7, 3, 0, 6, 4, 1, 9, 2, 8]
GOLDEN_LARGE = [219997843891, 59748207207, 689116145638]

sizes = st.integers(1, 5000)
keys = st.lists(st.integers(-(2**70), 2**70), min_size=1, max_size=3)


@settings(max_examples=60)
@given(sizes, keys)
def test_every_index_is_hit_once(size: int, key: list[int]) -> None:
    values = Permutation(size, *key)(np.arange(size))
    assert np.array_equal(np.sort(values), np.arange(size))


@settings(max_examples=30)
@given(sizes, keys, st.data())
def test_an_index_goes_to_the_same_place_alone_and_among_others(
    size: int, key: list[int], data: st.DataObject
) -> None:
    permutation = Permutation(size, *key)
    index = data.draw(st.integers(0, size - 1))
    assert permutation([index])[0] == permutation(np.arange(size))[index]


def test_sizes_around_powers_of_two_and_four() -> None:
    for size in [1, 2, 3, 4, 5, 255, 256, 257, 1023, 1024, 1025, 4095, 4096, 4097]:
        assert len(set(Permutation(size, 7)(np.arange(size)).tolist())) == size


def test_golden_values_never_change() -> None:
    """A run resumed with a newer Holdfast must go on in the same order."""
    assert Permutation(10, 0, 0, 0)(np.arange(10)).tolist() == GOLDEN_SMALL
    assert Permutation(10**12, 1337, 2, 1)([0, 1, 10**12 - 1]).tolist() == GOLDEN_LARGE


@pytest.mark.parametrize("other", [(2, 0), (1, 1), (0, 1), (1, 0, 0)])
def test_keys_give_unrelated_permutations(other: tuple[int, ...]) -> None:
    indices = np.arange(20_000)
    same = Permutation(20_000, 1, 0)(indices) == Permutation(20_000, *other)(indices)
    assert same.sum() < 20  # one is expected of random permutations


def test_looks_random() -> None:
    """Neighbours, and any place's distance to where it goes, show no trend."""
    size = 100_000
    values = Permutation(size, 3)(np.arange(size))
    correlation = np.corrcoef(values, np.arange(size))[0, 1]
    neighbours = np.corrcoef(values[1:], values[:-1])[0, 1]
    assert abs(correlation) < 0.02
    assert abs(neighbours) < 0.02
    counts = np.bincount(values[: size // 10] * 10 // size)  # tenth of the indices, over tenths of the values
    assert counts.min() > 850
    assert counts.max() < 1150


def test_every_small_permutation_occurs() -> None:
    seen = {tuple(Permutation(4, seed)(np.arange(4)).tolist()) for seed in range(300)}
    assert len(seen) == 24


def test_huge_ranges_need_no_memory() -> None:
    values = Permutation(MAX_SIZE, 1)(np.array([0, 1, MAX_SIZE - 1]))
    assert ((values >= 0) & (values < MAX_SIZE)).all()
    assert len(set(values.tolist())) == 3


def test_shape_is_kept_and_the_input_is_not_changed() -> None:
    indices = np.arange(6).reshape(2, 3)
    assert Permutation(6, 1)(indices).shape == (2, 3)
    assert np.array_equal(indices, np.arange(6).reshape(2, 3))
    assert Permutation(6, 1)(np.empty(0, np.int64)).shape == (0,)


def test_indices_outside_are_refused() -> None:
    for index in (-1, 10):
        with pytest.raises(IndexError, match=r"outside \[0, 10\)"):
            Permutation(10, 1)([index])
    for size in (0, -1, MAX_SIZE + 1):
        with pytest.raises(ValueError, match="size"):
            Permutation(size, 1)
