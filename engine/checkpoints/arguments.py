"""The command line. Flags have underscores; dashes are accepted, too."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from engine.errors import ConfigError
from engine.format.best import MODES

PROGRAM = "python -m engine.checkpoints"


class _Parser(argparse.ArgumentParser):
    """A mistake becomes one sentence like every other error, not a usage text."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; `command` is always set. ConfigError for a mistake."""
    return _parser().parse_args([_with_underscores(argument) for argument in argv])


def _with_underscores(argument: str) -> str:
    """--dry-run=x-y -> --dry_run=x-y"""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _parser() -> argparse.ArgumentParser:
    common = _Parser(add_help=False, allow_abbrev=False)
    common.add_argument(
        "--storage_options",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        type=_option,
        help="an option for the store's fsspec file system; may be given several times",
    )
    json = _Parser(add_help=False, allow_abbrev=False)
    json.add_argument("--json", action="store_true", help="print JSON instead of text")

    parser = _Parser(prog=PROGRAM, description="Look after a directory of checkpoints.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, target: str, help: str, *more: _Parser, nargs: int | str | None = None) -> _Parser:
        parents = [common, *more]
        added = commands.add_parser(name, help=help, description=help, parents=parents, allow_abbrev=False)
        added.add_argument("target", metavar=target, nargs=nargs, help=_TARGETS[target])
        return added

    listing = command("list", "DIR", "list the checkpoints of a directory, and their roles", json)
    listing.add_argument(
        "--mirror", metavar="URI", help="also list the run's mirror, and what is not yet copied to it"
    )
    copy = command("copy", "DIR_OR_CKPT", "copy checkpoints, verified on arrival; rerun to resume")
    copy.add_argument("to", metavar="DIR_TO", help="checkpoint directory to copy to: a path or an fsspec URI")
    copy.add_argument("--select", help=f"copy only one: {_SELECTORS}")
    show = command("show", "DIR_OR_CKPT", "show the manifest of one checkpoint", json)
    show.add_argument("--select", default="latest", help=_SELECT)
    verify = command(
        "verify", "DIR_OR_CKPT", "compare every block with its digest; exit code 1 on damage", json
    )
    verify.add_argument("--quick", action="store_true", help="check sizes, indexes and headers only")
    command("hold", "CKPT", "exempt a checkpoint from retention")
    command("release", "CKPT", "let retention delete a held checkpoint again")
    prune = command("prune", "DIR", "apply a retention policy by hand, with a reason for each checkpoint")
    prune.add_argument(
        "--rolling", type=_count, metavar="N", help="keep the newest N (default: the run's, or 10)"
    )
    prune.add_argument("--best", type=_count, metavar="N", default=1, help="keep the N best (default: 1)")
    prune.add_argument(
        "--best_metric", metavar="NAME", help="the metric that decides which is best (default: the run's)"
    )
    prune.add_argument(
        "--best_mode", choices=MODES, help="whether its lowest or highest is best (default: the run's)"
    )
    prune.add_argument("--no_epochs", action="store_true", help="do not keep those that closed an epoch")
    prune.add_argument("--dry_run", action="store_true", help="only print what would be deleted")
    command(
        "selftest", "DIR", "is this storage safe for atomic commits, and how fast? exit code 1 if not", json
    )
    export = command("export", "DIR_OR_CKPT", "write a checkpoint for another tool")
    export.add_argument("--to", required=True, metavar="TARGET", help=_NEW)
    export.add_argument(
        "--format",
        required=True,
        choices=("hf", "torch", "dcp"),
        help="hf: what transformers loads; torch: one .pt; dcp: a stock DCP directory",
    )
    export.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), help="convert the model's weights (default: as they are)"
    )
    export.add_argument("--model_only", action="store_true", help="leave the optimizer and the rest out")
    export.add_argument("--select", default="latest", help=_SELECT)
    imported = command("import", "SRC", "convert another tool's checkpoint to a Holdfast checkpoint")
    imported.add_argument("--to", required=True, metavar="DIR", help=_TARGETS["DIR"])
    imported.add_argument(
        "--trust_pickle", action="store_true", help="unpickle objects, which runs any code that is in them"
    )
    merge = command("merge", "CKPT", "average the weights of checkpoints into a new one", nargs="+")
    merge.add_argument("--to", required=True, metavar="DIR", help=_TARGETS["DIR"])
    merge.add_argument(
        "--weights",
        type=_numbers,
        metavar="W,W,...",
        help="one per checkpoint; only their ratios matter (default: equal)",
    )
    command("diff", "CKPT", "compare two checkpoints' tensors; exit code 1 if they differ", json, nargs=2)
    return parser


_SELECTORS = "latest, backup, best, epoch:N, step:N, best:METRIC:max or an id"
_SELECT = f"{_SELECTORS} (default: latest)"
_NEW = "what to write: a path or URI that does not exist yet"
_TARGETS = {
    "DIR": "checkpoint directory: a path or an fsspec URI",
    "CKPT": "one checkpoint in its directory: a path or URI",
    "DIR_OR_CKPT": "checkpoint directory, or one checkpoint in it: a path or URI",
    "SRC": "another tool's checkpoint, a file or a directory (see docs/convert.md): a path or URI",
}


def _option(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        # Without the text itself: it may be a secret.
        raise argparse.ArgumentTypeError("give each option as KEY=VALUE")
    return key, value


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1,1,2") from None


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of checkpoints")
    return int(text)
