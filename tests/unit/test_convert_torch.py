"""`export --format torch`: a `.pt` that torch loads without running code, and that goes on training."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine import Checkpointer
from engine.convert.compare import diff_checkpoints
from engine.convert.export import ExportOptions
from engine.convert.state_tree import TensorRef
from engine.convert.torch_file import _pickled
from engine.format.manifest import TensorInfo
from engine.storage.local import LocalStorage
from model.gpt2 import GPT2
from tests.support.conversions import export_checkpoint, import_checkpoint
from tests.support.tiny_gpt2 import CONFIG, TINY, new_optimizer, step, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("run")
    state, records = train(directory)
    return directory, records[-1].id, state


def export(trained: tuple[Path, str, Any], target: Path, **options: Any) -> None:
    directory, id, _ = trained
    export_checkpoint(LocalStorage(directory), id, str(target), ExportOptions(format="torch", **options))


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_it(trained: tuple[Path, str, dict[str, Any]], tmp_path: Path, mmap: bool) -> None:
    export(trained, tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=True, mmap=mmap)
    state = trained[2]
    assert {"model", "optimizer", "step", "epoch", "val_loss", "rng_state", "config"} <= found.keys()
    assert (found["step"], found["epoch"], found["tokens"], found["config"]) == (2, 1, 48, CONFIG)
    assert isinstance(found["val_loss"], float)
    assert found["counter"] == state["counter"].state_dict()
    assert found["model"].keys() == state["model"].state_dict().keys()
    for name, parameter in state["model"].state_dict().items():
        assert torch.equal(found["model"][name], parameter), name


def test_training_goes_on_from_it(trained: tuple[Path, str, dict[str, Any]], tmp_path: Path) -> None:
    export(trained, tmp_path / "out")
    found = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    model = GPT2(TINY)
    model.load_state_dict(found["model"])
    optimizer = new_optimizer(model)
    optimizer.load_state_dict(found["optimizer"])
    twin = GPT2(TINY)
    twin.load_state_dict(trained[2]["model"].state_dict())
    twin_optimizer = new_optimizer(twin)
    twin_optimizer.load_state_dict(trained[2]["optimizer"].state_dict())
    torch.set_rng_state(found["rng_state"])
    loss = step(model, optimizer)
    torch.set_rng_state(found["rng_state"])
    assert step(twin, twin_optimizer) == loss
    for (name, one), two in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_the_file_is_a_clean_zip(trained: tuple[Path, str, dict[str, Any]], tmp_path: Path) -> None:
    export(trained, tmp_path / "out.pt")
    with zipfile.ZipFile(tmp_path / "out.pt") as archive:
        assert archive.testzip() is None
        for info in archive.infolist():
            assert info.compress_type == zipfile.ZIP_STORED
            with open(tmp_path / "out.pt", "rb") as file:
                file.seek(info.header_offset + 26)
                name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
            assert (info.header_offset + 30 + name + extra) % 64 == 0, info.filename


def test_equal_checkpoints_give_equal_files(
    trained: tuple[Path, str, dict[str, Any]], tmp_path: Path
) -> None:
    for name in ("a.pt", "b.pt"):
        export(trained, tmp_path / name)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_model_only(trained: tuple[Path, str, dict[str, Any]], tmp_path: Path) -> None:
    export(trained, tmp_path / "out.pt", model_only=True, dtype="bf16")
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert not {"optimizer", "counter", "rng_state"} & found.keys()
    assert found["step"] == 2
    for name, parameter in trained[2]["model"].state_dict().items():
        assert torch.equal(found["model"][name], parameter.bfloat16()), name


def test_dtype_leaves_the_optimizer_alone(trained: tuple[Path, str, dict[str, Any]], tmp_path: Path) -> None:
    export(trained, tmp_path / "out.pt", dtype="bf16")
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert {tensor.dtype for tensor in found["model"].values()} == {torch.bfloat16}
    assert found["optimizer"]["state"][0]["exp_avg"].dtype == torch.float32


def test_importing_it_gives_the_same_checkpoint(
    trained: tuple[Path, str, dict[str, Any]], tmp_path: Path
) -> None:
    directory, id, _ = trained
    export(trained, tmp_path / "out")
    record, notes = import_checkpoint(str(tmp_path / "out"), str(tmp_path / "new"))
    found = diff_checkpoints((LocalStorage(directory), id), (LocalStorage(tmp_path / "new"), record.id))
    assert found.same
    assert len(found.common) > 80
    assert (found.values, notes) == ((), ())
    assert (record.reasons, record.step, record.tokens) == (("import",), 2, 48)


class Around(torch.optim.SGD):
    """Keeps another optimizer, and state of every kind."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1, momentum=0.9)
        self.base_optimizer = torch.optim.SGD(self.param_groups)
        first, second = self.param_groups[0]["params"]
        self.state["global"] = {"count": 3, "ema": torch.arange(3.0)}
        self.state[5] = [torch.ones(2)]
        self.state[first] = {0: {"exp_avg": torch.full((2,), 2.0)}, 1: torch.zeros(1)}
        self.state[second] = {"a.b": torch.ones(2), "history": [torch.zeros(2), None]}


def test_everything_that_an_optimizer_keeps_survives_export_and_import(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = Around(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.base_optimizer.step()
    with Checkpointer(tmp_path / "run", {"model": model, "optimizer": optimizer}) as checkpointer:
        id = checkpointer.save(1).result(60).id
    export_checkpoint(
        LocalStorage(tmp_path / "run"), id, str(tmp_path / "out"), ExportOptions(format="torch")
    )
    found = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["optimizer"]["state"]
    assert found["global"]["count"] == 3
    assert found[0][0]["exp_avg"].tolist() == [2, 2]
    record, _ = import_checkpoint(str(tmp_path / "out"), str(tmp_path / "new"))
    difference = diff_checkpoints(
        (LocalStorage(tmp_path / "run"), id), (LocalStorage(tmp_path / "new"), record.id)
    )
    assert difference.same
    assert any(".inner.base_optimizer.state." in tensor.name for tensor in difference.common)


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_and_shape(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    """The private functions that a `.pt` names have to be where torch's own loader looks for them."""
    ref = TensorRef("w", TensorInfo(name, shape))
    path = tmp_path / "out.pt"
    raw = bytes(range(1, 1 + ref.info.tensor_bytes)) if name != "BOOL" else b"\1" * ref.info.tensor_bytes
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", _pickled({"a": ref, "b": [ref]}, [ref]))
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/data/0", raw)
        archive.writestr("archive/version", b"3\n")
    found = torch.load(path, weights_only=True)
    assert (found["a"].dtype, tuple(found["a"].shape)) == (DTYPES[name], shape)
    assert bytes(found["a"].reshape(-1).view(torch.uint8).numpy()) == raw
    assert found["b"][0].data_ptr() == found["a"].data_ptr()
