"""Finds the tensors of a GPT-2 in another tool's layout, and presents them in ours.

Supports our own names; Hugging Face's and OpenAI's (without the prefix, with `Conv1D`'s transposed weights,
causal masks as buffers, and a second name for the output layer); nanoGPT's (where biases may be missing: zero
biases do not change the outputs).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from engine.convert.tensors import TensorSource, same_bytes, whole
from engine.errors import StateError
from engine.format.manifest import TensorInfo
from engine.gpt2.settings import dropout, own_names, refuse_settings, refuse_shape
from engine.state.tensor_format import to_torch
from model.config import PRESETS, GPT2Config
from model.gpt2 import GPT2

_PREFIX = "transformer."
_EMBEDDING = "transformer.wte.weight"
_HEAD = "lm_head.weight"
_BLOCK = re.compile(r"transformer\.h\.(\d+)\.")
_MASK = re.compile(r"transformer\.h\.\d+\.attn\.(?:bias|masked_bias)")
_LINEAR = re.compile(r"transformer\.h\.\d+\.(?:attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
_FIRST_ATTENTION = "transformer.h.0.attn.c_attn.weight"
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class SourceParameter:
    """A parameter's name in the source, and whether it is stored transposed there."""

    name: str
    transposed: bool


@dataclass(frozen=True, slots=True)
class Gpt2:
    """A GPT-2 found among a source's tensors.

    places: our parameter name -> its place. zeros: our biases that the source lacks.
    head: the source's output layer, which must equal the token embedding; None if it is not stored.
    """

    config: GPT2Config
    places: Mapping[str, SourceParameter]
    dtypes: Mapping[str, str]
    zeros: tuple[str, ...] = ()
    head: str | None = None


def looks_like_gpt2(names: Collection[str]) -> bool:
    """Whether these are the names of a GPT-2's tensors, in any supported spelling."""
    spelled = set(_spelled(names))
    return _EMBEDDING in spelled and _FIRST_ATTENTION in spelled


def find_gpt2(source: TensorSource, names: Mapping[str, str], config: Mapping[str, Any], what: str) -> Gpt2:
    """The GPT-2 among a source's tensors.

    Args:
        names: canonical name in the module -> name in the source.
        config: settings known besides the tensors: "n_head", "dropout", "model" with a preset's name, or
            transformers' config.json.
        what: the source, for errors.
    Raises: StateError, with every tensor that is missing, unknown or of the wrong shape, or with every
        setting that our model does not support.
    """
    config = own_names(config)
    refuse_settings(config, what)
    infos = {spelled: source.infos[names[name]] for spelled, name in _spelled(names).items()}
    places = {spelled: names[name] for spelled, name in _spelled(names).items()}
    if _EMBEDDING not in infos or _FIRST_ATTENTION not in infos:
        raise StateError(f"{what} is not a GPT-2: it has no {_EMBEDDING} or no {_FIRST_ATTENTION}")
    shape = _shape(infos, config, what)
    refuse_shape(config, shape, what)
    rows, columns = infos[_FIRST_ATTENTION].shape
    transposed = columns == 3 * rows
    wanted = parameter_shapes(shape)
    lacking, problems = [], []
    for name, sizes in wanted.items():
        flip = transposed and _LINEAR.fullmatch(name) is not None
        info = infos.get(name)
        if info is None:
            lacking.append(name)
        elif info.shape != (sizes[::-1] if flip else sizes):
            problems.append(f"{name} is {list(info.shape)}, not {list(sizes[::-1] if flip else sizes)}")
    zeros = [name for name in lacking if name.endswith(".bias")]
    problems += [f"{name} is missing" for name in lacking if name not in zeros]
    unknown = [n for n in infos if n not in wanted and n != _HEAD and not _MASK.fullmatch(n)]
    problems += [f"{name} does not belong to a GPT-2" for name in unknown]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise StateError(f"{what} is not a valid GPT-2: {'; '.join(problems[:_SHOWN])}{more}")
    return Gpt2(
        config=shape,
        places={
            name: SourceParameter(places[name], transposed and _LINEAR.fullmatch(name) is not None)
            for name in wanted
            if name not in zeros
        },
        dtypes={name: infos.get(name, infos[_EMBEDDING]).dtype for name in wanted},
        zeros=tuple(zeros),
        head=places.get(_HEAD),
    )


def parameter_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """The shape of each of our model's parameters, in the model's order."""
    with torch.device("meta"):
        model = GPT2(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


class Gpt2Tensors:
    """A source's GPT-2 under our names, in our layout."""

    def __init__(self, source: TensorSource, found: Gpt2) -> None:
        self._source = source
        self.found = found
        shapes = parameter_shapes(found.config)
        self._infos = {name: TensorInfo(found.dtypes[name], shape) for name, shape in shapes.items()}

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def windows(self, name: str) -> Iterator[torch.Tensor]:
        """See `TensorSource`. A transposed tensor is one window: its rows are spread over the whole file."""
        info = self._infos[name]
        place = self.found.places.get(name)
        if place is None:
            yield torch.zeros(info.shape, dtype=to_torch(info.dtype))
        elif place.transposed:
            yield whole(self._source, place.name).t().contiguous()
        else:
            yield from self._source.windows(place.name)

    def check_tied(self, what: str) -> None:
        """Raises StateError if the source's output layer differs from its embedding: ours are tied."""
        if self.found.head is None:
            return
        embedding = self.found.places[_EMBEDDING].name
        if self._source.infos[self.found.head] != self._source.infos[embedding]:
            raise StateError(_untied(what))
        pairs = zip(self._source.windows(self.found.head), self._source.windows(embedding), strict=True)
        if not all(same_bytes(one, two) for one, two in pairs):
            raise StateError(_untied(what))


def _untied(what: str) -> str:
    return (
        f"{what} has an output layer ({_HEAD}) that differs from its token embedding; this GPT-2 uses one "
        "matrix for both, so it cannot hold this model"
    )


def _spelled(names: Collection[str]) -> dict[str, str]:
    """Our spelling -> given name."""
    prefixed = any(name.startswith(_PREFIX) for name in names)
    return {name if prefixed or name == _HEAD else _PREFIX + name: name for name in names}


def _shape(infos: Mapping[str, TensorInfo], config: Mapping[str, Any], what: str) -> GPT2Config:
    positions = infos.get("transformer.wpe.weight")
    matrices = (positions, infos[_EMBEDDING], infos[_FIRST_ATTENTION])
    if positions is None or any(info is None or len(info.shape) != 2 for info in matrices):
        raise StateError(f"{what} is not a GPT-2: its embeddings or attention weights are not matrices")
    vocab_size, n_embd = infos[_EMBEDDING].shape
    n_layer = 1 + max(int(found[1]) for name in infos if (found := _BLOCK.match(name)))
    n_head = _heads(config, n_layer, n_embd, what)
    try:
        return GPT2Config(
            n_layer=n_layer,
            n_head=n_head,
            n_embd=n_embd,
            vocab_size=vocab_size,
            block_size=positions.shape[0],
            dropout=dropout(config)[0],
        )
    except ValueError as error:
        raise StateError(f"{what} has an impossible shape for a GPT-2: {error}") from error


def _heads(config: Mapping[str, Any], n_layer: int, n_embd: int, what: str) -> int:
    """The number of attention heads, which the tensors' shapes do not tell."""
    given = config.get("n_head")
    if isinstance(given, int) and not isinstance(given, bool):
        return given
    presets = [PRESETS[str(config["model"])]] if config.get("model") in PRESETS else []
    for preset in (*presets, *PRESETS.values()):
        if (preset.n_layer, preset.n_embd) == (n_layer, n_embd):
            return preset.n_head
    raise StateError(
        f"{what}: {n_layer} layers of width {n_embd} match no preset, and the number of attention heads is "
        'unknown; put "n_head" into its configuration'
    )
