"""No way to save: the bytes of a save, copied in advance, are written raw beside training.

What training loses to that is the price of writing on this machine, whoever writes.
"""

from __future__ import annotations

from bench.cases.modes.base import Mode, Save
from bench.harness.floors import Floors
from bench.harness.session import Context

RAW = "raw write"


class RawWrite(Mode):
    """The floor's own pass over the disk, on a thread. It deletes its file itself."""

    name = RAW

    def __init__(self, context: Context, floors: Floors) -> None:
        super().__init__(context)
        self._floors = floors

    def save(self, number: int) -> Save:
        save = Save(self.path(number))
        save.end_beside(lambda: self._floors.write(number))
        return save
