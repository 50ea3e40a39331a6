"""`python -m engine.resume`: resumes a run on any number of ranks, with the checkpoint's own flags.

It launches `engine.train --resume ...` through torch's elastic launcher, in this process. The user's mistakes
are reported before torch is loaded.

Exit status: 0; 2 when the user has to act; 1 when a worker failed otherwise; 128 + n after signal n.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from data.batch import split_batch
from data.errors import DataError
from engine.directory.listing import read_index, read_manifest
from engine.errors import ConfigError, HoldfastError, SelectorError
from engine.resume.read_plan import plan_reads
from engine.run.cli import is_given, parse, resolve
from engine.run.config import TrainConfig, complete
from engine.run.mesh import MeshShape
from engine.run.start import Restart, Start, find_start
from engine.storage.open import open_storage
from engine.text import readable_bytes

USER_ERROR = 2
PROGRAM = "python -m engine.resume"

LAUNCHER_FLAGS = (
    "nnodes",
    "node_rank",
    "rdzv_backend",
    "rdzv_endpoint",
    "rdzv_id",
    "rdzv_conf",
    "master_addr",
    "master_port",
    "local_addr",
    "max_restarts",
    "monitor_interval",
    "signals_to_handle",
)
"""Flags that are passed to torchrun unchanged."""

FORWARDED = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
"""torchrun's own signals and Slurm's two, which would kill it without a signal to the workers."""

_INSTEAD = {"--resume": "--from SELECTOR", "--nproc_per_node": "--reshard RANKS_OVER_ALL_NODES"}


@dataclass(frozen=True, slots=True)
class Request:
    """The parsed command line. `train` holds the flags for engine.train, `launcher` those for torchrun."""

    ranks: int | None
    selector: str
    dry_run: bool
    nodes: int
    launcher: tuple[str, ...]
    train: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    logging.basicConfig(format="%(levelname)s %(message)s")
    try:
        request = read_flags(sys.argv[1:] if argv is None else argv)
        session = parse((*request.train, "--resume", request.selector), prog=PROGRAM)
        given = is_given(request.train, "checkpoint_dir")
        start = find_start(session, directory_given=given, restart=Restart())
        mesh = check(request, session, start)
        if request.dry_run:
            dry_run(session, start, mesh)
            return 0
        print(f"{start.sentence}, on {mesh.world_size} rank{'s' * (mesh.world_size > 1)}", flush=True)
        return launch(request, start, mesh.world_size)
    except (HoldfastError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:  # also during the seconds that loading torch takes
        return 128 + signal.SIGINT


def read_flags(argv: Sequence[str]) -> Request:
    """Split the flags into ours, torchrun's, and the rest, for engine.train. Raises ConfigError."""
    parser = _Parser(prog=PROGRAM, description=__doc__.splitlines()[0], allow_abbrev=False, add_help=True)
    parser.add_argument("--reshard", type=int, metavar="N", help="ranks over all nodes (default: as saved)")
    parser.add_argument("--from", dest="selector", default="latest", help="checkpoint (default: latest)")
    parser.add_argument("--dry_run", action="store_true", help="print what each rank would read, and exit")
    launcher = parser.add_argument_group("torchrun's own flags, passed through")
    for flag in LAUNCHER_FLAGS:
        launcher.add_argument(f"--{flag}")
    parser.epilog = "Any other flag goes to engine.train and overrides the checkpoint's configuration."
    given, rest = parser.parse_known_args([_with_underscores(argument) for argument in argv])
    for other, ours in _INSTEAD.items():
        if any(argument.split("=")[0] == other for argument in rest):
            raise ConfigError(f"engine.resume takes {ours} instead of {other}")
    if given.reshard is not None and given.reshard < 1:
        raise ConfigError(f"--reshard is {given.reshard}, but must be at least 1")
    passed = [
        f"--{flag}={getattr(given, flag)}" for flag in LAUNCHER_FLAGS if getattr(given, flag) is not None
    ]
    return Request(
        given.reshard, given.selector, given.dry_run, _nodes(given.nnodes), tuple(passed), tuple(rest)
    )


def check(request: Request, session: TrainConfig, start: Start) -> MeshShape:
    """The ranks to launch, as a mesh. Raises here what the workers would refuse."""
    if start.selector is None or start.world_size is None:
        where = open_storage(start.checkpoint_dir, session.storage_mapping).uri
        raise SelectorError(f"{where} holds no checkpoint to resume: start a run with engine.train")
    ranks = request.ranks or start.world_size
    if ranks % request.nodes:
        raise ConfigError(
            f"{ranks} ranks do not divide evenly over {request.nodes} nodes: {ranks} = {request.nodes} x "
            f"{ranks // request.nodes} + {ranks % request.nodes}; change --reshard or --nnodes"
        )
    config = complete(resolve((*request.train, "--resume", request.selector), start.stored, session))
    split_batch(config.global_batch, ranks)
    return MeshShape.split(ranks, config.dp_replicate)


def dry_run(session: TrainConfig, start: Start, mesh: MeshShape) -> None:
    """Print which shards and how many bytes each rank would read."""
    storage = open_storage(start.home, session.storage_mapping)
    manifest = read_manifest(storage, start.name)
    indexes = [read_index(storage, manifest, rank, name=start.name) for rank in range(manifest.world_size)]
    total = readable_bytes(manifest.total_bytes)
    print(f"{start.sentence}: {total}, saved by {manifest.world_size} ranks, to be read by {mesh.world_size}")
    for rank in range(mesh.world_size):
        reads = plan_reads(indexes, mesh, rank)
        files = ", ".join(f"{read.file} {readable_bytes(read.read_bytes)}" for read in reads)
        read, needed = sum(item.read_bytes for item in reads), sum(item.needed_bytes for item in reads)
        print(f"rank {rank} reads {read:,} bytes for {needed:,} bytes of state: {files}")


def launch(request: Request, start: Start, ranks: int) -> int:
    """Run the workers under torch's elastic launcher until they end; returns the exit status.

    Raises ConfigError when the launcher rejects its flags or cannot reach the other nodes.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    try:
        torchrun.main(launch_arguments(request, start, ranks))
    except ChildFailedError as error:
        # torchrun turns any failure into 1; a worker's 2 means that it printed a message for the user.
        return USER_ERROR if any(f.exitcode == USER_ERROR for f in error.failures.values()) else 1
    except SignalException as error:
        return 128 + int(error.sigval)
    except (ValueError, RendezvousError) as error:
        given = " ".join(request.launcher) or "none given"
        raise ConfigError(
            f"torch's launcher did not start the ranks: {error}; check its flags ({given})"
        ) from error
    return 0


def launch_arguments(request: Request, start: Start, ranks: int) -> list[str]:
    """torchrun's command line, with the directory in which the checkpoint was found."""
    nproc = ranks // request.nodes
    train = (*request.train, f"--checkpoint_dir={start.checkpoint_dir}", f"--resume={start.selector}")
    # First, so that the user's own flag wins. torchrun sets TORCHELASTIC_SIGNALS_TO_HANDLE from it.
    launcher = (f"--signals_to_handle={FORWARDED}", *request.launcher)
    return [*launcher, f"--nproc_per_node={nproc}", "-m", "engine.train", *train]


def _nodes(flag: str | None) -> int:
    """The largest number of nodes: torchrun also takes MIN:MAX."""
    try:
        nodes = int((flag or "1").split(":")[-1])
    except ValueError:
        nodes = 0
    if nodes < 1:
        raise ConfigError(f"--nnodes is {flag}, but must be a number of nodes or MIN:MAX")
    return nodes


def _with_underscores(argument: str) -> str:
    """--dry-run=x-y -> --dry_run=x-y"""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


class _Parser(argparse.ArgumentParser):
    """Reports a mistake as one sentence, like every other error, instead of a usage text."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def run() -> None:
    """Run the program to the end of the process."""
    sys.exit(main())
