"""The copy into the staging buffer, and what waits for it. The device stream is a fake."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from engine.save.overlap import methods_beside_step, overlap_stream, state_device, why_unguarded
from engine.save.staged_snapshot import StagedSnapshot
from engine.save.staging_copy import Batch, Copier, Pair, copy_pairs

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


NOTHING = [Batch((), 0)]
"""No eager copies: as a snapshot gives them, the last batch always reaches the last file's end."""


class FakeStream:
    """A stream whose copies happen when the test says so; notes every call."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.waiting: list[Pair] = []

    def copy(self, pairs: Sequence[Pair]) -> None:
        self.calls.append("copy")
        self.waiting = list(pairs)

    def guard_compute(self) -> None:
        self.calls.append("guard")

    def finish(self) -> None:
        self.calls.append("finish")
        self.run()

    @property
    def done(self) -> bool:
        return not self.waiting

    def run(self) -> None:
        copy_pairs(self.waiting, non_blocking=False)
        self.waiting = []


def optimizer() -> torch.optim.Optimizer:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    return torch.optim.SGD([parameter], lr=1.0)


def batch(*pairs: Pair) -> list[Batch]:
    return [Batch(pairs, 8)]


def test_many_tensors_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *a, **k: calls.append(len(a[0])) or real(*a, **k))
    pairs = [(torch.zeros(3), torch.full((3,), float(n))) for n in range(1000)]
    copy_pairs(pairs, non_blocking=False)
    assert calls == [1000]
    assert all(bool((to == n).all()) for n, (to, _) in enumerate(pairs))


def test_nothing_to_copy_is_no_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *a, **k: pytest.fail("called"))
    copy_pairs([], non_blocking=False)


@pytest.mark.parametrize(
    "source",
    [
        torch.arange(12.0).view(3, 4).t(),
        torch.arange(24.0).view(4, 6)[:, ::2],
        torch.tensor(3.0),
        torch.zeros(0, 3),
        torch.arange(6).to(torch.bfloat16),
        torch.arange(6).to(torch.float8_e4m3fn),
        torch.tensor([True, False]),
        torch.arange(5).to(torch.uint16),
        torch.ones(3, requires_grad=True),
        torch.ones(4).expand(3, 4),
    ],
    ids=lambda t: f"{t.dtype}-{list(t.shape)}".replace("torch.", ""),
)
def test_any_layout_and_dtype(source: torch.Tensor) -> None:
    to = torch.zeros(source.shape, dtype=source.dtype)
    copy_pairs([(to, source)], non_blocking=False)
    assert bits(to) == bits(source)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def test_without_a_stream_everything_is_copied_at_once() -> None:
    one, two = torch.zeros(2), torch.zeros(2)
    owner = optimizer()
    copier = Copier(None, [owner])
    copier.copy(batch((one, torch.ones(2))), [(two, torch.ones(2))], StagedSnapshot())
    assert one.tolist() == two.tolist() == [1, 1]
    copier.finish()
    copier.guard()
    assert not owner._optimizer_step_pre_hooks


class Noting(StagedSnapshot):
    """Notes how far the staging buffer was said to be filled, and what it really held then."""

    def __init__(self, staging: torch.Tensor) -> None:
        super().__init__()
        self._staging = staging
        self.seen: list[tuple[int, list[float]]] = []

    def advance(self, reached_bytes: int) -> None:
        self.seen.append((reached_bytes, self._staging.tolist()))
        super().advance(reached_bytes)


def test_the_writer_hears_of_each_batch_after_it_was_copied() -> None:
    staging = torch.zeros(3)
    staged = Noting(staging)
    batches = [Batch(((staging[n : n + 1], torch.ones(1)),), 4 * n + 4) for n in range(3)]
    Copier(None, []).copy(batches, [], staged)
    assert staged.seen == [(4, [1, 0, 0]), (8, [1, 1, 0]), (12, [1, 1, 1])]


@pytest.mark.parametrize("streamed", [True, False])
def test_with_overlapped_copies_the_writer_starts_when_all_have_been_started(streamed: bool) -> None:
    """They lie between the eager ones: nothing before the end of the staging buffer is whole until then."""
    staging = torch.zeros(2)
    stream = FakeStream() if streamed else None
    staged = Noting(staging)
    copier = Copier(stream, [])
    copier.copy([Batch(((staging[:1], torch.ones(1)),), 8)], [(staging[1:], torch.ones(1))], staged)
    assert staged.seen == [(8, [1, 0 if streamed else 1])]


def test_eager_pairs_are_copied_before_copy_returns() -> None:
    stream = FakeStream()
    buffer, weight = torch.zeros(1), torch.zeros(1)
    Copier(stream, []).copy(batch((buffer, torch.ones(1))), [(weight, torch.ones(1))], StagedSnapshot())
    assert buffer.item() == 1
    assert weight.item() == 0
    assert stream.calls == ["copy"]


def test_a_step_waits_for_the_copy_on_the_device_only() -> None:
    stream, owner = FakeStream(), optimizer()
    copier = Copier(stream, [owner])
    owner.step()
    assert stream.calls == [], "no snapshot, nothing to wait for"
    copier.copy(batch(), [(torch.zeros(1), torch.ones(1))], StagedSnapshot())
    owner.step()
    assert stream.calls == ["copy", "guard"]
    owner.step()
    assert stream.calls == ["copy", "guard", "guard"], "still being copied"
    stream.run()
    owner.step()
    owner.step()
    assert stream.calls == ["copy", "guard", "guard", "guard"], "done: later steps are free"


def test_guard_is_for_changes_outside_the_optimizer() -> None:
    stream = FakeStream()
    copier = Copier(stream, [])
    copier.guard()
    copier.copy(batch(), [(torch.zeros(1), torch.ones(1))], StagedSnapshot())
    copier.guard()
    assert stream.calls == ["copy", "guard"]


def test_the_writer_waits_until_the_arena_is_filled() -> None:
    stream = FakeStream()
    to = torch.zeros(1)
    copier = Copier(stream, [])
    copier.copy(batch(), [(to, torch.ones(1))], StagedSnapshot())
    copier.finish()
    assert to.item() == 1
    assert stream.calls == ["copy", "finish"]


def test_the_writer_still_waits_after_a_step_has_been_held_back() -> None:
    """A guard that finds the copy unfinished must not make `finish` return at once."""
    stream, owner, to = FakeStream(), optimizer(), torch.zeros(1)
    copier = Copier(stream, [owner])
    copier.copy(batch(), [(to, torch.ones(1))], StagedSnapshot())
    owner.step()
    copier.finish()
    assert to.item() == 1


def test_writing_may_begin_before_the_last_batch_is_copied() -> None:
    reached = []

    class Noting(StagedSnapshot):
        def advance(self, reached_bytes: int) -> None:
            super().advance(reached_bytes)
            reached.append((reached_bytes, first.item(), second.item()))

    first, second = torch.zeros(1), torch.zeros(1)
    batches = [Batch(((first, torch.ones(1)),), 4), Batch(((second, torch.ones(1)),), 8)]
    Copier(None, []).copy(batches, [], Noting())
    assert reached == [(4, 1, 0), (8, 1, 1)]


def test_with_overlapped_copies_the_writer_waits_for_the_device() -> None:
    stream, to = FakeStream(), torch.zeros(1)
    copier = Copier(stream, [])
    staged = StagedSnapshot(settle=copier.finish)
    copier.copy(batch(), [(to, torch.ones(1))], staged)
    staged.wait_until(8)
    assert to.item() == 1


def test_a_copy_that_fails_reaches_the_writer() -> None:
    staged = StagedSnapshot()
    staged.advance(4)
    staged.wait_until(4)
    staged.fail(RuntimeError("no more"))
    with pytest.raises(RuntimeError, match="no more"):
        staged.wait_until(8)


def test_removed_hooks_are_gone() -> None:
    stream, owner = FakeStream(), optimizer()
    copier = Copier(stream, [owner])
    copier.copy(batch(), [(torch.zeros(1), torch.ones(1))], StagedSnapshot())
    copier.remove()
    owner.step()
    assert stream.calls == ["copy"]


@pytest.mark.parametrize(
    ("setting", "device", "reason", "answer"),
    [
        (False, CUDA, None, "overlap is switched off"),
        ("auto", CPU, None, "the state is in host memory"),
        ("auto", CUDA, "an optimizer's step is compiled", "an optimizer's step is compiled"),
    ],
)
def test_when_copies_do_not_overlap(
    setting: bool | str, device: torch.device, reason: str | None, answer: str
) -> None:
    assert overlap_stream(setting, device, lambda: reason) == (None, answer)


def test_when_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = FakeStream()
    monkeypatch.setattr("engine.save.overlap.CudaStream", lambda device: stream)
    assert overlap_stream("auto", CUDA, lambda: None) == (stream, "copies overlap with training")


def guarded_state() -> dict[str, object]:
    model = nn.Linear(2, 2)
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}


def test_a_state_whose_optimizers_own_all_trainable_parameters_can_be_guarded() -> None:
    assert why_unguarded(guarded_state()) is None
    state = guarded_state()
    state["average"] = nn.Linear(2, 2).requires_grad_(False)
    assert why_unguarded(state) is None, "a frozen average changes outside of steps, and is copied at once"


def test_a_trainable_parameter_without_optimizer_cannot_be_guarded() -> None:
    state = guarded_state()
    state["head"] = nn.Linear(2, 1)
    assert why_unguarded(state) == "head.weight is trainable but belongs to no optimizer in the state"


def test_several_devices_cannot_be_guarded() -> None:
    """A copy from the second one runs on that one's compute stream, and the event that writing waits for says
    nothing about it."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    state = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    assert why_unguarded(state) == "the parameters lie on several devices"


def test_a_captured_step_cannot_be_guarded() -> None:
    model = nn.Linear(2, 2)
    state = {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), capturable=True)}
    assert why_unguarded(state) == "an optimizer's step is captured in a CUDA graph"


def test_a_compiled_step_cannot_be_guarded() -> None:
    state = guarded_state()
    owner = state["optimizer"]
    assert isinstance(owner, torch.optim.Optimizer)
    owner.step = torch.compile(owner.step, backend="eager")  # type: ignore[method-assign]
    assert why_unguarded(state) == "an optimizer's step is compiled"


def test_an_optimizer_that_changes_weights_outside_of_steps_cannot_be_guarded() -> None:
    """Its step alone has a hook of ours; a copy under way would see what eval() does to the weights."""

    class Averaging(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

        def eval(self) -> None: ...

        def _helper(self) -> None: ...

    model = nn.Linear(2, 2)
    state = {"model": model, "optimizer": Averaging(model.parameters(), lr=0.1)}
    reason = why_unguarded(state)
    assert reason == "a Averaging has methods besides step() that may change weights: eval"


def test_an_optimizer_whose_step_runs_no_hooks_cannot_be_guarded() -> None:
    class Bare(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.param_groups = inner.param_groups

        def step(self, closure: Any = None) -> None: ...  # type: ignore[override]

    model = nn.Linear(2, 2)
    state = {"model": model, "optimizer": Bare(torch.optim.SGD(model.parameters()))}
    assert why_unguarded(state) == "the step of a Bare runs no hooks"


def test_every_optimizer_of_torch_can_be_guarded() -> None:
    parameter = nn.Parameter(torch.zeros(2, 2))
    for name in ("AdamW", "SGD", "Muon", "Adafactor", "LBFGS", "SparseAdam"):
        assert methods_beside_step(getattr(torch.optim, name)([parameter])) == [], name


def test_the_device_is_that_of_the_first_parameters() -> None:
    assert state_device({"values": {"a": 1}}) == CPU
    assert state_device({"model": nn.Linear(1, 1, device="meta")}).type == "meta"
