"""What the documents say can be typed exists: programs, flags, make targets, links.

tests/e2e/test_documents.py runs the commands themselves.
"""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.documents import (
    CONVERT,
    DOCUMENTS,
    GUIDE,
    README,
    ROOT,
    Command,
    blocks,
    commands,
    documented,
    spans,
)


@cache
def help_text(program: str) -> str:
    """`--help` of a program, and of each of its subcommands."""
    module, *sub = program.split()
    command = [sys.executable, "-m", module, *sub, "--help"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    return ran.stdout


def known_flags(program: str) -> set[str]:
    return set(re.findall(r"--[a-z][a-z0-9_]*", help_text(program)))


@pytest.mark.parametrize(("document", "command"), documented(), ids=lambda value: str(value)[:60])
def test_every_documented_command_exists(document: str, command: Command) -> None:
    if command.program == "make":
        args = [arg.strip("[]") for arg in command.args if not arg.startswith("-")]
        dry = subprocess.run(["make", "-n", *args], cwd=ROOT, capture_output=True, text=True, check=False)
        assert dry.returncode == 0, dry.stderr
        return
    program = command.program
    flags = set(command.flags)
    if program == "engine.checkpoints" and command.args[:1] != ():
        program = f"{program} {command.args[0]}"
    if program == "engine.resume":
        flags -= known_flags("engine.train")
    assert flags <= known_flags(program) | {"--help"}, f"{document}: {sorted(flags - known_flags(program))}"


PROGRAMS = (
    "engine.train",
    "engine.resume",
    "engine.generate",
    "data.prepare",
    *(f"engine.checkpoints {name}" for name in ("show", "verify", "prune", "export", "import", "merge")),
)


@pytest.mark.parametrize("document", [README, GUIDE, CONVERT], ids=lambda path: path.name)
def test_every_flag_that_the_prose_mentions_exists(document: Path) -> None:
    known = {"--help"}.union(*map(known_flags, PROGRAMS))
    mentioned = {flag for span in spans(document) for flag in re.findall(r"--[a-z][a-z0-9_]*", span)}
    assert mentioned <= known, f"{document.name}: {sorted(mentioned - known)}"
    assert mentioned


def test_there_is_something_to_check() -> None:
    """An extraction that finds nothing would pass every other test."""
    found = {command.program for _, command in documented()}
    assert found >= {"make", "data.prepare", "engine.train", "engine.resume", "engine.checkpoints"}
    assert commands("A=1\npython -m engine.train --x 1 # why\n") == [Command("engine.train", ("--x", "1"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        path = (document.parent / file).resolve() if file else document
        assert path.exists(), f"{document.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{document.name} links to {target}"


def test_the_snippet_of_the_readme_is_short() -> None:
    (snippet,) = blocks(README, "python")
    assert len([line for line in snippet.splitlines() if line.strip()]) <= 25


def test_the_guide_treats_every_topic() -> None:
    text = GUIDE.read_text()
    for topic in (
        "What is saved, and when",
        "The tiers",
        "Resuming",
        "Another world size",
        "Remote directories",
        "Disk budget",
        "Mail and webhooks",
        "Before a long run",
        "No checkpoint is found",
        "cannot be loaded",
        "The disk is full",
        "Resume starts at step 0",
        "Another job holds the directory",
    ):
        assert topic in text
