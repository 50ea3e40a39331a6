"""Translates another tool's settings to the trainer's flags. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.gpt2.settings import SETTINGS
from model.config import PRESETS, GPT2Config

_COUNTS = {
    "block_size": "seq_len",
    "warmup_iters": "warmup_steps",
    "lr_decay_iters": "lr_decay_steps",
    "max_iters": "max_steps",
    "seed": "seed",
}
_RATES = {
    "learning_rate": "lr",
    "min_lr": "min_lr",
    "weight_decay": "weight_decay",
    "grad_clip": "grad_clip",
    "dropout": "dropout",
}
"""nanoGPT's names for the trainer's flags: counts above, other numbers here."""
_PAIRS = frozenset({"beta1", "beta2", "batch_size", "gradient_accumulation_steps"})


def run_config(shape: GPT2Config, given: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(the trainer's known flags and the model's shape; settings that are not flags)."""
    config: dict[str, Any] = {"gpt2": shape.to_dict(), "n_head": shape.n_head, "dropout": shape.dropout}
    for name, preset in PRESETS.items():
        same = (preset.n_layer, preset.n_head, preset.n_embd) == (shape.n_layer, shape.n_head, shape.n_embd)
        if same and preset.block_size == shape.block_size:
            config["model"] = name
    rates = {name: float(value) for name, value in given.items() if type(value) in (int, float)}
    counts = {name: int(value) for name, value in rates.items() if value >= 0 and value == int(value)}
    config |= {ours: counts[theirs] for theirs, ours in _COUNTS.items() if theirs in counts}
    config |= {
        ours: rates[theirs] for theirs, ours in _RATES.items() if theirs in rates and ours != "dropout"
    }
    if "beta1" in rates and "beta2" in rates:
        config["betas"] = [rates["beta1"], rates["beta2"]]
    if "batch_size" in counts and "gradient_accumulation_steps" in counts:
        config["global_batch"] = counts["batch_size"] * counts["gradient_accumulation_steps"]
    known = {*SETTINGS, *_PAIRS, *_RATES, *(name for name in _COUNTS if name in counts)}
    return config, tuple(name for name in given if name not in known)
