"""Every kind of damage is noticed by listing, verification and restore, with the sentence that names it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from engine import Checkpointer, CheckpointRecord
from engine.directory.listing import list_checkpoints
from engine.directory.verify import verify_checkpoint
from engine.errors import DamagedError, NewerFormatError, NotFoundError, SelectorError
from engine.storage.local import LocalStorage
from tests.damaged.corpus import CASES, ROWS, write_case
from tests.support.tiny_checkpoint import COLUMNS

PLAIN = sorted(name for name, case in CASES.items() if case.sentence not in ("", "newer"))


@pytest.mark.parametrize("name", sorted(CASES))
def test_listing(name: str, tmp_path: Path) -> None:
    older, damaged = write_case(tmp_path, name)
    case = CASES[name]
    listed = {item.id: item for item in list_checkpoints(LocalStorage(tmp_path))}
    assert listed[older].status == "committed", "one damaged checkpoint does not hide the others"
    assert listed[damaged].status == case.listed
    if case.listed == "damaged":
        assert re.search(case.sentence, listed[damaged].reason), listed[damaged].reason


@pytest.mark.parametrize("name", PLAIN)
def test_verify(name: str, tmp_path: Path) -> None:
    _, damaged = write_case(tmp_path, name)
    case = CASES[name]
    result = verify_checkpoint(LocalStorage(tmp_path), damaged)
    assert not result.ok
    assert re.match(case.sentence, result.damage[0].sentence), [d.sentence for d in result.damage]


@pytest.mark.parametrize("name", PLAIN)
def test_verify_quick(name: str, tmp_path: Path) -> None:
    _, damaged = write_case(tmp_path, name)
    result = verify_checkpoint(LocalStorage(tmp_path), damaged, quick=True)
    assert result.ok != CASES[name].quick, [d.sentence for d in result.damage]


@pytest.mark.parametrize("name", ["manifest_newer", "index_newer"])
def test_a_newer_format_is_not_damage(name: str, tmp_path: Path) -> None:
    _, damaged = write_case(tmp_path, name)
    with pytest.raises(NewerFormatError, match="update Holdfast"):
        verify_checkpoint(LocalStorage(tmp_path), damaged)


def test_one_without_a_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    _, damaged = write_case(tmp_path, "missing_manifest")
    with pytest.raises(NotFoundError, match="not a committed checkpoint"):
        verify_checkpoint(LocalStorage(tmp_path), damaged)


@pytest.mark.parametrize("name", sorted(CASES))
def test_looking_changes_nothing(name: str, tmp_path: Path) -> None:
    write_case(tmp_path, name)
    storage = LocalStorage(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for item in list_checkpoints(storage):
        if item.status != "partial" and "newer" not in name:
            verify_checkpoint(storage, item.id)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


class Net(nn.Module):
    """The tensors of the corpus."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(ROWS, COLUMNS))
        self.b = nn.Parameter(torch.zeros(8))


def restore(root: Path, net: Net, selector: str) -> CheckpointRecord | None:
    with Checkpointer(root, {"model": net}, read_only=True) as checkpointer:
        # The corpus is written without torch: it has no generators.
        return checkpointer.restore(selector, include=["model.*"])


@pytest.mark.parametrize("name", sorted(CASES))
def test_restore(name: str, tmp_path: Path) -> None:
    """By its path, each answers with its sentence; `latest` goes back to the one before and loads that."""
    older, damaged = write_case(tmp_path, name)
    case = CASES[name]
    net = Net()
    if case.restore is None:
        assert restore(tmp_path, net, str(tmp_path / damaged)) is not None, "it has all that a restore reads"
    else:
        sentence = case.restore or case.sentence
        with pytest.raises((DamagedError, SelectorError)) as caught:
            restore(tmp_path, net, str(tmp_path / damaged))
        assert re.search(sentence, str(caught.value)), str(caught.value)
    record = restore(tmp_path, net, "latest")
    assert record is not None
    expected = damaged if case.restore is None and case.listed == "committed" else older
    assert record.id == expected
    assert bool(net.w.detach().ne(0).any())
