"""The program engine.checkpoints: what it prints, its exit codes, and its sentences for bad input."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoints import terminal
from engine.checkpoints.arguments import _parser
from engine.directory import marks
from engine.directory.listing import list_checkpoints
from engine.lease.lease import Lease
from engine.lease.process import ProcessIdentity
from engine.storage.local import LocalStorage
from engine.storage.open import open_storage
from tests.damaged.corpus import write_case
from tests.support.checkpoints_program import Program, Ran, program, shown_on_a_terminal
from tests.support.tiny_checkpoint import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Program]:
    with program(capsys) as ready:
        yield ready


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six committed checkpoints and one attempt; a policy of the newest 3 is stored with them."""
    root = tmp_path_factory.mktemp("template")
    for sequence in range(1, 7):
        write_checkpoint(
            root,
            sequence=sequence,
            world_size=2,
            epoch=sequence // 2,
            reasons=("interval", "epoch") if sequence == 4 else ("interval",),
            metrics={"val_loss": {1: 3.0, 2: 1.5}.get(sequence, float("nan"))},
            config={"keep_checkpoints": 3, "lr": 6e-4},
        )
    write_checkpoint(root, sequence=9, commit=False)
    return root


@pytest.fixture
def directory(template: Path, tmp_path: Path) -> Path:
    """A copy of the template of one's own."""
    return Path(shutil.copytree(template, tmp_path / "run"))


def ids(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def id_of(sequence: int) -> str:
    return f"step-{sequence * 10:08d}-{sequence:08x}"


def test_list_as_json(run: Program, directory: Path) -> None:
    ran = run("list", directory, "--json")
    assert (ran.code, ran.err) == (0, "")
    assert list(ran.json) == ["checkpoints"]
    entries = ran.json["checkpoints"]
    assert [entry["step"] for entry in entries] == [10, 20, 30, 40, 50, 60, 90]
    on_disk = sum(p.stat().st_size for p in (directory / id_of(2)).iterdir() if p.name != "manifest.json")
    assert entries[1] == {
        "step": 20,
        "epoch": 1,
        "val_loss": 1.5,
        "bytes": on_disk,
        "world_size": 2,
        "created": 1.7e9 + 2,
        "roles": ["best"],
        "status": "committed",
        "path": str(directory / id_of(2)),
    }
    assert [entry["roles"] for entry in entries] == [
        [],
        ["best"],
        [],
        ["epoch", "rolling"],
        ["backup", "rolling"],
        ["latest", "rolling"],
        [],
    ]
    assert entries[5]["val_loss"] is None, "not a number is not JSON"
    partial = entries[-1]
    assert partial["status"] == "partial"
    assert {name for name, value in partial.items() if value is None} == {
        "epoch",
        "val_loss",
        "world_size",
        "created",
    }


def test_list_as_text(run: Program, directory: Path) -> None:
    marks.hold(LocalStorage(directory), id_of(1))
    os.truncate(directory / id_of(3) / "shard-00001.safetensors", 7)
    ran = run("list", directory)
    lines = ran.out.splitlines()
    assert lines[0].split() == [
        "STEP",
        "EPOCH",
        "VAL",
        "LOSS",
        "SIZE",
        "RANKS",
        "AGE",
        "ROLES",
        "STATUS",
        "CHECKPOINT",
    ]
    assert "committed, held" in lines[1]
    assert re.match(r" +20 +1 +1\.5000 +173 kB +2 +\d+ d +best +committed +step-00000020-00000002$", lines[2])
    assert "damaged" in lines[3]
    assert lines[8] == f"{id_of(3)}: shard-00001.safetensors has 7 bytes: 86048 were written"
    assert lines[9].startswith(f"{id_of(9)}: no manifest")


def test_list_of_nothing_and_of_nowhere(run: Program, tmp_path: Path) -> None:
    assert run("list", tmp_path) == Ran(0, f"no checkpoints in {tmp_path}\n", "")
    assert run("list", tmp_path, "--json").json == {"checkpoints": []}
    run("list", tmp_path / "nowhere").refused(str(tmp_path / "nowhere"))
    run("list", "").refused("empty")


def test_list_wants_a_directory(run: Program, directory: Path) -> None:
    run("list", directory / id_of(2)).refused("is one checkpoint", str(directory))


@pytest.mark.parametrize("form", ["{}", "{}/", "file://{}"])
def test_show_takes_a_directory_or_a_checkpoint_as_path_or_uri(
    run: Program, directory: Path, form: str
) -> None:
    assert run("show", form.format(directory)).out.startswith(f"checkpoint  {directory / id_of(6)}\n")
    named = run("show", form.format(directory / id_of(2)))
    assert named.out.startswith(f"checkpoint  {directory / id_of(2)}\n")


def test_a_renamed_checkpoint_is_known_by_its_manifest(run: Program, directory: Path) -> None:
    (directory / id_of(2)).rename(directory / "mine")
    shown = run("show", directory / "mine").out
    assert f"checkpoint  {directory / 'mine'}\n" in shown
    assert re.search(r"^step +20$", shown, re.MULTILINE)
    assert run("verify", directory / "mine").out.startswith("ok       mine")
    run("list", directory / "mine").refused("is one checkpoint")


def test_show_takes_a_relative_path(run: Program, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory / id_of(2))
    assert f"{directory / id_of(2)}\n" in run("show", ".").out


@pytest.mark.parametrize(
    ("selector", "sequence"),
    [("latest", 6), ("backup", 5), ("best", 2), ("epoch:2", 4), ("step:30", 3), (id_of(1), 1)],
)
def test_show_selects(run: Program, directory: Path, selector: str, sequence: int) -> None:
    assert id_of(sequence) in run("show", directory, f"--select={selector}").out.splitlines()[0]


def test_show_says_what_the_manifest_says(run: Program, directory: Path) -> None:
    shown = run("show", directory / id_of(4)).out
    for line in (
        r"roles +epoch, rolling",
        r"reasons +interval, epoch",
        r"created +2023-11-14 22:13:24\+00:00",
        r"  model +F32 +2 +40968 +164 kB",
        r" +1 +shard-00001\.safetensors +86048 +[0-9a-f]{32}",
        r"  lr = 0\.0006",
    ):
        assert re.search(f"^{line}$", shown, re.MULTILINE), (line, shown)


def test_what_a_manifest_says_cannot_drive_the_terminal(run: Program, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, config={"note\x1b[2J": "a\x1b]0;b\nc"}, software={"x": "\x9b1m"})
    shown = run("show", tmp_path).out
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown)
    assert r"note\x1b[2J" in shown


def test_show_as_json(run: Program, directory: Path) -> None:
    shown = run("show", directory, "--select", "best", "--json").json
    assert shown["path"] == str(directory / id_of(2))
    assert (shown["status"], shown["roles"], shown["held"]) == ("committed", ["best"], False)
    assert shown["manifest"] == json.loads((directory / id_of(2) / "manifest.json").read_bytes())


def test_show_of_a_damaged_one_shows_it_and_why(run: Program, directory: Path) -> None:
    marks.mark_damaged(LocalStorage(directory), id_of(6), "block 3 is bad")
    ran = run("show", directory / id_of(6))
    assert ran.code == 0
    assert re.search(r"^status +damaged: block 3 is bad$", ran.out, re.MULTILINE)


@pytest.mark.parametrize("selector", ["epoch:7", "step:1", "step-00000010-ffffffff"])
def test_a_selector_without_an_answer_lists_what_there_is(
    run: Program, directory: Path, selector: str
) -> None:
    ran = run("show", directory, "--select", selector)
    ran.refused(selector, "Available: step:60 (latest); step:50 (backup)", "0 damaged and 1 partial")


@pytest.mark.parametrize("selector", ["latest", "best"])
def test_a_damaged_checkpoint_that_was_meant_is_named(run: Program, directory: Path, selector: str) -> None:
    """Otherwise an older one is shown, exported or copied in its place, and nobody notices."""
    meant = id_of(6 if selector == "latest" else 2)
    marks.mark_damaged(LocalStorage(directory), meant, "block 3 is bad")
    ran = run("show", directory, "--select", selector)
    assert ran.code == 0
    assert ran.err == f"skipping {meant}, which is damaged: block 3 is bad\n"


def test_what_cannot_be_used_is_counted_only_where_there_is_some(run: Program, tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    ran = run("show", tmp_path, "--select", "backup")
    ran.refused("Available: step:10 (latest)")
    assert "also has" not in ran.err


def test_a_selector_that_is_none(run: Program, directory: Path) -> None:
    run("show", directory, "--select", "newest").refused("'newest'", "latest, backup, best, epoch:N, step:N")


@pytest.mark.parametrize("name", ["manifest_newer", "empty_manifest", "missing_manifest", "path_escaping"])
def test_show_of_one_that_cannot_be_shown(run: Program, tmp_path: Path, name: str) -> None:
    _, damaged = write_case(tmp_path, name)
    run("show", tmp_path / damaged).refused(damaged)


def test_only_damaged_and_partial_ones_is_an_error_not_nothing(run: Program, tmp_path: Path) -> None:
    older, _ = write_case(tmp_path, "truncated_shard")
    (tmp_path / older / "manifest.json").unlink()
    run("show", tmp_path).refused("no committed checkpoint", "1 damaged and 1 partial")


def test_verify_whole_ones(run: Program, directory: Path) -> None:
    ran = run("verify", directory)
    assert (ran.code, ran.err) == (0, "")
    assert [line.split()[:2] for line in ran.out.splitlines()] == [["ok", id_of(n)] for n in range(1, 7)]
    assert re.search(r"173 kB in \d+\.\d\d s, [0-9.]+ .B/s$", ran.out)
    assert run("verify", directory / id_of(2)).out.splitlines()[0].split()[1] == id_of(2)


@pytest.mark.parametrize("target", ["directory", "checkpoint"])
def test_verify_finds_damage(run: Program, tmp_path: Path, target: str) -> None:
    older, damaged = write_case(tmp_path, "flipped_bit_in_data")
    where = tmp_path if target == "directory" else tmp_path / damaged
    ran = run("verify", where)
    assert (ran.code, ran.err) == (1, "")
    assert f"DAMAGED  {damaged}" in ran.out
    assert "shard-00001.safetensors: block 1 (bytes 65536 to 86048) has changed" in ran.out
    assert (f"ok       {older}" in ran.out) == (target == "directory")
    assert run("verify", where, "--quick").code == 0


def test_verify_as_json(run: Program, tmp_path: Path) -> None:
    older, damaged = write_case(tmp_path, "flipped_bit_in_data")
    ran = run("verify", tmp_path, "--json")
    assert ran.code == 1
    good, bad = ran.json["checkpoints"]
    assert ran.json["ok"] is False
    assert (good["id"], good["ok"], good["damage"], good["path"]) == (older, True, [], str(tmp_path / older))
    assert bad["id"] == damaged
    assert (bad["damage"][0]["file"], bad["damage"][0]["block"]) == ("shard-00001.safetensors", 1)
    assert set(bad["damage"][0]) == {"file", "block", "expected", "found", "sentence"}


def test_verify_of_nothing(run: Program, tmp_path: Path) -> None:
    run("verify", tmp_path / "nowhere").refused(str(tmp_path / "nowhere"))
    run("verify", tmp_path).refused("nothing to verify")
    write_checkpoint(tmp_path, commit=False)
    run("verify", tmp_path).refused("nothing to verify", "only 1 partial")
    run("verify", tmp_path / id_of(1)).refused("not a committed checkpoint")
    run("verify", tmp_path / id_of(2)).refused(id_of(2))


def test_verify_of_a_newer_format(run: Program, tmp_path: Path) -> None:
    older, newer = write_case(tmp_path, "manifest_newer")
    run("verify", tmp_path / newer).refused("newer", "update Holdfast")
    ran = run("verify", tmp_path)
    assert (ran.code, f"ok       {older}" in ran.out) == (2, True)
    os.truncate(tmp_path / older / "shard-00000.safetensors", 9)
    ran = run("verify", tmp_path)
    assert ran.code == 1, "damage outweighs what cannot be judged"
    assert "update Holdfast" in ran.err


def test_verify_clears_the_name_of_one_that_is_marked_but_whole(run: Program, directory: Path) -> None:
    marks.mark_damaged(LocalStorage(directory), id_of(6), "block 3 is bad")
    ran = run("verify", directory / id_of(6))
    assert ran.code == 0
    assert "listed as damaged: block 3 is bad" in ran.out


def test_hold_and_release(run: Program, directory: Path) -> None:
    def held() -> set[str]:
        return {item.id for item in list_checkpoints(LocalStorage(directory)) if item.on_hold}

    one = directory / id_of(1)
    assert run("hold", one).code == 0
    assert held() == {id_of(1)}
    assert "kept          " + id_of(1) in run("prune", directory, "--rolling=2", "--dry_run").out
    assert run("release", one).code == 0
    assert held() == set()


@pytest.mark.parametrize("command", ["hold", "release"])
def test_hold_wants_one_committed_checkpoint(run: Program, directory: Path, command: str) -> None:
    run(command, directory).refused("is not one checkpoint", "step:60 (latest)")
    run(command, directory / id_of(9)).refused(id_of(9), "not a committed checkpoint")
    run(command, directory / id_of(8)).refused(id_of(8))


@pytest.mark.usefixtures("nothing_arrives")
def test_prune_says_why_each_one_stays_or_goes(run: Program, directory: Path) -> None:
    marks.hold(LocalStorage(directory), id_of(1))
    before = ids(directory)
    ran = run("prune", directory, "--dry-run")
    assert ids(directory) == before
    assert not list(directory.glob("lease-*"))
    said = [re.split(r"  +", line, maxsplit=3) for line in ran.out.splitlines()]
    assert [(word, id, why) for word, id, _, why in said] == [
        ("kept", id_of(1), "held"),
        ("kept", id_of(2), "best (val loss 1.5)"),
        ("would delete", id_of(3), "older than the newest 3, without a validation loss"),
        ("kept", id_of(4), "closed epoch 2, among the newest 3"),
        ("kept", id_of(5), "backup, among the newest 3"),
        ("kept", id_of(6), "latest, among the newest 3"),
        ("would delete", id_of(9), "no manifest: it is being written, or its run ended before the commit"),
    ]


@pytest.mark.usefixtures("nothing_arrives")
def test_prune_removes_what_it_said(run: Program, directory: Path) -> None:
    ran = run("prune", directory, "--rolling", "2", "--no-epochs")
    assert (ran.code, ran.err) == (0, "")
    assert ids(directory) == [id_of(2), id_of(5), id_of(6)]
    assert ran.out.splitlines()[-1].startswith("deleted 4, ")
    assert run("prune", directory, "--rolling", "0", "--best", "0").code == 0
    assert ids(directory) == [id_of(2), id_of(5), id_of(6)], "latest, backup and best always stay"


@pytest.mark.usefixtures("nothing_arrives")
def test_prune_goes_by_the_runs_own_policy_unless_told(run: Program, directory: Path) -> None:
    run("prune", directory)
    assert ids(directory) == [id_of(n) for n in (2, 4, 5, 6)]


def test_prune_is_refused_while_a_run_holds_the_directory(run: Program, directory: Path) -> None:
    with Lease.acquire(LocalStorage(directory), run_id="training"):
        before = ids(directory)
        run("prune", directory).refused("is held by", "run training")
        assert ids(directory) == before
        assert run("prune", directory, "--dry_run").code == 0, "looking is allowed"
    assert run("prune", directory).code == 0


def test_prune_takes_over_from_a_dead_run(run: Program, directory: Path) -> None:
    me = ProcessIdentity.current()
    dead = ProcessIdentity(me.host, me.pid, me.start_time - 1, me.boot_id, me.pid_namespace)
    Lease.acquire(LocalStorage(directory), run_id="killed", process=dead)
    assert run("prune", directory).code == 0


def test_prune_of_nowhere_leaves_nothing_there(run: Program, tmp_path: Path) -> None:
    run("prune", tmp_path / "nowhere").refused(str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()
    assert run("prune", tmp_path).out == f"no checkpoints in {tmp_path}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ([], "COMMAND"),
        (["lst"], "'lst'"),
        (["list"], "DIR"),
        (["list", "d", "--jsn"], "--jsn"),
        (["list", "d", "--js"], "--js"),
        (["prune", "d", "--rolling", "many"], "'many' is not a number"),
        (["prune", "d", "--best=-1"], "'-1' is not a number"),
        (["list", "d", "--storage_options", "endpoint"], "KEY=VALUE"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(run: Program, argv: list[str], part: str) -> None:
    run(*argv).refused(part, "--help")


def test_an_option_without_a_key_is_not_printed(run: Program) -> None:
    assert "hunter2" not in run("list", "d", "--storage-options", "hunter2").err


def test_storage_options_reach_the_storage(
    run: Program, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[object] = []

    def opened(address: str, options: object) -> LocalStorage:
        given.append(options)
        return LocalStorage(address)

    monkeypatch.setattr("engine.checkpoints.target.open_storage", opened)
    assert run("list", directory, "--storage_options", "a=1=2", "--storage-options=b=").code == 0
    assert given == [{"a": "1=2", "b": ""}]


def test_the_command_line_does_not_grow_by_accident() -> None:
    """Each flag is a promise: change this table only on purpose, and the guide with it."""
    (commands,) = [a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)]
    found = {
        name: {flag for action in parser._actions for flag in action.option_strings} - {"-h", "--help"}
        for name, parser in commands.choices.items()
    }
    assert found == {
        "list": {"--storage_options", "--json", "--mirror"},
        "copy": {"--storage_options", "--select"},
        "show": {"--storage_options", "--json", "--select"},
        "verify": {"--storage_options", "--json", "--quick"},
        "hold": {"--storage_options"},
        "release": {"--storage_options"},
        "prune": {"--storage_options", "--rolling", "--best", "--best_metric", "--best_mode", "--no_epochs"}
        | {"--dry_run"},
        "export": {"--storage_options", "--to", "--format", "--dtype", "--model_only", "--select"},
        "import": {"--storage_options", "--to", "--trust_pickle"},
        "merge": {"--storage_options", "--to", "--weights"},
        "diff": {"--storage_options", "--json"},
        "selftest": {"--storage_options", "--json"},
    }


def test_on_a_store(run: Program) -> None:
    """The same commands by URI, where nothing can be renamed and there are no directories."""
    root = "memory://holdfast-cli-test/run"
    storage = open_storage(root)
    for sequence in (1, 2, 3):
        write_checkpoint(storage, sequence=sequence, rows=4)
    write_checkpoint(storage, sequence=4, rows=4, commit=False)

    entries = run("list", root, "--json").json["checkpoints"]
    assert [entry["status"] for entry in entries] == ["committed"] * 3 + ["partial"]
    assert [entry["path"] for entry in entries] == [f"{root}/{id_of(n)}" for n in (1, 2, 3, 4)]
    assert run("show", entries[0]["path"]).out.startswith(f"checkpoint  {root}/{id_of(1)}\n")
    assert run("verify", root).code == 0
    assert run("hold", f"{root}/{id_of(1)}").code == 0
    storage.publish(f"{id_of(2)}/shard-00000.json", b"{}", exclusive=False)
    assert run("verify", f"{root}/{id_of(2)}").code == 1
    assert run("prune", root, "--rolling=0").code == 0
    assert [(item.id, item.status) for item in list_checkpoints(storage)] == [
        (id_of(1), "committed"),
        (id_of(2), "damaged"),
        (id_of(3), "committed"),
        (id_of(4), "partial"),  # a sleeping writer might still commit it: not before a minute has passed
    ]


@pytest.mark.parametrize(
    ("secs", "shown"), [(-5, "now"), (0.4, "now"), (59, "59 s"), (61, "1 min"), (7200, "2 h"), (3e5, "3 d")]
)
def test_ages(secs: float, shown: str) -> None:
    assert terminal.age(secs) == shown


def process(*argv: str, **given: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, timeout=60, **given
    )


def test_as_a_program(directory: Path) -> None:
    listed = process("-m", "engine.checkpoints", "list", str(directory), "--json")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert len(json.loads(listed.stdout)["checkpoints"]) == 7
    refused = process("-m", "engine.checkpoints", "show", "nowhere")
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert "step:N" in process("-m", "engine.checkpoints", "show", "--help").stdout


def test_listing_loads_nothing_heavy(directory: Path) -> None:
    """What makes it slow to start is what it imports; time itself would depend on the machine."""
    code = (
        "import sys\n"
        "from engine.checkpoints.dispatch import main\n"
        f"assert main(['list', {str(directory)!r}]) == 0\n"
        "heavy = {'torch', 'numpy', 'fsspec', 'rich', 'tyro', 'asyncio', 'multiprocessing'}\n"
        "sys.exit(str(sorted(heavy & sys.modules.keys())) if heavy & sys.modules.keys() else 0)\n"
    )
    ran = process("-c", code)
    assert ran.returncode == 0, ran.stderr


def test_a_reader_that_has_seen_enough_is_no_error(directory: Path) -> None:
    command = [sys.executable, "-m", "engine.checkpoints", "list", str(directory)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait(60) == 0


def test_verify_shows_progress_on_a_terminal(directory: Path) -> None:
    assert b"MB" in shown_on_a_terminal("verify", directory)
