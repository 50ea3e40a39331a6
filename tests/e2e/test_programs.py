"""The programs around training: list, show, verify, the dry run, events for people, what the console says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import REFERENCE_STEPS
from tests.e2e.harness import Run, program

LISTED_KEYS = {"step", "epoch", "val_loss", "bytes", "world_size", "created", "roles", "status", "path"}


def test_list_for_people_and_for_programs(undisturbed_2: Run) -> None:
    listed = undisturbed_2.listing()
    assert all(c.keys() >= LISTED_KEYS for c in listed)
    assert [c["step"] for c in listed] == [3, 6, 9, 12]
    for checkpoint in listed:
        on_disk = sum(f.stat().st_size for f in Path(checkpoint["path"]).iterdir())
        assert checkpoint["bytes"] == pytest.approx(on_disk, rel=0.1)
        assert checkpoint["world_size"] == 2
    text = program("engine.checkpoints", "list", undisturbed_2.checkpoints).ok().stdout
    for word in ("latest", "backup", "rolling", "committed"):
        assert word in text


def test_the_trainer_lists_too(undisturbed_2: Run) -> None:
    said = (
        program("engine.train", "--list_checkpoints", f"--checkpoint_dir={undisturbed_2.checkpoints}")
        .ok()
        .stdout
    )
    assert "latest" in said
    assert "backup" in said


def test_show_prints_one_manifest(undisturbed_2: Run) -> None:
    path = undisturbed_2.with_role("latest")["path"]
    text = program("engine.checkpoints", "show", path).ok().stdout
    for part in ("global_batch", "shard-00000.safetensors", "shard-00001.safetensors", str(REFERENCE_STEPS)):
        assert part in text


def test_verify_names_the_damaged_file(undisturbed_1: Run, tmp_path: Path) -> None:
    run = undisturbed_1.copy_to(tmp_path / "damaged")
    program("engine.checkpoints", "verify", run.checkpoints).ok()
    (index,) = Path(run.with_role("latest")["path"]).glob("shard-00000.json")
    index.write_bytes(index.read_bytes().replace(b"0", b"1", 1))
    for quick in ([], ["--quick"]):
        ran = program("engine.checkpoints", "verify", *quick, run.checkpoints, "--json")
        assert ran.status == 1
        assert "shard-00000.json" in ran.stdout
        json.loads(ran.stdout)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_dry_run_says_what_each_rank_would_read(undisturbed_2: Run, ranks: int) -> None:
    args = (f"--checkpoint_dir={undisturbed_2.checkpoints}", "--dry_run", f"--reshard={ranks}")
    text = program("engine.resume", *args).ok().stdout
    assert "shard-00000.safetensors" in text
    assert "bytes" in text.lower() or "MB" in text or "KiB" in text or "MiB" in text
    for rank in range(ranks):
        assert f"rank {rank}" in text


def test_resume_needs_no_flag_but_the_directory(undisturbed_2: Run, tmp_path: Path) -> None:
    """The finished run has nothing left to do: it ends well and changes nothing."""
    run = undisturbed_2.copy_to(tmp_path / "again")
    before = [c["path"] for c in run.listing()]
    program("engine.resume", f"--checkpoint_dir={run.checkpoints}", f"--log_dir={run.logs}").ok()
    assert run.restored_step() == REFERENCE_STEPS
    assert [c["path"] for c in run.listing()] == before


def test_every_event_reaches_a_command(new_run: Callable[[str], Run], tmp_path: Path) -> None:
    """The pattern of the guide's mail and webhook: the event as JSON on standard input."""
    run = new_run("events")
    inbox = tmp_path / "inbox"
    run.train(
        None,
        max_steps=4,
        checkpoint_freq=2,
        eval_freq=2,
        eval_batches=1,
        on_event=f"cat >> {inbox}; echo >> {inbox}",
    )
    got = [json.loads(line) for line in inbox.read_text().splitlines() if line.strip()]
    kinds = [e["event"] for e in got]
    assert kinds.count("save_committed") == 2
    assert "eval" in kinds
    committed = [e for e in got if e["event"] == "save_committed"]
    assert [e["step"] for e in committed] == [2, 4]


def test_a_failing_command_does_not_stop_training(new_run: Callable[[str], Run]) -> None:
    run = new_run("events")
    run.train(None, max_steps=3, checkpoint_freq=1, on_event="exit 3")
    assert run.committed() == [1, 2, 3]


def test_what_metrics_say_about_a_save(undisturbed_2: Run) -> None:
    by_step: dict[int, dict[str, dict[str, object]]] = {}
    for event in undisturbed_2.events():
        by_step.setdefault(event.get("step", 0), {})[event["event"]] = event
    for step in (3, 6, 9, 12):
        kinds = by_step[step]
        assert {"step", "save_started", "save_snapshotted", "save_committed"} <= kinds.keys()
        assert kinds["save_committed"]["bytes"]
        assert kinds["save_committed"]["secs"]
        assert "blocked_secs" in {**kinds["save_snapshotted"], **kinds["save_committed"]}
    for step in range(1, REFERENCE_STEPS + 1):
        assert by_step[step]["step"].keys() >= {"loss", "tokens", "step_secs"}
        assert by_step[step]["step"]["tokens"] == step * 12 * 32


def test_the_console_has_a_line_for_every_checkpoint(undisturbed_2: Run) -> None:
    said = (undisturbed_2.folder / "output.log").read_text()
    for path in Path(undisturbed_2.checkpoints).glob("step-*"):
        assert path.name in said or f"step {int(path.name.split('-')[1])}" in said


def list_then(run: Run, after: str, *, before: str = "") -> subprocess.CompletedProcess[str]:
    """List the run's checkpoints in a fresh interpreter, between two pieces of code."""
    code = (
        f"import runpy, sys\n{before}\n"
        f"sys.argv = ['checkpoints', 'list', {run.checkpoints!r}]\n"
        "try:\n    runpy.run_module('engine.checkpoints', run_name='__main__')\n"
        f"except SystemExit as end:\n    assert not end.code, end.code\n{after}\n"
    )
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)


def test_listing_loads_no_torch_and_is_quick(undisturbed_1: Run) -> None:
    """Fewer modules are the cause, time the effect: modules do not depend on how busy the machine is."""
    list_then(undisturbed_1, "assert 'torch' not in sys.modules and 'numpy' not in sys.modules")


@pytest.mark.slow
def test_listing_twenty_does_little_more_than_the_interpreter(new_run: Callable[[str], Run]) -> None:
    """What takes the time, counted, since a count is the same on every machine. Seconds: bench/listing.py.

    Python 3.11 makes 101,000 calls and has 176 modules; the bounds are a fifth and a quarter above.
    """
    run = new_run("twenty")
    run.train(None, max_steps=20, checkpoint_freq=1, keep_checkpoints=100)
    assert len(run.listing()) == 20
    counting = (
        "calls = 0\n"
        "def count(frame, event, argument):\n    global calls\n    calls += event == 'call'\n"
        "sys.setprofile(count)"
    )
    printing = "sys.setprofile(None)\nprint([calls, len(sys.modules)], file=sys.stderr)"
    done = list_then(run, printing, before=counting)
    assert done.stdout.count("committed") == 20
    calls, modules = json.loads(done.stderr)
    assert calls <= 120_000
    assert modules <= 220
