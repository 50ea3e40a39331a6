"""The real trainer on several ranks, forked from a process that has imported everything.

    status = run_ranks(2, ["--max_steps=4", ...], log=folder / "output.log", cwd=ROOT, env={})

Each rank runs `engine.train` with the environment that torchrun would set. Importing torch would be most of a
test's time otherwise. torchrun itself is tested where signals, kills and restarts are.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tests.support.ranks import use_fork_server

GRACE_SECS = 30.0
"""For the other ranks, once one has failed; torchrun leaves them as long."""


def run_ranks(
    nproc: int | None,
    args: Sequence[str],
    *,
    log: Path,
    cwd: Path,
    env: Mapping[str, str],
    timeout_secs: float,
) -> int:
    """Run `engine.train` to its end: 0, or the first exit status that is another.

    nproc: ranks; None for one process that no launcher has started.
    Raises: TimeoutError. All ranks are gone in any case.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    base = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    if nproc is None:
        ranks = [base]
    else:
        launch = _launch(nproc)
        ranks = [{**base, **launch, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(nproc)]
    context = use_fork_server()
    processes = [
        context.Process(target=_rank, args=(one, [*args], str(log), str(cwd)), daemon=True) for one in ranks
    ]
    with _gone_at_the_end(processes):
        for process in processes:
            process.start()
        return _first_failure(processes, timeout_secs)


def _launch(nproc: int) -> dict[str, str]:
    """What torchrun tells all workers of one start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = str(nproc)
    return {
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": uuid.uuid4().hex,
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def _first_failure(processes: Sequence[ForkServerProcess], timeout_secs: float) -> int:
    left = {process.sentinel: process for process in processes}
    patience = timeout_secs
    status = 0
    while left:
        ended = wait([*left], patience)
        if not ended:
            if status:
                return status
            raise TimeoutError(f"{len(left)} of {len(processes)} ranks still run after {timeout_secs:g} s")
        for sentinel in ended:
            code = left.pop(sentinel).exitcode  # type: ignore[call-overload]
            if code and not status:
                status, patience = code, GRACE_SECS
    return status


@contextlib.contextmanager
def _gone_at_the_end(processes: Sequence[ForkServerProcess]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def _rank(environ: dict[str, str], args: list[str], log: str, cwd: str) -> None:
    """One rank, in the forked process."""
    # Data workers are children of daemons otherwise, which may have none.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environ)
    import torch

    from engine.run.entry import enter

    torch.set_num_threads(1)  # OMP_NUM_THREADS was read when torch was imported
    sys.argv = [str(Path(cwd) / "engine/train/__main__.py"), *args]
    try:
        enter("engine.train.session")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
