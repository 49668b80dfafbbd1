"""Training of the scorer: CLIP's loss on captions, the names of labels, and pairs of pictures of one object."""

from __future__ import annotations

import csv
import dataclasses
import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from evaluation.scorer import (
    BACKGROUND_TEMPLATES,
    MAX_LOGIT_SCALE,
    OBJECT_TEMPLATES,
    STYLE_TEMPLATES,
    STYLES,
    UNKNOWN,
    Scorer,
    background_phrase,
)
from evaluation.scorer_data import BACKGROUNDS, Pictures, disturb
from ldm.checkpoint import save_safely
from ldm.data.emoji import (
    COLOURS,
    COUNTS,
    NEUTRAL_PHRASES,
    PATTERNS,
    PLACES,
    SCENES,
    SIZES,
    TINTS,
    article,
    plural,
)

logger = logging.getLogger(__name__)

CHECKPOINT = "last.pt"
LOG_EVERY = 20
SCENE_PHRASES = {scene: words for words, scene in SCENES.items()}
PAIR_TEMPERATURE = 0.1
KIND_WEIGHTS = (1.0, 2.0, 0.3, 0.5)  # object, style, background (learned at once), drawing
HARD_WORDS = re.compile(r"\b(two|three|small|left|right|top|bottom)\b")


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """How to train: first names of what is shown, on pictures of half the size; then everything.

    Backgrounds are learned at once and objects slowly, so the picture encoder starts with what teaches objects
    soonest: large objects on their own, linear classifiers instead of texts, many pictures for little computation.

    steps: optimiser steps in all; the learning rate falls to zero over the last `decay` of the caption steps.
    name_steps, name_batch: steps and batch of the first part; its first `easy_steps` show large single objects only.
    objects: objects per batch of the second part; each comes in two pictures.
    name_lr, lr, weight_decay, warmup: of AdamW, the learning rates of the two parts.
    label_weight, pair_weight, head_weight: of the losses on label names, pairs and classifiers, beside 1 for CLIP's.
    word_dropout: share of caption words replaced by the unknown word, so that those of user prompts do no harm.
    clean: share of batches that are not disturbed.
    bf16: encode in bfloat16, twice as fast on processors that have it.
    """

    steps: int = 6800
    name_steps: int = 1600
    easy_steps: int = 600
    name_batch: int = 192
    objects: int = 64
    name_lr: float = 3e-3
    lr: float = 1.5e-3
    weight_decay: float = 0.05
    warmup: int = 100
    decay: float = 0.5
    label_weight: float = 0.5
    pair_weight: float = 0.5
    head_weight: float = 0.5
    word_dropout: float = 0.04
    clean: float = 0.25
    bf16: bool = True
    seed: int = 0
    save_minutes: float = 3.0


def vocabulary(tokenizer: Any, names: Sequence[str]) -> Tensor:
    """Sorted ids of all word pieces in the world's captions of the objects `names` and in the scorer's prompts."""
    grammar = (*NEUTRAL_PHRASES, *COLOURS, *TINTS, *SCENES, *PATTERNS, *PLACES, *COUNTS.values(), *SIZES)
    templates = (*BACKGROUND_TEMPLATES, *STYLE_TEMPLATES)
    objects = {form for name in names for form in (name, plural(name))}
    texts = (*objects, *grammar, *STYLES.values(), *templates, "a an and to on background")
    used = {i for text in texts for i in tokenizer.encode(text.replace("{}", " "))}
    return torch.tensor(sorted(used - {tokenizer.unk_token_id}))


class Batches:
    """Batches of pictures; batch k depends on (seed, k) only."""

    def __init__(self, scorer: Scorer, pictures: Pictures, options: TrainOptions) -> None:
        self.scorer, self.pictures, self.options = scorer, pictures, options
        by_name: dict[str, list[int]] = {}
        for row, name in enumerate(pictures.names):
            by_name.setdefault(name, []).append(row)
        self.names = sorted(by_name)
        drawn = list(zip(pictures.names, pictures.styles, strict=True))
        drawings = sorted(set(drawn))
        self.pairable = {i: rows for i, name in enumerate(self.names) if len(rows := by_name[name]) > 1}
        self.tokens, self.keep = scorer.tokenize(pictures.captions)
        classes: tuple[list[Any], ...] = (self.names, list(STYLES), list(BACKGROUNDS), drawings)
        self.classes = tuple(len(c) for c in classes)
        index = [{name: i for i, name in enumerate(c)} for c in classes]
        shown: tuple[list[Any], ...] = (pictures.names, pictures.styles, pictures.backgrounds, drawn)
        columns = [[of.get(name, -1) for name in names] for of, names in zip(index, shown, strict=True)]
        self.labels = torch.tensor(columns).T  # (N, 4); -1: none of the classes
        captions = enumerate(zip(pictures.captions, pictures.others, strict=True))
        self.easy = np.array([i for i, (c, other) in captions if not other and not HARD_WORDS.search(c)])

    def draw(self, step: int) -> dict[str, Any]:
        """The batch of a step: `images`, `labels`, and from step `name_steps` on what the captions' losses need."""
        rng = np.random.default_rng([self.options.seed, step])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        if step < self.options.name_steps:
            return self._named(step < self.options.easy_steps, rng, generator)
        return self._captioned(rng, generator)

    def _named(self, easy: bool, rng: np.random.Generator, generator: torch.Generator) -> dict[str, Any]:
        """Pictures (B, 3, S / 2, S / 2) and their labels (B, 4)."""
        rows = rng.choice(self.easy if easy else len(self.pictures), self.options.name_batch)
        images = F.avg_pool2d(self.pictures.images(rows), 2)
        return {"images": self._disturbed(images, rng, generator, 0.5 if easy else 1.0), "labels": self.labels[rows]}

    def _captioned(self, rng: np.random.Generator, generator: torch.Generator) -> dict[str, Any]:
        """Pictures (2 P, 3, S, S), of which i and P + i show one object, captions, and prompts with their labels."""
        count = min(self.options.objects, len(self.pairable))
        objects = rng.choice(list(self.pairable), count, replace=False)
        rows = np.array([rng.choice(self.pairable[i], 2, replace=False) for i in objects]).T.reshape(-1)  # (2 P,)
        images = self._disturbed(self.pictures.images(rows), rng, generator)
        keep = self.keep[rows]
        length = int(keep.sum(1).max())
        tokens = self.tokens[rows][:, :length].clone()
        tokens[torch.rand(tokens.shape, generator=generator) < self.options.word_dropout] = UNKNOWN
        labels = self.labels[rows]
        prompt_labels = torch.cat([torch.arange(count).repeat(2)[:, None], labels[:, 1:3]], dim=1)
        prompts = self.scorer.tokenize(self._prompts([self.names[i] for i in objects], rng))
        return {"images": images, "labels": labels, "tokens": tokens, "keep": keep[:, :length], "prompts": prompts,
                "prompt_labels": prompt_labels, "counts": (count, *self.classes[1:3])}  # fmt: skip

    def _disturbed(
        self, images: Tensor, rng: np.random.Generator, generator: torch.Generator, strength: float = 1.0
    ) -> Tensor:
        return images if rng.random() < self.options.clean else disturb(images, generator, strength)

    def _prompts(self, names: Sequence[str], rng: np.random.Generator) -> list[str]:
        """One prompt per object, style and background, from templates drawn at random."""

        def fill(templates: Sequence[str], phrase: str) -> str:
            return templates[int(rng.integers(len(templates)))].format(phrase)

        kinds = [code.split(":") for code in BACKGROUNDS]
        grounds = [SCENE_PHRASES[which] if kind == "scene" else background_phrase(which) for kind, which in kinds]
        return [
            *(fill((*OBJECT_TEMPLATES, "{}"), article(name)) for name in names),
            *(fill(STYLE_TEMPLATES, phrase) for phrase in STYLES.values()),
            *(fill(BACKGROUND_TEMPLATES, phrase) for phrase in grounds),
        ]


def losses(scorer: Scorer, heads: nn.ModuleList, batch: dict[str, Any], options: TrainOptions) -> dict[str, Tensor]:
    """The loss and its parts.

    `heads` (linear classifiers of object, style, background and drawing) alone in the first part of the training;
    `clip` (captions), `label` (prompts of object, style and background) and `pair` too in the second.
    """
    with torch.autocast(batch["images"].device.type, torch.bfloat16, enabled=options.bf16):
        features = scorer.image_encoder.features(batch["images"])  # (B, C)
        logits = [head(features).float() for head in heads]  # (B, classes) of each kind
    classified = _named(logits, batch["labels"])
    if "tokens" not in batch:
        return {"loss": classified, "heads": classified}
    parts = {"heads": classified, **_language_losses(scorer, features, batch, options)}
    weights = {"heads": options.head_weight, "label": options.label_weight, "pair": options.pair_weight, "clip": 1.0}
    return {"loss": sum((weights[k] * v for k, v in parts.items()), torch.zeros(())), **parts}


def _language_losses(
    scorer: Scorer, features: Tensor, batch: dict[str, Any], options: TrainOptions
) -> dict[str, Tensor]:
    from open_clip.loss import ClipLoss

    scale = scorer.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
    with torch.autocast(features.device.type, torch.bfloat16, enabled=options.bf16):  # cosines stay float32
        images = F.normalize(scorer.image_encoder.embed(features).float(), dim=-1)  # (2 P, D)
        captions = scorer.encode_rows(batch["tokens"], batch["keep"])  # (2 P, D)
        prompts = scorer.encode_rows(*batch["prompts"])  # (P + styles + backgrounds, D)
    named = _named([scale * images @ names.T for names in prompts.split(batch["counts"])], batch["prompt_labels"])
    return {"clip": ClipLoss()(images, captions, scale), "label": named, "pair": pair_loss(images)}


def _named(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Loss of naming K kinds of things, the first K of `KIND_WEIGHTS`: logits (B, classes) of each, labels (B, K)."""
    of_kinds = [_cross_entropy(*of_kind) for of_kind in zip(logits, labels.unbind(1), strict=True)]
    return sum((weight * loss for weight, loss in zip(KIND_WEIGHTS, of_kinds, strict=False)), torch.zeros(()))


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the rows that have a label; zero if none has."""
    return F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / (labels >= 0).sum().clamp_min(1)


def pair_loss(images: Tensor) -> Tensor:
    """Each picture among all others must find the one of the same object: rows i and P + i of (2 P, D)."""
    count = len(images) // 2
    similar = (images @ images.T / PAIR_TEMPERATURE).fill_diagonal_(-torch.inf)  # (2 P, 2 P)
    partner = torch.arange(2 * count, device=images.device).roll(count)
    return F.cross_entropy(similar, partner)


def learning_rate(step: int, options: TrainOptions) -> float:
    """Warm-up and plateau for each part, then a straight line to zero."""
    begun, peak = (0, options.name_lr) if step < options.name_steps else (options.name_steps, options.lr)
    rising = (step + 1 - begun) / max(1, options.warmup)
    falling = (options.steps - step) / max(1.0, options.decay * (options.steps - options.name_steps))
    return peak * min(1.0, rising, falling)


class Run:
    """A training run: model, classifiers, optimiser and progress, saved in and resumed from `folder`."""

    def __init__(self, scorer: Scorer, classes: Sequence[int], options: TrainOptions, folder: Path | None) -> None:
        self.scorer, self.options, self.folder = scorer, options, folder
        width = scorer.image_encoder.project.in_features
        self.heads = nn.ModuleList(nn.Linear(width, count, bias=False) for count in classes)
        parameters = [*scorer.parameters(), *self.heads.parameters()]
        decayed = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": options.weight_decay}
        others = {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
        self.optimizer = torch.optim.AdamW([decayed, others], lr=options.lr, betas=(0.9, 0.98))
        self.step, self.seconds = 0, 0.0
        if folder is not None and (folder / CHECKPOINT).is_file():
            self._resume(folder / CHECKPOINT)

    def _parts(self) -> dict[str, Any]:
        return {"model": self.scorer, "heads": self.heads, "optimizer": self.optimizer}

    def _resume(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.step, self.seconds = state["step"], state["seconds"]
        logger.info("going on from step %d", self.step)

    def save(self) -> None:
        """Write the checkpoint."""
        if self.folder is not None:
            state = {name: part.state_dict() for name, part in self._parts().items()}
            save_safely({**state, "step": self.step, "seconds": self.seconds}, self.folder / CHECKPOINT)

    def advance(self, batch: dict[str, Any]) -> dict[str, float]:
        """One optimiser step; returns the losses."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.options)
        with sdpa_kernel(SDPBackend.MATH):  # captions are too short for fused attention: its backward is slower
            parts = losses(self.scorer, self.heads, batch, self.options)
        self.optimizer.zero_grad(set_to_none=True)
        parts["loss"].backward()
        self.optimizer.step()
        self.step += 1
        return {name: value.item() for name, value in parts.items()}

    def log(self, parts: dict[str, float]) -> None:
        """Add a line to `log.csv`."""
        row = {"step": self.step, "seconds": round(self.seconds, 1), **{k: round(v, 4) for k, v in parts.items()},
               "scale": round(self.scorer.logit_scale.exp().item(), 2)}  # fmt: skip
        logger.info("%s", "  ".join(f"{k} {v}" for k, v in row.items()))
        if self.folder is not None:
            path = self.folder / "log.csv"
            new = not path.is_file()
            with path.open("a", newline="", encoding="utf-8") as file:
                columns = ["step", "seconds", "loss", "heads", "clip", "label", "pair", "scale"]
                writer = csv.DictWriter(file, columns, restval="")
                if new:
                    writer.writeheader()
                writer.writerow(row)


def train(scorer: Scorer, pictures: Pictures, options: TrainOptions, folder: str | Path | None = None) -> list[float]:
    """Train up to step `options.steps`, going on from `folder`'s checkpoint if there is one; returns the losses.

    `folder` also gets `log.csv`. The checkpoint is written every `save_minutes` and at the end.
    """
    folder = None if folder is None else Path(folder)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    batches = Batches(scorer, pictures, options)
    run = Run(scorer, batches.classes, options, folder)
    scorer.train()
    history = []
    saved = time.monotonic()
    while run.step < options.steps:
        begun = time.monotonic()
        parts = run.advance(batches.draw(run.step))
        run.seconds += time.monotonic() - begun
        history.append(parts["loss"])
        done = run.step == options.steps
        if run.step % LOG_EVERY == 0 or done:
            run.log(parts)
        if done or time.monotonic() - saved > 60 * options.save_minutes:
            run.save()
            saved = time.monotonic()
    scorer.eval()
    return history
