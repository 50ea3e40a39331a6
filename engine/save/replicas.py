"""Compares replicas: digests of what several ranks hold, taken in `save` and compared before the commit.

Contiguous host memory is digested in place. Samples of other tensors (on a device, or with gaps) are gathered
into one tensor per device, which the background thread fetches and digests.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import xxhash

from engine.format.digest import DIGEST_BYTES, pack, unpack
from engine.options import ReplicaCheck
from engine.save.raw_bytes import host_bytes, pieces, some_bytes
from engine.save.sampling import MOST_ON_DEVICE, SMALL_BYTES, Sampler
from engine.save.write_plan import Compared, Plan, fresh_of
from engine.state.local_boxes import LocalBox
from engine.state.sharing import SMALL, SMALL_BUFFER_BYTES, Group

_SHOWN = 5

_digest: Callable[[memoryview], bytes] = xxhash.xxh3_64_digest


@dataclass(slots=True)
class _Staged:
    """Samples from one device, in one tensor. places: (group, index among its digests, bytes) of each."""

    samples: torch.Tensor
    places: list[tuple[int, int, int]]
    event: torch.cuda.Event | None = None

    def fetch(self, found: Mapping[int, list[bytes]]) -> None:
        samples = self.samples
        if self.event is not None:
            # On a separate stream: the default one first runs everything that training has queued since.
            with torch.cuda.stream(torch.cuda.Stream(samples.device)):  # type: ignore[no-untyped-call]
                self.event.wait()
                samples = samples.cpu()
        view, at = memoryview(samples.numpy()), 0  # type: ignore[arg-type]
        for group, place, size in self.places:
            found[group][place] = _digest(view[at : at + size])
            at += size


@dataclass(slots=True)
class Comparison:
    """One save's comparison: this rank's digests, and on rank 0 the means to interpret all ranks' digests.

    names: for each group, the names of its runs, in the order of its digests.
    """

    found: dict[int, list[bytes]] = field(default_factory=dict)
    staged: list[_Staged] = field(default_factory=list)
    groups: Sequence[Group] = ()
    names: Callable[[int], list[str]] = lambda group: []

    def texts(self) -> dict[str, str]:
        """The digests as text, by group, for the receipt. Waits for samples on a device. Any thread."""
        for staged in self.staged:
            staged.fetch(self.found)
        self.staged = []
        return {str(group): pack(b"".join(digests)) for group, digests in self.found.items()}

    def differences(self, texts: Sequence[Mapping[str, str]]) -> list[str]:
        """On rank 0: one sentence for each tensor that differs, given all ranks' `texts` in rank order."""
        lines = []
        for number, group in enumerate(self.groups):
            first = group.ranks[0]
            seen: set[str] = set()
            for rank in group.ranks[1:]:
                one, other = (texts[at].get(str(number), "") for at in (first, rank))
                if one != other:
                    lines += self._name(group, number, (first, rank), (one, other), seen)
        if len(lines) > _SHOWN:
            lines[_SHOWN:] = [f"and {len(lines) - _SHOWN} more"]
        return lines

    def _name(
        self,
        group: Group,
        number: int,
        ranks: tuple[int, int],
        texts: tuple[str, str],
        seen: set[str],
    ) -> list[str]:
        names = self.names(number)
        one, other = (unpack(text, len(names)) if text else b"" for text in texts)
        buffers = {box.chunk.name for box in group.boxes if box.buffer}
        lines = []
        for place, name in enumerate(names):
            span = slice(place * DIGEST_BYTES, (place + 1) * DIGEST_BYTES)
            if one[span] != other[span] and name not in seen:
                seen.add(name)
                words = f"{name} differs between rank {ranks[0]} and rank {ranks[1]}"
                if name in buffers:
                    words += (
                        " (a buffer that was equal when the save was planned; the next save keeps each "
                        "rank's own value)"
                    )
                lines.append(words)
        return lines


class _Always:
    """Tensors digested whole at every save. There may be thousands, so the cost of each call matters."""

    def __init__(self, positions: Sequence[int]) -> None:
        self._positions = positions
        self._tensors: list[torch.Tensor | None] = [None] * len(positions)
        self._views: list[memoryview | None] = [None] * len(positions)

    def digests(self, boxes: Sequence[LocalBox]) -> list[bytes] | None:
        """The digests; None if some tensor is not plain host memory."""
        now = [boxes[position].tensor for position in self._positions]
        if any(map(operator.is_not, now, self._tensors)):
            for number, tensor in enumerate(now):
                if tensor is not self._tensors[number]:
                    self._tensors[number], self._views[number] = tensor, host_bytes(tensor)
        views = [view for view in self._views if view is not None]
        return list(map(_digest, views)) if len(views) == len(now) else None


class Replicas:
    """One rank's part in comparing replicas, save by save. Training thread only.

    check: "sampled" compares replicas whole the first time and by samples afterwards; "full" compares all of
    them at every save; "off" compares none.
    """

    def __init__(self, check: ReplicaCheck) -> None:
        self.check = check
        self.compared = None if check == "off" else Compared()
        self._plan = Plan([])
        self._samplers: list[Sampler] = []
        self._always: list[_Always] = []
        self._fresh: list[frozenset[int]] = []
        self._fresh_at_0: list[frozenset[int]] = []
        self._views: dict[int, tuple[torch.Tensor, memoryview | None]] = {}
        self._looked = False

    def forget(self) -> None:
        """The state's values were replaced: the next save compares everything."""
        self._looked = False
        if self.compared is not None:
            self.compared.boxes.clear()

    def confirm(self) -> None:
        """The previous save is committed: what it compared whole counts as compared. On rank 0."""
        if self.compared is not None and self._looked:
            self.compared.boxes.update(
                (box.chunk, group.ranks) for group in self._plan.groups for box in group.boxes
            )

    def adopt(self, plan: Plan, boxes: Sequence[LocalBox]) -> None:
        """Adopt a new plan."""
        self._plan, self._views, self._looked = plan, {}, False
        self._samplers = [
            self._sampler([boxes[position].chunk.chunk_bytes for position in watched.positions])
            for watched in plan.watched
        ]
        self._always = [
            _Always([watched.positions[run.item] for run in sampler.always])
            for watched, sampler in zip(plan.watched, self._samplers, strict=True)
        ]
        self._fresh = [watched.fresh for watched in plan.watched]
        self._fresh_at_0 = [fresh_of(group, self.compared or Compared()) for group in plan.groups]

    def _sampler(self, sizes: Sequence[int]) -> Sampler:
        full = self.check == "full"
        if self._plan.on_device:
            return Sampler(sizes, full=full, most_runs=MOST_ON_DEVICE, most_blocks=MOST_ON_DEVICE)
        return Sampler(sizes, full=full)

    @torch.no_grad()
    def look(self, boxes: Sequence[LocalBox], number: int) -> Comparison:
        """Digest those of this rank's replicas that save `number` compares."""
        plan, fresh_at_0, self._looked = self._plan, self._fresh_at_0, True
        found: dict[int, list[bytes]] = {}
        waiting: dict[torch.device, list[tuple[tuple[int, int, int], torch.Tensor]]] = defaultdict(list)
        parts = zip(plan.watched, self._samplers, self._always, self._fresh, strict=True)
        for watched, sampler, always, fresh in parts:
            digests = found[watched.group] = (not fresh and always.digests(boxes)) or []
            for run in sampler.choose(number, fresh)[len(digests) :]:
                view = self._view(boxes, watched.positions[run.item])
                if view is not None:
                    whole = run.end - run.begin == len(view)
                    digests.append(_digest(view if whole else view[run.begin : run.end]))
                    continue
                tensor = boxes[watched.positions[run.item]].tensor
                if run.end - run.begin > SMALL_BYTES:
                    digests.append(_whole_digest(tensor))
                    continue
                place = (watched.group, len(digests), run.end - run.begin)
                waiting[tensor.device].append((place, some_bytes(tensor, run.begin, run.end)))
                digests.append(b"")
        self._fresh = [frozenset() for _ in self._fresh]
        self._fresh_at_0 = [frozenset() for _ in fresh_at_0]

        def names(group: int) -> list[str]:
            boxes = plan.groups[group].boxes
            sampler = self._sampler([box.chunk.chunk_bytes for box in boxes])
            return [boxes[run.item].chunk.name for run in sampler.choose(number, fresh_at_0[group])]

        return Comparison(found, [_stage(*item) for item in waiting.items()], plan.groups, names)

    def _view(self, boxes: Sequence[LocalBox], position: int) -> memoryview | None:
        """The memory of a local box; cached for as long as the tensor stays the same object."""
        tensor = boxes[position].tensor
        known = self._views.get(position)
        if known is None or known[0] is not tensor:
            known = self._views[position] = (tensor, host_bytes(tensor))
        return known[1]


def _stage(device: torch.device, samples: list[tuple[tuple[int, int, int], torch.Tensor]]) -> _Staged:
    gathered = torch.cat([sample for _, sample in samples])
    event = None
    if device.type == "cuda":
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
    return _Staged(gathered, [place for place, _ in samples], event)


def _whole_digest(tensor: torch.Tensor) -> bytes:
    digest = xxhash.xxh3_64()
    for piece in pieces(tensor):
        digest.update(piece)
    return digest.digest()


def buffer_digests(boxes: Sequence[LocalBox], buffers: frozenset[str]) -> dict[int, str]:
    """The digests of a rank's large buffers, by position, for its offer; `SMALL` for the small ones."""
    offered = {}
    for position, item in enumerate(boxes):
        if item.chunk.name in buffers and item.chunk.sizes == item.chunk.shape:
            small = item.chunk.chunk_bytes <= SMALL_BUFFER_BYTES
            offered[position] = SMALL if small else _whole_digest(item.tensor).hex()
    return offered
