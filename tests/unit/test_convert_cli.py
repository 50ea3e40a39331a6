"""The subcommands export, import, merge and diff: what they print, their exit codes, their sentences."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.directory import marks
from engine.lease.lease import Lease
from engine.storage.local import LocalStorage
from tests.support.checkpoints_program import Program, program, shown_on_a_terminal
from tests.support.tiny_gpt2 import train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Program]:
    with program(capsys) as ready:
        yield ready


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    directory = tmp_path_factory.mktemp("run")
    return directory, [record.id for record in train(directory, steps=3)[1]]


@pytest.mark.parametrize("form", ["{}", "file://{}"])
@pytest.mark.parametrize("format", ["hf", "torch", "dcp"])
def test_export_and_import(
    run: Program, trained: tuple[Path, list[str]], tmp_path: Path, format: str, form: str
) -> None:
    directory, ids = trained
    out, new = form.format(tmp_path / "out"), form.format(tmp_path / "new")
    exported = run("export", form.format(directory / ids[0]), "--to", out, "--format", format)
    assert (exported.code, exported.err) == (0, "")
    assert exported.out == f"{directory / ids[0]} is exported to {out} ({format})\n"
    imported = run("import", out, "--to", new)
    assert (imported.code, imported.err) == (0, "")
    first, *notes = imported.out.splitlines()
    assert first.startswith(f"{out} is imported as {tmp_path / 'new'}/step-0000000")
    assert bool(notes) == (format == "hf")
    (listed,) = run("list", new, "--json").json["checkpoints"]
    assert listed["status"] == "committed"
    compared = run("diff", directory / ids[0], listed["path"], "--json")
    assert compared.json["same"] == (format != "hf")
    assert not [c for c in compared.json["changed"] if c["name"].startswith("model.")]


def test_export_selects(run: Program, trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    directory, _ = trained
    for name, flags in (("latest", []), ("two", ["--select", "step:2"])):
        run("export", directory, "--to", tmp_path / f"{name}.pt", "--format=torch", *flags)
    steps = [torch.load(tmp_path / f"{n}.pt", weights_only=True)["step"] for n in ("latest", "two")]
    assert steps == [3, 2]
    run("export", directory, "--to", tmp_path / "x", "--format=hf", "--select=step:9").refused("step:9")


def test_export_flags(run: Program, trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    flags = ["--format=torch", "--dtype=bf16", "--model-only"]
    assert run("export", trained[0], "--to", tmp_path / "a.pt", *flags).code == 0
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    assert "optimizer" not in found
    assert found["model"]["transformer.wte.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["export", "{run}", "--format", "hf"], ["--to"]),
        (["export", "{run}", "--to", "{tmp}/x"], ["--format"]),
        (["export", "{run}", "--to", "{tmp}/x", "--format", "onnx"], ["onnx"]),
        (["export", "{run}", "--to", "{tmp}/x", "--format", "hf", "--dtype", "int8"], ["int8"]),
        (["export", "{tmp}/nowhere", "--to", "{tmp}/x", "--format", "hf"], ["nowhere"]),
        (["export", "{run}", "--to", "{run}", "--format", "hf"], ["exists already"]),
        (["import", "{tmp}/nowhere", "--to", "{tmp}/x"], ["there is nothing at", "nowhere"]),
        (["import", "{run}/{one}", "--to", "{tmp}/x"], ["already a Holdfast checkpoint"]),
        (["merge", "{run}/{one}", "--to", "{tmp}/x"], ["two checkpoints"]),
        (["merge", "{run}/{one}", "{run}", "--to", "{tmp}/x"], ["is not one checkpoint", "Available: step"]),
        (["merge", "{run}/{one}", "{run}/{two}", "--to", "{tmp}/x", "--weights=1"], ["1 weights for 2"]),
        (["merge", "{run}/{one}", "{run}/{two}", "--to", "{tmp}/x", "--weights=a,b"], ["'a,b'", "1,1,2"]),
        (["diff", "{run}/{one}"], ["CKPT"]),
        (["diff", "{run}/{one}", "{tmp}/step-00000001-00000000"], ["not a committed checkpoint"]),
    ],
)
def test_bad_input_is_one_sentence(
    run: Program, trained: tuple[Path, list[str]], tmp_path: Path, argv: list[str], parts: list[str]
) -> None:
    directory, ids = trained
    before = sorted(os.listdir(directory))
    given = [a.format(run=directory, tmp=tmp_path, one=ids[0], two=ids[1]) for a in argv]
    run(*given).refused(*parts)
    assert os.listdir(tmp_path) == []
    assert sorted(os.listdir(directory)) == before


def test_a_target_in_use_is_refused(run: Program, trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    directory, ids = trained
    (tmp_path / "run").mkdir()
    with Lease.acquire(LocalStorage(tmp_path / "run"), run_id="training"):
        sources = [directory / id for id in ids]
        run("merge", *sources, "--to", tmp_path / "run").refused("is held by", "run training")


def test_a_checkpoint_on_hold_or_in_use_can_be_read(
    run: Program, trained: tuple[Path, list[str]], tmp_path: Path
) -> None:
    directory, ids = trained
    marks.hold(LocalStorage(directory), ids[0])
    with Lease.acquire(LocalStorage(directory), run_id="training"):
        done = run("export", directory / ids[0], "--to", tmp_path / "out", "--format", "hf")
    marks.release(LocalStorage(directory), ids[0])
    assert done.code == 0


def test_merge(run: Program, trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    directory, ids = trained
    done = run("merge", *(directory / id for id in ids), "--to", tmp_path / "soup", "--weights=1,1,2")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"3 checkpoints are merged into {tmp_path / 'soup'}/step-00000003-")
    shown = run("show", tmp_path / "soup", "--json").json
    assert shown["manifest"]["parents"] == ids
    assert shown["manifest"]["reasons"] == ["merge"]


def test_diff_as_text(run: Program, trained: tuple[Path, list[str]]) -> None:
    directory, ids = trained
    same = run("diff", directory / ids[0], directory / ids[0])
    assert (same.code, same.err) == (0, "")
    assert same.out.splitlines()[-1].startswith("0 added, 0 removed, 0 changed, ")
    other = run("diff", directory / ids[0], directory / ids[2])
    assert (other.code, other.err) == (1, "")
    lines = other.out.splitlines()
    assert lines[0].split() == ["TENSOR", "LARGEST", "DIFFERENCE", "ELEMENTS"]
    largest = [float(line.split()[-2]) for line in lines[1:-2]]
    assert largest == sorted(largest, reverse=True)
    assert lines[-2] == "other values differ: counter"


def test_diff_as_json(run: Program, trained: tuple[Path, list[str]]) -> None:
    directory, ids = trained
    found = run("diff", directory / ids[0], directory / ids[1], "--json")
    assert found.code == 1
    assert set(found.json) == {
        "before",
        "after",
        "same",
        "added",
        "removed",
        "changed",
        "equal",
        "equal_digests",
        "largest_difference",
        "values",
    }
    assert found.json["before"] == str(directory / ids[0])
    changed = {item["name"]: item for item in found.json["changed"]}
    weight = changed["model.transformer.wte.weight"]
    assert weight["before"] == weight["after"] == {"dtype": "F32", "shape": [257, 16]}
    assert 0 < weight["largest_difference"] <= found.json["largest_difference"]
    assert found.json["added"] == found.json["removed"] == []


def test_names_out_of_a_file_do_nothing_to_the_terminal(run: Program, tmp_path: Path) -> None:
    for number in (1, 2):
        torch.save({"model": {"w\x1b[2J": torch.full((2,), float(number))}}, tmp_path / f"{number}.pt")
        assert run("import", tmp_path / f"{number}.pt", "--to", tmp_path / f"run{number}").code == 0
    paths = [next((tmp_path / f"run{n}").glob("step-*")) for n in (1, 2)]
    assert "\x1b" not in run("diff", *paths).out


def as_process(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    ("command", "signum", "status"),
    [
        ("export", signal.SIGINT, 130),
        ("export", signal.SIGTERM, 143),
        ("import", signal.SIGTERM, 143),
        ("merge", signal.SIGINT, 130),
    ],
)
def test_a_signal_leaves_nothing_behind(
    run: Program, trained: tuple[Path, list[str]], tmp_path: Path, command: str, signum: int, status: int
) -> None:
    """The real program, hit in the middle: its first progress sends it the signal."""
    directory, ids = trained
    target = tmp_path / "out"
    argv = {
        "export": ["export", directory, "--to", target, "--format=torch"],
        "import": ["import", tmp_path / "in.pt", "--to", target],
        "merge": ["merge", directory / ids[0], directory / ids[1], "--to", target],
    }[command]
    if command == "import":
        run("export", directory, "--to", tmp_path / "in.pt", "--format=torch")
    code = (
        "import os, sys\n"
        "from engine.checkpoints import terminal\n"
        "from engine.entry import enter\n"
        f"hit = terminal.Meter(lambda n: None, lambda n: os.kill(os.getpid(), {int(signum)}))\n"
        "import contextlib\n"
        "@contextlib.contextmanager\n"
        "def meter(title):\n    yield hit\n"
        "terminal.meter = meter\n"
        f"sys.argv[1:] = {[str(a) for a in argv]!r}\n"
        "enter('engine.checkpoints.dispatch')\n"
    )
    with as_process(code) as child:
        out, err = child.communicate(timeout=120)
        assert child.returncode == status, err
    assert (out, err) == ("", "interrupted\n" if signum == signal.SIGINT else "")
    left = [os.path.join(d, f) for d, _, files in os.walk(target) for f in files]
    assert [name for name in left if "lease-" not in name] == []
    assert {name for name in os.listdir(tmp_path) if name != "in.pt"} <= {"out"}
    if command == "export":
        assert not target.exists()
    else:
        assert run("list", target, "--json").json == {"checkpoints": []}


def test_progress_is_shown_on_a_terminal(trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    shown = shown_on_a_terminal("export", trained[0], "--to", tmp_path / "out", "--format", "torch")
    assert b"export" in shown
    assert b"kB" in shown
