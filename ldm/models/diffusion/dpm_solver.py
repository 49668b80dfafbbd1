"""DPM-Solver++(2M) (Lu et al. 2022): second-order multistep solver on the estimates of x_0."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ldm.models.diffusion.sampler import Grid, Run, Sampler
from ldm.protocols import Denoiser

SPACINGS = ("karras", "logSNR", "time_uniform")
RHO = 7  # exponent of the karras spacing
FEW_STEPS = 10  # below this many steps the last one is of first order, which is the stabler choice (paper, appendix D)


class DPMSolverSampler(Sampler):
    """DPM-Solver++(2M), deterministic, good from about 15 steps; leads from the last trained time step to the first.

    `spacing` places the S + 1 levels: "karras" evenly in sigma^(1/7), where sigma = sqrt((1 - acp) / acp) (Karras et
    al. 2022), "logSNR" evenly in log sigma, "time_uniform" evenly in time, on trained time steps only. A schedule
    whose last step holds no signal has infinite sigma there and gets "time_uniform" whatever was asked.
    """

    def __init__(self, model: Denoiser, spacing: str = "karras") -> None:
        super().__init__(model)
        if spacing not in SPACINGS:
            raise ValueError(f"spacing '{spacing}' is unknown; choose one of {', '.join(SPACINGS)}")
        self.spacing = spacing

    def make_grid(self, num_steps: int, discretize: str, eta: float) -> Grid:
        """S levels; each leads to the next, the last to the first trained time step, where the chain ends."""
        del discretize, eta
        total = self.ddpm_num_timesteps
        if not 1 <= num_steps < total:
            raise ValueError(f"{num_steps} sampling steps asked of a model with {total}: give 1 to {total - 1}")
        acp = torch.as_tensor(self.model.alphas_cumprod).detach().cpu().double().numpy()
        steps, alphas = spaced_levels(acp, num_steps + 1, self.spacing)
        return Grid(
            steps[1:], torch.from_numpy(alphas[1:]), torch.from_numpy(alphas[:-1]), torch.zeros(num_steps).double()
        )

    def step(self, x: Tensor, i: int, run: Run) -> tuple[Tensor, Tensor]:
        """Algorithm 2 of the paper with lambda = log(sqrt(acp) / sqrt(1 - acp)) and step h in lambda."""
        prediction = self.predict(x, i, run)
        alpha, alpha_prev = float(run.grid.alphas[i]), float(run.grid.alphas_prev[i])
        h = half_log_snr(alpha_prev) - half_log_snr(alpha)
        data = prediction.x0
        if run.history and not (i == 0 and len(run.grid) < FEW_STEPS):
            h_before = half_log_snr(alpha) - half_log_snr(float(run.grid.alphas[i + 1]))
            data = data + (data - run.history[-1]) * (h / (2 * h_before))
        run.history = [prediction.x0]
        ratio = ((1 - alpha_prev) / (1 - alpha)) ** 0.5
        return ratio * x - alpha_prev**0.5 * math.expm1(-h) * data, prediction.x0


def spaced_levels(acp: np.ndarray, count: int, spacing: str) -> tuple[np.ndarray, np.ndarray]:
    """Ascending time steps (float64 between trained ones, else int64) and acp of `count` levels over the schedule."""
    last = len(acp) - 1
    if spacing == "time_uniform" or acp[-1] <= 0:
        steps = np.linspace(0, last, count).round().astype(np.int64)
        return steps, acp[steps]
    log_sigma = np.log((1 - acp) / acp) / 2
    low, high = log_sigma[0], log_sigma[-1]
    if spacing == "logSNR":
        levels = np.linspace(low, high, count)
    else:
        levels = RHO * np.log(np.linspace(np.exp(low / RHO), np.exp(high / RHO), count))
    return np.interp(levels, log_sigma, np.arange(last + 1, dtype=np.float64)), 1 / (1 + np.exp(2 * levels))


def half_log_snr(alpha: float) -> float:
    """Lambda = log(sqrt(acp / (1 - acp))); minus infinity for pure noise."""
    return 0.5 * math.log(alpha / (1 - alpha)) if alpha > 0 else -math.inf
