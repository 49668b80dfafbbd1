"""How the blocks of a UNet are made and strung together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import nn

from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.unet_blocks import (
    AttentionBlock,
    Downsample,
    ResBlock,
    TimestepEmbedSequential,
    Upsample,
)
from ldm.modules.diffusionmodules.util import conv_nd


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """The options that decide the blocks of one UNet, under the names of the constructor of `UNetModel`."""

    model_channels: int
    channel_mult: Sequence[int]
    num_res_blocks: int
    attention_resolutions: Sequence[int]
    dropout: float
    conv_resample: bool
    dims: int
    use_checkpoint: bool
    num_heads: int
    num_head_channels: int
    num_heads_upsample: int
    use_scale_shift_norm: bool
    resblock_updown: bool
    use_new_attention_order: bool
    use_spatial_transformer: bool = False
    transformer_depth: int = 1
    context_dim: int | Sequence[int] | None = None
    legacy: bool = True
    use_linear_in_transformer: bool = False

    def __post_init__(self) -> None:
        if self.num_heads == -1 and self.num_head_channels == -1:
            raise ValueError("attention needs num_heads or num_head_channels, and both are -1: set one of them")
        if self.use_spatial_transformer != (self.context_dim is not None):
            raise ValueError(
                f"use_spatial_transformer={self.use_spatial_transformer} does not go with context_dim="
                f"{self.context_dim!r}: a transformer needs the width of its context, and only it uses a context"
            )

    @property
    def emb_channels(self) -> int:
        """Width of the step embedding."""
        return 4 * self.model_channels

    def time_embed(self) -> nn.Sequential:
        """Perceptron from the sinusoidal embedding of a step to the one that the blocks take."""
        width = self.emb_channels
        return nn.Sequential(nn.Linear(self.model_channels, width), nn.SiLU(), nn.Linear(width, width))

    def res_block(self, channels: int, out_channels: int, up: bool = False, down: bool = False) -> ResBlock:
        """A residual block, optionally resampling."""
        return ResBlock(
            channels,
            self.emb_channels,
            self.dropout,
            out_channels=out_channels,
            use_scale_shift_norm=self.use_scale_shift_norm,
            dims=self.dims,
            use_checkpoint=self.use_checkpoint,
            up=up,
            down=down,
        )

    def attention(self, channels: int, decoder: bool = False) -> nn.Module:
        """A spatial transformer or an attention block, with heads by the published rules."""
        heads, width = self.num_heads, self.num_head_channels
        if width != -1:
            heads = max(channels // width, 1)
        if self.use_spatial_transformer:
            # `legacy` differs from the plain rule only where the width of a head does not divide the channels.
            d_head = channels // heads if self.legacy or width == -1 else width
            return SpatialTransformer(
                channels,
                heads,
                d_head,
                depth=self.transformer_depth,
                context_dim=self.context_dim,
                use_linear=self.use_linear_in_transformer,
                use_checkpoint=self.use_checkpoint,
            )
        if not self.legacy and width == -1:
            width = channels // heads  # in the decoder, too: here `num_heads_upsample` has no effect
        return AttentionBlock(
            channels,
            num_heads=self.num_heads_upsample if decoder else heads,
            num_head_channels=width,
            use_checkpoint=self.use_checkpoint,
            use_new_attention_order=self.use_new_attention_order,
        )

    def resample(self, channels: int, up: bool) -> nn.Module:
        """A module that doubles or halves the resolution."""
        if self.resblock_updown:
            return self.res_block(channels, channels, up=up, down=not up)
        kind = Upsample if up else Downsample
        return kind(channels, self.conv_resample, dims=self.dims, out_channels=channels)

    def encoder(self, in_channels: int) -> tuple[nn.ModuleList, list[int]]:
        """The input blocks, and the number of channels that each of them puts out."""
        channels = self.model_channels
        stem = conv_nd(self.dims, in_channels, channels, 3, padding=1)
        blocks, widths = [TimestepEmbedSequential(stem)], [channels]
        for level, mult in enumerate(self.channel_mult):
            for _ in range(self.num_res_blocks):
                layers: list[nn.Module] = [self.res_block(channels, mult * self.model_channels)]
                channels = mult * self.model_channels
                if 2**level in self.attention_resolutions:
                    layers.append(self.attention(channels))
                blocks.append(TimestepEmbedSequential(*layers))
                widths.append(channels)
            if level < len(self.channel_mult) - 1:
                blocks.append(TimestepEmbedSequential(self.resample(channels, up=False)))
                widths.append(channels)
        return nn.ModuleList(blocks), widths

    def middle(self, channels: int) -> TimestepEmbedSequential:
        """The block at the lowest resolution, always with attention."""
        return TimestepEmbedSequential(
            self.res_block(channels, channels), self.attention(channels), self.res_block(channels, channels)
        )

    def decoder(self, widths: Sequence[int]) -> tuple[nn.ModuleList, int]:
        """The output blocks, each of which takes one encoder output of `widths` from the end; and their last width."""
        skips = list(widths)
        channels = skips[-1]
        blocks = []
        for level, mult in reversed(list(enumerate(self.channel_mult))):
            for i in range(self.num_res_blocks + 1):
                layers: list[nn.Module] = [self.res_block(channels + skips.pop(), mult * self.model_channels)]
                channels = mult * self.model_channels
                if 2**level in self.attention_resolutions:
                    layers.append(self.attention(channels, decoder=True))
                if level and i == self.num_res_blocks:
                    layers.append(self.resample(channels, up=True))
                blocks.append(TimestepEmbedSequential(*layers))
        return nn.ModuleList(blocks), channels
