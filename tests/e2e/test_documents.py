"""Runs the commands of the README and the guide as they stand there, in order, in a folder of their own."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import CONVERT, GUIDE, README, blocks, commands, spans
from tests.e2e.harness import ROOT, environment


def shell(script: str, cwd: Path, env: dict[str, str]) -> str:
    """Run a block with bash, stopping at the first failure; what it printed."""
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=cwd,
        env={**os.environ, **environment(env)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, f"{script}\nended with {ran.returncode}\n{ran.stdout}"
    return ran.stdout


@pytest.fixture
def workplace(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A folder with our documents, and an environment with `python`, `torchrun`, and stand-ins that note what
    they are given for `mail` and `curl`."""
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    tools = tmp_path / "bin"
    tools.mkdir()
    # A link to a virtual environment's interpreter would lose the environment.
    stand_ins = {"python": f'exec {sys.executable} "$@"'}
    for name in ("mail", "curl"):
        stand_ins[name] = f'{{ echo "$@"; cat; echo; }} >> {tmp_path}/{name}.log'
    for name, script in stand_ins.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]])
    return tmp_path, {"PATH": path, "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command_of_the_guide(
    workplace: tuple[Path, dict[str, str]], s3_environment: dict[str, str]
) -> None:
    folder, env = workplace
    ran = 0
    for block in blocks(GUIDE, "sh"):
        shell(block, folder, {**env, **s3_environment})
        ran += len(commands(block))
    # Those in the prose that look after a directory, which they call DIR.
    for span in spans(GUIDE):
        if span.startswith("python -m engine.checkpoints "):
            shell(span.replace(" DIR", " checkpoints"), folder, env)
            ran += 1
    assert ran >= 27
    assert '"save_committed"' in (folder / "mail.log").read_text()
    # Which kinds of event that short training sends is chance: hand the script one of each.
    for reason in ("best", "interval"):
        event = json.dumps({"reasons": [reason], "event": "save_committed", "step": 7})
        shell(f"echo {shlex.quote(event)} | sh notify.sh", folder, env)
    shell("""echo '{"event": "save_failed", "step": 8}' | sh notify.sh""", folder, env)
    mail = (folder / "mail.log").read_text()
    for subject in ("a new best model", "a checkpoint was saved", "a save failed"):
        assert subject in mail
    hook = (folder / "curl.log").read_text()
    assert "https://example.com/hook" in hook
    assert '"save_committed"' in hook


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command_of_the_page_on_conversion(workplace: tuple[Path, dict[str, str]]) -> None:
    folder, env = workplace
    first_run = next(block for block in blocks(GUIDE, "sh") if "data.prepare" in block)
    for block in (first_run, *blocks(CONVERT, "sh")):
        shell(block, folder, env)
    assert (folder / "exported" / "hf" / "config.json").exists()


def test_the_loop_of_the_readme(workplace: tuple[Path, dict[str, str]]) -> None:
    folder, env = workplace
    (snippet,) = blocks(README, "python")
    (folder / "loop.py").write_text(snippet)
    shell("python loop.py", folder, env)
    listed = shell("python -m engine.checkpoints list checkpoints --json", folder, env)
    # The best one is kept besides, and may be any of the six.
    assert {80, 100, 120} <= {c["step"] for c in json.loads(listed)["checkpoints"]}
    # Nothing is left to do, and the state is restored all the same.
    shell("python loop.py", folder, env)
    assert shell("python -m engine.checkpoints list checkpoints --json", folder, env) == listed


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_make_demo(tmp_path: Path) -> None:
    """With the environment that runs the tests in place of .venv; `-o` takes it as installed."""
    assert "make demo" in "".join(blocks(README, "sh"))
    command = [
        "make",
        "demo",
        "-o",
        f"{sys.prefix}/.installed-base",
        f"VENV={sys.prefix}",
        f"DEMO_DIR={tmp_path}/demo",
    ]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "killed here, resumed from this checkpoint" in ran.stdout
    assert "uninterrupted" in ran.stdout


def test_make_test_runs_the_quick_tests() -> None:
    command = ["make", "-n", "test", "-o", ".venv/.installed-test"]
    dry = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert '-m "not (service or slow or root or gpu)"' in dry.stdout
