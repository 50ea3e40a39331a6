"""`export --format hf`: what transformers loads computes what our model computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engine import Checkpointer
from engine.convert.export import ExportOptions
from engine.convert.safetensors_out import Entry, split, write_file
from engine.convert.tensors import windows_of
from engine.errors import ConfigError, StateError
from engine.format.manifest import TensorInfo
from engine.storage.local import LocalStorage
from model.config import GPT2Config
from model.gpt2 import GPT2
from tests.support.conversions import export_checkpoint
from tests.support.tiny_gpt2 import TINY, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, GPT2]:
    directory = tmp_path_factory.mktemp("run")
    state, records = train(directory)
    return directory, records[-1].id, state["model"].eval()


def export(trained: tuple[Path, str, GPT2], target: Path, **options: Any) -> None:
    directory, id, _ = trained
    given = ExportOptions(format="hf", **options)
    export_checkpoint(LocalStorage(directory), id, str(target), given)


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(tokens)
    return found[0] if isinstance(found, tuple) else found.logits


@pytest.mark.parametrize("shard_bytes", [None, 10_000])
def test_transformers_computes_the_same(
    trained: tuple[Path, str, GPT2], tmp_path: Path, shard_bytes: int | None
) -> None:
    transformers = pytest.importorskip("transformers")
    export(trained, tmp_path / "out", **({"shard_bytes": shard_bytes} if shard_bytes else {}))
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    tokens = torch.randint(0, TINY.vocab_size, (3, TINY.block_size))
    ours = logits(trained[2], tokens)
    assert ours.std() > 0.01
    torch.testing.assert_close(logits(theirs, tokens), ours, rtol=0, atol=1e-5)
    assert theirs.config.n_head == TINY.n_head


def test_without_transformers_the_files_say_the_same(trained: tuple[Path, str, GPT2], tmp_path: Path) -> None:
    export(trained, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    ours = dict(trained[2].named_parameters())
    assert stored.keys() == ours.keys()
    for name, parameter in ours.items():
        linear = name.endswith("weight") and ".c_" in name
        assert torch.equal(stored[name], parameter.t() if linear else parameter), name
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["model_type"] == "gpt2"
    assert (settings["n_layer"], settings["n_head"], settings["n_embd"]) == (2, 2, 16)
    assert (settings["n_positions"], settings["vocab_size"], settings["eos_token_id"]) == (12, 257, 256)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "merges.txt",
        "model.safetensors",
        "tokenizer_config.json",
        "vocab.json",
    }


def test_above_the_limit_there_are_several_files_and_an_index(
    trained: tuple[Path, str, GPT2], tmp_path: Path
) -> None:
    export(trained, tmp_path / "out", shard_bytes=10_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    total = 0
    for file in files:
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            held = [opened.get_tensor(name) for name in opened.keys()]  # noqa: SIM118 - no dict
            assert {n for n, f in index["weight_map"].items() if f == file} == set(opened.keys())
        bytes = sum(tensor.numel() * 4 for tensor in held)
        assert bytes <= 10_000 or len(held) == 1
        total += bytes
    assert index["metadata"]["total_size"] == total
    assert index["weight_map"].keys() == dict(trained[2].named_parameters()).keys()


@pytest.mark.parametrize(("option", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_dtype_converts_every_weight(
    trained: tuple[Path, str, GPT2], tmp_path: Path, option: str, dtype: torch.dtype
) -> None:
    export(trained, tmp_path / "out", dtype=option)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, parameter in trained[2].named_parameters():
        linear = name.endswith("weight") and ".c_" in name
        assert torch.equal(stored[name], (parameter.t() if linear else parameter).to(dtype)), name
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_a_model_that_is_no_gpt2_is_refused(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run", {"model": torch.nn.Linear(2, 2)}) as checkpointer:
        record = checkpointer.save(1).result()
    assert record is not None
    with pytest.raises(StateError, match="is not a GPT-2"):
        export((tmp_path / "run", record.id, new := GPT2(TINY)), tmp_path / "out")
    assert new is not None
    assert not (tmp_path / "out").exists()


def test_heads_that_nothing_tells_are_asked_for(tmp_path: Path) -> None:
    state, records = train(tmp_path / "run", steps=1, run_config={"model": "nano"})
    with pytest.raises(StateError, match=r"2 layers of width 16 match no preset.*n_head"):
        export((tmp_path / "run", records[0].id, state["model"]), tmp_path / "out")


def test_a_preset_tells_the_heads(tmp_path: Path) -> None:
    shape = GPT2Config(n_layer=4, n_head=4, n_embd=128, vocab_size=257, block_size=8)
    state, records = train(tmp_path / "run", steps=1, config=shape, run_config={"model": "nano"})
    export((tmp_path / "run", records[0].id, state["model"]), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["n_head"] == 4


@pytest.mark.parametrize("given", [{"format": "onnx"}, {"format": "hf", "dtype": "int8"}])
def test_options_that_cannot_work(given: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="must be one of"):
        ExportOptions(**given)  # type: ignore[arg-type]


def entry(name: str, tensor: torch.Tensor, dtype: str) -> Entry:
    return Entry(name, TensorInfo(dtype, tuple(tensor.shape)), lambda: windows_of(tensor))


def test_files_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "odd": torch.arange(3, dtype=torch.uint8),
        "half": torch.arange(5, dtype=torch.bfloat16),
        "matrix": torch.arange(12, dtype=torch.float64).reshape(3, 4),
    }
    dtypes = {"scalar": "F32", "empty": "F32", "odd": "U8", "half": "BF16", "matrix": "F64"}
    done: list[int] = []
    write_file(tmp_path / "a", [entry(n, t, dtypes[n]) for n, t in tensors.items()], done.append)
    save_file(tensors, tmp_path / "b", {"format": "pt"})
    for file in ("a", "b"):
        found = load_file(tmp_path / file)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert sum(done) == sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize(
    ("sizes", "most", "shards"),
    [
        ([4, 4, 4], 12, [3]),
        ([4, 4, 4], 8, [2, 1]),
        ([20, 4], 8, [1, 1]),
        ([4, 20, 4], 8, [1, 1, 1]),
        ([], 8, [0]),
    ],
)
def test_splitting(sizes: list[int], most: int, shards: list[int]) -> None:
    entries = [entry(str(i), torch.zeros(size, dtype=torch.uint8), "U8") for i, size in enumerate(sizes)]
    assert [len(shard) for shard in split(entries, most)] == shards
