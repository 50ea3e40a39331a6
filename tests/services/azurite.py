"""An Azure Blob Storage server on loopback: Azurite, in memory, with adlfs as its client."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tests.services.daemons import Daemon, free_port
from tests.services.packages import need_module, need_npm

AZURITE = "azurite@3.37.0"
ADLFS = "adlfs==2026.8.0"

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Azurite's only account; everybody knows its key."""


class Azurite:
    """The server, its data in memory. Skips the test, by name, where it or adlfs cannot be installed."""

    def __init__(self, folder: Path) -> None:
        need_module("adlfs", ADLFS)
        program = need_npm(AZURITE) / "azurite" / "dist" / "src" / "blob" / "main.js"
        self.port = free_port()
        flags = ["--blobHost", "127.0.0.1", "--blobPort", str(self.port)]
        quiet = ["--inMemoryPersistence", "--disableTelemetry", "--skipApiVersionCheck", "--silent"]
        self._daemon = Daemon(["node", str(program), *flags, *quiet], folder / "azurite.out")
        self._daemon.wait_until(self._answers, "Azurite")

    @property
    def options(self) -> dict[str, object]:
        """Storage options that reach it."""
        address = f"http://127.0.0.1:{self.port}/{ACCOUNT}"
        parts = {"DefaultEndpointsProtocol": "http", "AccountName": ACCOUNT, "AccountKey": KEY}
        text = ";".join(f"{name}={value}" for name, value in {**parts, "BlobEndpoint": address}.items())
        return {"connection_string": text}

    def client(self) -> Any:
        """Azure's own client, past everything that is under test."""
        from azure.storage.blob import BlobServiceClient

        return BlobServiceClient.from_connection_string(str(self.options["connection_string"]))

    def stop(self) -> None:
        self._daemon.kill()

    def _answers(self) -> bool:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            direct.open(f"http://127.0.0.1:{self.port}/", timeout=2.0).close()
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True
