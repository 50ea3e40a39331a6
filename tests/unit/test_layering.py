"""The shape of the code: imports go down the floors only, and the lower floors know no torch.

Torch is looked for twice: in the source, where an import inside a function counts too, and in a real
interpreter, where a third-party package could bring it in behind our backs.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FLOORS = (
    "errors",
    "geometry",
    "entry",
    "text",
    "forks",
    "gc_pause",
    "process_end",
    "options",
    "loaders",
    "stopping",
    "native",
    "format",
    "storage",
    "lease",
    "directory",
    "mirror",
    "ranks",
    "state",
    "save",
    "restore",
    "convert",
    "checkpointer",
    "gpt2",
    "run",
)
PROGRAMS = ("train", "resume", "checkpoints", "generate")
EXAMPLE = ("gpt2", "run", "train", "resume", "generate")
"""The GPT-2 trainer, an example beside the library: every other room has to do without it."""
TORCHLESS = (
    "errors",
    "geometry",
    "entry",
    "text",
    "forks",
    "gc_pause",
    "process_end",
    "options",
    "loaders",
    "native",
    "format",
    "storage",
    "lease",
    "directory",
    "mirror",
    "checkpoints",
)
MAX_LINES = 400


def modules_under(*packages: str) -> dict[str, Path]:
    """Dotted name -> file of every module in these top-level packages."""
    found = {}
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


SOURCES = modules_under("engine", "model", "data", "bench", "demo")


def imports_of(
    name: str, path: Path, known: dict[str, Path], *, lazy: bool = True
) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of each import; `from package import module` names the module where there is one.

    Without `lazy`, only what runs when the module is imported: not function bodies, not TYPE_CHECKING blocks.
    """
    for node in walk(ast.parse(path.read_text()), lazy=lazy):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                here = here[: len(here) - (node.level - 1)]
                base = ".".join([*here, base]).rstrip(".")
            for alias in node.names:
                deeper = f"{base}.{alias.name}"
                yield (deeper if deeper in known else base), node.lineno


def walk(node: ast.AST, *, lazy: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not lazy:
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
        yield child
        yield from walk(child, lazy=lazy)


def floor(module: str) -> int | None:
    """The floor of an engine module; programs are on top; None for `engine` itself and for others."""
    parts = module.split(".")
    if parts[0] != "engine" or len(parts) == 1:
        return None
    if parts[1] in PROGRAMS:
        return len(FLOORS)
    assert parts[1] in FLOORS, f"{module} belongs to no floor: add it to FLOORS here and to the design"
    return FLOORS.index(parts[1])


def upward_imports(sources: dict[str, Path]) -> list[str]:
    bad = []
    for name, path in sources.items():
        here = floor(name)
        if here is None:
            continue
        for target, line in imports_of(name, path, sources):
            there = floor(target)
            if target == "engine" or (there is not None and there > here):
                bad.append(f"{path}:{line}: {name} imports {target}, which is above it")
    return bad


def test_engine_imports_go_down_the_floors_only() -> None:
    assert upward_imports(SOURCES) == []


def test_an_upward_import_is_noticed(tmp_path: Path) -> None:
    low = tmp_path / "low.py"
    low.write_text("def late():\n    from engine.save import commit\n    return commit\n")
    (bad,) = upward_imports({"engine.storage.low": low, "engine.save": low})
    assert "low.py:2: engine.storage.low imports engine.save" in bad


def test_model_and_data_know_nothing_of_the_engine_nor_of_each_other() -> None:
    bad = [
        f"{path}:{line}: {name} imports {target}"
        for name, path in SOURCES.items()
        for target, line in imports_of(name, path, SOURCES)
        if name.split(".")[0] in ("model", "data")
        and target.split(".")[0] in ({"engine", "model", "data", "bench", "demo"} - {name.split(".")[0]})
    ]
    assert bad == []


def is_example(module: str) -> bool:
    """Whether a module is the trainer's, its model's or its data's."""
    room = [*module.split("."), ""][:2]
    return room[0] in ("model", "data") or (room[0] == "engine" and room[1] in EXAMPLE)


def imports_of_the_example(sources: dict[str, Path]) -> list[str]:
    return [
        f"{path}:{line}: {name} is the library's and imports {target}"
        for name, path in sources.items()
        for target, line in imports_of(name, path, sources)
        if name.split(".")[0] == "engine"
        and not is_example(name)
        and (is_example(target) or target.split(".")[0] in ("bench", "demo", "tests"))
    ]


def test_the_library_imports_nothing_of_the_trainer() -> None:
    """It serves anybody's loop: the trainer, its model and its data are an example beside it."""
    assert imports_of_the_example(SOURCES) == []


def test_an_import_of_the_example_is_noticed(tmp_path: Path) -> None:
    low = tmp_path / "low.py"
    low.write_text("def late():\n    from model.gpt2 import GPT2\n    from engine.run import job\n")
    sources = {"engine.checkpoints.low": low, "engine.run.job": low, "model.gpt2": low}
    assert [line.split(": ")[1] for line in imports_of_the_example(sources)] == [
        "engine.checkpoints.low is the library's and imports model.gpt2",
        "engine.checkpoints.low is the library's and imports engine.run.job",
    ]


def test_the_checkpointer_needs_no_conversion() -> None:
    """Conversion lies below it and reads other tools' files: a training loop has no use for it."""
    bad = [
        f"{path}:{line}: {name} imports {target}"
        for name, path in SOURCES.items()
        for target, line in imports_of(name, path, SOURCES)
        if name.split(".")[:2] in (["engine", "checkpointer"], ["engine", "run"])
        and target.split(".")[:2] == ["engine", "convert"]
    ]
    assert bad == []


def import_cycle(sources: dict[str, Path]) -> list[str]:
    """The modules of one import cycle, the first repeated at the end; empty if there is none.

    Imports in functions count: they hide a cycle from Python, and leave it in the design.
    """
    graph = {
        name: {t for t, _ in imports_of(name, path, sources) if t in sources and t != name}
        for name, path in sources.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name not in done:
            for target in sorted(graph[name]):
                if found := visit(target, [*trail, name]):
                    return found
            done.add(name)
        return []

    return next((found for name in graph if (found := visit(name, []))), [])


def test_no_import_cycles() -> None:
    assert import_cycle(SOURCES) == []


def test_an_import_cycle_through_a_function_is_noticed(tmp_path: Path) -> None:
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text("from engine.storage import two\n")
    two.write_text("def late():\n    from engine.storage.one import one\n    return one\n")
    names = ["engine.storage.one", "engine.storage.two"]
    assert import_cycle(dict(zip(names, (one, two), strict=True))) == [*names, names[0]]


def is_torchless(module: str) -> bool:
    return module == "engine" or module.split(".")[:2] in [["engine", room] for room in TORCHLESS]


def test_the_lower_floors_name_no_torch() -> None:
    bad = [
        f"{path}:{line}: {name} imports {target}"
        for name, path in SOURCES.items()
        if is_torchless(name) or name in ("engine.resume.launcher", "data.prepare")
        # The launcher of ranks is torch's own, so engine.resume may import it when it launches.
        for target, line in imports_of(name, path, SOURCES, lazy=name != "engine.resume.launcher")
        if target.split(".")[0] == "torch"
    ]
    assert bad == []


@pytest.mark.parametrize("group", ["engine", *TORCHLESS, "resume"])
def test_the_lower_floors_load_no_torch(group: str) -> None:
    """One interpreter per room imports every module of it; numpy may come along, torch may not."""
    prefix = "engine" if group == "engine" else f"engine.{group}"
    names = [n for n in SOURCES if n == prefix or (group != "engine" and n.startswith(prefix + "."))]
    assert names, f"nothing found under {prefix}"
    # engine.resume parses the training flags, so it may know the presets of model and data.
    heavy = {"torch"} if group == "resume" else {"torch", "model", "data"}
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"heavy = sorted({{m.split('.')[0] for m in sys.modules}} & {heavy!r})\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_modules_are_short_and_say_what_they_are_for() -> None:
    bad = []
    for name, path in SOURCES.items():
        text = path.read_text()
        if text.count("\n") > MAX_LINES:
            bad.append(f"{name} has {text.count(chr(10))} lines; the ceiling is {MAX_LINES}")
        if text.strip() and not ast.get_docstring(ast.parse(text)):
            bad.append(f"{name} has no module docstring")
    assert bad == []
