"""The GPT-2 as a `ModelKind`, for the library's import and export."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from data.errors import DataError
from engine.convert.checkpoint import CheckpointTensors
from engine.convert.model_kinds import AddTensor, ConvertedModel, ModelKind, Resumable
from engine.convert.numbering import Parameter
from engine.convert.recognise import Recognised
from engine.convert.tensors import Progress, TensorSource, is_float
from engine.errors import ConfigError
from engine.format.manifest import TensorInfo
from engine.gpt2.hf_export import hf_bytes, write_hf
from engine.gpt2.resumable import SEED, fresh_generators, run_config, trainer_objects
from engine.gpt2.settings import of_another_model, said_of
from engine.gpt2.tensors import Gpt2, Gpt2Tensors, find_gpt2, looks_like_gpt2
from engine.state.captured import RNG_KEY

_TRAINED_IN = "F32"
"""The trainer's type for weights and optimizer moments."""

_NO_DATA = (
    "it does not contain the position in the data: a resumed run starts at the beginning of its own data, "
    "with fresh random states, and needs --allow_data_change"
)


class Gpt2Kind:
    """See `ModelKind`."""

    @property
    def name(self) -> str:
        return "GPT-2"

    def recognises(self, names: Collection[str], config: Mapping[str, Any]) -> bool:
        return looks_like_gpt2(names) and of_another_model(config) is None

    def convert(self, tensors: TensorSource, parts: Recognised, what: str) -> ConvertedModel:
        """Convert to our layout, in float32 like the trainer's weights."""
        names = {name: ref.name for name, ref in parts.model.items()}
        found = find_gpt2(tensors, names, parts.config, what)
        model = Gpt2Tensors(tensors, found)
        model.check_tied(what)
        config, others = run_config(found.config, parts.config)
        return ConvertedModel(
            infos={
                name: TensorInfo(_TRAINED_IN, info.shape) if is_float(info.dtype) else info
                for name, info in model.infos.items()
            },
            windows=model.windows,
            parameters=_parameters(model, parts),
            state_dtype=_TRAINED_IN,
            config=config,
            notes=_notes(model, parts, others),
        )

    def resumable(self, parts: Recognised, step: int, add: AddTensor) -> Resumable:
        return Resumable(
            objects=trainer_objects(step, parts.epoch, parts.config.get("seed", SEED)),
            local={RNG_KEY: fresh_generators(add)},
            notes=(_NO_DATA,),
        )

    def hf_bytes(self, source: CheckpointTensors, dtype: str | None) -> int:
        return hf_bytes(source, dtype)

    def write_hf(
        self,
        source: CheckpointTensors,
        folder: Path,
        *,
        dtype: str | None,
        shard_bytes: int,
        progress: Progress,
    ) -> None:
        """ConfigError if the tokenizer's vocabulary is damaged."""
        try:
            write_hf(source, folder, dtype=dtype, shard_bytes=shard_bytes, progress=progress)
        except DataError as error:
            raise ConfigError(str(error)) from error


GPT2_KIND: ModelKind = Gpt2Kind()


def _parameters(model: Gpt2Tensors, parts: Recognised) -> dict[str, Parameter]:
    """The parameters that the source has; biases added as zeros are in no optimizer."""
    stored = {ref.name: ref.info.shape for ref in parts.model.values()}
    return {
        name: Parameter(stored[place.name], info.shape, place.transposed)
        for name, info in model.infos.items()
        if (place := model.found.places.get(name)) is not None
    }


def _notes(model: Gpt2Tensors, parts: Recognised, others: Collection[str]) -> tuple[str, ...]:
    found, notes = model.found, []
    narrow = sorted({info.dtype for info in model.infos.values()} - {_TRAINED_IN})
    if narrow:
        moments = "" if parts.optimizer is None else "; so did its optimizer's moments"
        notes.append(
            f"its {' and '.join(narrow)} weights became {_TRAINED_IN}, which the trainer uses{moments}"
        )
    if found.zeros:
        notes.append(
            f"{len(found.zeros)} biases that it lacks were added as zeros, which does not change the outputs"
        )
    notes += said_of(parts.config)
    if others:
        notes.append(f"left out settings that are not flags of the trainer: {', '.join(others)}")
    masks = _masks(found, parts)
    if masks:
        notes.append(f"left out attention masks, which this model computes: {', '.join(masks)}")
    return tuple(notes)


def _masks(found: Gpt2, parts: Recognised) -> list[str]:
    stored = {ref.name for ref in parts.model.values()} - {place.name for place in found.places.values()}
    return sorted(stored - {found.head})
