"""Initial weights: a function of (seed, name), whatever surrounds the parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Partial, Placement, Replicate, Shard

from model.config import GPT2Config
from model.gpt2 import GPT2
from model.init import STD, canonical_name, init_weights, local_slices

WTE = [0.0010791946, 0.011377795, -0.0065726521]
C_PROJ = [-0.0082974322, 0.0016352703, -0.015905099]
SMALL = GPT2Config(n_layer=3, n_head=2, n_embd=64, vocab_size=257, block_size=32)


def weights(config: GPT2Config = SMALL, seed: int = 1337) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = GPT2(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    init_weights(model, seed)
    return model.state_dict()


def test_the_values_of_a_seed_never_change() -> None:
    state = weights()
    # WTE and C_PROJ are what seed 1337 gave in the first version.
    expected = {"transformer.wte.weight": WTE, "transformer.h.2.mlp.c_proj.weight": C_PROJ}
    for name, values in expected.items():
        torch.testing.assert_close(state[name].flatten()[:3], torch.tensor(values), atol=1e-7, rtol=0)


def test_a_parameter_depends_on_its_name_and_not_on_its_neighbours() -> None:
    full = weights()
    fewer = weights(GPT2Config(**{**SMALL.to_dict(), "n_layer": 1, "block_size": 16}))
    same = [name for name in fewer if "c_proj.weight" not in name and "wpe" not in name]
    assert same
    assert all(torch.equal(fewer[name], full[name]) for name in same)
    # The residual projections differ by their scale alone.
    name = "transformer.h.0.attn.c_proj.weight"
    torch.testing.assert_close(fewer[name] / math.sqrt(3), full[name])


def test_seeds_and_names_give_different_values_and_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    one, again, other = weights(), weights(), weights(seed=1338)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["transformer.wte.weight"], other["transformer.wte.weight"])
    assert not torch.equal(one["transformer.h.0.mlp.c_fc.weight"], one["transformer.h.1.mlp.c_fc.weight"])


def test_the_distribution_is_that_of_gpt2() -> None:
    for name, value in weights().items():
        if name.endswith("bias"):
            assert torch.count_nonzero(value) == 0, name
        elif "ln_" in name:
            assert torch.equal(value, torch.ones_like(value)), name
        else:
            std = STD / math.sqrt(2 * SMALL.n_layer) if "c_proj" in name else STD
            # Eight standard errors of the estimate: the values are fixed by the seed, so it never flickers.
            assert value.std().item() == pytest.approx(std, rel=8 / math.sqrt(2 * value.numel())), name
            assert abs(value.mean().item()) < 8 * std / math.sqrt(value.numel()), name


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("transformer.h.0.ln_1.bias", "transformer.h.0.ln_1.bias"),
        ("module.transformer.wte.weight", "transformer.wte.weight"),
        ("_orig_mod.module.transformer.wte.weight", "transformer.wte.weight"),
        ("module._orig_mod.transformer.h.0._orig_mod.ln_1.bias", "transformer.h.0.ln_1.bias"),
        ("transformer.h.0._checkpoint_wrapped_module.ln_1.bias", "transformer.h.0.ln_1.bias"),
        ("encoder.module.weight", "encoder.module.weight"),
        ("module", "module"),
    ],
)
def test_canonical_names(name: str, canonical: str) -> None:
    assert canonical_name(name) == canonical


def test_wrappers_do_not_change_the_values() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = GPT2(SMALL)
    wrapped = Wrapper(torch.compile(model, backend="eager"))
    assert next(name for name, _ in wrapped.named_parameters()).startswith("module._orig_mod.")
    init_weights(wrapped, 1337)
    assert all(torch.equal(value, weights()[name]) for name, value in model.state_dict().items())


def test_a_lower_precision_holds_the_rounded_values() -> None:
    model = GPT2(SMALL).bfloat16()
    init_weights(model, 1337)
    assert all(torch.equal(value, weights()[name].bfloat16()) for name, value in model.state_dict().items())


def test_a_parameter_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        model = GPT2(SMALL)
    with pytest.raises(ValueError, match=r"transformer.wte.weight is on the meta device: call to_empty"):
        init_weights(model, 1)


def test_parameters_and_buffers_without_a_rule_are_refused_together() -> None:
    model = GPT2(SMALL)
    model.transformer.register_parameter("gate", nn.Parameter(torch.zeros(1)))
    model.register_buffer("mask", torch.zeros(1), persistent=False)
    with pytest.raises(ValueError, match=r"no rule for mask, transformer\.gate$"):
        init_weights(model, 1)


CUTS: list[tuple[tuple[int, ...], tuple[Placement, ...], tuple[int, ...]]] = [
    ((257, 4), (Shard(0),), (2,)),
    ((257, 4), (Shard(0),), (3,)),
    ((50257, 2), (Shard(0),), (4,)),
    ((2,), (Shard(0),), (3,)),
    ((5,), (Shard(0),), (4,)),
    ((7, 5), (Replicate(), Shard(0)), (2, 3)),
    ((7, 5), (Shard(0), Shard(1)), (2, 2)),
    ((7, 5), (Shard(0), Shard(0)), (2, 3)),
]


@pytest.mark.parametrize(("shape", "placements", "mesh"), CUTS)
def test_local_slices_cut_as_torch_chunk_does(
    shape: tuple[int, ...], placements: Sequence[Placement], mesh: tuple[int, ...]
) -> None:
    full = torch.arange(math.prod(shape)).reshape(shape)
    for coordinate in torch.cartesian_prod(*map(torch.arange, mesh)).reshape(-1, len(mesh)).tolist():
        expected = full
        for placement, ranks, rank in zip(placements, mesh, coordinate, strict=True):
            if isinstance(placement, Shard):
                chunks = expected.chunk(ranks, placement.dim)
                expected = chunks[rank] if rank < len(chunks) else expected.narrow(placement.dim, 0, 0)
        assert torch.equal(full[local_slices(shape, placements, mesh, coordinate)], expected)


def test_a_placement_that_is_no_box_is_refused() -> None:
    with pytest.raises(ValueError, match="knows Shard and Replicate, not P"):
        local_slices((4,), (Partial(),), (2,), (0,))
