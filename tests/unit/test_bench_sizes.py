"""Which model stands for `--state`, which batch makes a step, who writes which share."""

from __future__ import annotations

import pytest
import torch

from bench.harness.sizes import batch_shape, config_of, fit_tokens, parameter_count, parse_state, share_of
from model.config import PRESETS, GPT2Config
from model.gpt2 import GPT2


@pytest.mark.parametrize(
    ("text", "parameters"),
    [
        ("20M", 20e6),
        ("2m", 2e6),
        ("1M", 1e6),
        ("0.35G", 350e6),
        ("124 M", 124e6),
        ("240MB", 20e6),
        ("1.5GB", 125e6),
        ("60000000", 60e6),
    ],
)
def test_a_size_gives_a_model_of_about_that_size(text: str, parameters: float) -> None:
    assert parameter_count(parse_state(text)) == pytest.approx(parameters, rel=0.2)


def test_a_preset_is_taken_as_it_is() -> None:
    assert parse_state("gpt2") == PRESETS["gpt2"]


@pytest.mark.parametrize("text", ["", "gpt3", "-5M", "5T", "M", "1e6", "100", "0.9M", "1KB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"neither one of|too small"):
        parse_state(text)


@pytest.mark.parametrize("config", [config_of(2_000_000), GPT2Config(n_layer=3, n_head=2, n_embd=32)])
def test_parameters_are_counted_as_the_model_has_them(config: GPT2Config) -> None:
    with torch.device("meta"):
        model = GPT2(config)
    assert parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())


def test_models_have_the_proportions_of_gpt2() -> None:
    config = config_of(parameter_count(PRESETS["gpt2"]))
    assert (config.n_layer, config.n_embd) == (12, 768)


@pytest.mark.parametrize(
    ("samples", "target", "tokens"),
    [
        ([(16, 0.26), (128, 0.82)], 0.5, 64),  # 0.18 s and 5 ms a token
        ([(16, 0.9), (128, 1.5)], 0.5, 8),  # the constant alone is too long
        ([(16, 0.01), (128, 0.01)], 0.5, 1000),  # tokens cost nothing that can be seen
        ([(16, 0.30), (128, 0.20)], 0.5, 1000),  # noise
    ],
)
def test_tokens_for_a_step_of_the_wanted_length(
    samples: list[tuple[int, float]], target: float, tokens: int
) -> None:
    assert fit_tokens(samples, target, at_most=1000) == tokens


@pytest.mark.parametrize(
    ("tokens", "longest", "shape"),
    [
        (8, 1024, (1, 8)),
        (90, 1024, (1, 88)),
        (3, 1024, (1, 8)),
        (1500, 1024, (2, 744)),
        (5000, 512, (10, 496)),
    ],
)
def test_batch_shape(tokens: int, longest: int, shape: tuple[int, int]) -> None:
    assert batch_shape(tokens, longest) == shape


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_shares_are_equal_and_cover_everything_once(parts: int) -> None:
    sizes = [5, 0, 11, 1, 7]
    covered = []
    for part in range(parts):
        share = share_of(sizes, part, parts)
        assert abs(sum(end - begin for _, begin, end in share) - sum(sizes) / parts) < 1
        covered += [(item, byte) for item, begin, end in share for byte in range(begin, end)]
    assert covered == [(item, byte) for item, size in enumerate(sizes) for byte in range(size)]
