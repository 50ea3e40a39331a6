"""A torchdata `StatefulDataLoader` that can also resume at another world size.

The loader's own state belongs to one rank: its workers, its buffers, its position. How much all ranks have
taken together is one number, as long as a sampler deals the dataset out to them in turns. From that number a
rank of another world size finds its position.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engine.errors import ConfigError, StateError


class ReshardableLoader:
    """Wraps a StatefulDataLoader; iterate over this object, and give it to the Checkpointer as `per_rank`.

        loader = ReshardableLoader(StatefulDataLoader(data, batch_size=8, sampler=sampler, num_workers=2))
        ckpt = Checkpointer(directory, {"model": model, "loader": loader}, per_rank=("loader",))

    At the same world size the loader's own state is restored. At another one every rank begins where all
    ranks together had stopped, with fresh workers and datasets.

    Args:
        loader: with `batch_size`, and a sampler that deals samples out in turns and can start anywhere:
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
        """Samples of this epoch that this rank has handed out."""
        self._goes_on = False

    @property
    def sampler(self) -> Any:
        """The loader's, for `set_epoch`."""
        return self.loader.sampler

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        # Right after a restore the loader goes on; every other iteration begins an epoch.
        self._taken = self._taken if self._goes_on else 0
        self._goes_on = False
        for batch in self.loader:
            self._taken = min(self._taken + self.loader.batch_size, len(self.sampler))
            yield batch
        self._taken = 0

    def state_dict(self) -> dict[str, Any]:
        return {"loader": self.loader.state_dict(), "epoch": self.sampler.epoch, "taken": self._taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sampler.set_epoch(state["epoch"])
        self._taken = state["taken"]
        self._goes_on = True
        # Without a state of its own the loader forgets the iterator that it has.
        self.loader.load_state_dict(state["loader"])
        if not state["loader"]:
            self.sampler.load_state_dict({"yielded": self._taken})

    def reshard(self, states: Sequence[Mapping[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
        """The state of one rank of another world size. Raises StateError when the place does not divide."""
        taken = {state["taken"] for state in states}
        epochs = {state["epoch"] for state in states}
        if len(taken) != 1 or len(epochs) != 1:
            raise StateError(
                f"the loaders of the {len(states)} ranks had stopped at different places ({sorted(taken)} "
                f"samples of epochs {sorted(epochs)}): resume on {len(states)} ranks"
            )
        together = taken.pop() * len(states)
        if together % world_size:
            raise StateError(
                f"{len(states)} ranks had taken {together} samples together, which do not divide over "
                f"{world_size} ranks: {together} = {world_size} x {together // world_size} + "
                f"{together % world_size}; resume on another number of ranks"
            )
        return {"loader": {}, "epoch": epochs.pop(), "taken": together // world_size}


def make_iterator(entry: Any) -> None:
    """Have a StatefulDataLoader make its iterator now, unless it has one; does nothing to other objects.

    It would do so when it is asked for its state, or at the next `iter`, and draw from its generator then,
    which may be the global one. Made before the generators are captured, the draw is in what is saved. Made
    before they come back, it is undone with them, as if the iterator had been there all the time.
    """
    loader = entry.loader if isinstance(entry, ReshardableLoader) else entry
    if type(loader).__module__.partition(".")[0] != "torchdata":
        return
    # Underscored, but to ask for the state each time would have every dataset make its own twice.
    if getattr(loader, "_iterator", None) is None:
        loader.state_dict()
