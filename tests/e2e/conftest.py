"""What the end-to-end tests share: one tiny dataset, and undisturbed runs to compare others with."""

from __future__ import annotations

import logging
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import Run, program


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few files of the standard library, one token a byte."""
    out = tmp_path_factory.mktemp("data") / "tiny"
    source = Path(sysconfig.get_path("stdlib")) / "json"
    program(
        "data.prepare", f"--source={source}", f"--out={out}", "--tokenizer=bytes", "--val_fraction=0.1"
    ).ok()
    return out


@pytest.fixture
def new_run(tmp_path: Path, data: Path) -> Callable[[str], Run]:
    """A fresh run in a folder of this test."""
    return lambda name: Run(tmp_path / name, data)


REFERENCE_STEPS = 12
REFERENCE_FLAGS = {"max_steps": REFERENCE_STEPS, "checkpoint_freq": 3}


@pytest.fixture(scope="session")
def undisturbed_1(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Run:
    """One process without torchrun, dropout on."""
    run = Run(tmp_path_factory.mktemp("undisturbed-1") / "run", data)
    return run.train(None, dropout=0.1, **REFERENCE_FLAGS)


@pytest.fixture(scope="session")
def undisturbed_2(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Run:
    """Two ranks, dropout on."""
    run = Run(tmp_path_factory.mktemp("undisturbed-2") / "run", data)
    return run.train(2, dropout=0.1, **REFERENCE_FLAGS)


@pytest.fixture(scope="session")
def undisturbed_2_no_dropout(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Run:
    """Two ranks, dropout off: the losses can be compared at any number of ranks."""
    run = Run(tmp_path_factory.mktemp("undisturbed-2-plain") / "run", data)
    return run.train(2, dropout=0.0, **REFERENCE_FLAGS)


BUCKET = "my-bucket"
"""The bucket that the guide names."""


@pytest.fixture(scope="session")
def s3_environment() -> Iterator[dict[str, str]]:
    """Environment variables for a fresh moto server with one empty bucket."""
    boto3 = pytest.importorskip("boto3")
    server_module = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request, else
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    env = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "not-a-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": ",".join(p for p in (os.environ.get("NO_PROXY", ""), host) if p),
    }
    client = boto3.client(
        "s3",
        endpoint_url=env["AWS_ENDPOINT_URL"],
        aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
        region_name=env["AWS_DEFAULT_REGION"],
    )
    client.create_bucket(Bucket=BUCKET)
    yield env
    server.stop()
