"""Checks a configuration of another tool: is it a GPT-2 that computes what ours does? Pure.

Settings and defaults are those of transformers, models/gpt2 (configuration and modeling).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import StateError
from model.config import GPT2Config
from model.gpt2 import LAYER_NORM_EPSILON

_TANH_GELUS = frozenset({"gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh", "gelu_pytorch_tanh"})
"""transformers' names for the GELU that our model computes."""

_FIXED: dict[str, Any] = {
    "layer_norm_epsilon": LAYER_NORM_EPSILON,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
"""Settings that are fixed in our model, with their values."""

_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
_DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
_SHAPE = ("n_layer", "n_embd", "n_positions", "n_ctx", "vocab_size", "n_inner")
_NO_COMPUTATION = frozenset(
    {
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "gradient_checkpointing",
        "initializer_range",
        "output_past",
        "pad_token_id",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "task_specific_params",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Settings of transformers that do not change what a language model computes."""

SETTINGS = frozenset(
    {
        *_FIXED,
        *_ALIASES,
        *_DROPOUTS,
        *_SHAPE,
        *_NO_COMPUTATION,
        *("activation_function", "bias", "block_size", "dropout", "model_type", "n_head", "pruned_heads"),
        *("quantization_config", "reorder_and_upcast_attn"),
    }
)
"""Every setting that is handled here or can be ignored."""


def own_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with GPT-2's own names instead of transformers' aliases."""
    return {_ALIASES.get(name, name): value for name, value in config.items()}


def of_another_model(config: Mapping[str, Any]) -> str | None:
    """The configuration's model type, if it is not GPT-2."""
    kind = config.get("model_type")
    return kind if isinstance(kind, str) and kind != "gpt2" else None


def refuse_settings(config: Mapping[str, Any], what: str) -> None:
    """Raises StateError, with the settings, if our model would not compute what theirs does."""
    problems = [
        f"{name} is {config[name]!r} (here it is {ours!r})"
        for name, ours in _FIXED.items()
        if config.get(name) is not None and config[name] != ours
    ]
    activation = config.get("activation_function")
    if activation is not None and activation not in _TANH_GELUS:
        problems.append(f"activation_function is {activation!r} (here it is 'gelu_new')")
    if config.get("pruned_heads"):
        problems.append("pruned_heads removes attention heads")
    if config.get("quantization_config"):
        problems.append("quantization_config: quantized weights are not supported")
    if of_another_model(config) is not None:
        problems.append(f"model_type is {config['model_type']!r} (here it is 'gpt2')")
    if problems:
        raise StateError(
            f"our GPT-2 cannot compute what the configuration of {what} describes: {'; '.join(problems)}"
        )


def refuse_shape(config: Mapping[str, Any], shape: GPT2Config, what: str) -> None:
    """Raises StateError, with the settings, if the configuration and the tensors have different shapes."""
    if "model_type" not in config:  # not transformers' own configuration: its names may mean other things
        return
    actual = {
        "n_layer": shape.n_layer,
        "n_embd": shape.n_embd,
        "n_positions": shape.block_size,
        "n_ctx": shape.block_size,
        "vocab_size": shape.vocab_size,
    }
    problems = [
        f"{name} is {config[name]!r}, but the tensors have {ours}"
        for name, ours in actual.items()
        if type(config.get(name)) is int and config[name] != ours
    ]
    if config.get("n_inner") not in (None, 4 * shape.n_embd):
        problems.append(f"n_inner is {config['n_inner']!r} (here it is always 4 n_embd, {4 * shape.n_embd})")
    if problems:
        raise StateError(
            f"the config.json of {what} does not match its tensors or our GPT-2: {'; '.join(problems)}"
        )


def dropout(config: Mapping[str, Any]) -> tuple[float, str | None]:
    """(the one dropout rate that our model has, a note about it or None)."""
    own = config.get("dropout")
    if isinstance(own, int | float) and not isinstance(own, bool):
        return float(own), None
    rates = {name: config[name] for name in _DROPOUTS if isinstance(config.get(name), int | float)}
    if not rates:
        return 0.0, None
    highest = float(max(rates.values()))
    if len(set(rates.values())) == 1:
        return highest, None
    said = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
    return (
        highest,
        f"its dropout rates differ ({said}): all use {highest:g}; --dropout changes it",
    )


def said_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Notes about settings that the import changed."""
    notes = [said] if (said := dropout(config)[1]) is not None else []
    if config.get("reorder_and_upcast_attn"):
        notes.append(
            "reorder_and_upcast_attn computes attention in float32: this model uses the weights' dtype, "
            "which the import makes float32"
        )
    if {"bias", "block_size", "n_head"} <= config.keys():  # nanoGPT's model_args
        notes.append(
            "nanoGPT since 2023 computes the exact GELU; this model uses GPT-2's tanh form: outputs differ "
            "by about a thousandth"
        )
    return tuple(notes)
