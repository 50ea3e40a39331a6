"""A file is called what it is, and --trust_pickle is suggested for pickles only."""

from __future__ import annotations

import argparse
import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import sys
import tarfile
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engine.convert.checkpoint import CheckpointTensors
from engine.convert.tensors import whole
from engine.directory.listing import read_manifest
from engine.errors import ConfigError, DamagedError, StateError
from engine.format.manifest import Manifest
from engine.storage.local import LocalStorage
from tests.support.conversions import import_checkpoint


def zipped(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, raw in files.items():
            archive.writestr(name, raw)
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    return buffer.getvalue()


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, w=np.ones(2))
    return buffer.getvalue()


WEIGHTS = b"x" * 100
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:3a4f\nsize 548118077\n"

OTHERS: dict[str, tuple[bytes, str]] = {
    "html": (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", r"a web page \(HTML\)"),
    "html with a comment": (b"<!-- hello -->\n<HTML lang=en>", r"a web page \(HTML\)"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML document"),
    "lfs": (LFS, "a Git LFS pointer.*git lfs pull"),
    "gzip": (gzip.compress(WEIGHTS), "a gzip file.*gunzip"),
    "bzip2": (bz2.compress(WEIGHTS), "a bzip2 file"),
    "xz": (lzma.compress(WEIGHTS), "an xz file"),
    "tar": (tarred(), "a tar archive.*tar -xf"),
    "zip": (zipped(a=b"1"), "a zip archive that torch.save did not write"),
    "npz": (npz(), "a NumPy archive"),
    "json": (b'{"a": [1, 2]}', "JSON text"),
    "index": (json.dumps({"weight_map": {"a": "b"}}).encode(), "JSON text.*give its directory"),
    "broken json": (b'{"a": [1, 2', "is text, not"),
    "text": (b"hello", "is text, not"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + WEIGHTS, "an HDF5 file"),
    "gguf": (b"GGUF" + WEIGHTS, "a GGUF file"),
    "empty": (b"", "an empty file"),
    "bytes": (b"\xff\x00\xfe\x01" * 20, "a file of unknown format .it begins with ff 00 fe 01"),
}


@pytest.mark.parametrize("name", ["a.pt", "a.ckpt", "a.safetensors", "directory"])
@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path: Path, kind: str, name: str) -> None:
    raw, words = OTHERS[kind]
    source = tmp_path / name
    if name == "directory":
        source.mkdir()
    (source / "model.safetensors" if name == "directory" else source).write_bytes(raw)
    with pytest.raises(ConfigError, match=words) as caught:
        import_checkpoint(str(source), str(tmp_path / "new"))
    assert "trust_pickle" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_what_is_no_file_is_not_read(tmp_path: Path, name: str) -> None:
    """Opening a pipe that nobody writes to would wait for ever."""
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match="a pipe, a socket or a device, not a file"):
        import_checkpoint(str(tmp_path / name), str(tmp_path / "new"))
    (tmp_path / "x" / "model.safetensors").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"model.safetensors is a directory, not a file"):
        import_checkpoint(str(tmp_path / "x"), str(tmp_path / "new"))


@pytest.mark.parametrize(("kind", "words"), [("html", "a web page"), ("lfs", "a Git LFS pointer")])
def test_a_description_that_is_none_is_called_what_it_is(tmp_path: Path, kind: str, words: str) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(OTHERS[kind][0])
    with pytest.raises(ConfigError, match=f"config.json is {words}.*, not JSON"):
        import_checkpoint(str(tmp_path), str(tmp_path / "new"))
    (tmp_path / "config.json").write_text("{'a': 1}")
    with pytest.raises(DamagedError, match=r"config.json is not valid JSON"):
        import_checkpoint(str(tmp_path), str(tmp_path / "new"))


def test_safetensors_files_without_an_index_are_listed(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"w": torch.ones(2)}, tmp_path / name)
    with pytest.raises(ConfigError, match=r"several files .*a.safetensors, b.safetensors"):
        import_checkpoint(str(tmp_path), str(tmp_path / "new"))


def test_a_pickle_without_objects_is_not_said_to_have_any(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": {"w": 1}}))
    with pytest.raises(StateError, match=r"torch\.save did not write: refused") as caught:
        import_checkpoint(str(tmp_path / "a.pkl"), str(tmp_path / "new"))
    assert "loading its objects" not in str(caught.value)


def test_a_torchscript_program_is_called_one(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "a.pt")
    with pytest.raises(ConfigError, match="a TorchScript program"):
        import_checkpoint(str(tmp_path / "a.pt"), str(tmp_path / "new"))


def imported(source: Path, **options: Any) -> tuple[Manifest, dict[str, torch.Tensor], str]:
    """(manifest, tensors, notes) of what was imported."""
    new = source.parent / "new"
    record, notes = import_checkpoint(str(source), str(new), **options)
    with CheckpointTensors(LocalStorage(new), record.id) as opened:
        tensors = {name: whole(opened, name) for name in opened.infos}
    return read_manifest(LocalStorage(new), record.id), tensors, "\n".join(notes)


def test_formats_under_other_names_are_read_as_what_they_are(tmp_path: Path) -> None:
    save_file({"w": torch.arange(3.0)}, tmp_path / "weights.pt")
    _, tensors, notes = imported(tmp_path / "weights.pt")
    assert torch.equal(tensors["model.w"], torch.arange(3.0))
    assert "it is a safetensors file, despite its name" in notes
    torch.save({"w": torch.arange(3.0)}, tmp_path / "weights.safetensors")
    with pytest.raises(ConfigError, match=r"torch.save wrote, despite its name"):
        import_checkpoint(str(tmp_path / "weights.safetensors"), str(tmp_path / "new"))


def test_a_header_of_any_length_is_safetensors(tmp_path: Path) -> None:
    """Its first bytes are the header's length: they may read like the beginning of a pickle."""
    entry = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    for length in (0x280, 0x480, 0x8B1F & ~7, 0x28B0):
        raw = length.to_bytes(8, "little") + entry.ljust(length) + bytes(8)
        (tmp_path / "a.safetensors").write_bytes(raw)
        assert imported(tmp_path / "a.safetensors")[1]["model.w"].tolist() == [0.0, 0.0]


def test_empty_tensors_are_not_one_tensor(tmp_path: Path) -> None:
    torch.save({"a": torch.empty(0), "b": torch.empty(0), "w": torch.ones(2)}, tmp_path / "a.pt")
    manifest, tensors, _ = imported(tmp_path / "a.pt")
    assert tensors.keys() == {"model.a", "model.b", "model.w"}
    assert not manifest.aliases


def test_a_conjugate_is_not_the_tensor_whose_memory_it_shares(tmp_path: Path) -> None:
    z = torch.tensor([1 + 2j, 3 - 1j])
    torch.save({"z": z, "conjugate": z.conj(), "tied": z}, tmp_path / "a.pt")
    manifest, tensors, _ = imported(tmp_path / "a.pt")
    assert manifest.aliases == {"model.tied": "model.z"}
    assert tensors["model.conjugate"].tolist() == [1 - 2j, 3 + 1j]


def test_a_truncated_file_is_damaged_and_no_question_of_trust(tmp_path: Path) -> None:
    document = {"model": {"w": torch.ones(1000)}}
    torch.save(document, tmp_path / "zip")
    torch.save(document, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    save_file(document["model"], tmp_path / "safe")
    for name in ("zip", "legacy", "safe"):
        raw = (tmp_path / name).read_bytes()
        for kept in (len(raw) - 500, len(raw) // 2, 200):
            (tmp_path / "a.pt").write_bytes(raw[:kept])
            with pytest.raises((DamagedError, ConfigError)) as caught:
                import_checkpoint(str(tmp_path / "a.pt"), str(tmp_path / "new"))
            assert "trust_pickle" not in str(caught.value), (name, kept)


def test_a_pickle_that_cannot_be_read_to_its_end_is_damaged(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(3)}}, tmp_path / "whole.pt")
    with (
        zipfile.ZipFile(tmp_path / "whole.pt") as whole,
        zipfile.ZipFile(tmp_path / "a.pt", "w") as cut,
    ):
        for item in whole.infolist():
            raw = whole.read(item)
            cut.writestr(item, raw[:-1] + b"\xee" if item.filename.endswith("data.pkl") else raw)
    with pytest.raises(DamagedError, match="its pickle cannot be read to the end"):
        import_checkpoint(str(tmp_path / "a.pt"), str(tmp_path / "new"))


def test_a_pickle_of_a_newer_protocol_is_a_question_of_trust_and_not_damaged(tmp_path: Path) -> None:
    """torch's own safe loader knows protocol 2 only."""
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "a.pt", pickle_protocol=4)
    with pytest.raises(StateError, match="--trust_pickle"):
        import_checkpoint(str(tmp_path / "a.pt"), str(tmp_path / "new"))
    assert imported(tmp_path / "a.pt", trust_pickle=True)[1]["model.w"].tolist() == [1.0, 1.0]


@pytest.fixture
def their_module() -> Iterator[types.ModuleType]:
    """A project's module that is there when its checkpoint is written and away when it is imported."""
    module = types.ModuleType("their_project")
    sys.modules["their_project"] = module
    yield module
    sys.modules.pop("their_project", None)


def their_class(module: types.ModuleType, name: str, base: type = object, **members: Any) -> type:
    made = type(name, (base,), {"__module__": "their_project", "__qualname__": name, **members})
    setattr(module, name, made)
    return made


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_classes_that_do_not_exist_here_are_data(
    tmp_path: Path, their_module: types.ModuleType, form: str, protocol: int
) -> None:
    settings = their_class(their_module, "Settings")()
    settings.lr, settings.name = 0.5, "x"
    table = their_class(their_module, "Table", dict)(a=1)
    steps = their_class(their_module, "Steps", list)([1, 2])
    net = their_class(their_module, "Net", torch.nn.Module)()
    net.inner = torch.nn.Linear(2, 1)
    config = {"settings": settings, "table": table, "steps": steps}
    document = {"model": {"w": torch.arange(2.0)}, "step": 3, "config": config, "ema": net}
    with open(tmp_path / "a.pt", "wb") as file:
        if form == "pickle":
            pickle.dump({**document, "model": {"w": np.arange(2.0, dtype=np.float32)}}, file, protocol)
        else:
            zipped = form == "zip"
            torch.save(document, file, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    del sys.modules["their_project"]
    with pytest.raises(StateError, match=r"runs code of its author's choice.*--trust_pickle"):
        import_checkpoint(str(tmp_path / "a.pt"), str(tmp_path / "new"))
    manifest, tensors, notes = imported(tmp_path / "a.pt", trust_pickle=True)
    assert torch.equal(tensors["model.w"], torch.arange(2.0))
    assert manifest.step == 3
    assert manifest.config == {"settings": {"lr": 0.5, "name": "x"}, "table": {"a": 1}, "steps": [1, 2]}
    assert "left out: ema" in notes
    for name in ("Settings", "Table", "Steps", "Net"):
        assert f"their_project.{name}" in notes.splitlines()[0]


def test_objects_of_classes_that_exist_are_data_as_well(tmp_path: Path) -> None:
    arguments = argparse.Namespace(lr=0.5, out=Path("x"), dtype=torch.float16, size=np.int64(3))
    torch.save({"net": torch.nn.Linear(2, 2), "args": arguments}, tmp_path / "a.pt")
    manifest, tensors, notes = imported(tmp_path / "a.pt", trust_pickle=True)
    assert manifest.config == {"lr": 0.5, "out": "x", "dtype": "torch.float16", "size": 3}
    assert tensors.keys() == {"model.weight", "model.bias"}
    assert "'net' is taken as the model" in notes


def test_a_refused_pickle_names_what_it_wants(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"w": np.ones(2), "n": argparse.Namespace()}, 4))
    with pytest.raises(StateError, match=r"a pickle that torch.save did not write.*argparse.Namespace"):
        import_checkpoint(str(tmp_path / "a.pkl"), str(tmp_path / "new"))


def test_a_tensor_of_a_class_that_does_not_exist_here_is_its_values(
    tmp_path: Path, their_module: types.ModuleType
) -> None:
    """Such a pickle asks torch._tensor._rebuild_from_type_v2 for it, which would ask the class."""
    kind: Any = their_class(their_module, "Weight", torch.Tensor)
    torch.save({"model": {"w": torch.arange(3.0).as_subclass(kind)}}, tmp_path / "a.pt")
    assert b"_rebuild_from_type_v2" in (tmp_path / "a.pt").read_bytes()
    del sys.modules["their_project"]
    _, tensors, notes = imported(tmp_path / "a.pt", trust_pickle=True)
    assert torch.equal(tensors["model.w"], torch.arange(3.0))
    assert "their_project.Weight" in notes
