"""Credentials of a run: given as options and within an address, found nowhere that the run leaves behind."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.e2e.harness import TINY, Run, flags, program
from tests.services.moto import BUCKET, moto_server

SECRET = "hunter2-in-the-clear"


@pytest.mark.slow
def test_no_secret_is_in_anything_that_a_run_leaves_behind(tmp_path: Path) -> None:
    """Files, objects, metrics, what --on_event was told; the words of programs that work and that fail."""
    data = tmp_path / "data"
    source = Path(os.__file__).parent / "json"
    program("data.prepare", f"--source={source}", f"--out={data}", "--tokenizer=bytes").ok()
    with moto_server() as server:
        run = Run(tmp_path / "run", data, f"s3://{BUCKET}/run", {"NO_PROXY": "127.0.0.1"})
        values = {
            **TINY,
            "data": data,
            "checkpoint_dir": run.checkpoints,
            "log_dir": run.logs,
            "mirror": f"memory://someone:{SECRET}@host/copy",
            "max_steps": 4,
            "checkpoint_freq": 2,
        }
        options = [
            f"--storage_options={name}={value}"
            for name, value in {**server.options, "secret": SECRET, "token": SECRET}.items()
        ]
        train = [sys.executable, "-m", "engine.train", *flags(values), *options]
        heard = run.folder / "heard"
        assert run.launch([*train, f"--on_event=cat >> {heard}"]).wait(90.0) == 0, run.folder
        assert run.committed() == [2, 4]
        assert run.events("mirror_copied"), "the mirror's address was never used"
        assert run.launch([*train, "--resume=step:99"]).wait(90.0) == 2
        texts = {
            " ".join(command): program("engine.checkpoints", *command, run.checkpoints, *options).text
            for command in (["list"], ["list", "--json"], ["verify"], ["hold"])
        }
        left = [path for path in run.folder.rglob("*") if path.is_file()]
        texts |= {str(path): path.read_bytes().decode("latin-1") for path in left}
        client = server.client()
        for found in client.list_objects_v2(Bucket=BUCKET)["Contents"]:
            body = client.get_object(Bucket=BUCKET, Key=found["Key"])["Body"].read()
            texts[found["Key"]] = body.decode("latin-1")
    assert {"manifest.json", "metrics.jsonl", "output.log", "heard"} <= {Path(name).name for name in texts}
    for name, text in texts.items():
        assert SECRET not in text, name
