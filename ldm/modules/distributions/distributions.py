"""Gaussians that the first stage encodes pictures to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class DiagonalGaussianDistribution:
    """Gaussian with diagonal covariance per latent position.

    `parameters` (B, 2C, h, w) hold mean and log variance; the latter is clamped to [-30, 20]. A `deterministic` one
    has zero width: samples are the mean and both `kl` and `nll` are zero.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        self.parameters = parameters
        self.deterministic = deterministic
        mean, logvar = parameters.chunk(2, dim=1)  # (B, C, h, w) each
        self.mean = mean
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.zeros_like(mean) if deterministic else torch.exp(0.5 * self.logvar)
        self.var = torch.zeros_like(mean) if deterministic else torch.exp(self.logvar)

    def sample(self, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Draw (B, C, h, w), from `noise` of that shape if given.

        Noise is drawn on the CPU, so that a seed gives the same latent on every device.
        """
        if noise is None:
            noise = torch.randn(self.mean.shape, generator=generator)
        return self.mean + self.std * noise.to(self.mean)

    def mode(self) -> Tensor:
        """The mean (B, C, h, w)."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """KL divergence (B,) in nats to `other`, or to the standard normal distribution."""
        if self.deterministic:
            return self.mean.new_zeros(1)
        if other is None:
            terms = self.mean.square() + self.var - 1.0 - self.logvar
        else:
            terms = (
                (self.mean - other.mean).square() / other.var + self.var / other.var - 1.0 - self.logvar + other.logvar
            )
        return 0.5 * terms.sum(dim=[1, 2, 3])  # (B,)

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """Negative log likelihood of `sample` (B, C, h, w) in nats, summed over `dims`."""
        if self.deterministic:
            return self.mean.new_zeros(1)
        terms = math.log(2.0 * math.pi) + self.logvar + (sample - self.mean).square() / self.var
        return 0.5 * terms.sum(dim=list(dims))


def normal_kl(mean1: Tensor | float, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float) -> Tensor:
    """Elementwise KL divergence in nats between two Gaussians; arguments broadcast and at least one is a tensor."""
    arguments = (mean1, logvar1, mean2, logvar2)
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    if not tensors:
        raise TypeError(f"normal_kl needs at least one tensor, got {arguments}")
    m1, lv1, m2, lv2 = (torch.as_tensor(a, dtype=tensors[0].dtype, device=tensors[0].device) for a in arguments)
    return 0.5 * (lv2 - lv1 - 1.0 + torch.exp(lv1 - lv2) + (m1 - m2).square() * torch.exp(-lv2))
