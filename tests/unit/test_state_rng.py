"""Random number generators: a restored state gives the same numbers; derived ones differ by rank and step."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from engine.format.json import canonical_bytes, parse_canonical
from engine.state import rng, values


@pytest.fixture(autouse=True)
def _leave_the_generators_alone() -> Iterator[None]:
    before = rng.capture()
    yield
    rng.restore(before)


def draw() -> list[Any]:
    """Numbers of every generator, in an order that makes a shared one show."""
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(3).tolist(),
        np.random.randn(),
        torch.rand(3).tolist(),
        torch.randn(()).item(),
        random.getrandbits(40),
    ]


def through_a_checkpoint(state: dict[str, Any]) -> dict[str, Any]:
    tensors: dict[str, torch.Tensor] = {}
    raw = canonical_bytes(values.encode(state, "rng", tensors))
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    restored = values.decode(parse_canonical(raw, what="the test"), copies.__getitem__)
    assert isinstance(restored, dict)
    return restored


def test_a_restored_state_gives_the_same_numbers() -> None:
    rng.derive(1, 2, 3)
    state = through_a_checkpoint(rng.capture())
    first = draw()
    draw()
    rng.restore(state)
    assert draw() == first


def test_a_half_used_gaussian_pair_survives() -> None:
    """Python and NumPy each keep the second number of a pair for the next call."""
    rng.derive(0, 0, 0)
    random.gauss(0, 1)
    np.random.randn()
    state = through_a_checkpoint(rng.capture())
    first = (random.gauss(0, 1), np.random.randn())
    draw()
    rng.restore(state)
    assert (random.gauss(0, 1), np.random.randn()) == first


def test_a_capture_draws_nothing_and_is_a_copy() -> None:
    rng.derive(5, 0, 0)
    first = draw()
    rng.derive(5, 0, 0)
    state = rng.capture()
    before = {name: tensor.clone() for name, tensor in tensors_of(state).items()}
    assert draw() == first
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors_of(state).items())


def tensors_of(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    values.encode(state, "rng", tensors)
    return tensors


def test_derived_streams_are_a_function_of_seed_step_and_rank() -> None:
    seen = {}
    for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**40, 10**9, 4095)]:
        rng.derive(*key)
        seen[key] = draw()
        rng.derive(*key)
        assert draw() == seen[key]
    assert len({str(numbers) for numbers in seen.values()}) == len(seen)
