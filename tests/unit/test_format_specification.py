"""checkpoints/README.md says what the code does: types, forms, keys, reasons, names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from engine.format import best, element_types, forms, manifest, names
from tests.documents import ROOT
from tests.support.tiny_checkpoint import rewrite_manifest, write_checkpoint

PAGE = (ROOT / "checkpoints" / "README.md").read_text()


def section(title: str) -> str:
    """The text below a heading, up to the next one."""
    (found,) = re.findall(rf"^## {re.escape(title)}.*?\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return str(found)


def test_it_lists_the_element_types_that_are_written_and_read() -> None:
    text = section("2. Shards")
    (item,) = re.findall(r"- Element types are safetensors' names: (.*?)\. An", text, re.DOTALL)
    named: dict[int, set[str]] = {1: set(), 2: set()}
    for version, part in enumerate(item.split(", and in version 2 "), start=1):
        named[version] = set(part.strip("`").split())
    assert named[1] | named[2] == set(element_types.ITEMSIZES)
    assert named[2] == {name for name, version in forms.DTYPES.items() if version == 2}


def test_it_names_the_reasons() -> None:
    (line,) = re.findall(r"\| `reasons` \| one or more of `([^`]*)`", section("6. The manifest"))
    assert tuple(line.split()) == manifest.REASONS


def test_it_names_every_form_with_the_version_that_brought_it() -> None:
    named = set(re.findall(r"`\{\"(\$[a-z]+)\"", PAGE))
    assert named == set(forms.FORMS)


def test_it_names_the_manifests_keys_and_no_others(tmp_path: Path) -> None:
    id = write_checkpoint(tmp_path, rows=2)
    rewrite_manifest(tmp_path / id, best=best.BestRule("accuracy", "max"))
    stored = json.loads((tmp_path / id / names.MANIFEST).read_bytes())
    table = section("6. The manifest").partition("\n\n")[0]
    cells = re.findall(r"^\| (`[^|]*`) \|", table, re.MULTILINE)
    assert {key for cell in cells for key in re.findall(r"`(\w+)`", cell)} == set(stored)


def test_it_names_every_file_that_is_holdfasts() -> None:
    text = section("7. Files beside the data") + section("1. Names") + PAGE[: PAGE.index("## 1.")]
    for name in (
        names.MANIFEST,
        names.ON_HOLD,
        names.DAMAGED,
        names.TOMBSTONE,
        names.DEAD_PREFIX,
        names.TMP_SUFFIX,
    ):
        assert name in text


@pytest.mark.parametrize("version", [forms.FORMAT_VERSION, forms.FORMAT_VERSION + 1])
def test_it_says_up_to_which_version_there_is(version: int) -> None:
    assert (f"version {version}" in PAGE.lower()) is (version == forms.FORMAT_VERSION)
