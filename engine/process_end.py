"""The one place that ends a process without the interpreter's own shutdown.

At shutdown the interpreter joins threads and runs exit handlers. Both can take forever: a thread may hang in
a call to a dead mount, or a gloo worker thread may die in the middle of C++ code.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn


def end_at_once(status: int, sentence: str = "", *, flush: bool = True) -> NoReturn:
    """End this process now, with this exit status.

    Args:
        sentence: written to standard error first, by descriptor: another thread may hold the lock of
            `sys.stderr`.
        flush: flush logs and standard streams first. False where that may hang, and in forked children, whose
            buffers hold the parent's text.
    """
    if sentence:
        os.write(2, f"{sentence}\n".encode())
    if flush:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
