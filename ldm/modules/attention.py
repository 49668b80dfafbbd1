"""Attention on token sequences and feature maps, all of it with memory linear in the number of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.diffusionmodules.util import TokenProjection, attend, checkpoint, normalization, zero_module

Context = Tensor | Sequence[Tensor] | None


def to_tokens(image: Tensor) -> Tensor:
    """View a feature map (B, C, ...) as tokens (B, N, C), without a copy."""
    return image.flatten(2).transpose(1, 2)


def to_image(tokens: Tensor, spatial: Sequence[int]) -> Tensor:
    """View tokens (B, N, C) as a feature map (B, C, *spatial); contiguous tokens give a channels-last map."""
    return tokens.transpose(1, 2).unflatten(2, tuple(spatial))


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """Reshape (B, N, heads * d) to (B, heads, N, d)."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(tokens: Tensor) -> Tensor:
    """Reshape (B, heads, N, d) to (B, N, heads * d)."""
    return tokens.transpose(1, 2).flatten(2)


class GEGLU(nn.Module):
    """Gated linear unit with an exact GELU gate (Shazeer 2020): half of the projection scales the other half."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dim_in) to (..., dim_out)."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Two-layer perceptron on tokens with a hidden width of `mult * dim`; `glu` gates the hidden layer."""

    def __init__(
        self, dim: int, dim_out: int | None = None, mult: int = 4, glu: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        hidden = int(dim * mult)
        first: nn.Module = GEGLU(dim, hidden) if glu else nn.Sequential(nn.Linear(dim, hidden), nn.GELU())
        self.net = nn.Sequential(first, nn.Dropout(dropout), nn.Linear(hidden, dim_out or dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dim) to (..., dim_out)."""
        return self.net(x)


class CrossAttention(nn.Module):
    """Multi-head attention from tokens to a context, or to themselves when there is none (LDM paper, eq. 3.3)."""

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,  # width of the context; None: `query_dim`
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,  # on the output projection
    ) -> None:
        super().__init__()
        self.heads = heads
        self.context_dim = context_dim or query_dim
        inner_dim = heads * dim_head
        self.to_q = nn.Linear(query_dim, inner_dim, bias=False)
        self.to_k = nn.Linear(self.context_dim, inner_dim, bias=False)
        self.to_v = nn.Linear(self.context_dim, inner_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner_dim, query_dim), nn.Dropout(dropout))
        self.context_cache: ContextCache | None = None  # see `cached_context`

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Attend from `x` (B, N, D) to `context` (B, M, D_context); the result has the shape of `x`.

        `mask` is boolean with M entries per sample, (B, M) or (B, h, w): True where to attend. A sample whose mask is
        all False attends to every position alike.
        """
        q = split_heads(self.to_q(x), self.heads)  # (B, H, N, d)
        k, v = self._keys_values(x, context, q.dtype)  # (B, H, M, d)
        if mask is not None:
            mask = self._checked_mask(mask, k)  # (B, 1, 1, M)
            empty = ~mask.any(dim=-1, keepdim=True)
            # Zero queries score every key alike, which is what the published fill with a finite number amounts to.
            q, mask = q.masked_fill(empty, 0), mask | empty
        out = attend(q, k, v, mask)  # (B, H, N, d)
        return self.to_out(merge_heads(out))  # (B, N, D)

    def _keys_values(self, x: Tensor, context: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        source = x if context is None else context
        if source.shape[-1] != self.context_dim:
            what = "no context was given, and the tokens have width" if context is None else "the context has width"
            raise ValueError(
                f"cross-attention expects a context of width {self.context_dim}, but {what} {source.shape[-1]}"
            )
        cache = None if torch.is_grad_enabled() or context is None else self.context_cache
        found = cache.find(source, dtype) if cache is not None else None
        if found is not None:
            return found
        source = source.to(self.to_k.weight.dtype)
        k, v = split_heads(self.to_k(source), self.heads), split_heads(self.to_v(source), self.heads)
        if cache is not None and context is not None:
            cache.add(context, k, v)
        return k, v

    @staticmethod
    def _checked_mask(mask: Tensor, k: Tensor) -> Tensor:
        flat = mask.flatten(1)
        if mask.dtype != torch.bool or flat.shape != (k.shape[0], k.shape[2]):
            raise ValueError(
                f"an attention mask is boolean with {k.shape[2]} entries for each of {k.shape[0]} samples, "
                f"not {mask.dtype} of shape {tuple(mask.shape)}"
            )
        return flat[:, None, None, :]


class ContextCache:
    """Keys and values of the last few contexts, found again by the identity of the context tensor."""

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self.entries: list[tuple[Tensor, int, Tensor, Tensor]] = []

    def find(self, context: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Keys and values of this very tensor in `dtype`, unless it has been changed in place since; or None."""
        for known, version, k, v in self.entries:
            if known is context and version == _version(context) and k.dtype == dtype:
                return k, v
        return None

    def add(self, context: Tensor, k: Tensor, v: Tensor) -> None:
        """Remember keys and values; the oldest entry makes room."""
        self.entries = [*self.entries[-self.size + 1 :], (context, _version(context), k, v)]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # inference tensors keep no count of in-place changes


@contextmanager
def cached_context(model: nn.Module) -> Iterator[None]:
    """Within this block, project a context tensor to keys and values once for each cross-attention in `model`.

    Sampling shows the network the same context at every step. Pass the very same tensor object each time (a new
    concatenation is a new context) and leave the weights alone inside the block. Applies only where gradients are off.
    """
    layers = [m for m in model.modules() if isinstance(m, CrossAttention)]
    before = [layer.context_cache for layer in layers]
    try:
        for layer in layers:
            layer.context_cache = ContextCache()
        yield
    finally:
        for layer, cache in zip(layers, before, strict=True):
            layer.context_cache = cache


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the context and feed-forward layer, each normalised first and added to its input."""

    def __init__(
        self,
        dim: int,
        n_heads: int,
        d_head: int,
        dropout: float = 0.0,
        context_dim: int | None = None,  # None: the second attention is a self-attention too
        gated_ff: bool = True,
        checkpoint: bool = False,  # compute activations again in the backward pass
    ) -> None:
        super().__init__()
        self.attn1 = CrossAttention(dim, heads=n_heads, dim_head=d_head, dropout=dropout)
        self.ff = FeedForward(dim, dropout=dropout, glu=gated_ff)
        self.attn2 = CrossAttention(dim, context_dim=context_dim, heads=n_heads, dim_head=d_head, dropout=dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.checkpoint = checkpoint

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Transform tokens (B, N, dim) with a context (B, M, context_dim)."""
        return checkpoint(self._forward, x, context, enabled=self.checkpoint)

    def _forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks on the pixels of a feature map, between two projections, as a residual branch."""

    def __init__(
        self,
        in_channels: int,
        n_heads: int,
        d_head: int,
        depth: int = 1,
        dropout: float = 0.0,
        context_dim: int | Sequence[int] | None = None,  # one width for all blocks, or one for each
        use_linear: bool = False,  # store the projections as linear layers (SD 2), not as 1x1 convolutions
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        inner_dim = n_heads * d_head
        dims = 0 if use_linear else 2
        widths = [context_dim] * depth if context_dim is None or isinstance(context_dim, int) else list(context_dim)
        if len(widths) != depth:
            raise ValueError(f"context_dim {widths} names {len(widths)} widths for {depth} transformer blocks")
        self.in_channels = in_channels
        self.norm = normalization(in_channels, eps=1e-6)
        self.proj_in = TokenProjection(in_channels, inner_dim, dims=dims)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner_dim, n_heads, d_head, dropout, width, checkpoint=use_checkpoint)
            for width in widths
        )
        self.proj_out = zero_module(TokenProjection(inner_dim, in_channels, dims=dims))

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        """Transform a feature map (B, C, h, w) with a context (B, M, D), or a list with one for each block."""
        contexts = [context] * len(self.transformer_blocks) if context is None or torch.is_tensor(context) else context
        if len(contexts) != len(self.transformer_blocks):
            raise ValueError(f"{len(contexts)} contexts for {len(self.transformer_blocks)} transformer blocks")
        tokens = self.proj_in(to_tokens(self.norm(x)))  # (B, h*w, inner)
        for block, block_context in zip(self.transformer_blocks, contexts, strict=True):
            tokens = block(tokens, block_context)
        return x + to_image(self.proj_out(tokens), x.shape[2:])  # (B, C, h, w), in the memory format of x


class LinearAttention(nn.Module):
    """Attention whose softmax runs over the keys alone, so that its cost is linear in the number of pixels."""

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 32) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = TokenProjection(dim, 3 * heads * dim_head, bias=False, dims=2)
        self.to_out = TokenProjection(heads * dim_head, dim, dims=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map a feature map (B, C, h, w) to one of the same shape (no residual)."""
        q, k, v = (split_heads(part, self.heads) for part in self.to_qkv(to_tokens(x)).chunk(3, dim=-1))  # (B, H, N, d)
        summary = k.softmax(dim=2).transpose(2, 3) @ v  # (B, H, d, d)
        return to_image(self.to_out(merge_heads(q @ summary)), x.shape[2:])  # (B, C, h, w)


class SpatialSelfAttention(nn.Module):
    """Single-head self-attention on the pixels of a feature map, as a residual branch."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.norm = normalization(in_channels, eps=1e-6)
        self.q = TokenProjection(in_channels, in_channels, dims=2)
        self.k = TokenProjection(in_channels, in_channels, dims=2)
        self.v = TokenProjection(in_channels, in_channels, dims=2)
        self.proj_out = TokenProjection(in_channels, in_channels, dims=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map a feature map (B, C, h, w) to one of the same shape."""
        tokens = to_tokens(self.norm(x))  # (B, N, C)
        q, k, v = (split_heads(part(tokens), 1) for part in (self.q, self.k, self.v))  # (B, 1, N, C)
        out = merge_heads(attend(q, k, v))  # (B, N, C)
        return x + to_image(self.proj_out(out), x.shape[2:])  # (B, C, h, w)
