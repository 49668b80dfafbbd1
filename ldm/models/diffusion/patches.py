"""Running a network over overlapping patches of a large latent and blending the results.

The blending weight of a position falls with its distance to the patch's border, so seams do not show.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class PatchOptions:
    """Patch size and stride in latent pixels, first-stage factor, and bounds of the blending weights."""

    ks: tuple[int, int]
    stride: tuple[int, int]
    vqf: int = 1
    patch_distributed_vq: bool = False
    tie_braker: bool = False
    clip_min_weight: float = 0.01
    clip_max_weight: float = 0.5
    clip_min_tie_weight: float = 0.01
    clip_max_tie_weight: float = 0.5


def border_distance(height: int, width: int) -> Tensor:
    """Distance of each grid point to the nearest border, in units of the grid's size: (height, width) in [0, 0.5]."""
    rows = torch.linspace(0, 1, height) if height > 1 else torch.zeros(1)
    columns = torch.linspace(0, 1, width) if width > 1 else torch.zeros(1)
    rows, columns = torch.minimum(rows, 1 - rows), torch.minimum(columns, 1 - columns)
    return torch.minimum(rows[:, None], columns[None, :])


def blending_weights(kernel: tuple[int, int], grid: tuple[int, int], options: PatchOptions) -> Tensor:
    """Weights (1, kh * kw, Ly * Lx) of every position in every patch."""
    weights = border_distance(*kernel).clamp(options.clip_min_weight, options.clip_max_weight)
    weights = weights.reshape(1, -1, 1).repeat(1, 1, grid[0] * grid[1])
    if options.tie_braker:
        ties = border_distance(*grid).clamp(options.clip_min_tie_weight, options.clip_max_tie_weight)
        weights = weights * ties.reshape(1, 1, -1)
    return weights


def blend_patches(
    x: Tensor, network: Callable[[Tensor, int], Tensor], options: PatchOptions, upscale: int = 1, downscale: int = 1
) -> Tensor:
    """Apply `network(patch, index)` to every patch of `x` (B, C, h, w) and blend the outputs.

    Outputs are `upscale` times as large as the patches (a decoder) or `downscale` times smaller (an encoder, whose
    input patches are `downscale` times the options' latent size). Returns (B, C_out, h * upscale / downscale, ...).
    """
    height, width = x.shape[-2:]
    kernel = (min(options.ks[0] * downscale, height), min(options.ks[1] * downscale, width))
    stride = (min(options.stride[0] * downscale, height), min(options.stride[1] * downscale, width))
    grid = ((height - kernel[0]) // stride[0] + 1, (width - kernel[1]) // stride[1] + 1)
    patches = F.unfold(x, kernel, stride=stride)  # (B, C * kh * kw, L)
    patches = patches.view(x.shape[0], x.shape[1], *kernel, patches.shape[-1])  # (B, C, kh, kw, L)
    outputs = torch.stack([network(patches[..., i], i) for i in range(patches.shape[-1])], dim=-1)

    def scale(size: tuple[int, int]) -> tuple[int, int]:
        return (size[0] * upscale // downscale, size[1] * upscale // downscale)

    weights = blending_weights(scale(kernel), grid, options).to(outputs)  # (1, kh' * kw', L)
    fold = {"output_size": scale((height, width)), "kernel_size": scale(kernel), "stride": scale(stride)}
    normalisation = F.fold(weights, **fold)  # (1, 1, h', w')
    weighted = outputs.flatten(2, 3) * weights[:, None]  # (B, C_out, kh' * kw', L)
    return F.fold(weighted.flatten(1, 2), **fold) / normalisation  # (B, C_out, h', w')
