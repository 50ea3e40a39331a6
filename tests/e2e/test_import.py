"""`import engine` brings neither our model nor our data, and gets along with a folder that has its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.e2e.harness import environment
from tests.support.tiny_gpt2 import train

LOOP = """
import sys
import torch
from engine import Checkpointer, Retention

assert "data" not in sys.modules and "model" not in sys.modules
import data, model
assert data.MINE and model.MINE

net = torch.nn.Linear(3, 2)
with Checkpointer("checkpoints", {"model": net}, retention=Retention(rolling=2)) as ckpt:
    assert ckpt.restore("latest") is None
    assert ckpt.save(1).result(timeout=60).step == 1
    before = net.weight.detach().clone()
    with torch.no_grad():
        net.weight.zero_()
    assert ckpt.restore("latest").step == 1
    assert torch.equal(net.weight, before)
print("fine")
"""


def test_a_folder_with_its_own_data_and_model(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("MINE = True\n")
    (tmp_path / "model.py").write_text("MINE = True\n")
    (tmp_path / "loop.py").write_text(LOOP)
    ran = subprocess.run(
        [sys.executable, "loop.py"],
        cwd=tmp_path,
        env={**os.environ, **environment()},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "fine\n"


COMMANDS = """
import os, runpy, sys

def run(*argv, program="engine.checkpoints"):
    sys.argv = [program, *argv]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("model", "data")]:
        del sys.modules[name]  # each command as in a process of its own
    try:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert end.code in (0, None) or (argv[0], end.code) == ("diff", 1), (argv, end.code)

saved = "saved/" + next(name for name in os.listdir("saved") if name.startswith("step-"))
run("export", saved, "--to", "hf", "--format", "hf")  # with a tokenizer: model and data are both needed
run("import", "hf", "--to", "again")
again = "again/" + next(name for name in os.listdir("again") if name.startswith("step-"))
run("diff", saved, again)
run("merge", saved, again, "--to", "merged")
for argv in (("list",), ("show",), ("verify",), ("prune", "--dry_run"), ("selftest",)):
    run(argv[0], "again", *argv[1:])
run("hold", again)
run("release", again)
run("copy", again, "copied")
run("--checkpoint_dir", "saved", "--dry_run", program="engine.resume")
run("--from", again, "--max_new_tokens", "2", "--device", "cpu", program="engine.generate")
print("fine")
"""


def test_the_commands_need_no_module_of_a_users(tmp_path: Path) -> None:
    """`python -m` and `python -c` put the working directory first on the import path."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("raise SystemExit('the wrong data')\n")
    (tmp_path / "model.py").write_text("raise SystemExit('the wrong model')\n")
    train(tmp_path / "saved", steps=1)
    ran = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        cwd=tmp_path,
        env={**os.environ, **environment()},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "fine"
