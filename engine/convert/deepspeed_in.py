"""DeepSpeed's checkpoints: without ZeRO and with ZeRO-1 and 2, one file has the weights; with others, none.

The layout follows deepspeed/runtime/engine.py (save_checkpoint) and deepspeed/utils/zero_to_fp32.py.
"""

from __future__ import annotations

from pathlib import Path

from engine.convert.elsewhere import TO_TRANSFORMERS
from engine.convert.opened import Opened
from engine.convert.pt_in import open_pt
from engine.convert.recognise import ZERO_TO_FP32
from engine.errors import StateError

_LATEST = "latest"
MODEL = "mp_rank_00_model_states.pt"
_MODELS = "*model_states.pt"
_OPTIMIZERS = "*_optim_states.pt"
_MOST_NAME_BYTES = 256


def deepspeed_folder(path: Path) -> Path | None:
    """The folder of a DeepSpeed checkpoint: `path`, or the folder that its file `latest` names."""
    if _is_one(path):
        return path
    name = latest_folder(path)
    return path / name if name is not None and _is_one(path / name) else None


def latest_folder(path: Path) -> str | None:
    """The folder named in DeepSpeed's file `latest`, if there is one."""
    latest = path / _LATEST
    if not latest.is_file() or latest.stat().st_size > _MOST_NAME_BYTES:
        return None
    name = latest.read_text(errors="replace").strip()
    return name if name.isprintable() and name not in ("", ".", "..") and "/" not in name else None


def open_deepspeed(folder: Path, trust_pickle: bool) -> Opened:
    """The weights and the counters of a DeepSpeed checkpoint.

    Raises: StateError if the weights are not in one file, with the command that merges them, or if loading
        would run code and `trust_pickle` is not set; DamagedError; OSError.
    """
    files = sorted(file.name for file in folder.glob(_MODELS))
    _refuse_parts(folder, files)
    tree, tensors, notes = open_pt(folder / MODEL, trust_pickle=trust_pickle)
    partitions = sorted(file.name for file in folder.glob(_OPTIMIZERS))
    if not partitions:
        return Opened("pt", tree, tensors, notes)
    said = (
        f"DeepSpeed ZeRO keeps the optimizer and the float32 weights in {len(partitions)} partitions, which "
        f"were not read: the weights have the type the model computes in. For float32: {ZERO_TO_FP32}"
    )
    kept = {key: value for key, value in tree.items() if value is not None}
    return Opened("pt", kept, tensors, (*notes, said), tuple(partitions))


def _is_one(path: Path) -> bool:
    return path.is_dir() and any(path.glob(_MODELS))


def _refuse_parts(folder: Path, files: list[str]) -> None:
    if any(name.startswith("zero_pp_rank_") for name in files):
        raise StateError(
            f"{folder} is a DeepSpeed ZeRO-3 checkpoint: its weights are split among the ranks' files. "
            f"{ZERO_TO_FP32}"
        )
    if any("_expert_" in name for name in files):
        raise StateError(
            f"{folder} is a DeepSpeed mixture-of-experts checkpoint, whose experts are in separate files. "
            "Gather the state_dict in the job, torch.save it, and import that"
        )
    if any(name.startswith("layer_") for name in files):
        raise StateError(
            f"{folder} is a DeepSpeed pipeline checkpoint, whose layers are in separate files. "
            f"{TO_TRANSFORMERS}"
        )
    if files != [MODEL]:
        raise StateError(
            f"{folder} is a DeepSpeed checkpoint in {len(files)} tensor-parallel parts "
            f"({', '.join(files[:4])}). "
            f"{TO_TRANSFORMERS}"
        )
