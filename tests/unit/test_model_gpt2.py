"""The module itself: Hugging Face's function, one embedding for both ends, nothing but parameters."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from model.config import GPT2Config
from model.gpt2 import GPT2
from model.hf_names import hf_name

TINY = GPT2Config(n_layer=2, n_head=3, n_embd=12, vocab_size=17, block_size=8)
TOKENS = torch.tensor([[1, 5, 16, 0, 3, 3, 7], [2, 4, 6, 8, 10, 12, 14]])

# transformers 5.23.0, GPT2LMHeadModel with `sine_weights` of TINY (mapped by hf_name), input TOKENS.
# fmt: off
HF_LOGITS_0_LAST = [0.12691, 0.2799, 0.39455, -0.05267, 0.03797, 0.79553, -0.97431, 0.15785, 0.22481,
                    -0.04451, 0.16355, -0.9924, 1.22258, -0.2225, 0.18729, -1.71939, -0.06336]
HF_LOGITS_1_2 = [0.15431, 0.23107, 0.38077, -0.0603, 0.07378, 0.72245, -0.9185, 0.24491, 0.10754, -0.05053,
                 0.2488, -0.85708, 0.99741, -0.26278, 0.25769, -1.50027, 0.1779]
# fmt: on


def sine_weights(model: GPT2) -> GPT2:
    """Weights that need no generator, so that another program can make the same ones."""
    with torch.no_grad():
        for k, parameter in enumerate(model.parameters()):
            steps = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_((steps * steps * 0.7 + k).sin().mul(0.5).reshape(parameter.shape))
    return model.eval()


def test_logits_are_those_of_hugging_face() -> None:
    logits, loss = sine_weights(GPT2(TINY))(TOKENS)
    assert loss is None
    torch.testing.assert_close(logits[0, -1], torch.tensor(HF_LOGITS_0_LAST), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[1, 2], torch.tensor(HF_LOGITS_1_2), atol=1e-5, rtol=0)


def test_logits_are_those_of_an_installed_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    ours = sine_weights(GPT2(TINY))
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=2, n_head=3, n_embd=12, vocab_size=17, n_positions=8)
    ).eval()
    mapped = {hf_name(name): value for name, value in ours.state_dict().items()}
    theirs.load_state_dict({name: v.T if turn else v for (name, turn), v in mapped.items()}, strict=False)
    torch.testing.assert_close(ours(TOKENS)[0], theirs(TOKENS).logits, atol=1e-5, rtol=1e-5)


def test_the_loss_is_the_mean_cross_entropy_in_float32() -> None:
    model = sine_weights(GPT2(TINY))
    targets = TOKENS.roll(-1, 1)
    targets[0, -1] = -100
    logits, loss = model(TOKENS, targets)
    expected = F.cross_entropy(logits[targets != -100], targets[targets != -100])
    torch.testing.assert_close(loss, expected)
    low = model.bfloat16()(TOKENS, targets)
    assert (low[0].dtype, low[1].dtype) == (torch.bfloat16, torch.float32)


def test_a_later_token_changes_no_earlier_logit() -> None:
    model = sine_weights(GPT2(TINY))
    changed = TOKENS.clone()
    changed[:, 4] = 9
    before, after = model(TOKENS)[0], model(changed)[0]
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4:], after[:, 4:])


def test_a_sequence_longer_than_the_block_is_refused() -> None:
    with pytest.raises(ValueError, match="9 tokens is longer than the model's block_size 8"):
        GPT2(TINY)(torch.zeros(1, 9, dtype=torch.int64))


def test_dropout_acts_in_training_only_and_at_all_its_places() -> None:
    config = GPT2Config(**{**TINY.to_dict(), "dropout": 0.5})
    model = sine_weights(GPT2(config))
    assert torch.equal(model(TOKENS)[0], sine_weights(GPT2(TINY))(TOKENS)[0])
    model.train()
    assert not torch.equal(model(TOKENS)[0], model(TOKENS)[0])

    attention = model.transformer.h[0].attn
    x = torch.randn(2, 5, 12)
    attention.resid_dropout.eval()
    assert not torch.equal(attention(x), attention(x)), "no dropout inside the attention"
    attention.eval()
    attention.resid_dropout.train()
    zeros = (attention(x) == 0).float().mean().item()
    assert 0.2 < zeros < 0.8, "no dropout on the residual"
    model.eval()
    model.transformer.drop.train()
    assert not torch.equal(model(TOKENS)[0], model(TOKENS)[0]), "no dropout on the embeddings"
    model.eval()
    model.transformer.h[0].mlp.dropout.train()
    assert not torch.equal(model(TOKENS)[0], model(TOKENS)[0]), "no dropout in the MLP"


def test_the_tie_survives_the_meta_device() -> None:
    with torch.device("meta"):
        model = GPT2(TINY)
    sine_weights(model.to_empty(device="cpu"))
    assert [name for name in model.state_dict() if "head" in name or "wte" in name] == [
        "transformer.wte.weight"
    ]

    weight = model.transformer.wte.weight
    hidden = model.transformer(TOKENS)
    torch.testing.assert_close(model(TOKENS)[0], hidden @ weight.T)

    def gradient(logits: torch.Tensor) -> torch.Tensor:
        (grad,) = torch.autograd.grad(logits.square().sum(), weight, retain_graph=True)
        return grad

    both = gradient(model(TOKENS)[0])
    torch.testing.assert_close(
        both, gradient(hidden.detach() @ weight.T) + gradient(hidden @ weight.detach().T)
    )


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("gpt2", 124439808), ("gpt2-medium", 354823168), ("gpt2-large", 774030080), ("gpt2-xl", 1557611200)],
)
def test_presets_have_the_published_number_of_parameters(preset: str, parameters: int) -> None:
    with torch.device("meta"):
        model = GPT2(GPT2Config.preset(preset))
    assert sum(math.prod(p.shape) for p in model.parameters()) == parameters


def test_there_is_nothing_but_parameters_to_materialise() -> None:
    with torch.device("meta"):
        model = GPT2(GPT2Config.preset("nano"))
    assert not list(model.buffers())
    assert all(parameter.is_meta and parameter.dtype == torch.float32 for parameter in model.parameters())
    assert len(model.blocks()) == 4
