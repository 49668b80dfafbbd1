"""DDIM (Song et al. 2021): deterministic or noisy short chains, and their inversion."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.models.diffusion.sampler import Grid, Intermediates, NoiseSource, Prediction, Run, Sampler, noise_source
from ldm.models.diffusion.schedule import ddim_sigmas


class DDIMSampler(Sampler):
    """Denoising diffusion implicit model; `eta` 0 is deterministic, 1 has the noise of the DDPM posterior."""

    ddim_eta = 0.0

    def check_eta(self, eta: float) -> None:
        """Any eta >= 0 will do."""
        if eta < 0:
            raise ValueError(f"ddim_eta must not be negative, got {eta}")

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        """Choose the levels of the chain, and publish them as the attributes `ddim_timesteps`, `ddim_alphas`, ..."""
        super().make_schedule(ddim_num_steps, ddim_discretize, ddim_eta, verbose)
        self.ddim_eta = ddim_eta
        grid = self.current_grid()
        # kinds and precisions as published: scripts that read these attributes rely on them
        self.ddim_timesteps = grid.steps
        self.ddim_sigmas = grid.sigmas
        self.ddim_alphas = grid.alphas.float()
        self.ddim_alphas_prev: np.ndarray = grid.alphas_prev.numpy()
        self.ddim_sqrt_one_minus_alphas = (1 - grid.alphas).sqrt().float()
        acp = torch.as_tensor(self.model.alphas_cumprod).detach().cpu().float()
        acp_prev = torch.cat([acp.new_ones(1), acp[:-1]])
        self.ddim_sigmas_for_original_num_steps = ddim_sigmas(acp, acp_prev, ddim_eta)

    def current_grid(self, use_original_steps: bool = False) -> Grid:
        """Levels chosen by `make_schedule`, or all trained ones (with the noise of the chosen eta)."""
        grid = super().current_grid(use_original_steps)
        if not use_original_steps:
            return grid
        return dataclasses.replace(grid, sigmas=ddim_sigmas(grid.alphas, grid.alphas_prev, self.ddim_eta))

    def step(self, x: Tensor, i: int, run: Run) -> tuple[Tensor, Tensor]:
        """Equation 12 of the paper."""
        prediction = self.predict(x, i, run)
        return ddim_update(prediction, i, run), prediction.x0

    @torch.no_grad()
    def ddim_sampling(
        self,
        cond: Any,
        shape: Sequence[int],
        x_T: Tensor | None = None,
        *,
        ddim_use_original_steps: bool = False,
        timesteps: int | None = None,
        callback: Callable[[int], object] | None = None,
        img_callback: Callable[[Tensor, int], object] | None = None,
        quantize_denoised: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        log_every_t: int = 100,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        guidance_rescale: float = 0.0,
        seeds: Sequence[int] | None = None,
        noise: NoiseSource | torch.Generator | Iterable[Tensor] | None = None,
        verbose: bool = False,
    ) -> tuple[Tensor, Intermediates]:
        """Run the chain that `make_schedule` chose on a batch of `shape` (B, C, h, w); see `sample`.

        `timesteps` = K of S levels runs int(min(K / S, 1) S) - 1 steps, one fewer than its name says, as published;
        where K / S S rounds to less than K (29 of 50) two fewer. With `ddim_use_original_steps` it runs the K least
        noisy of all trained steps.
        """
        grid = self.current_grid(ddim_use_original_steps)
        if timesteps is not None:
            published = int(min(timesteps / len(grid), 1) * len(grid)) - 1
            grid = grid.head(timesteps if ddim_use_original_steps else max(published, 0))
        run = Run(
            grid=grid,
            guidance=self.guidance(
                shape[0], cond, unconditional_conditioning, unconditional_guidance_scale, guidance_rescale
            ),
            noise=noise_source(noise, seeds),
            temperature=temperature,
            noise_dropout=noise_dropout,
            quantize_x0=quantize_denoised,
            mask=mask,
            x0=x0,
        )
        x = self._start(tuple(shape), x_T, run)
        return self.loop(x, run, callback=callback, img_callback=img_callback, log_every_t=log_every_t, verbose=verbose)

    @torch.no_grad()
    def encode(
        self,
        x0: Tensor,
        cond: Any,
        t_enc: int,
        use_original_steps: bool = False,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        callback: Callable[[int], object] | None = None,
    ) -> tuple[Tensor, Intermediates]:
        """DDIM inversion: the latent (B, ...) from which `decode(latent, cond, t_enc)` at eta 0 leads back to `x0`.

        Solves the deterministic chain upwards over its `t_enc` least noisy levels; returns the latent and the log.
        Exact in the limit of many steps.
        """
        grid = self.current_grid(use_original_steps)
        if not 1 <= t_enc <= len(grid):
            raise ValueError(f"t_enc {t_enc} is outside the chain: give 1 to {len(grid)}")
        # The model is asked at the level where x is: one step below the level that the update leads to.
        steps = np.concatenate([[0], grid.steps[:-1]])
        below = Grid(steps, grid.alphas_prev, grid.alphas, grid.sigmas)
        if use_original_steps:  # no trained step lies below the first
            below.alphas[0] = grid.alphas[0]
        run = Run(below, self.guidance(len(x0), cond, unconditional_conditioning, unconditional_guidance_scale))
        x = x0.to(self.model.device, torch.float32)
        log: Intermediates = {"x_inter": [x], "pred_x0": [x]}
        for i in range(t_enc):
            prediction = self.predict(x, i, run)
            target = float(grid.alphas[i])
            x = target**0.5 * prediction.x0 + (1 - target) ** 0.5 * prediction.eps
            log["x_inter"].append(x)
            log["pred_x0"].append(prediction.x0)
            if callback is not None:
                callback(i)
        return x, log


def ddim_update(prediction: Prediction, i: int, run: Run) -> Tensor:
    """x at the next less noisy level: sqrt(acp') x_0 + sqrt(1 - acp' - sigma^2) eps + sigma noise."""
    alpha_prev, sigma = float(run.grid.alphas_prev[i]), float(run.grid.sigmas[i])
    # eta > 1 can ask for more noise than the level holds
    direction = max(1 - alpha_prev - sigma**2, 0.0) ** 0.5
    mean = alpha_prev**0.5 * prediction.x0 + direction * prediction.eps
    return mean + run.scaled_noise(mean, sigma)
