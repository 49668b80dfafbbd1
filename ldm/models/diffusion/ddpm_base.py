"""The diffusion model in pixel space, and the training shell that the latent one shares."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision, Precision
from pytorch_lightning.utilities.enums import GradClipAlgorithmType
from torch import Tensor, nn

from ldm.models.diffusion import schedule
from ldm.models.diffusion.loss import combine_losses, min_snr_weights, per_sample_loss
from ldm.models.diffusion.wrapper import DiffusionWrapper
from ldm.modules.ema import LitEma
from ldm.util import count_params, instantiate_from_config, require_off

logger = logging.getLogger(__name__)

FUSED_FROM = 1_000_000  # parameters


class DDPM(pl.LightningModule):
    """Denoising diffusion model (Ho et al. 2020) in the space of its inputs.

    | option | meaning |
    |---|---|
    | `unet_config` | config of the network |
    | `timesteps`, `beta_schedule`, `linear_start`, `linear_end`, `cosine_s`, `given_betas` | noise schedule; `given_betas` replaces it |
    | `zero_terminal_snr` | rescale the schedule so that its last step holds no signal (x0 and v prediction only) |
    | `parameterization` | what the network predicts: "eps", "x0" or "v" |
    | `loss_type`, `l_simple_weight`, `original_elbo_weight`, `v_posterior` | "l1" or "l2", weights of the two terms, posterior variance mix |
    | `min_snr_gamma` | weight time steps by min-SNR-gamma; None: all alike |
    | `timestep_shift` | above 1: noisier time steps are drawn more often in training, where text decides about shapes |
    | `learn_logvar`, `logvar_init` | learned or constant log variance per time step |
    | `use_ema`, `ema_decay` | keep an exponential moving average of the network |
    | `ckpt_path`, `ignore_keys`, `load_only_unet` | weights to start from, key prefixes to skip |
    | `first_stage_key`, `image_size`, `channels` | batch key of the pictures; size and channels of what is diffused |
    | `conditioning_key` | see `DiffusionWrapper` |
    | `scheduler_config`, `weight_decay` | learning-rate schedule (a multiplier per step); AdamW's decay |
    | `monitor`, `log_every_t`, `clip_denoised` | metric for checkpoints; steps between logged states; clamp x0 in ancestral sampling |
    | `use_positional_encodings`, `ucg_training`, `make_it_fit`, `reset_ema`, `reset_num_ema_updates` | accepted for published configs; only off |

    `learning_rate` must be set before training (main.py does).
    """  # noqa: E501 (table rows)

    # Buffers of the schedule, (T,) each.
    alphas_cumprod: Tensor
    lvlb_weights: Tensor
    snr_weights: Tensor
    logvar: Tensor

    def __init__(
        self,
        unet_config: Any,
        timesteps: int = 1000,
        beta_schedule: str = "linear",
        loss_type: str = "l2",
        ckpt_path: str | Path | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        monitor: str | None = "val/loss",
        use_ema: bool = True,
        ema_decay: float = 0.9999,
        first_stage_key: str = "image",
        image_size: int | Sequence[int] = 256,
        channels: int = 3,
        log_every_t: int = 100,
        clip_denoised: bool = True,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        given_betas: Sequence[float] | None = None,
        zero_terminal_snr: bool = False,
        original_elbo_weight: float = 0.0,
        v_posterior: float = 0.0,
        l_simple_weight: float = 1.0,
        min_snr_gamma: float | None = None,
        timestep_shift: float = 1.0,
        conditioning_key: str | None = None,
        parameterization: str = "eps",
        scheduler_config: Any = None,
        weight_decay: float = 0.01,
        learn_logvar: bool = False,
        logvar_init: float = 0.0,
        use_positional_encodings: bool = False,
        ucg_training: Any = None,
        make_it_fit: bool = False,
        reset_ema: bool = False,
        reset_num_ema_updates: bool = False,
    ):
        super().__init__()
        require_off(
            use_positional_encodings=use_positional_encodings, ucg_training=ucg_training, make_it_fit=make_it_fit,
            reset_ema=reset_ema, reset_num_ema_updates=reset_num_ema_updates,
        )  # fmt: skip
        if parameterization not in schedule.PARAMETERIZATIONS:
            raise ValueError(f"parameterization '{parameterization}' is none of {schedule.PARAMETERIZATIONS}")
        if timestep_shift <= 0:
            raise ValueError(f"timestep_shift must be positive (1: uniform time steps), got {timestep_shift}")
        self.parameterization = parameterization
        self.timestep_shift = timestep_shift
        self.loss_type = loss_type
        self.monitor = monitor
        self.first_stage_key = first_stage_key
        self.image_size = image_size
        self.channels = channels
        self.log_every_t = log_every_t
        self.clip_denoised = clip_denoised
        self.original_elbo_weight = original_elbo_weight
        self.l_simple_weight = l_simple_weight
        self.min_snr_gamma = min_snr_gamma
        self.v_posterior = v_posterior
        self.scheduler_config = scheduler_config
        self.weight_decay = weight_decay
        self.learning_rate: float | None = None

        self.model = DiffusionWrapper(unet_config, conditioning_key)
        logger.info(
            "%s predicts %s with %d parameters", type(self).__name__, parameterization, count_params(self.model)
        )
        self.use_ema = use_ema
        if use_ema:
            self.model_ema = LitEma(self.model, decay=ema_decay)

        if given_betas is not None:
            betas = np.asarray(given_betas, dtype=np.float64)
        else:
            betas = schedule.make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        self.zero_terminal_snr = zero_terminal_snr
        if zero_terminal_snr:
            betas = schedule.rescale_zero_terminal_snr(betas)
        self._register_schedule(betas)
        self.learn_logvar = learn_logvar
        logvar = torch.full((self.num_timesteps,), float(logvar_init), device="cpu")
        if learn_logvar:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar, persistent=False)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, load_only_unet)

    def _register_schedule(self, betas: np.ndarray) -> None:
        """Register the schedule's arrays as buffers; real tensors even when the model is built on the meta device."""
        self.num_timesteps = len(betas)
        with torch.device("cpu"):
            buffers = schedule.diffusion_buffers(betas, self.parameterization, self.v_posterior)
            acp = buffers["alphas_cumprod"]
            if self.min_snr_gamma is not None:
                buffers["snr_weights"] = min_snr_weights(acp, self.min_snr_gamma, self.parameterization)
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=name not in ("lvlb_weights", "snr_weights"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move as any module, but keep the schedule in float32 when the weights become 16-bit ones."""
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def rescale_to_zero_terminal_snr(self) -> None:
        """Change the schedule so that its last step holds no signal; for models that predict v or x0."""
        device = self.alphas_cumprod.device
        betas = self.get_buffer("betas").cpu().double().numpy()
        self._register_schedule(schedule.rescale_zero_terminal_snr(betas))
        for name, buffer in self._buffers.items():
            self._buffers[name] = None if buffer is None else buffer.to(device)

    def init_from_ckpt(self, path: str | Path, ignore_keys: Sequence[str] = (), only_unet: bool = False) -> None:
        """Load weights from a checkpoint file; what was missing or left over is logged."""
        from ldm.checkpoint import load_weights

        load_weights(
            self.model if only_unet else self, path, ignore_keys=ignore_keys, prefix="model." if only_unet else ""
        )
        if self.zero_terminal_snr:  # files carry the schedule that they were trained with, which here is not to count
            self.rescale_to_zero_terminal_snr()

    # -- the model -----------------------------------------------------------------------------------------------

    @property
    def is_trained(self) -> bool:
        """Whether the network itself receives gradients (False while only a pseudo-word is learned)."""
        return any(p.requires_grad for p in self.model.parameters())

    @contextlib.contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Use the averaged weights inside the block; `context` names it in the log."""
        if not self.use_ema:
            yield
            return
        self.model_ema.store(self.model.parameters())
        self.model_ema.copy_to(self.model)
        if context:
            logger.debug("%s: averaged weights in use", context)
        try:
            yield
        finally:
            self.model_ema.restore(self.model.parameters())

    def apply_model(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        """Raw network output (B, C, h, w) for noisy `x` (B, C, h, w) at time steps `t` (B,)."""
        del cond  # a pixel-space DDPM is unconditional
        return self.model(x, t)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Diffuse `x_start` (B, C, h, w) to time steps `t` (B,): sqrt(acp_t) x_start + sqrt(1 - acp_t) noise."""
        noise = torch.randn_like(x_start) if noise is None else noise
        return schedule.q_sample(self, x_start, t, noise)  # type: ignore[arg-type]

    def training_target(self, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should output: noise, x_start or velocity, by `parameterization`."""
        if self.parameterization == "eps":
            return noise
        if self.parameterization == "x0":
            return x_start
        return schedule.get_v(self, x_start, noise, t)  # type: ignore[arg-type]

    def p_losses(
        self,
        x_start: Tensor,
        cond: Any,
        t: Tensor,
        noise: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Training loss at time steps `t` (B,) and its parts, keyed `train/...` or `val/...`.

        `mask` (B, 1, h, w) weights the positions of the latent.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        output = self.apply_model(self.q_sample(x_start, t, noise), t, cond)
        per_sample = per_sample_loss(output, self.training_target(x_start, noise, t), self.loss_type, mask)
        parts = combine_losses(
            per_sample,
            self.logvar[t],
            self.lvlb_weights[t],
            l_simple_weight=self.l_simple_weight,
            elbo_weight=self.original_elbo_weight,
            snr_weights_t=None if self.min_snr_gamma is None else self.snr_weights[t],
        )
        if not self.learn_logvar:
            del parts["loss_gamma"]
        prefix = "train" if self.training else "val"
        logs = {f"{prefix}/{name}": value.detach() for name, value in parts.items()}
        if self.learn_logvar:
            logs["logvar"] = self.logvar.detach().mean()
        return parts["loss"], logs

    # -- training ------------------------------------------------------------------------------------------------

    def draw(self, sampler: Any, shape: Sequence[int]) -> Tensor:
        """Draw a random tensor whose first dimension is the batch, the same whatever the number of processes.

        `sampler(shape)` draws; each process draws the rows of all and keeps its own, so that two processes with
        batches of B see what one process with a batch of 2 B sees.
        """
        trainer = self._trainer
        world = trainer.world_size if trainer is not None and self.training else 1
        rank = trainer.global_rank if world > 1 and trainer is not None else 0
        rows = shape[0]
        drawn: Tensor = sampler((rows * world, *shape[1:]))
        return drawn[rank * rows : (rank + 1) * rows]

    def draw_noise(self, like: Tensor) -> Tensor:
        """Standard normal noise of the shape of `like`, drawn on the CPU: a seed is the same noise on every device."""
        return self.draw(torch.randn, like.shape).to(like)

    def draw_timesteps(self, batch_size: int) -> Tensor:
        """Time steps, int64 (B,): uniform, in training shifted by `timestep_shift` s.

        A uniform u in [0, 1) becomes s u / (1 + (s - 1) u) (Esser et al. 2024, equation 23).
        """
        steps, shift = self.num_timesteps, self.timestep_shift if self.training else 1.0

        def sampler(shape: Sequence[int]) -> Tensor:
            if shift == 1:
                return torch.randint(steps, shape)
            u = torch.rand(shape)
            return (steps * shift * u / (1 + (shift - 1) * u)).long().clamp(max=steps - 1)

        return self.draw(sampler, (batch_size,)).to(self.device)

    def get_input(self, batch: Mapping[str, Any], key: str) -> Tensor:
        """Pictures of the batch as (B, C, H, W) float32, from (B, H, W, C) or (B, H, W)."""
        if key not in batch:
            raise ValueError(
                f"the batch has no '{key}'; it has {sorted(batch)}: set first_stage_key or the data's keys"
            )
        x = batch[key]
        if x.dim() == 3:
            x = x[..., None]
        return x.permute(0, 3, 1, 2).contiguous(memory_format=torch.contiguous_format).float()  # (B, C, H, W)

    def prepare_batch(self, batch: Mapping[str, Any]) -> tuple[Tensor, Any, Tensor | None]:
        """What `p_losses` takes: x_start (B, C, h, w), conditioning, position weights or None."""
        return self.get_input(batch, self.first_stage_key), None, None

    def shared_step(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and its parts for one batch, at random time steps."""
        x_start, cond, mask = self.prepare_batch(batch)
        t = self.draw_timesteps(len(x_start))
        return self.p_losses(x_start, cond, t, self.draw_noise(x_start), mask)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """One step of Lightning's loop."""
        del batch_idx
        loss, logs = self.shared_step(batch)
        self.log_dict(logs, prog_bar=True, logger=True, on_step=True, on_epoch=False)
        return loss

    @torch.no_grad()
    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Losses of the live weights and, under the suffix `_ema`, of the averaged ones, on the same draws."""
        del batch_idx
        x_start, cond, mask = self.prepare_batch(batch)
        t, noise = self.draw_timesteps(len(x_start)), self.draw_noise(x_start)
        logs = self.p_losses(x_start, cond, t, noise, mask)[1]
        averaged = logs
        if self.use_ema:
            with self.ema_scope():
                averaged = self.p_losses(x_start, cond, t, noise, mask)[1]
        # Without EMA the published metric name still exists, since published configs monitor it.
        logs = {**logs, **{f"{name}_ema": value for name, value in averaged.items()}}
        self.log_dict(logs, prog_bar=False, logger=True, on_step=False, on_epoch=True, batch_size=len(x_start))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then update the average: at the end of the batch a checkpoint would be saved before the update."""
        super().optimizer_step(*args, **kwargs)
        if self.use_ema and self.is_trained:
            self.model_ema(self.model)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters of the plain training objective."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if isinstance(self.logvar, nn.Parameter):
            parameters.append(self.logvar)
        return parameters

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups with their learning rates."""
        return [{"params": self.trainable_parameters(), "lr": self.learning_rate}]

    def configure_optimizers(self) -> Any:
        """AdamW over `parameter_groups`, with the schedule of `scheduler_config` applied to every step."""
        if self.learning_rate is None:
            raise ValueError("learning_rate is not set: main.py sets it from model.base_learning_rate")
        groups = self.parameter_groups()
        # The fused kernel halves the optimiser's memory traffic; a few vectors gain nothing from it. It undoes the
        # loss scale of float16 within its step, too late for clipping.
        fused = sum(p.numel() for g in groups for p in g["params"]) > FUSED_FROM and not self._clips_scaled_gradients
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, weight_decay=self.weight_decay, fused=fused)
        if self.scheduler_config is None:
            return optimizer
        multiplier = instantiate_from_config(self.scheduler_config)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=multiplier.schedule)
        return [optimizer], [{"scheduler": scheduler, "interval": "step", "frequency": 1}]

    @property
    def _clips_scaled_gradients(self) -> bool:
        trainer = self._trainer
        return trainer is not None and bool(trainer.gradient_clip_val) and trainer.precision == "16-mixed"

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the gradients; with fused optimisers in bfloat16 too, which has no loss scale in the way."""
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is None:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0, algorithm)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], N: int = 8, n_row: int = 2, sample: bool = True
    ) -> dict[str, Tensor]:
        """Inputs, their diffusion over time and samples (key -> (N, 3, H, W) in [-1, 1])."""
        from ldm.models.diffusion.visualize import log_pixel_images

        return log_pixel_images(self, batch, N, n_row, sample)
