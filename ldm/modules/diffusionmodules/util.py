"""Small parts that the denoising networks share: normalisation, checkpointing, step embeddings, n-d layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from ldm.modules.diffusionmodules.convolution import Conv2d

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
    if mask is None and trains and _suits_16_bits(q, k, v):
        out: Tensor = Attention16.apply(q, k, v)
        return out
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _suits_16_bits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    alike = q.dtype == k.dtype == v.dtype == torch.bfloat16 and q.shape[-1] == v.shape[-1]
    return q.device.type == "cpu" and alike and not torch.compiler.is_compiling()


class Attention16(torch.autograd.Function):
    """Attention in bfloat16 on a CPU, with a backward pass of products in 16 bits.

    The fused one computes at float32's rate and takes nearly twice as long. Here blocks of weights are computed again
    as p = exp(q k - logsumexp), and from them, with g for the gradient of the result o, the gradient of the scores as
    p (g v - g o), as Dao et al. (2022) derive it. Memory is linear in the number of tokens.
    """

    ROWS = 1024  # queries in a block

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of q (B, H, N, d) over k and v (B, H, M, d)."""
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v."""
        shape, (q, k, v, out) = ctx.saved_tensors[0].shape, (t.flatten(0, 1) for t in ctx.saved_tensors[:4])
        logsumexp, g = ctx.saved_tensors[4].flatten(0, 1), grad.flatten(0, 1)  # (B H, N), (B H, N, d)
        keys, scale = k.shape[1], q.shape[-1] ** -0.5
        q = q * scale
        # What is subtracted rides along as two more channels, so that only the differences are rounded to 16 bits.
        # Weights are multiplied by the number of keys: a usual one is near 1 and its exponent near 0, where 16 bits are
        # fine enough.
        q_more, g_more = _append(q, math.log(keys) - logsumexp), _append(g, -(g.float() * out.float()).sum(-1))
        k_more, v_more = (torch.cat([t, t.new_ones(*t.shape[:2], 2)], dim=-1).transpose(1, 2) for t in (k, v))
        q_t, g_t, k = q.transpose(1, 2).contiguous(), g.transpose(1, 2).contiguous(), k.contiguous()  # (B H, d, N)
        grad_q, grad_k, grad_v = torch.empty_like(q), *(torch.zeros_like(t.transpose(1, 2)) for t in (k, v))
        weights, scores = (q.new_empty(min(Attention16.ROWS, q.shape[1]), keys) for _ in range(2))
        for i in range(len(q)):
            for start in range(0, q.shape[1], Attention16.ROWS):
                rows = slice(start, start + Attention16.ROWS)
                p = torch.mm(q_more[i, rows], k_more[i], out=weights[: len(q[i, rows])]).exp_()  # (rows, M)
                ds = torch.mm(g_more[i, rows], v_more[i], out=scores[: len(p)]).mul_(p)  # (rows, M)
                grad_q[i, rows] = ds @ k[i]
                grad_k[i].addmm_(q_t[i, :, rows], ds)
                grad_v[i].addmm_(g_t[i, :, rows], p)
        grad_k, grad_v = grad_k.mul_(1 / keys).transpose(1, 2), grad_v.mul_(1 / keys).transpose(1, 2)
        return grad_q.mul_(scale / keys).view(shape), grad_k.unflatten(0, shape[:2]), grad_v.unflatten(0, shape[:2])


def _append(x: Tensor, channel: Tensor) -> Tensor:
    """`x` (B, N, d) in 16 bits with a float32 `channel` (B, N) as two more, the second with what rounding loses."""
    rounded = channel.to(x.dtype)
    return torch.cat([x, torch.stack([rounded, (channel - rounded.float()).to(x.dtype)], dim=-1)], dim=-1)


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
        # Tokens of a feature map are a transposed view, for which linear layers would copy the weights for each sample.
        return F.linear(input.contiguous(), self.weight.flatten(1), self.bias)


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
