"""A torchdata `StatefulDataLoader` that can also resume at another world size.

The loader's own state belongs to one rank: its workers, its buffers, its position. But as long as a sampler
deals samples to the ranks in turn, one number says how many they have taken together. From it a rank of
another world size computes its position.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engine.errors import ConfigError, StateError


class ReshardableLoader:
    """Wraps a StatefulDataLoader; iterate over this object, and give it to the Checkpointer as `per_rank`.

        loader = ReshardableLoader(StatefulDataLoader(data, batch_size=8, sampler=sampler, num_workers=2))
        ckpt = Checkpointer(directory, {"model": model, "loader": loader}, per_rank=("loader",))

    At the same world size the loader's own state is restored. At another one every rank starts where all
    ranks together had stopped, with fresh workers and datasets.

    Args:
        loader: has a `batch_size`, and a sampler that deals samples to ranks in turn and can start anywhere:
            torchdata's StatefulDistributedSampler. Call its `set_epoch` before each epoch, as usual.
    Raises: ConfigError for a loader that cannot work.
    """

    def __init__(self, loader: Any) -> None:
        sampler = getattr(loader, "sampler", None)
        if not hasattr(loader, "load_state_dict"):
            raise ConfigError(
                f"a {type(loader).__name__} has no state_dict: give a torchdata StatefulDataLoader"
            )
        if not (hasattr(sampler, "num_replicas") and hasattr(sampler, "load_state_dict")):
            raise ConfigError(
                f"the loader's sampler is a {type(sampler).__name__}, which cannot resume at "
                "another world size: give it torchdata's StatefulDistributedSampler. A loader that always "
                "resumes at the same world size needs no wrapper"
            )
        if loader.batch_size is None:
            raise ConfigError("the loader has no batch_size, so its position cannot be counted")
        self.loader = loader
        self._taken = 0
        """Samples of this epoch that this rank has yielded."""
        self._resuming = False

    @property
    def sampler(self) -> Any:
        """The loader's, for `set_epoch`."""
        return self.loader.sampler

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        # The first iteration after a restore resumes; every other one starts an epoch.
        self._taken = self._taken if self._resuming else 0
        self._resuming = False
        for batch in self.loader:
            self._taken = min(self._taken + self.loader.batch_size, len(self.sampler))
            yield batch
        self._taken = 0

    def state_dict(self) -> dict[str, Any]:
        return {"loader": self.loader.state_dict(), "epoch": self.sampler.epoch, "taken": self._taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sampler.set_epoch(state["epoch"])
        self._taken = state["taken"]
        self._resuming = True
        # An empty state makes the loader drop its iterator.
        self.loader.load_state_dict(state["loader"])
        if not state["loader"]:
            self.sampler.load_state_dict({"yielded": self._taken})

    def reshard(self, states: Sequence[Mapping[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
        """The state of one rank of another world size. Raises StateError if the samples do not divide."""
        taken = {state["taken"] for state in states}
        epochs = {state["epoch"] for state in states}
        if len(taken) != 1 or len(epochs) != 1:
            raise StateError(
                f"the loaders of the {len(states)} ranks stopped at different positions ({sorted(taken)} "
                f"samples of epochs {sorted(epochs)}): resume on {len(states)} ranks"
            )
        together = taken.pop() * len(states)
        if together % world_size:
            raise StateError(
                f"{len(states)} ranks had taken {together} samples together, which cannot be divided among "
                f"{world_size} ranks: {together} = {world_size} x {together // world_size} + "
                f"{together % world_size}; resume on another number of ranks"
            )
        return {"loader": {}, "epoch": epochs.pop(), "taken": together // world_size}


def make_iterator(entry: Any) -> None:
    """Make a StatefulDataLoader create its iterator now, unless it has one. Other objects are left alone.

    Otherwise it creates one at its next `state_dict` or `iter`, and draws a random number then, perhaps from
    the global generator. Called before the generators are captured, this puts the draw into the saved state.
    Called before they are restored, the restore undoes it, as if the iterator had existed all along.
    """
    loader = entry.loader if isinstance(entry, ReshardableLoader) else entry
    if type(loader).__module__.partition(".")[0] != "torchdata":
        return
    # Private, but calling state_dict every time would make every dataset compute its own twice.
    if getattr(loader, "_iterator", None) is None:
        loader.state_dict()
