"""Convolutional encoder and decoder of the first stage (autoencoder)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.attention import LinearAttention
from ldm.modules.diffusionmodules.util import GroupNorm

ATTENTION_TYPES = ("vanilla", "linear", "none")


def get_timestep_embedding(timesteps: Tensor, embedding_dim: int) -> Tensor:
    """Sinusoidal embedding (B, embedding_dim) of time steps (B,): sines first, then cosines.

    Frequencies fall from 1 to 1/10000 inclusive, unlike `util.timestep_embedding` of the UNet, which puts cosines
    first and stops one step short. An odd width is padded with a zero.
    """
    half = embedding_dim // 2
    step = -math.log(10000) / max(half - 1, 1)
    frequencies = torch.exp(step * torch.arange(half, dtype=torch.float32, device=timesteps.device))
    angles = timesteps.float()[:, None] * frequencies[None, :]  # (B, half)
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return F.pad(embedding, (0, embedding_dim % 2))  # (B, embedding_dim)


def normalize(channels: int) -> GroupNorm:
    """Group normalisation of the first stage: 32 groups, eps 1e-6."""
    return GroupNorm(num_groups=32, num_channels=channels, eps=1e-6)


def set_norm_groups(module: nn.Module, groups: int) -> None:
    """Let every group normalisation inside `module` use `groups` groups; weights, being per channel, stay as they are.

    With as many groups as channels, as 32 are in a first stage of width 32, the mean of each channel is lost and flat
    colours with it: small models need fewer.
    """
    for part in module.modules():
        if isinstance(part, GroupNorm):
            if part.num_channels % groups:
                raise ValueError(f"norm_groups {groups} does not divide a width of {part.num_channels} channels")
            part.num_groups = groups


class Upsample(nn.Module):
    """Doubles height and width by nearest neighbours, then (`with_conv`) a 3x3 convolution."""

    def __init__(self, in_channels: int, with_conv: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, in_channels, 3, padding=1) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)."""
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")  # (B, C, 2H, 2W)
        return x if self.conv is None else self.conv(x)


class Downsample(nn.Module):
    """Halves height and width by a strided 3x3 convolution, or (without `with_conv`) by averaging."""

    def __init__(self, in_channels: int, with_conv: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, in_channels, 3, stride=2) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2)."""
        if self.conv is None:
            return F.avg_pool2d(x, kernel_size=2, stride=2)  # (B, C, H/2, W/2)
        # Published weights expect one row and column of zeros at the bottom and the right only.
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (B, C, H/2, W/2)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions with pre-activation and a shortcut; optionally conditioned on a time embedding."""

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int | None = None,
        conv_shortcut: bool = False,
        dropout: float = 0.0,
        temb_channels: int = 0,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        self.norm1 = normalize(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.temb_proj = nn.Linear(temb_channels, out_channels) if temb_channels > 0 else None
        self.norm2 = normalize(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        widens = in_channels != out_channels
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 3, padding=1) if widens and conv_shortcut else None
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if widens and not conv_shortcut else None

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """(B, C_in, H, W) and an optional time embedding (B, D) -> (B, C_out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))  # (B, C_out, H, W)
        if self.temb_proj is not None and temb is not None:
            h = h + self.temb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        shortcut = self.conv_shortcut or self.nin_shortcut
        return (x if shortcut is None else shortcut(x)) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, with a residual connection."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.norm = normalize(in_channels)
        self.q = nn.Conv2d(in_channels, in_channels, 1)
        self.k = nn.Conv2d(in_channels, in_channels, 1)
        self.v = nn.Conv2d(in_channels, in_channels, 1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        batch, channels, height, width = x.shape
        h = self.norm(x)
        q, k, v = (
            layer(h).flatten(2).transpose(1, 2)[:, None]  # (B, 1, HW, C)
            for layer in (self.q, self.k, self.v)
        )
        h = F.scaled_dot_product_attention(q, k, v)  # (B, 1, HW, C)
        h = h[:, 0].transpose(1, 2).reshape(batch, channels, height, width)  # (B, C, H, W)
        return x + self.proj_out(h)


class LinAttnBlock(LinearAttention):
    """Single-head linear attention, without normalisation and without a residual connection."""

    def __init__(self, in_channels: int) -> None:
        super().__init__(in_channels, heads=1, dim_head=in_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        # Nearly constant pictures come out of here, and normalising these loses digits in the channels-last order.
        return super().forward(x).contiguous()


def make_attn(in_channels: int, attn_type: str = "vanilla") -> nn.Module:
    """Attention over a picture: "vanilla" softmax attention, "linear" attention, or "none" (identity)."""
    if attn_type == "vanilla":
        return AttnBlock(in_channels)
    if attn_type == "linear":
        return LinAttnBlock(in_channels)
    if attn_type == "none":
        return nn.Identity()
    raise ValueError(f"attn_type is '{attn_type}'; choose one of {', '.join(ATTENTION_TYPES)}")


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int, dropout: float, attn_type: str) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(in_channels=channels, dropout=dropout)
        self.attn_1 = make_attn(channels, attn_type)
        self.block_2 = ResnetBlock(in_channels=channels, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Stage(nn.Module):
    """The blocks of one resolution, each followed by attention if asked for, then a change of resolution.

    `widths` are the channels before the first block and after each block; `attn_type` None means no attention.
    """

    def __init__(
        self,
        widths: Sequence[int],
        dropout: float,
        attn_type: str | None,
        *,
        downsample: nn.Module | None = None,
        upsample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(in_channels=before, out_channels=after, dropout=dropout) for before, after in pairwise(widths)
        )
        self.attn = nn.ModuleList([] if attn_type is None else [make_attn(width, attn_type) for width in widths[1:]])
        self.downsample = downsample
        self.upsample = upsample

    def forward(self, x: Tensor) -> Tensor:
        """(B, widths[0], H, W) -> (B, widths[-1], H', W'), where H' is H, H/2 or 2H."""
        for index, block in enumerate(self.block):
            x = block(x)  # (B, widths[index + 1], H, W)
            if self.attn:
                x = self.attn[index](x)
        if self.downsample is not None:
            x = self.downsample(x)  # (B, widths[-1], H/2, W/2)
        if self.upsample is not None:
            x = self.upsample(x)  # (B, widths[-1], 2H, 2W)
        return x


class Encoder(nn.Module):
    """Picture -> latent moments or latent.

    Encoder and Decoder take the same parameters, so that one `ddconfig` builds both; those marked (D) matter to the
    decoder only.
    """

    def __init__(
        self,
        *,
        ch: int,  # width of the first stage of blocks
        out_ch: int = 3,  # (D) channels of the decoded picture
        ch_mult: Sequence[int] = (1, 2, 4, 8),  # width of each stage in units of `ch`; one halving between stages
        num_res_blocks: int,  # blocks per stage
        attn_resolutions: Sequence[int] = (),  # heights at which blocks are followed by attention
        dropout: float = 0.0,
        resamp_with_conv: bool = True,  # strided convolution rather than pooling
        in_channels: int,  # channels of the picture
        resolution: int,  # height of training pictures; only decides where `attn_resolutions` are
        z_channels: int,  # channels of the latent
        double_z: bool = True,  # twice the channels: mean and log variance
        use_linear_attn: bool = False,  # same as attn_type="linear"
        attn_type: str = "vanilla",  # "vanilla", "linear" or "none"
        give_pre_end: bool = False,  # (D) stop before the output convolution
        tanh_out: bool = False,  # (D) squash the picture into (-1, 1)
        norm_groups: int = 32,  # groups of the normalisations; fewer for narrow models
    ) -> None:
        del out_ch, give_pre_end, tanh_out
        super().__init__()
        attn_type = "linear" if use_linear_attn else attn_type
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        width = ch
        for level, mult in enumerate(ch_mult):
            last = level == len(ch_mult) - 1
            widths = [width] + [ch * mult] * num_res_blocks
            width = widths[-1]
            self.down.append(
                Stage(
                    widths,
                    dropout,
                    attn_type if resolution // 2**level in attn_resolutions else None,
                    downsample=None if last else Downsample(width, resamp_with_conv),
                )
            )
        self.mid = Middle(width, dropout, attn_type)
        self.norm_out = normalize(width)
        self.conv_out = nn.Conv2d(width, 2 * z_channels if double_z else z_channels, 3, padding=1)
        set_norm_groups(self, norm_groups)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, z_channels or 2 z_channels, h, w), h = H / 2^(stages - 1)."""
        h = self.conv_in(x)  # (B, ch, H, W)
        for stage in self.down:
            h = stage(h)
        h = self.mid(h)  # (B, ch * ch_mult[-1], h, w)
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, z or 2z, h, w)


class Decoder(nn.Module):
    """Latent -> picture. Parameters as of `Encoder`; those about the encoder's output (`double_z`) do not matter."""

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int = 3,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Sequence[int] = (),
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int = 3,
        resolution: int,
        z_channels: int,
        double_z: bool = True,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
        give_pre_end: bool = False,
        tanh_out: bool = False,
        norm_groups: int = 32,
    ) -> None:
        del in_channels, double_z
        super().__init__()
        attn_type = "linear" if use_linear_attn else attn_type
        self.give_pre_end = give_pre_end
        self.tanh_out = tanh_out
        width = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = Middle(width, dropout, attn_type)
        stages: list[Stage] = []
        for level, mult in reversed(list(enumerate(ch_mult))):
            widths = [width] + [ch * mult] * (num_res_blocks + 1)
            width = widths[-1]
            stages.append(
                Stage(
                    widths,
                    dropout,
                    attn_type if resolution // 2**level in attn_resolutions else None,
                    upsample=None if level == 0 else Upsample(width, resamp_with_conv),
                )
            )
        self.up = nn.ModuleList(reversed(stages))  # published weights count from the highest resolution
        self.norm_out = normalize(width)
        self.conv_out = nn.Conv2d(width, out_ch, 3, padding=1)
        set_norm_groups(self, norm_groups)

    def forward(self, z: Tensor) -> Tensor:
        """(B, z_channels, h, w) -> (B, out_ch, H, W), or (B, ch * ch_mult[0], H, W) with `give_pre_end`."""
        h = self.mid(self.conv_in(z))  # (B, ch * ch_mult[-1], h, w)
        for stage in reversed(self.up):
            h = stage(h)
        if self.give_pre_end:
            return h
        h = self.conv_out(F.silu(self.norm_out(h)))  # (B, out_ch, H, W)
        return torch.tanh(h) if self.tanh_out else h
