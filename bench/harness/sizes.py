"""The GPT-2 that `--state` names, tokens for a step of a given length, and equal shares of bytes. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import log

from model.config import GPT2_VOCAB_SIZE, PRESETS, GPT2Config

STATE_BYTES_PER_PARAMETER = 12
"""A float32 weight and AdamW's two float32 moments."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG]?)(B?)", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
_HEAD = 64
_SMALL_VOCAB = 8192
_FULL_VOCAB_FROM = 40_000_000


def parse_state(text: str) -> GPT2Config:
    """The model for `--state`: a preset, a number of parameters (20M), or bytes of state (250MB).

    Raises:
        ValueError: neither a preset nor a size.
    """
    if text in PRESETS:
        return GPT2Config.preset(text)
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"{text!r} is neither one of {', '.join(PRESETS)} nor a size such as 20M (parameters) "
            "or 250MB (bytes of model and optimizer state)"
        )
    amount = float(match[1]) * _UNITS[match[2].upper()]
    return config_of(round(amount / STATE_BYTES_PER_PARAMETER if match[3] else amount))


def config_of(parameters: int) -> GPT2Config:
    """A GPT-2 of about that many parameters, with GPT-2's proportions of width to depth.

    Raises:
        ValueError: below a million parameters, where GPT-2's shape is lost.
    """
    if parameters < 1_000_000:
        raise ValueError(f"a GPT-2 of {parameters:,} parameters is too small to measure; ask for 1M or more")
    vocab = GPT2_VOCAB_SIZE if parameters >= _FULL_VOCAB_FROM else _SMALL_VOCAB

    def misfit(shape: GPT2Config) -> float:
        size = abs(parameter_count(shape) - parameters) / parameters
        return size + 0.05 * abs(log(shape.n_embd / shape.n_layer / _HEAD))

    shapes = []
    for width in range(_HEAD, 8192, _HEAD):
        block = parameter_count(_shape(2, width, vocab)) - parameter_count(_shape(1, width, vocab))
        rest = parameters - parameter_count(_shape(1, width, vocab))
        shapes.append(_shape(max(1, 1 + round(rest / block)), width, vocab))
    return min(shapes, key=misfit)


def _shape(layers: int, width: int, vocab: int) -> GPT2Config:
    return GPT2Config(n_layer=layers, n_head=width // _HEAD, n_embd=width, vocab_size=vocab)


def parameter_count(config: GPT2Config) -> int:
    """Parameters of a GPT-2 whose output layer is its token embedding."""
    width = config.n_embd
    embeddings = (config.vocab_size + config.block_size) * width
    return embeddings + config.n_layer * (12 * width**2 + 13 * width) + 2 * width


def fit_tokens(samples: Sequence[tuple[int, float]], target_secs: float, *, at_most: int) -> int:
    """Tokens per rank that make a step last `target_secs`, from two timed steps (tokens, seconds).

    A step takes a constant time (optimizer, communication) and some time per token.
    """
    (few, short), (many, long) = samples
    slope = max((long - short) / (many - few), 1e-9)
    constant = short - slope * few
    return round(min(max((target_secs - constant) / slope, 8), at_most))


def batch_shape(tokens: int, longest: int) -> tuple[int, int]:
    """(sequences, tokens each) of about `tokens` tokens; a sequence is a multiple of 8 up to `longest`."""
    rows = -(-tokens // longest)
    return rows, min(longest, max(8, tokens // rows // 8 * 8))


def share_of(sizes: Sequence[int], part: int, parts: int) -> list[tuple[int, int, int]]:
    """Cut the concatenation of `sizes` into equal parts: (item, begin, end) of one part, half-open."""
    total = sum(sizes)
    first, last = total * part // parts, total * (part + 1) // parts
    pieces, position = [], 0
    for item, size in enumerate(sizes):
        begin, end = max(first - position, 0), min(last - position, size)
        if begin < end:
            pieces.append((item, begin, end))
        position += size
    return pieces
