"""Every kind of damage is noticed by the listing or by verification, with the sentence that names it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engine.catalog.listing import list_checkpoints
from engine.catalog.verify import verify_checkpoint
from engine.errors import NewerFormatError, NotFoundError
from engine.storage.local import LocalStorage
from tests.damaged.corpus import CASES, write_case

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
    with pytest.raises(NotFoundError, match="no committed checkpoint"):
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
