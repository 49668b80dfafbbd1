"""What surrounds a training step: seeding, learning rates, the two stages of pivotal tuning, checks of an inversion."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.data.moments_cache import concepts_of
from ldm.data.seeding import derive_seed
from ldm.data.templates import per_img_token_list
from ldm.modules.encoders.text import split_at_placeholders

log = logging.getLogger(__name__)

TRAINING, VALIDATION = 1, 2


def seed_everywhere(*parts: int) -> None:
    """Seed `random`, numpy and torch (all devices) from a tuple of numbers."""
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class StepSeed(pl.Callback):
    """Seeds every training step from (seed, number of the batch in the run).

    What a step draws then depends on the step only, so that a run that was killed and resumed needs no saved random
    states to go on as if nothing had happened. All processes are seeded alike: a model draws for the whole batch of
    all processes and takes its own rows. Validation batch i is seeded from (seed, i): its losses can be compared.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.batches = 0  # of this part of the run

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed the step; `processed` counts the batches done in the whole run, also after a resume."""
        del pl_module, batch, batch_idx
        done = trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]
        seed_everywhere(self.seed, done, 0, TRAINING)
        self.batches += 1

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Seed the batch."""
        del trainer, pl_module, batch
        seed_everywhere(self.seed, batch_idx, dataloader_idx, VALIDATION)


class ConfiguredRate(pl.Callback):
    """Gives a resumed run the learning rates of its config, where they differ from those of the checkpoint.

    A checkpoint brings its optimiser's rates along, so that a rate given with `-r` would be announced and not used.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[list[float]] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the rates of the fresh optimisers, which are filled from the checkpoint next."""
        del pl_module
        self.rates = [[_initial_rate(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put them in, with the schedule's factor kept."""
        del pl_module
        for optimizer, rates in zip(trainer.optimizers, self.rates, strict=True):
            found = [_initial_rate(group) for group in optimizer.param_groups]
            if found == rates:
                continue
            log.info("Learning rate %s in the checkpoint, %s from now on", _join(found), _join(rates))
            for group, before, rate in zip(optimizer.param_groups, found, rates, strict=True):
                group["lr"] = group["lr"] * rate / before if before else rate
                if "initial_lr" in group:
                    group["initial_lr"] = rate
            for config in trainer.lr_scheduler_configs:
                if config.scheduler.optimizer is optimizer and hasattr(config.scheduler, "base_lrs"):
                    config.scheduler.base_lrs = list(rates)


def _initial_rate(group: dict[str, Any]) -> float:
    """Learning rate of an optimiser's group before any schedule."""
    return group.get("initial_lr", group["lr"])


def _join(rates: list[float]) -> str:
    return " and ".join(f"{rate:.3g}" for rate in rates)


class ModeSwapCallback(pl.Callback):
    """Pivotal tuning in two stages: first the pseudo-word's vectors alone, from `swap_step` on the model alone.

    The optimiser is one and the same; parameters of the other stage get no gradient, so they neither move nor gather
    moments. The stage follows from the step, hence a resumed run finds itself in the right one.
    """

    def __init__(self, swap_step: int = 2000) -> None:
        super().__init__()
        if swap_step < 0:
            raise ValueError(f"swap_step is {swap_step}; it must be at least 0")
        self.swap_step = swap_step
        self.model_stage: bool | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse models without both halves."""
        del trainer
        self.model_stage = None
        if getattr(pl_module, "embedding_manager", None) is None or not getattr(pl_module, "unfreeze_model", False):
            raise ValueError("ModeSwapCallback needs a model with a personalization_config and unfreeze_model: true")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Switch gradients when the step calls for it."""
        del batch, batch_idx
        model_stage = trainer.global_step >= self.swap_step
        if model_stage == self.model_stage:
            return
        self.model_stage = model_stage
        vectors = {id(p) for p in pl_module.embedding_manager.embedding_parameters()}  # type: ignore[union-attr,operator]
        for optimizer in trainer.optimizers:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                parameter.requires_grad_((id(parameter) in vectors) != model_stage)
                parameter.grad = None


class GradientGuard(pl.Callback):
    """Stops an inversion that does not learn: foreign gradients, no gradient, no movement, or vectors not finite.

    The full check belongs to the first step; finiteness is looked at again every `every_n_steps` steps.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        super().__init__()
        self.every_n_steps = every_n_steps
        self.initial: list[Tensor] | None = None
        self.first_step = 0
        self.checked = False
        self.untouched: dict[str, nn.Parameter] = {}  # by word, those that no gradient has reached so far

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the vectors."""
        self.first_step = trainer.global_step
        self.initial = [p.detach().clone() for p in trained_vectors(pl_module)]
        self.checked = False
        vectors: Any = pl_module.embedding_manager.string_to_param_dict  # type: ignore[union-attr]
        self.untouched = {word: vectors[word] for word in vectors if vectors[word].requires_grad}
        if not self.initial:
            raise ValueError("the embedding manager has no vectors to train: name at least one placeholder string")
        datasets = getattr(getattr(trainer, "datamodule", None), "datasets", {})
        known = {word.casefold() for word in pl_module.embedding_manager.placeholders}  # type: ignore[union-attr]
        for part in concepts_of(datasets.get("train")):
            word = part.placeholder_token
            if part.per_image_tokens:  # there are letters for more pictures than most concepts have
                for letter in per_img_token_list[part.num_images :]:
                    self.untouched.pop(letter, None)
            if word.casefold() not in known:
                raise ValueError(
                    f"the captions have the word '{word}', but the model learns {sorted(known)}; "
                    "the file of --embedding_manager_ckpt must hold the same words as --placeholder_string"
                )
            for caption in part.captions or ():
                if not any(piece.placeholder for piece in split_at_placeholders(caption, [word])):
                    raise ValueError(f"the caption '{caption}' has '{word}' only as a part of another word")

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Look at the gradients of the first step, and which words have had any."""
        del optimizer
        self.untouched = {w: p for w, p in self.untouched.items() if p.grad is None or not bool(p.grad.any())}
        if self.checked:
            return
        vectors = list(trained_vectors(pl_module))
        own = {id(p) for p in vectors}
        foreign = [n for n, p in pl_module.named_parameters() if p.grad is not None and id(p) not in own]
        if foreign:
            raise ValueError(f"{len(foreign)} frozen weights received gradients, the first is '{foreign[0]}'")
        if not any(p.grad is not None and bool((p.grad != 0).any()) for p in vectors):
            raise ValueError(
                "the vectors received no gradient in the first step: "
                "does the placeholder string of the model occur in the captions?"
            )
        # with 16-bit gradient scaling the first steps may overflow and be skipped
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if not scaled and not all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in vectors):
            raise ValueError("the gradients of the first step are not finite: are the base weights sound?")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the vectors after the first and every n-th step."""
        del outputs, batch, batch_idx
        step = trainer.global_step
        if self.checked and step % self.every_n_steps:
            return
        vectors = list(trained_vectors(pl_module))
        require_finite(vectors, step)
        if self.checked or step == self.first_step or self.initial is None:
            return  # looked at before, or gradients of the first step are still being accumulated
        rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        moved = any(not torch.equal(a, b) for a, b in zip(self.initial, vectors, strict=True))
        if moved:
            self.checked, self.initial = True, None
        elif any(rates) and not scaled:
            raise ValueError(f"the vectors did not move in the first step although the learning rate is {rates[0]:g}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Name the words that learned nothing."""
        del pl_module
        if self.untouched and trainer.global_step > self.first_step:
            log.warning(
                "%s got no gradient in %d steps: was it in no caption?",
                ", ".join(map(repr, self.untouched)), trainer.global_step - self.first_step,
            )  # fmt: skip


def trained_vectors(pl_module: pl.LightningModule) -> Iterator[nn.Parameter]:
    """The pseudo-word vectors that train."""
    manager: Any = pl_module.embedding_manager
    return (p for p in manager.embedding_parameters() if p.requires_grad)


def require_finite(parameters: Sequence[Tensor], step: int, what: str = "vectors") -> None:
    """Raise `ValueError` when a parameter holds a NaN or an infinity."""
    if not all(bool(torch.isfinite(p).all()) for p in parameters):
        raise ValueError(
            f"the {what} are not finite after step {step}: lower the learning rate, or raise the precision; "
            "the files of earlier steps are intact"
        )
