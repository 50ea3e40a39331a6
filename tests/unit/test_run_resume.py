"""engine.resume: whose flag is whose, what is refused at once, and what torchrun is told."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.errors import ConfigError
from engine.resume import launcher as resume
from engine.resume.launcher import FORWARDED, LAUNCHER_FLAGS, Request, launch_arguments, read_flags
from engine.run.config import TrainConfig, to_json
from engine.run.preemption import SIGNALS
from engine.run.start import Start
from tests.documents import GUIDE
from tests.support.tiny_checkpoint import write_checkpoint

CONFIG = to_json(TrainConfig(model="nano", seq_len=64, global_batch=12, max_steps=50))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Saved by 2 ranks at steps 10 and 20."""
    for sequence in (1, 2):
        write_checkpoint(tmp_path, sequence=sequence, world_size=2, config=CONFIG)
    return tmp_path


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Nothing is launched; what would have been is here."""
    calls: list[list[str]] = []

    def launch(request: Request, start: Start, ranks: int) -> int:
        calls.append(launch_arguments(request, start, ranks))
        return 0

    monkeypatch.setattr(resume, "launch", launch)
    return calls


def test_each_flag_goes_where_it_belongs() -> None:
    request = read_flags(
        [
            "--reshard",
            "4",
            "--from",
            "best",
            "--nnodes=2",
            "--rdzv-endpoint",
            "h:1",
            "--lr",
            "1e-3",
            "--max-steps=9",
            "--dry-run",
        ]
    )
    assert request == Request(
        ranks=4,
        selector="best",
        dry_run=True,
        nodes=2,
        launcher=("--nnodes=2", "--rdzv_endpoint=h:1"),
        train=("--lr", "1e-3", "--max_steps=9"),
    )


def test_without_flags() -> None:
    assert read_flags([]) == Request(None, "latest", False, 1, (), ())


def test_every_launcher_flag_is_torchruns() -> None:
    torchrun = pytest.importorskip("torch.distributed.run")
    known = {option.replace("-", "_") for option in torchrun.get_args_parser()._option_string_actions}
    assert {f"__{flag}" for flag in LAUNCHER_FLAGS} <= known


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--reshard=0"], "--reshard is 0"),
        (["--reshard=x"], "--reshard"),
        (["--nnodes=many"], "--nnodes is many"),
        (["--nnodes=0"], "--nnodes is 0"),
        (["--resume=best"], "--from"),
        (["--nproc-per-node", "2"], "--reshard"),
    ],
    ids=str,
)
def test_flags_that_cannot_work(argv: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_flags(argv)


def test_the_saved_world_size_is_the_default(saved: Path, launched: list[list[str]]) -> None:
    assert resume.main([f"--checkpoint_dir={saved}"]) == 0
    assert launched == [
        [
            f"--signals_to_handle={FORWARDED}",
            "--nproc_per_node=2",
            "-m",
            "engine.train",
            f"--checkpoint_dir={saved}",
            f"--checkpoint_dir={saved}",
            "--resume=latest",
        ]
    ]


def test_ranks_spread_over_nodes(saved: Path, launched: list[list[str]]) -> None:
    argv = [f"--checkpoint_dir={saved}", "--reshard=6", "--nnodes=2", "--rdzv_id=7", "--from=step:10"]
    assert resume.main(argv) == 0
    ((signals, first, second, third, *train),) = launched
    assert signals == f"--signals_to_handle={FORWARDED}"
    assert (first, second, third) == ("--nnodes=2", "--rdzv_id=7", "--nproc_per_node=3")
    assert train[-1] == "--resume=step:10"


def test_a_path_is_carried_on_where_it_lies(saved: Path, launched: list[list[str]]) -> None:
    (path,) = saved.glob("step-00000010-*")
    assert resume.main([f"--from={path}"]) == 0
    assert launched[0][-2:] == [f"--checkpoint_dir={saved}", f"--resume={path}"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--reshard=5"], "12 = 5 x 2 + 2"),
        (["--reshard=4", "--nnodes=3"], "4 = 3 x 1 + 1"),
        (["--dp_replicate=2", "--reshard=3"], "3 = 2 x 1 + 1"),
        (["--from=step:4"], "step:20"),
        (["--seed=5"], "--seed 5 (checkpoint: 1337)"),
        (["--lr=0"], "--lr is 0.0"),
    ],
    ids=str,
)
def test_what_the_workers_would_refuse_is_refused_at_once(
    saved: Path, launched: list[list[str]], capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    assert resume.main([f"--checkpoint_dir={saved}", *argv]) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1, "one sentence"
    assert launched == []


def test_nothing_to_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], launched: list[list[str]]
) -> None:
    assert resume.main([f"--checkpoint_dir={tmp_path / 'nowhere'}"]) == 2
    assert "nowhere holds no checkpoint" in capsys.readouterr().err
    assert launched == []


def test_a_dry_run_launches_nothing(
    saved: Path, launched: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert resume.main([f"--checkpoint_dir={saved}", "--dry_run", "--reshard=3"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(" reads ")[0] for line in shown[1:]] == ["rank 0", "rank 1", "rank 2"]
    assert "shard-00000.safetensors" in shown[1]
    assert "shard-00001.safetensors" in shown[3]
    assert launched == []


def test_bad_input_is_answered_without_torch(saved: Path) -> None:
    code = (
        "import sys\nfrom engine.resume.launcher import main\n"
        f"assert main(['--checkpoint_dir={saved}', '--reshard=5']) == 2\n"
        f"assert main(['--checkpoint_dir={saved}', '--reshard=3', '--dry_run']) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(("codes", "status"), [([2], 2), ([-15, 2], 2), ([1], 1), ([-9, 1], 1)], ids=str)
def test_the_status_of_failed_workers(codes: list[int], status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run = pytest.importorskip("torch.distributed.run")
    errors = pytest.importorskip("torch.distributed.elastic.multiprocessing.errors")

    def fail(argv: list[str]) -> None:
        failures: dict[int, Any] = {rank: SimpleNamespace(exitcode=code) for rank, code in enumerate(codes)}
        monkeypatch.setattr(errors.ChildFailedError, "format_msg", lambda self: "failed")
        raise errors.ChildFailedError("engine.train", failures)

    monkeypatch.setattr(run, "main", fail)
    request = read_flags([])
    assert resume.launch(request, Start("d", selector="latest"), 2) == status


def test_a_list_of_signals_that_is_given_wins() -> None:
    """torchrun takes the last of a flag that it is given twice."""
    run = pytest.importorskip("torch.distributed.run")
    request = read_flags(["--signals_to_handle=SIGTERM"])
    arguments = launch_arguments(request, Start("d", selector="latest"), 1)
    assert run.parse_args(arguments).signals_to_handle == "SIGTERM"
    arguments = launch_arguments(read_flags([]), Start("d", selector="latest"), 1)
    assert run.parse_args(arguments).signals_to_handle == FORWARDED


def test_the_guide_has_torchrun_forward_the_same_signals() -> None:
    """torchrun dies of a signal that is not in its list, and its workers with it."""
    text = GUIDE.read_text()
    for setting in ("--signals-to-handle=", "export PET_SIGNALS_TO_HANDLE="):
        assert setting + FORWARDED in text
    assert {signal.Signals[name] for name in FORWARDED.split(",")} >= set(SIGNALS)


def test_the_status_after_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The class is not torchrun's public API: this notices when it moves."""
    run = pytest.importorskip("torch.distributed.run")
    api = pytest.importorskip("torch.distributed.elastic.multiprocessing.api")

    def stop(argv: list[str]) -> None:
        raise api.SignalException("death", signal.SIGTERM)

    monkeypatch.setattr(run, "main", stop)
    assert resume.launch(read_flags([]), Start("d", selector="latest"), 2) == 128 + 15


def test_ctrl_c_before_the_launcher_listens_is_no_traceback(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(request: Request, start: Start, ranks: int) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(resume, "launch", interrupted)
    assert resume.main([f"--checkpoint_dir={saved}"]) == 130


@pytest.mark.parametrize("error", ["ValueError", "RendezvousConnectionError"])
def test_what_the_launcher_does_not_like_is_one_sentence(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: str
) -> None:
    run = pytest.importorskip("torch.distributed.run")
    rendezvous = pytest.importorskip("torch.distributed.elastic.rendezvous")

    def refuse(argv: list[str]) -> None:
        raise getattr(rendezvous, error, ValueError)("no such backend")

    monkeypatch.setattr(run, "main", refuse)
    assert resume.main([f"--checkpoint_dir={saved}", "--rdzv_backend=x"]) == 2
    shown = capsys.readouterr().err
    assert "no such backend" in shown
    assert "--rdzv_backend=x" in shown
    assert shown.count("\n") == 1, "one sentence"
