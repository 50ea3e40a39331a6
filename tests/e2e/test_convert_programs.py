"""Through the real programs: a run goes on from what was exported and imported as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import BUCKET
from tests.e2e.harness import Run, program


@pytest.mark.parametrize("format", ["torch", pytest.param("dcp", marks=pytest.mark.slow)])
def test_a_round_trip_does_not_change_the_run(undisturbed_1: Run, tmp_path: Path, format: str) -> None:
    """With dropout: the same losses need weights, moments, data position and random streams, bit for bit."""
    out, new = str(tmp_path / "out"), tmp_path / "new"
    source = undisturbed_1.checkpoints
    program("engine.checkpoints", "export", source, "--select=step:6", "--to", out, "--format", format).ok()
    program("engine.checkpoints", "import", out, "--to", str(new)).ok()
    run = Run(tmp_path / "run", undisturbed_1.data, checkpoints=str(new))
    run.folder.mkdir()
    run.resume(max_steps=9)
    assert run.restored_step() == 6
    losses = undisturbed_1.losses()
    assert run.losses() == {step: losses[step] for step in (7, 8, 9)}


def test_hugging_faces_form_starts_a_run(undisturbed_1: Run, tmp_path: Path) -> None:
    """The first loss of a new run on the same data is that of the model which was exported."""
    out, new = str(tmp_path / "out"), str(tmp_path / "new")
    program("engine.checkpoints", "export", undisturbed_1.checkpoints, "--to", out, "--format=hf").ok()
    said = program("engine.checkpoints", "import", out, "--to", new).ok().stdout
    imported = said.splitlines()[0].rpartition(" as ")[2]
    flags = {"max_steps": 1, "dropout": 0.0}
    direct = Run(tmp_path / "a", undisturbed_1.data)
    direct.folder.mkdir()
    direct.train(None, init_from=undisturbed_1.with_role("latest")["path"], **flags)
    around = Run(tmp_path / "b", undisturbed_1.data)
    around.folder.mkdir()
    around.train(None, init_from=imported, **flags)
    assert around.losses() == direct.losses()
    fresh = Run(tmp_path / "c", undisturbed_1.data)
    fresh.folder.mkdir()
    assert fresh.train(None, **flags).losses() != direct.losses()


def test_a_trained_model_speaks(undisturbed_1: Run) -> None:
    args = ("--from=latest", f"--checkpoint_dir={undisturbed_1.checkpoints}", "--prompt=import ")
    ran = program("engine.generate", *args, "--max_new_tokens=12", "--device=cpu").ok()
    assert ran.stdout.startswith("import ")
    assert "step 12" in ran.stderr


@pytest.mark.slow
def test_to_and_from_a_store(undisturbed_1: Run, tmp_path: Path, s3_environment: dict[str, str]) -> None:
    """Every address is a URI but the first: exported there, imported from there, back there, compared."""
    bucket, env = f"s3://{BUCKET}/convert-{tmp_path.name}", s3_environment
    source = undisturbed_1.with_role("latest")["path"]
    out, new = f"{bucket}/out", f"{bucket}/new"
    program("engine.checkpoints", "export", source, "--to", out, "--format=dcp", env=env).ok()
    again = program("engine.checkpoints", "export", source, "--to", out, "--format=dcp", env=env)
    assert again.status == 2
    assert "exists already" in again.stderr
    said = program("engine.checkpoints", "import", out, "--to", new, env=env).ok().stdout
    imported = said.splitlines()[0].rpartition(" as ")[2]
    assert "0 changed" in program("engine.checkpoints", "diff", source, imported, env=env).ok().stdout
    program("engine.checkpoints", "verify", imported, env=env).ok()
    ran = program("engine.generate", "--from", imported, "--max_new_tokens=3", "--device=cpu", env=env).ok()
    assert imported in ran.stderr
