"""Secrets stay out of addresses, options, errors and logs."""

from __future__ import annotations

import logging
import traceback

import pytest

from engine.errors import HoldfastError
from engine.storage.open import open_storage
from engine.storage.redact import Redactor, redact_options, redact_uri
from engine.storage.remote import FsspecStorage
from tests.storage.buffers import source

SECRET = "hunter2/AND+more"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("s3://bucket/run", "s3://bucket/run"),
        ("s3://me:hunter2@bucket/run", "s3://***@bucket/run"),
        ("sftp://me:hun@ter2@host:22/run", "sftp://***@host:22/run"),
        ("s3://me:hun/t@er2@bucket/run", "s3://***@bucket/run"),
        ("s3://hunter2@bucket/run", "s3://***@bucket/run"),
        ("s3://bucket/me@home/run", "s3://bucket/me@home/run"),
        ("abfs://data@account.windows.net/run?sig=hunter2&se=1", "abfs://data@account.windows.net/run?***"),
        ("abfss://data:hunter2@account.net/run", "abfss://***@account.net/run"),
        ("https://host/x?token=hunter2", "https://host/x?***"),
        ("/plain/path?really", "/plain/path?really"),
        ("see http://u:hunter2@h/x and http://u:hunter2@g/y", "see http://***@h/x and http://***@g/y"),
    ],
)
def test_redact_uri(uri: str, shown: str) -> None:
    assert redact_uri(uri) == shown


def test_redact_options() -> None:
    shown = redact_options(
        {
            "key": "AKIA",
            "secret": SECRET,
            "anything_new": SECRET,
            "region": "eu",
            "endpoint_url": "http://u:pw@host:9000",
            "client_kwargs": {"region_name": "eu", "aws_secret_access_key": SECRET, "verify": False},
        }
    )
    assert shown == {
        "key": "***",
        "secret": "***",
        "anything_new": "***",
        "region": "eu",
        "endpoint_url": "http://***@host:9000",
        "client_kwargs": {"region_name": "eu", "aws_secret_access_key": "***", "verify": False},
    }


@pytest.mark.parametrize(
    ("uri", "options"),
    [
        ("s3://b/x", {"secret": SECRET}),
        ("s3://b/x", {"client_kwargs": {"aws_secret_access_key": SECRET}}),
        ("s3://b/x", {"client_kwargs.aws_secret_access_key": SECRET}),
        ("sftp://me:hunter2%2FAND+more@host/x", {}),
        ("https://host/x?sig=hunter2%2FAND%2Bmore", {}),
        ("s3://b/x", {"endpoint_url": f"http://host/?token={SECRET.replace('+', '%2B')}"}),
    ],
)
def test_scrub(uri: str, options: dict[str, object]) -> None:
    redactor = Redactor(uri, options)
    for said in (SECRET, "hunter2%2FAND%2Bmore", f"bad\nsecret '{SECRET}'", f"http://u:{SECRET}@host"):
        scrubbed = redactor.scrub(f"it said: {said}!")
        assert "hunter2" not in scrubbed
        assert "more" not in scrubbed
        assert "\n" not in scrubbed
        assert scrubbed.startswith("it said:")


def test_scrub_takes_the_longest_first() -> None:
    redactor = Redactor("s3://b", {"key": "hunter2", "secret": "hunter2-and-a-tail"})
    assert redactor.scrub("x hunter2-and-a-tail y") == "x *** y"


def test_scrub_knows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    assert SECRET not in Redactor("s3://b", {}).scrub(f"no {SECRET}")


def test_nothing_of_an_error_shows_the_secret(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Message, repr, traceback with its causes, and the log."""
    storage = open_storage(f"memory://me:{SECRET.replace('/', '%2F')}@host/run", {"secret": SECRET})
    assert isinstance(storage, FsspecStorage)

    def fail(*args: object, **kwargs: object) -> object:
        raise RuntimeError(f"cannot sign with {SECRET}")

    for name in ("ls", "find", "info", "cat_file", "pipe_file"):
        monkeypatch.setattr(storage._fs, name, fail)
    caplog.set_level(logging.DEBUG, "engine")
    said = [repr(storage), storage.uri, storage.describe("x")]
    for use in (
        lambda: storage.list_dir(),
        lambda: storage.list_tree(),
        lambda: storage.exists("x"),
        lambda: storage.read_bytes("x", max_bytes=1),
        lambda: storage.publish("x", b"", exclusive=True),
        lambda: storage.write_shard("x", source(b"")),
    ):
        with pytest.raises(HoldfastError) as raised:
            use()
        said += [*traceback.format_exception(raised.value)]
    said.append("\n".join(record.getMessage() for record in caplog.records))
    # The line of this test that raises is part of the traceback, not of what anyone says.
    text = "\n".join(line for line in "\n".join(said).splitlines() if "{SECRET}" not in line)
    assert "cannot sign with ***" in text
    assert "hunter2" not in text
