"""A result as a JSON file that says which version of its document it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_document(path: Path, version: int, document: dict[str, Any]) -> None:
    """Write it, with its version before all else; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"version": version, **document}, indent=1) + "\n", encoding="utf-8")


def read_document(path: Path, version: int) -> dict[str, Any]:
    """Read what `write_document` wrote.

    Raises:
        ValueError: another version of the document.
    """
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if document.get("version") != version:
        raise ValueError(f"{path} has version {document.get('version')} of this document, not {version}")
    return document
