"""Pictures of the word by step, always from the same noise: what it has learned so far."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from PIL import Image

from ldm.callbacks.images import undisturbed
from ldm.callbacks.validation import is_style, word_of
from ldm.checkpoint import atomic_path
from ldm.data.moments_cache import concepts_of
from ldm.generate import SamplingOptions, make_grid, sample_images

log = logging.getLogger(__name__)

MOST_WORDS = 4  # of many concepts the first so many are drawn


class SampleGrids(pl.Callback):
    """Writes `images/samples/{raw,guided}_gs-NNNNNN.jpg`: pictures of the learned word without and with guidance.

    | option | meaning |
    |---|---|
    | `every_n_train_steps` | optimiser steps between two grids; there is one before the first step and one at the end |
    | `prompts` | `{}` stands for the word; default: "a photo of {}", or "a painting in the style of {}" |
    | `count`, `seed` | pictures per prompt; picture k has noise `seed + k`, at every step |
    | `sampler`, `steps`, `scale` | how to sample; `scale` is that of the guided grid |
    | `max_share` | grids between the first and the last are left out where they would take more of the time |
    | `disabled` | do nothing |

    Drawing leaves random states as they were.
    """

    def __init__(
        self,
        run_dir: str | Path,
        every_n_train_steps: int = 500,
        prompts: Sequence[str] | None = None,
        count: int = 4,
        seed: int = 23,
        sampler: str = "dpm",
        steps: int = 15,
        scale: float = 5.0,
        max_share: float = 0.15,
        disabled: bool = False,
    ) -> None:
        super().__init__()
        if min(every_n_train_steps, count) < 1:
            raise ValueError(f"every_n_train_steps {every_n_train_steps} and count {count} must be at least 1")
        for prompt in prompts or ():
            if "{}" not in prompt:
                raise ValueError(f"the prompt '{prompt}' of sample_grids has no {{}}, which stands for the word")
        self.folder = Path(run_dir) / "images" / "samples"
        self.every_n_train_steps = every_n_train_steps
        self.prompts = list(prompts) if prompts else None
        self.count = count
        self.seed = seed
        self.options = {
            "raw": SamplingOptions(sampler=sampler, steps=steps, scale=1.0),
            "guided": SamplingOptions(sampler=sampler, steps=steps, scale=scale),
        }
        self.max_share = max_share
        self.disabled = disabled
        self.drawn_step = -1
        self.seconds = self.last_seconds = self.started = 0.0

    @property
    def needs_decoder(self) -> bool:
        """Whether pictures will be drawn, so that the first stage's decoder must stay in memory."""
        return not self.disabled

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock; draw the initial words."""
        self.started, self.seconds, self.last_seconds = time.perf_counter(), 0.0, 0.0
        if trainer.global_step == 0:
            self.draw(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw every n-th step, if that does not take too much of the time."""
        del outputs, batch, batch_idx
        step = trainer.global_step
        if step == 0 or step % self.every_n_train_steps or step == self.drawn_step:
            return
        elapsed = time.perf_counter() - self.started
        if self.seconds + self.last_seconds <= self.max_share * elapsed:
            self.draw(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the final words."""
        self.draw(trainer, pl_module)

    def draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write both grids now, one row for each prompt."""
        step = trainer.global_step
        if self.disabled or not trainer.is_global_zero or step == self.drawn_step:
            return
        self.drawn_step = step
        began = time.perf_counter()
        filled = prompts_for_words(trainer, pl_module, self.prompts)
        prompts = [prompt for prompt in filled for _ in range(self.count)]
        seeds = [self.seed + k for k in range(self.count)] * (len(prompts) // self.count)
        for kind, options in self.options.items():
            with undisturbed(pl_module, self.seed), trainer.precision_plugin.forward_context():
                pictures = sample_images(pl_module, prompts, seeds=seeds, options=options)  # (N, H, W, 3)
            with atomic_path(self.folder / f"{kind}_gs-{step:06}.jpg") as temporary:
                Image.fromarray(make_grid(pictures, self.count)).save(temporary, format="JPEG", quality=92)
        self.last_seconds = time.perf_counter() - began
        self.seconds += self.last_seconds


def prompts_for_words(trainer: pl.Trainer, pl_module: Any, prompts: Sequence[str] | None = None) -> list[str]:
    """`prompts` with each word (of many the first) in the place of `{}`; default: one that suits a thing or a style."""
    datasets = getattr(getattr(trainer, "datamodule", None), "datasets", {})
    parts = concepts_of(datasets.get("train"))
    words = {word_of(part): is_style(part) for part in parts} or dict.fromkeys(
        pl_module.embedding_manager.placeholders, False
    )
    filled = []
    for word, style in list(words.items())[:MOST_WORDS]:
        default = "a painting in the style of {}" if style else "a photo of {}"
        filled += [prompt.replace("{}", word) for prompt in prompts or [default]]
    return filled
