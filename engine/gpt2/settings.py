"""What a configuration says about how a GPT-2 computes: taken over, or refused by the setting's name. Pure.

Source of the settings and their defaults: transformers, models/gpt2 (configuration and modeling).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import StateError
from model.config import GPT2Config
from model.gpt2 import LAYER_NORM_EPSILON

_TANH_GELUS = frozenset({"gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh", "gelu_pytorch_tanh"})
"""Names in transformers of the GELU that our model computes."""

_FIXED: dict[str, Any] = {
    "layer_norm_epsilon": LAYER_NORM_EPSILON,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
"""Settings that our model has no choice of, and what it does."""

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
"""Every setting that is looked at here, or need not be."""


def own_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with GPT-2's own names for the settings that transformers takes under others too."""
    return {_ALIASES.get(name, name): value for name, value in config.items()}


def of_another_model(config: Mapping[str, Any]) -> str | None:
    """The model type that the configuration names, if it is not GPT-2."""
    kind = config.get("model_type")
    return kind if isinstance(kind, str) and kind != "gpt2" else None


def refuse_settings(config: Mapping[str, Any], what: str) -> None:
    """StateError, naming the settings, where this model would not compute what theirs does."""
    problems = [
        f"{name} is {config[name]!r} (here it is {ours!r})"
        for name, ours in _FIXED.items()
        if config.get(name) is not None and config[name] != ours
    ]
    activation = config.get("activation_function")
    if activation is not None and activation not in _TANH_GELUS:
        problems.append(f"activation_function is {activation!r} (here it is 'gelu_new')")
    if config.get("pruned_heads"):
        problems.append("pruned_heads takes attention heads out")
    if config.get("quantization_config"):
        problems.append("quantization_config stores the weights in a form that needs its own arithmetic")
    if of_another_model(config) is not None:
        problems.append(f"model_type is {config['model_type']!r} (here it is 'gpt2')")
    if problems:
        raise StateError(
            f"the configuration of {what} asks for what our GPT-2 does not compute: {'; '.join(problems)}"
        )


def refuse_shape(config: Mapping[str, Any], shape: GPT2Config, what: str) -> None:
    """StateError, naming the settings, where the configuration and the tensors are of different shapes."""
    if "model_type" not in config:  # not transformers' own configuration: its names may mean other things
        return
    held = {
        "n_layer": shape.n_layer,
        "n_embd": shape.n_embd,
        "n_positions": shape.block_size,
        "n_ctx": shape.block_size,
        "vocab_size": shape.vocab_size,
    }
    problems = [
        f"{name} is {config[name]!r}, but its tensors have {ours}"
        for name, ours in held.items()
        if type(config.get(name)) is int and config[name] != ours
    ]
    if config.get("n_inner") not in (None, 4 * shape.n_embd):
        problems.append(f"n_inner is {config['n_inner']!r} (here it is always 4 n_embd, {4 * shape.n_embd})")
    if problems:
        raise StateError(
            f"the config.json of {what} does not fit its tensors or our GPT-2: {'; '.join(problems)}"
        )


def dropout(config: Mapping[str, Any]) -> tuple[float, str | None]:
    """(the one rate that our model has, what to say about it)."""
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
        f"its dropout rates differ ({said}): {highest:g} is used for all; --dropout changes it",
    )


def said_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What to say about settings that were taken over in another way than they stand there."""
    notes = [said] if (said := dropout(config)[1]) is not None else []
    if config.get("reorder_and_upcast_attn"):
        notes.append(
            "reorder_and_upcast_attn computes attention in float32: here attention uses the weights' dtype, "
            "which the import makes float32"
        )
    if {"bias", "block_size", "n_head"} <= config.keys():  # nanoGPT's model_args
        notes.append(
            "nanoGPT since 2023 computes the exact GELU; this model uses the tanh form, as GPT-2 does: "
            "outputs differ by about a thousandth"
        )
    return tuple(notes)
