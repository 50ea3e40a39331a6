"""The training loop of the benchmarks: the trainer's own model, optimizer, sharding and step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from bench.harness.sizes import batch_shape, fit_tokens
from data.batch import BatchSplit
from engine.run.config import TrainConfig
from engine.run.job import Job, build_job
from engine.run.shared_stop import Agreement
from engine.run.step import train_step
from engine.run.world import World
from model.config import GPT2Config

_BATCHES = 8
_MOST_TOKENS = 16384
_WARM_UP_STEPS = 3


class RandomTokens:
    """Takes the place of the trainer's loader: batches of random tokens, made in advance."""

    def __init__(self, vocab_size: int, rows: int, seq_len: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self.vocab_size, self.seq_len, self.steps_per_epoch = vocab_size, seq_len, 1
        self._batches = generator.integers(0, vocab_size, (_BATCHES, rows, seq_len + 1), dtype=np.int64)
        self._next = 0

    def next_batch(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Inputs and targets, [rows, seq_len] each."""
        tokens = self._batches[self._next % _BATCHES]
        self._next += 1
        return tokens[:, :-1], tokens[:, 1:]


class StepCaller(Protocol):
    """What a way to save asks its caller to do around `optimizer.step()`."""

    def before_step(self) -> None:
        """Called before the optimizer changes the state; may wait."""

    def after_step(self) -> None:
        """Called after it has."""


class Gate:
    """Wraps `optimizer.step`: does what a mode asks of its caller, and measures the wait.

    On CUDA, events on the compute stream show how long it stood still between the last kernel before the
    step and the step's first one: that is where an overlapped copy delays it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        self._device = device
        self._step: Callable[..., Any] = optimizer.step
        self._caller: StepCaller | None = None
        self._hook: Any = None
        self._events: list[tuple[Any, Any]] = []
        self.waited_secs = 0.0
        optimizer.step = self._guarded_step  # type: ignore[method-assign]

    def begin(self, caller: StepCaller | None) -> None:
        """Start a window in which `caller` is called before and after each step."""
        self._caller, self._events, self.waited_secs = caller, [], 0.0
        if self._device.type == "cuda":
            # Registered again for every window: hooks run in order, and ours must come after the mode's.
            self._hook = self._optimizer.register_step_pre_hook(self._mark_begun)

    def end(self) -> float | None:
        """End the window; returns the seconds for which the compute stream stood still, None on CPU."""
        self._caller = None
        if self._hook is None:
            return None
        self._hook.remove()
        self._hook = None
        torch.cuda.synchronize(self._device)
        return float(sum(reached.elapsed_time(begun) for reached, begun in self._events)) / 1e3

    def _guarded_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._caller is not None:
            begin = time.perf_counter()
            self._caller.before_step()
            self.waited_secs += time.perf_counter() - begin
        if self._hook is not None:
            event: Any = torch.cuda.Event
            events = (event(enable_timing=True), event(enable_timing=True))
            events[0].record()
            self._events.append(events)
        try:
            return self._step(*args, **kwargs)
        finally:
            if self._caller is not None:
                self._caller.after_step()

    def _mark_begun(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._events[-1][1].record()


class Training:
    """A GPT-2 that trains on random tokens, one step at a time.

    Args:
        model: its shape.
        dp_replicate: the trainer's flag: replicas of the model; the ranks of each one shard it.
        tokens: per rank and step.
    """

    def __init__(
        self,
        model: GPT2Config,
        world: World,
        device: torch.device,
        *,
        dp_replicate: int,
        tokens: int,
        seed: int,
    ) -> None:
        self._seed, self._vocab_size = seed, model.vocab_size
        self._agreement = Agreement(world.rank, world.world_size, lambda: None)
        self.longest = min(model.block_size, 1024)
        self.job = random_job(model, world, device, dp_replicate=dp_replicate, seed=seed)
        self.set_tokens(tokens)
        self.gate = Gate(self.job.optimizer, device)

    def set_tokens(self, tokens: int) -> None:
        """Change the batch to about `tokens` tokens per rank."""
        rows, seq_len = batch_shape(tokens, self.longest)
        job = self.job
        job.split = BatchSplit(rows, rows, 1)
        loader: Any = RandomTokens(self._vocab_size, rows, seq_len, self._seed + job.world.rank)
        job.loader = loader

    def step(self, in_flight: Callable[[], bool] = lambda: False) -> tuple[float, bool]:
        """One optimizer step: (its seconds, whether a save was in flight on any rank at its end). Collective.

        The answer travels in the reduction in which the trainer's ranks agree on stopping.
        """
        begin = time.perf_counter()
        result = train_step(self.job, self._agreement, must_stop=in_flight)
        return time.perf_counter() - begin, result.vote.stop

    def warm_up(self) -> float:
        """Take a few steps; returns the duration of the shortest one after the first."""
        self.step()
        return min(self.step()[0] for _ in range(_WARM_UP_STEPS))

    def tokens_for(self, target_secs: float) -> int:
        """Tokens per rank that make a step last about `target_secs`. Collective; rank 0's clock decides."""
        samples = []
        for tokens in (16, 128):
            self.set_tokens(tokens)
            samples.append((tokens, self.warm_up()))
        box = [fit_tokens(samples, target_secs, at_most=_MOST_TOKENS)]
        if self.job.world.world_size > 1:
            torch.distributed.broadcast_object_list(box, src=0)
        return box[0]


def random_job(model: GPT2Config, world: World, device: torch.device, *, dp_replicate: int, seed: int) -> Job:
    """The trainer's job for a model of any shape, on random tokens. Collective."""
    config = TrainConfig(
        seed=seed, dp_replicate=dp_replicate, global_batch=world.world_size, micro_batch=1, max_steps=10**6
    )
    loader: Any = RandomTokens(model.vocab_size, 1, 8, seed)
    return build_job(config, world, device, (loader, None), model_shape=model)
