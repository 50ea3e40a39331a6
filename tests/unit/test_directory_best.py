"""Which checkpoint is best, by whatever metric: kept, stored, selected, and said where there is none."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine import Checkpointer, Retention
from engine.checkpoints.dispatch import main
from engine.directory import clean_up, marks
from engine.directory.listing import committed, list_checkpoints, read_manifest
from engine.directory.reaper import Reaped
from engine.directory.record import CheckpointRecord
from engine.directory.retention import Decision, best_first, decide_retention, no_best_warning, roles
from engine.directory.retention import Retention as Policy
from engine.directory.selectors import choose, parse_selector
from engine.errors import ConfigError, DamagedError, SelectorError
from engine.format.best import DEFAULT, BestRule
from engine.format.digest import bytes_digest
from engine.format.json import canonical_bytes
from engine.format.manifest import Manifest
from engine.lease.lease import Lease
from engine.restore.choice import choose_checkpoint
from engine.run import trainer
from engine.run.config import TrainConfig
from engine.run.schedule import BestLoss
from engine.run.start import Restart, find_start
from engine.storage.base import Storage
from engine.storage.local import LocalStorage
from tests.support.records import record
from tests.support.tiny_checkpoint import rewrite_manifest, write_checkpoint

ACCURACY = BestRule("accuracy", "max")


def with_metrics(sequence: int, rule: BestRule = DEFAULT, **metrics: float) -> CheckpointRecord:
    return dataclasses.replace(record(sequence), metrics=metrics, best=rule)


SCORED = [
    with_metrics(1, accuracy=0.9, val_loss=3.0),
    with_metrics(2, accuracy=0.8, val_loss=1.0),
    with_metrics(3, accuracy=math.nan, val_loss=2.0),
    with_metrics(4, accuracy=math.inf),
    with_metrics(5, accuracy=0.9),
    with_metrics(6),
    with_metrics(7),
]


@pytest.mark.parametrize(
    ("rule", "order"),
    [
        (DEFAULT, [2, 3, 1]),
        (BestRule("val_loss", "max"), [1, 3, 2]),
        (ACCURACY, [1, 5, 2]),
        (BestRule("accuracy", "min"), [2, 1, 5]),
        (BestRule("bleu", "max"), []),
    ],
)
def test_the_best_first_of_equals_the_older(rule: BestRule, order: list[int]) -> None:
    assert [item.sequence for item in best_first(SCORED[::-1], rule)] == order


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (Policy(rolling=2), [2, 6, 7]),
        (Policy(rolling=2, metric="accuracy", mode="max"), [1, 6, 7]),
        (Policy(rolling=2, best=3, metric="accuracy", mode="max"), [1, 2, 5, 6, 7]),
        (Policy(rolling=2, best=0, metric="accuracy", mode="min"), [2, 6, 7]),
    ],
)
def test_retention_goes_by_its_metric(policy: Policy, kept: list[int]) -> None:
    decisions = decide_retention(SCORED, policy)
    assert [d.record.sequence for d in decisions if d.keep] == kept
    said = {d.record.sequence: d.why for d in decisions}
    if policy.rule == ACCURACY:
        assert said[1] == "best (accuracy 0.9)"
        assert said[3] == "older than the newest 2, without a finite accuracy"


def test_the_selector_goes_by_what_the_newest_says_unless_told() -> None:
    stored = [*SCORED[:-1], dataclasses.replace(SCORED[-1], best=ACCURACY)]
    assert choose(SCORED, parse_selector("best")).sequence == 2
    assert choose(stored, parse_selector("best")).sequence == 1
    assert choose(stored, parse_selector("best:val_loss:min")).sequence == 2
    assert choose(SCORED, parse_selector("best:accuracy:max")).sequence == 1
    assert roles(stored)[stored[0].id] == ("best", "rolling")
    with pytest.raises(SelectorError, match=r"finite bleu .*accuracy, val_loss; ask for best:accuracy:min"):
        choose(stored, parse_selector("best:bleu:max"))


@pytest.mark.parametrize(
    "text", ["best:", "best:accuracy", "best:accuracy:up", "best::max", "best:a\nb:max", "best:a\x1bb:max"]
)
def test_what_names_no_rule_is_no_selector(text: str) -> None:
    with pytest.raises(SelectorError, match="best:METRIC:max"):
        parse_selector(text)


def test_a_metric_may_have_any_name() -> None:
    assert parse_selector("best:eval/acc:top5:max").rule == BestRule("eval/acc:top5", "max")


@pytest.mark.parametrize("wrong", [{"metric": ""}, {"metric": 7}, {"mode": "highest"}, {"metric": "a\nb"}])
def test_a_rule_that_is_none_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="Retention"):
        Policy(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("records", "policy", "said"),
    [
        ([], Policy(best=3), None),
        ([record(1)], Policy(), None),
        ([record(1, loss=2.0)], Policy(best=3), None),
        ([with_metrics(1, loss=2.0)], Policy(), "lowest 'val_loss'.*available metrics: loss"),
        ([record(1)], Policy(best=3), "lowest 'val_loss'.*no metrics are stored"),
        ([record(1)], Policy(metric="accuracy"), "lowest 'accuracy'.*no metrics are stored"),
        ([record(1, loss=2.0)], Policy(metric="accuracy", mode="max"), "highest 'accuracy'.*s: val_loss"),
        ([with_metrics(1, accuracy=math.nan)], Policy(metric="accuracy"), "never finite: accuracy"),
        ([with_metrics(1, val_loss=math.nan)], Policy(), "never finite: val_loss"),
    ],
)
def test_what_was_asked_for_and_never_fed(
    records: list[CheckpointRecord], policy: Policy, said: str | None
) -> None:
    sentence = no_best_warning(records, policy)
    assert (sentence == "") is (said is None)
    assert said is None or re.search(said, sentence)


def test_the_default_writes_nothing_new_and_another_rule_is_format_version_2(tmp_path: Path) -> None:
    id = write_checkpoint(tmp_path, rows=2)
    plain = (tmp_path / id / "manifest.json").read_bytes()
    assert json.loads(plain)["format_version"] == 1
    assert "best" not in json.loads(plain)
    rewrite_manifest(tmp_path / id, best=ACCURACY)
    stored = json.loads((tmp_path / id / "manifest.json").read_bytes())
    assert stored["format_version"] == 2
    assert stored["best"] == {"metric": "accuracy", "mode": "max"}
    assert read_manifest(LocalStorage(tmp_path), id).best == ACCURACY
    rewrite_manifest(tmp_path / id, best=DEFAULT)
    assert (tmp_path / id / "manifest.json").read_bytes() == plain


@pytest.mark.parametrize(
    "best", [{}, {"metric": "a"}, {"metric": "a", "mode": "up"}, {"metric": 1, "mode": "min"}, [], None]
)
def test_a_rule_in_a_manifest_that_is_none_is_damage(best: object, tmp_path: Path) -> None:
    id = write_checkpoint(tmp_path, rows=2)
    document = json.loads((tmp_path / id / "manifest.json").read_bytes())
    del document["digest"]
    document |= {"best": best, "format_version": 2}
    raw = canonical_bytes({**document, "digest": bytes_digest(canonical_bytes(document))})
    with pytest.raises(DamagedError, match=r"best|metric|mode"):
        Manifest.from_bytes(raw, what="the manifest")


def accuracies(directory: Path, retention: Retention | None, *values: float) -> list[str]:
    """One save a value; the validation loss has another order."""
    ids = []
    with Checkpointer(directory, {"values": {"t": torch.zeros(8)}}, retention=retention) as ckpt:
        for step, value in enumerate(values, start=1):
            metrics = {"accuracy": value, "val_loss": abs(value - 0.72)}
            ids.append(ckpt.save(step, metrics=metrics).result(60.0).id)  # type: ignore[union-attr]
    return ids


def test_the_run_and_everything_outside_it_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    retention = Retention(rolling=2, best=2, metric="accuracy", mode="max")
    ids = accuracies(tmp_path, retention, 0.5, 0.9, 0.7, 0.1, 0.2, 0.3)
    there = [ids[n] for n in (1, 2, 4, 5)]
    assert [item.id for item in list_checkpoints(LocalStorage(tmp_path))] == there
    with Checkpointer(tmp_path, {"values": {"t": torch.zeros(8)}}, read_only=True) as ckpt:
        assert ckpt.restore("best").id == ids[1]  # type: ignore[union-attr]
        assert ckpt.restore("best:accuracy:min").id == ids[4]  # type: ignore[union-attr]
    config = TrainConfig(checkpoint_dir=str(tmp_path), resume="best")
    assert find_start(config, directory_given=True, restart=Restart()).name == ids[1]
    capsys.readouterr()
    assert main(["list", str(tmp_path), "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [entry["roles"].count("best") for entry in entries] == [1, 0, 0, 0]
    assert entries[0]["metrics"]["accuracy"] == 0.9
    assert main(["list", str(tmp_path)]) == 0
    assert "accuracy (max)" in capsys.readouterr().out
    assert main(["show", str(tmp_path), "--select", "best"]) == 0
    assert ids[1] in capsys.readouterr().out
    assert main(["prune", str(tmp_path), "--rolling", "0", "--dry_run"]) == 0
    assert f"kept          {ids[1]}" in capsys.readouterr().out
    other = ["--best_metric", "val_loss", "--best_mode", "min"]
    assert main(["prune", str(tmp_path), "--rolling", "0", *other]) == 0
    left = [item.id for item in list_checkpoints(LocalStorage(tmp_path))]
    assert left == [ids[2], *there[2:]]


def test_a_run_that_says_how_means_its_own_best(tmp_path: Path) -> None:
    """As `--best_metric` does for `--resume best`: what its retention would keep is what it restores."""
    ids = accuracies(tmp_path, Retention(), 0.5, 0.9, 0.7)
    own = Retention(metric="accuracy", mode="max")
    for retention, best in ((own, ids[1]), (Retention(), ids[2]), (None, ids[2])):
        state = {"values": {"t": torch.zeros(8)}}
        with Checkpointer(tmp_path, state, retention=retention) as ckpt:
            assert ckpt.restore("best").id == best  # type: ignore[union-attr]
            assert ckpt.restore("best:val_loss:min").id == ids[2]  # type: ignore[union-attr]


def test_pruning_by_a_metric_that_nothing_has_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accuracies(tmp_path, None, 0.5)
    assert main(["prune", str(tmp_path), "--best_metric", "f1", "--dry_run"]) == 0
    assert (
        "no checkpoint has a finite 'f1' (available metrics: accuracy, val_loss)" in capsys.readouterr().out
    )
    assert main(["prune", str(tmp_path), "--dry_run"]) == 0
    assert "note" not in capsys.readouterr().out


def test_a_metric_that_is_never_fed_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "engine")
    accuracies(tmp_path, Retention(rolling=2, best=3, metric="f1", mode="max"), 0.1, 0.2, 0.3, 0.4)
    (said,) = [message for message in caplog.messages if "kept as best" in message]
    assert "highest 'f1'" in said
    assert "accuracy, val_loss" in said


def test_it_is_said_before_the_first_one_is_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, deleted = LocalStorage(tmp_path), []
    for n in (1, 2, 3):
        write_checkpoint(storage, sequence=n, rows=2, metrics={"accuracy": 0.5})

    def reap(storage: Storage, decisions: list[Decision], *, lease: Lease) -> Reaped:
        deleted.append("kept as best" in caplog.text)
        return Reaped()

    monkeypatch.setattr(clean_up, "reap", reap)
    with Lease.acquire(storage, run_id="run") as lease:
        clean_up.delete_expired(storage, lease, Retention(rolling=2, metric="f1", mode="max"))
    assert deleted == [True]


def test_and_at_the_end_where_nothing_was_deleted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "engine")
    accuracies(tmp_path, Retention(best=3, metric="f1", mode="max"), 0.1)
    assert caplog.text.count("kept as best") == 1
    caplog.clear()
    accuracies(tmp_path / "fed", Retention(best=3, metric="accuracy", mode="max"), 0.1)
    assert "kept as best" not in caplog.text


def test_a_damaged_best_that_is_passed_over_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "engine")
    good, best, worse = (
        write_checkpoint(tmp_path, sequence=n, rows=2, metrics={"accuracy": value}, best=ACCURACY)
        for n, value in enumerate((0.5, 0.9, 0.1), start=1)
    )
    storage = LocalStorage(tmp_path)
    for id in (best, worse):
        marks.mark_damaged(storage, id, "block 3 has changed")
    choice = choose_checkpoint(storage, "best")
    assert choice is not None
    assert choice.record.id == good
    assert caplog.messages == [f"skipping {best}, which is damaged: block 3 has changed"]


def test_the_trainers_flags(tmp_path: Path) -> None:
    for n, (train, val) in enumerate([(1.0, 5.0), (2.0, 4.0)], start=1):
        write_checkpoint(tmp_path, sequence=n, rows=2, metrics={"train_loss": train, "val_loss": val})
    ids = [r.id for r in committed(list_checkpoints(LocalStorage(tmp_path)))]

    def best(**flags: str) -> tuple[str, float | None]:
        config = TrainConfig(checkpoint_dir=str(tmp_path), resume="best", **flags)  # type: ignore[arg-type]
        start = find_start(config, directory_given=True, restart=Restart())
        return start.name, start.best_value(config.best_rule)

    assert best() == (ids[1], 4.0)
    assert best(best_metric="train_loss") == (ids[0], 1.0)
    assert best(best_metric="val_loss", best_mode="max") == (ids[0], 5.0)
    with pytest.raises(ConfigError, match="--best_metric is 'accuracy', but must be val_loss or train_loss"):
        TrainConfig(best_metric="accuracy")
    with pytest.raises(ConfigError, match="--best_mode"):
        TrainConfig(best_mode="up")  # type: ignore[arg-type]


def test_what_improves_goes_by_the_rule() -> None:
    best = BestLoss(0.5, ACCURACY)
    assert [best.improves(value) for value in (0.4, 0.5, 0.6, math.nan, math.inf)] == [
        False,
        False,
        True,
        False,
        False,
    ]
    best.promise(1, 0.7)
    assert not best.improves(0.6)
    best.settle(1, committed=True)
    assert best.committed == 0.7


def test_the_trainer_asks_for_its_metric_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of its evaluations: the validation loss improves each time, the training loss does not."""
    losses = iter([(9.0, 1.0), (8.0, 2.0), (7.0, 0.5)])
    monkeypatch.setattr(trainer, "evaluate", lambda job, agreement: (loss[0], None))
    found = []
    loop: Any = object.__new__(trainer._Loop)
    loop.job = SimpleNamespace(
        world=SimpleNamespace(is_first=True), config=TrainConfig(best_metric="train_loss"), device="cpu"
    )
    loop.agreement = SimpleNamespace(vote=lambda verdict: SimpleNamespace(total=float(verdict)))
    best = BestLoss(rule=loop.job.config.best_rule)
    loop.recorder = SimpleNamespace(improves=best.improves, evaluated=lambda *_, **__: None)
    for step, loss in enumerate(losses):
        loop.step = step
        found.append(loop._evaluate({"train_loss": loss[1]})[1])
        best.promise(step, loss[1])
        best.settle(step, committed=True)
    assert found == [True, False, True]


def test_the_trainers_policy_has_its_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(trainer, "Checkpointer", lambda *_, **options: given.update(options))
    config = TrainConfig(best_metric="train_loss", best_mode="max", keep_checkpoints=3)
    job: Any = SimpleNamespace(state=dict, world=SimpleNamespace(is_first=False))
    trainer._open_checkpointer(config, job, SimpleNamespace(on_event=None), Restart())  # type: ignore[arg-type]
    assert given["retention"] == Retention(rolling=3, metric="train_loss", mode="max")
