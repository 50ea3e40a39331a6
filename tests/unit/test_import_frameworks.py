"""Checkpoints of Hugging Face's Trainer, of Accelerate and of Lightning, written by the real libraries."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine import Checkpointer, CheckpointRecord
from engine.convert.checkpoint import CheckpointTensors
from engine.convert.module_order import parameter_order
from engine.convert.parameter_names import Names
from engine.convert.tensors import whole
from engine.directory.listing import read_manifest
from engine.errors import ConfigError
from engine.storage.local import LocalStorage
from model.config import GPT2Config
from tests.support.conversions import import_checkpoint
from tests.support.tiny_gpt2 import new_model, new_optimizer

GPT2 = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 33, "n_positions": 8}
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 33,
    "max_position_embeddings": 16,
    "tie_word_embeddings": True,
}


class Tokens(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, 33, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def trainer(model: nn.Module, folder: Path) -> Any:
    """Hugging Face's Trainer after six steps, with checkpoints at 3 and 6."""
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=6,
        save_steps=3,
        eval_strategy="steps",
        eval_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    made = transformers.Trainer(model, arguments, train_dataset=Tokens(), eval_dataset=Tokens())
    made.train()
    return made


def take(source: Path) -> tuple[CheckpointRecord, str]:
    record, notes = import_checkpoint(str(source), str(source.parent / "new"))
    return record, "\n".join(notes)


def tensors(record: CheckpointRecord) -> dict[str, torch.Tensor]:
    with CheckpointTensors(LocalStorage(record.path.rpartition("/")[0]), record.id) as source:
        return {name: whole(source, name) for name in source.infos}


def flat_state(optimizer: Any, named: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, torch.Tensor, str]]:
    """(parameter, state, name of the state) of each parameter of an optimizer, wrapped or not."""
    plain = getattr(optimizer, "optimizer", optimizer)
    for name, parameter in named.items():
        for key, value in plain.state[parameter].items():
            yield name, value, key


@pytest.fixture(scope="module")
def gpt2_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("trainer")
    torch.manual_seed(1)
    config = transformers.GPT2Config(**GPT2, bos_token_id=0, eos_token_id=0)
    return folder, trainer(transformers.GPT2LMHeadModel(config), folder)


def test_trainer_gpt2(gpt2_run: tuple[Path, Any]) -> None:
    folder, made = gpt2_run
    record, notes = take(folder / "checkpoint-6")
    logged = next(entry["eval_loss"] for entry in reversed(made.state.log_history) if "eval_loss" in entry)
    assert (record.step, record.val_loss) == (6, logged)
    assert notes.splitlines()[-1] == "left out: rng_state.pth, scheduler.pt, training_args.bin"
    assert "its log and its settings were left out" in notes
    assert "records no step" not in notes
    found = tensors(record)
    named = dict(made.model.named_parameters())
    for name, parameter in named.items():
        turned = ".c_" in name and parameter.ndim == 2
        assert torch.equal(found[f"model.{name}"], parameter.t() if turned else parameter), name
    for name, value, key in flat_state(made.optimizer, named):
        turned = ".c_" in name and value.ndim == 2
        assert torch.equal(found[f"optimizer.state.{name}.{key}"], value.t() if turned else value), (
            name,
            key,
        )
    shape = {name: GPT2[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    ours = new_model(GPT2Config(**shape, block_size=GPT2["n_positions"]), seed=9)
    state = {"model": ours, "optimizer": new_optimizer(ours)}
    with Checkpointer(
        folder / "new", state
    ) as checkpointer:  # as the trainer does, which has the others, too
        assert checkpointer.restore(record.id, exclude=["loader", "schedule"]) is not None
    tokens = torch.randint(0, 33, (2, 8))
    with torch.no_grad():
        wanted = made.model.eval()(tokens).logits
        torch.testing.assert_close(ours.eval()(tokens)[0], wanted, rtol=1e-4, atol=1e-5)
    groups = read_manifest(LocalStorage(folder / "new"), record.id).objects["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(named[name].ndim == 2 for name in groups[0]["params"])


def test_trainers_folder_names_its_checkpoints(gpt2_run: tuple[Path, Any]) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint-3, checkpoint-6\. Give one of them"):
        take(gpt2_run[0])


def test_trainer_with_another_model(tmp_path: Path) -> None:
    """Layers of equal shapes, and a file that sorts names: transformers' own class has the order."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**LLAMA, bos_token_id=0, eos_token_id=0)
    made = trainer(transformers.LlamaForCausalLM(config), tmp_path)
    record, notes = take(tmp_path / "checkpoint-6")
    assert record.step == 6
    assert "prefix" not in notes
    other = transformers.LlamaForCausalLM(config)
    decayed = [p for p in other.parameters() if p.ndim == 2]
    rest = [p for p in other.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": rest}], lr=1)
    with Checkpointer(tmp_path / "new", {"model": other, "optimizer": optimizer}) as checkpointer:
        assert checkpointer.restore("latest") is not None
    for one, two in zip(made.model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    found = dict(other.named_parameters())
    for name, value, key in flat_state(made.optimizer, dict(made.model.named_parameters())):
        assert torch.equal(value, optimizer.state[found[name]][key]), (name, key)


def accelerated(folder: Path, module: nn.Module, *, safe: bool) -> Any:
    """What Accelerate's save_state leaves after three steps: its optimizer and the folder."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    plain = torch.optim.AdamW(module.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(module, plain)
    accelerator.prepare(torch.optim.lr_scheduler.StepLR(optimizer, 2))
    for _ in range(3):
        accelerator.backward(model(torch.randn(4, 4)).square().sum())
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(str(folder), safe_serialization=safe)
    return plain


def layers(*sizes: int) -> nn.Sequential:
    torch.manual_seed(2)
    norms = [nn.BatchNorm1d(sizes[0])] if len(set(sizes)) < len(sizes) else []
    return nn.Sequential(*norms, *(nn.Linear(one, two) for one, two in itertools.pairwise(sizes)))


@pytest.mark.parametrize(("sizes", "safe"), [((4, 3, 2), True), ((4, 4, 4), False), ((4, 4, 4), True)])
def test_accelerate(tmp_path: Path, sizes: tuple[int, ...], safe: bool) -> None:
    module = layers(*sizes)
    optimizer = accelerated(tmp_path / "state", module, safe=safe)
    record, notes = take(tmp_path / "state")
    assert record.step == 3
    assert "it does not record its step: 3 is its optimizer's count" in notes
    left = "random_states_0.pkl, scheduler.bin"
    found = tensors(record)
    for name, tensor in module.state_dict().items():
        assert torch.equal(found[f"model.{name}"], tensor)
    if safe and len(set(sizes)) < len(sizes):  # nothing tells which layer is which
        assert "its optimizer was left out: it numbers its 6 parameters" in notes
        assert "safe_serialization=False" in notes
        assert not any(name.startswith("optimizer") for name in found)
        return
    assert notes.splitlines()[-1] == f"left out: {left}"
    other = layers(*sizes)
    into = torch.optim.AdamW(other.parameters(), lr=1)
    with Checkpointer(tmp_path / "new", {"model": other, "optimizer": into}) as checkpointer:
        assert checkpointer.restore("latest") is not None
    names = dict(other.named_parameters())
    for name, value, key in flat_state(optimizer, dict(module.named_parameters())):
        assert torch.equal(value, into.state[names[name]][key]), (name, key)
    assert into.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, width: int) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = layers(4, width, 4)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.net(batch[0]).square().sum()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    made = lightning.Trainer(max_epochs=2, default_root_dir=str(tmp_path), accelerator="cpu", **quiet)
    module = Module(4)
    data = torch.utils.data.TensorDataset(torch.randn(8, 4))
    made.fit(module, torch.utils.data.DataLoader(data, batch_size=2))
    made.save_checkpoint(tmp_path / "a.ckpt")
    record, notes = take(tmp_path / "a.ckpt")
    assert (record.step, record.epoch) == (8, 2)
    assert 'removed the prefix "net.", which all its names share' in notes
    left = notes.partition("left out: ")[2]
    for name in ("pytorch-lightning_version", "loops", "callbacks", "lr_schedulers", "hparams_name"):
        assert name in left
    assert read_manifest(LocalStorage(tmp_path / "new"), record.id).config == {"width": 4}
    other = layers(4, 4, 4)
    into = torch.optim.AdamW(other.parameters(), lr=1)
    with Checkpointer(tmp_path / "new", {"model": other, "optimizer": into}) as checkpointer:
        assert checkpointer.restore("latest") is not None
    for one, two in zip(module.net.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    names = dict(other.named_parameters())
    for name, value, key in flat_state(
        module.optimizers(use_pl_optimizer=False), dict(module.net.named_parameters())
    ):
        assert torch.equal(value, into.state[names[name]][key]), (name, key)
    assert into.param_groups[0]["lr"] == module.optimizers(use_pl_optimizer=False).param_groups[0]["lr"]


def test_a_configuration_of_a_billion_layers_is_not_built() -> None:
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 10**9}
    assert parameter_order(config, Names(), 21) is None
    assert parameter_order({"architectures": ["os"]}, Names(), 21) is None
    assert parameter_order({}, Names(), 21) is None
