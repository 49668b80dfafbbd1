"""The training shell that all first stages share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.ema import LitEma
from ldm.modules.losses import FirstStageLoss
from ldm.util import check_params, instantiate_from_config


def full_precision(x: Tensor) -> Tensor:
    """`x` in float32 where autocast may have rounded it; else unchanged, so that a model cast to half stays half."""
    return x.float() if torch.is_autocast_enabled(x.device.type) else x


def psnr(inputs: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean peak signal-to-noise ratio in dB of pictures (B, C, H, W) in [-1, 1]; reconstructions are clamped."""
    error = (inputs.float() - reconstructions.float().clamp(-1.0, 1.0)).square().mean(dim=(1, 2, 3))  # (B,)
    return (10.0 * torch.log10(4.0 / error.clamp_min(1e-10))).mean()


class FirstStage(pl.LightningModule):
    """Encoder, decoder, loss and optimisers.

    A subclass builds its layers between `super().__init__` and `finish`, and says in `train_outputs` and `loss_of`
    what it makes of a picture and what that costs.

    Optimisation is manual: the discriminator, where the loss has one, has its own optimiser. Only steps of the
    autoencoder count as `global_step`, so `max_steps`, checkpoints and `disc_start` mean the same with and without a
    discriminator. Lightning leaves accumulation and clipping to the module then: set `accumulate_grad_batches`,
    `gradient_clip_val` and `gradient_clip_algorithm` here instead of on the trainer.
    """

    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: str = "norm"

    quant_conv: nn.Module
    post_quant_conv: nn.Module
    colorize: Tensor

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        *,
        image_key: str,
        colorize_nlabels: int | None,
        monitor: str | None,
        scheduler_config: Mapping[str, Any] | None,
        use_ema: bool,
        batch_resize_range: Sequence[int] | None = None,
        lr_g_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.learning_rate = 4.5e-6
        self.image_key = image_key
        self.scheduler_config = scheduler_config
        self.use_ema = use_ema
        self.batch_resize_range = batch_resize_range
        self.lr_g_factor = lr_g_factor
        self.monitor = monitor
        if colorize_nlabels is not None:
            self.register_buffer("colorize", torch.randn(3, colorize_nlabels, 1, 1))
        check_params("ddconfig", Encoder, ddconfig)
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)

    def finish(self, lossconfig: Mapping[str, Any], ckpt_path: str | None, ignore_keys: Sequence[str]) -> None:
        """Add averages and loss, then load weights; to be called at the end of a subclass's constructor."""
        self.model_ema = LitEma(self) if self.use_ema else None  # before the loss, which needs no average
        self.loss = instantiate_from_config(lossconfig)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = ()) -> None:
        """Load weights from a file, but for keys that start with one of `ignore_keys`."""
        from ldm.checkpoint import load_weights

        load_weights(self, path, ignore_keys=ignore_keys)

    @property
    def last_layer(self) -> Tensor:
        """The weight at which the gradients of reconstruction and adversarial loss are balanced."""
        return self.decoder.conv_out.weight

    @property
    def discriminator(self) -> nn.Module | None:
        """The discriminator of the loss, if it has one."""
        return self.loss.discriminator if isinstance(self.loss, FirstStageLoss) else None

    @contextmanager
    def ema_scope(self) -> Iterator[None]:
        """Run a block with averaged weights; with the plain ones if there are no averages."""
        with nullcontext() if self.model_ema is None else self.model_ema.applied_to(self):
            yield

    def train_outputs(self, inputs: Tensor) -> tuple[Any, ...]:
        """Reconstructions (B, C, H, W) first, then what `loss_of` needs besides."""
        raise NotImplementedError

    def loss_of(
        self, inputs: Tensor, outputs: tuple[Any, ...], optimizer_idx: int, global_step: int, split: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and log values for the autoencoder (`optimizer_idx` 0) or the discriminator (1)."""
        raise NotImplementedError

    def draw_noise(self, like: Tensor) -> Tensor:
        """Standard normal noise like `like` (B, ...), the same whatever the number of processes in training.

        Each process draws the rows of all and keeps its own, so that two processes with batches of B see what one
        process with a batch of 2 B sees. It is drawn on the CPU: a seed means the same noise on every device.
        """
        trainer = self._trainer
        world = trainer.world_size if trainer is not None and self.training else 1
        rank = trainer.global_rank if world > 1 and trainer is not None else 0
        noise = torch.randn((world, *like.shape))
        return noise[rank].to(like)

    def random_pictures(self, inputs: Tensor) -> dict[str, Tensor]:
        """Pictures to log besides reconstructions."""
        del inputs
        return {}

    def get_input(self, batch: Mapping[str, Tensor], key: str) -> Tensor:
        """Pictures (B, C, H, W) of a batch that holds them as (B, H, W, C) or (B, H, W)."""
        if key not in batch:
            raise ValueError(f"the batch has no '{key}', only {', '.join(batch)}; set image_key to one of these")
        x = batch[key]
        if x.ndim == 3:
            x = x[..., None]  # (B, H, W, 1)
        # Left in the memory order of the batch, which is the channels-last order that convolutions like.
        x = x.permute(0, 3, 1, 2).float()  # (B, C, H, W)
        return self._resize(x) if self.batch_resize_range is not None and self.training else x

    def _resize(self, x: Tensor) -> Tensor:
        assert self.batch_resize_range is not None
        low, high = self.batch_resize_range
        size = high  # the first steps use the largest, so that a lack of memory shows at once
        if self.global_step > 4:
            sizes = range(low, high + 1, 16)
            size = sizes[int(torch.randint(len(sizes), ()))]
        return x if size == x.shape[2] else F.interpolate(x, size=size, mode="bicubic")  # (B, C, size, size)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """One step of the autoencoder and, once it takes part, one of the discriminator.

        Both see the same reconstructions, which saves the second forward pass of the published training.
        """
        loss_module = self.loss
        if not isinstance(loss_module, FirstStageLoss):
            raise ValueError(f"the loss is {type(loss_module).__name__}, which trains nothing; set lossconfig.target")
        step = self.global_step
        last = (batch_idx + 1) % self.accumulate_grad_batches == 0 or self.trainer.is_last_batch
        inputs = self.get_input(batch, self.image_key)  # (B, C, H, W)
        outputs = self.train_outputs(inputs)
        if self.discriminator is not None:
            self.discriminator.requires_grad_(False)  # keeps the autoencoder's loss out of its gradients
        loss, log = self.loss_of(inputs, outputs, 0, step, "train")
        self.manual_backward(loss / self.accumulate_grad_batches)
        if last:
            self._step_optimizer(0)
        self.log("aeloss", loss.detach(), prog_bar=True, logger=True, on_step=True)
        self.log_dict(log, logger=True, on_step=True, on_epoch=False)
        if self.discriminator is not None:
            self.discriminator.requires_grad_(True)
        if loss_module.disc_factor_at(step) > 0:
            outputs = (outputs[0].detach(), *outputs[1:])
            disc_loss, log = self.loss_of(inputs, outputs, 1, step, "train")
            self.manual_backward(disc_loss / self.accumulate_grad_batches)
            if last:
                self._step_optimizer(1)
            self.log("discloss", disc_loss.detach(), prog_bar=True, logger=True, on_step=True)
            self.log_dict(log, logger=True, on_step=True, on_epoch=False)

    def _step_optimizer(self, index: int) -> None:
        optimizers = self.optimizers()
        optimizer = optimizers[index] if isinstance(optimizers, list) else optimizers
        if index == 0:
            optimizer.step()
            if self.model_ema is not None:
                self.model_ema(self)
        else:  # past Lightning's wrapper, which would count it as a global step
            self.trainer.strategy.optimizer_step(optimizer.optimizer, lambda: None)
        optimizer.zero_grad()
        schedulers: Any = self.lr_schedulers() or []
        schedulers = schedulers if isinstance(schedulers, list) else [schedulers]
        for scheduler in schedulers[index : index + 1]:
            scheduler.step()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip gradients; at this point they are free of any loss scale."""
        if self.gradient_clip_val:
            self.clip_gradients(optimizer, self.gradient_clip_val, self.gradient_clip_algorithm)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Log losses and PSNR under `val/`, and under `val_ema/` those of the averaged weights."""
        del batch_idx
        inputs = self.get_input(batch, self.image_key)  # (B, C, H, W)
        self._validate(inputs, "val")
        if self.model_ema is not None:
            with self.ema_scope():
                self._validate(inputs, "val_ema")

    def _validate(self, inputs: Tensor, split: str) -> None:
        outputs = self.train_outputs(inputs)
        log = {f"{split}/psnr": psnr(inputs, outputs[0])}
        if isinstance(self.loss, FirstStageLoss):
            log |= self.loss_of(inputs, outputs, 0, self.global_step, split)[1]
            if self.loss.disc_factor_at(self.global_step) > 0:
                log |= self.loss_of(inputs, outputs, 1, self.global_step, split)[1]
        self.log_dict(log, on_step=False, on_epoch=True, sync_dist=True, batch_size=inputs.shape[0])

    def configure_optimizers(self) -> Any:
        """Adam for the autoencoder, and a second one for the discriminator if there is one."""
        own = [p for name, p in self.named_parameters() if not name.startswith("loss.discriminator.")]
        own = [p for p in own if p.requires_grad]
        optimizers = [torch.optim.Adam(own, lr=self.lr_g_factor * self.learning_rate, betas=(0.5, 0.9))]
        if self.discriminator is not None:
            judge = self.discriminator.parameters()
            optimizers.append(torch.optim.Adam(judge, lr=self.learning_rate, betas=(0.5, 0.9)))
        if self.scheduler_config is None:
            return optimizers
        schedule = instantiate_from_config(self.scheduler_config).schedule
        schedulers = [{"scheduler": LambdaLR(opt, lr_lambda=schedule), "interval": "step"} for opt in optimizers]
        return optimizers, schedulers

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Tensor], only_inputs: bool = False) -> dict[str, Tensor]:
        """Pictures (N, 3, H, W) to look at: inputs, reconstructions (also by averaged weights), random latents."""
        inputs = self.get_input(batch, self.image_key).to(self.device)  # (B, C, H, W)
        pictures = {"inputs": inputs}
        if not only_inputs:
            pictures["reconstructions"] = self.train_outputs(inputs)[0]
            pictures |= self.random_pictures(inputs)
            if self.model_ema is not None:
                with self.ema_scope():
                    pictures["reconstructions_ema"] = self.train_outputs(inputs)[0]
        return {name: self.to_rgb(value) for name, value in pictures.items()}

    def to_rgb(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 3, H, W): grey is repeated, label maps get random colours, stretched to [-1, 1]."""
        if x.shape[1] == 3:
            return x
        if x.shape[1] == 1:
            return x.expand(-1, 3, -1, -1)
        if not hasattr(self, "colorize"):
            raise ValueError(f"pictures with {x.shape[1]} channels need colorize_nlabels: {x.shape[1]} to be shown")
        x = F.conv2d(x, self.colorize.to(x))  # (B, 3, H, W)
        return 2.0 * (x - x.min()) / (x.max() - x.min()) - 1.0
