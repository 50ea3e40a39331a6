"""One snapshot after another: one plan, one buffer, and copies that follow the live memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from engine.errors import MemoryBudgetError, UnsavableValueError
from engine.format.digest import block_digests
from engine.native import kernels
from engine.save import snapshot as snapshot_module
from engine.save.division import divide
from engine.save.snapshot import Snapshot, plan_digest
from engine.save.staged_snapshot import StagedSnapshot
from engine.save.staging_buffer import StagingBuffer
from engine.save.staging_copy import Copier, copy_pairs
from engine.state.capture import StateCapture
from tests.support.boxes import shards, whole
from tests.support.carrier import every_nth_row


def taken(snapshot: Snapshot, capture: StateCapture, folder: Path) -> dict[str, torch.Tensor]:
    """Take one snapshot on one rank, and read it as any safetensors reader would."""
    if snapshot.prepare(capture.capture()):
        snapshot.adopt(divide([snapshot.chunks])[0])
    batches, overlapped = snapshot.copies(lambda name, source: False)
    assert not overlapped
    copy_pairs([pair for batch in batches for pair in batch.pairs], non_blocking=False)
    found: dict[str, torch.Tensor] = {}
    assert snapshot.staging is not None
    for slot in snapshot.staging.slots:
        path = folder / slot.layout.file
        path.write_bytes(snapshot.staging.padded(slot)[: slot.layout.file_bytes])
        found |= load_file(path)
    return found


def fresh(state: dict[str, Any], budget: int | None = None) -> tuple[Snapshot, StateCapture]:
    return Snapshot(0, pin=False, budget_bytes=budget), StateCapture(state, (), 0)


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(6, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(3, 6)).square().sum().backward()
    optimizer.step()


def test_each_snapshot_holds_the_values_of_its_moment(tmp_path: Path) -> None:
    model, optimizer = trained()
    values = {"n": torch.arange(3)}
    snapshot, capture = fresh({"model": model, "optimizer": optimizer, "values": values})
    buffers = set()
    for number in range(3):
        found = taken(snapshot, capture, tmp_path)
        assert snapshot.staging is not None
        buffers.add(snapshot.staging.buffer.data_ptr())
        assert torch.equal(found["model.weight"], model.weight)
        assert torch.equal(found["optimizer.state.bias.exp_avg"], optimizer.state[model.bias]["exp_avg"])
        assert found["optimizer.state.bias.step"].item() == number + 1
        assert found["values.n"].tolist() == [number, 1 + number, 2 + number]
        step(model, optimizer)
        values["n"] = values["n"] + 1  # another tensor object each time
    assert len(buffers) == 1, "the staging buffer is taken once"


def test_the_planner_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = snapshot_module.local_boxes
    monkeypatch.setattr(snapshot_module, "local_boxes", lambda tensors: calls.append(1) or real(tensors))
    model, optimizer = trained()
    snapshot, capture = fresh({"model": model, "optimizer": optimizer, "values": {"n": torch.zeros(2)}})
    for _ in range(3):
        taken(snapshot, capture, tmp_path)
        step(model, optimizer)
    assert len(calls) == 1


def test_a_new_structure_takes_a_new_plan(tmp_path: Path) -> None:
    model = nn.Linear(6, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    snapshot, capture = fresh({"model": model, "optimizer": optimizer})
    before = taken(snapshot, capture, tmp_path)
    step(model, optimizer)
    after = taken(snapshot, capture, tmp_path)
    assert set(after) - set(before) == {
        f"optimizer.state.{name}.{field}"
        for name in ("weight", "bias")
        for field in ("step", "exp_avg", "exp_avg_sq")
    }


@pytest.mark.parametrize(
    "value", [torch.zeros(3), torch.zeros(2, dtype=torch.int64), None], ids=["shape", "dtype", "gone"]
)
def test_a_value_whose_tensor_changes_takes_a_new_plan(value: torch.Tensor | None, tmp_path: Path) -> None:
    values: dict[str, Any] = {"n": torch.ones(2)}
    snapshot, capture = fresh({"values": values})
    taken(snapshot, capture, tmp_path)
    values["n"] = value
    found = taken(snapshot, capture, tmp_path)
    assert ("values.n" in found) == (value is not None)
    if value is not None:
        assert torch.equal(found["values.n"], value)


def test_moved_memory_needs_no_new_plan(tmp_path: Path) -> None:
    model, optimizer = trained()
    snapshot, capture = fresh({"model": model, "optimizer": optimizer})
    taken(snapshot, capture, tmp_path)
    model.weight.data = torch.full((4, 6), 5.0)
    assert snapshot.prepare(capture.capture()) is False
    assert bool((taken(snapshot, capture, tmp_path)["model.weight"] == 5).all())


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).view(3, 4).t(),
        torch.arange(20.0).view(4, 5)[1:, ::2],
        torch.tensor(1.5),
        torch.zeros(0, 3),
        torch.arange(5).to(torch.bfloat16),
        torch.arange(5).to(torch.float16),
        torch.arange(5).to(torch.float8_e5m2),
        torch.tensor([True, False, True]),
        torch.arange(5).to(torch.uint32),
        torch.arange(3.0).expand(2, 3),
        nn.Parameter(torch.ones(2)),
    ],
    ids=lambda t: f"{t.dtype}-{list(t.shape)}".replace("torch.", ""),
)
def test_any_tensor_is_stored_as_its_own_type(tensor: torch.Tensor, tmp_path: Path) -> None:
    snapshot, capture = fresh({"values": {"t": tensor}})
    found = taken(snapshot, capture, tmp_path)["values.t"]
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    assert (
        found.view(-1).view(torch.uint8).tolist()
        == tensor.detach().contiguous().view(-1).view(torch.uint8).tolist()
    )


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation")
@pytest.mark.parametrize("dtype", [torch.complex128, torch.quint8], ids=str)
def test_a_dtype_that_safetensors_lacks_is_refused_by_name(dtype: torch.dtype) -> None:
    tensor = torch.zeros(2, dtype=torch.complex128)
    if dtype == torch.quint8:
        tensor = torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, dtype)
    snapshot, capture = fresh({"values": {"t": tensor}})
    with pytest.raises(UnsavableValueError, match=r"values\.t: .*(complex128|quint8)"):
        snapshot.prepare(capture.capture())


def test_replicas_copy_only_their_rows() -> None:
    model = nn.Linear(6, 100, bias=False)
    capture = StateCapture({"model": model}, (), 1)
    snapshot = Snapshot(1, pin=False, budget_bytes=None)
    assert snapshot.prepare(capture.capture())
    other = [chunk for chunk in snapshot.chunks if not chunk.name.startswith("per_rank")]
    parts = divide([[*other, whole("per_rank.0", 900)], snapshot.chunks])[1]
    snapshot.adopt(parts)
    (batch,), _ = snapshot.copies(lambda name, source: False)
    eager = batch.pairs
    assert sum(to.numel() for to, _ in eager if to.shape[-1:] == (6,)) < model.weight.numel()
    for to, source in eager:
        assert to.shape == source.shape


def test_only_what_may_overlap_does() -> None:
    model, optimizer = trained()
    snapshot, capture = fresh({"model": model, "optimizer": optimizer})
    captured = capture.capture()
    snapshot.prepare(captured)
    snapshot.adopt(divide([snapshot.chunks])[0])
    (batch,), overlapped = snapshot.copies(lambda name, source: name in captured.guarded)
    assert len(overlapped) == len(captured.guarded) == 8
    assert len(batch.pairs) == 3, "the generators"


def test_batches_fill_the_arena_from_its_beginning_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to `end` of each batch everything is there, padding and headers apart: writing may begin."""
    monkeypatch.setattr(snapshot_module, "BATCH_BYTES", 1000)
    snapshot, capture = fresh({"values": [torch.ones(100 + n) for n in range(12)]})
    snapshot.prepare(capture.capture())
    snapshot.adopt(divide([snapshot.chunks])[0])
    assert snapshot.staging is not None
    batches, _ = snapshot.copies(lambda name, source: False)
    assert len(batches) > 4
    assert batches[-1].end == snapshot.staging.slots[-1].layout.file_bytes
    base, reached = snapshot.staging.buffer.data_ptr(), 0
    for batch in batches:
        ends = [to.data_ptr() + to.nbytes - base for to, _ in batch.pairs]
        assert all(to.data_ptr() - base >= reached for to, _ in batch.pairs)
        assert max(ends, default=0) <= batch.end
        reached = batch.end
    filled = sorted((to.data_ptr() - base, to.nbytes) for batch in batches for to, _ in batch.pairs)
    (slot,) = snapshot.staging.slots
    assert filled == [(p.begin, p.end - p.begin) for p in slot.layout.chunks]


@pytest.mark.skipif(kernels.library is None, reason="nothing is compiled")
def test_files_are_digested_while_they_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several files, in batches that end amid blocks: each file's digests are those of its bytes."""
    monkeypatch.setattr(snapshot_module, "BATCH_BYTES", 200_000)
    cards = every_nth_row(torch.rand(3, 50_001), 0, 1)
    snapshot, capture = fresh({"values": [cards, *(torch.rand(40_001 + n) for n in range(12))]})
    snapshot.prepare(capture.capture())
    snapshot.adopt(divide([snapshot.chunks])[0])
    assert snapshot.staging is not None
    assert len(snapshot.staging.slots) == 3
    for _ in range(2):
        batches, overlapped = snapshot.copies(None)
        assert len(batches) > len(snapshot.staging.slots) + 4
        staged = StagedSnapshot()
        Copier(None, [], digest=True).copy(batches, overlapped, staged)
        for slot in snapshot.staging.slots:
            file = snapshot.staging.padded(slot)[: slot.layout.file_bytes]
            assert staged.digests_of(slot.layout.file) == block_digests(file)


def test_over_budget_there_is_no_plan_and_no_memory_taken() -> None:
    model, optimizer = trained()
    snapshot, capture = fresh({"model": model, "optimizer": optimizer}, budget=100)
    assert snapshot.prepare(capture.capture())
    with pytest.raises(MemoryBudgetError):
        snapshot.adopt(divide([snapshot.chunks])[0])
    assert snapshot.staging is None
    assert snapshot.prepare(capture.capture()), "the next save plans again"


def test_a_forgotten_plan_gives_the_arena_back_and_is_made_anew(tmp_path: Path) -> None:
    model, optimizer = trained()
    snapshot, capture = fresh({"model": model, "optimizer": optimizer})
    taken(snapshot, capture, tmp_path)
    snapshot.forget_plan()
    assert snapshot.staging is None
    assert snapshot.layouts == ()
    assert torch.equal(taken(snapshot, capture, tmp_path)["model.weight"], model.weight)


def test_a_structure_that_was_never_planned_is_still_new_at_the_next_look() -> None:
    """The save in between failed before it had a plan: nothing may be copied by the old one."""
    values: dict[str, Any] = {"n": torch.ones(2)}
    snapshot, capture = fresh({"values": values})
    snapshot.prepare(capture.capture())
    snapshot.adopt(divide([snapshot.chunks])[0])
    values["m"] = torch.zeros(5)
    assert snapshot.prepare(capture.capture())
    assert snapshot.prepare(capture.capture())
    del values["m"]
    assert not snapshot.prepare(capture.capture()), "back to what was planned"


def test_a_second_snapshot_allocates_nothing_of_the_datas_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second copy: neither by Python's allocators, nor by torch's, nor by another staging buffer."""
    model = nn.Linear(1000, 1000, bias=False)
    snapshot, capture = fresh({"model": model})
    snapshot.prepare(capture.capture())
    snapshot.adopt(divide([snapshot.chunks])[0])
    monkeypatch.setattr(StagingBuffer, "__init__", lambda *a, **k: pytest.fail("another staging buffer"))
    with torch.profiler.profile(profile_memory=True) as profiler:
        tracemalloc.start()
        assert snapshot.prepare(capture.capture()) is False
        batches, _ = snapshot.copies(lambda name, source: False)
        for batch in batches:
            copy_pairs(batch.pairs, non_blocking=False)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    taken_by_torch = max((event.self_cpu_memory_usage for event in profiler.events() or []), default=0)
    assert peak < 400_000
    assert taken_by_torch < 400_000, "the weight has 4,000,000 bytes"


def test_digests_of_plans_tell_structures_apart() -> None:
    assert plan_digest([whole("a", 3)]) == plan_digest([whole("a", 3)])
    others = [[whole("b", 3)], [whole("a", 4)], [whole("a", 3, dtype="BF16")], shards("a", (3,), 2), []]
    assert len({plan_digest(held) for held in [[whole("a", 3)], *others]}) == 6
