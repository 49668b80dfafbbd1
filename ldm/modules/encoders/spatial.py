"""Images, masks and layouts as spatial conditioning."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

METHODS = ("nearest", "linear", "bilinear", "trilinear", "bicubic", "area")


class SpatialRescaler(nn.Module):
    """Shrink (or grow) a map `n_stages` times by `multiplier`, then map its channels linearly.

    method: interpolation, one of `METHODS`.
    in_channels, out_channels, bias: the 1x1 convolution; without `out_channels` there is none.
    """

    def __init__(
        self,
        n_stages: int = 1,
        method: str = "bilinear",
        multiplier: float = 0.5,
        in_channels: int = 3,
        out_channels: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if n_stages < 0:
            raise ValueError(f"n_stages is {n_stages}, but cannot be negative")
        if method not in METHODS:
            raise ValueError(f"method {method!r} is unknown; known: {', '.join(METHODS)}")
        self.n_stages = n_stages
        self.method = method
        self.multiplier = multiplier
        self.channel_mapper = None
        if out_channels is not None:
            self.channel_mapper = nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_out, h, w) of `x` (B, C, H, W)."""
        for _ in range(self.n_stages):
            x = F.interpolate(x, scale_factor=self.multiplier, mode=self.method)
        return x if self.channel_mapper is None else self.channel_mapper(x)

    def encode(self, x: Tensor) -> Tensor:
        """Same as `forward`."""
        return self(x)
