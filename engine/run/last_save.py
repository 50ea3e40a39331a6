"""After a signal: the save in flight is always finished; a last one starts only if time allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Choice = Literal["save", "finish and save", "finish", "leave"]


@dataclass(frozen=True, slots=True)
class LastSave:
    """The decision after `step`, once the save in flight has ended.

    Args:
        step: the current step, not saved yet.
        in_flight: the step whose save was in flight when the signal arrived, if any.
        secs_left: seconds until the process must exit.
        usual_secs: how long a save usually takes; 0 if unknown, and then a save is tried.
    """

    step: int
    in_flight: int | None
    secs_left: float
    usual_secs: float

    @property
    def choice(self) -> Choice:
        """No margin on top of the usual time: an interrupted save does no harm."""
        if self.secs_left < self.usual_secs:
            return "leave" if self.in_flight is None else "finish"
        return "save" if self.in_flight is None else "finish and save"

    @property
    def sentence(self) -> str:
        """The decision and its reason, for the console."""
        figures = f"{self.secs_left:.1f} s left, a save takes {self.usual_secs:.1f} s"
        ended = "" if self.in_flight is None else f"the save of step {self.in_flight} has ended, "
        match self.choice:
            case "save" | "finish and save":
                return f"{ended}saving step {self.step} ({figures})"
            case _:
                return f"{ended}no time to save step {self.step} ({figures})"
