"""The training thread's look at the state, and the plan of who writes what when its structure has changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.errors import StateError
from engine.format.manifest import TensorInfo
from engine.ranks.calls import Call
from engine.ranks.coordination import Channel
from engine.save.replicas import Replicas, buffer_digests
from engine.save.snapshot import Snapshot
from engine.save.write_plan import agree_on_plan
from engine.state.capture import StateCapture
from engine.state.captured import Captured
from engine.state.sharing import Offer


@dataclass(slots=True)
class LocalState:
    """This rank's state at one save: captured, or the problem that prevented it.

    changed: its structure differs from the plan's. planning: rank 0 has called for a new plan.
    """

    captured: Captured = field(default_factory=Captured)
    problem: Exception | None = None
    changed: bool = False
    planning: bool = False

    def mesh(self) -> dict[str, Any]:
        """Names and shape of the DTensors' mesh, for the manifest."""
        for tensor in self.captured.tensors.values():
            mesh = getattr(tensor, "device_mesh", None)
            if mesh is not None:
                return {"names": list(mesh.mesh_dim_names or ()), "shape": list(mesh.shape)}
        return {"names": [], "shape": []}


@dataclass(slots=True)
class Planner:
    """Captures the state and keeps the plan. Used from the training thread only.

    tensors, aliases: of all ranks, for the manifest; rank 0's.
    """

    capture: StateCapture
    snapshot: Snapshot
    replicas: Replicas
    channel: Channel
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    replaced: bool = False
    """Whether a restore has replaced the state's values since the last plan."""

    def state_replaced(self) -> None:
        """A restore has replaced the state's values: the next save plans anew and compares all replicas."""
        self.replicas.forget()
        self.replaced = True

    def look(self) -> LocalState:
        """Capture the state. A failure is kept, because every rank must learn of it."""
        state = LocalState()
        try:
            state.captured = self.capture.capture()
            state.changed = self.snapshot.prepare(state.captured)
        except Exception as error:
            state.problem = error
        return state

    def plan(self, call: Call, state: LocalState, timeout_secs: float, *, committed: bool) -> None:
        """Agree on a new plan with the other ranks, if rank 0 has called for one. A failure is kept.

        `committed`: whether the newest save is committed.
        """
        if not state.planning:
            if state.changed and state.problem is None:
                state.problem = StateError(
                    f"the tensors of rank {self.channel.rank}'s state have changed since the last save, "
                    "but those of rank 0 have not; change the state on all ranks before the same save"
                )
            return
        self.replaced = False
        if committed:
            self.replicas.confirm()
        try:
            plan = agree_on_plan(
                self.channel,
                f"{call.key}/plan",
                self._offer(state),
                state.problem,
                timeout_secs,
                self.replicas.compared,
                str(call.request),
            )
            self.tensors, self.aliases = plan.tensors, plan.aliases
            self.snapshot.adopt(plan.parts)
            self.replicas.adopt(plan, self.snapshot.local_boxes)
        except Exception as error:
            self.snapshot.forget_plan()
            state.problem = error

    def _offer(self, state: LocalState) -> Offer:
        """This rank's contribution to a plan. A failure is kept."""
        if state.problem is None and self.channel.world_size > 1:
            boxes = self.snapshot.local_boxes
            try:
                return Offer(
                    self.snapshot.chunks,
                    buffer_digests(boxes, state.captured.buffers),
                    state.captured.aliases,
                    any(box.tensor.device.type != "cpu" for box in boxes),
                    state.captured.stateless,
                )
            except Exception as error:
                state.problem = error
        return Offer([] if state.problem else self.snapshot.chunks, {}, state.captured.aliases)
