"""`selftest`: test whether a storage is safe for atomic commits, and how fast it is."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from engine.checkpoints.terminal import printable
from engine.storage.open import open_storage
from engine.storage.selftest import selftest

EXIT_UNSAFE = 1
_MARKS = {True: "ok  ", False: "FAIL", None: "note"}


def run(arguments: argparse.Namespace) -> int:
    """Test the storage and report. Exit code 1 if it is not safe."""
    storage = open_storage(arguments.target, dict(arguments.storage_options), create=True)
    checks = []
    for check in selftest(storage):
        checks.append(check)
        if not arguments.json:
            print(f"{_MARKS[check.ok]}  {check.name:<18}{printable(check.sentence)}", flush=True)
    safe = all(check.ok is not False for check in checks)
    if arguments.json:
        document = {"uri": storage.uri, "safe": safe, "durability": storage.durability}
        print(json.dumps({**document, "checks": [asdict(check) for check in checks]}))
    else:
        print(f"{'safe' if safe else 'NOT SAFE'} for checkpoints: {storage.uri}")
        print(f"durability: {storage.durability}")
    return 0 if safe else EXIT_UNSAFE
