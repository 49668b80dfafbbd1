"""A loss that can be compared between steps, the best vectors by it, and stopping when it no longer falls."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import default_collate

from ldm.callbacks.images import undisturbed
from ldm.callbacks.steps import require_finite, trained_vectors
from ldm.data.moments_cache import concepts_of
from ldm.data.personalized import PersonalizedBase, resolve_templates
from ldm.data.seeding import seeded

log = logging.getLogger(__name__)

METRIC = "val/loss_fixed"
BEST = "embeddings_best.pt"
MODES = ("min", "max")
# Sentences that no training template says.
HELD_OUT_OBJECT = (
    "a picture of {}",
    "a snapshot that shows {}",
    "{} seen from nearby",
    "an image with {} in the middle",
    "here is {}",
)
HELD_OUT_STYLE = (
    "an image in the style of {}",
    "a sketch in the style of {}",
    "a scene drawn in the style of {}",
    "artwork made in the style of {}",
)


class FixedValidation(pl.Callback):
    """Logs `val/loss_fixed`: the plain diffusion loss on the same pictures, noise, time steps and captions each time.

    The training loss jumps with the time step that a batch happens to draw, so it hardly shows whether a word gets
    better; here nothing changes but the vectors. Captions are sentences that training does not use, so that a word
    that only fits its training sentences shows. Random states stay as they were: a run with this callback ends with
    the same vectors as one without it, unless it is stopped early.

    | option | meaning |
    |---|---|
    | `dirpath` | where `embeddings_best.pt` goes; without it none is saved |
    | `every_n_train_steps` | optimiser steps between two evaluations; there is one before the first step, too |
    | `max_pictures`, `num_timesteps` | their product is the number of network evaluations, without gradients |
    | `batch_size` | of these evaluations |
    | `templates` | the sentences, as for the data set; default: five for things, four for styles |
    | `monitor`, `mode` | name of the logged metric by which vectors are best, and whether "min" or "max" is |
    | `patience` | stop after so many evaluations in a row without a new best; default: never |
    | `min_delta` | how much better a new best must be |
    | `seed`, `disabled` | of the noise; do nothing |

    Pictures are those of the validation set, else of the training set. Any other metric than `val/loss_fixed` is read
    after each validation of the trainer, or passed to `consider` by a callback with its name among its `measures`.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        every_n_train_steps: int = 100,
        max_pictures: int = 4,
        num_timesteps: int = 8,
        batch_size: int = 4,
        templates: str | Path | Sequence[str] | None = None,
        monitor: str = METRIC,
        mode: str = "min",
        patience: int | None = None,
        min_delta: float = 0.0,
        seed: int = 23,
        disabled: bool = False,
    ) -> None:
        super().__init__()
        counts = (every_n_train_steps, max_pictures, num_timesteps, batch_size, 1 if patience is None else patience)
        if min(counts) < 1:
            raise ValueError(
                "fixed_validation: every_n_train_steps, max_pictures, num_timesteps, batch_size and patience must be "
                f"at least 1, got {', '.join(map(str, counts))}"
            )
        if mode not in MODES:
            raise ValueError(f"mode '{mode}' is unknown; choose one of {', '.join(MODES)}")
        self.dirpath = Path(dirpath) if dirpath else None
        self.every_n_train_steps = every_n_train_steps
        self.max_pictures = max_pictures
        self.num_timesteps = num_timesteps
        self.batch_size = batch_size
        self.templates = None if templates is None else resolve_templates(templates, "object")[0]
        self.monitor = monitor
        self.mode = mode
        self.patience = patience
        self.min_delta = min_delta
        self.seed = seed
        self.disabled = disabled
        self.best: float | None = None
        self.best_step = 0
        self.waited = 0  # evaluations since the best one
        self.evaluated_step = -1
        self.seconds = 0.0
        self._batch: dict[str, Any] = {}
        self._latents: Tensor | None = None
        self._mask: Tensor | None = None
        self._sentences: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know to choose and stop as if it had not been interrupted."""
        names = ("best", "best_step", "waited", "evaluated_step")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        for name, value in state_dict.items():
            setattr(self, name, value)

    # -- when ----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the pictures, while the first stage is still there, and evaluate the start of a new run."""
        self.seconds = 0.0
        if not self.disabled:
            self._check_monitor(trainer)
        if self.patience is not None and self.waited >= self.patience:
            log.info("The run had stopped early; it goes on for at least %d more evaluations", self.patience)
            self.waited = 0
        chosen = None if self.disabled else self._choose(trainer, pl_module)
        if chosen is None:
            return
        with undisturbed(pl_module, self.seed), torch.no_grad():
            self._batch = self._to_device(chosen, pl_module.device)
            self._latents, _, self._mask = pl_module.prepare_batch(self._batch)  # type: ignore[operator]
        if trainer.global_step == 0:
            self._evaluate(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate every n-th step."""
        del outputs, batch, batch_idx
        if trainer.global_step and trainer.global_step % self.every_n_train_steps == 0:
            self._evaluate(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at another metric than the own one."""
        if self.disabled or trainer.sanity_checking or self.monitor in self._measured(trainer):
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted([METRIC, *trainer.callback_metrics]))
            raise ValueError(f"there is no metric '{self.monitor}' to choose the best vectors by; there are: {known}")
        self.consider(trainer, pl_module, float(trainer.callback_metrics[self.monitor]))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate the end of the run."""
        self._evaluate(trainer, pl_module)
        if self.best is not None and trainer.is_global_zero:
            log.info("Best %s %.5g, at step %d", self.monitor, self.best, self.best_step)

    def _measured(self, trainer: pl.Trainer) -> list[str]:
        """The metrics that callbacks measure: the own one, and others' that are passed to `consider`."""
        others: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        return [METRIC, *(name for callback in others for name in getattr(callback, "measures", ()))]

    def _check_monitor(self, trainer: pl.Trainer) -> None:
        known = self._measured(trainer)
        if self.monitor not in known and not trainer.enable_validation:
            raise ValueError(
                f"'{self.monitor}' is never measured, so no best vectors can be chosen by it: this run has no other "
                f"validation (limit_val_batches, validation data); monitor one of {', '.join(known)}"
            )

    # -- how -----------------------------------------------------------------------------------------------------

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = trainer.global_step
        if self.disabled or self._latents is None or step == self.evaluated_step:
            return
        self.evaluated_step = step
        began = time.perf_counter()
        with undisturbed(pl_module, self.seed), torch.no_grad(), trainer.precision_plugin.forward_context():
            value = self.loss(pl_module)
        if trainer.world_size > 1:
            value = trainer.strategy.broadcast(value)  # all processes must choose and stop alike
        for logger in trainer.loggers:
            logger.log_metrics({METRIC: value}, step=step)
        trainer.callback_metrics[METRIC] = torch.tensor(value)
        self.seconds += time.perf_counter() - began
        if self.monitor == METRIC:
            self.consider(trainer, pl_module, value)

    def loss(self, model: Any) -> float:
        """Mean loss of all pictures at all time steps; to be called with seeded random numbers."""
        assert self._latents is not None
        count = len(self._latents)
        latents, mask = self._latents, self._mask
        texts = self._batch.get(model.cond_stage_key)
        stride = model.num_timesteps / self.num_timesteps
        total = 0.0
        for number in range(self.num_timesteps):
            # the middle of each of the equal parts of the schedule
            t = torch.full((count,), int((number + 0.5) * stride), device=latents.device)
            noise = torch.randn(latents.shape).to(latents)  # drawn on the CPU: the same on every device
            for rows in (slice(i, min(i + self.batch_size, count)) for i in range(0, count, self.batch_size)):
                batch = {key: value[rows] for key, value in self._batch.items()}
                if isinstance(texts, list) and self._sentences:
                    words = zip(texts[rows], range(rows.start, rows.stop), strict=True)
                    batch[model.cond_stage_key] = [self._sentence(word, number + i) for word, i in words]
                cond = model.get_conditioning(batch)
                part = None if mask is None else mask[rows]
                logs = model.p_losses(latents[rows], cond, t[rows], noise[rows], part)[1]
                total += float(logs["val/loss_simple"]) * (rows.stop - rows.start)
        return total / (count * self.num_timesteps)

    def _sentence(self, word: str, number: int) -> str:
        return self._sentences[number % len(self._sentences)].format(word)

    def _choose(self, trainer: pl.Trainer, pl_module: Any) -> dict[str, Any] | None:
        """A batch of pictures; of known concepts its captions are the words alone, to be put into sentences."""
        datasets = getattr(getattr(trainer, "datamodule", None), "datasets", {})
        dataset: Any = datasets.get("validation", datasets.get("train"))
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            log.info("No %s: the data set has no numbered items", METRIC)
            return None
        parts = concepts_of(dataset)
        self._sentences = held_out(parts[0], self.templates) if parts else []
        count = min(max(self.max_pictures, len(parts)), sum(p.num_images for p in parts) if parts else len(dataset))
        items = []
        for number in range(count):
            part: Any = parts[number % len(parts)] if parts else dataset
            index = number // len(parts) if parts else number
            with seeded(self.seed, number):
                item = dict(part[index % len(part)])
            if parts:
                item[pl_module.cond_stage_key] = word_of(part)
            items.append(item)
        return default_collate(items)

    @staticmethod
    def _to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}

    # -- the best ------------------------------------------------------------------------------------------------

    def consider(self, trainer: pl.Trainer, pl_module: Any, value: float) -> None:
        """Save the present vectors if `value`, their `monitor`, is the best so far; stop if the best was long ago."""
        sign = 1 if self.mode == "min" else -1
        better = self.best is None or sign * value < sign * self.best - self.min_delta
        if better and math.isfinite(value):
            self.best, self.best_step, self.waited = value, trainer.global_step, 0
            if self.dirpath is not None and trainer.is_global_zero:
                require_finite(list(trained_vectors(pl_module)), trainer.global_step)
                info = {"step": trainer.global_step, "monitor": self.monitor, "value": value}
                pl_module.embedding_manager.save(self.dirpath / BEST, info)
            return
        self.waited += 1
        stop = self.patience is not None and self.waited >= self.patience
        if stop and not trainer.should_stop:
            trainer.should_stop = True
            log.info(
                "Stopping after step %d: %s was best at step %d", trainer.global_step, self.monitor, self.best_step
            )


def word_of(dataset: PersonalizedBase) -> str:
    """Return what stands for the concept of `dataset` in its captions: "*", or "dog *" with a coarse class."""
    coarse = dataset.coarse_class_text
    return f"{coarse} {dataset.placeholder_token}" if coarse else dataset.placeholder_token


def is_style(dataset: PersonalizedBase) -> bool:
    """Whether `dataset` teaches a style rather than a thing."""
    return "style of" in dataset.templates[0]


def held_out(dataset: PersonalizedBase, templates: Sequence[str] | None = None) -> list[str]:
    """Return sentences that do not occur in the training of `dataset`; given `templates` are taken as they are."""
    if templates is not None:
        return list(templates)
    sentences = HELD_OUT_STYLE if is_style(dataset) else HELD_OUT_OBJECT
    return [sentence for sentence in sentences if sentence not in dataset.templates] or list(sentences)
