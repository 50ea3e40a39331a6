"""`python bench/remote.py --uri s3://bucket/prefix`: how fast shards go to an S3 store and come back.

Holdfast beside obstore and s3fs, each in a process of its own, interleaved. The server is not part of it:
start one, and give its address by environment (AWS_ENDPOINT_URL, ...) or --storage_options. Everything
below the prefix is overwritten, and deleted at the end.

Exit status: 0 after a run, whatever the figures; 1 when no row could be measured; 2 for a wrong flag.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import secrets
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    # Run by path: Python has put this folder first, where its modules would hide others of their names.
    sys.path[0] = str(ROOT)

from bench.program import at_least  # noqa: E402
from bench.remoting.report import Figures, Report, read  # noqa: E402
from bench.remoting.rows import ROWS  # noqa: E402
from bench.remoting.worker import serve  # noqa: E402

_SAMPLES = {"upload": 1, "download": 4}
"""Samples of a row in each repeat: a download takes a quarter of the time, and is as noisy."""

_PACKAGES = ("s3fs", "fsspec", "aiobotocore", "botocore", "obstore")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    options = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    report = read(options.load) if options.load is not None else measure(options)
    if options.json is not None:
        report.write(options.json)
    print(report.text(), flush=True)
    return 0 if any(row.secs for row in report.rows) else 1


def measure(options: argparse.Namespace) -> Report:
    """Start a process per row, and have them move shards in turn, in a new order each repeat."""
    from bench.provenance import collect, versions_of

    shard_bytes = options.shard_mb * 1_000_000
    storage_options = dict(pair.split("=", 1) for pair in options.storage_options)
    uri = f"{options.uri.rstrip('/')}/bench-{secrets.token_hex(4)}"
    given = secrets.token_bytes(1 << 20)
    provenance = collect(Path.cwd(), "cpu")
    provenance["versions"] |= versions_of(_PACKAGES)
    provenance["server"] = options.server
    report = Report(provenance, shard_bytes, [Figures(row.name, row.verb, row.peer) for row in ROWS])
    context = multiprocessing.get_context("spawn")
    pipes: dict[int, Connection] = {}
    processes = []
    try:
        # Uploads first: the object that downloads read, and their warm-up, have to be there.
        for number in sorted(range(len(ROWS)), key=lambda number: ROWS[number].verb == "download"):
            pipe, theirs = context.Pipe()
            arguments = (theirs, number, uri, storage_options, shard_bytes, given)
            process = context.Process(target=serve, args=arguments)
            process.start()
            processes.append(process)
            theirs.close()
            pipes[number] = pipe
            _note(report.rows[number], _receive(pipe))
        _ask(pipes, report, 0, "shard")
        report.rows[0].secs.clear()
        for repeat in range(options.repeats):
            order = [number for number in pipes for _ in range(_SAMPLES[ROWS[number].verb])]
            random.Random(f"{options.seed}/{repeat}").shuffle(order)
            for number in order:
                down = ROWS[number].verb == "download"
                _ask(pipes, report, number, "shard" if down else f"upload-{number}")
            print(f"repeat {repeat + 1} of {options.repeats}", file=sys.stderr, flush=True)
    finally:
        for pipe in pipes.values():
            pipe.close()
        for process in processes:
            process.join()
        _clear(options.uri, uri, storage_options)
    return report


def _ask(pipes: dict[int, Connection], report: Report, number: int, name: str) -> None:
    if report.rows[number].failure:
        return
    pipes[number].send(name)
    _note(report.rows[number], _receive(pipes[number]))


def _receive(pipe: Connection) -> object:
    try:
        return pipe.recv()
    except EOFError:
        return "the process ended"


def _note(row: Figures, answer: object) -> None:
    if isinstance(answer, tuple):
        row.secs.append(answer[0])
        row.above_bytes = max(row.above_bytes, answer[1])
    elif answer != "ready":
        row.failure = str(answer)


def _clear(parent: str, uri: str, storage_options: dict[str, str]) -> None:
    from engine.storage.open import open_storage

    open_storage(parent, storage_options).delete_tree(uri.rpartition("/")[2])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="remote", description="Shards to an S3 store and back: Holdfast beside obstore and s3fs."
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--uri", help="s3://bucket/prefix to work under")
    where.add_argument("--load", type=Path, metavar="JSON", help="measure nothing: print an earlier --json")
    parser.add_argument(
        "--storage_options", nargs="*", default=[], metavar="KEY=VALUE", help="as the programs take them"
    )
    parser.add_argument("--server", default="", help="what the server is, for the record")
    parser.add_argument(
        "--shard_mb", type=at_least(1), default=256, help="size of a shard in MB (default: 256)"
    )
    parser.add_argument("--repeats", type=at_least(1), default=7, help="samples of every row (default: 7)")
    parser.add_argument("--seed", type=int, default=1, help="of the order")
    parser.add_argument("--json", type=Path, help="write everything that was measured here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
