"""A seeded permutation of range(size) in O(1) memory, for any size up to 2**62.

A Feistel network is a bijection of 2h-bit numbers for any round function. Over the smallest 4**h that holds
`size` it permutes a slightly larger range; numbers that land outside `size` go through again until they land
inside ("cycle walking", Black and Rogaway 2002), which makes a bijection of range(size). Shuffling an index
array was rejected: 8 bytes per sequence on each rank, and no random access without building it.

The values must never change, or resumed runs would see another data order; a golden test pins them.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

ROUNDS = 8
MAX_SIZE = 1 << 62

# Luby and Rackoff need four rounds of a good function; tiny halves mix worse, so there are eight rounds and
# at least 2 x 3 bits.
_MIN_HALF_BITS = 3


class Permutation:
    """The permutation of range(`size`) for a `key`, any tuple of ints.

    Equal sizes and keys give equal permutations on every machine and numpy version.
    """

    def __init__(self, size: int, *key: int) -> None:
        if not 0 < size <= MAX_SIZE:
            raise ValueError(f"a permutation needs a size from 1 to {MAX_SIZE}, not {size}")
        self.size = size
        self._half_bits = max(_MIN_HALF_BITS, ((size - 1).bit_length() + 1) // 2)
        self._round_keys = _round_keys(key)

    def __call__(self, indices: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The images of indices in [0, size): int64, same shape. IndexError for others."""
        asked = np.asarray(indices, dtype=np.int64)
        if asked.size and (asked.min() < 0 or asked.max() >= self.size):
            raise IndexError(f"index {asked.min()} or {asked.max()} is outside [0, {self.size})")
        values = self._scramble(asked.astype(np.uint64).ravel())
        outside = np.flatnonzero(values >= self.size)
        while outside.size:
            values[outside] = self._scramble(values[outside])
            outside = outside[values[outside] >= self.size]
        return values.astype(np.int64).reshape(asked.shape)

    def _scramble(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """One pass through the network: a bijection of [0, 4**half_bits)."""
        half, mask = np.uint64(self._half_bits), np.uint64((1 << self._half_bits) - 1)
        left, right = values >> half, values & mask
        for key in self._round_keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return (left << half) | right


def _round_keys(key: tuple[int, ...]) -> npt.NDArray[np.uint64]:
    text = "holdfast permutation " + " ".join(str(part) for part in key)
    digest = hashlib.blake2b(text.encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser (Stafford's variant 13): every input bit affects every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
