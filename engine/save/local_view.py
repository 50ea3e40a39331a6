"""What one rank sees of its state at the moment of a save."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from engine.save.snapshot import Snapshot
from engine.state.capture import StateCapture
from engine.state.captured import Captured


@dataclass(slots=True)
class Moment:
    """One save's view of this rank's state: captured, or the problem with it.

    changed: the structure is another than the plan's; planning: rank 0 has called for a new plan.
    """

    captured: Captured = field(default_factory=Captured)
    problem: Exception | None = None
    changed: bool = False
    planning: bool = False


def look(capture: StateCapture, snapshot: Snapshot) -> Moment:
    """Capture the state; a failure is kept, for every rank has to hear of it."""
    moment = Moment()
    try:
        moment.captured = capture.capture()
        moment.changed = snapshot.prepare(moment.captured)
    except Exception as error:
        moment.problem = error
    return moment


def mesh_description(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Names and shape of the mesh that the DTensors of a state live on, for the manifest."""
    for tensor in tensors.values():
        mesh = getattr(tensor, "device_mesh", None)
        if mesh is not None:
            return {"names": list(mesh.mesh_dim_names or ()), "shape": list(mesh.shape)}
    return {"names": [], "shape": []}
