"""Loss of the vector-quantised first stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.losses.base import FirstStageLoss, with_prefix


def measure_perplexity(indices: Tensor, n_classes: int = 0) -> tuple[Tensor, Tensor]:
    """Perplexity of the code usage in `indices` (any shape), 1 to the number of codes, and how many codes occur."""
    counts = torch.bincount(indices.flatten(), minlength=n_classes)  # (n_classes or more,)
    share = counts / counts.sum()
    return torch.exp(-(share * torch.log(share + 1e-10)).sum()), (counts > 0).sum().float()


class VQLPIPSWithDiscriminator(FirstStageLoss):
    """Mean reconstruction error + codebook loss + adversarial term."""

    def __init__(
        self,
        disc_start: int = 0,
        codebook_weight: float = 1.0,
        pixelloss_weight: float = 1.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_ndf: int = 64,
        disc_loss: str = "hinge",
        n_classes: int | None = None,
        perceptual_loss: str | Mapping[str, Any] | nn.Module = "lpips",
        pixel_loss: str = "l1",
        perceptual_ckpt: str | Sequence[str] | None = None,
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
            pixel_loss=pixel_loss,
        )
        self.codebook_weight = codebook_weight
        self.n_classes = n_classes

    def forward(
        self,
        codebook_loss: Tensor,
        inputs: Tensor,
        reconstructions: Tensor,
        optimizer_idx: int,
        global_step: int,
        last_layer: Tensor | None = None,
        cond: Tensor | None = None,
        split: str = "train",
        predicted_indices: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the autoencoder (`optimizer_idx` 0) or the discriminator (1), and a dict to log.

        Pictures are (B, C, H, W) in [-1, 1]. With `predicted_indices` (any shape) the usage of codes is logged too.
        """
        inputs, reconstructions = inputs.float(), reconstructions.float()
        if optimizer_idx == 1:
            return self.discriminator_loss(inputs, reconstructions, global_step, cond, split)
        rec_loss, p_loss = self.reconstruction_terms(inputs, reconstructions)  # (B, C, H, W)
        nll_loss = rec_loss.mean()
        g_term, g_log = self.generator_term(nll_loss, reconstructions, global_step, last_layer, cond)
        loss = nll_loss + self.codebook_weight * codebook_loss.mean() + g_term
        log = {
            "total_loss": loss,
            "quant_loss": codebook_loss.mean(),
            "nll_loss": nll_loss,
            "rec_loss": rec_loss.mean(),
            "p_loss": p_loss,
            **g_log,
        }
        if predicted_indices is not None:
            log["perplexity"], log["cluster_usage"] = measure_perplexity(predicted_indices, self.n_classes or 0)
        return loss, with_prefix(split, log)
