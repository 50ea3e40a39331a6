"""`python -m engine.generate`: samples text from a checkpoint or an exported model.

Exit status: 0, or 2 when the user has to act (one sentence says what to do).
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from typing import NoReturn

from engine.errors import ConfigError, HoldfastError
from engine.run.entry import enter

USER_ERROR = 2
_INTERRUPTED = 130

_DESCRIPTION = "Sample text from a checkpoint or an exported model."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    logger = logging.getLogger("engine")
    logger.handlers = [logging.StreamHandler()]
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        _generate(arguments)
    except HoldfastError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        return _INTERRUPTED
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. ConfigError for a mistake."""
    parser = _Parser(prog="python -m engine.generate", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument(
        "--from",
        dest="source",
        default="latest",
        help="latest, backup, best, epoch:N, step:N, a path or URI of a checkpoint, or an exported model (a "
        "directory from --format hf, or a .pt file) (default: latest)",
    )
    parser.add_argument(
        "--checkpoint_dir", default="./checkpoints", help="directory in which to look up latest, best, ..."
    )
    parser.add_argument("--prompt", default="", help="text to continue (default: the start of a document)")
    parser.add_argument(
        "--max_new_tokens", type=int, default=100, help="largest number of tokens to add (default: 100)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 always takes the likeliest token (default: 0.8)"
    )
    parser.add_argument(
        "--top_k", type=int, default=200, help="sample from the N likeliest tokens; 0: all (default: 200)"
    )
    parser.add_argument("--seed", type=int, default=1337, help="the same seed gives the same text")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--storage_options", metavar="KEY=VALUE", action="append", default=[], help="for a store; repeatable"
    )
    arguments = parser.parse_args([_with_underscores(argument) for argument in argv])
    if arguments.max_new_tokens < 1:
        raise ConfigError(f"--max_new_tokens is {arguments.max_new_tokens}, but must be at least 1")
    if not 0 <= arguments.temperature < math.inf:
        raise ConfigError(f"--temperature is {arguments.temperature:g}, but must be 0 or more")
    if arguments.top_k < 0:
        raise ConfigError(f"--top_k is {arguments.top_k}, but must be 0 or more")
    return arguments


class _Parser(argparse.ArgumentParser):
    """Reports a mistake as one sentence, like every other error, instead of a usage text."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def _with_underscores(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if argument.startswith("--") else argument


def _options(pairs: Sequence[str]) -> dict[str, str]:
    options = {}
    for position, pair in enumerate(pairs, start=1):
        key, equals, value = pair.partition("=")
        if not key or not equals:
            # The entry may be a secret, so the message gives only its position.
            raise ConfigError(f"--storage_options takes KEY=VALUE entries; entry {position} is not one")
        options[key] = value
    return options


def _generate(arguments: argparse.Namespace) -> None:
    # Local imports: a wrong flag or --help must not wait for torch.
    from data.errors import DataError
    from data.tokenizer import load_tokenizer
    from engine.gpt2.load_model import load_model
    from engine.gpt2.sample import sample
    from engine.gpt2.tokenizer_files import tokenizer_name

    loaded = load_model(
        arguments.source, arguments.checkpoint_dir, arguments.device, _options(arguments.storage_options)
    )
    vocab_size = loaded.config.vocab_size
    name = tokenizer_name(vocab_size)
    if name is None:
        raise ConfigError(
            f"{loaded.what} has a vocabulary of {vocab_size}, which is neither GPT-2's nor that of bytes"
        )
    try:
        tokenizer = load_tokenizer(name)
        prompt = [int(token) for token in tokenizer.encode(arguments.prompt)]
    except DataError as error:
        raise ConfigError(str(error)) from error
    print(f"{loaded.what}: {loaded.described}", file=sys.stderr)
    tokens = sample(
        loaded.model,
        prompt or [tokenizer.eot_token],
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        seed=arguments.seed,
        known_tokens=tokenizer.vocab_size,
        end=tokenizer.eot_token,
    )
    print(_visible(arguments.prompt + tokenizer.decode(tokens)))


def _visible(text: str) -> str:
    """Replace control characters: a half-trained byte model may print them, and a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def run() -> None:
    """Run the program to the end of the process."""
    sys.exit(main())


if __name__ == "__main__":
    enter("engine.generate")
