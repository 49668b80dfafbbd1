"""Noise schedules and the closed-form relations between x_0, x_t, eps and v, as pure functions of tensors.

Notation (Ho et al. 2020; Salimans and Ho 2022): beta_t is the variance added at step t, alpha_t = 1 - beta_t, and
`alphas_cumprod[t]` (acp) the product of all alphas up to t, so that

    x_t = sqrt(acp) x_0 + sqrt(1 - acp) eps        v = sqrt(acp) eps - sqrt(1 - acp) x_0

Functions whose first parameter is `buffers` read the arrays of `diffusion_buffers` as attributes: a diffusion model
that registered them serves as it is, and so does `types.SimpleNamespace(**diffusion_buffers(betas))`.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

BETA_SCHEDULES = ("linear", "cosine", "sqrt_linear", "sqrt")
PARAMETERIZATIONS = ("eps", "x0", "v")


class ScheduleBuffers(Protocol):
    """The arrays of `diffusion_buffers`, as attributes."""

    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    log_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor


def make_beta_schedule(
    schedule: str,
    n_timestep: int,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
) -> np.ndarray:
    """Variances beta_t, float64 (n_timestep,).

    "linear" is linear in sqrt(beta), as in every published latent diffusion model; "sqrt_linear" is the plain linear
    schedule and "sqrt" its square root; "cosine" is that of Nichol and Dhariwal (2021), with offset `cosine_s`.
    """
    if n_timestep < 1:
        raise ValueError(f"a schedule needs at least 1 time step, got {n_timestep}")
    if schedule == "linear":
        return np.linspace(linear_start**0.5, linear_end**0.5, n_timestep, dtype=np.float64) ** 2
    if schedule == "sqrt_linear":
        return np.linspace(linear_start, linear_end, n_timestep, dtype=np.float64)
    if schedule == "sqrt":
        return np.linspace(linear_start, linear_end, n_timestep, dtype=np.float64) ** 0.5
    if schedule == "cosine":
        position = (np.arange(n_timestep + 1, dtype=np.float64) / n_timestep + cosine_s) / (1 + cosine_s)
        acp = np.cos(position * np.pi / 2) ** 2
        return np.clip(1 - acp[1:] / acp[:-1], 0, 0.999)
    raise ValueError(f"beta_schedule '{schedule}' is unknown; choose one of {', '.join(BETA_SCHEDULES)}")


def rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Betas changed so that the last step holds no signal (Lin et al. 2024, algorithm 1), float64 (T,).

    sqrt(acp) is shifted and scaled: its first entry stays, its last becomes exactly 0. Only models that predict v or
    x0 can be trained with the result.
    """
    root = np.sqrt(np.cumprod(1 - np.asarray(betas, dtype=np.float64)))
    if len(root) < 2:
        raise ValueError(f"zero terminal SNR needs at least 2 time steps, got {len(root)}")
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    acp = root**2
    return 1 - np.concatenate([acp[:1], acp[1:] / acp[:-1]])


def diffusion_buffers(
    betas: np.ndarray | Tensor, parameterization: str = "eps", v_posterior: float = 0.0
) -> dict[str, Tensor]:
    """The thirteen arrays that a diffusion model registers under their published names, float32 (T,) each.

    `v_posterior` mixes the two bounds of the posterior variance (0: beta tilde, 1: beta). `lvlb_weights` weights the
    variational bound for the model's `parameterization`: "eps", "x0" or "v".
    """
    beta = np.asarray(betas, dtype=np.float64)
    alpha = 1 - beta
    acp = np.cumprod(alpha)
    acp_prev = np.append(1.0, acp[:-1])
    if parameterization == "eps" and acp[-1] <= 0:
        raise ValueError("a schedule whose last step holds no signal needs parameterization 'v' or 'x0', not 'eps'")
    variance = (1 - v_posterior) * beta * (1 - acp_prev) / (1 - acp) + v_posterior * beta
    with np.errstate(divide="ignore"):  # zero terminal SNR: infinite 1/acp, which v and x0 models never read
        recip = 1 / acp
    arrays = {
        "betas": beta,
        "alphas_cumprod": acp,
        "alphas_cumprod_prev": acp_prev,
        "sqrt_alphas_cumprod": np.sqrt(acp),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - acp),
        "log_one_minus_alphas_cumprod": np.log(1 - acp),
        "sqrt_recip_alphas_cumprod": np.sqrt(recip),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(recip - 1),
        "posterior_variance": variance,
        # the variance of the first step is 0, whose logarithm would be -inf
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": beta * np.sqrt(acp_prev) / (1 - acp),
        "posterior_mean_coef2": (1 - acp_prev) * np.sqrt(alpha) / (1 - acp),
    }
    buffers = {name: torch.tensor(array, dtype=torch.float32) for name, array in arrays.items()}
    buffers["lvlb_weights"] = _lvlb_weights(buffers, torch.tensor(alpha, dtype=torch.float32), parameterization)
    return buffers


def _lvlb_weights(buffers: dict[str, Tensor], alphas: Tensor, parameterization: str) -> Tensor:
    """Weights of the variational bound (T,), computed in float32: published values carry its rounding of 1 - acp."""
    acp = buffers["alphas_cumprod"]
    if parameterization == "eps":
        weights = buffers["betas"] ** 2 / (2 * buffers["posterior_variance"] * alphas * (1 - acp))
    elif parameterization == "x0":
        # The derivation gives 2 (1 - acp); the published value, kept here, is 2 - acp. The term defaults to weight 0.
        weights = 0.5 * acp.sqrt() / (2.0 - acp)
    elif parameterization == "v":
        weights = torch.ones_like(acp)
    else:
        raise ValueError(f"parameterization '{parameterization}' is unknown; choose one of {PARAMETERIZATIONS}")
    if len(weights) > 1:
        weights[0] = weights[1]  # the posterior variance of the first step is 0
    return weights


def extract(a: Tensor, t: Tensor, x_shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Entries `a[t]` of a table (T,) for time steps `t` (B,), shaped (B, 1, ..., 1) to broadcast over `x_shape`."""
    return a.gather(-1, t).reshape(t.shape[0], *(1,) * (len(x_shape) - 1))


def q_sample(buffers: ScheduleBuffers, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t of q(x_t | x_0) for the drawn `noise`; tensors (B, ...), `t` int64 (B,)."""
    signal = extract(buffers.sqrt_alphas_cumprod, t, x_start.shape)
    sigma = extract(buffers.sqrt_one_minus_alphas_cumprod, t, x_start.shape)
    return signal * x_start + sigma * noise


def q_mean_variance(buffers: ScheduleBuffers, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (B, ...), variance and log variance (B, 1, ..., 1) of q(x_t | x_0)."""
    mean = extract(buffers.sqrt_alphas_cumprod, t, x_start.shape) * x_start
    log_variance = extract(buffers.log_one_minus_alphas_cumprod, t, x_start.shape)
    return mean, log_variance.exp(), log_variance


def predict_start_from_noise(buffers: ScheduleBuffers, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_0 that `x_t` and `noise` imply."""
    recip = extract(buffers.sqrt_recip_alphas_cumprod, t, x_t.shape)
    recipm1 = extract(buffers.sqrt_recipm1_alphas_cumprod, t, x_t.shape)
    return recip * x_t - recipm1 * noise


def predict_noise_from_start(buffers: ScheduleBuffers, x_t: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
    """Noise that `x_t` and `x_start` imply."""
    recip = extract(buffers.sqrt_recip_alphas_cumprod, t, x_t.shape)
    recipm1 = extract(buffers.sqrt_recipm1_alphas_cumprod, t, x_t.shape)
    return (recip * x_t - x_start) / recipm1


def get_v(buffers: ScheduleBuffers, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The velocity target v = sqrt(acp) eps - sqrt(1 - acp) x_0."""
    signal = extract(buffers.sqrt_alphas_cumprod, t, x_start.shape)
    sigma = extract(buffers.sqrt_one_minus_alphas_cumprod, t, x_start.shape)
    return signal * noise - sigma * x_start


def predict_start_from_v(buffers: ScheduleBuffers, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """x_0 = sqrt(acp) x_t - sqrt(1 - acp) v."""
    signal = extract(buffers.sqrt_alphas_cumprod, t, x_t.shape)
    sigma = extract(buffers.sqrt_one_minus_alphas_cumprod, t, x_t.shape)
    return signal * x_t - sigma * v


def predict_noise_from_v(buffers: ScheduleBuffers, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """Noise eps = sqrt(acp) v + sqrt(1 - acp) x_t."""
    signal = extract(buffers.sqrt_alphas_cumprod, t, x_t.shape)
    sigma = extract(buffers.sqrt_one_minus_alphas_cumprod, t, x_t.shape)
    return signal * v + sigma * x_t


def q_posterior(buffers: ScheduleBuffers, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (B, ...), variance and clipped log variance (B, 1, ..., 1) of q(x_{t-1} | x_t, x_0)."""
    mean = (
        extract(buffers.posterior_mean_coef1, t, x_t.shape) * x_start
        + extract(buffers.posterior_mean_coef2, t, x_t.shape) * x_t
    )
    variance = extract(buffers.posterior_variance, t, x_t.shape)
    return mean, variance, extract(buffers.posterior_log_variance_clipped, t, x_t.shape)


def make_ddim_timesteps(ddim_discr_method: str, num_ddim_timesteps: int, num_ddpm_timesteps: int) -> np.ndarray:
    """Ascending time steps of a short chain, int64.

    "uniform" takes every (T // S)-th step, so that it returns more than S steps when S does not divide T; "quad"
    takes S steps, denser near 0. Both are shifted by one, and an index past the end becomes the last one, T - 1.
    "trailing" takes S even steps of which the last is T - 1 (Lin et al. 2024, section 3.3).
    """
    if not 1 <= num_ddim_timesteps <= num_ddpm_timesteps:
        raise ValueError(
            f"{num_ddim_timesteps} sampling steps asked of a model with {num_ddpm_timesteps}: "
            f"give a number from 1 to {num_ddpm_timesteps}"
        )
    if ddim_discr_method == "uniform":
        steps = np.arange(0, num_ddpm_timesteps, num_ddpm_timesteps // num_ddim_timesteps)
    elif ddim_discr_method == "quad":
        steps = (np.linspace(0, np.sqrt(num_ddpm_timesteps * 0.8), num_ddim_timesteps) ** 2).astype(np.int64)
    elif ddim_discr_method == "trailing":
        even = num_ddpm_timesteps * (1 - np.arange(num_ddim_timesteps) / num_ddim_timesteps)  # (S,)
        return even.round().astype(np.int64)[::-1] - 1
    else:
        raise ValueError(f"ddim_discretize '{ddim_discr_method}' is unknown; choose 'uniform', 'quad' or 'trailing'")
    return np.minimum(steps + 1, num_ddpm_timesteps - 1)


def make_ddim_sampling_parameters(
    alphacums: Tensor | np.ndarray, ddim_timesteps: np.ndarray, eta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Sigmas, alphas and previous alphas (S,) of the DDIM chain (Song et al. 2021, equation 16); float64.

    `alphacums` is acp over all time steps (T,); "previous" is the less noisy neighbour, for the first step acp[0].
    """
    acp = torch.as_tensor(alphacums).detach().cpu().double()
    steps = torch.as_tensor(np.asarray(ddim_timesteps))
    alphas = acp[steps]
    alphas_prev = torch.cat([acp[:1], acp[steps[:-1]]])
    return ddim_sigmas(alphas, alphas_prev, eta), alphas, alphas_prev


def ddim_sigmas(alphas: Tensor, alphas_prev: Tensor, eta: float) -> Tensor:
    """Standard deviation of the fresh noise of each step: eta 0 is deterministic, eta 1 the DDPM posterior's."""
    variance = (1 - alphas_prev) / (1 - alphas) * (1 - alphas / alphas_prev)
    # a level repeated at the end of the chain adds nothing, also where it holds no signal and the ratio is 0 / 0
    return eta * variance.where(alphas_prev > alphas, torch.zeros_like(variance)).sqrt()
