"""A small benchmark: a few passes timed in turn in one process, each repeat in an order of its own."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.harness.launch import temporary_folder
from bench.harness.options import add_dir_flag, at_least, base_parser, given
from bench.harness.provenance import collect
from bench.harness.records import Spread, shuffled
from bench.harness.report import Report, Verdict, finish, markdown, seconds, verdict_table

Secs = Mapping[str, Sequence[float]]
"""The samples of each pass."""
Passes = Mapping[str, Callable[[int], float]]
"""What to time: each gets the number of its turn, which counts from 1, and returns the seconds it took."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What is special to one small benchmark.

    Attributes:
        flags: name -> (type, default, help) of the flags beside those that all have.
        title: what is measured, in a line, with the names of options in braces.
        passes: a context within which the passes can be timed; it may use the folder.
        verdicts: the figures against their bars, of the options and the samples.
        untimed: turns before the first one that counts, to warm up.
    """

    name: str
    description: str
    repeats: int
    flags: Mapping[str, tuple[Callable[[str], Any], Any, str]]
    title: str
    passes: Callable[[Namespace, Path], AbstractContextManager[Passes]]
    verdicts: Callable[[Mapping[str, Any], Secs], list[Verdict]]
    untimed: int = 0

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run the program; returns the exit status, which is 0 whatever the figures."""
        parser = base_parser(self.name, self.description, repeats=self.repeats)
        for flag, (kind, default, text) in self.flags.items():
            parser.add_argument(
                f"--{flag}", type=kind, default=default, help=f"{text} (default: %(default)s)"
            )
        add_dir_flag(parser)
        options = parser.parse_args(sys.argv[1:] if argv is None else argv)
        return finish(options, lambda: self._measure(options))

    def _measure(self, options: Namespace) -> PassesReport:
        with temporary_folder(options.dir, self.name) as folder, self.passes(options, folder) as passes:
            provenance = collect(folder)
            secs: dict[str, list[float]] = {name: [] for name in passes}
            for turn in range(1, self.untimed + options.repeats + 1):
                for name in shuffled(passes, options.seed, turn):
                    taken = passes[name](turn)
                    if turn > self.untimed:
                        secs[name].append(taken)
        return PassesReport(provenance, given(options), self, secs)


@dataclass
class PassesReport(Report):
    """Every sample of every pass."""

    benchmark: Benchmark
    secs: Secs

    def text(self) -> str:
        lines = [[name, seconds(Spread.of(secs), 4)] for name, secs in self.secs.items()]
        title = self.benchmark.title.format(**self.options)
        return "\n\n".join(
            [
                f"{title}; medians (lowest - highest) of {self.options['repeats']} repeats",
                markdown(["pass", "seconds"], lines),
                verdict_table(self.benchmark.verdicts(self.options, self.secs)),
            ]
        )

    def document(self) -> dict[str, Any]:
        verdicts = [asdict(one) for one in self.benchmark.verdicts(self.options, self.secs)]
        return {"provenance": self.provenance, "options": self.options, "verdicts": verdicts, **self.secs}


def count(least: int, default: int, text: str) -> tuple[Callable[[str], int], int, str]:
    """A flag for a whole number."""
    return at_least(least), default, text
