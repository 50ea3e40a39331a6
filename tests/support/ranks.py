"""Real gloo ranks for tests: processes that are started once and run one function after another.

    with Ranks(2) as ranks:
        first, second = ranks.run(work, "argument")

`work(rank, world_size, "argument")` runs on every rank at once, in a process group of all of them. It is
found by its import path, so it is a function of a module.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import TracebackType
from typing import Any

DEADLINE_SECS = 120.0
"""For one call. Nothing takes so long; whoever reaches it hangs."""

GRACE_SECS = 10.0
"""For the other ranks, once one has failed: they may wait for it in a collective."""

_PRELOAD = [
    "torch",
    "torch._dynamo",  # imported by the first operation on a DTensor: 2 s in every rank otherwise
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "hypothesis",
    "pytest",
    "safetensors.torch",
    "engine.checkpointer",
    "engine.run.parallelize",
    "engine.train.session",
    "engine.run.trainer",
]


def use_fork_server() -> ForkServerContext:
    """Processes of one server: a bare fork beside torch's threads hangs, a spawn imports torch in each."""
    multiprocessing.set_forkserver_preload(_PRELOAD)
    return multiprocessing.get_context("forkserver")


class RanksFailed(AssertionError):
    """What went wrong, with every rank's traceback."""


class Ranks:
    """A process group of `world_size` processes on this machine."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.closed = False
        self._scratch = tempfile.TemporaryDirectory(prefix="ranks-")
        context = use_fork_server()
        pipes = [context.Pipe() for _ in range(world_size)]
        self._pipes: list[Connection] = [ours for ours, _ in pipes]
        self._processes = [
            context.Process(target=_serve, args=(rank, world_size, self._scratch.name, pipes[rank][1]))
            for rank in range(world_size)
        ]
        for process in self._processes:
            process.daemon = True
            process.start()
        for _, theirs in pipes:
            theirs.close()

    def run(self, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Run `work(rank, world_size, *arguments)` on all ranks. Returns the results by rank.

        RanksFailed when a rank raises or hangs; the ranks are gone then.
        """
        request = pickle.dumps((work, arguments))
        for pipe in self._pipes:
            pipe.send_bytes(request)
        answers: dict[int, tuple[str, Any]] = {}
        waiting = {id(pipe): rank for rank, pipe in enumerate(self._pipes)}
        while waiting:
            failed = any(kind == "error" for kind, _ in answers.values())
            ready = wait([self._pipes[r] for r in waiting.values()], GRACE_SECS if failed else DEADLINE_SECS)
            if not ready:
                break
            for pipe in ready:
                rank = waiting.pop(id(pipe))
                try:
                    answers[rank] = pickle.loads(self._pipes[rank].recv_bytes())
                except EOFError:
                    answers[rank] = ("error", "the process has died")
        errors = [f"rank {rank}: {text}" for rank, (kind, text) in sorted(answers.items()) if kind == "error"]
        errors += [f"rank {rank} did not answer" for rank in waiting.values()]
        if errors:
            self.close()
            raise RanksFailed("\n".join(errors))
        return [answers[rank][1] for rank in range(self.world_size)]

    def threads(self) -> int:
        """Threads of the rank that has most of them."""
        return max(len(os.listdir(f"/proc/{process.pid}/task")) for process in self._processes)

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        self.closed = True
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(GRACE_SECS if process.exitcode is None else 0)
            if process.is_alive():
                process.kill()
                process.join()
        self._scratch.cleanup()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            for process in self._processes:
                process.kill()
        self.close()


def outcome(work: Callable[[], Any]) -> Any:
    """What `work` returns, or its error as "Kind: message": exceptions do not travel well."""
    try:
        return work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _serve(rank: int, world_size: int, scratch: str, pipe: Connection) -> None:
    """One rank: run what the pipe brings until it closes."""
    import torch
    import torch.distributed as dist

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Daemonic, so that no rank outlives the tests; but data workers are children, too.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    faulthandler.enable()
    torch.set_num_threads(1)
    size = str(world_size)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo"
    )
    dist.init_process_group(
        "gloo",
        init_method=f"file://{Path(scratch) / 'rendezvous'}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    while True:
        try:
            work, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            break
        faulthandler.dump_traceback_later(DEADLINE_SECS - 5)
        try:
            answer = ("result", work(rank, world_size, *arguments))
            raw = pickle.dumps(answer)
        except BaseException:
            raw = pickle.dumps(("error", traceback.format_exc()))
        faulthandler.cancel_dump_traceback_later()
        pipe.send_bytes(raw)
    # Not `destroy_process_group`: it may wait for ranks that a test has left behind.
    os._exit(0)
