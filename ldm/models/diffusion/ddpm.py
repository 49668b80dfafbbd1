"""Latent diffusion models (Rombach et al. 2022), with the trainable words of Textual Inversion (Gal et al. 2022)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.models.diffusion.ddpm_base import DDPM
from ldm.models.diffusion.patches import PatchOptions, blend_patches
from ldm.models.diffusion.wrapper import DiffusionWrapper, conditioning_kwargs
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.protocols import TextEncoder
from ldm.util import FIRST_STAGE_ALIAS, UNCONDITIONAL_ALIAS, ConfigError, freeze, instantiate_from_config, require_off

logger = logging.getLogger(__name__)
WORDS = "embedding_manager."  # prefix of the words' keys in a state dict

__all__ = ["DDPM", "DiffusionWrapper", "LatentDiffusion", "LatentInpaintDiffusion", "Layout2ImgDiffusion"]


class LatentDiffusion(DDPM):
    """Diffusion in the latent space of a frozen first stage, conditioned on text, classes or pictures.

    | option | meaning |
    |---|---|
    | `first_stage_config` | config of the autoencoder, always frozen |
    | `cond_stage_config` | config of the conditioner, `__is_first_stage__` or `__is_unconditional__` |
    | `cond_stage_key`, `cond_stage_trainable` | batch key of the conditioning; train the conditioner too |
    | `conditioning_key`, `concat_mode` | see `DiffusionWrapper`; when no key is given, "concat" or (concat_mode false) "crossattn" |
    | `scale_factor`, `scale_by_std` | factor on first-stage latents; set it from the first batch so that latents have unit variance |
    | `num_timesteps_cond`, `cond_stage_forward` | accepted for published configs; only 1 (the conditioning is not noised) and null |
    | `conditioning_dropout` | probability of training on the empty caption, for classifier-free guidance |
    | `personalization_config` | config of the embedding manager; its vectors are then all that trains ... |
    | `unfreeze_model`, `model_lr` | ... unless the model is tuned along, at its own unscaled learning rate |
    | `embedding_reg_weight` | weight of the pull towards the initial vectors |
    | `embedding_manager_ckpt` | embedding file to start from, instead of the one that `personalization_config` may name |

    All other options are those of `DDPM`.
    """  # noqa: E501 (table rows)

    # Any: which class they are is up to the config; `encode` and `decode` are what is called.
    first_stage_model: Any
    cond_stage_model: Any
    embedding_manager: Any
    scale_factor: Any

    def __init__(
        self,
        first_stage_config: Any,
        cond_stage_config: Any,
        personalization_config: Any = None,
        num_timesteps_cond: int | None = None,
        cond_stage_key: str = "image",
        cond_stage_trainable: bool = False,
        concat_mode: bool = True,
        cond_stage_forward: str | None = None,
        conditioning_key: str | None = None,
        scale_factor: float = 1.0,
        scale_by_std: bool = False,
        conditioning_dropout: float = 0.0,
        unfreeze_model: bool = False,
        model_lr: float = 0.0,
        embedding_reg_weight: float = 0.0,
        embedding_manager_ckpt: str | Path | None = None,
        ckpt_path: str | Path | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        **ddpm_options: Any,
    ):
        require_off(cond_stage_forward=cond_stage_forward)
        if num_timesteps_cond != 1:
            require_off(num_timesteps_cond=num_timesteps_cond)
        if not 0 <= conditioning_dropout <= 1:
            raise ConfigError(f"conditioning_dropout is a probability between 0 and 1, got {conditioning_dropout}")
        if cond_stage_config == UNCONDITIONAL_ALIAS:
            conditioning_key = None
        elif conditioning_key is None:
            conditioning_key = "concat" if concat_mode else "crossattn"
        ddpm_options["clip_denoised"] = False  # latents have no bounds
        super().__init__(conditioning_key=conditioning_key, **ddpm_options)
        self.conditioning_key = conditioning_key
        self.cond_stage_key = cond_stage_key
        self.cond_stage_trainable = cond_stage_trainable
        self.conditioning_dropout = conditioning_dropout
        self.scale_by_std = scale_by_std
        if scale_by_std:
            self.register_buffer("scale_factor", torch.tensor(float(scale_factor), device="cpu"))
        else:
            self.scale_factor = scale_factor
        self.split_input_params: PatchOptions | None = None
        self.first_stage_model = freeze(instantiate_from_config(first_stage_config))
        self.cond_stage_model = self._build_conditioner(cond_stage_config)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, load_only_unet)

        # The manager reads its initial vectors from the conditioner's table, so the weights must be there before it.
        self.embedding_manager = None
        self.unfreeze_model = unfreeze_model
        self.model_lr = model_lr
        self.embedding_reg_weight = embedding_reg_weight
        if personalization_config is not None:
            self._build_embedding_manager(personalization_config, embedding_manager_ckpt)

    def _build_conditioner(self, config: Any) -> nn.Module | None:
        if config == UNCONDITIONAL_ALIAS:
            return None
        if config == FIRST_STAGE_ALIAS:
            return self.first_stage_model
        conditioner = instantiate_from_config(config)
        return conditioner if self.cond_stage_trainable else freeze(conditioner)

    def _build_embedding_manager(self, config: Any, checkpoint: str | Path | None) -> None:
        start = {"embedding_manager_ckpt": checkpoint} if checkpoint else {}
        self.embedding_manager = instantiate_from_config(config, self.cond_stage_model, **start)
        if self.inverts:
            freeze(self.model)
            freeze(self.cond_stage_model)
            self.strict_loading = False  # its checkpoints hold the vectors alone, the rest are the base weights
            if isinstance(self.logvar, nn.Parameter):
                self.logvar.requires_grad_(False)

    @property
    def inverts(self) -> bool:
        """Whether the pseudo-word vectors are all that trains."""
        return self.embedding_manager is not None and not self.unfreeze_model

    # -- first stage ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> Any:
        """Posterior (KL first stages) or latents of pictures (B, 3, H, W) in [-1, 1]."""
        x = x.to(self._first_stage_dtype)
        options = self.split_input_params
        if options is not None and options.patch_distributed_vq:
            encode = self.first_stage_model.encode
            return blend_patches(x, lambda patch, _: encode(patch), options, downscale=options.vqf)
        return self.first_stage_model.encode(x)

    def get_first_stage_encoding(self, encoder_posterior: Any, noise: Tensor | None = None) -> Tensor:
        """Scaled latents (B, C, h, w): scale_factor * (mean + std * noise), or scale_factor * latents."""
        if isinstance(encoder_posterior, DiagonalGaussianDistribution):
            mean, std = encoder_posterior.mean.float(), encoder_posterior.std.float()
            noise = self.draw_noise(mean) if noise is None else noise
            return self.scale_factor * (mean + std * noise)
        if isinstance(encoder_posterior, Tensor):
            return self.scale_factor * encoder_posterior
        raise TypeError(f"a first stage must encode to a tensor or a Gaussian, got {type(encoder_posterior).__name__}")

    def decode_first_stage(self, z: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Pictures (B, 3, H, W) of scaled latents (B, C, h, w)."""
        z = (z / self.scale_factor).to(self._first_stage_dtype)
        # Only quantising first stages take the option.
        kwargs = {"force_not_quantize": True} if force_not_quantize else {}
        options = self.split_input_params
        if options is not None and options.patch_distributed_vq:
            decode = self.first_stage_model.decode
            return blend_patches(z, lambda patch, _: decode(patch, **kwargs), options, upscale=options.vqf)
        return self.first_stage_model.decode(z, **kwargs)

    @property
    def _first_stage_dtype(self) -> torch.dtype:
        """Type of the first stage's weights, which its inputs must have."""
        parameters = self.first_stage_model.parameters()
        return next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)

    # -- conditioning --------------------------------------------------------------------------------------------

    def get_learned_conditioning(self, c: Any) -> Any:
        """Encode captions, a class batch or conditioning pictures with the conditioner."""
        stage = self.cond_stage_model
        if stage is None:
            raise ValueError("this model is unconditional: it has no conditioner")
        if isinstance(stage, TextEncoder):
            return self._encode_texts(stage, c)
        if hasattr(stage, "encode"):
            encoded = stage.encode(c)
            return encoded.mode() if isinstance(encoded, DiagonalGaussianDistribution) else encoded
        return stage(c)

    def _encode_texts(self, stage: TextEncoder, texts: Any) -> Tensor:
        """Context (B, L, D) of texts; equal ones are encoded once, unless dropout makes them differ."""
        distinct = list(dict.fromkeys(texts)) if isinstance(texts, list | tuple) else texts
        if len(distinct) == len(texts) or getattr(stage, "training", False):
            return stage.encode(texts, embedding_manager=self.embedding_manager)
        context = stage.encode(distinct, embedding_manager=self.embedding_manager)  # (number of distinct texts, L, D)
        return context[[distinct.index(text) for text in texts]]  # (B, L, D)

    def conditioning_input(self, batch: Mapping[str, Any]) -> Any:
        """What the conditioner encodes: captions, token ids, the batch itself (labels), or pictures (B, C, H, W)."""
        key = self.cond_stage_key
        if key == "class_label":
            return batch
        if key not in batch:
            raise ValueError(f"the batch has no '{key}'; it has {sorted(batch)}: set cond_stage_key or the data's keys")
        value = batch[key]
        if isinstance(value, Tensor) and value.dim() >= 3 and value.is_floating_point():
            return self.get_input(batch, key)
        return value

    def get_conditioning(self, batch: Mapping[str, Any]) -> Any:
        """Encoded conditioning of a batch (None when unconditional); in training, captions are dropped at random."""
        if self.cond_stage_model is None:
            return None
        c = self.conditioning_input(batch)
        if self.training and self.conditioning_dropout > 0 and isinstance(c, list | tuple):
            keep = self.draw(torch.rand, (len(c),)) >= self.conditioning_dropout
            c = [text if k else "" for text, k in zip(c, keep.tolist(), strict=True)]
        encoded = self.get_learned_conditioning(c)
        if self.cond_stage_model is self.first_stage_model:
            encoded = self._add_mask(encoded, batch)
        return encoded

    def _add_mask(self, latents: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Append the inpainting mask (B, H, W, 1), at latent size, to the masked picture's latents."""
        if "mask" not in batch:
            return latents
        mask = F.interpolate(self.get_input(batch, "mask"), size=latents.shape[-2:])  # (B, 1, h, w)
        return torch.cat([latents, mask], dim=1)  # (B, C + 1, h, w)

    def apply_model(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        """Raw network output (B, C, h, w) for noisy latents `x` (B, C, h, w) at time steps `t` (B,).

        `cond`: None, a tensor, a list of tensors, or a dict with lists under `c_concat` / `c_crossattn`.
        """
        kwargs = conditioning_kwargs(cond, self.conditioning_key)
        if self.split_input_params is None:
            return self.model(x, t, **kwargs)
        # Channels to concatenate are cut along with the latent.
        beside, channels = kwargs.pop("c_concat", []), x.shape[1]

        def network(patch: Tensor, index: int) -> Tensor:
            del index
            concat = {"c_concat": [patch[:, channels:]]} if beside else {}
            return self.model(patch[:, :channels], t, **concat, **kwargs)

        return blend_patches(torch.cat([x, *beside], dim=1), network, self.split_input_params)

    # -- training ------------------------------------------------------------------------------------------------

    def get_latents(self, batch: Mapping[str, Any]) -> Tensor:
        """Scaled latents (B, C, h, w), from cached posterior moments (`moments`, (B, 2 C, h, w)) or from pictures."""
        if "moments" in batch:
            return self.get_first_stage_encoding(DiagonalGaussianDistribution(batch["moments"].float())).detach()
        x = self.get_input(batch, self.first_stage_key)
        return self.get_first_stage_encoding(self.encode_first_stage(x)).detach()

    def prepare_batch(self, batch: Mapping[str, Any]) -> tuple[Tensor, Any, Tensor | None]:
        """Latents, conditioning and, when the batch has a `loss_mask` (B, H, W), position weights at latent size."""
        z = self.get_latents(batch)
        mask = None
        if "loss_mask" in batch:
            mask = F.interpolate(self.get_input(batch, "loss_mask"), size=z.shape[-2:], mode="area")  # (B, 1, h, w)
        return z, self.get_conditioning(batch), mask

    def p_losses(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """As `DDPM.p_losses`, plus the pull of pseudo-words towards their initial vectors."""
        loss, logs = super().p_losses(*args, **kwargs)
        if self.embedding_manager is not None and self.embedding_reg_weight > 0:
            regularisation = self.embedding_manager.embedding_to_coarse_loss().mean()
            loss = loss + self.embedding_reg_weight * regularisation
            prefix = "train" if self.training else "val"
            logs |= {f"{prefix}/loss_emb_reg": regularisation.detach(), f"{prefix}/loss": loss.detach()}
        return loss, logs

    @torch.no_grad()
    def on_train_batch_start(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Set `scale_factor` from the very first batch (scale_by_std); tell the embedding manager the step."""
        # A factor that came with a checkpoint belongs to its network and stays.
        fresh = self.global_step == 0 and self.current_epoch == 0 and batch_idx == 0
        if self.scale_by_std and fresh and not self.inverts and float(self.scale_factor) == 1.0:
            z: Any = self.get_latents(batch)
            if self.trainer.world_size > 1:
                z = self.all_gather(z)  # one factor, of the whole batch, for all processes
            self.scale_factor.copy_(1.0 / z.flatten().std())
            logger.info("scale_factor set to %.5f from the first batch", float(self.scale_factor))
        if self.embedding_manager is not None:
            self.embedding_manager.set_global_step(self.global_step)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Network, conditioner (when trainable) and learned log variance."""
        parameters = super().trainable_parameters()
        if self.cond_stage_trainable and self.cond_stage_model is not None:
            parameters += [p for p in self.cond_stage_model.parameters() if p.requires_grad]
        return parameters

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Pseudo-word vectors at `learning_rate`; a model that is tuned along at `model_lr`; else the plain groups."""
        if self.embedding_manager is None:
            return super().parameter_groups()
        groups = [{"params": list(self.embedding_manager.embedding_parameters()), "lr": self.learning_rate}]
        if self.unfreeze_model:
            groups.append({"params": self.trainable_parameters(), "lr": self.model_lr})
        return groups

    def configure_optimizers(self) -> Any:
        """As `DDPM.configure_optimizers`, but words are learned at a constant rate: the published code does so."""
        if self.embedding_manager is not None and self.scheduler_config is not None:
            logger.warning("words are learned at a constant rate: scheduler_config is not used")
            self.scheduler_config = None
        return super().configure_optimizers()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other words than this model's; as many vectors are in use as were in that run."""
        if self.embedding_manager is not None:
            self.embedding_manager.resume(checkpoint, WORDS)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep frozen weights out of an inversion's checkpoint, and say which words it started from."""
        if self.embedding_manager is not None:
            checkpoint |= self.embedding_manager.run_entries()
        if self.inverts:
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {k: v for k, v in state.items() if k.startswith(WORDS)}

    @torch.no_grad()
    def log_images(
        self,
        batch: Mapping[str, Any],
        N: int = 8,
        n_row: int = 4,
        sample: bool = True,
        ddim_steps: int = 200,
        ddim_eta: float = 1.0,
        quantize_denoised: bool = False,
        inpaint: bool = False,
        plot_denoise_rows: bool = False,
        plot_progressive_rows: bool = False,
        plot_diffusion_rows: bool = True,
        unconditional_guidance_scale: float = 5.0,
        unconditional_guidance_label: Sequence[str] | None = None,
        use_ema_scope: bool = True,
    ) -> dict[str, Tensor]:
        """Pictures of one batch for the log: key -> (n, 3, H, W) in [-1, 1]; see `visualize.log_latent_images`."""
        from ldm.models.diffusion.visualize import ImageLogOptions, log_latent_images

        options = ImageLogOptions(
            n=N,
            n_row=n_row,
            sample=sample,
            steps=ddim_steps,
            eta=ddim_eta,
            quantize_denoised=quantize_denoised,
            inpaint=inpaint,
            denoise_rows=plot_denoise_rows,
            progressive_rows=plot_progressive_rows,
            diffusion_rows=plot_diffusion_rows,
            guidance_scale=unconditional_guidance_scale,
            guidance_label=unconditional_guidance_label,
            use_ema=use_ema_scope,
        )
        return log_latent_images(self, batch, options)


class LatentInpaintDiffusion(LatentDiffusion):
    """Text-guided inpainting (hybrid conditioning): the mask and the masked picture's latents beside the noisy latent.

    `concat_keys`: batch keys joined in this order; `finetune_keys` accepts null, as the published config has it.
    """

    def __init__(
        self,
        concat_keys: Sequence[str] = ("mask", "masked_image"),
        masked_image_key: str = "masked_image",
        finetune_keys: Sequence[str] | None = None,
        **options: Any,
    ):
        require_off(finetune_keys=finetune_keys)  # it would grow a checkpoint's input layer
        if masked_image_key not in concat_keys:
            raise ConfigError(f"masked_image_key '{masked_image_key}' is not among concat_keys {list(concat_keys)}")
        super().__init__(**options)
        self.concat_keys = tuple(concat_keys)
        self.masked_image_key = masked_image_key

    def get_conditioning(self, batch: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        """`c_concat` of mask and masked latents at latent size, and `c_crossattn` of the captions."""
        context = super().get_conditioning(batch)
        masked = self.get_input(batch, self.masked_image_key)
        latents = self.get_first_stage_encoding(self.encode_first_stage(masked))  # (B, C, h, w)
        parts = [
            latents
            if key == self.masked_image_key
            else F.interpolate(self.get_input(batch, key), size=latents.shape[-2:])
            for key in self.concat_keys
        ]
        return {"c_concat": [torch.cat(parts, dim=1)], "c_crossattn": [context]}


class Layout2ImgDiffusion(LatentDiffusion):
    """Layout-to-image model; its conditioning is a sequence of coordinate tokens."""

    def __init__(self, cond_stage_key: str = "coordinates_bbox", **options: Any):
        if cond_stage_key != "coordinates_bbox":
            raise ConfigError(f"Layout2ImgDiffusion needs cond_stage_key 'coordinates_bbox', got '{cond_stage_key}'")
        super().__init__(cond_stage_key=cond_stage_key, **options)
