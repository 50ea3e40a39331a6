"""`import` from `.pt` files and safetensors: what other people's scripts leave becomes a checkpoint."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine import Checkpointer
from engine.convert.checkpoint import CheckpointTensors
from engine.convert.tensors import whole
from engine.directory.listing import list_checkpoints, read_manifest
from engine.directory.verify import verify_checkpoint
from engine.errors import ConfigError, DamagedError, DirectoryHeldError, NotFoundError, StateError
from engine.format.json import canonical_bytes
from engine.lease.lease import Lease
from engine.storage.local import LocalStorage
from model.config import GPT2Config
from model.gpt2 import GPT2
from tests.support.conversions import import_checkpoint
from tests.support.tiny_checkpoint import write_checkpoint
from tests.support.tiny_gpt2 import TINY, new_model, new_optimizer, step


def nanogpt(seed: int = 3, *, wrap: str = "_orig_mod.", config: GPT2Config = TINY) -> dict[str, Any]:
    """What nanoGPT's train.py saves: tied output layer, names of torch.compile, parameters by number."""
    torch.manual_seed(seed)
    model = new_model(config, seed)
    optimizer = new_optimizer(model)
    step(model, optimizer)
    weights = dict(model.state_dict())
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    arguments = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    return {
        "model": {f"{wrap}{name}": tensor for name, tensor in weights.items()},
        "optimizer": optimizer.state_dict(),
        "model_args": {**arguments, "block_size": config.block_size, "bias": True, "dropout": 0.1},
        "iter_num": 1500,
        "best_val_loss": torch.tensor(3.25),
        "config": {
            "batch_size": 12,
            "gradient_accumulation_steps": 4,
            "block_size": config.block_size,
            "learning_rate": 6e-4,
            "max_iters": 6e5,
            "beta1": 0.9,
            "beta2": 0.95,
            "compile": True,
            "init_from": "scratch",
        },
        "_twins": (model, optimizer),
    }


def save(document: dict[str, Any], path: Path, **options: Any) -> tuple[GPT2, torch.optim.Optimizer]:
    twins: tuple[GPT2, torch.optim.Optimizer] = document.pop("_twins")
    torch.save(document, path, **options)
    return twins


def assert_same_model(one: torch.nn.Module, two: torch.nn.Module) -> None:
    ours = dict(two.named_parameters())
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, ours[name]), name


def restored(directory: Path, *, model_only: bool = False) -> dict[str, Any]:
    model = new_model(seed=9)
    state: dict[str, Any] = {"model": model, "optimizer": new_optimizer(model)}
    with Checkpointer(directory, state) as checkpointer:
        assert checkpointer.restore(model_only=model_only, exclude=["loader", "schedule"]) is not None
    return state


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("wrap", ["", "_orig_mod.", "module._orig_mod."])
def test_nanogpt(tmp_path: Path, wrap: str, form: str) -> None:
    document = nanogpt(wrap=wrap)
    model, optimizer = save(document, tmp_path / "ckpt.pt", _use_new_zipfile_serialization=form == "zip")
    record, notes = import_checkpoint(str(tmp_path / "ckpt.pt"), str(tmp_path / "new"))
    assert (record.step, record.reasons, record.world_size) == (1500, ("import",), 1)
    state = restored(tmp_path / "new")
    assert_same_model(model, state["model"])
    for one, two in zip(model.parameters(), state["model"].parameters(), strict=True):
        for field in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[one][field], state["optimizer"].state[two][field])
    assert any("--allow_data_change" in note for note in notes)
    manifest = read_manifest(LocalStorage(tmp_path / "new"), record.id)
    assert manifest.objects["schedule"] == {"last_step": 1500}
    wanted = {"global_batch": 48, "seq_len": 12, "lr": 6e-4, "max_steps": 600_000, "betas": [0.9, 0.95]}
    assert wanted.items() <= manifest.config.items()
    assert verify_checkpoint(LocalStorage(tmp_path / "new"), record.id).ok


def test_nanogpt_without_biases(tmp_path: Path) -> None:
    document = nanogpt()
    document["model"] = {n: t for n, t in document["model"].items() if not n.endswith(".bias")}
    del document["optimizer"]
    save(document, tmp_path / "ckpt.pt")
    record, notes = import_checkpoint(str(tmp_path / "ckpt.pt"), str(tmp_path / "new"))
    assert any("13 biases" in note and "zeros" in note for note in notes)
    with CheckpointTensors(LocalStorage(tmp_path / "new"), record.id) as source:
        assert not whole(source, "model.transformer.h.0.attn.c_attn.bias").any()
        assert whole(source, "model.transformer.h.0.ln_1.weight").any()


def test_one_group_in_the_models_order(tmp_path: Path) -> None:
    model = new_model(seed=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    step(model, optimizer)
    document = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "config": {"n_head": 2}}
    torch.save(document, tmp_path / "a.pt")
    record, _ = import_checkpoint(str(tmp_path / "a.pt"), str(tmp_path / "new"))
    with CheckpointTensors(LocalStorage(tmp_path / "new"), record.id) as source:
        for name, parameter in model.named_parameters():
            found = whole(source, f"optimizer.state.{name}.exp_avg")
            assert torch.equal(found, optimizer.state[parameter]["exp_avg"]), name


def test_an_optimizer_that_cannot_be_told_is_left_out_and_said(tmp_path: Path) -> None:
    document = nanogpt()
    document["optimizer"]["param_groups"][0]["params"].reverse()
    save(document, tmp_path / "ckpt.pt")
    record, notes = import_checkpoint(str(tmp_path / "ckpt.pt"), str(tmp_path / "new"))
    assert any("its optimizer was left out" in note for note in notes)
    manifest = read_manifest(LocalStorage(tmp_path / "new"), record.id)
    assert not any(name.startswith("optimizer") for name in manifest.tensors)
    restored(tmp_path / "new", model_only=True)


def test_a_bare_state_dict(tmp_path: Path) -> None:
    model = new_model(GPT2Config(n_layer=4, n_head=4, n_embd=128, vocab_size=257, block_size=8), seed=3)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    record, notes = import_checkpoint(str(tmp_path / "weights.pt"), str(tmp_path / "new"))
    assert record.step == 0
    assert any("only a model" in note for note in notes)
    manifest = read_manifest(LocalStorage(tmp_path / "new"), record.id)
    assert manifest.config["n_head"] == 4


def test_half_precision_becomes_what_the_trainer_keeps(tmp_path: Path) -> None:
    model = new_model(seed=3).bfloat16()
    torch.save({"model": model.state_dict(), "config": {"n_head": 2}}, tmp_path / "a.pt")
    _, notes = import_checkpoint(str(tmp_path / "a.pt"), str(tmp_path / "new"))
    assert any("BF16 weights became F32" in note for note in notes)
    assert_same_model(model.float(), restored(tmp_path / "new", model_only=True)["model"])


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused_unless_trusted(tmp_path: Path, zipped: bool) -> None:
    document = {"model": {"w": torch.ones(2)}, "extra": Evil(tmp_path / "hacked")}
    torch.save(document, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(StateError, match=r"runs code of its author's choice.*mkdir.*--trust_pickle"):
        import_checkpoint(str(tmp_path / "a.pt"), str(tmp_path / "new"))
    assert not (tmp_path / "hacked").exists()
    assert not (tmp_path / "new").exists()
    import_checkpoint(str(tmp_path / "a.pt"), str(tmp_path / "new"), trust_pickle=True)
    assert (tmp_path / "hacked").exists()


def test_arguments_as_an_object_need_trust_but_nothing_else(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(2)}, "args": argparse.Namespace(lr=1)}, tmp_path / "a.pt")
    with pytest.raises(StateError, match="Namespace"):
        import_checkpoint(str(tmp_path / "a.pt"), str(tmp_path / "new"))
    record, _ = import_checkpoint(str(tmp_path / "a.pt"), str(tmp_path / "new"), trust_pickle=True)
    assert record.step == 0


def hf_directory(folder: Path, *, prefix: str, masks: bool = False, head: str = "") -> GPT2:
    """A model as Hugging Face stores it, without their library."""
    model = new_model(seed=4)
    stored = {}
    for name, tensor in model.state_dict().items():
        linear = name.endswith("weight") and ".c_" in name
        stored[prefix + name.removeprefix("transformer.")] = (tensor.t() if linear else tensor).contiguous()
    for layer in range(TINY.n_layer if masks else 0):
        stored[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, TINY.block_size, TINY.block_size)
    if head:
        embedding = stored[f"{prefix}wte.weight"]
        stored["lm_head.weight"] = embedding.clone() if head == "tied" else embedding + 1
    folder.mkdir()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_head": 2, "n_layer": 2}))
    return model


@pytest.mark.parametrize("form", ["directory", "file"])
@pytest.mark.parametrize(
    "options",
    [
        {"prefix": "transformer."},
        {"prefix": "", "masks": True},
        {"prefix": "transformer.", "head": "tied"},
    ],
    ids=["transformers", "openai", "with head"],
)
def test_hugging_face(tmp_path: Path, options: dict[str, Any], form: str) -> None:
    model = hf_directory(tmp_path / "hf", **options)
    source = tmp_path / "hf" / ("model.safetensors" if form == "file" else "")
    record, notes = import_checkpoint(str(source), str(tmp_path / "new"))
    masks = [f"{options['prefix']}h.{layer}.attn.bias" for layer in range(2)] if "masks" in options else []
    assert [", ".join(masks) in note for note in notes if "masks" in note] == [True] * ("masks" in options)
    assert notes[-1] == "it holds only a model: training can start from it (--init_from), but cannot resume"
    assert len(notes) == 1 + ("masks" in options)
    assert_same_model(model, restored(tmp_path / "new", model_only=True)["model"])
    assert record.step == 0


def test_an_output_layer_of_its_own_is_refused(tmp_path: Path) -> None:
    hf_directory(tmp_path / "hf", prefix="transformer.", head="untied")
    with pytest.raises(StateError, match="differs from its token embedding"):
        import_checkpoint(str(tmp_path / "hf"), str(tmp_path / "new"))


def test_what_transformers_saves(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=257, n_positions=12)
    theirs = transformers.GPT2LMHeadModel(shape).eval()
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="10KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    import_checkpoint(str(tmp_path / "hf"), str(tmp_path / "new"))
    ours = restored(tmp_path / "new", model_only=True)["model"].eval()
    tokens = torch.randint(0, 257, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens)[0], theirs(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.pop("transformer.wpe.weight"), "embeddings"),
        (lambda m: m.pop("transformer.h.1.ln_2.weight"), r"transformer.h.1.ln_2.weight is missing"),
        (lambda m: m.update({"transformer.ln_f.weight": torch.ones(3)}), r"ln_f.weight is \[3\], not \[16\]"),
        (lambda m: m.update({"transformer.extra.weight": torch.ones(3)}), "extra.weight does not belong to"),
    ],
)
def test_half_a_gpt2_is_refused_with_every_difference(tmp_path: Path, change: Any, words: str) -> None:
    weights = new_model().state_dict()
    change(weights)
    torch.save({"model": weights, "config": {"n_head": 2}}, tmp_path / "a.pt")
    with pytest.raises(StateError, match=words):
        import_checkpoint(str(tmp_path / "a.pt"), str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ([1, 2], "holds a list"),
        ({"weights": {"w": 3}}, "holds no tensors: it has weights"),
        ({}, "it has nothing"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, document: Any, words: str) -> None:
    torch.save(document, tmp_path / "a.pt")
    with pytest.raises(StateError, match=words):
        import_checkpoint(str(tmp_path / "a.pt"), str(tmp_path / "new"))


def test_a_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(1000)}}, tmp_path / "a.pt")
    raw = (tmp_path / "a.pt").read_bytes()
    for name, bytes in (("cut.pt", raw[:-500]), ("text.pt", b"hello"), ("empty.pt", b"")):
        (tmp_path / name).write_bytes(bytes)
        with pytest.raises((ConfigError, DamagedError), match=name) as caught:
            import_checkpoint(str(tmp_path / name), str(tmp_path / "new"))
        assert "\n" not in str(caught.value)
        assert "trust_pickle" not in str(caught.value)


def test_places_with_nothing_to_import(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is nothing at"):
        import_checkpoint(str(tmp_path / "nowhere"), str(tmp_path / "new"))
    with pytest.raises(ConfigError, match=r"neither model\.safetensors"):
        import_checkpoint(str(tmp_path), str(tmp_path / "new"))
    name = write_checkpoint(tmp_path / "run")
    with pytest.raises(ConfigError, match="is already a Holdfast checkpoint"):
        import_checkpoint(str(tmp_path / "run" / name), str(tmp_path / "new"))


def test_it_joins_the_directory_it_is_imported_into(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", sequence=4)
    torch.save({"model": {"w": torch.ones(2)}, "step": 7}, tmp_path / "a.pt")
    record, _ = import_checkpoint(str(tmp_path / "a.pt"), str(tmp_path / "run"))
    assert (record.sequence, record.parent) == (5, None)
    statuses = [item.status for item in list_checkpoints(LocalStorage(tmp_path / "run"))]
    assert statuses == ["committed", "committed"]


def test_a_live_run_keeps_its_directory(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "run")
    storage.make_dir()
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "a.pt")
    with Lease.acquire(storage, run_id="training"), pytest.raises(DirectoryHeldError):
        import_checkpoint(str(tmp_path / "a.pt"), str(tmp_path / "run"))
    assert list_checkpoints(storage) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": -1}, "step -1"),
        ({"aliases": {"a": "b"}}, "'a'"),
        ({"modules": ["nothing"]}, "lacks the state 'nothing'"),
        ({"objects": {"x": {"$tensor": "y"}}}, "lacks the tensor y"),
        ({"version": 2}, "newer Holdfast"),
        ({"tokens": "many"}, "is not what an export writes"),
    ],
)
def test_a_forged_export_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    marker = {"version": 1, "modules": ["model"], "optimizers": [], "step": 1, "epoch": 0, "tokens": 0}
    marker |= {"aliases": {}, "objects": {}, "local": {}, "config": {}, "metrics": {}} | change
    document = {"model": {"w": torch.ones(2)}, "holdfast": canonical_bytes(marker).decode()}
    torch.save(document, tmp_path / "a.pt")
    with pytest.raises((DamagedError, StateError), match=words):
        import_checkpoint(str(tmp_path / "a.pt"), str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_a_name_that_no_tensor_may_have_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"w" * 5000: torch.ones(2)}}, tmp_path / "a.pt")
    with pytest.raises(StateError, match="cannot become a checkpoint"):
        import_checkpoint(str(tmp_path / "a.pt"), str(tmp_path / "new"))


def test_from_and_to_a_store(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    model = new_model(seed=3)
    torch.save({"model": model.state_dict(), "config": {"n_head": 2}}, tmp_path / "a.pt")
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/imports/a.pt", (tmp_path / "a.pt").read_bytes())
    record, _ = import_checkpoint("memory://imports/a.pt", "memory://imports/run")
    assert record.path.startswith("memory://")
    memory.get("/imports/run", str(tmp_path / "run"), recursive=True)
    assert_same_model(model, restored(tmp_path / "run", model_only=True)["model"])
    memory.rm("/imports", recursive=True)
