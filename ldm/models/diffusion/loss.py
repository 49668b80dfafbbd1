"""The diffusion training objective as pure functions (Ho et al. 2020, Rombach et al. 2022)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def elementwise_loss(prediction: Tensor, target: Tensor, loss_type: str) -> Tensor:
    """Squared ("l2") or absolute ("l1") difference, unreduced, float32."""
    if loss_type == "l2":
        return F.mse_loss(prediction.float(), target.float(), reduction="none")
    if loss_type == "l1":
        return (prediction.float() - target.float()).abs()
    raise ValueError(f"loss_type '{loss_type}' is neither 'l1' nor 'l2'")


def per_sample_loss(prediction: Tensor, target: Tensor, loss_type: str, mask: Tensor | None = None) -> Tensor:
    """Mean loss of each sample: (B, C, h, w) -> (B,).

    `mask` (B, 1, h, w) weights the positions; the mean is over the weights, so a mask of ones changes nothing.
    """
    loss = elementwise_loss(prediction, target, loss_type)  # (B, C, h, w)
    if mask is None:
        return loss.flatten(1).mean(1)
    mask = mask.to(loss).expand_as(loss)
    return (loss * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp_min(1e-8)


def min_snr_weights(alphas_cumprod: Tensor, gamma: float, parameterization: str) -> Tensor:
    """Min-SNR-gamma loss weights per time step (Hang et al. 2023, section 3.4): (T,).

    With SNR = acp / (1 - acp): min(SNR, gamma) for x0, divided by SNR for eps and by SNR + 1 for v.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    clipped = snr.clamp(max=gamma)
    if parameterization == "eps":
        return clipped / snr
    if parameterization == "v":
        return clipped / (snr + 1)
    return clipped


def combine_losses(
    per_sample: Tensor,
    logvar_t: Tensor,
    lvlb_weights_t: Tensor,
    *,
    l_simple_weight: float,
    elbo_weight: float,
    snr_weights_t: Tensor | None = None,
) -> dict[str, Tensor]:
    """Combine per-sample losses (B,) into the published objective; returns scalars.

    loss = l_simple_weight * mean(w_t * L / exp(logvar_t) + logvar_t) + elbo_weight * mean(lvlb_t * L)
    Keys: `loss_simple` (plain mean), `loss_gamma` (first mean), `loss_vlb` (second mean), `loss`.
    """
    weighted = per_sample if snr_weights_t is None else per_sample * snr_weights_t
    gamma = (weighted / torch.exp(logvar_t) + logvar_t).mean()
    vlb = (lvlb_weights_t * per_sample).mean()
    return {
        "loss_simple": per_sample.mean(),
        "loss_gamma": gamma,
        "loss_vlb": vlb,
        "loss": l_simple_weight * gamma + elbo_weight * vlb,
    }
