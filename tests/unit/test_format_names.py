"""Names on disk, and paths that are refused."""

from __future__ import annotations

import pytest

from engine.errors import HostilePathError
from engine.format import names


@pytest.mark.parametrize(
    ("step", "text"),
    [(0, "step-00000000-1f0c9a3e"), (250, "step-00000250-1f0c9a3e"), (123456789, "step-123456789-1f0c9a3e")],
)
def test_attempt(step: int, text: str) -> None:
    assert names.attempt_name(step, "1f0c9a3e") == text
    assert names.parse_attempt_name(text) == (step, "1f0c9a3e")


@pytest.mark.parametrize(
    ("step", "attempt_hex"),
    [(-1, "1f0c9a3e"), (10**18, "1f0c9a3e"), (1, "1F0C9A3E"), (1, "1f0c9a3"), (1, "../../etc"), (1, "")],
)
def test_no_attempt(step: int, attempt_hex: str) -> None:
    with pytest.raises(ValueError, match="no attempt name"):
        names.attempt_name(step, attempt_hex)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "step-250-1f0c9a3e",
        "step-00000250-1f0c9a3e ",
        "step-00000250-1f0c9a3e\n",
        "dead-step-00000250-1f0c9a3e",
        "step-00000250-1F0C9A3E",
        "step-000000250-1f0c9a3e",
        "step-٠٠٠٠٠٢٥٠-1f0c9a3e",
        "step-00000250-1f0c9a3e/x",
    ],
)
def test_other_directories(name: str) -> None:
    assert names.parse_attempt_name(name) is None


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("manifest.json", True),
        ("held", True),
        ("damaged.json", True),
        ("shard-00000.safetensors", True),
        ("shard-123456-12.safetensors", True),
        ("shard-00007.json", True),
        ("manifest.json.0123abcd.tmp", True),
        ("shard-00007.json.0123abcd.tmp", True),
        ("shard-00000.safetensors.0123abcd.tmp", True),
        ("", False),
        ("NOTES.txt", False),
        ("model.safetensors", False),
        ("shard-7.json", False),
        ("shard-000007.json", False),
        ("shard-00000.safetensors.bak", False),
        ("shard-00000.json.tmp", False),
        ("notes.0123abcd.tmp", False),
        (".manifest.json.Xa1b2c", False),
        ("manifest.json/", False),
        ("Held", False),
    ],
)
def test_what_is_a_file_of_ours(name: str, ours: bool) -> None:
    assert names.is_checkpoint_file(name) is ours


@pytest.mark.parametrize(
    ("rank", "part", "text"),
    [
        (0, 0, "shard-00000.safetensors"),
        (7, 1, "shard-00007-1.safetensors"),
        (123456, 12, "shard-123456-12.safetensors"),
    ],
)
def test_shard(rank: int, part: int, text: str) -> None:
    assert names.shard_file(rank, part) == text
    assert names.parse_shard_file(text) == (rank, part)
    assert names.index_file(rank) == text.split(".")[0].removesuffix(f"-{part}") + ".json"


@pytest.mark.parametrize(
    "name",
    ["shard-0.safetensors", "shard-000000.safetensors", "shard-00000-0.safetensors", "shard-00000.json", ""],
)
def test_no_shard(name: str) -> None:
    assert names.parse_shard_file(name) is None


@pytest.mark.parametrize("epoch", [0, 1, 99_999_999, 100_000_000])
def test_lease(epoch: int) -> None:
    assert names.parse_lease(names.lease_name(epoch)) == epoch


@pytest.mark.parametrize("name", ["lease-1", "lease-", "lease-000000001", "lease-00000001.tmp", "xlease-1"])
def test_no_lease(name: str) -> None:
    assert names.parse_lease(name) is None


def test_leases_sort() -> None:
    leases = [names.lease_name(epoch) for epoch in (1, 2, 9, 10, 100)]
    assert sorted(leases) == leases


@pytest.mark.parametrize("path", ["a", "a/b.json", "größe/模型", "a b", "...", "a..b", "x" * 255, "~", "-rf"])
def test_safe(path: str) -> None:
    assert names.safe_relative(path) == path


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "/a",
        "a/",
        "a//b",
        ".",
        "./a",
        "a/.",
        "..",
        "../a",
        "a/..",
        "a/../b",
        "a\\b",
        "..\\a",
        "a\0b",
        "a\nb",
        "a\x7fb",
        "a\u202eb",  # right-to-left override: shows another name than it is
        "a\u200bb",
        "\ud800",
        "x" * 256,
        "ü" * 128,
        "/".join(["x" * 200] * 21),
    ],
)
def test_hostile(path: str) -> None:
    with pytest.raises(HostilePathError, match=r"refused|bytes") as raised:
        names.safe_relative(path)
    assert str(raised.value).isascii()
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 700


@pytest.mark.parametrize("name", ["a/b", "../a", ""])
def test_safe_name(name: str) -> None:
    assert names.safe_name("a.json") == "a.json"
    with pytest.raises(HostilePathError):
        names.safe_name(name)
