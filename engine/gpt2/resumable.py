"""What the trainer needs besides model and optimizer, for checkpoints imported from other tools."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from engine.convert.model_kinds import AddTensor
from engine.convert.tensors import windows_of
from engine.format.manifest import TensorInfo
from engine.gpt2.settings import SETTINGS
from engine.state.captured import RNG_KEY, per_rank_name
from engine.state.values import encode
from model.config import PRESETS, GPT2Config

SEED = 1337
_NO_FINGERPRINT = "imported"

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


def trainer_objects(step: int, epoch: int, seed: Any) -> dict[str, Any]:
    """The schedule at `step`, and the data loader at the start of `epoch`."""
    return {
        "schedule": {"last_step": step},
        "loader": {
            "epoch": epoch,
            "position": 0,
            "seed": seed if type(seed) is int and 0 <= seed < 2**63 else SEED,
            "fingerprint": _NO_FINGERPRINT,
        },
    }


def fresh_generators(add: AddTensor) -> Any:
    """The states of fresh random generators, in the form of `engine.state.rng.capture`."""
    version, words, gauss_next = random.Random(SEED).getstate()
    kind, keys, position, has_gauss, cached = np.random.RandomState(SEED).get_state(legacy=True)
    state = {
        "python": {"version": version, "words": torch.tensor(words), "gauss_next": gauss_next},
        "numpy": {
            "kind": str(kind),
            "keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached_gaussian": float(cached),
        },
        "torch": torch.Generator().manual_seed(SEED).get_state(),
    }
    tensors: dict[str, torch.Tensor] = {}
    document = encode(state, per_rank_name(0, RNG_KEY), tensors)
    for name, tensor in tensors.items():
        info = TensorInfo({torch.int64: "I64", torch.uint8: "U8"}[tensor.dtype], tuple(tensor.shape))
        add(name, info, lambda tensor=tensor: windows_of(tensor))  # type: ignore[misc]
    return document


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
