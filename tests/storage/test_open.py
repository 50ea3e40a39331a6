"""From an address to a storage, and back to parent and name."""

from __future__ import annotations

from pathlib import Path

import pytest
from fsspec.registry import known_implementations

from engine.errors import ConfigError
from engine.storage.local import LocalStorage
from engine.storage.open import open_storage
from engine.storage.options import client_options
from engine.storage.uris import is_uri, join_uri, split_uri


@pytest.mark.parametrize("scheme", ["", "file://", "local://"])
def test_local_addresses(tmp_path: Path, scheme: str) -> None:
    storage = open_storage(f"{scheme}{tmp_path}/a/b")
    assert isinstance(storage, LocalStorage)
    assert storage.root == storage.uri == f"{tmp_path}/a/b"
    assert list(tmp_path.iterdir()) == []


def test_relative_and_home_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert open_storage("checkpoints").uri == f"{tmp_path}/checkpoints"
    assert open_storage("~/checkpoints").uri == "/home/someone/checkpoints"
    assert open_storage(Path("checkpoints")).uri == f"{tmp_path}/checkpoints"


def test_create(tmp_path: Path) -> None:
    open_storage(tmp_path / "a/b", create=True)
    assert (tmp_path / "a/b").is_dir()


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("", "empty"),
        ("file://host/path", "file:///path"),
        ("nosuchscheme://x/y", "nosuchscheme"),
        ("simplecache::s3://bucket/run", "chains"),
        ("s3:/bucket/run", "s3://bucket/run"),
    ],
)
def test_addresses_that_cannot_work(address: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        open_storage(address)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        known_implementations,
        "nopackage",
        {"class": "no_such_package.Fs", "err": "Install no_such_package to use it"},
    )
    with pytest.raises(ConfigError, match=r"nopackage://x needs a package .* no_such_package"):
        open_storage("nopackage://x")


@pytest.mark.parametrize(
    ("target", "parent", "name"),
    [
        ("/runs/a/step-1", "/runs/a", "step-1"),
        ("/runs/a/step-1/", "/runs/a", "step-1"),
        ("/step-1", "/", "step-1"),
        ("s3://bucket/run/step-1", "s3://bucket/run", "step-1"),
        ("s3://bucket/step-1//", "s3://bucket", "step-1"),
        ("file:///runs/step-1", "file:///runs", "step-1"),
        ("file:///step-1", "file:///", "step-1"),
    ],
)
def test_split(target: str, parent: str, name: str) -> None:
    assert split_uri(target) == (parent, name)
    assert join_uri(parent, name) == target.rstrip("/")


def test_split_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert split_uri("step-1") == (str(tmp_path), "step-1")
    assert split_uri("./a/../step-1/") == (str(tmp_path), "step-1")


@pytest.mark.parametrize("target", ["/", "", "s3://bucket", "s3://bucket/", "s3://me:hunter2@bucket"])
def test_split_without_a_name(target: str) -> None:
    with pytest.raises(ConfigError, match="does not name a checkpoint") as raised:
        split_uri(target)
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("s3://b", True), ("a+x://b", True), ("/a://b", False), ("a/b", False), ("://b", False)],
)
def test_is_uri(text: str, expected: bool) -> None:
    assert is_uri(text) is expected


def test_options_are_converted() -> None:
    options = client_options(
        "memory",
        {
            "anon": "True",
            "max_concurrency": "4",
            "key": "1234",
            "secret": "true",
            "region": "eu-1",
            "client_kwargs": '{"region_name": "eu"}',
            "config_kwargs.s3.addressing_style": "path",
            "phone": "01234567890",
            "already": 5,
        },
    )
    assert options == {
        "anon": True,
        "max_concurrency": 4,
        "key": "1234",
        "secret": "true",
        "region": "eu-1",
        "client_kwargs": {"region_name": "eu"},
        "config_kwargs": {"s3": {"addressing_style": "path"}},
        "phone": "01234567890",
        "already": 5,
        "use_listings_cache": False,
    }


def test_every_s3_request_has_a_deadline() -> None:
    defaults = client_options("s3", {})["config_kwargs"]
    assert defaults["connect_timeout"] > 0
    assert defaults["read_timeout"] > 0
    changed = client_options("s3", {"config_kwargs.read_timeout": "5"})["config_kwargs"]
    assert changed == {**defaults, "read_timeout": 5}


@pytest.mark.parametrize("options", [{"client_kwargs": "{broken"}, {"a": "1", "a.b": "2"}])
def test_options_that_cannot_work(options: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="storage option"):
        client_options("s3", options)
