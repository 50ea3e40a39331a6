"""Runs of the real programs whose checkpoints lie in a bucket."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.e2e.harness import Finished, Run, program
from tests.services.s3 import Bucket


class StoreRun(Run):
    """A run with logs in a folder and checkpoints in a bucket, under the folder's name or `prefix`."""

    def __init__(self, folder: Path, data: Path, bucket: Bucket, prefix: str | None = None) -> None:
        self.bucket, self.prefix = bucket, prefix or folder.name
        super().__init__(folder, data, bucket.uri(self.prefix), dict(bucket.env))

    def by_way_of(self, endpoint: str) -> StoreRun:
        """The same run, its store reached at another endpoint from now on."""
        return StoreRun(self.folder, self.data, self.bucket.at(endpoint), self.prefix)

    def copy_to(self, folder: Path) -> StoreRun:
        """The same logs in another folder, the same objects, one by one, under its name."""
        if self.logs.exists():
            shutil.copytree(self.logs, folder / "logs")
        client = self.bucket.client()
        for key in self.objects():
            target = folder.name + key.removeprefix(self.prefix)
            source = {"Bucket": self.bucket.name, "Key": key}
            client.copy_object(Bucket=self.bucket.name, Key=target, CopySource=source)
        return StoreRun(folder, self.data, self.bucket)

    def manifests(self) -> list[dict[str, Any]]:
        """Every manifest in the bucket, past the programs."""
        client = self.bucket.client()
        keys = [key for key in self.objects() if key.endswith("/manifest.json")]
        bodies = [client.get_object(Bucket=self.bucket.name, Key=key)["Body"].read() for key in keys]
        return [json.loads(body) for body in bodies]

    def objects(self) -> dict[str, int]:
        """{key: bytes} of all that lies under this run's prefix."""
        return self.bucket.objects(f"{self.prefix}/")

    def reasons(self) -> dict[int, list[str]]:
        return {manifest["step"]: manifest["reasons"] for manifest in self.manifests()}

    def verify(self) -> Finished:
        """`engine.checkpoints verify` of every committed checkpoint; insists on exit status 0."""
        return program("engine.checkpoints", "verify", self.checkpoints, env=self.env).ok()
