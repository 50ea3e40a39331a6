"""A mirror through the real programs: behind the training, after a SIGKILL, and when the node is lost."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.e2e.harness import Run, program


def listed(where: str, env: dict[str, str], *more: str) -> list[dict[str, Any]]:
    ran = program("engine.checkpoints", "list", where, "--json", *more, env=env).ok()
    found: list[dict[str, Any]] = json.loads(ran.stdout)["checkpoints"]
    return found


def whole_steps(where: str, env: dict[str, str]) -> list[int]:
    program("engine.checkpoints", "verify", where, env=env).ok()
    return sorted(entry["step"] for entry in listed(where, env) if entry["status"] == "committed")


def test_a_lost_node_resumes_from_the_mirror_alone_bit_for_bit(
    tmp_path: Path, data: Path, undisturbed_2: Run, s3_environment: dict[str, str]
) -> None:
    mirror = "s3://my-bucket/mirrors/run-1"
    run = Run(tmp_path / "run", data, env=s3_environment)
    run.train(2, dropout=0.1, max_steps=5, checkpoint_freq=2, keep_checkpoints=2, mirror=mirror)
    assert whole_steps(mirror, run.env) == whole_steps(run.checkpoints, run.env) == [4, 5]
    copied = run.events("mirror_copied")
    assert {event["step"] for event in copied} >= {4, 5}
    assert f"-> {mirror}/step-" in (run.folder / "output.log").read_text()

    entries = listed(run.checkpoints, run.env, f"--mirror={mirror}")
    tiers = [(entry["step"], entry["local"], entry["mirror"]) for entry in entries]
    assert tiers == [(4, "committed", "committed"), (5, "committed", "committed")]

    shutil.rmtree(run.checkpoints)
    run.resume(f"--mirror={mirror}", max_steps=12)
    assert run.restored_step() == 5
    assert run.events("restored")[-1]["path"].startswith(mirror)
    assert run.losses() == undisturbed_2.losses()
    assert whole_steps(run.checkpoints, run.env)[-1] == 12
    assert whole_steps(mirror, run.env) == [10, 12]
    args = ("--list_checkpoints", f"--checkpoint_dir={run.checkpoints}", f"--mirror={mirror}")
    shown = program("engine.train", *args, env=run.env)
    assert "is up to date" in shown.ok().stdout


def test_killed_in_the_middle_of_a_copy_the_next_start_completes_it(
    new_run: Callable[[str], Run], tmp_path: Path
) -> None:
    """And a copy that was spoilt behind everybody's back is sent again."""
    run = new_run("run")
    mirror = tmp_path / "mirror"
    job = run.start(None, max_steps=400, checkpoint_freq=5, keep_checkpoints=20, mirror=mirror)
    job.wait_until(lambda: len(run.events("mirror_copied")) > 1, 100.0)
    job.kill()
    newest = max(event["step"] for event in run.events("mirror_copied"))
    (hurt,) = mirror.glob(f"step-{newest:08d}-*")
    os.truncate(hurt / "shard-00000.safetensors", 5000)
    last = max(run.committed())
    run.train(None, resume="latest", max_steps=last + 2, mirror=mirror, keep_checkpoints=20)
    assert run.restored_step() >= last
    steps = whole_steps(str(mirror), {})
    assert steps[-1] == last + 2
    entries = listed(run.checkpoints, {}, f"--mirror={mirror}")
    assert {entry["mirror"] for entry in entries if entry["local"]} == {"committed"}


def test_a_mirror_that_cannot_work_is_refused_before_training(
    new_run: Callable[[str], Run], tmp_path: Path
) -> None:
    run = new_run("run")
    mirror = tmp_path / "file"
    (tmp_path / "file").write_text("not a directory")
    status = run.start(None, max_steps=2, mirror=mirror).wait(100.0)
    said = (run.folder / "output.log").read_text()
    assert status == 2, said
    assert "Traceback" not in said
    assert run.events("step") == []
    assert str(mirror) in said
