"""Where samplers get their noise: seeds per sample, one generator, or recorded draws.

Noise is drawn on the CPU and moved, so that a seed means the same picture on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

NoiseSource = Callable[[Sequence[int]], Tensor]


class SeededNoise:
    """Noise source with one generator per sample: row k depends on seed k and on the number of earlier draws only."""

    def __init__(self, seeds: Sequence[int]) -> None:
        too_large = [seed for seed in seeds if not -(2**63) <= int(seed) < 2**64]
        if too_large:
            raise ValueError(f"seed {too_large[0]} has more than 64 bits: give one from 0 to {2**64 - 1}")
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def __call__(self, shape: Sequence[int]) -> Tensor:
        """Noise of `shape`, whose first entry must be the number of seeds."""
        if shape[0] != len(self.generators):
            raise ValueError(f"{len(self.generators)} seeds for a batch of {shape[0]}: give one seed per sample")
        return torch.stack([torch.randn(tuple(shape[1:]), generator=g) for g in self.generators])


def noise_source(
    noise: NoiseSource | torch.Generator | Iterable[Tensor] | None, seeds: Sequence[int] | None
) -> NoiseSource:
    """A function from shape to noise out of what `sample` accepts.

    `noise` may be such a function, a generator, or recorded draws to replay in order; `seeds` holds one seed per
    sample. With neither, torch's global CPU generator serves.
    """
    if noise is not None and seeds is not None:
        raise ValueError("give either seeds or noise, not both")
    if seeds is not None:
        return SeededNoise(seeds)
    if noise is None:
        return torch.randn
    if isinstance(noise, torch.Generator):
        return lambda shape: torch.randn(tuple(shape), generator=noise, device=noise.device)
    if callable(noise):
        return noise
    draws = iter(noise)

    def replay(shape: Sequence[int]) -> Tensor:
        try:
            return next(draws)
        except StopIteration:
            raise ValueError("the recorded noise ran out: the run needs more draws than were given") from None

    return replay
