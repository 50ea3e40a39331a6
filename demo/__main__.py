"""`make demo`: trains on 2 ranks, kills all processes, resumes on 4, and compares with an uninterrupted run.

It works in one folder, which the next demo empties. Each part prints the command that a person would type.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from demo.job import Event, Job, JobError, committed_steps, read_metrics, steps_of, torchrun
from demo.table import compare, render

ROOT = Path(__file__).resolve().parents[1]
RANKS_BEFORE, RANKS_AFTER = 2, 4
STEPS = 120
SAVE_EVERY = 20
KILL_AFTER = STEPS // 2 + 13
"""The kill comes after this step, some steps past a checkpoint, so that some work is lost and redone."""
TOLERANCE = 1e-4
PATIENCE_SECS = 600.0
OURS = "holdfast-demo"
"""The file that marks a folder as a demo's: only such folders are emptied."""


def say(text: str = "") -> None:
    print(text, flush=True)


def shown(command: list[str]) -> str:
    """The command as typed with the environment activated."""
    program = Path(command[0]).name
    return shlex.join(["python" if program.startswith("python") else program, *command[1:]])


def prepare_folder(folder: Path) -> None:
    """Create an empty folder with the demo's mark.

    Raises:
        JobError: it holds files and is not an earlier demo's, or it cannot be created.
    """
    try:
        if folder.exists() and any(folder.iterdir()) and not (folder / OURS).exists():
            raise JobError(f"{folder} holds files that are not a demo's; give another --dir")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / OURS).touch()
    except OSError as err:
        raise JobError(f"the demo cannot work in {folder}: {err.strerror}; give another --dir") from err


def run(command: list[str], log: Path) -> Job:
    say(f"  $ {shown(command)}")
    return Job(command, log=log, cwd=ROOT)


def train_command(folder: Path, name: str) -> list[str]:
    flags = {
        "model": "nano",
        "data": folder / "data",
        "checkpoint_dir": folder / name / "checkpoints",
        "log_dir": folder / name / "logs",
        "seq_len": 128,
        "global_batch": 12,
        "max_steps": STEPS,
        "warmup_steps": 10,
        "eval_freq": STEPS // 2,
        "checkpoint_freq": SAVE_EVERY,
        "device": "cpu",
    }
    return torchrun(RANKS_BEFORE, "-m", "engine.train", *(f"--{k}={v}" for k, v in flags.items()))


def train(folder: Path, name: str) -> Job:
    return run(train_command(folder, name), folder / name / "output.log")


def train_and_kill(folder: Path, name: str) -> int:
    """Train, and kill every process in mid-run; returns the last step reported as committed."""
    logs = folder / name / "logs"
    job = train(folder, name)
    job.wait_until(lambda: max(steps_of(read_metrics(logs)), default=0) >= KILL_AFTER, PATIENCE_SECS)
    job.kill()
    events = read_metrics(logs)
    saved = committed_steps(events)[-1]
    say(f"  killed after step {max(steps_of(events))}; the last committed checkpoint is step {saved}")
    return saved


def show_losses(uninterrupted: list[Event], resumed: list[Event], *, resumed_after: int) -> None:
    """Print the table; JobError if the runs differ by more than the order of summation explains."""
    rows = compare(uninterrupted, resumed)
    ranks = (RANKS_BEFORE, RANKS_AFTER)
    say(render(rows, resumed_after=resumed_after, ranks=ranks, every=SAVE_EVERY))
    worst = max(row.difference for row in rows)
    exact = sum(row.resumed == row.uninterrupted for row in rows)
    say(f"\n{exact} of {len(rows)} steps are identical to the bit; the largest relative difference is")
    say(f"{worst:.1e}, because another number of ranks adds the same numbers in another order.")
    if worst > TOLERANCE:
        raise JobError(f"the losses differ by {worst:.1e}; expected at most {TOLERANCE}")


def demo(folder: Path) -> None:
    prepare_folder(folder)
    python = sys.executable
    checkpoints = folder / "killed" / "checkpoints"

    say("1. Prepare a corpus: the source code of Python's own standard library.")
    command = [python, "-m", "data.prepare", "--tokenizer=bytes", f"--out={folder / 'data'}"]
    run(command, folder / "prepare.log").finish(PATIENCE_SECS)

    say(f"\n2. Train a small GPT-2 on {RANKS_BEFORE} ranks, uninterrupted, for comparison.")
    train(folder, "undisturbed").finish(PATIENCE_SECS)

    say("\n3. Train the same model again, and kill all its processes in mid-run with SIGKILL.")
    saved = train_and_kill(folder, "killed")

    say(f"\n4. Resume on {RANKS_AFTER} ranks. The checkpoint carries the run's configuration.")
    command = [python, "-m", "engine.resume", f"--reshard={RANKS_AFTER}", f"--checkpoint_dir={checkpoints}"]
    run(command, folder / "killed" / "output.log").finish(PATIENCE_SECS)
    events = read_metrics(folder / "killed" / "logs")
    restored = next(e["step"] for e in events if e["event"] == "restored")
    say(f"  restored step {restored} and finished step {max(steps_of(events))}")
    # A save may have committed right before the kill without being reported.
    if restored < saved:
        raise JobError(f"resumed at step {restored}, but step {saved} had been committed")

    say("\n5. The checkpoints now:")
    command = [python, "-m", "engine.checkpoints", "list", str(checkpoints)]
    say(f"  $ {shown(command)}")
    subprocess.run(command, cwd=ROOT, check=True)

    say("\n6. The losses side by side:")
    show_losses(read_metrics(folder / "undisturbed" / "logs"), events, resumed_after=restored)


def main() -> int:
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("runs/demo"), help="working folder; emptied first")
    args = parser.parse_args()
    # As with Ctrl+C, leave nothing running.
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    try:
        began = time.monotonic()
        demo(args.dir)
        say(f"The demo took {time.monotonic() - began:.0f} s.")
    except (JobError, subprocess.CalledProcessError) as err:
        print(f"The demo failed: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("The demo was interrupted; none of its processes is left running.", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
