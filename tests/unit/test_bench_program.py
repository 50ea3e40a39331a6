"""What the small benchmarks have in common: flags that cannot work are refused before they measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from bench.cases import listing, mirror, small_tensors
from bench.cases.remote import program as remote

Main = Callable[[Sequence[str]], int]


@pytest.mark.parametrize(
    ("main", "flags", "sentence"),
    [
        (listing.main, ["--repeats", "0"], "argument --repeats: 0 given, but it must be at least 1"),
        (listing.main, ["--checkpoints", "-1"], "argument --checkpoints: -1 given"),
        (small_tensors.main, ["--repeats", "0"], "argument --repeats: 0 given"),
        (small_tensors.main, ["--bytes", "3"], "argument --bytes: 3 given, but it must be at least 4"),
        (small_tensors.main, ["--tensors", "many"], "argument --tensors: 'many' is not a whole number"),
        (mirror.main, ["--saves", "0"], "argument --saves: 0 given"),
        (mirror.main, ["--mb_per_sec", "0"], "argument --mb_per_sec: 0 given, but it must be above 0"),
        (mirror.main, ["--mb_per_sec", "nan"], "argument --mb_per_sec: nan given, but it must be above 0"),
        (remote.main, ["--uri", "s3://bucket/x", "--repeats", "0"], "argument --repeats: 0 given"),
    ],
)
def test_numbers_that_cannot_work_are_refused(
    main: Main, flags: Sequence[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(flags)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err
