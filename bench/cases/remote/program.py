"""`python bench/remote.py --uri s3://bucket/prefix`: how fast shards travel to an S3 store and back.

Holdfast beside obstore and s3fs, each in a process of its own, interleaved. Start the server yourself, and
pass its address in the environment (AWS_ENDPOINT_URL, ...) or by --storage_options. Everything is written
in a new folder below the prefix, which is deleted at the end.

Exit status: 0 after a run, whatever the figures; 1 when no row could be measured; 2 for a wrong flag.
"""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench.cases.remote import worker
from bench.cases.remote.report import Figures, RemoteReport, read
from bench.cases.remote.rows import ROWS
from bench.harness.options import add_load_flag, at_least, base_parser
from bench.harness.records import shuffled
from bench.harness.report import finish

_SAMPLES = {"upload": 1, "download": 4}
"""Samples of a row in each repeat: a download takes a quarter of the time, and is as noisy."""

_PACKAGES = ("s3fs", "fsspec", "aiobotocore", "botocore", "obstore")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    options = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    report = read(options.load) if options.load is not None else measure(options)
    status = finish(options, lambda: report)
    return status if any(row.secs for row in report.rows) else 1


def measure(options: argparse.Namespace) -> RemoteReport:
    """Start a process per row and have them move shards in turn, in a new order each repeat."""
    from bench.harness.provenance import collect, versions_of

    shard_bytes = options.shard_mb * 1_000_000
    storage_options = dict(pair.split("=", 1) for pair in options.storage_options)
    uri = f"{options.uri.rstrip('/')}/bench-{secrets.token_hex(4)}"
    provenance = collect(Path.cwd())
    provenance["versions"] |= versions_of(_PACKAGES)
    provenance["server"] = options.server
    recorded = {name: getattr(options, name) for name in ("shard_mb", "repeats", "seed")}
    figures = [Figures(row.name, row.verb, row.peer) for row in ROWS]
    report = RemoteReport(provenance, recorded, shard_bytes, figures)
    # Uploads come first in ROWS: they write the warm-up's object, which downloads read.
    pools = [ProcessPoolExecutor(1, get_context("spawn")) for _ in ROWS]

    def run(number: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function in a row's process; its error is the row's failure, and ends its part."""
        if not figures[number].failure:
            try:
                return pools[number].submit(function, *arguments).result()
            except Exception as error:
                figures[number].failure = f"{type(error).__name__}: {error}"[:300]
        return None

    try:
        given = secrets.token_bytes(1 << 20)
        for number in range(len(ROWS)):
            run(number, worker.start, number, uri, storage_options, shard_bytes, given)
        run(0, worker.move, "shard")  # what downloads read; no sample
        turns = [number for number, row in enumerate(ROWS) for _ in range(_SAMPLES[row.verb])]
        for repeat in range(options.repeats):
            for number in shuffled(turns, options.seed, repeat):
                name = "shard" if ROWS[number].verb == "download" else f"upload-{number}"
                if moved := run(number, worker.move, name):
                    figures[number].add(*moved)
            print(f"repeat {repeat + 1} of {options.repeats}", file=sys.stderr, flush=True)
    finally:
        for pool in pools:
            pool.shutdown()
        _clear(options.uri, uri, storage_options)
    return report


def _clear(parent: str, uri: str, storage_options: dict[str, str]) -> None:
    from engine.storage.open import open_storage

    open_storage(parent, storage_options).delete_tree(uri.rpartition("/")[2])


def _parser() -> argparse.ArgumentParser:
    parser = base_parser(
        "remote", "Shards to an S3 store and back: Holdfast beside obstore and s3fs.", repeats=7
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--uri", help="s3://bucket/prefix to work under")
    add_load_flag(where)
    parser.add_argument(
        "--storage_options", nargs="*", default=[], metavar="KEY=VALUE", help="as the programs take them"
    )
    parser.add_argument("--server", default="", help="what the server is, for the record")
    parser.add_argument(
        "--shard_mb", type=at_least(1), default=256, help="size of a shard in MB (default: %(default)s)"
    )
    return parser
