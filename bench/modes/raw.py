"""No way to save: the bytes of a save are written raw beside training, from a buffer that was filled before.

What training loses to that is what the machine takes for writing, whoever writes.
"""

from __future__ import annotations

import threading
from typing import ClassVar

from bench.floors import Floors
from bench.modes.base import Context, Durability, Mode, Save
from bench.records import RAW


class RawWrite(Mode):
    """The floor's own pass over the disk, on a thread. It deletes its file itself."""

    name: ClassVar[str] = RAW
    durability: ClassVar[Durability] = Durability.FILES

    def __init__(self, context: Context, floors: Floors) -> None:
        super().__init__(context)
        self._floors = floors

    def save(self, number: int) -> Save:
        save = Save(self.path(number))

        def write() -> None:
            try:
                self._floors.write(number)
            except Exception as error:
                save.end(error)
            else:
                save.end()

        threading.Thread(target=write, name="raw-write", daemon=True).start()
        return save
