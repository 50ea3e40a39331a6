"""The command line, provenance, and a report that is written, read back and drawn."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.cases.save.bars import Facts
from bench.cases.save.program import parse
from bench.cases.save.records import Growth, IdleSave, Measurements, Memory, TrainingWindow
from bench.cases.save.report import SaveReport, bars, read
from bench.harness.floors import Floor
from bench.harness.provenance import collect, file_system, git_state
from bench.harness.records import Failure

ROOT = Path(__file__).resolve().parents[2]

MOUNTS = [
    "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard",
    "30 22 0:26 / /dev/shm rw shared:3 - tmpfs tmpfs rw",
    "31 22 0:27 / /mnt/two\\040words rw - xfs /dev/vdb rw",
    "32 22 0:28 / /mnt rw - nfs4 server:/export rw,vers=4.2",
    "broken",
]


@pytest.mark.parametrize(
    ("path", "kind", "device"),
    [
        ("/home/x", "ext4", "/dev/vda"),
        ("/dev/shm/run", "tmpfs", "tmpfs"),
        ("/dev/shmother", "ext4", "/dev/vda"),
        ("/mnt/two words/run", "xfs", "/dev/vdb"),
        ("/mnt/one", "nfs4", "server:/export"),
    ],
)
def test_the_file_system_of_a_path(path: str, kind: str, device: str) -> None:
    found = file_system(Path(path), MOUNTS)
    assert (found["type"], found["device"]) == (kind, device)
    assert file_system(Path(path), [])["type"] == "unknown"


def test_provenance_says_what_a_result_was_made_with(tmp_path: Path) -> None:
    found = collect(tmp_path)
    assert found["file_system"]["type"] != "unknown"
    assert found["versions"]["torch"]
    assert found["machine"]["cores"] >= 1
    assert str(tmp_path) not in json.dumps(found)


def test_a_changed_tree_is_told(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    assert git_state(tmp_path / "nothing") == {"revision": None, "dirty": None}
    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    clean = git_state(tmp_path)
    assert len(clean["revision"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "file").write_text("two")
    assert git_state(tmp_path) == {"revision": clean["revision"], "dirty": True}


def report() -> SaveReport:
    windows = [TrainingWindow("none", 0, 4.0, (1.0,) * 4, process_cpu_secs=8.0)]
    for row, lost in (
        ("raw write", 0.1),
        ("torch.save", 1.5),
        ("torch.save + fsync", 2.0),
        ("dcp.async_save", 3.0),
        ("holdfast", 0.2),
    ):
        steps = (1.0 + lost / 4,) * 4
        windows.append(
            TrainingWindow(row, 0, 4.0 + lost, steps, 0.1, 0.0, None, 1.1, 0.3, 9.0, (7,), {"copy": 0.1})
        )
    measured = Measurements(
        windows,
        [IdleSave("holdfast", 0, 0.1, 0.5, 0.1)],
        [Floor("copy", 0, 0.1, 7, "huge pages"), Floor("write", 0, 0.5, 7, "O_DIRECT")],
        [Memory("holdfast", 7, 7, 7)],
        [Growth("holdfast", 3, 2, 100, 0, (9,))],
        [Failure("torchsnapshot", "opening it", "ImportError")],
    )
    provenance = collect(ROOT)
    state = {
        "name": "gpt2", "ranks": 1, "device": "cpu", "cuda": False, "parameters": 124e6, "tensors": 444,
        "total_bytes": 1.49e9, "rank_bytes": 1.49e9, "rows_per_rank": 1, "seq_len": 64,
    }  # fmt: skip
    facts = {
        "torch.save": Facts(False, True),
        "torch.save + fsync": Facts(True, True),
        "dcp.async_save": Facts(True, True),
        "holdfast": Facts(True, True),
    }
    return SaveReport(provenance, {"repeats": 1}, state, facts, measured)


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    first = report()
    first.write(tmp_path / "deep" / "result.json")
    second = read(tmp_path / "deep" / "result.json")
    assert second == first
    assert second.text() == first.text()
    assert "124.0 M parameters in 444 tensors" in first.text()
    assert "training lost to that write alone 0.10 (0.10 - 0.10) s" in first.text()
    assert first.rows() == ["torch.save", "torch.save + fsync", "dcp.async_save", "holdfast"]


def test_another_version_of_the_document_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"version": 0}')
    with pytest.raises(ValueError, match="version 0"):
        read(tmp_path / "old.json")


def test_the_picture_orders_by_what_matters_and_marks_what_is_not_safe(tmp_path: Path) -> None:
    lost, stored = bars(report())
    assert [bar.name for bar in lost] == ["Holdfast", "torch.save", "torch.save + fsync", "dcp.async_save"]
    assert [bar.name for bar in stored if bar.style == "unsafe"] == ["torch.save"]
    pytest.importorskip("matplotlib")
    report().draw(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--state", "gpt3"], "neither one of"),
        (["--modes", "dcp"], "invalid choice: 'dcp'"),
        (["--nproc", "0"], "--nproc: 0 given"),
        (["--repeats", "0"], "--repeats: 0 given"),
        (["--nproc", "3", "--dp_replicate", "2"], "does not divide"),
        (["--growth_saves", "1"], "shows no growth"),
    ],
)
def test_a_flag_that_cannot_work_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_defaults_are_the_run_that_is_committed() -> None:
    options = parse([])
    assert (options.state, options.nproc, options.repeats, options.growth_saves) == ("gpt2", 1, 3, 100)
    assert "holdfast" in options.modes
    assert "dcp.async_save" in options.modes


@pytest.mark.parametrize("how", [["bench/save_latency.py"], ["-m", "bench.save_latency"]])
def test_the_program_starts_by_path_and_by_name(how: list[str], tmp_path: Path) -> None:
    report().write(tmp_path / "result.json")
    command = [sys.executable, *how, "--load", str(tmp_path / "result.json")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert "| holdfast " in ran.stdout
