"""The model kinds that export and import use: those of the example, where it lies beside the library."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.convert.model_kinds import ModelKind

_EXAMPLE = "engine.gpt2"


def installed_kinds() -> tuple[ModelKind, ...]:
    """Every installed kind; none where the library is alone.

    The example is found by its name, at run time: the library must not import it. Entry points of
    `importlib.metadata` were rejected: they exist only for what pip has installed, and the example also runs
    from a checkout.
    """
    if find_spec(_EXAMPLE) is None:
        return ()
    found: tuple[ModelKind, ...] = import_module(f"{_EXAMPLE}.plugin").model_kinds()
    return found
