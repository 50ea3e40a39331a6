"""A GPT-2 small enough for a test, trained for a step or two by the real Checkpointer in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from engine import Checkpointer, CheckpointRecord
from model.config import GPT2Config
from model.gpt2 import GPT2
from model.init import init_weights
from model.optim import decay_groups

TINY = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=257, block_size=12)
"""Not a preset: conversions have to be told its number of heads."""

CONFIG = {"n_head": TINY.n_head, "lr": 1e-3}


class Counter:
    """Stands for a schedule or a loader: an object whose state is JSON."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "pair": (self.value, float("inf"))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def new_model(config: GPT2Config = TINY, seed: int = 1) -> GPT2:
    model = GPT2(config)
    init_weights(model, seed)
    return model


def new_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(decay_groups(model, 0.1), lr=1e-3)


def step(model: GPT2, optimizer: torch.optim.Optimizer) -> float:
    """One optimizer step on random tokens; the loss."""
    tokens = torch.randint(0, model.config.vocab_size, (2, model.config.block_size + 1))
    _, loss = model(tokens[:, :-1], tokens[:, 1:])
    assert loss is not None
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def state_of(seed: int = 1, config: GPT2Config = TINY) -> dict[str, Any]:
    model = new_model(config, seed)
    return {"model": model, "optimizer": new_optimizer(model), "counter": Counter()}


def train(
    directory: Path,
    *,
    steps: int = 2,
    seed: int = 1,
    config: GPT2Config = TINY,
    run_config: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], list[CheckpointRecord]]:
    """Train and save after every step; the state at the end, and the records, oldest first."""
    torch.manual_seed(seed)
    state = state_of(seed, config)
    given = CONFIG if run_config is None else run_config
    with Checkpointer(directory, state, retention=None, config=given) as checkpointer:
        for number in range(1, steps + 1):
            loss = step(state["model"], state["optimizer"])
            state["counter"].value = number
            checkpointer.save(number, epoch=1, tokens=24 * number, metrics={"val_loss": loss})
        checkpointer.wait()
        records = [item.record for item in checkpointer.list() if item.record is not None]
    return state, records
