"""Which line of the user's code called Holdfast, for messages."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

_OURS = str(Path(__file__).resolve().parents[1])


def calling_line() -> str:
    """ "file:line" of the innermost caller outside this package; "" in one of our own threads."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file == threading.__file__:
            return ""
        if not file.startswith(_OURS):
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
