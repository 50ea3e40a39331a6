"""The model's configuration: what it accepts, the presets, its JSON form."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from model.config import PRESETS, GPT2Config

FIELDS: dict[str, Any] = {
    "n_layer": 2,
    "n_head": 3,
    "n_embd": 12,
    "vocab_size": 17,
    "block_size": 8,
    "dropout": 0.1,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 0}, "n_layer must be a whole number of at least 1, not 0"),
        ({"n_head": True}, "n_head must be a whole number of at least 1, not True"),
        ({"n_embd": 12.0}, "n_embd must be a whole number of at least 1, not 12.0"),
        ({"vocab_size": -1}, "vocab_size must be a whole number of at least 1, not -1"),
        ({"block_size": "8"}, "block_size must be a whole number of at least 1, not '8'"),
        ({"n_embd": 13}, "n_embd 13 does not divide by n_head 3: 13 = 3 x 4 + 1"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, not 1.0"),
        ({"dropout": -0.1}, "dropout must be at least 0 and below 1, not -0.1"),
        ({"dropout": float("nan")}, "dropout must be at least 0 and below 1, not nan"),
        ({"dropout": "0.1"}, "dropout must be a number, not '0.1'"),
    ],
)
def test_a_value_that_cannot_work_is_refused_with_the_numbers(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        GPT2Config(**{**FIELDS, **change})


def test_the_json_form_round_trips() -> None:
    config = GPT2Config(**FIELDS)
    assert GPT2Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_json_form_with_other_fields_is_refused_naming_them() -> None:
    fields = {**FIELDS, "rotary": True}
    del fields["n_head"]
    with pytest.raises(ValueError, match=r"unknown fields \['rotary'\], missing fields \['n_head'\]"):
        GPT2Config.from_dict(fields)


def test_presets_take_overrides_and_keep_the_rest() -> None:
    config = GPT2Config.preset("nano", vocab_size=257, dropout=0.0)
    assert (config.vocab_size, config.block_size, config.n_layer) == (257, PRESETS["nano"].block_size, 4)
    assert GPT2Config.preset("gpt2", block_size=64).block_size == 64
    assert GPT2Config.preset("gpt2").vocab_size == 50257


def test_an_unknown_preset_is_refused_listing_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"'gpt3'; choose .* nano, gpt2, gpt2-medium, gpt2-large, gpt2-xl"):
        GPT2Config.preset("gpt3")
