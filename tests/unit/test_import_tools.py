"""What scripts save, and the layouts of tools that are not at hand here, as their sources write them.

Sources: torchtitan/components/checkpoint.py, deepspeed/runtime/engine.py, megatron/training/checkpointing.py.
"""

from __future__ import annotations

import argparse
import io
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file, save_model
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from engine import Checkpointer, CheckpointRecord
from engine.convert.checkpoint import CheckpointTensors
from engine.convert.export import ExportOptions
from engine.convert.incoming import incoming
from engine.convert.tensors import whole
from engine.directory.listing import read_manifest
from engine.errors import ConfigError, DamagedError, StateError
from engine.format.manifest import Manifest
from engine.storage.local import LocalStorage
from tests.support.conversions import export_checkpoint, import_checkpoint
from tests.support.tiny_gpt2 import new_model, new_optimizer, step

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def net(seed: int = 0) -> nn.Sequential:
    """Layers of equal shapes: what would be mixed up if names were guessed."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))


def trained(module: nn.Module, *groups: dict[str, Any], steps: int = 2) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(groups or module.parameters(), lr=1e-2)
    for _ in range(steps):
        module(torch.randn(2, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def take(source: Path, **options: Any) -> tuple[CheckpointRecord, Manifest, str]:
    """(record, manifest, notes) of what was imported beside its source."""
    record, notes = import_checkpoint(str(source), str(source.parent / "new"), **options)
    return record, read_manifest(LocalStorage(source.parent / "new"), record.id), "\n".join(notes)


def assert_restores(directory: Path, module: nn.Module, optimizer: torch.optim.Optimizer, fresh: Any) -> None:
    """Strictly, into freshly built objects: weights, moments, steps and hyperparameters bit for bit."""
    model, other = fresh
    with Checkpointer(directory, {"model": model, "optimizer": other}) as checkpointer:
        assert checkpointer.restore("latest") is not None
    for one, two in zip(module.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, two)
        for name, value in optimizer.state[one].items():
            assert torch.equal(value, other.state[two][name]), name
    for mine, yours in zip(optimizer.param_groups, other.param_groups, strict=True):
        assert {k: v for k, v in mine.items() if k != "params"} == {
            k: v for k, v in yours.items() if k != "params"
        }


def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
    module = net(9)
    return module, torch.optim.AdamW(module.parameters(), lr=1)


class Loader:
    """A data loader's state that only a pickle holds."""

    def __init__(self) -> None:
        self.position = 5


def titan(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    losses = io.BytesIO()
    torch.save([1.0], losses)
    return {
        **get_model_state_dict(module),
        "optimizer": get_optimizer_state_dict(module, optimizer, options=flat),
        "lr_scheduler": {"last_epoch": 3},
        "dataloader": {"dp_rank_0": Loader(), "world_size": 1},
        "train_state": {
            "step": torch.tensor(77, dtype=torch.int32),
            "ntokens_seen": torch.tensor(12345),
            "global_avg_losses": losses,
        },
    }


@pytest.mark.parametrize("wrapped", [False, True], ids=["top level", "under model"])
@pytest.mark.parametrize("trust", [False, True])
def test_torchtitan(tmp_path: Path, trust: bool, wrapped: bool) -> None:
    module = net()
    optimizer = trained(module)
    state = titan(module, optimizer)
    if wrapped:
        names = list(module.state_dict())
        state = {"model": {name: state.pop(name) for name in names}, **state}
    dcp.save(state, checkpoint_id=tmp_path / "step-77")
    record, _, notes = take(tmp_path / "step-77", trust_pickle=trust)
    assert (record.step, record.tokens) == (77, 12345)
    assert "left out: lr_scheduler, dataloader" in notes
    assert "train_state.global_avg_losses" in notes
    assert ("dp_rank_0: a pickle that would run code; --trust_pickle loads it" in notes) == (not trust)
    assert_restores(tmp_path / "new", module, optimizer, fresh())


def test_torchtitans_groups_come_back(tmp_path: Path) -> None:
    def groups(module: Any, scale: float) -> list[dict[str, Any]]:
        return [{"params": module[0].parameters(), "lr": scale}, {"params": module[1:].parameters()}]

    module = net()
    optimizer = trained(module, *groups(module, 0.5))
    dcp.save(titan(module, optimizer), checkpoint_id=tmp_path / "x")
    take(tmp_path / "x")
    other = net(9)
    assert_restores(tmp_path / "new", module, optimizer, (other, torch.optim.AdamW(groups(other, 1), lr=1)))


def test_a_dcp_directory_with_numbered_parameters(tmp_path: Path) -> None:
    """Numbers, and no order of names: only layers whose shapes differ are known."""
    for name, module in (("equal", net()), ("unequal", nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))):
        optimizer = trained(module)
        state = {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "step": 2}
        dcp.save(state, checkpoint_id=tmp_path / name)
    _, manifest, notes = take(tmp_path / "equal")
    assert "its optimizer was left out: it numbers its 6 parameters" in notes
    assert not manifest.objects
    take(tmp_path / "unequal")
    other = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    into = (other, torch.optim.AdamW(other.parameters(), lr=1))
    assert_restores(tmp_path / "new", module, optimizer, into)


def deepspeed(folder: Path, module: nn.Module, **more: Any) -> Path:
    """The weights' file of DeepSpeed without model parallelism."""
    step = folder / "global_step40"
    step.mkdir(parents=True)
    (folder / "latest").write_text("global_step40")
    shapes = OrderedDict((name, p.shape) for name, p in module.named_parameters())
    document = {
        "module": module.state_dict(),
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [shapes],
        "lr_scheduler": None,
        "skipped_steps": 0,
        "global_steps": 40,
        "global_samples": 640,
        "dp_world_size": 2,
        "mp_world_size": 1,
        "ds_config": {"train_batch_size": 16},
        "ds_version": "0.17.0",
        **more,
    }
    torch.save(document, step / "mp_rank_00_model_states.pt")
    return step


@pytest.mark.parametrize("inner", [False, True], ids=["directory", "its step"])
@pytest.mark.parametrize("prefix", ["", "bf16_"])
def test_deepspeed_zero_1_and_2(tmp_path: Path, prefix: str, inner: bool) -> None:
    module = net().bfloat16()
    step = deepspeed(tmp_path / "ds", module)
    for rank in range(2):
        (step / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").write_bytes(b"not read")
    record, manifest, notes = take(step if inner else tmp_path / "ds")
    assert record.step == 40
    assert {info.dtype for info in manifest.tensors.values()} == {"BF16"}
    assert "left out: " in notes
    for name in ("global_samples", "ds_config", f"{prefix}zero_pp_rank_1_mp_rank_00_optim_states.pt"):
        assert name in notes.partition("left out: ")[2]
    assert "python zero_to_fp32.py" in notes
    with CheckpointTensors(LocalStorage(record.path.rpartition("/")[0]), record.id) as source:
        for name, tensor in module.state_dict().items():
            assert torch.equal(whole(source, f"model.{name}"), tensor)


def test_deepspeed_without_zero_has_its_optimizer(tmp_path: Path) -> None:
    module = net()
    optimizer = trained(module)
    deepspeed(tmp_path / "ds", module, optimizer=optimizer.state_dict())
    record, _, _ = take(tmp_path / "ds")
    assert record.step == 40
    assert_restores(tmp_path / "new", module, optimizer, fresh())


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["zero_pp_rank_0_mp_rank_00_model_states.pt"], "DeepSpeed ZeRO-3.*python zero_to_fp32.py"),
        (
            ["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"],
            "DeepSpeed checkpoint in 2 tensor-parallel.*deepspeed_to_transformers.py",
        ),
        (
            ["layer_00-model_00-model_states.pt", "mp_rank_00_model_states.pt"],
            "DeepSpeed pipeline checkpoint.*deepspeed_to_transformers.py",
        ),
        (["layer_0_expert_0_mp_rank_00_model_states.pt"], "DeepSpeed mixture-of-experts checkpoint"),
        (["zero/w/fp32.pt"], "DeepSpeed universal"),
        (["latest_checkpointed_iteration.txt"], "Megatron-LM.*tools/checkpoint/convert.py"),
        (["mp_rank_00/model_optim_rng.pt"], "Megatron-LM.*tools/checkpoint/convert.py"),
        (["common.pt", ".metadata"], "Megatron-Core.*--ckpt-convert-format torch"),
        (["model_index.json"], "diffusers pipeline.*unet/"),
        (["_CHECKPOINT_METADATA"], "Orbax"),
        (["flax_model.msgpack"], "Flax.*from_flax=True"),
        (["tf_model.h5"], "TensorFlow.*from_tf=True"),
        (["model_config.yaml", "model_weights.ckpt"], "NeMo.*nemo llm export"),
        (["context/io.json", "weights/common.pt"], "NeMo.*nemo llm export"),
    ],
)
def test_what_its_tool_has_to_put_together_is_refused_by_name(
    tmp_path: Path, files: list[str], words: str
) -> None:
    for file in files:
        path = tmp_path / "x" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"?")
    with pytest.raises(StateError, match=words):
        import_checkpoint(str(tmp_path / "x"), str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_zero_3s_empty_tensors_are_refused_wherever_they_are(tmp_path: Path) -> None:
    """Small parameters are whole in such a state dict: one empty weight is enough."""
    weights = {"a.weight": torch.empty(0), "a.bias": torch.ones(2)}
    torch.save({"state_dict": weights}, tmp_path / "a.ckpt")
    save_file(weights, tmp_path / "a.safetensors")
    for name in ("a.ckpt", "a.safetensors"):
        with pytest.raises(StateError, match=r"empty tensors \(a.weight.*ZeRO-3.*python zero_to_fp32.py"):
            import_checkpoint(str(tmp_path / name), str(tmp_path / "new"))


def test_fsdps_flattened_shards_are_refused(tmp_path: Path) -> None:
    torch.save({"model": {"_fsdp_wrapped_module._flat_param": torch.ones(9)}}, tmp_path / "a.pt")
    with pytest.raises(StateError, match=r"FSDP's flattened shards.*FULL_STATE_DICT"):
        import_checkpoint(str(tmp_path / "a.pt"), str(tmp_path / "new"))


def test_every_key_is_taken_or_named(tmp_path: Path) -> None:
    module = net()
    optimizer = trained(module)
    document = {
        "model_state_dict": module.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "epoch": 3,
        "loss": torch.tensor(0.5),
        "best_accuracy": 0.75,
        "best_acc1": torch.tensor(0.25),
        "ema": {"w": torch.ones(2)},
        "scheduler": {"last_epoch": 1},
        "amp": None,
        "note": "hello",
        "rng": torch.ones(3),
        "args": {"lr": 0.1, "odd": [None, {1, 2}]},
    }
    torch.save(document, tmp_path / "a.pt")
    record, manifest, notes = take(tmp_path / "a.pt", trust_pickle=True)
    assert (record.step, record.epoch) == (2, 3)
    assert "2 is its optimizer's count" in notes
    assert record.metrics == {"loss": 0.5, "best_accuracy": 0.75, "best_acc1": 0.25}
    assert manifest.config == {"lr": 0.1}
    left = notes.partition("left out: ")[2].split(", ")
    assert left == ["ema", "scheduler", "amp", "note", "rng", "args.odd"]
    assert_restores(tmp_path / "new", module, optimizer, fresh())


@pytest.mark.parametrize(
    ("document", "step", "loss"),
    [
        ({"step": torch.tensor(7), "val_loss": torch.tensor(0.5)}, 7, 0.5),
        ({"step": torch.tensor([7]), "val_loss": torch.tensor(0.5, dtype=torch.float64)}, 7, 0.5),
        ({"global_step": 7.0, "best_val_loss": 0.5}, 7, 0.5),
        ({"iteration": torch.tensor(7.0), "val_loss": torch.tensor(0.5, dtype=torch.bfloat16)}, 7, 0.5),
    ],
)
@pytest.mark.parametrize("bare", [False, True], ids=["nested", "bare"])
def test_tensors_of_one_element_are_numbers(
    tmp_path: Path, document: dict[str, Any], step: int, loss: float, bare: bool
) -> None:
    weights = {"w": torch.ones(2)}
    torch.save({**document, **(weights if bare else {"model": weights})}, tmp_path / "a.pt")
    record, manifest, notes = take(tmp_path / "a.pt")
    assert (record.step, record.val_loss) == (step, loss)
    assert manifest.tensors.keys() == {"model.w"}
    assert "left out" not in notes
    tensors = [key for key, value in document.items() if isinstance(value, torch.Tensor)]
    for key in tensors:
        assert (f"its tensor '{key}' was read as the training's {key}" in notes) is bare


def test_tensors_that_cannot_be_held_are_named(tmp_path: Path) -> None:
    weights = {
        "w": torch.ones(2),
        "sparse": torch.eye(2).to_sparse(),
        "wide": torch.ones(2, dtype=torch.complex128),
        "quantised": torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "_extra_state": {"a": 1},
        "kind": "x",
    }
    torch.save({"model": weights, "step": 1}, tmp_path / "a.pt")
    _, manifest, notes = take(tmp_path / "a.pt")
    assert manifest.tensors.keys() == {"model.w"}
    for words in (
        "model.sparse (a sparse tensor (sparse_coo))",
        "model.wide (a tensor of torch.complex128)",
        "model.quantised (a tensor of torch.qint8)",
        "model.nested (a nested tensor)",
        "model._extra_state.a",
        "model.kind",
    ):
        assert words in notes
    dcp.save({"model": {"w": weights["w"], "wide": weights["wide"]}}, checkpoint_id=tmp_path / "dcp")
    assert "model.wide (a tensor of torch.complex128)" in take(tmp_path / "dcp")[2]


def test_tied_weights_stay_one_tensor(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embedding.weight

    module = Tied()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    module.head(module.embedding(torch.tensor([1, 2]))).sum().backward()
    optimizer.step()
    torch.save({"model": module.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    _, manifest, _ = take(tmp_path / "a.pt")
    assert manifest.aliases == {"model.head.weight": "model.embedding.weight"}
    other = Tied()
    into = (other, torch.optim.SGD(other.parameters(), lr=1, momentum=0.5))
    assert_restores(tmp_path / "new", module, optimizer, into)
    save_model(module, tmp_path / "a.safetensors")
    _, manifest, _ = take(tmp_path / "a.safetensors")
    assert len(manifest.tensors) == len(manifest.aliases) == 1


@pytest.mark.parametrize(
    "prefix", ["model.", "net._forward_module.", "_orig_mod.", "module.", "model.model.", "lm."]
)
def test_prefixes_that_all_names_share_go_and_it_is_said(tmp_path: Path, prefix: str) -> None:
    module = new_model(seed=3)
    weights = {f"{prefix}{name}": tensor for name, tensor in module.state_dict().items()}
    torch.save({"state_dict": weights, "hyper_parameters": {"n_head": 2}}, tmp_path / "a.ckpt")
    record, manifest, notes = take(tmp_path / "a.ckpt")
    assert {f"model.{name}" for name in module.state_dict()} == manifest.tensors.keys()
    for part in prefix.split("."):
        assert part in notes
    with CheckpointTensors(LocalStorage(tmp_path / "new"), record.id) as source:
        for name, tensor in module.state_dict().items():
            assert torch.equal(whole(source, f"model.{name}"), tensor)


def test_a_transposed_gpt2_in_a_pt_file_has_transposed_moments(tmp_path: Path) -> None:
    """Also of square matrices, whose shapes do not tell."""
    transformers = pytest.importorskip("transformers")
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 16, "n_positions": 4}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.tensor([[1, 2, 3]])
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    document = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "config": {"n_head": 2}}
    torch.save(document, tmp_path / "a.pt")
    record, _, _ = take(tmp_path / "a.pt")
    with CheckpointTensors(LocalStorage(tmp_path / "new"), record.id) as source:
        for name, parameter in model.named_parameters():
            moment = optimizer.state[parameter]["exp_avg"]
            wanted = moment.t() if ".c_" in name and moment.ndim == 2 else moment
            assert torch.equal(whole(source, f"optimizer.state.{name}.exp_avg"), wanted), name


def test_several_files_are_listed(tmp_path: Path) -> None:
    for name in ("a.pt", "b.ckpt"):
        torch.save({"w": torch.ones(1)}, tmp_path / name)
    with pytest.raises(ConfigError, match=r"several files.*a\.pt, b\.ckpt.*give one of them"):
        import_checkpoint(str(tmp_path), str(tmp_path / "new"))


def test_two_optimizers_are_named(tmp_path: Path) -> None:
    module = net()
    states = [trained(module).state_dict(), trained(module).state_dict()]
    torch.save({"state_dict": module.state_dict(), "optimizer_states": states}, tmp_path / "a.ckpt")
    _, manifest, notes = take(tmp_path / "a.ckpt")
    assert not manifest.objects
    assert "left out: optimizer_states" in notes


def test_accelerates_fsdp_directory(tmp_path: Path) -> None:
    """Model and optimizer are DCP directories of their own, side by side."""
    module = net()
    optimizer = trained(module)
    folder = tmp_path / "state"
    dcp.save({"model": get_model_state_dict(module)}, checkpoint_id=folder / "pytorch_model_fsdp_0")
    states = get_optimizer_state_dict(module, optimizer)
    dcp.save({"optimizer": states}, checkpoint_id=folder / "optimizer_0")
    torch.save({"step": 0}, folder / "random_states_0.pkl")
    record, _, notes = take(folder)
    assert record.step == 2
    assert notes.splitlines()[-1] == "left out: random_states_0.pkl"
    assert_restores(tmp_path / "new", module, optimizer, fresh())


def test_lightnings_sharded_directory(tmp_path: Path) -> None:
    """Model and optimizers by DCP, and everything else in a file beside them."""
    module = net()
    optimizer = trained(module)
    model = {f"net.{name}": tensor for name, tensor in get_model_state_dict(module).items()}
    states = get_optimizer_state_dict(module, optimizer)
    named = {f"net.{name}": state for name, state in states["state"].items()}
    groups = [{**g, "params": [f"net.{name}" for name in g["params"]]} for g in states["param_groups"]]
    state = {"model": model, "optimizer_0": {"state": named, "param_groups": groups}}
    dcp.save(state, checkpoint_id=tmp_path / "a.ckpt")
    torch.save({"global_step": 8, "epoch": 2, "loops": {}}, tmp_path / "a.ckpt" / "meta.pt")
    record, _, notes = take(tmp_path / "a.ckpt")
    assert (record.step, record.epoch) == (8, 2)
    assert "left out: loops" in notes
    assert_restores(tmp_path / "new", module, optimizer, fresh())


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_a_model_in_several_files(tmp_path: Path, suffix: str) -> None:
    """All of them or nothing: a file alone is a part of a model, and one that lacks a tensor is damage."""
    stem = "pytorch_model" if suffix == "bin" else "model"
    folder, weights = tmp_path / "hf", {"a": torch.ones(2), "b": torch.ones(3)}
    folder.mkdir()
    pieces = {name: folder / f"{stem}-0000{n}-of-00002.{suffix}" for n, name in enumerate(weights, 1)}
    write: Any = torch.save if suffix == "bin" else save_file
    for name, file in pieces.items():
        write({name: weights[name]}, file)
    with pytest.raises(ConfigError, match="is one of 2 files of a model"):
        take(pieces["a"])
    if suffix == "safetensors":
        with pytest.raises(ConfigError, match="is one of 2 files of a model"):
            take(folder)
    index = {"weight_map": {name: file.name for name, file in pieces.items()}}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    assert take(folder)[1].tensors.keys() == {"model.a", "model.b"}
    write({"c": weights["b"]}, pieces["b"])
    with pytest.raises(DamagedError, match="lacks 1 of the tensors that its index lists, 'b' first"):
        take(folder)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (
            {"model": {"w": torch.ones(1)}, "args": argparse.Namespace(tensor_model_parallel_size=2)},
            r"Megatron-LM split \(tensor_model_parallel_size 2\).*tools/checkpoint/convert.py",
        ),
        (
            {"module": {"w": torch.ones(1)}, "mp_world_size": 2, "ds_version": "0.17.0"},
            "one of 2 tensor-parallel parts of a DeepSpeed model",
        ),
        (
            {"optimizer_state_dict": {"zero_stage": 2, "partition_count": 2}, "ds_version": "0.17.0"},
            "partition of a DeepSpeed ZeRO optimizer.*give the directory",
        ),
    ],
)
def test_a_part_of_a_model_is_refused(tmp_path: Path, document: dict[str, Any], words: str) -> None:
    torch.save(document, tmp_path / "a.pt")
    with pytest.raises(StateError, match=words):
        take(tmp_path / "a.pt", trust_pickle=True)


def test_deepspeeds_file_alone_is_the_checkpoint(tmp_path: Path) -> None:
    step = deepspeed(tmp_path / "ds", net())
    (step / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"not read")
    assert "zero_pp_rank_0_mp_rank_00_optim_states.pt" in take(step / "mp_rank_00_model_states.pt")[2]


def test_an_optimizer_that_cannot_be_read_is_left_out_by_name(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "hf" / "model.safetensors")
    torch.save({"state": {}, "param_groups": [], "odd": Loader()}, tmp_path / "hf" / "optimizer.pt")
    notes = take(tmp_path / "hf")[2]
    assert "its optimizer was left out" in notes
    assert "--trust_pickle" in notes
    assert notes.splitlines()[-1] == "left out: optimizer.pt"


def test_a_peft_adapter_says_that_it_is_one(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    name = "base_model.model.layer.lora_A.weight"
    save_file({name: torch.ones(2)}, tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "x/y", "lora_alpha": 8})
    )
    _, manifest, notes = take(tmp_path / "a")
    assert manifest.tensors.keys() == {f"model.{name}"}
    assert manifest.config["lora_alpha"] == 8
    assert "PEFT adapter, without the weights of its base model (x/y)" in notes


@pytest.mark.parametrize("form", ["pt", "dcp"])
def test_a_checkpoint_in_one_entry_is_the_checkpoint(tmp_path: Path, form: str) -> None:
    """`{"app": AppState(model, optimizer)}` is what DCP's own tutorial saves."""
    module = net()
    optimizer = trained(module)
    model, state = get_state_dict(module, optimizer)
    app = {"model": model, "optim": state}
    if form == "dcp":
        dcp.save({"app": app}, checkpoint_id=tmp_path / "a.pt")
    else:
        torch.save({"app": {**app, "model": module.state_dict()}, "note": "x"}, tmp_path / "a.pt")
    record, _, notes = take(tmp_path / "a.pt")
    assert record.step == 2
    assert ("left out: note" in notes) is (form == "pt")
    assert_restores(tmp_path / "new", module, optimizer, fresh())


def test_what_only_an_order_decides_is_said(tmp_path: Path) -> None:
    """Whether the optimizer was made from model.parameters(), its state does not tell."""
    for name, widths in (("same", (3, 3)), ("different", (3, 5))):
        first = nn.Linear(3 if name == "same" else 4, widths[0], bias=False)
        module = nn.Sequential(first, nn.Linear(*widths, bias=False))
        optimizer = torch.optim.AdamW(module.parameters())
        module(torch.ones(1, first.in_features)).sum().backward()
        optimizer.step()
        document = {"model": module.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(document, tmp_path / f"{name}.pt")
        notes = take(tmp_path / f"{name}.pt")[2]
        assert ("assumes the model's order" in notes) is (name == "same")


def test_random_states_are_no_model(tmp_path: Path) -> None:
    torch.save({"rng": torch.get_rng_state(), "more": {"cuda": [torch.get_rng_state()]}}, tmp_path / "a.pt")
    save_file({}, tmp_path / "b.safetensors")
    with pytest.raises(StateError, match="no model that can be recognised: it has rng, more"):
        import_checkpoint(str(tmp_path / "a.pt"), str(tmp_path / "new"))
    with pytest.raises(StateError, match="holds no tensors"):
        import_checkpoint(str(tmp_path / "b.safetensors"), str(tmp_path / "new"))


def test_a_trainers_account_may_have_numbers_that_json_does_not_know(tmp_path: Path) -> None:
    """Python writes NaN, and mixed precision begins with such gradients."""
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    state = tmp_path / "trainer_state.json"
    log = [{"step": 7, "grad_norm": float("nan")}, {"step": 7, "eval_loss": float("inf")}]
    state.write_text(json.dumps({"global_step": 7, "epoch": 1.0, "log_history": log}))
    (tmp_path / "config.json").write_text(json.dumps({"time_step_limit": [0.0, float("inf")], "a": 1}))
    record, manifest, notes = take(tmp_path)
    assert (record.step, record.metrics) == (7, {"val_loss": float("inf")})
    assert "from trainer_state.json, step, epoch and eval_loss were taken" in notes
    assert manifest.config == {"a": 1}
    assert "config.time_step_limit" in notes
    log = [{"step": 3, "eval_loss": 0.5}, {"step": 7, "loss": 2.0}]
    state.write_text(json.dumps({"global_step": 7, "log_history": log}))
    assert take(tmp_path)[0].metrics == {}, "that was the loss of another step"
    state.write_text(json.dumps({"global_step": "7", "epoch": None}))
    assert "from trainer_state.json, nothing was taken" in take(tmp_path)[2]


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_file_that_an_index_names_and_nobody_has_is_named(tmp_path: Path, suffix: str) -> None:
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    files = [f"{stem}-0000{n}-of-00002.{suffix}" for n in (1, 2)]
    index = {"weight_map": {"a": files[0], "b": files[1]}}
    (tmp_path / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    (save_file if suffix == "safetensors" else torch.save)({"a": torch.ones(2)}, tmp_path / files[0])
    with pytest.raises(DamagedError, match=f"lacks 1 of the 2 files .*{files[1]} first"):
        import_checkpoint(str(tmp_path), str(tmp_path / "new"))


def test_what_of_an_optimizer_no_checkpoint_holds_is_named(tmp_path: Path) -> None:
    module = net()
    state = trained(module).state_dict()
    state["param_groups"][0]["table"] = torch.ones(2)
    state["averages"] = {"w": torch.ones(2)}
    torch.save({"model": module.state_dict(), "optimizer": state}, tmp_path / "a.pt")
    notes = take(tmp_path / "a.pt")[2]
    assert notes.splitlines()[-1] == "left out: optimizer.param_groups.0.table, optimizer.averages"


def test_an_optimizer_alone_is_no_model(tmp_path: Path) -> None:
    torch.save(trained(net()).state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(StateError, match="an optimizer's state but no model"):
        import_checkpoint(str(tmp_path / "optimizer.pt"), str(tmp_path / "new"))


def test_tensors_in_a_configuration_are_numbers_or_named(tmp_path: Path) -> None:
    config = {"lr": torch.tensor(0.5), "table": torch.ones(2), "n": 1}
    torch.save({"model": {"w": torch.ones(2)}, "config": config}, tmp_path / "a.pt")
    _, manifest, notes = take(tmp_path / "a.pt")
    assert manifest.config == {"lr": 0.5, "n": 1}
    assert "left out: config.table" in notes


def test_keys_that_were_added_to_an_export_are_named(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run", {"model": net()}) as checkpointer:
        record = checkpointer.save(1).result()
    options = ExportOptions(format="torch")
    export_checkpoint(LocalStorage(tmp_path / "run"), record.id, str(tmp_path / "a.pt"), options)
    assert "left out" not in take(tmp_path / "a.pt")[2]
    document = torch.load(tmp_path / "a.pt")
    torch.save({**document, "ema": {"w": torch.ones(2)}}, tmp_path / "b.pt")
    assert "left out: ema" in take(tmp_path / "b.pt")[2]


def test_a_ranks_shards_are_no_model(tmp_path: Path) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        shard = distribute_tensor(torch.arange(4.0), mesh, [Shard(0)])
        torch.save({"model": {"a": torch.ones(1), "w": shard}}, tmp_path / "a.pt")
        with pytest.raises(StateError, match=r"one rank's shards.*w .a tensor of the class DTensor"):
            take(tmp_path / "a.pt")
    finally:
        dist.destroy_process_group()


def test_half_precision_moments_become_what_the_trainers_optimizer_has(tmp_path: Path) -> None:
    model = new_model(seed=3).bfloat16()
    optimizer = new_optimizer(model)
    step(model, optimizer)
    document = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "config": {"n_head": 2}}
    torch.save(document, tmp_path / "a.pt")
    _, manifest, notes = take(tmp_path / "a.pt")
    assert {info.dtype for info in manifest.tensors.values() if info.dtype not in ("I64", "U8")} == {"F32"}
    assert "so did its optimizer's moments" in notes
    other = new_model(seed=4)
    into = new_optimizer(other)
    with Checkpointer(tmp_path / "new", {"model": other, "optimizer": into}) as checkpointer:
        assert checkpointer.restore("latest", exclude=["loader", "schedule"]) is not None
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.float(), two)
        assert torch.equal(optimizer.state[one]["exp_avg"].float(), into.state[two]["exp_avg"])


def test_element_types_that_no_checkpoint_holds_are_named(tmp_path: Path) -> None:
    header = {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    header["q"] = {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [4, 7]}
    raw = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(7))
    with pytest.raises(StateError, match=r"a checkpoint cannot store: q \(F6_E2M3\)"):
        take(tmp_path / "a.safetensors")


def test_only_what_belongs_to_a_checkpoint_is_fetched(tmp_path: Path) -> None:
    """A run's folder in a store is refused with the names of its checkpoints, not after fetching them all."""
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    deepspeed(tmp_path / "ds", net())
    memory.put(str(tmp_path / "ds"), "/fetching/ds", recursive=True)
    memory.pipe_file("/fetching/run/checkpoint-3/model.safetensors", bytes(1000))
    try:
        record, _ = import_checkpoint("memory://fetching/ds", str(tmp_path / "new"))
        assert record.step == 40
        fetched: list[int] = []
        with (
            pytest.raises(ConfigError, match="but may contain some: checkpoint-3"),
            incoming("memory://fetching/run", progress=fetched.append),
        ):
            pass
        assert sum(fetched) == 0
    finally:
        memory.rm("/fetching", recursive=True)


def test_a_models_own_numbers_stay_with_the_model(tmp_path: Path) -> None:
    numbers = {name: torch.tensor(0.5) for name in ("loss_weight", "head.aux_loss", "logit_scale")}
    for name, document in (("bare", numbers), ("nested", {"model": {**numbers, "step": torch.tensor(3)}})):
        torch.save(document, tmp_path / f"{name}.pt")
        record, manifest, notes = take(tmp_path / f"{name}.pt")
        assert {f"model.{key}" for key in numbers} <= manifest.tensors.keys()
        assert (record.step, record.metrics) == (0, {})
        assert "left out" not in notes
