"""From measurements to figures, on numbers that can be checked in the head."""

from __future__ import annotations

import dataclasses

import pytest

from bench.cases.save.figures import baselines, inflation, lost_secs, summarise
from bench.cases.save.records import Growth, IdleSave, Measurements, Memory, TrainingWindow
from bench.harness.floors import Floor
from bench.harness.records import Spread, merge, ratio


def window(row: str, repeat: int, steps: list[float], **more: object) -> TrainingWindow:
    fields = {"window_secs": sum(steps) + float(str(more.get("save_secs", 0.0))), **more}
    return TrainingWindow(row, repeat, step_secs=tuple(steps), **fields)  # type: ignore[arg-type]


MEASURED = Measurements(
    windows=[
        window("none", 0, [1.0, 1.0], process_cpu_secs=4.0),
        window("none", 0, [1.2, 1.2], process_cpu_secs=4.4),
        window(
            "holdfast", 0, [1.6, 1.3, 1.1], save_secs=0.1, stored_secs=1.0, cpu_secs=0.2, process_cpu_secs=6.5
        ),
        window("none", 1, [2.0], process_cpu_secs=4.0),
        window("none", 1, [2.0], process_cpu_secs=4.0),
        window("holdfast", 1, [2.5, 2.0], save_secs=0.3, stored_secs=2.0, cpu_secs=0.4, process_cpu_secs=9.0),
    ],
    idle=[IdleSave("holdfast", 0, 0.1, 0.5, 0.3, copied_secs=0.05)],
    floors=[Floor("copy", 0, 0.1, 100, "huge pages"), Floor("write", 0, 0.4, 100, "O_DIRECT")],
    memory=[Memory("holdfast", 110, 100, 100)],
    growth=[Growth("holdfast", 100, 10, 1000, 5, (500, 500))],
)


def test_the_reference_is_the_mean_step_of_the_same_repeat() -> None:
    base = baselines(MEASURED.windows)
    assert {repeat: step.secs for repeat, step in base.items()} == pytest.approx({0: 1.1, 1: 2.0})


def test_figures_of_a_row() -> None:
    row = summarise(MEASURED, ["holdfast"]).rows["holdfast"]
    assert row.lost is not None
    # Repeat 0: 4.1 s instead of 3 x 1.1 s; repeat 1: 4.8 s instead of 2 x 2.0 s.
    assert (row.lost.middle, row.lost.low, row.lost.high) == pytest.approx((0.8, 0.8, 0.8))
    assert row.blocked is not None
    assert (row.blocked.low, row.blocked.high, row.blocked.samples) == (0.1, 0.3, 2)
    assert row.cpu_window is not None
    assert (row.cpu_window.low, row.cpu_window.high) == pytest.approx((6.5 - 3 * 2.1, 9.0 - 2 * 4.0))
    assert row.copied_idle is not None
    assert row.copied_idle.middle == 0.05
    assert row.stream is None


def test_writing_alone_is_a_floor_and_no_row() -> None:
    measured = dataclasses.replace(
        MEASURED,
        windows=[*MEASURED.windows, window("raw write", 0, [1.3, 1.2]), window("raw write", 1, [2.1])],
    )
    summary = summarise(measured, ["holdfast"])
    assert summary.raw_lost is not None
    # Repeat 0: 2.5 s instead of 2 x 1.1 s; repeat 1: 2.1 s instead of 2.0 s.
    assert (summary.raw_lost.low, summary.raw_lost.high) == pytest.approx((0.1, 0.3))
    assert list(summary.rows) == ["holdfast"]
    assert summarise(MEASURED, ["holdfast"]).raw_lost is None


def test_what_other_modes_use_while_they_wait_is_not_the_saves() -> None:
    """With long steps, the polling of idle peers was most of what a save seemed to cost."""
    windows = [
        window("none", 0, [1.0, 1.0], cpu_secs=0.2),
        window("holdfast", 0, [1.0] * 4, cpu_secs=1.0, stored_secs=1.0),
        window("none", 1, [1.0, 1.0], cpu_secs=0.2),
        window("holdfast", 1, [1.0] * 4, cpu_secs=0.3, stored_secs=1.0),
    ]
    row = summarise(Measurements(windows=windows), ["holdfast"]).rows["holdfast"]
    assert row.cpu is not None
    assert (row.cpu.low, row.cpu.high) == pytest.approx((0.0, 0.6))


def test_a_repeat_without_a_reference_counts_for_nothing() -> None:
    alone = Measurements(windows=[window("holdfast", 0, [1.0], stored_secs=0.5)])
    row = summarise(alone, ["holdfast"]).rows["holdfast"]
    assert row.lost is None
    assert row.stored_idle is None


@pytest.mark.parametrize(
    ("steps", "save_secs", "stored_secs", "expected"),
    [
        ([1.5, 1.0, 1.0], 0.0, 1.2, 0.5),  # one step began before the save was stored
        ([1.5, 1.3, 1.0], 0.2, 1.8, 0.4),  # two did
        ([1.0, 1.0], 0.5, 0.5, None),  # stored when `save` returned
        ([1.0, 1.0], 0.0, None, None),  # no save
        ([1.0, 1.0], 0.1, 99.0, 0.0),  # never within the window
    ],
)
def test_inflation_looks_at_steps_in_flight_only(
    steps: list[float], save_secs: float, stored_secs: float | None, expected: float | None
) -> None:
    one = window("x", 0, steps, save_secs=save_secs, stored_secs=stored_secs)
    assert inflation(one, 1.0) == (None if expected is None else pytest.approx(expected))


def test_lost_time_scales_with_the_steps_of_the_window() -> None:
    assert lost_secs(window("x", 0, [1.0] * 12, save_secs=0.5), 0.9) == pytest.approx(1.7)


def test_windows_of_ranks_become_one() -> None:
    first = window("x", 0, [1.0, 2.0], save_secs=0.1, stored_secs=3.0, cpu_secs=1.0, written_bytes=(5,))
    second = window("x", 0, [1.5, 1.0], save_secs=0.3, stored_secs=2.0, cpu_secs=2.0, written_bytes=(7,))
    merged = merge([first, dataclasses.replace(second, gate_secs=0.4)])
    assert merged.step_secs == (1.5, 2.0)
    assert (merged.save_secs, merged.gate_secs, merged.stored_secs) == (0.3, 0.4, 3.0)
    assert merged.blocked_secs == pytest.approx(0.7)
    assert (merged.cpu_secs, merged.written_bytes, merged.stream_secs) == (3.0, (5, 7), None)


def test_other_records_of_ranks_become_one() -> None:
    idle = merge([IdleSave("x", 0, 0.1, 0.9, 1.0), IdleSave("x", 0, 0.2, 0.5, 2.0)])
    assert (idle.save_secs, idle.stored_secs, idle.cpu_secs) == (0.2, 0.9, 3.0)
    growth = merge([Growth("x", 9, 1, 100, 3, (10,)), Growth("x", 9, 1, 100, 8, (30,))])
    assert (growth.growth_bytes, growth.written_bytes) == (8, (10, 30))
    assert Memory("x", 100, 0, 50).share > Memory("x", 110, 0, 100).share


@pytest.mark.parametrize(
    ("written", "expected"), [((10, 30), 1.5), ((20, 20), 1.0), ((20,), None), ((0, 0), None), ((40, 0), 2.0)]
)
def test_balance(written: tuple[int, ...], expected: float | None) -> None:
    assert Growth("x", 10, 2, 100, 0, written).balance == expected


def test_ratios_and_spreads() -> None:
    assert Spread.of([]) is None
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)
    assert ratio(Spread.of([1.0]), Spread.of([4.0])) == 0.25
    assert ratio(Spread.of([1.0]), None) is None
    assert ratio(Spread.of([1.0]), Spread.of([0.0])) is None
    assert MEASURED.growth[0].share == 0.005
