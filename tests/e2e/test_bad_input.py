"""What a user may get wrong, or a disk: one clear sentence with the fix, status 2, nothing deleted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.format.digest import bytes_digest
from engine.format.json import canonical_bytes
from tests.e2e.harness import ROOT, TINY, Finished, Run, flags, program


@pytest.fixture
def trained(undisturbed_1: Run, tmp_path: Path) -> Run:
    """A private copy of a finished run with checkpoints of the steps 3, 6, 9 and 12."""
    return undisturbed_1.copy_to(tmp_path / "trained")


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith("lease-")
    }


def train(run: Run, **given: Any) -> Finished:
    values = {**TINY, "data": run.data, "checkpoint_dir": run.checkpoints, "log_dir": run.logs, **given}
    return program("engine.train", *flags(values))


def assert_refused(ran: Finished, *said: str) -> None:
    """Status 2, every expected part in the message, and a message of ours, not Python's."""
    assert ran.status == 2, ran.text
    for part in said:
        assert part in ran.stderr, ran.text
    assert "Traceback" not in ran.text
    assert len(ran.stderr.strip().splitlines()) <= 20, ran.stderr


def directory_of(run: Run, step: int) -> Path:
    (found,) = Path(run.checkpoints).glob(f"step-{step:08d}-*")
    return found


@pytest.mark.parametrize("selector", ["step:4", "epoch:7", "yesterday", "/no/such/place"])
def test_a_selector_that_nothing_answers_to_lists_what_there_is(trained: Run, selector: str) -> None:
    before = files_below(Path(trained.checkpoints))
    ran = train(trained, resume=selector, max_steps=13)
    assert_refused(ran, selector)
    if selector.startswith(("step:4", "epoch")):
        for step in (3, 6, 9, 12):
            assert str(step) in ran.stderr
    assert files_below(Path(trained.checkpoints)) == before


def test_backup_of_an_empty_directory_is_an_error_and_latest_is_a_fresh_start(
    new_run: Callable[[str], Run],
) -> None:
    run = new_run("empty")
    assert_refused(train(run, resume="backup", max_steps=1), "backup")
    ran = train(run, resume="latest", max_steps=1).ok()
    assert run.events("restored") == []
    assert "fresh" in ran.text or "step 0" in ran.text


def test_a_directory_that_cannot_be_written(trained: Run, tmp_path: Path) -> None:
    """A file in the way stands for every reason; root, who runs CI, may write anywhere else."""
    (tmp_path / "file").write_text("")
    blocked = Run(tmp_path / "run", trained.data, checkpoints=str(tmp_path / "file" / "checkpoints"))
    assert_refused(train(blocked, max_steps=1), str(tmp_path / "file"))


def test_missing_data(new_run: Callable[[str], Run], tmp_path: Path) -> None:
    run = new_run("no-data")
    assert_refused(
        train(run, data=tmp_path / "nowhere", max_steps=1), str(tmp_path / "nowhere"), "data.prepare"
    )


def test_other_data_is_refused_with_both_fingerprints(trained: Run, tmp_path: Path) -> None:
    other = tmp_path / "other"
    program("data.prepare", f"--source={ROOT / 'Makefile'}", f"--out={other}", "--tokenizer=bytes").ok()
    ran = train(trained, resume="latest", data=other, max_steps=13)
    assert_refused(ran, "fingerprint", "--allow_data_change")
    train(trained, resume="latest", data=other, max_steps=13, allow_data_change=True).ok()
    assert trained.events("step")[-1]["step"] == 13


def test_a_world_size_that_does_not_divide_shows_the_arithmetic(new_run: Callable[[str], Run]) -> None:
    """torchrun turns any worker's status into 1, so the message has to say it."""
    run = new_run("indivisible")
    job = run.start(2, global_batch=7, max_steps=1)
    assert job.wait(60.0) == 1
    said = job.output()
    assert "7" in said
    assert "2 ranks" in said
    assert said.count("--global_batch") == 1, "rank 0 alone speaks"
    assert 'File "/' not in said.split("torch/distributed")[0], "no traceback of ours"


def test_flags_that_would_make_it_another_run_are_all_named_at_once(trained: Run) -> None:
    before = files_below(Path(trained.checkpoints))
    other = {"model": "gpt2", "seq_len": 16, "global_batch": 24, "seed": 12}
    ran = train(trained, resume="latest", max_steps=13, **other)
    assert_refused(ran, *(f"--{flag} {value}" for flag, value in other.items()), "--new_run")
    assert files_below(Path(trained.checkpoints)) == before


def test_a_flag_that_does_not_exist() -> None:
    ran = program("engine.train", "--chekpoint_dir=x")
    assert ran.status == 2
    assert "--checkpoint_dir" in ran.text, "what was meant is proposed"
    assert "Traceback" not in ran.text


@pytest.mark.parametrize(
    "flag", ["--lr=-1", "--dropout=1.5", "--max_save_failures=-2", "--keep_checkpoints=0"]
)
def test_a_value_that_cannot_work(flag: str, new_run: Callable[[str], Run]) -> None:
    assert_refused(program("engine.train", flag), *flag.split("="))


def test_a_damaged_shard_is_walked_past_to_the_newest_whole_one(trained: Run) -> None:
    newest = directory_of(trained, 12)
    shard = newest / "shard-00000.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)

    ran = program("engine.checkpoints", "verify", trained.checkpoints)
    assert ran.status == 1
    assert shard.name in ran.text
    # Its size is right, so only the blocks tell.
    program("engine.checkpoints", "verify", "--quick", str(newest)).ok()

    resumed = train(trained, resume="latest", max_steps=13).ok()
    assert trained.restored_step() == 9
    assert newest.name in resumed.text
    assert shard.exists(), "a damaged checkpoint is evidence: it is not deleted"


def test_a_checkpoint_asked_for_by_name_is_not_replaced_by_another(trained: Run) -> None:
    shard = directory_of(trained, 6) / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    ran = train(trained, resume="step:6", max_steps=13)
    assert_refused(ran, "step-00000006")


def test_a_corrupt_manifest_is_damage_not_absence(trained: Run) -> None:
    manifest = directory_of(trained, 12) / "manifest.json"
    raw = manifest.read_bytes()
    flipped = bytearray(raw)
    flipped[len(raw) // 2] ^= 1
    for harm in (raw[:-9], b"{]", b"", bytes(flipped)):
        manifest.write_bytes(harm)
        status = {Path(c["path"]).name: c["status"] for c in trained.listing()}
        assert status[manifest.parent.name] == "damaged", harm[-40:]
    train(trained, resume="latest", max_steps=10).ok()
    assert trained.restored_step() == 9
    assert manifest.exists()


def test_only_damaged_ones_left_is_an_error_not_a_fresh_start(trained: Run) -> None:
    for manifest in Path(trained.checkpoints).glob("*/manifest.json"):
        manifest.write_bytes(b"{}")
    before = files_below(Path(trained.checkpoints))
    assert_refused(train(trained, resume="latest", max_steps=13), "damaged")
    assert files_below(Path(trained.checkpoints)) == before


def test_a_newer_format_says_so(trained: Run) -> None:
    path = directory_of(trained, 12) / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["format_version"] = 99
    del manifest["digest"]
    manifest["digest"] = bytes_digest(canonical_bytes(manifest))
    path.write_bytes(canonical_bytes(manifest))
    ran = train(trained, resume="step:12", max_steps=13)
    assert_refused(ran, "newer")
    shown = program("engine.checkpoints", "show", str(path.parent))
    assert_refused(shown, "newer")


def test_list_show_and_verify_of_nothing(tmp_path: Path) -> None:
    for command in ("list", "show", "verify"):
        assert_refused(
            program("engine.checkpoints", command, str(tmp_path / "nowhere")), str(tmp_path / "nowhere")
        )


def test_resume_without_a_checkpoint(tmp_path: Path) -> None:
    assert_refused(program("engine.resume", f"--checkpoint_dir={tmp_path / 'nowhere'}"), "nowhere")
