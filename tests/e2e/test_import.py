"""`import engine` brings neither our model nor our data, and gets along with a folder that has its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.e2e.harness import environment

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
