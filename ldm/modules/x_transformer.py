"""The pre-norm transformer encoder that latent diffusion's text and token conditioners use.

Attention always has 8 heads of 64 channels, whatever the width. Module names follow the published checkpoints:
`attn_layers.layers.I.0` is a LayerNorm, `.1` an attention (even I) or feed-forward (odd I) block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = 8
DIM_HEAD = 64
FF_MULT = 4
INIT_STD = 0.02


class AbsolutePositionalEmbedding(nn.Module):
    """Learned position vectors; `forward(length)` gives the first `length` of them."""

    def __init__(self, dim: int, max_seq_len: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(max_seq_len, dim)
        nn.init.normal_(self.emb.weight, std=INIT_STD)

    def forward(self, length: int) -> Tensor:
        """Position vectors (length, D); raises ValueError when `length` exceeds the table."""
        if length > self.emb.num_embeddings:
            raise ValueError(f"{length} tokens do not fit the transformer's {self.emb.num_embeddings} positions")
        return self.emb.weight[:length]


class Attention(nn.Module):
    """Multi-head self-attention without causal mask."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        inner = HEADS * DIM_HEAD
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(dim, inner, bias=False)
        self.to_v = nn.Linear(dim, inner, bias=False)
        self.to_out = nn.Linear(inner, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend over `x` (B, L, D); `mask` (B, L) is True where a token counts, both as query and as key."""
        q, k, v = (to(x).unflatten(-1, (HEADS, DIM_HEAD)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        bias = None
        if mask is not None:
            pair = mask[:, None, :, None] & mask[:, None, None, :]  # (B, 1, L, L)
            # The most negative number rather than -inf: a query without any key then attends to all tokens evenly.
            bias = torch.zeros_like(pair, dtype=q.dtype).masked_fill(~pair, torch.finfo(q.dtype).min)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # (B, heads, L, d)
        return self.to_out(out.transpose(1, 2).flatten(2))  # (B, L, D)


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # Slot 1 is the published (never used) dropout: it keeps the second linear layer's name `net.2`.
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(dim, FF_MULT * dim), nn.GELU()), nn.Identity(), nn.Linear(FF_MULT * dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token of `x` (B, L, D)."""
        return self.net(x)


class PreNormBlock(nn.ModuleList):
    """Norm (slot 0), then attention or feed-forward (slot 1), added to the input."""

    def __init__(self, dim: int, block: Attention | FeedForward) -> None:
        super().__init__([nn.LayerNorm(dim), block])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Transform `x` (B, L, D)."""
        norm, block = self
        h = norm(x)
        return x + (block(h, mask) if isinstance(block, Attention) else block(h))


class Encoder(nn.Module):
    """`depth` pairs of attention and feed-forward blocks."""

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(depth):
            self.layers.append(PreNormBlock(dim, Attention(dim)))
            self.layers.append(PreNormBlock(dim, FeedForward(dim)))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Transform `x` (B, L, D); `mask` (B, L) is True where a token counts."""
        for layer in self.layers:
            x = layer(x, mask)
        return x


class TransformerWrapper(nn.Module):
    """Token and position embedding, `Encoder`, final norm and a projection to logits.

    The diffusion model conditions on the embeddings; `to_logits` is unused there but part of every published
    checkpoint.
    """

    def __init__(self, num_tokens: int, max_seq_len: int, dim: int, depth: int, embedding_dropout: float = 0.0) -> None:
        super().__init__()
        self.max_seq_len = max_seq_len
        self.token_emb = nn.Embedding(num_tokens, dim)
        nn.init.normal_(self.token_emb.weight, std=INIT_STD)
        self.pos_emb = AbsolutePositionalEmbedding(dim, max_seq_len)
        self.emb_dropout = nn.Dropout(embedding_dropout)
        self.attn_layers = Encoder(dim, depth)
        self.norm = nn.LayerNorm(dim)
        self.to_logits = nn.Linear(dim, num_tokens)

    def transform(self, embedded: Tensor, mask: Tensor | None = None) -> Tensor:
        """Contextual embeddings (B, L, D) of token embeddings (B, L, D) that carry no position yet."""
        x = self.emb_dropout(embedded + self.pos_emb(embedded.shape[1]))
        return self.norm(self.attn_layers(x, mask))

    def forward(
        self,
        x: Tensor,
        return_embeddings: bool = False,
        mask: Tensor | None = None,
        embedding_manager: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Logits (B, L, V), or embeddings (B, L, D) if asked for, of token ids `x` (B, L).

        `embedding_manager(x, embedded)` may replace token embeddings before the positions are added.
        """
        embedded = self.token_emb(x)  # (B, L, D)
        if embedding_manager is not None:
            embedded = embedding_manager(x, embedded)
        out = self.transform(embedded, mask)  # (B, L, D)
        return out if return_embeddings else self.to_logits(out)
