"""Blocks of the UNets: residual blocks with a step embedding, pixel attention, resampling, attention pooling."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.attention import Context, SpatialTransformer, merge_heads, split_heads, to_image, to_tokens
from ldm.modules.diffusionmodules.util import (
    TokenProjection,
    attend,
    avg_pool_nd,
    checkpoint,
    conv_nd,
    normalization,
    zero_module,
)


class TimestepBlock(nn.Module, ABC):
    """A module whose forward takes a feature map and the embedding of the time step."""

    @abstractmethod
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Apply the module to `x` (B, C, ...) given `emb` (B, D)."""


class TimestepEmbedSequential(nn.Sequential):
    """Sequential that hands the step embedding and the context to those children that take them."""

    def forward(self, x: Tensor, emb: Tensor, context: Context = None) -> Tensor:  # type: ignore[override]
        """Run the children on `x` (B, C, ...) with `emb` (B, D) and, for spatial transformers, `context`."""
        for layer in self:
            if isinstance(layer, TimestepBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class Upsample(nn.Module):
    """Nearest-neighbour doubling of the resolution, then an optional 3x3 convolution; 3-d maps keep their depth."""

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None, padding: int = 1
    ) -> None:
        super().__init__()
        self.channels = channels
        self.factor = (1.0, 2.0, 2.0) if dims == 3 else (2.0,) * dims
        if use_conv:
            self.conv = conv_nd(dims, channels, out_channels or channels, 3, padding=padding)
        self.use_conv = use_conv

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C_out, 2h, 2w)."""
        _check_channels(self, x)
        x = F.interpolate(x, scale_factor=self.factor, mode="nearest")  # (B, C, 2h, 2w)
        return self.conv(x) if self.use_conv else x


class TransposedUpsample(nn.Module):
    """Learned doubling of the resolution by a transposed convolution without padding."""

    def __init__(self, channels: int, out_channels: int | None = None, ks: int = 5) -> None:
        super().__init__()
        self.channels = channels
        self.up = nn.ConvTranspose2d(channels, out_channels or channels, kernel_size=ks, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C_out, 2h + ks - 2, 2w + ks - 2)."""
        return self.up(x)


class Downsample(nn.Module):
    """Halving of the resolution by a strided 3x3 convolution or by averaging; 3-d maps keep their depth."""

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None, padding: int = 1
    ) -> None:
        super().__init__()
        self.channels = channels
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, channels, out_channels or channels, 3, stride=stride, padding=padding)
        elif out_channels not in (None, channels):
            raise ValueError(f"averaging cannot turn {channels} channels into {out_channels}: set use_conv")
        else:
            self.op = avg_pool_nd(dims, kernel_size=stride, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C_out, h/2, w/2)."""
        _check_channels(self, x)
        return self.op(x)


def _check_channels(module: Upsample | Downsample, x: Tensor) -> None:
    if x.shape[1] != module.channels:
        raise ValueError(f"{type(module).__name__} of {module.channels} channels got an input of {tuple(x.shape)}")


class ResBlock(TimestepBlock):
    """Residual block of two convolutions with the step embedding added in between, optionally resampling."""

    def __init__(
        self,
        channels: int,
        emb_channels: int,  # width of the step embedding
        dropout: float,
        out_channels: int | None = None,  # None: `channels`
        use_conv: bool = False,  # 3x3 instead of 1x1 convolution on a skip connection that changes the width
        use_scale_shift_norm: bool = False,  # the embedding scales and shifts the second norm's output
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,  # double the resolution
        down: bool = False,  # halve the resolution
    ) -> None:
        super().__init__()
        if up and down:
            raise ValueError("a residual block cannot have both up=True and down=True")
        out_channels = out_channels or channels
        self.use_scale_shift_norm = use_scale_shift_norm
        self.use_checkpoint = use_checkpoint
        self.resample: nn.Module = nn.Identity()  # without parameters
        if up:
            self.resample = Upsample(channels, False, dims)
        elif down:
            self.resample = Downsample(channels, False, dims)
        self.in_layers = nn.Sequential(
            normalization(channels), nn.SiLU(), conv_nd(dims, channels, out_channels, 3, padding=1)
        )
        emb_width = 2 * out_channels if use_scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, emb_width))
        self.out_layers = nn.Sequential(
            normalization(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(conv_nd(dims, out_channels, out_channels, 3, padding=1)),
        )
        if out_channels == channels:
            self.skip_connection: nn.Module = nn.Identity()
        elif use_conv:
            self.skip_connection = conv_nd(dims, channels, out_channels, 3, padding=1)
        else:
            self.skip_connection = conv_nd(dims, channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map (B, C, h, w) and `emb` (B, emb_channels) to (B, C_out, h', w')."""
        return checkpoint(self._forward, x, emb, enabled=self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, activation, conv = self.in_layers
        h = conv(self.resample(activation(norm(x))))  # (B, C_out, h', w')
        shift = self.emb_layers(emb)  # (B, C_out) or (B, 2 C_out)
        shift = shift.reshape(*shift.shape, *[1] * (h.ndim - 2)).to(h.dtype)
        if self.use_scale_shift_norm:
            scale, shift = shift.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + shift)
        return self.skip_connection(self.resample(x)) + h


class AttentionBlock(nn.Module):
    """Multi-head self-attention on the pixels of a feature map, as a residual branch."""

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,  # width of a head; wins over `num_heads` unless -1
        use_checkpoint: bool = False,
        use_new_attention_order: bool = False,  # weights ordered (qkv, head, channel) instead of (head, qkv, channel)
    ) -> None:
        super().__init__()
        per_head = channels if num_head_channels == -1 else num_head_channels
        self.num_heads = num_heads if num_head_channels == -1 else channels // per_head
        if channels % per_head or channels % self.num_heads:
            raise ValueError(
                f"{channels} channels do not split into heads: num_heads={num_heads}, "
                f"num_head_channels={num_head_channels}"
            )
        self.use_checkpoint = use_checkpoint
        self.use_new_attention_order = use_new_attention_order
        self.norm = normalization(channels)
        self.qkv = TokenProjection(channels, 3 * channels, dims=1)
        self.proj_out = zero_module(TokenProjection(channels, channels, dims=1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, ...) to the same shape."""
        return checkpoint(self._forward, x, enabled=self.use_checkpoint)

    def _forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(to_tokens(self.norm(x)))  # (B, N, 3C)
        if self.use_new_attention_order:
            qkv = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, H, N, d)
        else:
            qkv = qkv.unflatten(-1, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)  # (3, B, H, N, d)
        q, k, v = qkv.unbind(0)
        out = merge_heads(attend(q, k, v))  # (B, N, C)
        return x + to_image(self.proj_out(out), x.shape[2:])  # (B, C, ...)


class AttentionPool2d(nn.Module):
    """Pooling of a feature map into one vector: the mean pixel attends to itself and to all pixels, as in CLIP."""

    def __init__(
        self, spacial_dim: int, embed_dim: int, num_heads_channels: int, output_dim: int | None = None
    ) -> None:
        super().__init__()
        self.num_heads = embed_dim // num_heads_channels
        self.positional_embedding = nn.Parameter(torch.randn(embed_dim, spacial_dim**2 + 1) / embed_dim**0.5)
        self.qkv_proj = TokenProjection(embed_dim, 3 * embed_dim, dims=1)
        self.c_proj = TokenProjection(embed_dim, output_dim or embed_dim, dims=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, output_dim)."""
        tokens = to_tokens(x)  # (B, N, C)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)  # (B, 1 + N, C)
        if tokens.shape[1] != self.positional_embedding.shape[1]:
            raise ValueError(
                f"attention pooling of {self.positional_embedding.shape[1] - 1} pixels got {tuple(x.shape[2:])}"
            )
        tokens = tokens + self.positional_embedding.t().to(tokens.dtype)
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv_proj(tokens).chunk(3, dim=-1))
        pooled = F.scaled_dot_product_attention(q[:, :, :1], k, v)  # (B, H, 1, d): only the mean pixel is asked for
        return self.c_proj(merge_heads(pooled)).squeeze(1)  # (B, output_dim)
