"""Refuses unsupported tools' directories, with the tool's name and the way to convert them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import StateError


@dataclass(frozen=True, slots=True)
class _Tool:
    """patterns: file names, any of which identifies the tool. advice: what its user can do."""

    name: str
    patterns: tuple[str, ...]
    advice: str


_MEGATRON = (
    "convert it to Hugging Face weights: `python tools/checkpoint/convert.py --model-type GPT --loader mcore "
    "--saver SAVER --load-dir IN --save-dir OUT`; then import OUT"
)
_MEGATRON_SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")

TO_TRANSFORMERS = (
    "Megatron-DeepSpeed's `python tools/convert_checkpoint/deepspeed_to_transformers.py --input_folder IN "
    "--output_folder OUT` merges the parts; then import OUT"
)

_TOOLS = (
    _Tool(
        "a DeepSpeed universal checkpoint",
        ("zero/*/fp32.pt", "latest_universal"),
        "import the checkpoint that ds_to_universal was given, or what zero_to_fp32.py makes of it",
    ),
    _Tool(
        "a Megatron-Core distributed checkpoint",
        ("common.pt", "iter_*/common.pt"),
        "load it in Megatron-LM with `--ckpt-convert-format torch --ckpt-convert-save DIR`, and convert that "
        "to Hugging Face weights: `python tools/checkpoint/convert.py --model-type GPT --loader mcore "
        "--saver SAVER --load-dir DIR --save-dir OUT`; then import OUT",
    ),
    _Tool(
        "a Megatron-LM checkpoint, split over tensor- and pipeline-parallel ranks",
        ("latest_checkpointed_iteration.txt", "mp_rank_*/model_optim_rng.pt", "mp_rank_*/model_rng.pt"),
        _MEGATRON,
    ),
    _Tool(
        "a diffusers pipeline",
        ("model_index.json",),
        "give the folder of one of its models, unet/ for instance",
    ),
    _Tool(
        "an Orbax checkpoint (JAX)",
        ("_CHECKPOINT_METADATA", "manifest.ocdbt", "*/manifest.ocdbt"),
        "restore it with orbax.checkpoint, save the arrays with safetensors.numpy.save_file, and import that",
    ),
    _Tool(
        "a Flax checkpoint (JAX)",
        ("flax_model.msgpack",),
        "`AutoModel.from_pretrained(DIR, from_flax=True).save_pretrained(OUT)` of transformers below 5 "
        "converts it; then import OUT",
    ),
    _Tool(
        "a TensorFlow checkpoint",
        ("tf_model.h5", "saved_model.pb", "*.ckpt.index", "*.data-00000-of-*"),
        "`AutoModel.from_pretrained(DIR, from_tf=True).save_pretrained(OUT)` of transformers below 5 "
        "converts it; then import OUT",
    ),
    _Tool(
        "a NeMo checkpoint",
        ("model_config.yaml", "context/io.json", "context/model.yaml"),
        "`nemo llm export -y path=IN output_path=OUT target=hf` converts it; then import OUT",
    ),
)


def refuse_elsewhere(path: Path) -> None:
    """Raises StateError if a known but unsupported tool wrote this directory."""
    for tool in _TOOLS:
        if any(any(path.glob(pattern)) for pattern in tool.patterns):
            raise StateError(
                f"{path} is {tool.name} and cannot be imported directly. {_sentence(tool.advice)}"
            )


def refuse_part(tree: Mapping[str, Any], what: str) -> None:
    """Raises StateError if a file's own contents say that it is one of several parts of a model."""
    args = tree.get("args")
    sizes = args if isinstance(args, Mapping) else {}
    cut = [key for key in _MEGATRON_SIZES if isinstance(sizes.get(key), int) and sizes[key] > 1]
    if cut:
        said = " and ".join(f"{key} {sizes[key]}" for key in cut)
        raise StateError(
            f"{what} is one part of a model that Megatron-LM split ({said}). {_sentence(_MEGATRON)}"
        )
    parts = tree.get("mp_world_size")
    if "ds_version" in tree and isinstance(parts, int) and parts > 1:
        raise StateError(
            f"{what} is one of {parts} tensor-parallel parts of a DeepSpeed model. {TO_TRANSFORMERS}"
        )
    inner = tree.get("optimizer_state_dict")
    if isinstance(inner, Mapping) and "zero_stage" in inner:
        raise StateError(
            f"{what} is one rank's partition of a DeepSpeed ZeRO optimizer and holds no model: give the "
            "directory"
        )


def _sentence(advice: str) -> str:
    return advice[0].upper() + advice[1:] if advice[0] != "`" else advice
