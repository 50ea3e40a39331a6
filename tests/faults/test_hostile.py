"""Hostile checkpoints: no code runs, no path leaves the directory, nothing but HoldfastErrors comes out."""

from __future__ import annotations

import ast
import builtins
import itertools
import json
import logging
import os
import pickle
import resource
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import engine
from engine.checkpointer import Checkpointer
from engine.directory.listing import list_checkpoints
from engine.directory.verify import verify_checkpoint
from engine.errors import DamagedError, HoldfastError, SelectorError
from engine.format.digest import bytes_digest
from engine.format.index import ShardIndex
from engine.format.json import canonical_bytes
from engine.format.layout import parse_header
from engine.format.manifest import Manifest
from engine.lease.lease_file import LeaseInfo
from engine.lease.process import ProcessIdentity
from engine.storage.local import LocalStorage
from tests.faults.forgery import Original, forge, scramble, signed
from tests.faults.invariants import resident_bytes
from tests.faults.world import job

FUZZ_SECS = float(os.environ.get("HOLDFAST_FUZZ_SECS", "0"))
"""`make fuzz` sets it; otherwise a fixed number of examples from a fixed seed."""


def fuzz(examples: int) -> Any:
    """Settings of a fuzzing test: seeded and short, or for one round of `make fuzz`, each from a new seed."""
    return settings(
        max_examples=examples if not FUZZ_SECS else 5 * examples,
        derandomize=not FUZZ_SECS,
        database=None,
        deadline=None,  # on a busy machine an example may take longer than the default of 200 ms
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        phases=[hypothesis.Phase.generate]
        if FUZZ_SECS
        else [hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )


def rounds(attack: Callable[[], None], share: float) -> None:
    """Attack once, or for that share of the time that `make fuzz` has. A round is never cut short: to
    Hypothesis, examples that draw nothing all of a sudden are a test that behaves differently each time."""
    until = time.monotonic() + FUZZ_SECS * share
    attack()
    while FUZZ_SECS and time.monotonic() < until:
        attack()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Original:
    """A checkpoint of two ranks, as bytes."""
    root = tmp_path_factory.mktemp("original") / "c"
    with job(root, 2) as world:
        (record, _) = world.save(7, metrics={"val_loss": 2.5})
        assert not isinstance(record, BaseException), record
    return Original.read(root / record.id)


ROOM_BYTES = 2 << 30
"""Address space beyond what a fuzzing test begins with: for threads and their stacks. NASTY asks for more."""


@pytest.fixture
def little_room() -> Iterator[None]:
    """Whatever allocates what a forged size says fails with a MemoryError, which is no HoldfastError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def one_sentence() -> Iterator[None]:
    """Let a HoldfastError pass, if it says what it has to say on one line; nothing else."""
    said = ""
    try:
        yield
    except HoldfastError as error:
        said = str(error)
    assert "\n" not in said


PARSERS: dict[str, Callable[[bytes], object]] = {
    "manifest.json": lambda raw: Manifest.from_bytes(raw, what="it"),
    "shard-00001.json": lambda raw: ShardIndex.from_bytes(raw, what="it"),
    "shard-00000.safetensors": lambda raw: parse_header(raw, len(raw)),
    "lease-00000001": lambda raw: LeaseInfo.from_bytes(raw, 1, what="it"),
}
LEASE = LeaseInfo(1, ProcessIdentity.current(), "run", heartbeat=3, heartbeat_at=1.5, released=False)
SHARE = 1 / (len(PARSERS) + 2)
"""Of the time of `make fuzz`, for each test."""


@pytest.mark.timeout(0)
@pytest.mark.usefixtures("little_room")
@pytest.mark.parametrize("name", PARSERS)
def test_parsers_answer_any_bytes(name: str, original: Original, covered: Callable[[int], None]) -> None:
    parse, count = PARSERS[name], itertools.count()
    corpus = Original(original.id, {**original.files, "lease-00000001": LEASE.to_bytes()})

    @fuzz(400)
    @given(st.randoms(use_true_random=False))
    def attack(dice: Any) -> None:
        next(count)
        raw = scramble(corpus.files[name], dice) if dice.random() < 0.5 else forge(corpus, name, dice)
        with one_sentence():
            parse(raw)

    rounds(attack, SHARE)
    covered(next(count))


@pytest.mark.timeout(0)
@pytest.mark.usefixtures("little_room")
@pytest.mark.parametrize("kind", ["scrambled", "forged"])
def test_a_whole_restore_answers_any_bytes(
    kind: str, original: Original, root: Path, covered: Callable[[int], None]
) -> None:
    """Scrambled bytes never load as something else. Forged ones, with digests that fit, do no harm."""
    count = itertools.count()
    with job(root, 1, read_only=True) as world:
        before = resident_bytes()

        @fuzz(120)
        @given(st.randoms(use_true_random=False))
        def attack(dice: Any) -> None:
            next(count)
            shutil.rmtree(root, ignore_errors=True)
            files = dict(original.files)
            name = dice.choice(sorted(files))
            files[name] = scramble(files[name], dice) if kind == "scrambled" else forge(original, name, dice)
            original.write(root, files if kind == "scrambled" else original.refit(files))
            storage = LocalStorage(root)
            with one_sentence():
                for item in list_checkpoints(storage):
                    verify_checkpoint(storage, item.id)
            (outcome,) = world.restore()
            if isinstance(outcome, BaseException):
                assert isinstance(outcome, HoldfastError), repr(outcome)
            elif kind == "scrambled":
                assert outcome is None or world.ranks[0].shows() == 7, f"{name} was changed and loaded"

        rounds(attack, SHARE)
        assert resident_bytes() - before < 256 << 20
    covered(next(count))


def test_restoring_runs_no_code(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With pickle, torch.load, eval and exec out of order, a restore still works."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the read path must not come here")

    with job(root, 2) as world:
        world.save(3)
        world.settle()
        world.restore()  # whatever is imported late is imported now
        with monkeypatch.context() as patch:
            for target, name in (
                (pickle, "load"),
                (pickle, "loads"),
                (pickle, "Unpickler"),
                (torch, "load"),
                (builtins, "eval"),
                (builtins, "exec"),
            ):
                patch.setattr(target, name, refuse)
            outcomes = world.restore()
        assert [outcome.step for outcome in outcomes] == [3, 3]  # type: ignore[union-attr]
        assert [rank.shows() for rank in world.ranks] == [3, 3]


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Everything of ours that a Checkpointer, a listing or a verification can import, directly or not."""
    base = Path(engine.__file__).parents[1]
    waiting, seen = ["engine.checkpointer", "engine.directory.verify", "engine.directory.listing"], set()
    while waiting:
        name = waiting.pop()
        path = base / (name.replace(".", "/") + ".py")
        if name in seen or not name.startswith("engine") or not path.exists():
            continue
        seen.add(name)
        tree = ast.parse(path.read_text())
        yield name, tree
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]


def test_no_module_of_the_read_path_imports_or_calls_what_runs_code(covered: Callable[[int], None]) -> None:
    forbidden = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "yaml", "joblib"}
    count = 0
    for module, tree in modules():
        count += 1
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name.partition(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").partition(".")[0]]
            assert not forbidden & set(names), f"{module}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "torch.load", "__import__"), f"{module}: {called}"
    assert count > 40
    covered(count)


def symlinked_shard(directory: Path, outside: Path) -> None:
    shutil.move(directory / "shard-00000.safetensors", outside / "stolen")
    (directory / "shard-00000.safetensors").symlink_to(outside / "stolen")


def symlinked_index(directory: Path, outside: Path) -> None:
    shutil.move(directory / "shard-00001.json", outside / "stolen")
    (directory / "shard-00001.json").symlink_to(outside / "stolen")


def symlinked_directory(directory: Path, outside: Path) -> None:
    shutil.move(directory, outside / "stolen")
    directory.symlink_to(outside / "stolen")


def fifo_shard(directory: Path, outside: Path) -> None:
    (directory / "shard-00000.safetensors").unlink()
    os.mkfifo(directory / "shard-00000.safetensors")


def directory_for_a_manifest(directory: Path, outside: Path) -> None:
    (directory / "manifest.json").unlink()
    (directory / "manifest.json").mkdir()


@pytest.mark.parametrize("attack", [symlinked_shard, symlinked_index, fifo_shard, directory_for_a_manifest])
def test_no_path_leaves_the_directory_and_nothing_hangs(
    attack: Callable[[Path, Path], None], original: Original, root: Path, tmp_path: Path
) -> None:
    original.write(root, original.files)
    outside = tmp_path / "outside"
    outside.mkdir()
    attack(root / original.id, outside)
    with job(root, 2, read_only=True) as world:
        for outcome in world.restore():
            assert outcome is None or isinstance(outcome, DamagedError), repr(outcome)
        assert [rank.shows() for rank in world.ranks] == [None, None] or all(
            rank.state["counter"]["step"] == -1 for rank in world.ranks
        )


def test_a_checkpoint_that_is_a_link_is_read_and_what_it_leads_to_is_left_alone(
    original: Original, root: Path, tmp_path: Path
) -> None:
    """Who may put a link here may as well put the files here. Inside it links lead nowhere, as elsewhere."""
    original.write(root, original.files)
    outside = tmp_path / "outside"
    outside.mkdir()
    symlinked_directory(root / original.id, outside)
    (outside / "secret").write_bytes(original.files["shard-00000.safetensors"])
    with job(root, 2) as world:
        assert {record.id for record in world.restore()} == {original.id}  # type: ignore[union-attr]
        assert not any(isinstance(outcome, BaseException) for outcome in world.save(77))
    before = sorted(path.name for path in (outside / "stolen").iterdir())
    (outside / "stolen" / "shard-00000.safetensors").unlink()
    (outside / "stolen" / "shard-00000.safetensors").symlink_to(outside / "secret")
    with job(root, 2, read_only=True) as world:
        for outcome in world.each(lambda rank: rank.ckpt.restore(original.id)):
            assert isinstance(outcome, SelectorError), repr(outcome)
    assert sorted(path.name for path in (outside / "stolen").iterdir()) == before, "no mark, nothing removed"


OUTSIDE = "stolen.safetensors"
NAMES: dict[str, Callable[[Path], object]] = {
    "parent": lambda folder: f"../{OUTSIDE}",
    "absolute": lambda folder: str(folder / OUTSIDE),
    "there and back": lambda folder: f"x/../../{OUTSIDE}",
    "backslash": lambda folder: f"..\\{OUTSIDE}",
    "NUL": lambda folder: f"../{OUTSIDE}\0.safetensors",
    "right to left": lambda folder: "shard-00000\u202esrosnetefas.",
    "half a character": lambda folder: "shard-00000\udcff.safetensors",
    "too long": lambda folder: "x" * 300 + ".safetensors",
    "empty": lambda folder: "",
    "number": lambda folder: 7,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_a_forged_manifest_leads_nowhere(
    name: str, original: Original, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that it names is whole and fits, and every digest does: only the name is wrong."""
    files, wrong = dict(original.files), NAMES[name](root)
    index = json.loads(files["shard-00000.json"])
    index["files"][0]["file"] = wrong
    files["shard-00000.json"] = raw = json.dumps(index, sort_keys=True, separators=(",", ":")).encode()
    manifest = json.loads(files["manifest.json"])
    manifest["shards"][0]["files"][0]["file"] = wrong
    manifest["shards"][0]["index"].update(bytes=len(raw), digest=bytes_digest(raw))
    try:
        files["manifest.json"] = signed(manifest)
    except ValueError:  # our own writer refuses half a character
        files["manifest.json"] = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    original.write(root, files)
    (root / OUTSIDE).write_bytes(files.pop("shard-00000.safetensors"))
    opened: list[str] = []
    real = os.open

    def noted(path: Any, *args: Any, **more: Any) -> int:
        opened.append(str(path))
        return real(path, *args, **more)

    with job(root, 2, read_only=True) as world:
        monkeypatch.setattr(os, "open", noted)
        outcomes = world.restore(original.id)
        listed = list_checkpoints(LocalStorage(root))
    assert all(isinstance(outcome, HoldfastError) for outcome in outcomes), outcomes
    assert [item.status for item in listed] == ["damaged"]
    assert any(path.endswith("manifest.json") for path in opened)
    assert not [path for path in opened if OUTSIDE in path]
    assert [int(rank.state["counter"]["step"]) for rank in world.ranks] == [-1, -1]


SECRET = "hunter2-in-the-clear"


def test_no_secret_is_left_anywhere(caplog: pytest.LogCaptureFixture) -> None:
    """Not in a manifest, an index, a log line, an event, an error or a printed object."""
    fsspec = pytest.importorskip("fsspec")
    fs = fsspec.filesystem("memory")
    fs.rm("/", recursive=True) if fs.ls("/") else None
    caplog.set_level(logging.DEBUG)
    events: list[dict[str, Any]] = []
    options = {"token": SECRET + "-option", "secret": SECRET + "-key"}
    target = f"memory://someone:{SECRET}@bucket/run"
    state = {"model": {"w": torch.ones(64, 64)}}
    texts: list[str] = []
    with Checkpointer(target, state, storage_options=options, on_event=events.append) as ckpt:
        record = ckpt.save(1, metrics={"val_loss": 1.0}).result()
        ckpt.wait()
        ckpt.restore()
        texts += [repr(record), repr(ckpt), repr(ckpt._storage), repr(ckpt.list())]
        for selector in ("step:99", f"{target}/step-00000009-00000000", "nonsense:"):
            with pytest.raises(HoldfastError) as raised:
                ckpt.restore(selector)
            texts.append(str(raised.value))
    texts += [str(event) for event in events] + [
        entry.getMessage() for entry in caplog.records if entry.name.startswith("engine")
    ]
    files = [path for path in fs.find("/") if not fs.isdir(path)]
    assert len(files) >= 3
    texts += [fs.cat_file(path).decode("latin-1") for path in files]
    for text in texts:
        assert SECRET not in text, text[:300]


def test_files_follow_the_umask_and_temporary_ones_are_private(root: Path) -> None:
    before = os.umask(0o027)
    modes: list[tuple[str, int]] = []
    try:
        with job(root, 1) as world:
            real = LocalStorage(root)._system.create
            world.ranks[0].disk.arm(10**9, lambda name, call: call())
            system = world.ranks[0].ckpt._storage.inner._system  # type: ignore[attr-defined]

            def create(path: str, mode: int = 0o666) -> int:
                modes.append((path, mode))
                return real(path, mode)

            system.create = create
            world.save(1)
            world.settle()
    finally:
        os.umask(before)
    assert any(path.endswith(".tmp") for path, _ in modes)
    assert all(mode == 0o600 for path, mode in modes if path.endswith(".tmp"))
    for path in root.rglob("*"):
        expected = 0o750 if path.is_dir() else 0o640
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_a_manifest_cannot_make_a_reader_recurse_or_count_to_infinity() -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    wide = b'{"digest":' + b"9" * 100_000 + b"}"
    for raw in (deep, wide, b"{" * 100_000, b'"' + b"\\" * 99_999, canonical_bytes({"digest": "0" * 32})):
        with pytest.raises(DamagedError):
            Manifest.from_bytes(raw, what="it")
