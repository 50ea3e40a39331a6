"""The example's model kinds, for `engine.checkpoints.convert_commands`; they import torch when called."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.gpt2.own_packages import claim_own_packages

if TYPE_CHECKING:
    from engine.convert.model_kinds import ModelKind


def model_kinds() -> tuple[ModelKind, ...]:
    """The GPT-2 kind. Afterwards, `model` and `data` mean the example's packages in this process."""
    claim_own_packages()
    from engine.gpt2.kind import GPT2_KIND

    return (GPT2_KIND,)
