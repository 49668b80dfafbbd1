"""The denoising UNet of latent diffusion models and its encoder half."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.modules.attention import Context
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
from ldm.modules.diffusionmodules.unet_blueprint import Blueprint
from ldm.modules.diffusionmodules.util import conv_nd, normalization, timestep_embedding, zero_module
from ldm.util import require_off

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
        legacy: bool = True,  # how published models before SD choose their head widths, see `Blueprint.attention`
        use_linear_in_transformer: bool = False,  # SD 2: see `SpatialTransformer`
        # Accepted for published configs; only off.
        disable_self_attentions: Sequence[bool] | None = None,
        num_attention_blocks: Sequence[int] | None = None,
        disable_middle_self_attn: bool = False,
    ) -> None:
        super().__init__()
        del use_fp16
        require_off(
            disable_self_attentions=disable_self_attentions, num_attention_blocks=num_attention_blocks,
            disable_middle_self_attn=disable_middle_self_attn,
        )  # fmt: skip
        blueprint = Blueprint(
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
            use_spatial_transformer=use_spatial_transformer,
            transformer_depth=transformer_depth,
            context_dim=context_dim,
            legacy=legacy,
            use_linear_in_transformer=use_linear_in_transformer,
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
        blueprint = Blueprint(
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
        if pool.startswith("spatial"):
            self.out = _spatial_head(pool, sum(widths) + channels, out_channels)
        else:
            side = image_size // 2 ** (len(channel_mult) - 1)
            pooling = _pooling(pool, dims, channels, out_channels, side, num_head_channels)
            self.out = nn.Sequential(normalization(channels), nn.SiLU(), *pooling)

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


def _pooling(pool: str, dims: int, channels: int, out_channels: int, side: int, head_channels: int) -> list[nn.Module]:
    if pool == "adaptive":
        average = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dims - 1](1)
        return [average, zero_module(conv_nd(dims, channels, out_channels, 1)), nn.Flatten()]
    if pool != "attention":
        raise ValueError(f"pool={pool!r} is not one of adaptive, attention, spatial, spatial_v2")
    if head_channels == -1:
        raise ValueError("pool='attention' needs the width of a head: set num_head_channels")
    return [AttentionPool2d(side, channels, head_channels, out_channels)]


def _spatial_head(pool: str, features: int, out_channels: int) -> nn.Sequential:
    hidden = 2048
    first, last = nn.Linear(features, hidden), nn.Linear(hidden, out_channels)
    if pool == "spatial":
        return nn.Sequential(first, nn.ReLU(), last)
    if pool == "spatial_v2":
        return nn.Sequential(first, normalization(hidden), nn.SiLU(), last)
    raise ValueError(f"pool={pool!r} is not one of adaptive, attention, spatial, spatial_v2")
