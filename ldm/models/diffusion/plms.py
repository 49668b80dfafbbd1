"""PLMS (Liu et al. 2022): DDIM with the noise extrapolated from earlier steps by linear multistep formulas."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.models.diffusion.ddim import DDIMSampler, ddim_update
from ldm.models.diffusion.sampler import Grid, Run, Sampler, to_prediction

# Adams-Bashforth weights of the newest and the earlier noises, by the number of earlier ones
WEIGHTS = {1: (3 / 2, -1 / 2), 2: (23 / 12, -16 / 12, 5 / 12), 3: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


class PLMSSampler(DDIMSampler):
    """Pseudo linear multistep sampler; deterministic, so that eta must be 0."""

    def check_eta(self, eta: float) -> None:
        """Only 0 will do."""
        Sampler.check_eta(self, eta)

    def make_grid(self, num_steps: int, discretize: str, eta: float) -> Grid:
        """Levels of the DDIM chain, all of which must hold signal."""
        grid = super().make_grid(num_steps, discretize, eta)
        if grid.alphas[-1] <= 0:
            raise ValueError("PLMS divides by the signal, of which the last time step of this model has none; use ddim")
        return grid

    def step(self, x: Tensor, i: int, run: Run) -> tuple[Tensor, Tensor]:
        """Fourth order once three noises are known; the first step averages over an Euler step (two evaluations)."""
        prediction = self.predict(x, i, run)
        earlier = run.history[::-1]  # newest first
        if earlier:
            weights = WEIGHTS[len(earlier)]
            terms = [w * e for w, e in zip(weights, [prediction.eps, *earlier], strict=True)]
            eps = torch.stack(terms).sum(0)
        else:
            euler = ddim_update(prediction, i, run)
            eps = (prediction.eps + self.predict(euler, max(i - 1, 0), run).eps) / 2
        run.history = [*run.history, prediction.eps][-3:]
        mixed = self.quantized(to_prediction(eps, x, float(run.grid.alphas[i]), "eps"), run)
        return ddim_update(mixed, i, run), mixed.x0
