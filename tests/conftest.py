"""For all tests and the processes that they start."""

from __future__ import annotations

import os
import signal

# torch looks up the name behind the address of every store connection. Where the name server now and then
# drops a request, each of these costs the resolver's 5 s; nothing here depends on the answer.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

# A job that a shell put into the background inherits SIGINT ignored, and so would every program started here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
