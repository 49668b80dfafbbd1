"""Small parts that the denoising networks share: normalisation, checkpointing, step embeddings, n-d layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as torch_checkpoint

ModuleT = TypeVar("ModuleT", bound=nn.Module)

NORM_GROUPS = 32
_POOLINGS: dict[int, Any] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


class GroupNorm(nn.GroupNorm):
    """Group normalisation at full speed in either memory order.

    On the CPU the backward pass of the channels-last kernel is up to 28 times slower than that of the plain one
    (bfloat16, 32 channels, 64 x 64), while two copies cost little; the order of the input is kept.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, ...) over groups of channels."""
        if input.device.type != "cpu" or input.dim() != 4 or input.is_contiguous():
            return super().forward(input)
        return super().forward(input.contiguous()).contiguous(memory_format=torch.channels_last)


class GroupNorm32(GroupNorm):
    """Group normalisation that keeps the dtype of its input and computes in float32.

    The kernels accumulate half-precision inputs in float32 themselves; under autocast, where the weights are float32,
    the input is raised to their dtype first.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, ...) over groups of channels."""
        return super().forward(input.to(self.weight.dtype)).to(input.dtype)


# Keys up to which plain attention trains faster on a CPU than the fused kernel, whose backward pass is built for long
# sequences (4 to 7 times slower in bfloat16 at 16 to 77 keys). Memory stays linear in the number of queries.
SHORT_CONTEXT = 128


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention: q (B, H, N, d), k and v (B, H, M, d), boolean mask -> (B, H, N, d)."""
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if mask is None and trains and q.device.type == "cpu" and k.shape[-2] <= SHORT_CONTEXT:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, H, N, M)
        return scores.softmax(dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


# From so many weights on, and so many output channels for each pixel of the result (of the whole batch), a convolution
# on a CPU is done as one product with patches. The library's kernels bring the weights into an order of their own at
# each call, which with weights beyond the caches and few pixels takes longer than the convolution itself (two thirds of
# the whole at 1280 channels and 8 x 8 pixels).
MANY_WEIGHTS = 1 << 23
CHANNELS_PER_PIXEL = 4


class Conv2d(nn.Conv2d):
    """Convolution that is fast on a CPU with many frozen weights and few pixels, too."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C_out, h', w')."""
        trains = torch.is_grad_enabled() and self.weight.requires_grad  # would need all patches to be kept
        large = self.weight.numel() >= MANY_WEIGHTS and self.groups == 1 and self.dilation == (1, 1)
        usual = self.padding_mode == "zeros" and not isinstance(self.padding, str)
        if trains or input.device.type != "cpu" or not (large and usual):
            return super().forward(input)
        pads: Any = self.padding
        height, width = (
            (input.shape[2 + i] + 2 * pads[i] - self.kernel_size[i]) // self.stride[i] + 1 for i in range(2)
        )
        if self.out_channels < CHANNELS_PER_PIXEL * len(input) * height * width:
            return super().forward(input)
        patches = F.unfold(input, self.kernel_size, padding=pads, stride=self.stride)  # (B, C k k, h' w')
        rows = patches.transpose(1, 2).flatten(0, 1)  # (B h' w', C k k)
        tokens = F.linear(rows, self.weight.flatten(1), self.bias).unflatten(0, (-1, height, width))
        return tokens.permute(0, 3, 1, 2).contiguous()  # (B, C_out, h', w')


class TokenProjection(nn.Linear):
    """Linear map of tokens (B, N, C) whose weight is stored as that of a 1x1 convolution over `dims` axes.

    Checkpoints hold many projections as (C_out, C_in, 1, 1) or (C_out, C_in, 1). Applied to tokens they give attention
    queries with contiguous channels, which its fused kernels need. `dims=0` is a plain linear layer.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, dims: int = 0) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.weight = nn.Parameter(self.weight.detach().reshape(out_features, in_features, *[1] * dims))

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, N, C_in) to (B, N, C_out)."""
        return F.linear(input, self.weight.flatten(1), self.bias)


def normalization(channels: int, eps: float = 1e-5) -> GroupNorm32:
    """Group normalisation over 32 groups, computed in float32."""
    if channels % NORM_GROUPS:
        raise ValueError(
            f"{channels} channels cannot be normalised in {NORM_GROUPS} groups: use a multiple of {NORM_GROUPS}"
        )
    return GroupNorm32(NORM_GROUPS, channels, eps=eps)


_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: Conv2d, 3: nn.Conv3d}


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Convolution over `dims` spatial axes; further arguments as `torch.nn.Conv2d` takes them."""
    return _by_dims(_CONVOLUTIONS, dims)(*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Average pooling over `dims` spatial axes; further arguments as `torch.nn.AvgPool2d` takes them."""
    return _by_dims(_POOLINGS, dims)(*args, **kwargs)


def _by_dims(table: dict[int, Any], dims: int) -> Any:
    if dims not in table:
        raise ValueError(f"dims={dims!r} is not supported: use 1, 2 or 3 spatial axes")
    return table[dims]


def zero_module(module: ModuleT) -> ModuleT:
    """Set all parameters of `module` to zero and return it, so that its residual branch starts as the identity."""
    for parameter in module.parameters():
        parameter.detach().zero_()
    return module


def checkpoint(function: Callable[..., Tensor], *inputs: Any, enabled: bool = True) -> Tensor:
    """Call `function(*inputs)`; when `enabled`, store no activations but compute them again in the backward pass.

    Gradients equal those of a plain call, whichever of parameters and inputs need them. Without gradients this is a
    plain call.
    """
    if not (enabled and torch.is_grad_enabled()):
        return function(*inputs)
    return torch_checkpoint(function, *inputs, use_reentrant=False)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000, repeat_only: bool = False) -> Tensor:
    """Sinusoidal embedding of (possibly fractional) time steps (B,) as float32 (B, dim): cosines, then sines.

    Wavelengths grow geometrically from 2 pi towards 2 pi `max_period`; an odd `dim` ends with a zero column. With
    `repeat_only` the steps themselves are repeated `dim` times.
    """
    if repeat_only:
        return timesteps[:, None].repeat(1, dim)  # (B, dim)
    half = dim // 2
    # On the CPU whatever the device, so that all see the same: one bit of exp shifts the phase at t = 1000 by 6e-5.
    exponents = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device="cpu") / half
    frequencies = exponents.exp().to(timesteps.device, non_blocking=True)
    angles = timesteps[:, None].float() * frequencies  # (B, half)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))  # (B, dim)
