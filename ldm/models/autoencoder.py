"""First stages: pictures to latents and back, with the training of both kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.first_stage import FirstStage, full_precision
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

__all__ = ["AutoencoderKL", "IdentityFirstStage", "VQModel", "VQModelInterface"]


class AutoencoderKL(FirstStage):
    """First stage whose latents are Gaussians, held near the standard normal by a small KL weight."""

    def __init__(
        self,
        ddconfig: Mapping[str, Any],  # parameters of Encoder and Decoder
        lossconfig: Mapping[str, Any],  # loss with `target`; torch.nn.Identity for a model that only runs
        embed_dim: int,  # channels of the latent
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),  # prefixes of keys in `ckpt_path` to leave out
        image_key: str = "image",
        colorize_nlabels: int | None = None,  # channels of label maps that are shown in random colours
        monitor: str | None = None,  # logged value that names the best checkpoint
        scheduler_config: Mapping[str, Any] | None = None,  # factor on the learning rate by step
        use_ema: bool = False,
        fold: int = 1,  # fold x fold neighbours of the latent become channels: smaller latents at the same capacity
    ) -> None:
        super().__init__(
            ddconfig,
            image_key=image_key,
            colorize_nlabels=colorize_nlabels,
            monitor=monitor,
            scheduler_config=scheduler_config,
            use_ema=use_ema,
        )
        if not ddconfig.get("double_z", True):
            raise ValueError("ddconfig.double_z is false; AutoencoderKL needs mean and log variance (double_z: true)")
        self.embed_dim = embed_dim
        self.fold = fold
        self.quant_conv = nn.Conv2d(2 * ddconfig["z_channels"], 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        self.finish(lossconfig, ckpt_path, ignore_keys)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Posterior over latents (B, embed_dim * fold^2, h / fold, w / fold) of pictures (B, C, H, W)."""
        moments = self.quant_conv(self.encoder(x))  # (B, 2 * embed_dim, h, w)
        if self.fold > 1:  # means and log variances stay the two halves, since channels keep their order
            moments = F.pixel_unshuffle(moments, self.fold)  # (B, 2 * embed_dim * fold^2, h / fold, w / fold)
        return DiagonalGaussianDistribution(full_precision(moments))

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, embed_dim * fold^2, h / fold, w / fold) -> pictures (B, C, H, W)."""
        if self.fold > 1:
            z = F.pixel_shuffle(z, self.fold)  # (B, embed_dim, h, w)
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x: Tensor, sample_posterior: bool = True) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Reconstruction (B, C, H, W) from a sample (or the mean) of the posterior, and the posterior."""
        posterior = self.encode(x)
        z = posterior.sample() if sample_posterior else posterior.mode()  # (B, embed_dim, h, w)
        return self.decode(z), posterior

    def loss_of(
        self, inputs: Tensor, outputs: tuple[Any, ...], optimizer_idx: int, global_step: int, split: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and log values of one optimiser, given pictures and what `forward` made of them."""
        reconstructions, posterior = outputs
        return self.loss(
            inputs, reconstructions, posterior, optimizer_idx, global_step, last_layer=self.last_layer, split=split
        )

    def train_outputs(self, inputs: Tensor) -> tuple[Any, ...]:
        """Reconstructions (B, C, H, W) and posterior."""
        posterior = self.encode(inputs)
        return self.decode(posterior.sample(self.draw_noise(posterior.mean))), posterior

    def random_pictures(self, inputs: Tensor) -> dict[str, Tensor]:
        """Decoded standard normal noise: shows how far the latents are from a normal distribution."""
        posterior = self.encode(inputs)
        return {"samples": self.decode(self.draw_noise(posterior.mean))}


class VQModel(FirstStage):
    """First stage whose latents are entries of a learned codebook."""

    def __init__(
        self,
        ddconfig: Mapping[str, Any],  # parameters of Encoder and Decoder
        lossconfig: Mapping[str, Any],  # loss with `target`; torch.nn.Identity for a model that only runs
        n_embed: int,  # entries of the codebook
        embed_dim: int,  # channels of the latent
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),  # prefixes of keys in `ckpt_path` to leave out
        image_key: str = "image",
        colorize_nlabels: int | None = None,  # channels of label maps that are shown in random colours
        monitor: str | None = None,  # logged value that names the best checkpoint
        batch_resize_range: Sequence[int] | None = None,  # train on heights drawn from [low, high] in steps of 16
        scheduler_config: Mapping[str, Any] | None = None,  # factor on the learning rate by step
        lr_g_factor: float = 1.0,  # learning rate of the autoencoder relative to the discriminator's
        remap: str | None = None,  # .npy file with the used codes; indices then count among these
        sane_index_shape: bool = False,  # indices (B, h, w) rather than flat
        use_ema: bool = False,
    ) -> None:
        super().__init__(
            ddconfig,
            image_key=image_key,
            colorize_nlabels=colorize_nlabels,
            monitor=monitor,
            scheduler_config=scheduler_config,
            use_ema=use_ema,
            batch_resize_range=batch_resize_range,
            lr_g_factor=lr_g_factor,
        )
        if ddconfig.get("double_z", True):
            raise ValueError("ddconfig.double_z is true; a vector-quantised model needs double_z: false")
        from taming.modules.vqvae.quantize import VectorQuantizer2

        self.embed_dim = embed_dim
        self.n_embed = n_embed
        self.quantize = VectorQuantizer2(n_embed, embed_dim, beta=0.25, remap=remap, sane_index_shape=sane_index_shape)
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        self.finish(lossconfig, ckpt_path, ignore_keys)

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """Pictures (B, C, H, W) -> latents before quantisation (B, embed_dim, h, w)."""
        return self.quant_conv(self.encoder(x))

    def quantize_latent(self, h: Tensor) -> tuple[Tensor, Tensor, tuple[Any, Any, Tensor]]:
        """Nearest codes (B, embed_dim, h, w), codebook loss, and (None, None, indices)."""
        h = full_precision(h)
        # Which code is nearest depends on small differences of large sums, so autocast must not round them.
        with torch.autocast(h.device.type, enabled=False):
            return self.quantize(h)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[Any, Any, Tensor]]:
        """Quantised latents (B, embed_dim, h, w), codebook loss (scalar), and (None, None, indices).

        Indices are flat in the order of batch, row, column; (B, h, w) with `sane_index_shape`.
        """
        return self.quantize_latent(self.encode_to_prequant(x))

    def decode(self, quant: Tensor) -> Tensor:
        """Latents (B, embed_dim, h, w) -> pictures (B, C, H, W)."""
        return self.decoder(self.post_quant_conv(quant))

    def decode_code(self, indices: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Pictures (B, C, H, W) of codebook indices, given as (B, h, w) or flat with `shape` = (B, h, w)."""
        shape = tuple(indices.shape if shape is None else shape[:3])
        if len(shape) != 3:
            raise ValueError(f"indices have shape {tuple(indices.shape)}; pass shape=(batch, height, width) with them")
        # A copy, since the quantiser edits remapped indices in place.
        flat = indices.reshape(-1).clone()  # (B * h * w,)
        return self.decode(self.quantize.get_codebook_entry(flat, (*shape, self.embed_dim)))

    def forward(self, x: Tensor, return_pred_indices: bool = False) -> tuple[Tensor, ...]:
        """Reconstruction (B, C, H, W) and codebook loss, followed by the indices if asked for."""
        quant, codebook_loss, (_, _, indices) = self.quantize_latent(self.encode_to_prequant(x))
        reconstruction = self.decoder(self.post_quant_conv(quant))  # (B, C, H, W)
        return (reconstruction, codebook_loss, indices) if return_pred_indices else (reconstruction, codebook_loss)

    def loss_of(
        self, inputs: Tensor, outputs: tuple[Any, ...], optimizer_idx: int, global_step: int, split: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and log values of one optimiser, given pictures and what `forward` made of them."""
        reconstructions, codebook_loss, indices = outputs
        return self.loss(
            codebook_loss,
            inputs,
            reconstructions,
            optimizer_idx,
            global_step,
            last_layer=self.last_layer,
            split=split,
            predicted_indices=indices,
        )

    def train_outputs(self, inputs: Tensor) -> tuple[Any, ...]:
        """Reconstructions (B, C, H, W), codebook loss and indices."""
        return self(inputs, return_pred_indices=True)


class VQModelInterface(VQModel):
    """A VQModel as first stage of a diffusion model: latents stay continuous until they are decoded."""

    def encode(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Pictures (B, C, H, W) -> latents before quantisation (B, embed_dim, h, w)."""
        return self.encode_to_prequant(x)

    def decode(self, h: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Latents (B, embed_dim, h, w), replaced by their nearest codes unless told not to, -> pictures."""
        return super().decode(h if force_not_quantize else self.quantize_latent(h)[0])


class IdentityFirstStage(nn.Module):
    """First stage that leaves pictures as they are, for diffusion in pixel space."""

    def __init__(self, vq_interface: bool = False) -> None:
        super().__init__()
        self.vq_interface = vq_interface

    def encode(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x

    def decode(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x

    def quantize(self, x: Tensor) -> Any:
        """Return `x`, with empty loss and indices beside it if `vq_interface`."""
        return (x, None, (None, None, None)) if self.vq_interface else x

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x
