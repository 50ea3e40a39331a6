"""Comparing what an optimizer tells after its own load_state_dict() with what was saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.state.optimizer_state_dicts import first_difference


@pytest.mark.parametrize(
    ("saved", "live"),
    [
        ({(0, 0): {}, (0, 1): {"z": 1}}, {(0, 1): {"z": 1}}),
        ({"params": [0], "lr": 0.1, "fused": True}, {"params": [0], "lr": 0.1, "fused": None}),
        ([torch.ones(2)], [torch.ones(2)]),
        ({"a": float("nan")}, {"a": float("nan")}),
    ],
)
def test_what_means_the_same_is_no_difference(saved: Any, live: Any) -> None:
    assert not first_difference("optimizer", saved, live)
    assert not first_difference("optimizer", live, saved)


@pytest.mark.parametrize(
    ("saved", "live", "words"),
    [
        ({"a": {"z": 1}}, {}, "optimizer differs in the keys ['a']"),
        ({"a": 1}, {"a": 1.0}, "optimizer.a is 1.0, saved as 1"),
        ([torch.ones(2)], [torch.ones(2, dtype=torch.bfloat16)], "optimizer.0 is a tensor bfloat16 [2]"),
        ([torch.ones(2)], [torch.zeros(2)], "optimizer.0"),
    ],
)
def test_the_first_difference_is_named(saved: Any, live: Any, words: str) -> None:
    assert first_difference("optimizer", saved, live).startswith(words)
