"""What is still saved after a signal: the save in flight always, another one only if the time allows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Choice = Literal["save", "finish and save", "finish", "leave"]


@dataclass(frozen=True, slots=True)
class LastSave:
    """The decision after `step`, once the save that was in flight has ended.

    Args:
        step: the step reached, which is not saved yet.
        in_flight: the step whose save was in flight when the signal came, if any.
        secs_left: until the process must be gone.
        usual_secs: what a save takes; 0 while that is unknown, and then one is tried.
    """

    step: int
    in_flight: int | None
    secs_left: float
    usual_secs: float

    @property
    def choice(self) -> Choice:
        """A save that is cut off does no harm, so the usual time is enough: no margin on top."""
        if self.secs_left < self.usual_secs:
            return "leave" if self.in_flight is None else "finish"
        return "save" if self.in_flight is None else "finish and save"

    @property
    def sentence(self) -> str:
        """What is done, and why, for the person at the terminal."""
        figures = f"{self.secs_left:.1f} s are left, a save takes {self.usual_secs:.1f} s"
        ended = "" if self.in_flight is None else f"the save of step {self.in_flight} has ended, "
        match self.choice:
            case "save" | "finish and save":
                return f"{ended}saving step {self.step} ({figures})"
            case _:
                return f"{ended}no time to save step {self.step} ({figures})"
