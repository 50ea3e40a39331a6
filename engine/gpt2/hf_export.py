"""`--format hf`: a directory that `transformers.GPT2LMHeadModel.from_pretrained` loads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from engine.convert.checkpoint import CheckpointTensors
from engine.convert.checkpoint_parts import contents_of, main_module
from engine.convert.safetensors_out import SHARD_BYTES, Entry, write_model
from engine.convert.tensors import Progress, cast, converted, ignore_progress, transposed_windows
from engine.gpt2.tensors import Gpt2, Gpt2Tensors, find_gpt2
from engine.gpt2.tokenizer_files import write_tokenizer
from model.config import GPT2Config
from model.gpt2 import LAYER_NORM_EPSILON
from model.hf_names import hf_name

_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def gpt2_of(source: CheckpointTensors) -> Gpt2:
    """The GPT-2 in a checkpoint. StateError if its model is not a GPT-2."""
    contents = contents_of(source.manifest)
    names = contents.modules[main_module(contents, source.uri)]
    return find_gpt2(source, names, source.manifest.config, source.uri)


def hf_bytes(source: CheckpointTensors, dtype: str | None) -> int:
    """How many tensor bytes `write_hf` will write. StateError as in `gpt2_of`."""
    infos = Gpt2Tensors(source, gpt2_of(source)).infos
    return sum(converted(info, dtype).tensor_bytes for info in infos.values())


def write_hf(
    source: CheckpointTensors,
    folder: Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = ignore_progress,
) -> None:
    """Write model, configuration and tokenizer, without training state, into the new directory `folder`.

    Raises: StateError if the checkpoint's model is not a GPT-2; DamagedError; StorageError.
    """
    found = gpt2_of(source)
    model = Gpt2Tensors(source, found)
    model.check_tied(source.uri)
    folder.mkdir()
    entries = [_entry(model, name, dtype) for name in model.infos]
    end_of_text = write_tokenizer(folder, found.config.vocab_size, found.config.block_size)
    settings = config_json(found.config, entries[0].info.dtype, end_of_text)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    write_model(folder, entries, shard_bytes, progress)


def config_json(config: GPT2Config, dtype: str, end_of_text: int | None) -> dict[str, Any]:
    """The settings with which Hugging Face's GPT-2 computes the same as ours."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "vocab_size": config.vocab_size,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "layer_norm_epsilon": LAYER_NORM_EPSILON,
        "tie_word_embeddings": True,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "torch_dtype": _TORCH_NAMES.get(dtype, "float32"),
    }


def _entry(model: Gpt2Tensors, name: str, dtype: str | None) -> Entry:
    info = converted(model.infos[name], dtype)
    their_name, transposed = hf_name(name)
    stored = type(info)(info.dtype, info.shape[::-1]) if transposed else info

    def windows() -> Iterator[torch.Tensor]:
        rows = transposed_windows(model, name) if transposed else model.windows(name)
        return cast(rows, info.dtype)

    return Entry(their_name, stored, windows)
