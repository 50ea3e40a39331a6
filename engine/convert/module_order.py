"""Finds the order of a Hugging Face model's parameters, which its safetensors file does not keep.

transformers' own class of the model has it. The class is built from config.json without values, so no code of
the checkpoint's author runs. Without transformers, or for another class, the order is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from engine.convert.parameter_names import Names


def parameter_order(config: Mapping[str, Any], names: Names, tensors: int) -> list[str] | None:
    """Canonical names of the parameters in the module's order, or None if that is unknown.

    tensors: how many the checkpoint has. A configuration with more layers may be hostile and is not built.
    """
    parts = [value for key, value in config.items() if "layer" in key or "expert" in key]
    if any(isinstance(value, int) and value > tensors for value in parts):
        return None
    classes = config.get("architectures")
    if not isinstance(classes, list) or not classes or not isinstance(classes[0], str):
        return None
    try:
        import transformers

        kind = getattr(transformers, classes[0])
        with torch.device("meta"):
            module = kind(kind.config_class.from_dict(dict(config)))
    except Exception:  # not installed, no such class, or an invalid configuration
        return None
    if not isinstance(module, torch.nn.Module):
        return None
    return [names.of(name) for name, _ in module.named_parameters()]
