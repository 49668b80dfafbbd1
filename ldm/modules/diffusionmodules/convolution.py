"""The convolution of the UNets: PyTorch's own, and two ways to the same numbers that are faster on a CPU.

Both apply to frozen weights (sampling, learning words); training all weights takes PyTorch's own. Shapes: B samples,
C input and O output channels, h x w pixels, T tiles of 2 x 2 pixels in all samples of a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# From so many weights on, and so many output channels for each pixel of the result (of the whole batch), a convolution
# on a CPU is done as one product with patches. The library's kernels bring the weights into an order of their own at
# each call, which with weights beyond the caches and few pixels takes longer than the convolution itself (two thirds of
# the whole at 1280 channels and 8 x 8 pixels).
MANY_WEIGHTS = 1 << 23
CHANNELS_PER_PIXEL = 4

# From so many channels and tiles on, the transforms around Winograd's products cost less than the products save.
WINOGRAD_CHANNELS = 256
WINOGRAD_TILES = 256
TILES_AT_ONCE = 256  # so that what lies between the transforms stays in the cache
NUMBERS_AT_ONCE = 1 << 23  # of the transformed kernels

# How the 9 weights of a kernel become 16: G g G^T, with the rows of G for the points 0, 1, -1 and infinity.
_POINTS = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
_KERNEL_TRANSFORM = torch.kron(_POINTS, _POINTS)  # (16, 9)

_direct = False


@contextmanager
def direct_convolutions() -> Iterator[None]:
    """Within this block every convolution is PyTorch's own, to compare with or to count its operations."""
    global _direct
    before, _direct = _direct, True
    try:
        yield
    finally:
        _direct = before


class Conv2d(nn.Conv2d):
    """Convolution that is fast on a CPU with frozen weights, too."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, O, h', w')."""
        trains = torch.is_grad_enabled() and self.weight.requires_grad
        if trains or _direct or input.device.type != "cpu" or input.dim() != 4 or not self._is_usual():
            return super().forward(input)
        if self._suits_winograd(input):
            return WinogradConvolution.apply(input, self.weight, self.bias)
        if self._suits_patches(input):
            return self._by_patches(input)
        return super().forward(input)

    def _is_usual(self) -> bool:
        return (
            self.groups == 1
            and self.dilation == (1, 1)
            and self.padding_mode == "zeros"
            and not isinstance(self.padding, str)
        )

    def _suits_winograd(self, input: Tensor) -> bool:
        height, width = input.shape[-2:]
        return (
            (self.kernel_size, self.stride, self.padding) == ((3, 3), (1, 1), (1, 1))
            and min(self.in_channels, self.out_channels) >= WINOGRAD_CHANNELS
            and height % 2 == width % 2 == 0
            and len(input) * height * width >= 4 * WINOGRAD_TILES
            and input.dtype == self.weight.dtype == torch.float32  # 16 bits are too few for the differences of tiles
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        )

    def _result_size(self, input: Tensor) -> tuple[int, int]:
        pads: Any = self.padding
        height, width = (
            (input.shape[2 + i] + 2 * pads[i] - self.kernel_size[i]) // self.stride[i] + 1 for i in range(2)
        )
        return height, width

    def _suits_patches(self, input: Tensor) -> bool:
        height, width = self._result_size(input)
        few_pixels = self.out_channels >= CHANNELS_PER_PIXEL * len(input) * height * width
        return self.weight.numel() >= MANY_WEIGHTS and few_pixels

    def _by_patches(self, input: Tensor) -> Tensor:
        pads: Any = self.padding
        patches = F.unfold(input, self.kernel_size, padding=pads, stride=self.stride)  # (B, C k k, h' w')
        rows = patches.transpose(1, 2).flatten(0, 1)  # (B h' w', C k k)
        tokens = F.linear(rows, self.weight.flatten(1), self.bias).unflatten(0, (-1, *self._result_size(input)))
        return tokens.permute(0, 3, 1, 2).contiguous()  # (B, O, h', w')


class WinogradConvolution(torch.autograd.Function):
    """3 x 3 convolution with padding 1 by F(2 x 2, 3 x 3) of Lavin and Gray (2015): 16 products in place of 36.

    Sides must be even. Differs from the direct sum by float32's rounding (about 1e-6 of the largest value). The
    gradient with respect to the input is the same convolution with mirrored kernels; there is none for the weights.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Map (B, C, h, w) with kernels (O, C, 3, 3) to (B, O, h, w)."""
        ctx.save_for_backward(weight)
        return _winograd(input, weight, bias, mirrored=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Gradient (B, C, h, w) of the input."""
        (weight,) = ctx.saved_tensors
        return _winograd(grad, weight, None, mirrored=True), None, None


def _winograd(x: Tensor, weight: Tensor, bias: Tensor | None, mirrored: bool) -> Tensor:
    """Convolve (B, C, h, w) with kernels (O, C, 3, 3) to (B, O, h, w), some tiles and output channels at a time.

    `mirrored`: with kernels (C, O, 3, 3), both of their axes reversed.
    """
    batch, channels, height, width = x.shape
    padded = F.pad(x, (1, 1, 1, 1))  # (B, C, h + 2, w + 2)
    out_axis = 1 if mirrored else 0
    out = x.new_empty(batch, weight.shape[out_axis], height, width)
    rows = 2 * min(height // 2, max(1, TILES_AT_ONCE // (width // 2)))
    samples = max(1, TILES_AT_ONCE // (rows * width // 4))
    kernels_at_once = max(1, NUMBERS_AT_ONCE // (16 * channels))
    parts = [(start, top) for start in range(0, batch, samples) for top in range(0, height, rows)]
    tiles: Tensor | None = None
    for first in range(0, out.shape[1], kernels_at_once):
        those = slice(first, min(first + kernels_at_once, out.shape[1]))
        kernels = _transformed(weight.narrow(out_axis, first, those.stop - first), mirrored)  # (16, O, C)
        for start, top in parts:
            if tiles is None or len(parts) > 1:
                tiles = _input_tiles(padded[start : start + samples, :, top : top + rows + 2])  # (16, C, T)
            products = torch.bmm(kernels, tiles)  # (16, O, T)
            if bias is not None:
                products[5] += bias[those, None]  # this one counts once in each of a tile's four pixels
            _write_pixels(products, out[start : start + samples, those, top : top + rows])
    return out


def _transformed(weight: Tensor, mirrored: bool) -> Tensor:
    """Kernels (O, C, 3, 3), or mirrored (C, O, 3, 3), as (16, O, C)."""
    transform = _KERNEL_TRANSFORM.flip(1) if mirrored else _KERNEL_TRANSFORM
    kernels = (transform @ weight.flatten(2).flatten(0, 1).T).unflatten(1, weight.shape[:2])
    return kernels.transpose(1, 2) if mirrored else kernels


def _input_tiles(padded: Tensor) -> Tensor:
    """Overlapping 4 x 4 tiles d of (B, C, h + 2, w + 2), two pixels apart, as B^T d B: (16, C, T)."""
    x = padded.transpose(0, 1)  # (C, B, h + 2, w + 2)
    height, width = x.shape[2] - 2, x.shape[3] - 2
    rows = x.new_empty(4, *x.shape[:2], height // 2, width + 2)
    _combine([x[:, :, i : i + height - 1 : 2] for i in range(4)], rows.unbind(0))
    tiles = x.new_empty(4, 4, *x.shape[:2], height // 2, width // 2)
    _combine([rows[..., i : i + width - 1 : 2] for i in range(4)], tiles.unbind(1))
    return tiles.flatten(3).flatten(0, 1)  # (16, C, T)


def _combine(parts: list[Tensor], results: tuple[Tensor, ...]) -> None:
    """Apply B^T along one axis: parts d0 ... d3 to d0 - d2, d1 + d2, d2 - d1, d1 - d3."""
    first, second, third, fourth = parts
    torch.sub(first, third, out=results[0])
    torch.add(second, third, out=results[1])
    torch.sub(third, second, out=results[2])
    torch.sub(second, fourth, out=results[3])


def _write_pixels(products: Tensor, out: Tensor) -> None:
    """Write A^T m A of products m (16, O, T) as 2 x 2 pixels each of `out` (B, O, h, w)."""
    batch, channels, height, width = out.shape
    m = products.view(4, 4, channels, batch, height // 2, width // 2)
    for row, part in enumerate((m[0] + m[1] + m[2], m[1] - m[2] - m[3])):  # (4, O, B, h / 2, w / 2)
        pixels = out.transpose(0, 1)[:, :, row::2]  # (O, B, h / 2, w)
        torch.add(part[0] + part[1], part[2], out=pixels[..., 0::2])
        torch.sub(part[1] - part[2], part[3], out=pixels[..., 1::2])
