"""Building a model on one process: meta device, names, compile, bf16. Ranks are in tests/distributed."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from engine.run.parallelize import build_model, clip_gradients, gradient_sync, parallelize
from model.config import GPT2Config
from model.gpt2 import GPT2
from model.init import init_weights

CPU = torch.device("cpu")
TINY = GPT2Config(n_layer=4, n_head=2, n_embd=16, vocab_size=31, block_size=8)
TOKENS = torch.arange(16).reshape(2, 8)


def meta_model() -> GPT2:
    with torch.device("meta"):
        return GPT2(TINY)


def reference() -> GPT2:
    model = GPT2(TINY)
    init_weights(model, 7)
    return model


def test_one_rank_gets_the_plain_model_with_its_initial_weights() -> None:
    model = build_model(lambda: GPT2(TINY), partial(init_weights, seed=7), device=CPU)
    assert type(model) is GPT2
    expected = reference().state_dict()
    assert list(model.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_building_allocates_nothing_before_it_is_materialised() -> None:
    seen: list[bool] = []

    def make() -> nn.Module:
        model = GPT2(TINY)
        seen.extend(parameter.is_meta for parameter in model.parameters())
        return model

    build_model(make, partial(init_weights, seed=7), device=CPU)
    assert seen
    assert all(seen)


def test_compiled_blocks_share_one_graph_and_keep_their_names() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model = parallelize(
        meta_model(), None, partial(init_weights, seed=7), device=CPU, compile=True, compile_backend=counter
    )
    expected = reference()
    assert list(model.state_dict()) == list(expected.state_dict())
    torch.testing.assert_close(model(TOKENS)[0], expected(TOKENS)[0])
    assert counter.frame_count == 1, "one graph for all blocks, or more of them run into the recompile limit"


def test_bf16_computes_low_and_keeps_parameters_and_gradients_in_float32() -> None:
    model = build_model(lambda: GPT2(TINY), partial(init_weights, seed=7), device=CPU, bf16=True)
    logits, loss = model(TOKENS, TOKENS)
    loss.backward()
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in model.parameters())
    assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(ValueError, match="longer than"):
        model(torch.zeros(1, 9, dtype=torch.int64))
    assert not torch.is_autocast_enabled("cpu"), "a failing forward pass left autocast on"


class NoBlocks(nn.Module):
    """A model that names no blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu()


def test_a_model_without_blocks_is_taken_whole() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    with torch.device("meta"):
        model = NoBlocks()
    built = parallelize(
        model, None, lambda m: m.linear.reset_parameters(), device=CPU, compile=True, compile_backend=counter
    )
    assert built(torch.ones(1, 2)).shape == (1, 3)
    assert counter.frame_count == 1


def test_clipping_returns_the_norm_before_and_leaves_it_at_the_limit() -> None:
    model = reference()
    with gradient_sync(model, enabled=False):
        model(TOKENS, TOKENS)[1].backward()
    before = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    torch.testing.assert_close(clip_gradients(model.parameters(), 0.5), before)
    after = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert before > 0.5
    assert after.item() == pytest.approx(0.5, rel=1e-4)
