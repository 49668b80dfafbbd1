"""Loss of the KL-regularised first stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses.base import FirstStageLoss, with_prefix


class DummyLoss(nn.Module):
    """Stands where a config names a loss for a first stage that is not trained."""

    def __init__(self) -> None:  # without it, nn.Module would take any parameter
        super().__init__()


class LPIPSWithDiscriminator(FirstStageLoss):
    """Reconstruction likelihood + KL + adversarial term, summed over pixels and averaged over the batch.

    The error r of each pixel counts as r / exp(logvar) + logvar. `logvar` is a scalar parameter that stays at
    `logvar_init`, as in the published training, unless `learn_logvar`.
    """

    def __init__(
        self,
        disc_start: int = 0,
        logvar_init: float = 0.0,
        kl_weight: float = 1.0,
        pixelloss_weight: float = 1.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_loss: str = "hinge",
        disc_ndf: int = 64,
        perceptual_loss: str | Mapping[str, Any] | nn.Module = "lpips",
        perceptual_ckpt: str | Sequence[str] | None = None,
        learn_logvar: bool = False,
    ) -> None:
        super().__init__(
            disc_start=disc_start,
            pixelloss_weight=pixelloss_weight,
            disc_num_layers=disc_num_layers,
            disc_in_channels=disc_in_channels,
            disc_factor=disc_factor,
            disc_weight=disc_weight,
            perceptual_weight=perceptual_weight,
            use_actnorm=use_actnorm,
            disc_conditional=disc_conditional,
            disc_ndf=disc_ndf,
            disc_loss=disc_loss,
            perceptual_loss=perceptual_loss,
            perceptual_ckpt=perceptual_ckpt,
        )
        self.kl_weight = kl_weight
        self.logvar = nn.Parameter(torch.tensor(float(logvar_init)), requires_grad=learn_logvar)

    def forward(
        self,
        inputs: Tensor,
        reconstructions: Tensor,
        posteriors: DiagonalGaussianDistribution,
        optimizer_idx: int,
        global_step: int,
        last_layer: Tensor | None = None,
        cond: Tensor | None = None,
        split: str = "train",
        weights: Tensor | float | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the autoencoder (`optimizer_idx` 0) or the discriminator (1), and a dict to log.

        Pictures are (B, C, H, W) in [-1, 1]; `weights` scale the likelihood of each pixel.
        """
        inputs, reconstructions = inputs.float(), reconstructions.float()
        if optimizer_idx == 1:
            return self.discriminator_loss(inputs, reconstructions, global_step, cond, split)
        batch = inputs.shape[0]
        rec_loss, _ = self.reconstruction_terms(inputs, reconstructions)  # (B, C, H, W)
        nll = rec_loss / torch.exp(self.logvar) + self.logvar
        nll_loss = nll.sum() / batch
        weighted_nll_loss = nll_loss if weights is None else (weights * nll).sum() / batch
        kl_loss = posteriors.kl().sum() / batch
        g_term, g_log = self.generator_term(nll_loss, reconstructions, global_step, last_layer, cond)
        loss = weighted_nll_loss + self.kl_weight * kl_loss + g_term
        log = {
            "total_loss": loss,
            "logvar": self.logvar,
            "kl_loss": kl_loss,
            "nll_loss": nll_loss,
            "rec_loss": rec_loss.mean(),
            **g_log,
        }
        return loss, with_prefix(split, log)
