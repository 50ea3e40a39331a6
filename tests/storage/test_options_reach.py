"""Storage options, a profile and the environment reach a store from every command that opens one."""

from __future__ import annotations

import argparse
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import generate
from engine.checkpoints.arguments import _parser
from engine.restore.choice import choose_checkpoint
from engine.resume import launcher
from engine.run.config import TrainConfig
from engine.run.start import Restart, find_start
from engine.storage import selftest
from engine.storage.open import open_storage
from tests.services.moto import BUCKET, S3Server
from tests.support.checkpoints_program import Program, program
from tests.support.tiny_checkpoint import write_checkpoint
from tests.support.tiny_gpt2 import train


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Program]:
    with program(capsys) as ready:
        yield ready


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No account and no endpoint but those that a test gives."""
    for name in os.environ:
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def root() -> str:
    return f"s3://{BUCKET}/{uuid.uuid4()}/run"


def commands() -> set[str]:
    (found,) = [a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return set(found.choices)


@pytest.mark.slow
def test_options_reach_every_command(
    run: Program, s3_server: S3Server, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "SPEED_BYTES", 1 << 20)
    first, second = (record.id for record in train(tmp_path / "run", steps=2)[1])
    beside = root.rpartition("/")[0]
    given = [f"--storage_options={name}={value}" for name, value in s3_server.options.items()]
    calls: dict[str, list[object]] = {
        "copy": [tmp_path / "run", root],
        "list": [root, f"--mirror={beside}/mirror"],
        "show": [root],
        "verify": [root],
        "hold": [f"{root}/{first}"],
        "release": [f"{root}/{first}"],
        "prune": [root, "--dry_run"],
        "diff": [f"{root}/{first}", f"{root}/{second}"],
        "export": [root, "--format=torch", f"--to={beside}/out.pt"],
        "import": [f"{beside}/out.pt", f"--to={beside}/imported"],
        "merge": [f"{root}/{first}", f"{root}/{second}", f"--to={beside}/merged"],
        "selftest": [f"{beside}/fresh"],
    }
    assert set(calls) == commands(), "every command is here"
    for command, arguments in calls.items():
        ran = run(command, *arguments, *given)
        assert ran.code == (1 if command == "diff" else 0), (command, ran)
    assert generate.main([f"--checkpoint_dir={root}", "--max_new_tokens=1", *given]) == 0
    assert launcher.main([f"--checkpoint_dir={root}", "--dry_run", "--reshard=2", *given]) == 0
    pairs = tuple(option.partition("=")[2] for option in given)
    mirror = f"{beside}/mirror"
    config = TrainConfig(checkpoint_dir=root, mirror=mirror, resume="latest", storage_options=pairs)
    assert find_start(config, directory_given=True, restart=Restart()).name == second


@pytest.mark.parametrize("way", ["profile", "environment"])
def test_a_profile_and_the_environment_reach_the_store(
    way: str, s3_server: S3Server, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = write_checkpoint(open_storage(root, s3_server.options), rows=1)
    options = {"skip_instance_cache": "true"}
    if way == "profile":
        options["profile"] = "team"
        (tmp_path / "config").write_text(
            f"[profile team]\nregion = us-east-1\nendpoint_url = {s3_server.endpoint}\n"
        )
        (tmp_path / "credentials").write_text(
            "[team]\naws_access_key_id = an-access-key\naws_secret_access_key = a-secret\n"
        )
    else:
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "an-access-key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    choice = choose_checkpoint(open_storage(root, options), "latest")
    assert choice is not None
    assert choice.record.id == id
