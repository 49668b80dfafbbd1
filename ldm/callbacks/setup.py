"""The run directory at the start, time and memory at the end of each epoch."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import TQDMProgressBar

from ldm.data.contact_sheet import contact_sheet

log = logging.getLogger(__name__)

MIB = 2**20


class SetupCallback(pl.Callback):
    """Makes the run directory and saves the merged configs, from which `-r` builds the same run again.

    `started` (YYYY-MM-DDTHH-MM-SS) names the files `configs/<started>-{project,lightning}.yaml`.
    """

    def __init__(self, run_dir: str | Path, started: str, config: Any, lightning_config: Any) -> None:
        super().__init__()
        self.run_dir = Path(run_dir)
        self.started = started
        self.config = config
        self.lightning_config = lightning_config

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write directories and, of a new run, the configs; in the first process only."""
        del pl_module
        if stage != "fit" or not trainer.is_global_zero:
            return
        folder = self.run_dir / "configs"
        for path in (folder, self.run_dir / "checkpoints"):
            path.mkdir(parents=True, exist_ok=True)
        if not any(folder.glob("*.yaml")):
            self._write(folder)
        log.info("Run directory: %s", self.run_dir)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the configs of a run that goes on: once its checkpoint has shown that they fit."""
        del pl_module
        folder = self.run_dir / "configs"
        if trainer.is_global_zero and not (folder / f"{self.started}-project.yaml").exists():
            self._write(folder)

    def _write(self, folder: Path) -> None:
        lightning = OmegaConf.create({"lightning": self.lightning_config})
        for name, config in (("lightning", lightning), ("project", self.config)):  # without the last it is no run
            path = folder / f"{self.started}-{name}.yaml"
            unfinished = path.with_suffix(".tmp")  # a run killed here must still be resumable
            OmegaConf.save(config, unfinished)
            os.replace(unfinished, path)


class ContactSheet(pl.Callback):
    """Writes `images/contact_sheet.png`: the training pictures as the model sees them, with their captions."""

    def __init__(self, run_dir: str | Path, count: int = 16) -> None:
        super().__init__()
        self.path = Path(run_dir) / "images" / "contact_sheet.png"
        self.count = count

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write it once, at the start of the run."""
        del pl_module
        datasets = getattr(getattr(trainer, "datamodule", None), "datasets", {})
        if trainer.global_step or not trainer.is_global_zero or "train" not in datasets:
            return
        dataset = datasets["train"]
        if not hasattr(dataset, "__getitem__") or "image" not in dataset[0]:
            return
        path = contact_sheet(dataset, self.path, count=self.count)
        log.info("Training pictures: %s", path)


class CUDACallback(pl.Callback):
    """Reports time and peak memory of each epoch: device memory on a GPU, resident memory elsewhere.

    Every epoch goes to the logger; a line on the screen follows no sooner than `every_n_seconds` after the last one.
    (The name is the published one.)
    """

    def __init__(self, every_n_seconds: float = 30.0) -> None:
        super().__init__()
        self.every_n_seconds = every_n_seconds
        self.reported = -math.inf
        self.started = 0.0
        self.steps = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock: a run that goes on within an epoch does not start it again."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        device = pl_module.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            torch.cuda.synchronize(device)
        self.started = time.perf_counter()
        self.steps = trainer.global_step

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log seconds, steps per second and peak memory, and write them to the logger."""
        device = pl_module.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            kind, peak = "GPU", torch.cuda.max_memory_allocated(device)
        else:
            kind, peak = "resident", peak_resident_memory()
        seconds = time.perf_counter() - self.started
        steps = trainer.global_step - self.steps
        if not trainer.is_global_zero:
            return
        if time.perf_counter() - self.reported >= self.every_n_seconds:
            self.reported = time.perf_counter()
            log.info(
                "Epoch %d: %.1f s, %.2f steps/s, peak %s memory %.0f MiB",
                trainer.current_epoch, seconds, steps / max(seconds, 1e-9), kind, peak / MIB,
            )  # fmt: skip
        for logger in trainer.loggers:
            logger.log_metrics({"epoch_seconds": seconds, "peak_memory_mib": peak / MIB}, step=trainer.global_step)


class ProgressBar(TQDMProgressBar):
    """Lightning's progress bar without its version number, and with few lines where the output is a file."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=1 if sys.stderr.isatty() else 50)
        self._resumed_at = 0

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Open the bar, where a run goes on within an epoch at the batch it goes on with."""
        super().on_train_start(trainer, *args)
        self._resumed_at = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        self._count_from_here(trainer)  # such a run may see no start of an epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Begin the bar anew."""
        super().on_train_epoch_start(trainer, *args)
        self._count_from_here(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish the bar; later epochs begin at their first batch."""
        super().on_train_epoch_end(trainer, pl_module)
        self._resumed_at = 0

    def _count_from_here(self, trainer: pl.Trainer) -> None:
        """Set the bar to the batches done and to do in this epoch; its rate counts those of this process only."""
        total = float(trainer.num_training_batches)
        done = self._resumed_at if self._resumed_at < total else 0
        if trainer.max_steps >= 0:
            module = trainer.lightning_module
            accumulating = trainer if module.automatic_optimization else module  # whoever steps the optimisers
            left = trainer.max_steps - trainer.global_step
            total = min(total, done + left * getattr(accumulating, "accumulate_grad_batches", 1))
        self.train_progress_bar.reset(int(total) if math.isfinite(total) else None)
        self.train_progress_bar.initial = self.train_progress_bar.n = done

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Return the logged values to show."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


def peak_resident_memory() -> int:
    """Largest resident size of this process so far, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
