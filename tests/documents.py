"""Reads the commands out of our documents, so that tests can run them as they stand there."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
GUIDE = ROOT / "docs" / "guide.md"
CONVERT = ROOT / "docs" / "convert.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
DOCUMENTS = (README, GUIDE, CONVERT, ARCHITECTURE, ROOT / "checkpoints" / "README.md", ROOT / "DECISIONS.md")

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")


@dataclass(frozen=True)
class Command:
    """One simple command: the program (`make`, `engine.train`, ...) and its arguments."""

    program: str
    args: tuple[str, ...]

    @property
    def flags(self) -> tuple[str, ...]:
        """Its long flags without values."""
        return tuple(arg.partition("=")[0] for arg in self.args if arg.startswith("--"))


def blocks(document: Path, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return [text for found, text in _BLOCK.findall(document.read_text()) if found == language]


def spans(document: Path) -> list[str]:
    """The inline code of a document's prose, line breaks taken out."""
    prose = _BLOCK.sub("", document.read_text())
    return [" ".join(span.split()) for span in _SPAN.findall(prose)]


def commands(shell: str) -> list[Command]:
    """The commands of ours in a piece of shell, wherever on a line they begin."""
    found = []
    for line in shell.replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a line of a quoted text
            continue
        if words[:1] == ["make"]:
            found.append(Command("make", tuple(words[1:])))
        elif "-m" in words and words[0] in ("python", "torchrun"):
            at = words.index("-m")
            found.append(Command(words[at + 1], tuple(words[at + 2 :])))
    return found


def documented() -> list[tuple[str, Command]]:
    """(document's name, command) of every command in a block or in the prose."""
    found = []
    for document in DOCUMENTS:
        for text in (*blocks(document, "sh"), *spans(document)):
            found += [(document.name, command) for command in commands(text)]
    return found
