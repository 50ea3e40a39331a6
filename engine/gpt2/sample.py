"""Samples tokens from a GPT-2."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from model.gpt2 import GPT2


@torch.no_grad()
def sample(
    model: GPT2,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    known_tokens: int,
    end: int,
) -> list[int]:
    """Sample the tokens that follow `prompt` (at least one token), up to the token `end`, without it.

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample from the `top_k` likeliest tokens; 0 means all.
        seed: seeds a separate generator; the global one is not used.
        known_tokens: size of the tokenizer's vocabulary; rows added as padding are never sampled.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    model.eval()
    tokens = torch.tensor([list(prompt)], dtype=torch.int64, device=device)
    drawn: list[int] = []
    for _ in range(max_new_tokens):
        logits, _ = model(tokens[:, -model.config.block_size :])
        token = _draw(logits[0, -1, :known_tokens].float(), temperature, top_k, generator)
        if token == end:
            break
        drawn.append(token)
        tokens = torch.cat([tokens, torch.tensor([[token]], device=device)], dim=1)
    return drawn


def _draw(logits: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    logits = logits / temperature
    if 0 < top_k < logits.numel():
        least = logits.topk(top_k).values[-1]
        logits = logits.masked_fill(logits < least, float("-inf"))
    return int(torch.multinomial(logits.softmax(0), 1, generator=generator))
