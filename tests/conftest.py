"""For all tests and the processes that they start."""

from __future__ import annotations

import os

# torch looks up the name behind the address of every store connection. Where the name server now and then
# drops a request, each of these costs the resolver's 5 s; nothing here depends on the answer.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
