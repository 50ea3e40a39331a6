"""`export --format dcp` and its way back: stock DCP reads ours, we read stock DCP's, and no code runs."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from engine import Checkpointer
from engine.convert.checkpoint import CheckpointTensors
from engine.convert.compare import diff_checkpoints
from engine.convert.dcp_stock import write_stock
from engine.convert.export import ExportOptions
from engine.convert.incoming import incoming
from engine.convert.tensors import whole
from engine.errors import DamagedError, StateError
from engine.storage.local import LocalStorage
from tests.support.conversions import export_checkpoint, import_checkpoint
from tests.support.tiny_gpt2 import new_model, new_optimizer, step, train

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("run")
    state, records = train(directory)
    return directory, records[-1].id, state


@pytest.fixture(scope="module")
def exported(trained: tuple[Path, str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("out") / "dcp"
    directory, id, _ = trained
    export_checkpoint(LocalStorage(directory), id, str(target), ExportOptions(format="dcp"))
    return target


def test_plain_dcp_load_reads_it(trained: tuple[Path, str, dict[str, Any]], exported: Path) -> None:
    model = new_model(seed=5)
    optimizer = new_optimizer(model)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "step": 0, "epoch": 0}
    dcp.load(state, checkpoint_id=exported)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert (state["step"], state["epoch"]) == (2, 1)
    theirs = trained[2]
    for (name, one), two in zip(model.named_parameters(), theirs["model"].parameters(), strict=True):
        assert torch.equal(one, two), name
        for field in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[one][field], theirs["optimizer"].state[two][field]), name
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_importing_it_gives_the_same_checkpoint(
    trained: tuple[Path, str, dict[str, Any]], exported: Path, tmp_path: Path
) -> None:
    record, notes = import_checkpoint(str(exported), str(tmp_path / "new"))
    directory, id, _ = trained
    found = diff_checkpoints((LocalStorage(directory), id), (LocalStorage(tmp_path / "new"), record.id))
    assert found.same
    assert (found.values, notes) == ((), ())


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """DCP's writer keeps every tensor until its file is closed: they are emptied behind its back."""
    given: list[torch.Tensor] = []
    held: list[int] = []

    def read(name: str) -> torch.Tensor:
        held.append(sum(tensor.untyped_storage().nbytes() for tensor in given))
        given.append(torch.full((1000,), float(name[-1])))
        return given[-1]

    meta = torch.empty(1000, device="meta")
    write_stock(tmp_path / "out", {f"w{i}": meta for i in range(5)}, read)
    assert held == [0, 0, 0, 0, 0]
    state = {f"w{i}": torch.zeros(1000) for i in range(5)}
    dcp.load(state, checkpoint_id=tmp_path / "out")
    assert [tensor[0].item() for tensor in state.values()] == [0, 1, 2, 3, 4]


def test_reading_fails_as_itself(tmp_path: Path) -> None:
    def stop(name: str) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_stock(tmp_path / "out", {"w": torch.empty(3, device="meta")}, stop)


def test_what_training_scripts_save_is_understood(tmp_path: Path) -> None:
    model = new_model(seed=3)
    optimizer = new_optimizer(model)
    loss = step(model, optimizer)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "step": 9, "val_loss": loss}
    dcp.save({**state, "config": {"n_head": 2}}, checkpoint_id=tmp_path / "theirs")
    record, notes = import_checkpoint(str(tmp_path / "theirs"), str(tmp_path / "new"))
    assert (record.step, record.val_loss) == (9, loss)
    assert any("--allow_data_change" in note for note in notes)
    other = new_model(seed=4)
    into = {"model": other, "optimizer": new_optimizer(other)}
    with Checkpointer(tmp_path / "new", into) as checkpointer:
        assert checkpointer.restore(exclude=["loader", "schedule"]) is not None
    for (name, one), two in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(one, two[1]), name
        assert torch.equal(optimizer.state[one]["exp_avg"], into["optimizer"].state[two[1]]["exp_avg"])


def test_a_bare_model_is_understood(tmp_path: Path) -> None:
    model = new_model(seed=3)
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "theirs")
    with pytest.raises(StateError, match="n_head"):
        import_checkpoint(str(tmp_path / "theirs"), str(tmp_path / "new"))
    linear = torch.nn.Linear(3, 2)
    dcp.save(linear.state_dict(), checkpoint_id=tmp_path / "linear")
    record, notes = import_checkpoint(str(tmp_path / "linear"), str(tmp_path / "new"))
    assert any("not a GPT-2" in note for note in notes)
    assert any("only a model" in note for note in notes)
    with CheckpointTensors(LocalStorage(tmp_path / "new"), record.id) as source:
        assert source.infos.keys() == {"model.weight", "model.bias"}
        assert torch.equal(whole(source, "model.weight"), linear.weight)


@pytest.mark.parametrize(
    "boxes",
    [
        [((0, 0), (3, 3)), ((3, 0), (1, 3))],
        [((3, 0), (1, 3)), ((0, 0), (3, 3))],
        [((0, 0), (4, 1)), ((0, 1), (4, 2))],
    ],
    ids=["rows", "rows out of order", "columns"],
)
def test_a_tensor_in_boxes_is_put_together(tmp_path: Path, boxes: Any) -> None:
    """A directory as several ranks leave it, made from one that a single process saved."""
    tensor = torch.arange(12.0).reshape(4, 3)
    dcp.save({"w": tensor}, checkpoint_id=tmp_path / "x")
    pieces = []
    for (row, column), (rows, columns) in boxes:
        piece = io.BytesIO()
        torch.save(tensor[row : row + rows, column : column + columns].clone(), piece)
        pieces.append(piece.getvalue())
    (tmp_path / "x" / "__0_0.distcp").write_bytes(b"".join(pieces))

    def change(metadata: Metadata) -> None:
        (info,) = metadata.storage_data.values()
        chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in boxes]
        metadata.state_dict_metadata["w"].chunks = chunks
        metadata.storage_data = {
            MetadataIndex("w", chunk.offsets, number): dataclasses.replace(
                info, offset=sum(map(len, pieces[:number])), length=len(pieces[number])
            )
            for number, chunk in enumerate(chunks)
        }

    rewritten(tmp_path / "x", change)
    with incoming(str(tmp_path / "x")) as found:
        assert torch.equal(whole(found.tensors, "w"), tensor)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_metadata_that_would_run_code_is_refused(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "x")
    (tmp_path / "x" / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "hacked")))
    with pytest.raises(DamagedError, match=r"posix.mkdir"):
        import_checkpoint(str(tmp_path / "x"), str(tmp_path / "new"))
    assert not (tmp_path / "hacked").exists()
    assert not (tmp_path / "new").exists()


def test_a_value_that_would_run_code_is_left_out_by_name(tmp_path: Path) -> None:
    state = {"model": {"w": torch.ones(2)}, "loader": Evil(tmp_path / "hacked")}
    dcp.save(state, checkpoint_id=tmp_path / "x")
    _, notes = import_checkpoint(str(tmp_path / "x"), str(tmp_path / "new"))
    assert not (tmp_path / "hacked").exists()
    assert notes[-1].startswith("left out: loader (a pickle that would run code; --trust_pickle loads it")
    import_checkpoint(str(tmp_path / "x"), str(tmp_path / "new"), trust_pickle=True)
    assert (tmp_path / "hacked").exists()


def rewritten(folder: Path, change: Any) -> Path:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.state_dict_metadata["w"].chunks.pop(), "do not cover its shape"),
        (lambda m: m.storage_data.clear(), "does not say where w is stored"),
        (lambda m: setattr(next(iter(m.storage_data.values())), "relative_path", "../x"), "would leave"),
        (lambda m: setattr(next(iter(m.storage_data.values())), "length", 3), "does not fit 3 bytes"),
        (lambda m: setattr(next(iter(m.storage_data.values())), "length", 10**6), "truncated"),
        (lambda m: setattr(m.state_dict_metadata["w"], "size", torch.Size([2**40])), "do not cover"),
    ],
    ids=["hole", "nowhere", "escape", "short", "truncated", "huge"],
)
def test_metadata_that_does_not_fit_is_damage(tmp_path: Path, change: Any, words: str) -> None:
    dcp.save({"w": torch.ones(2), "b": torch.ones(2)}, checkpoint_id=tmp_path / "x")
    rewritten(tmp_path / "x", change)
    with pytest.raises(DamagedError, match=words):
        import_checkpoint(str(tmp_path / "x"), str(tmp_path / "new"))


def test_metadata_of_something_else_is_damage(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    for raw in (b"", b"garbage", pickle.dumps({"a": 1})):
        (tmp_path / "x" / ".metadata").write_bytes(raw)
        with pytest.raises(DamagedError, match="is not the metadata"):
            import_checkpoint(str(tmp_path / "x"), str(tmp_path / "new"))


def test_stock_pickles_load_as_they_are() -> None:
    """Our stand-in for DCP's private `_StorageInfo` has its fields; this notices when they move."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    info = _StorageInfo("a", 1, 2)
    assert {"relative_path", "offset", "length"} <= set(vars(info))
    assert pickle.loads(pickle.dumps(info)) == info
