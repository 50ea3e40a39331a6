"""Before the first step: do all ranks see one and the same checkpoint directory?"""

from __future__ import annotations

import time
from collections.abc import Callable

from engine.errors import NotFoundError, StorageError
from engine.format.names import PROBE_PREFIX
from engine.ranks.agreement import rank0_decides
from engine.ranks.coordination import Channel
from engine.storage.base import Storage


def probe_shared(
    storage: Storage,
    channel: Channel,
    nonce: str,
    timeout_secs: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Rank 0 writes a nonce, every rank reads it. Every rank calls it; rank 0 removes the file again.

    Raises: StorageError on a rank that sees another directory, naming the rank and the directory.
    """
    if channel.world_size == 1:
        return
    path = f"{PROBE_PREFIX}{nonce}"

    def write() -> str:
        storage.publish(path, nonce.encode(), exclusive=False)
        return storage.uri

    uri = rank0_decides(channel, "start/nonce", write, timeout_secs)
    problem: StorageError | None = None
    # A network file system may serve an older listing for a while.
    deadline = clock() + min(timeout_secs / 2, 30.0)
    while True:
        try:
            storage.read_bytes(path, max_bytes=1024)
            break
        except NotFoundError:
            if clock() >= deadline:
                problem = StorageError(
                    f"rank {channel.rank} does not see in {storage.uri} the file that rank 0 wrote to {uri}: "
                    "every rank must see the same checkpoint directory; give a shared path or a URI. Ranks "
                    "that save into a directory of their own need a process_group of their own"
                )
                break
        except StorageError as error:
            problem = error  # raised below: rank 0 waits for this rank first
            break
        sleep(0.5)
    channel.gather("start/probed", b"1", timeout_secs)
    if channel.rank == 0:
        storage.delete_file(path)
    if problem is not None:
        raise problem
