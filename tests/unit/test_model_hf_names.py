"""The map to Hugging Face's names covers every parameter, and nothing else."""

from __future__ import annotations

import pytest
import torch

from model.config import GPT2Config
from model.gpt2 import GPT2
from model.hf_names import hf_name


def test_exactly_the_linear_weights_are_transposed() -> None:
    with torch.device("meta"):
        model = GPT2(GPT2Config(n_layer=11, n_head=1, n_embd=4, vocab_size=5, block_size=3))
    linear = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert len(linear) == 44
    for name, _ in model.named_parameters():
        assert hf_name(name) == (name, name in linear)


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "wte.weight",
        "transformer.h.0.attn.bias",
        "transformer.h.01.ln_1.bias",
        "transformer.h.0.ln_1",
    ],
)
def test_a_name_that_this_model_does_not_have_is_refused(name: str) -> None:
    with pytest.raises(KeyError, match="is not a parameter of this GPT-2"):
        hf_name(name)
