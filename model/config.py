"""The shape of a GPT-2 as a frozen value, and the presets. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

GPT2_VOCAB_SIZE = 50257


@dataclass(frozen=True, slots=True, kw_only=True)
class GPT2Config:
    """The settings that determine the parameters' shapes and the forward pass.

    In parentheses: the name in Hugging Face's `GPT2Config`, where it differs.

    Raises:
        ValueError: an invalid value; the message has the numbers.
    """

    n_layer: int
    """Transformer blocks."""
    n_head: int
    """Attention heads per block; must divide `n_embd`."""
    n_embd: int
    """Width of the residual stream."""
    vocab_size: int = GPT2_VOCAB_SIZE
    """Rows of the token embedding, which is also the output layer."""
    block_size: int = 1024
    """Longest sequence, in tokens (`n_positions`)."""
    dropout: float = 0.0
    """One rate for embeddings, attention and residuals (`embd_pdrop`, `attn_pdrop`, `resid_pdrop`)."""

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "vocab_size", "block_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd {self.n_embd} does not divide by n_head {self.n_head}: "
                f"{self.n_embd} = {self.n_head} x {self.n_embd // self.n_head} + {self.n_embd % self.n_head}"
            )
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, int | float):
            raise ValueError(f"dropout must be a number, not {self.dropout!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")

    @classmethod
    def preset(
        cls,
        name: str,
        *,
        vocab_size: int | None = None,
        block_size: int | None = None,
        dropout: float | None = None,
    ) -> GPT2Config:
        """Return the preset `name`, with the given values instead of its own; None keeps the preset's.

        Raises:
            ValueError: an unknown preset (the message lists them) or an invalid value.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown model {name!r}; choose one of {', '.join(PRESETS)}")
        wanted: dict[str, Any] = {"vocab_size": vocab_size, "block_size": block_size, "dropout": dropout}
        return dataclasses.replace(PRESETS[name], **{k: v for k, v in wanted.items() if v is not None})

    def to_dict(self) -> dict[str, int | float]:
        """Return the fields as a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> GPT2Config:
        """Rebuild the result of `to_dict`.

        Raises:
            ValueError: a field is unknown, missing or invalid.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(fields) - set(known))
        missing = [name for name in known if name not in fields]
        if unknown or missing:
            raise ValueError(f"not a GPT-2 configuration: unknown fields {unknown}, missing fields {missing}")
        return cls(**fields)


PRESETS: Mapping[str, GPT2Config] = MappingProxyType(
    {
        # 0.8 M parameters without embeddings: trains on two CPU cores with the byte tokenizer.
        "nano": GPT2Config(n_layer=4, n_head=4, n_embd=128, block_size=256),
        "gpt2": GPT2Config(n_layer=12, n_head=12, n_embd=768),
        "gpt2-medium": GPT2Config(n_layer=24, n_head=16, n_embd=1024),
        "gpt2-large": GPT2Config(n_layer=36, n_head=20, n_embd=1280),
        "gpt2-xl": GPT2Config(n_layer=48, n_head=25, n_embd=1600),
    }
)
