"""The grouped options of a Checkpointer are validated when they are made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import Checkpointer, Checks, ConfigError, FailurePolicy, MirrorOptions, StorageOptions
from engine.options import checks_of


@pytest.mark.parametrize(
    ("setting", "check"),
    [(True, "full"), (False, "off"), ("full", "full"), ("sampled", "sampled"), ("off", "off")],
)
def test_settings(setting: str | bool, check: str) -> None:
    assert Checks(setting).replicas == check  # type: ignore[arg-type]
    assert checks_of(None, setting, False).replicas == check


@pytest.mark.parametrize("setting", ["some", "", None, 1])
def test_other_settings_are_refused(setting: object) -> None:
    with pytest.raises(ConfigError, match="check_replicas"):
        Checks(setting)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Checks(snapshots="yes"), "check_snapshots is 'yes': it must be True or False"),
        (lambda: FailurePolicy("ignore"), "on_failure is 'ignore': it must be 'warn' or 'raise'"),
        (lambda: FailurePolicy("x" * 200), "on_failure is a str: it must be"),
        (lambda: FailurePolicy(max_failures=0), "max_failures is 0: it must be a whole number, 1 or more"),
        (lambda: FailurePolicy(max_failures=True), "max_failures is True"),
        (lambda: MirrorOptions(3), "mirror is 3: it must be a path or a URI"),
        (lambda: MirrorOptions("m", -1), "mirror_freq is -1: it must be a whole number of steps, 0 or more"),
        (lambda: StorageOptions("key=1"), "storage_options is 'key=1': it must be a dict, or None"),
    ],
)
def test_a_value_that_cannot_be_is_refused_where_it_is_made(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"^{words}"):
        make()


def checkpointer(directory: Path, **given: Any) -> Checkpointer:
    return Checkpointer(directory / "run", {"w": torch.ones(2)}, **given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"checks": Checks(), "check_replicas": "off"}, "checks and check_replicas are both given"),
        ({"checks": Checks(), "check_snapshots": True}, "checks and check_snapshots are both given"),
        ({"failures": FailurePolicy(), "max_failures": 5}, "failures and max_failures are both given"),
        ({"mirror": MirrorOptions("m"), "mirror_freq": 4}, "mirror and mirror_freq are both given"),
        ({"checks": "full"}, "checks is 'full': it must be a Checks, or None"),
        ({"failures": 3}, "failures is 3: it must be a FailurePolicy, or None"),
    ],
)
def test_a_field_is_given_in_one_way_only(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^{words}"):
        checkpointer(tmp_path, **given)
    assert not list(tmp_path.iterdir()), "refused before anything is touched"


def test_values_do_what_the_keywords_do(tmp_path: Path) -> None:
    options = {
        "checks": Checks(replicas="full", snapshots=True),
        "failures": FailurePolicy("raise", 2),
        "mirror": MirrorOptions(tmp_path / "mirror", freq=2),
        "storage_options": StorageOptions(),
    }
    with checkpointer(tmp_path, **options) as ckpt:
        for step in (1, 2):
            ckpt.save(step).result()
        saver = ckpt._saver
        assert saver is not None
        assert (saver.checks, saver.outcomes.policy) == (options["checks"], options["failures"])
    copied = Checkpointer(tmp_path / "mirror", {"w": torch.ones(2)}, read_only=True)
    assert [item.record.step for item in copied.list() if item.record] == [2], "every second step"
