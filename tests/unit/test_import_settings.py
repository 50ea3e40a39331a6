"""A GPT-2's config.json: computed as it says, or refused by the setting's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.directory.listing import read_manifest
from engine.errors import StateError
from engine.gpt2.load_model import load_model
from engine.gpt2.settings import dropout
from engine.storage.local import LocalStorage
from tests.support.conversions import import_checkpoint

transformers = pytest.importorskip("transformers")

SHAPE: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 257, "n_positions": 12}


def theirs(folder: Path, **settings: Any) -> Any:
    """A model with these settings, saved by transformers."""
    torch.manual_seed(5)
    config = transformers.GPT2Config(**{**SHAPE, "bos_token_id": 0, "eos_token_id": 0, **settings})
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():  # far enough from zero for an activation to matter
        for parameter in model.parameters():
            parameter.mul_(20 if parameter.ndim == 2 else 1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"activation_function": "gelu_pytorch_tanh"},
        {"activation_function": "gelu_fast"},
        {"activation_function": "gelu_accurate"},
        {"activation_function": "gelu_python_tanh"},
        {"reorder_and_upcast_attn": True},
        {"n_inner": 64},
    ],
)
def test_equal_settings_compute_equally(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = theirs(tmp_path / "hf", **settings)
    record, notes = import_checkpoint(str(tmp_path / "hf"), str(tmp_path / "new"))
    tokens = torch.randint(0, 257, (2, 12))
    with torch.no_grad():
        wanted = model(tokens).logits
        for source in (record.path, str(tmp_path / "hf")):
            ours = load_model(source, str(tmp_path), "cpu").model.eval()
            torch.testing.assert_close(ours(tokens)[0], wanted, rtol=1e-4, atol=1e-4)
    assert ("reorder_and_upcast_attn" in "\n".join(notes)) == ("reorder_and_upcast_attn" in settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"activation_function": "relu"},
        {"activation_function": "gelu"},
        {"layer_norm_epsilon": 1e-3},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"tie_word_embeddings": False},
        {"n_inner": 32},
        {"add_cross_attention": True},
    ],
)
def test_other_settings_are_refused_by_their_names(tmp_path: Path, settings: dict[str, Any]) -> None:
    theirs(tmp_path / "hf", **settings)
    (name,) = settings
    with pytest.raises(StateError, match=f"{name} is "):
        import_checkpoint(str(tmp_path / "hf"), str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    with pytest.raises(StateError, match=f"{name} is "):
        load_model(str(tmp_path / "hf"), str(tmp_path), "cpu")


def edit(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_layer": 1}, "n_layer is 1, but the tensors have 2"),
        ({"num_hidden_layers": 3, "n_layer": None}, "n_layer is"),
        ({"n_positions": 8}, "n_positions is 8, but the tensors have 12"),
        ({"vocab_size": 256}, "vocab_size is 256, but the tensors have 257"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
    ],
)
def test_settings_that_do_not_fit_the_tensors_are_refused(
    tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    theirs(tmp_path / "hf")
    edit(tmp_path / "hf", **settings)
    if settings.get("n_layer", 0) is None:
        path = tmp_path / "hf" / "config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "n_layer"}))
    with pytest.raises(StateError, match=words):
        import_checkpoint(str(tmp_path / "hf"), str(tmp_path / "new"))


def test_settings_that_are_not_known_are_named(tmp_path: Path) -> None:
    theirs(tmp_path / "hf", embd_pdrop=0.2, attn_pdrop=0.2, resid_pdrop=0.2)
    edit(tmp_path / "hf", rotary_dim=4)
    record, notes = import_checkpoint(str(tmp_path / "hf"), str(tmp_path / "new"))
    assert "left out settings that are not flags of the trainer: rotary_dim" in notes
    assert read_manifest(LocalStorage(tmp_path / "new"), record.id).config["dropout"] == 0.2


def test_dropout_rates_that_differ_are_said() -> None:
    assert dropout({"embd_pdrop": 0.1, "attn_pdrop": 0.1}) == (0.1, None)
    rate, said = dropout({"embd_pdrop": 0.1, "attn_pdrop": 0.3, "resid_pdrop": 0.0})
    assert (rate, "attn_pdrop 0.3" in str(said)) == (0.3, True)


def test_another_model_of_the_same_names_keeps_them(tmp_path: Path) -> None:
    """GPT-BigCode has GPT-2's names, and lays attention out otherwise: it is not taken for one."""
    theirs(tmp_path / "hf")
    edit(tmp_path / "hf", model_type="gpt_bigcode")
    _, notes = import_checkpoint(str(tmp_path / "hf"), str(tmp_path / "new"))
    assert any("not a GPT-2" in note for note in notes)
    with pytest.raises(StateError, match="model_type is 'gpt_bigcode'"):
        load_model(str(tmp_path / "hf"), str(tmp_path), "cpu")
