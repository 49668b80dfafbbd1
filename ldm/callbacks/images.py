"""Pictures of what the model does, during training."""

from __future__ import annotations

import contextlib
import inspect
import logging
import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

log = logging.getLogger(__name__)

GRID_COLUMNS = 4


class ImageLogger(pl.Callback):
    """Writes what `log_images` of the model returns, as grids: `<key>_gs-NNNNNN_e-NNNNNN_b-NNNNNN.jpg`.

    They lie in `images/{train,val}` of the run directory; the numbers are step, epoch and batch.

    | option | meaning |
    |---|---|
    | `batch_frequency` | steps between two logs |
    | `max_images` | pictures per grid |
    | `clamp`, `rescale` | clamp to [-1, 1]; map [-1, 1] to [0, 1] |
    | `increase_log_steps` | also at steps 1, 2, 4, ... below `batch_frequency` |
    | `log_first_step` | also before the first optimiser step |
    | `log_on_batch_idx` | count batches of the epoch instead of optimiser steps |
    | `enable_autocast` | sample in the precision of the training |
    | `log_images_kwargs` | parameters of the model's `log_images` |
    | `seed` | of the samples: the same noise each time, so that grids of different steps can be compared |
    | `disabled` | do nothing |

    Validation pictures are those of the first batch of a validation, at most one grid per `batch_frequency` steps.
    Logging happens in eval mode and leaves random states as they were.
    """

    def __init__(
        self,
        batch_frequency: int = 750,
        max_images: int = 4,
        clamp: bool = True,
        increase_log_steps: bool = True,
        rescale: bool = True,
        disabled: bool = False,
        log_on_batch_idx: bool = False,
        log_first_step: bool = False,
        log_images_kwargs: Mapping[str, Any] | None = None,
        enable_autocast: bool = True,
        seed: int = 23,
        save_dir: str | Path | None = None,  # default: `images` in the run directory
    ) -> None:
        super().__init__()
        if batch_frequency < 1 or max_images < 1:
            raise ValueError(f"batch_frequency {batch_frequency} and max_images {max_images} must be at least 1")
        self.batch_frequency = batch_frequency
        self.max_images = max_images
        self.clamp = clamp
        self.increase_log_steps = increase_log_steps
        self.rescale = rescale
        self.disabled = disabled
        self.log_on_batch_idx = log_on_batch_idx
        self.log_first_step = log_first_step
        self.log_images_kwargs = dict(log_images_kwargs or {})
        self.enable_autocast = enable_autocast
        self.seed = seed
        self.save_dir = Path(save_dir) if save_dir else None
        self.last_logged: dict[str, int] = {}
        self.seconds = 0.0
        self.started = 0.0

    @property
    def needs_decoder(self) -> bool:
        """Whether pictures will be drawn, so that the first stage's decoder must stay in memory."""
        return not self.disabled

    # -- when ----------------------------------------------------------------------------------------------------

    def is_due(self, count: int) -> bool:
        """Whether pictures belong to step (or batch) `count`."""
        if count == 0:
            return self.log_first_step
        power_of_two = count & (count - 1) == 0
        return count % self.batch_frequency == 0 or (
            self.increase_log_steps and power_of_two and count < self.batch_frequency
        )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out where to write; a model that cannot draw is left alone."""
        self.save_dir = self.save_dir or Path(trainer.default_root_dir) / "images"
        self.disabled = self.disabled or not callable(getattr(pl_module, "log_images", None))
        if not self.disabled:
            accepted = inspect.signature(pl_module.log_images).parameters  # type: ignore[arg-type]
            unknown = [k for k in self.log_images_kwargs if k not in accepted]
            if unknown:
                raise ValueError(
                    f"image_logger: '{unknown[0]}' is not a parameter of {type(pl_module).__name__}.log_images; "
                    f"it takes {', '.join(accepted)}"
                )
            if "N" in accepted:
                self.log_images_kwargs.setdefault("N", self.max_images)
            if "n_row" in accepted:
                self.log_images_kwargs.setdefault("n_row", accepted["n_row"].default)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock; a resumed run does not draw its last pictures again."""
        del pl_module
        self.started, self.seconds = time.perf_counter(), 0.0
        self.last_logged = {"train": trainer.global_step, "val": trainer.global_step} if trainer.global_step else {}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Draw before the first step when asked to."""
        if self.log_first_step and trainer.global_step == 0:
            self._log_if_due("train", trainer, pl_module, batch, batch_idx, 0)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw when a step is due."""
        del outputs
        count = batch_idx if self.log_on_batch_idx else trainer.global_step
        if trainer.global_step > 0:
            self._log_if_due("train", trainer, pl_module, batch, batch_idx, count)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the first batch, when `batch_frequency` steps have passed since the last time."""
        del outputs, dataloader_idx
        step = trainer.global_step
        passed = step // self.batch_frequency > self.last_logged.get("val", 0) // self.batch_frequency
        if batch_idx == 0 and not trainer.sanity_checking and (passed or self.is_due(step)):
            self._log("val", trainer, pl_module, batch, batch_idx)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report what the pictures cost."""
        del pl_module
        total = time.perf_counter() - self.started
        if self.seconds and trainer.is_global_zero:
            log.info("Pictures took %.1f s, %.0f %% of the training time", self.seconds, 100 * self.seconds / total)

    # -- how -----------------------------------------------------------------------------------------------------

    def _log_if_due(
        self, split: str, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, count: int
    ) -> None:
        # several accumulated batches share a step: the first one of them has drawn it
        fresh = self.log_on_batch_idx or self.last_logged.get(split) != trainer.global_step
        if fresh and self.is_due(count):
            self._log(split, trainer, pl_module, batch, batch_idx)

    def _log(self, split: str, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.last_logged[split] = trainer.global_step
        if self.disabled or not trainer.is_global_zero:
            return
        began = time.perf_counter()
        precision = trainer.precision_plugin.forward_context() if self.enable_autocast else contextlib.nullcontext()
        with undisturbed(pl_module, self.seed), torch.no_grad(), precision:
            some = first_items(batch, self.max_images)
            images = pl_module.log_images(some, **self.log_images_kwargs)  # type: ignore[operator]
        rows = min(self.log_images_kwargs.get("n_row", self.max_images), count_items(some))
        name = f"gs-{trainer.global_step:06}_e-{trainer.current_epoch:06}_b-{batch_idx:06}"
        assert self.save_dir is not None
        for key, value in images.items():
            grid = self.to_grid(key, value, rows)
            path = self.save_dir / split / f"{key}_{name}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(grid).save(path, quality=95)
            self._send(trainer, f"{split}/{key}", grid)
        self.seconds += time.perf_counter() - began

    def to_grid(self, key: str, images: Tensor, rows: int = 1) -> np.ndarray:
        """One picture (H, W, 3) uint8 of `max_images` pictures (N, C, h, w); `..._row` keys fill `rows` rows."""
        if images.dim() != 4:
            raise ValueError(f"log_images must return pictures (N, C, H, W), got {key} of shape {tuple(images.shape)}")
        columns = GRID_COLUMNS
        if key.endswith("_row"):
            columns = len(images) // rows if len(images) % rows == 0 else GRID_COLUMNS
        else:
            images = images[: self.max_images]
        images = images.detach().float().cpu()
        if self.clamp:
            images = images.clamp(-1.0, 1.0)
        if self.rescale:
            images = (images + 1.0) / 2.0
        grid = make_grid(images, nrow=columns)  # (3, H, W)
        return (grid.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()

    @staticmethod
    def _send(trainer: pl.Trainer, tag: str, grid: np.ndarray) -> None:
        from pytorch_lightning.loggers import TensorBoardLogger

        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(tag, grid, trainer.global_step, dataformats="HWC")


def first_items(batch: Any, count: int) -> Any:
    """The first `count` samples of a batch that is a dict of tensors and lists."""
    if not isinstance(batch, Mapping):
        return batch
    return {k: v[:count] if isinstance(v, Tensor | list | tuple) else v for k, v in batch.items()}


def count_items(batch: Any) -> int:
    """Number of samples in a batch."""
    values = batch.values() if isinstance(batch, Mapping) else [batch]
    return next((len(v) for v in values if isinstance(v, Tensor | list | tuple)), 1)


@contextlib.contextmanager
def undisturbed(module: torch.nn.Module, seed: int) -> Iterator[None]:
    """Eval mode and seeded random numbers inside the block; modes and random states as before after it."""
    modes = {part: part.training for part in module.modules()}
    states = random.getstate(), np.random.get_state()
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    devices = [device] if device.type == "cuda" else []
    module.eval()
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode
        random.setstate(states[0])
        np.random.set_state(states[1])
