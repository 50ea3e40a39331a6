"""The random number generators of one rank: captured first, restored last.

`state_dict()` and `load_state_dict()` of other objects may draw random numbers, so the generators are
captured before any of them runs and restored after all of them. Each rank has its own: two ranks with one
generator state would draw the same dropout masks.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch


def capture() -> dict[str, Any]:
    """The states of Python, NumPy, torch CPU and this rank's own CUDA device, as tensors and JSON."""
    version, words, gauss_next = random.getstate()
    kind, keys, position, has_gauss, cached_gaussian = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": {
            "version": version,
            # 625 words of 32 bits; int64 because uint32 tensors lack most operations.
            "words": torch.tensor(words, dtype=torch.int64),
            "gauss_next": gauss_next,
        },
        "numpy": {
            "kind": str(kind),
            "keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached_gaussian": float(cached_gaussian),
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore(state: dict[str, Any]) -> None:
    """Set every generator to a state of `capture`."""
    python, numpy_state = state["python"], state["numpy"]
    words = tuple(int(word) for word in python["words"].tolist())
    random.setstate((python["version"], words, python["gauss_next"]))
    np.random.set_state(
        (
            numpy_state["kind"],
            numpy_state["keys"].numpy().astype(np.uint32),
            numpy_state["position"],
            numpy_state["has_gauss"],
            numpy_state["cached_gaussian"],
        )
    )
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def derive(seed: int, step: int, rank: int) -> None:
    """Seed every generator from (seed, step, rank): for a resume at another world size.

    The saved streams belong to ranks that no longer exist one to one: reusing them would give two ranks the
    same stream, or one rank none.
    """
    value = derived_seed(seed, step, rank)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def derived_seed(seed: int, step: int, rank: int, key: str = "") -> int:
    """A seed of 63 bits; `key` distinguishes generators that are entries of the state."""
    raw = hashlib.sha256(f"holdfast-rng:{seed}:{step}:{rank}{key and ':'}{key}".encode()).digest()
    return int.from_bytes(raw[:8], "little") >> 1
