"""Which parameters decay."""

from __future__ import annotations

import pytest
import torch

from model.config import GPT2Config
from model.gpt2 import GPT2
from model.optim import decay_groups


def tiny() -> GPT2:
    return GPT2(GPT2Config(n_layer=2, n_head=1, n_embd=4, vocab_size=5, block_size=3))


def test_matrices_and_embeddings_decay_biases_and_norms_do_not() -> None:
    model = tiny()
    decayed, free = decay_groups(model, 0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)] for p in free["params"]} == {
        n for n in names.values() if "ln_" in n or n.endswith("bias")
    }
    assert len(decayed["params"]) + len(free["params"]) == len(names)


def test_frozen_parameters_are_left_out() -> None:
    model = tiny()
    model.transformer.wpe.weight.requires_grad_(False)
    params = [p for group in decay_groups(model, 0.1) for p in group["params"]]
    assert all(p is not model.transformer.wpe.weight for p in params)
    assert torch.optim.AdamW(decay_groups(model, 0.1), lr=1e-3).param_groups[1]["weight_decay"] == 0.0


@pytest.mark.parametrize("rate", [-0.1, float("nan")])
def test_a_rate_that_cannot_be_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="weight_decay must be at least 0, not"):
        decay_groups(tiny(), rate)
