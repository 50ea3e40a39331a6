"""What the trainer needs besides model and optimizer, for checkpoints imported from other tools."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from engine.convert.model_kinds import AddTensor
from engine.convert.tensors import windows_of
from engine.format.manifest import TensorInfo
from engine.state.captured import RNG_KEY, per_rank_name
from engine.state.values import encode

SEED = 1337
_NO_FINGERPRINT = "imported"


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
