"""The terms that both first-stage losses share: pixels, perception, discriminator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.util import freeze, instantiate_from_config


def hinge_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator, a scalar."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def vanilla_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Cross-entropy loss of the discriminator, a scalar."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


DISCRIMINATOR_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hinge": hinge_d_loss,
    "vanilla": vanilla_d_loss,
}

PIXEL_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {"l1": torch.abs, "l2": torch.square}


def adaptive_weight(nll_loss: Tensor, g_loss: Tensor, last_layer: Tensor) -> Tensor:
    """Ratio of the gradient norms of both losses at the decoder's last weight, at most 1e4 (VQGAN, equation 7)."""
    (nll_grad,) = torch.autograd.grad(nll_loss, last_layer, retain_graph=True)
    (g_grad,) = torch.autograd.grad(g_loss, last_layer, retain_graph=True)
    return (nll_grad.norm() / (g_grad.norm() + 1e-4)).clamp(0.0, 1e4).detach()


def build_perceptual_loss(
    perceptual_loss: str | Mapping[str, Any] | nn.Module, perceptual_ckpt: str | Sequence[str] | None
) -> nn.Module:
    """The frozen perceptual network: "lpips", a config with `target`, or the module itself."""
    if isinstance(perceptual_loss, nn.Module):
        return freeze(perceptual_loss)
    if perceptual_loss == "lpips":
        from ldm.modules.losses.lpips import LPIPS

        return freeze(LPIPS(perceptual_ckpt))
    if isinstance(perceptual_loss, str):
        raise ValueError(f"perceptual_loss is '{perceptual_loss}'; give 'lpips' or a config with a 'target'")
    return freeze(instantiate_from_config(perceptual_loss))


def build_discriminator(in_channels: int, num_layers: int, ndf: int, use_actnorm: bool) -> nn.Module:
    """PatchGAN discriminator (B, C, H, W) -> (B, 1, h, w), initialised as published."""
    from taming.modules.discriminator.model import NLayerDiscriminator, weights_init

    discriminator = NLayerDiscriminator(input_nc=in_channels, ndf=ndf, n_layers=num_layers, use_actnorm=use_actnorm)
    return discriminator.apply(weights_init)


class FirstStageLoss(nn.Module):
    """Pixel, perceptual and adversarial terms.

    A term of weight 0 is not built: without `perceptual_weight` there is no perceptual network, without `disc_weight`
    or `disc_factor` no discriminator (`discriminator` is None). The discriminator, and the autoencoder's term against
    it, wait until step `disc_start`.
    """

    def __init__(
        self,
        *,
        disc_start: int,  # first generator step with an adversarial term
        pixelloss_weight: float,
        disc_num_layers: int,
        disc_in_channels: int,
        disc_factor: float,  # scales both sides of the adversarial game
        disc_weight: float,  # scales the autoencoder's side, besides the adaptive weight
        perceptual_weight: float,
        use_actnorm: bool,
        disc_conditional: bool,  # the discriminator also sees a condition picture
        disc_ndf: int,  # width of the discriminator's first layer
        disc_loss: str,  # "hinge" or "vanilla"
        perceptual_loss: str | Mapping[str, Any] | nn.Module,
        perceptual_ckpt: str | Sequence[str] | None,
        pixel_loss: str = "l1",  # "l1" or "l2"
    ) -> None:
        super().__init__()
        if pixel_loss not in PIXEL_LOSSES:
            raise ValueError(f"pixel_loss is '{pixel_loss}'; choose one of {', '.join(PIXEL_LOSSES)}")
        if disc_loss not in DISCRIMINATOR_LOSSES:
            raise ValueError(f"disc_loss is '{disc_loss}'; choose one of {', '.join(DISCRIMINATOR_LOSSES)}")
        self.disc_start = disc_start
        self.disc_factor = disc_factor
        self.disc_weight = disc_weight
        self.disc_conditional = disc_conditional
        self.disc_loss = DISCRIMINATOR_LOSSES[disc_loss]
        self.pixel_loss = PIXEL_LOSSES[pixel_loss]
        self.pixel_weight = pixelloss_weight
        self.perceptual_weight = perceptual_weight
        self.perceptual_loss: nn.Module | None = None
        if perceptual_weight > 0:
            self.perceptual_loss = build_perceptual_loss(perceptual_loss, perceptual_ckpt)
        self.discriminator: nn.Module | None = None
        if disc_factor > 0 and disc_weight > 0:
            self.discriminator = build_discriminator(disc_in_channels, disc_num_layers, disc_ndf, use_actnorm)

    def disc_factor_at(self, global_step: int) -> float:
        """Strength of the adversarial game at a generator step; 0 before `disc_start` or without discriminator."""
        return self.disc_factor if self.discriminator is not None and global_step >= self.disc_start else 0.0

    def reconstruction_terms(self, inputs: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted pixel + perceptual error (B, C, H, W), and the mean unweighted perceptual distance."""
        rec_loss = self.pixel_weight * self.pixel_loss(inputs - reconstructions)  # (B, C, H, W)
        if self.perceptual_loss is None:
            return rec_loss, rec_loss.new_zeros(())
        p_loss = self.perceptual_loss(inputs, reconstructions).float()  # (B, 1, 1, 1)
        return rec_loss + self.perceptual_weight * p_loss, p_loss.mean()

    def judge(self, pictures: Tensor, cond: Tensor | None) -> Tensor:
        """Logits (B, 1, h, w) of the discriminator, high for what it takes as real."""
        assert self.discriminator is not None
        if self.disc_conditional != (cond is not None):
            raise ValueError(f"disc_conditional is {self.disc_conditional}, but cond is {type(cond).__name__}")
        if cond is not None:
            pictures = torch.cat([pictures, cond], dim=1)
        return self.discriminator(pictures).float()

    def generator_term(
        self,
        nll_loss: Tensor,
        reconstructions: Tensor,
        global_step: int,
        last_layer: Tensor | None,
        cond: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The autoencoder's adversarial term (a scalar) with the parts it is the product of."""
        factor = self.disc_factor_at(global_step)
        g_loss = d_weight = nll_loss.new_zeros(())
        if factor > 0:
            g_loss = -self.judge(reconstructions, cond).mean()
            if g_loss.requires_grad:  # in validation there are no gradients to balance, and the term is left out
                if last_layer is None:
                    raise ValueError("last_layer is None; pass the decoder's last weight to balance the gradients")
                d_weight = self.disc_weight * adaptive_weight(nll_loss, g_loss, last_layer)
        log = {"d_weight": d_weight, "disc_factor": nll_loss.new_tensor(factor), "g_loss": g_loss.detach()}
        return d_weight * factor * g_loss, log

    def discriminator_loss(
        self, inputs: Tensor, reconstructions: Tensor, global_step: int, cond: Tensor | None, split: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss that trains the discriminator, and what to log."""
        if self.discriminator is None:
            raise ValueError("optimizer_idx is 1, but this loss was built without a discriminator (weight 0)")
        logits_real = self.judge(inputs.detach(), cond)
        logits_fake = self.judge(reconstructions.detach(), cond)
        loss = self.disc_factor_at(global_step) * self.disc_loss(logits_real, logits_fake)
        log = {"disc_loss": loss, "logits_real": logits_real.mean(), "logits_fake": logits_fake.mean()}
        return loss, with_prefix(split, log)


def with_prefix(split: str, log: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached values under `split/name`."""
    return {f"{split}/{name}": value.detach() for name, value in log.items()}
