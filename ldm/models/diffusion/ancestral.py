"""Ancestral sampling (Ho et al. 2020): every step draws from the posterior q(x_{t-1} | x_t, x_0)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ldm.models.diffusion.sampler import Grid, Run, Sampler
from ldm.protocols import Denoiser


class AncestralSampler(Sampler):
    """DDPM chain over all trained steps (S = T) or over S evenly spaced ones.

    `clip_denoised` limits estimates of x_0 to [-1, 1], for pixel models; `v_posterior` chooses the variance as in
    `diffusion_buffers`. Both are by default as the model has them.
    """

    paste_after_step = True

    def __init__(self, model: Denoiser, clip_denoised: bool | None = None, v_posterior: float | None = None) -> None:
        super().__init__(model)
        self.clip_denoised = getattr(model, "clip_denoised", False) if clip_denoised is None else clip_denoised
        self.v_posterior = float(getattr(model, "v_posterior", 0.0)) if v_posterior is None else v_posterior

    def check_eta(self, eta: float) -> None:
        """The chain has its own noise, which is that of eta 1."""
        if eta not in (0, 1):
            raise ValueError(f"ddim_eta has no meaning for {type(self).__name__}, got {eta}; use the ddim sampler")

    def make_grid(self, num_steps: int, discretize: str, eta: float) -> Grid:
        """Levels of the chain; unlike DDIM's it ends at acp = 1."""
        del discretize, eta
        total = self.ddpm_num_timesteps
        if not 1 <= num_steps <= total:
            raise ValueError(f"{num_steps} sampling steps asked of a model with {total}: give 1 to {total}")
        steps = np.linspace(total - 1, 0, num_steps).round().astype(np.int64)[::-1].copy()
        betas = getattr(self.model, "betas", None)
        if betas is None:
            acp = torch.as_tensor(self.model.alphas_cumprod).detach().cpu().double()
        else:  # 1 - acp of neighbouring steps is all but equal: from betas it keeps its digits
            acp = torch.cumprod(1 - torch.as_tensor(betas).detach().cpu().double(), 0)
        alphas = acp[torch.from_numpy(steps)]
        alphas_prev = torch.cat([alphas.new_ones(1), alphas[:-1]])
        beta = 1 - alphas / alphas_prev
        variance = (1 - self.v_posterior) * beta * (1 - alphas_prev) / (1 - alphas) + self.v_posterior * beta
        return Grid(steps, alphas, alphas_prev, variance.sqrt())

    def step(self, x: Tensor, i: int, run: Run) -> tuple[Tensor, Tensor]:
        """Algorithm 2 of the paper; no noise is added where the chain ends."""
        x0 = self.predict(x, i, run).x0
        if self.clip_denoised:
            x0 = x0.clamp(-1, 1)
        alpha, alpha_prev = float(run.grid.alphas[i]), float(run.grid.alphas_prev[i])
        beta = 1 - alpha / alpha_prev
        mean = beta * alpha_prev**0.5 / (1 - alpha) * x0
        mean = mean + (1 - alpha_prev) * (alpha / alpha_prev) ** 0.5 / (1 - alpha) * x
        sigma = float(run.grid.sigmas[i]) if alpha_prev < 1 else 0.0
        return mean + run.scaled_noise(mean, sigma), x0
