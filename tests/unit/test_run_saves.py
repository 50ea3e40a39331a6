"""Saving from the loop's side: failures are counted and told, and a rank never stops alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from engine.errors import LeaseLostError, SaveFailedError, SaveStuckError, StateError
from engine.run.console import Console
from engine.run.recorder import Recorder
from engine.run.saves import Saves
from engine.save.outcomes import SaveHandle


class FakeSaver:
    """Does as it is told: each entry of `says` answers one call, None for success."""

    def __init__(self, says: Mapping[str, list[Exception | None]] | None = None) -> None:
        self.says = dict(says or {})
        self.failed_saves = 0
        self.skips = False
        self.calls: list[str] = []
        self.handles: list[SaveHandle] = []

    def _answer(self, call: str) -> None:
        self.calls.append(call)
        answers = self.says.get(call.split()[0], [])
        if answers and (error := answers.pop(0)) is not None:
            raise error

    def save(
        self, step: int, *, epoch: int, tokens: int, metrics: Mapping[str, float], reasons: tuple[str, ...]
    ) -> SaveHandle:
        self._answer(f"save {step} {','.join(reasons)}")
        self.handles.append(SaveHandle(step, skipped=self.skips))
        return self.handles[-1]

    def poll(self) -> None:
        self._answer("poll")

    def wait(self, timeout: float | None = None) -> None:
        self._answer("wait")


def saves_of(saver: FakeSaver, max_failures: int = 3) -> Saves:
    return Saves(saver, Recorder(Console(speaks=False)), max_failures)


def save(saves: Saves, step: int, *reasons: str, metrics: Mapping[str, float] | None = None) -> None:
    saves.save(step, epoch=0, tokens=0, metrics=metrics or {}, reasons=reasons)


def failed(cause: Exception | None = None) -> SaveFailedError:
    error = SaveFailedError("the checkpoint of step 1 was not saved: disk full")
    error.__cause__ = cause
    return error


def test_an_interval_save_does_not_wait_here() -> None:
    saver = FakeSaver()
    save(saves_of(saver), 3, "interval")
    assert saver.calls == ["save 3 interval"]


@pytest.mark.parametrize("reason", ["epoch", "best", "signal", "final"])
def test_what_may_not_be_skipped_waits_for_the_writer_first(reason: str) -> None:
    saver = FakeSaver()
    save(saves_of(saver), 3, "interval", reason)
    assert saver.calls == ["wait", f"save 3 interval,{reason}"]


def test_a_step_is_saved_once() -> None:
    saver = FakeSaver()
    saves = saves_of(saver)
    save(saves, 3, "interval")
    save(saves, 3, "signal")
    assert saver.calls == ["save 3 interval"]


def test_what_was_restored_is_not_saved_again() -> None:
    saver = FakeSaver()
    saves = saves_of(saver)
    saves.already_saved(3)
    save(saves, 3, "final")
    assert saver.calls == []


def test_a_skipped_step_can_still_be_saved() -> None:
    saver = FakeSaver()
    saver.skips = True
    saves = saves_of(saver)
    save(saves, 3, "interval")
    saver.skips = False
    save(saves, 3, "signal")
    assert saver.calls == ["save 3 interval", "wait", "save 3 signal"]


def test_news_of_an_earlier_failure_does_not_cost_this_save() -> None:
    saver = FakeSaver({"save": [failed(), None]})
    save(saves_of(saver), 3, "interval")
    assert saver.calls == ["save 3 interval", "save 3 interval"]


def test_a_final_save_is_not_begun_after_one_failure_too_many() -> None:
    saver = FakeSaver({"wait": [failed()]})
    saver.failed_saves = 3
    save(saves_of(saver), 3, "final")
    assert saver.calls == ["wait"]


def test_but_not_when_that_was_one_too_many() -> None:
    saver = FakeSaver({"save": [failed(), None]})
    saver.failed_saves = 1
    saves = saves_of(saver, 0)
    save(saves, 3, "interval")
    assert saver.calls == ["save 3 interval"]
    assert saves.must_stop()


@pytest.mark.parametrize(
    ("maximum", "failures", "stops"),
    [(3, 0, False), (3, 2, False), (3, 3, True), (0, 0, False), (0, 1, True), (1, 1, True)],
)
def test_training_goes_on_until_there_are_too_many(maximum: int, failures: int, stops: bool) -> None:
    saver = FakeSaver({"poll": [failed()]})
    saves = saves_of(saver, maximum)
    saver.failed_saves = failures
    assert saves.must_stop() is stops


def test_the_last_word_names_count_cause_and_way_out() -> None:
    saver = FakeSaver({"poll": [failed()]})
    saves = saves_of(saver)
    saver.failed_saves = 3
    said = str(saves.reason_to_stop())
    assert "3 saves in a row failed" in said
    assert "disk full" in said
    assert "--resume latest" in said


@pytest.mark.parametrize(
    "provoke",
    [lambda saves: saves.must_stop(), lambda saves: save(saves, 3, "interval")],
    ids=["poll", "save"],
)
@pytest.mark.parametrize(
    "error",
    [
        StateError("state.x is a lambda"),
        failed(LeaseLostError("epoch 2 holds it")),
        SaveStuckError("rank 0: the save of step 2 is still running"),
    ],
    ids=["state", "lease", "stuck"],
)
def test_some_errors_end_the_run_at_once(provoke: Callable[[Saves], None], error: Exception) -> None:
    """But not on the spot: the other ranks have to hear of it in the next vote."""
    saver = FakeSaver({"poll": [error], "save": [error]})
    saves = saves_of(saver)
    provoke(saves)
    assert saves.must_stop()
    assert saves.reason_to_stop() is (error.__cause__ or error)


def test_the_end_is_good_only_if_the_last_save_was() -> None:
    saves_of(FakeSaver()).settle()
    saver = FakeSaver({"wait": [failed()]})
    saver.failed_saves = 1
    with pytest.raises(SaveFailedError, match=r"1 save in a row failed: .*disk full"):
        saves_of(saver).settle()


def test_a_validation_loss_counts_once_its_save_is_announced() -> None:
    recorder = Recorder(Console(speaks=False))
    saves = Saves(FakeSaver(), recorder, 3)
    assert recorder.improves(3.0)
    save(saves, 3, "best", metrics={"val_loss": 3.0})
    assert not recorder.improves(3.0)


def test_a_skipped_save_takes_its_promise_back() -> None:
    recorder = Recorder(Console(speaks=False))
    saver = FakeSaver()
    saver.skips = True
    save(Saves(saver, recorder, 3), 3, "interval", metrics={"val_loss": 3.0})
    assert recorder.improves(3.0)


def test_a_save_that_hangs_is_no_good_end() -> None:
    saver = FakeSaver({"wait": [SaveStuckError("rank 0: the save of step 2 is still running")]})
    with pytest.raises(SaveStuckError, match="step 2"):
        saves_of(saver).settle()


def test_which_save_is_in_flight() -> None:
    saver = FakeSaver()
    saves = saves_of(saver)
    assert saves.in_flight() is None
    save(saves, 3, "interval")
    assert saves.in_flight() == 3
    saver.handles[-1].set_failure(failed())
    assert saves.in_flight() is None
    saver.skips = True
    save(saves, 4, "interval")
    assert saves.in_flight() is None


def test_finishing_notes_a_failure_and_goes_on() -> None:
    saver = FakeSaver({"wait": [failed()]})
    saver.failed_saves = 1
    saves = saves_of(saver)
    saves.finish()
    assert "disk full" in str(saves.reason_to_stop())
