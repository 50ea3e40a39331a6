"""`python bench/small_tensors.py`: what `save` costs where the state is many small tensors.

Copying hardly counts there; what the engine does for each tensor does. The bar: `save` returns within twice
the time of the plain copy, plus 10 ms; and seeing that nothing has changed takes at most 1 us a tensor.

Exit status: 0 after a run, whatever the figures; 2 for a wrong flag.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    # Run by path: Python has put this folder first, where its modules would hide others of their names.
    sys.path[0] = str(ROOT)

from bench.document import write_document  # noqa: E402
from bench.program import add_common_flags, at_least, verdict  # noqa: E402

VERSION = 1
"""Of the document that `--json` writes."""

MOST_TIMES_COPY = 2.0
MOST_MORE_SECS = 0.010
MOST_LOOK_SECS = 1e-6
"""Per tensor, for the pass that finds nothing changed."""

_UNTIMED = 2
"""Saves before the first that counts: they take the arena and plan."""


@dataclass(slots=True)
class Result:
    """Seconds of each pass: of `save`, of the plain copy of the same bytes, of looking for changes."""

    tensors: int
    tensor_bytes: int
    provenance: dict[str, Any]
    save_secs: list[float] = field(default_factory=list)
    copy_secs: list[float] = field(default_factory=list)
    look_secs: list[float] = field(default_factory=list)

    @property
    def limit_secs(self) -> float:
        """What `save` may take."""
        return MOST_TIMES_COPY * median(self.copy_secs) + MOST_MORE_SECS

    def text(self) -> str:
        """The figures against their bars."""
        save, copy = median(self.save_secs), median(self.copy_secs)
        look = median(self.look_secs) / self.tensors
        return "\n".join(
            [
                f"{self.tensors:,} tensors of {self.tensor_bytes:,} bytes, medians of {len(self.save_secs)}:",
                f"  plain copy   {copy * 1e3:8.2f} ms",
                f"  save         {save * 1e3:8.2f} ms; at most {self.limit_secs * 1e3:.2f} ms "
                f"({MOST_TIMES_COPY:g} x the copy + {MOST_MORE_SECS * 1e3:g} ms): "
                + verdict(save, self.limit_secs),
                f"  identity     {look * 1e6:8.3f} us a tensor; at most {MOST_LOOK_SECS * 1e6:g} us: "
                f"{verdict(look, MOST_LOOK_SECS)}",
            ]
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    options = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    result = measure(options)
    if options.json is not None:
        write_document(options.json, VERSION, asdict(result))
    print(result.text(), flush=True)
    return 0


def measure(options: argparse.Namespace) -> Result:
    """Save and copy in turn, in an order that is new in each repeat."""
    import torch
    from torch import nn

    from bench.floors import Floors
    from bench.provenance import collect
    from engine import Checkpointer
    from engine.state.capture import StateCapture

    parameters = [nn.Parameter(torch.randn(options.bytes // 4)) for _ in range(options.tensors)]
    state = {"model": nn.ParameterList(parameters)}
    options.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="small-tensors-", dir=options.dir) as folder:
        result = Result(options.tensors, options.bytes // 4 * 4, collect(Path(folder), "cpu"))
        floors = Floors(parameters, 0, 1, Path(folder))
        capture = StateCapture(state, (), 0)
        capture.capture()
        with Checkpointer(folder, state) as checkpointer:
            for number in range(1, options.repeats + _UNTIMED + 1):
                passes = ["save", "copy", "look"]
                random.Random(f"{options.seed}/{number}").shuffle(passes)
                for what in passes:
                    begin = time.perf_counter()
                    if what == "save":
                        handle = checkpointer.save(number)
                        secs = time.perf_counter() - begin
                        handle.result(60)
                    elif what == "copy":
                        secs = floors.copy(number).secs
                    else:
                        capture.capture()
                        secs = time.perf_counter() - begin
                    if number > _UNTIMED:
                        getattr(result, f"{what}_secs").append(secs)
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="small_tensors", description="What `save` costs where the state is many small tensors."
    )
    parser.add_argument("--tensors", type=at_least(1), default=10_000, help="how many (default: 10,000)")
    parser.add_argument("--bytes", type=at_least(4), default=4096, help="size of each (default: 4096)")
    parser.add_argument("--repeats", type=at_least(1), default=15, help="saves that are timed (default: 15)")
    add_common_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
