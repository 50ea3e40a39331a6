"""GPT-2 as a plain module, with Hugging Face's parameter names (see the table in `model.hf_names`).

After Radford et al. 2019, as `transformers.GPT2LMHeadModel` computes it: pre-norm blocks, learned
positions, tanh-approximated GELU, LayerNorm with epsilon 1e-5, output layer tied to the token embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import GPT2Config

LAYER_NORM_EPSILON = 1e-5


class Attention(nn.Module):
    """Causal self-attention: [batch, tokens, n_embd] to the same shape."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        split = (batch, tokens, self.n_head, width // self.n_head)
        query, key, value = (part.view(split).transpose(1, 2) for part in self.c_attn(x).split(width, dim=2))
        y = F.scaled_dot_product_attention(
            query, key, value, dropout_p=self.dropout if self.training else 0.0, is_causal=True
        )
        y = self.c_proj(y.transpose(1, 2).reshape(batch, tokens, width))
        return self.resid_dropout(y)  # type: ignore[no-any-return]


class MLP(nn.Module):
    """The feed-forward half of a block: [..., n_embd] to the same shape, with a hidden layer of 4 n_embd."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One transformer block: [batch, tokens, n_embd] to the same shape."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPSILON)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPSILON)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Embeddings, blocks and the final norm: token ids [batch, tokens] to [batch, tokens, n_embd]."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPSILON)

    def forward(self, idx: Tensor) -> Tensor:
        positions = torch.arange(idx.shape[1], device=idx.device)
        x = self.drop(self.wte(idx) + self.wpe(positions))
        for block in self.h:
            x = block(x)
        return self.ln_f(x)  # type: ignore[no-any-return]


class GPT2(nn.Module):
    """GPT-2 with its language-model head. Build it on the meta device, then materialise and initialise it.

    It has no buffers (the forward pass computes positions), so only parameters need values after `to_empty`.
    The constructor leaves torch's default values: call `model.init.init_weights`.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)

    def blocks(self) -> list[nn.Module]:
        """The modules to shard and compile one by one, in the order of the forward pass."""
        return list(self.transformer.h)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return logits and, with targets, the mean cross-entropy in nats per token.

        Args:
            idx: token ids, int64 [batch, tokens], tokens <= block_size.
            targets: the token that follows each position, int64 of the same shape; -100 is ignored.

        Returns:
            logits [batch, tokens, vocab_size] in the compute dtype, and the loss as a float32 scalar or None.

        Raises:
            ValueError: the sequence is longer than the model's block size.
        """
        tokens, longest = idx.shape[1], self.config.block_size
        if tokens > longest:
            raise ValueError(f"a sequence of {tokens} tokens is longer than the model's block_size {longest}")
        hidden = self.transformer(idx)
        # This line ties the weights. A second parameter, `lm_head.weight = wte.weight`, would be untied when
        # to_empty or fully_shard replaces parameters, and a checkpoint would then hold two embeddings.
        logits = F.linear(hidden, self.transformer.wte.weight)
        if targets is None:
            return logits, None
        # In float32 whatever the compute dtype: a bf16 log-sum-exp over 50257 logits loses the third digit.
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        return logits, loss
