"""Whether prompts with the learned word are still followed, measured while it is learned."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from evaluation import metrics
from evaluation.clip_eval import without_words
from evaluation.judges import Judge, load_judge
from ldm.callbacks.images import undisturbed
from ldm.callbacks.samples import MOST_WORDS
from ldm.callbacks.validation import FixedValidation, is_style, word_of
from ldm.data.moments_cache import concepts_of
from ldm.data.personalized import PersonalizedBase
from ldm.data.seeding import seeded
from ldm.generate import SamplingOptions, sample_images
from ldm.util import instantiate_from_config

log = logging.getLogger(__name__)

TEXT, IMAGE = "val/text_similarity", "val/image_similarity"
THING_EDITS = ("{} on the beach", "a red {}", "a silhouette of {}", "a doodle of {} at night")
STYLE_EDITS = ("a dog in the style of {}", "a car in the style of {}", "a rose in the style of {}")
MOST_PICTURES = 16  # of a concept, to compare with


class Alignment(pl.Callback):
    """Logs `val/text_similarity` and `val/image_similarity`, and stops when texts are no longer followed.

    The longer a word is trained, the more its pictures look like those it was learned from, and the less the rest of
    a prompt counts. This draws a few pictures of edits and of the plain word now and then, and asks a judge: how like
    is the mean of the edits' pictures to their text without the word, and how like are the plain word's pictures to
    the training pictures (mean cosines)? What the initial word reaches is measured before the first step.

    | option | meaning |
    |---|---|
    | `judge`, `weights` | see `evaluation.judges.load_judge`; or the config of a judge as `{target, params}` |
    | `every_n_train_steps` | optimiser steps between two measurements; there is one at the start and one at the end |
    | `prompts` | the edits; `{}` stands for the word; default: four for things, three for styles |
    | `max_drop` | stop when the text similarity has lost this share of the initial word's; null: never |
    | `count`, `seed` | pictures per prompt; picture k has noise `seed + k`, each time |
    | `sampler`, `steps`, `scale` | how to sample |

    Where `fixed_validation` has one of the two metrics as its `monitor` (with `mode: max`), it keeps the vectors that
    are best by it, among those that have not lost too much. Random states stay as they were.
    """

    needs_decoder = True  # the first stage must stay in memory
    measures = (TEXT, IMAGE)
    shown_as = "similarities"  # in the report's list of costs

    def __init__(
        self,
        judge: str | Mapping[str, Any] = "emoji64",
        weights: str | Path | None = None,
        every_n_train_steps: int = 100,
        prompts: Sequence[str] | None = None,
        max_drop: float | None = 0.1,
        count: int = 4,
        seed: int = 23,
        sampler: str = "dpm",
        steps: int = 15,
        scale: float = 3.0,
    ) -> None:
        super().__init__()
        if min(every_n_train_steps, count) < 1:
            raise ValueError(f"every_n_train_steps {every_n_train_steps} and count {count} must be at least 1")
        if max_drop is not None and not 0 <= max_drop <= 1:
            raise ValueError(f"max_drop is a share between 0 and 1, got {max_drop}")
        for prompt in prompts or ():
            if "{}" not in prompt:
                raise ValueError(f"the prompt '{prompt}' of alignment has no {{}}, which stands for the word")
        self.judge_config = judge
        self.weights = weights
        self.every_n_train_steps = every_n_train_steps
        self.prompts = list(prompts) if prompts else None
        self.max_drop = max_drop
        self.count = count
        self.seed = seed
        self.options = SamplingOptions(sampler=sampler, steps=steps, scale=scale)
        self.initial: float | None = None  # text similarity of the initial word
        self.measured_step = -1
        self.seconds = 0.0
        self._judge: Judge | None = None
        self._concepts: list[tuple[PersonalizedBase, Tensor]] = []

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {"initial": self.initial, "measured_step": self.measured_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.initial, self.measured_step = state_dict["initial"], state_dict["measured_step"]

    # -- when ----------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Load the judge and see the training pictures; what is missing shows now."""
        if getattr(pl_module, "embedding_manager", None) is None:
            raise ValueError("alignment measures learned words, but this config has no personalization_config")
        self._concepts = self._see(trainer)
        if not self._concepts:
            raise ValueError("alignment needs the pictures of concepts (ldm.data.personalized) as training data")
        if trainer.is_global_zero:
            named = isinstance(self.judge_config, str)
            self._judge = (
                load_judge(str(self.judge_config), self.weights, pl_module.device)
                if named
                else instantiate_from_config(self.judge_config)
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the initial words of a new run."""
        self.seconds = 0.0
        if trainer.global_step == 0:
            self.measure(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure every n-th step."""
        del outputs, batch, batch_idx
        if trainer.global_step and trainer.global_step % self.every_n_train_steps == 0:
            self.measure(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the final words."""
        self.measure(trainer, pl_module)

    # -- how -----------------------------------------------------------------------------------------------------

    def measure(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Measure, log and judge the present words, unless this step's are known."""
        step = trainer.global_step
        if step == self.measured_step:
            return
        self.measured_step = step
        began = time.perf_counter()
        values = (0.0, 0.0)
        if trainer.is_global_zero:
            with undisturbed(pl_module, self.seed), torch.no_grad(), trainer.precision_plugin.forward_context():
                each = [self._similarities(pl_module, part, training) for part, training in self._concepts]
            values = (sum(text for text, _ in each) / len(each), sum(image for _, image in each) / len(each))
        if trainer.world_size > 1:
            values = trainer.strategy.broadcast(values)  # all processes must choose and stop alike
        text, image = values
        found = {TEXT: text, IMAGE: image}
        for logger in trainer.loggers:
            logger.log_metrics(found, step=step)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in found.items()})
        self.seconds += time.perf_counter() - began
        self.initial = text if self.initial is None else self.initial
        if self._has_dropped(text):
            self._stop(trainer, text)
            return
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, FixedValidation) and other.monitor in found and not other.disabled:
                other.consider(trainer, pl_module, found[other.monitor])

    def _has_dropped(self, text: float) -> bool:
        assert self.initial is not None
        return self.max_drop is not None and text < self.initial - self.max_drop * abs(self.initial)

    def _stop(self, trainer: pl.Trainer, text: float) -> None:
        if not trainer.should_stop and trainer.global_step:
            trainer.should_stop = True
            log.info(
                "Stopping after step %d: edits follow their text by %.3f, the initial word's by %.3f",
                trainer.global_step, text, self.initial,
            )  # fmt: skip

    def _similarities(self, model: Any, dataset: PersonalizedBase, training: Tensor) -> tuple[float, float]:
        """Text and image similarity of one word."""
        assert self._judge is not None
        word, style = word_of(dataset), is_style(dataset)
        edits = [prompt.replace("{}", word) for prompt in self.prompts or (STYLE_EDITS if style else THING_EDITS)]
        plain = f"a picture in the style of {word}" if style else f"a photo of {word}"
        features = [self._judge.encode_image(self._draw(model, prompt)) for prompt in (plain, *edits)]
        texts = [without_words(prompt, [dataset.placeholder_token]) for prompt in edits]
        followed = [
            float(metrics.text_similarity(drawn, self._judge.encode_text([text])))
            for drawn, text in zip(features[1:], texts, strict=True)
        ]
        likeness = metrics.image_similarity(features[0], self._judge.encode_image(training))
        return sum(followed) / len(followed), float(likeness)

    def _draw(self, model: Any, prompt: str) -> Tensor:
        """Pictures (count, 3, H, W) in [-1, 1]."""
        drawn = sample_images(model, [prompt] * self.count, seeds=self.seed, options=self.options)  # (N, H, W, 3) uint8
        return torch.from_numpy(drawn).permute(0, 3, 1, 2).to(model.device).float() / 127.5 - 1

    @staticmethod
    def _see(trainer: pl.Trainer) -> list[tuple[PersonalizedBase, Tensor]]:
        """The first concepts with some of their pictures (M, 3, H, W) as training shows them."""
        found = []
        for part in concepts_of(getattr(getattr(trainer, "datamodule", None), "datasets", {}).get("train"))[
            :MOST_WORDS
        ]:
            with seeded(0):
                pictures = [part[i]["image"] for i in range(min(part.num_images, MOST_PICTURES))]
            found.append((part, torch.stack([torch.as_tensor(picture) for picture in pictures]).permute(0, 3, 1, 2)))
        return found
