"""Flags: their set, their limits, and which of flag, checkpoint and default wins."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
from itertools import pairwise
from typing import Any

import pytest

from engine.errors import ConfigError
from engine.run.cli import is_given, parse, resolve
from engine.run.config import LOCKED, TrainConfig, check_locked, complete, from_json, to_json

PROMISED_DEFAULTS = {
    "dropout": 0.0,
    "lr": 6e-4,
    "warmup_steps": 100,
    "lr_decay_steps": None,
    "checkpoint_freq": 250,
    "keep_checkpoints": 10,
    "checkpoint_dir": "./checkpoints",
    "max_save_failures": 3,
    "device": "auto",
    "resume": None,
}


@pytest.mark.parametrize(("flag", "value"), PROMISED_DEFAULTS.items(), ids=str)
def test_promised_defaults(flag: str, value: object) -> None:
    assert getattr(TrainConfig(), flag) == value


def test_every_flag_has_a_help_text() -> None:
    """The string after a field is what --help shows."""
    (body,) = [
        node.body for node in ast.parse(inspect.getsource(TrainConfig)).body if isinstance(node, ast.ClassDef)
    ]
    silent = [
        ast.unparse(field.target)
        for field, after in pairwise(body)
        if isinstance(field, ast.AnnAssign) and not (isinstance(after, ast.Expr) and ast.unparse(after.value))
    ]
    assert silent == []


def test_help_ends_well_and_explains(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    assert ended.value.code == 0
    assert "Peak learning rate." in capsys.readouterr().out


def test_underscores_and_dashes_are_the_same() -> None:
    assert parse(["--max-steps", "7", "--eval_freq=3"]) == parse(["--max_steps=7", "--eval-freq", "3"])


def test_storage_options_add_up() -> None:
    config = parse(["--storage_options", "key=a", "--storage_options=secret=b=c"])
    assert config.storage_mapping == {"key": "a", "secret": "b=c"}


def test_a_storage_option_without_a_value_is_refused_without_showing_it() -> None:
    with pytest.raises(ConfigError, match="entry 2") as refused:
        _ = TrainConfig(storage_options=("a=b", "hunter2")).storage_mapping
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("lr", 0.0),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("min_lr", -1e-9),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("betas", (0.9, 1.0)),
        ("global_batch", 0),
        ("micro_batch", 0),
        ("seq_len", 0),
        ("max_steps", 0),
        ("num_epochs", 0),
        ("steps_per_epoch", 0),
        ("eval_freq", -1),
        ("eval_batches", 0),
        ("checkpoint_freq", -1),
        ("keep_checkpoints", 0),
        ("max_save_failures", -1),
        ("seed", -1),
        ("seed", 2**63),
        ("warmup_steps", -1),
        ("weight_decay", float("nan")),
        ("grad_clip", -1.0),
        ("grad_clip", float("inf")),
        ("global_batch", 2**31),
        ("max_steps", 2**63),
        ("warmup_steps", 10**30),
        ("data", "\udcff"),
        ("log_dir", ""),
        ("on_event", ""),
        ("dp_replicate", 0),
        ("grace_secs", 0.0),
        ("checkpoint_dir", ""),
        ("device", "tpu"),
        ("save_policy", "drop"),
    ],
    ids=str,
)
def test_a_value_that_cannot_work_is_named_with_its_flag(flag: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"--{flag} is ") as refused:
        TrainConfig(**{flag: value})
    assert repr(value) in str(refused.value)


@pytest.mark.parametrize(
    ("flag", "value"),
    [("max_steps", "10"), ("max_steps", 1.5), ("bf16", 1), ("lr", True), ("model", 3), ("betas", (0.9,))],
    ids=str,
)
def test_a_value_of_another_type_is_refused(flag: str, value: Any) -> None:
    """A stored configuration is JSON from a file, which nobody has checked."""
    with pytest.raises(ConfigError, match=f"--{flag} is "):
        TrainConfig(**{flag: value})


def test_the_command_line_says_it_in_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"^--lr is -1\.0, but must be above 0$"):
        parse(["--lr=-1"])


def test_an_unknown_flag_is_one_sentence_that_says_what_was_meant() -> None:
    said = r"^Unrecognized options: --chekpoint_dir=x; .*--checkpoint_dir.*--help$"
    with pytest.raises(ConfigError, match=said) as refused:
        parse(["--chekpoint_dir=x"])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("flag", "said"), [("--lr=much", "--lr"), ("--device=tpu", "--device"), ("stray", "stray")]
)
def test_what_cannot_be_parsed_is_one_sentence(flag: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        parse([flag])
    assert "\n" not in str(refused.value)
    assert not set("╭╮╰╯─│") & set(str(refused.value))


def test_other_ranks_say_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert capsys.readouterr() == ("", "")


def test_the_stored_form_is_json_and_comes_back() -> None:
    config = TrainConfig(betas=(0.8, 0.99), seq_len=64, lr=1e-3, max_steps=5, dropout=0.1)
    stored = json.loads(json.dumps(to_json(config)))
    assert from_json(stored, TrainConfig()) == config


OF_ONE_INVOCATION: dict[str, Any] = {
    "checkpoint_dir": "/else",
    "resume": "best",
    "new_run": True,
    "list_checkpoints": True,
    "storage_options": ("key=secret",),
    "on_event": "rm -rf /",
    "allow_data_change": True,
}


@pytest.mark.parametrize(("flag", "value"), OF_ONE_INVOCATION.items(), ids=str)
def test_what_belongs_to_an_invocation_is_neither_stored_nor_read(flag: str, value: Any) -> None:
    """A command out of a checkpoint would be code that its author chose; storage options hold credentials."""
    assert flag not in to_json(TrainConfig(**{flag: value}))
    assert getattr(from_json({flag: value}, TrainConfig()), flag) == getattr(TrainConfig(), flag)


def test_a_later_versions_configuration_can_be_read() -> None:
    assert from_json({"flag_of_the_future": 1, "lr": 1e-3}, TrainConfig()).lr == 1e-3


def test_a_stored_value_that_does_not_fit_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="the checkpoint's configuration cannot be used: --max_steps is 'x'"
    ):
        from_json({"max_steps": "x"}, TrainConfig())


STORED = to_json(TrainConfig(model="nano", seq_len=64, lr=1e-3, micro_batch=4, max_steps=10))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], {"model": "nano", "lr": 1e-3, "micro_batch": 4, "max_steps": 10, "dropout": 0.0}),
        (["--lr=2e-3"], {"lr": 2e-3, "micro_batch": 4}),
        (["--lr=6e-4"], {"lr": 6e-4}),
        (["--max_steps=20", "--dropout=0.1"], {"max_steps": 20, "dropout": 0.1, "seq_len": 64}),
        (["--resume=best", "--checkpoint_dir=/d"], {"resume": "best", "checkpoint_dir": "/d", "lr": 1e-3}),
        (["--seq_len=64", "--model=nano"], {"seq_len": 64}),
    ],
    ids=str,
)
def test_flag_beats_checkpoint_beats_default(argv: list[str], expected: dict[str, object]) -> None:
    """The third row gives the default's value explicitly: it still beats the checkpoint's."""
    config = resolve(argv, STORED, parse(argv))
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("flag", LOCKED)
def test_what_would_make_it_another_run_is_refused_with_both_values(flag: str) -> None:
    now: dict[str, Any] = {"model": "gpt2"}
    value = now.get(flag, 777)
    stored = from_json(STORED, TrainConfig())
    with pytest.raises(ConfigError, match=f"--{flag} {value} ") as refused:
        check_locked(dataclasses.replace(stored, **{flag: value}), stored)
    assert f"(checkpoint: {getattr(stored, flag)})" in str(refused.value)
    assert "--new_run" in str(refused.value)


def test_locked_flags_are_checked_on_the_way() -> None:
    with pytest.raises(ConfigError, match=r"--seed 5 \(checkpoint: 1337\)"):
        resolve(["--seed=5"], STORED, parse(["--seed=5"]))


@pytest.mark.parametrize(
    ("argv", "given"),
    [([], False), (["--checkpoint_dir=/d"], True), (["--checkpoint-dir", "./checkpoints"], True)],
    ids=str,
)
def test_whether_a_flag_was_given(argv: list[str], given: bool) -> None:
    assert is_given(argv, "checkpoint_dir") is given


def test_resume_and_new_run_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="give only one of them"):
        TrainConfig(resume="latest", new_run=True)


def test_the_floor_of_the_rate_is_a_tenth_unless_given() -> None:
    assert TrainConfig(lr=1e-3).final_lr == pytest.approx(1e-4)
    assert TrainConfig(lr=1e-3, min_lr=0.0).final_lr == 0.0


def test_defaults_that_depend_on_the_model() -> None:
    assert complete(TrainConfig(model="nano")).seq_len == 256
    assert complete(TrainConfig(model="nano", seq_len=32)).seq_len == 32
    with pytest.raises(ConfigError, match="--seq_len 257 is longer than the 256 tokens of --model nano"):
        complete(TrainConfig(model="nano", seq_len=257))
    with pytest.raises(ConfigError, match=r"'gpt5'.*gpt2-xl"):
        complete(TrainConfig(model="gpt5"))
