"""Ranks that hold the same tensors, without processes: what they digest, and what rank 0 says of it."""

from __future__ import annotations

import torch

from engine.options import ReplicaCheck
from engine.save.replicas import Replicas
from engine.save.write_plan import Plan, Watched
from engine.state.local_boxes import LocalBox
from engine.state.sharing import Group, Offer, groups_to_compare, shared_boxes
from tests.support.boxes import whole

SIZES = {"large": (300, 50), "matrix": (20, 30), "scalar": ()}


def values() -> dict[str, torch.Tensor]:
    """The same at every call."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(size, generator=generator) for name, size in SIZES.items()}


def gapped(tensor: torch.Tensor) -> torch.Tensor:
    """Equal values, two elements apart in memory."""
    return torch.stack([tensor, tensor], -1)[..., 0]


class Rank:
    """One of two ranks that hold the same tensors."""

    def __init__(
        self, number: int, tensors: dict[str, torch.Tensor], check: ReplicaCheck = "sampled"
    ) -> None:
        self.number = number
        self.held = [LocalBox(whole(name, *tensor.shape), tensor) for name, tensor in tensors.items()]
        self.replicas = Replicas(check)

    def plan(self, *, on_device: bool = False) -> list[Group]:
        """Take the plan of both, and what of it was not compared."""
        offers = [Offer([item.chunk for item in self.held])] * 2
        groups = groups_to_compare(shared_boxes(offers))
        positions = tuple(box.places[self.number][1] for box in groups[0].boxes)
        known = self.replicas.compared.boxes if self.replicas.compared else set()
        boxes = groups[0].boxes
        fresh = frozenset(at for at, box in enumerate(boxes) if (box.chunk, (0, 1)) not in known)
        watched = [Watched(0, positions, fresh)]
        plan = Plan([], watched, on_device, groups=groups if self.number == 0 else ())
        self.replicas.adopt(plan, self.held)
        return groups


def differences(tensors: list[dict[str, torch.Tensor]], number: int, *, looks: int = 1) -> list[str]:
    """What rank 0 says after the last of some saves."""
    ranks = [Rank(at, held) for at, held in enumerate(tensors)]
    for rank in ranks:
        rank.plan()
    for look in range(looks):
        found = [rank.replicas.look(rank.held, number + look) for rank in ranks]
        texts = [one.texts() for one in found]
    return found[0].differences(texts)
