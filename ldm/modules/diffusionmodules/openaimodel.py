"""The denoising UNet of latent diffusion models and its encoder half."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.modules.attention import Context, SpatialTransformer
from ldm.modules.diffusionmodules.unet_blocks import (
    AttentionBlock,
    AttentionPool2d,
    Downsample,
    ResBlock,
    TimestepBlock,
    TimestepEmbedSequential,
    TransposedUpsample,
    Upsample,
)
from ldm.modules.diffusionmodules.util import conv_nd, normalization, timestep_embedding, zero_module

__all__ = [
    "AttentionBlock",
    "AttentionPool2d",
    "Downsample",
    "EncoderUNetModel",
    "ResBlock",
    "TimestepBlock",
    "TimestepEmbedSequential",
    "TransposedUpsample",
    "UNetModel",
    "Upsample",
]


@dataclasses.dataclass(frozen=True)
class _Transformer:
    """Options of the spatial transformers of a UNet."""

    depth: int
    context_dim: int | Sequence[int]
    use_linear: bool


@dataclasses.dataclass(frozen=True)
class _Blueprint:
    """How the blocks of one UNet are made; the networks differ only in how they string them together."""

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
    transformer: _Transformer | None = None
    legacy: bool = True

    def __post_init__(self) -> None:
        if self.num_heads == -1 and self.num_head_channels == -1:
            raise ValueError("attention needs num_heads or num_head_channels, and both are -1: set one of them")

    @property
    def emb_channels(self) -> int:
        return 4 * self.model_channels

    def time_embed(self) -> nn.Sequential:
        width = self.emb_channels
        return nn.Sequential(nn.Linear(self.model_channels, width), nn.SiLU(), nn.Linear(width, width))

    def res_block(self, channels: int, out_channels: int, up: bool = False, down: bool = False) -> ResBlock:
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
        heads, width = self.num_heads, self.num_head_channels
        if width != -1:
            heads = max(channels // width, 1)
        if self.transformer is not None:
            # `legacy` differs from the plain rule only where the width of a head does not divide the channels.
            d_head = channels // heads if self.legacy or width == -1 else width
            options = self.transformer
            return SpatialTransformer(
                channels,
                heads,
                d_head,
                depth=options.depth,
                context_dim=options.context_dim,
                use_linear=options.use_linear,
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


class UNetModel(nn.Module):
    """Denoising UNet with residual blocks, attention, a step embedding and optional class or context conditioning.

    Weights may have any dtype and inputs follow it: `x` is cast on entry, the output is cast back. Raises `ValueError`
    for options that contradict each other.
    """

    def __init__(
        self,
        image_size: int,  # side of the latent it is trained on; the network itself takes any size
        in_channels: int,
        model_channels: int,  # channels at mult 1; a multiple of 32
        out_channels: int,
        num_res_blocks: int,  # residual blocks for each resolution
        attention_resolutions: Sequence[int],  # downsampling factors (1, 2, 4, ...) that get attention
        dropout: float = 0.0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),  # channels / model_channels at each resolution
        conv_resample: bool = True,  # resample with convolutions, not by averaging and repeating alone
        dims: int = 2,
        num_classes: int | None = None,  # class-conditional: `y` holds labels below this number
        use_checkpoint: bool = False,  # save memory by computing activations again in the backward pass
        use_fp16: bool = False,  # accepted for published configs; the dtype follows the weights instead
        num_heads: int = -1,
        num_head_channels: int = -1,  # width of an attention head, instead of `num_heads`
        num_heads_upsample: int = -1,  # number of heads in the decoder; -1: `num_heads`
        use_scale_shift_norm: bool = False,  # the step embedding scales and shifts, not only adds
        resblock_updown: bool = False,  # resample inside residual blocks
        use_new_attention_order: bool = False,  # see `AttentionBlock`
        use_spatial_transformer: bool = False,  # attention with a context; needs `context_dim`
        transformer_depth: int = 1,
        context_dim: int | Sequence[int] | None = None,  # width of the context, or one for each transformer block
        n_embed: int | None = None,  # predict logits of this many codebook entries instead of `out_channels`
        legacy: bool = True,  # how published models before SD choose their head widths, see `_Blueprint.attention`
        use_linear_in_transformer: bool = False,  # SD 2: see `SpatialTransformer`
    ) -> None:
        super().__init__()
        del use_fp16
        transformer = None
        if use_spatial_transformer != (context_dim is not None):
            raise ValueError(
                f"context_dim={context_dim!r} and use_spatial_transformer={use_spatial_transformer} do not go "
                "together: a spatial transformer needs the width of its context, and without one no context is used"
            )
        if context_dim is not None:
            transformer = _Transformer(transformer_depth, context_dim, use_linear_in_transformer)
        blueprint = _Blueprint(
            model_channels=model_channels,
            channel_mult=channel_mult,
            num_res_blocks=num_res_blocks,
            attention_resolutions=attention_resolutions,
            dropout=dropout,
            conv_resample=conv_resample,
            dims=dims,
            use_checkpoint=use_checkpoint,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            num_heads_upsample=num_heads if num_heads_upsample == -1 else num_heads_upsample,
            use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown,
            use_new_attention_order=use_new_attention_order,
            transformer=transformer,
            legacy=legacy,
        )
        self.image_size = image_size
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.num_classes = num_classes
        self.context_dim = context_dim
        self.dims = dims
        self.downsampling = 2 ** (len(channel_mult) - 1)

        self.time_embed = blueprint.time_embed()
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, blueprint.emb_channels)
        self.input_blocks, widths = blueprint.encoder(in_channels)
        self.middle_block = blueprint.middle(widths[-1])
        self.output_blocks, channels = blueprint.decoder(widths)
        self.out = nn.Sequential(
            normalization(channels), nn.SiLU(), zero_module(conv_nd(dims, channels, out_channels, 3, padding=1))
        )
        self.predict_codebook_ids = n_embed is not None
        if n_embed is not None:
            self.id_predictor = nn.Sequential(normalization(channels), conv_nd(dims, channels, n_embed, 1))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.parameters()).dtype

    def forward(
        self, x: Tensor, timesteps: Tensor | None = None, context: Context = None, y: Tensor | None = None
    ) -> Tensor:
        """Predict (B, out_channels, h, w) from noisy `x` (B, C, h, w) at `timesteps` (B,).

        `context` (B, L, context_dim) goes with `context_dim` (a list when that is a list), labels `y` (B,) with
        `num_classes`. Raises `ValueError` when one is missing, superfluous or of the wrong shape.
        """
        self._check_inputs(x, timesteps, context, y)
        assert timesteps is not None
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(self.dtype))  # (B, 4 C)
        if self.num_classes is not None:
            emb = emb + self.label_emb(y)
        h = x.to(self.dtype)
        skips = []
        for block in self.input_blocks:
            h = block(h, emb, context)  # (B, C', h', w')
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb, context)
        h = self.id_predictor(h) if self.predict_codebook_ids else self.out(h)  # (B, out_channels, h, w)
        return h.to(x.dtype)

    def _check_inputs(self, x: Tensor, timesteps: Tensor | None, context: Context, y: Tensor | None) -> None:
        _check_image(x, self.in_channels, self.dims)
        if any(size % self.downsampling for size in x.shape[-min(self.dims, 2) :]):
            raise ValueError(f"sides of {tuple(x.shape[2:])} are not multiples of {self.downsampling}: pad or crop x")
        _check_steps(x, timesteps)
        if (context is None) != (self.context_dim is None):
            given = "none was given" if context is None else "one was given"
            raise ValueError(f"the UNet has context_dim={self.context_dim}, but for the context {given}")
        for part in [context] if torch.is_tensor(context) else context or []:
            if part.ndim != 3 or part.shape[0] != x.shape[0]:
                raise ValueError(f"a context is (B, L, D) with B={x.shape[0]} as x, not {tuple(part.shape)}")
        if (y is None) != (self.num_classes is None):
            given = "no labels y were given" if y is None else "labels y were given"
            raise ValueError(f"the UNet has num_classes={self.num_classes}, but {given}")
        if y is not None and (y.shape != x.shape[:1] or y.is_floating_point()):
            raise ValueError(f"labels y are integers ({x.shape[0]},), not {y.dtype} of shape {tuple(y.shape)}")


class EncoderUNetModel(nn.Module):
    """The encoder half of the UNet with a pooled output, for instance a classifier of noisy images."""

    def __init__(
        self,
        image_size: int,  # side of the input; attention pooling depends on it
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        use_checkpoint: bool = False,
        use_fp16: bool = False,  # accepted for published configs; the dtype follows the weights instead
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,  # accepted for published configs; there is no decoder here
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        pool: str = "adaptive",  # adaptive, attention, or means of every block's output: spatial, spatial_v2
    ) -> None:
        super().__init__()
        del use_fp16
        blueprint = _Blueprint(
            model_channels=model_channels,
            channel_mult=channel_mult,
            num_res_blocks=num_res_blocks,
            attention_resolutions=attention_resolutions,
            dropout=dropout,
            conv_resample=conv_resample,
            dims=dims,
            use_checkpoint=use_checkpoint,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            num_heads_upsample=num_heads_upsample,
            use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown,
            use_new_attention_order=use_new_attention_order,
        )
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.dims = dims
        self.pool = pool
        self.time_embed = blueprint.time_embed()
        self.input_blocks, widths = blueprint.encoder(in_channels)
        channels = widths[-1]
        self.middle_block = blueprint.middle(channels)
        side = image_size // 2 ** (len(channel_mult) - 1)
        features = sum(widths) + channels
        if pool == "adaptive":
            average = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dims - 1](1)
            last = zero_module(conv_nd(dims, channels, out_channels, 1))
            self.out = nn.Sequential(normalization(channels), nn.SiLU(), average, last, nn.Flatten())
        elif pool == "attention":
            if num_head_channels == -1:
                raise ValueError("pool='attention' needs the width of a head: set num_head_channels")
            attention = AttentionPool2d(side, channels, num_head_channels, out_channels)
            self.out = nn.Sequential(normalization(channels), nn.SiLU(), attention)
        elif pool == "spatial":
            self.out = nn.Sequential(nn.Linear(features, 2048), nn.ReLU(), nn.Linear(2048, out_channels))
        elif pool == "spatial_v2":
            self.out = nn.Sequential(
                nn.Linear(features, 2048), normalization(2048), nn.SiLU(), nn.Linear(2048, out_channels)
            )
        else:
            raise ValueError(f"pool={pool!r} is not one of adaptive, attention, spatial, spatial_v2")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.parameters()).dtype

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Map `x` (B, C, h, w) at `timesteps` (B,) to (B, out_channels)."""
        _check_image(x, self.in_channels, self.dims)
        _check_steps(x, timesteps)
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(self.dtype))  # (B, 4 C)
        h = x.to(self.dtype)
        means = []
        for block in [*self.input_blocks, self.middle_block]:
            h = block(h, emb)  # (B, C', h', w')
            means.append(h.flatten(2).mean(dim=2))
        pooled = torch.cat(means, dim=1) if self.pool.startswith("spatial") else h
        return self.out(pooled).to(x.dtype)  # (B, out_channels)


def _check_image(x: Tensor, channels: int, dims: int) -> None:
    if x.ndim != dims + 2 or x.shape[1] != channels:
        raise ValueError(f"the UNet takes {channels} channels and {dims} spatial axes, not x of {tuple(x.shape)}")


def _check_steps(x: Tensor, timesteps: Tensor | None) -> None:
    if timesteps is None or timesteps.ndim != 1 or timesteps.shape[0] not in (1, x.shape[0]):
        found = None if timesteps is None else tuple(timesteps.shape)
        raise ValueError(f"timesteps are a tensor of shape ({x.shape[0]},), one for each sample, not {found}")
