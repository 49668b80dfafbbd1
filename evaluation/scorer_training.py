"""Training of the scorer: CLIP's loss on captions, the names of labels, and pairs of pictures of one object."""

from __future__ import annotations

import csv
import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
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


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """How to train.

    steps: optimiser steps in all; the learning rate falls to zero over the last `decay` of them.
    objects: objects per batch; each comes in two pictures.
    lr, weight_decay, warmup: of AdamW.
    label_weight, pair_weight: of the loss on label names and of the loss on pairs, beside 1 for CLIP's.
    word_dropout: share of caption words replaced by the unknown word, so that those of user prompts do no harm.
    clean: share of batches that are not disturbed.
    bf16: encode in bfloat16, twice as fast on processors that have it.
    """

    steps: int = 3000
    objects: int = 64
    lr: float = 1.5e-3
    weight_decay: float = 0.05
    warmup: int = 100
    decay: float = 0.4
    label_weight: float = 0.5
    pair_weight: float = 0.5
    word_dropout: float = 0.04
    clean: float = 0.15
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
    """Batches of two pictures of each of some objects; batch k depends on (seed, k) only."""

    def __init__(self, scorer: Scorer, pictures: Pictures, options: TrainOptions) -> None:
        self.scorer, self.pictures, self.options = scorer, pictures, options
        by_name: dict[str, list[int]] = {}
        for row, name in enumerate(pictures.names):
            by_name.setdefault(name, []).append(row)
        self.by_name = {name: rows for name, rows in by_name.items() if len(rows) > 1}
        self.names = list(self.by_name)
        self.tokens, self.keep = scorer.tokenize(pictures.captions)
        self.style_of = {style: i for i, style in enumerate(STYLES)}
        self.background_of = {code: i for i, code in enumerate(BACKGROUNDS)}

    def draw(self, step: int) -> dict[str, Any]:
        """Pictures (2 P, 3, S, S), captions as tokens, and labels; pictures i and P + i show the same object."""
        o = self.options
        rng = np.random.default_rng([o.seed, step])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        count = min(o.objects, len(self.names))
        names = [self.names[i] for i in rng.choice(len(self.names), count, replace=False)]
        pairs = np.array([rng.choice(self.by_name[name], 2, replace=False) for name in names])
        rows = pairs.T.reshape(-1)  # (2 P,)
        images = self.pictures.images(rows)
        if rng.random() >= o.clean:
            images = disturb(images, generator)
        keep = self.keep[rows]
        length = int(keep.sum(1).max())
        tokens = self.tokens[rows][:, :length].clone()
        tokens[torch.rand(tokens.shape, generator=generator) < o.word_dropout] = UNKNOWN
        p = self.pictures
        labels = [[i, self.style_of[p.styles[r]], self.background_of.get(p.backgrounds[r], -1)]
                  for i, r in zip([*range(count)] * 2, rows, strict=True)]  # fmt: skip
        prompts = self._prompts(names, rng)
        return {"images": images, "tokens": tokens, "keep": keep[:, :length], "labels": torch.tensor(labels),
                "prompts": self.scorer.tokenize(prompts), "counts": (count, len(STYLES), len(BACKGROUNDS))}  # fmt: skip

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


def losses(scorer: Scorer, batch: dict[str, Any], options: TrainOptions) -> dict[str, Tensor]:
    """The loss and its parts: `clip` (captions), `label` (names of object, style and background), `pair`."""
    from open_clip.loss import ClipLoss

    scale = scorer.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
    with torch.autocast(batch["images"].device.type, torch.bfloat16, enabled=options.bf16):  # cosines stay float32
        images = scorer.encode_image(batch["images"])  # (2 P, D)
        captions = scorer.encode_rows(batch["tokens"], batch["keep"])  # (2 P, D)
        prompts = scorer.encode_rows(*batch["prompts"])  # (P + styles + backgrounds, D)
    parts = {"clip": ClipLoss()(images, captions, scale)}
    kinds = zip(prompts.split(batch["counts"]), batch["labels"].unbind(1), strict=True)
    parts["label"] = sum((_cross_entropy(scale * images @ names.T, labels) for names, labels in kinds), torch.zeros(()))
    parts["pair"] = pair_loss(images)
    total = parts["clip"] + options.label_weight * parts["label"] + options.pair_weight * parts["pair"]
    return {"loss": total, **parts}


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
    """Warm-up, plateau, and a straight line to zero."""
    rising = (step + 1) / max(1, options.warmup)
    falling = (options.steps - step) / max(1.0, options.decay * options.steps)
    return options.lr * min(1.0, rising, falling)


def train(scorer: Scorer, pictures: Pictures, options: TrainOptions, folder: str | Path | None = None) -> list[float]:
    """Train up to step `options.steps`, going on from `folder`'s checkpoint if there is one; returns the losses.

    `folder` also gets `log.csv`.
    """
    folder = None if folder is None else Path(folder)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    decayed = [p for p in scorer.parameters() if p.ndim > 1]
    others = [p for p in scorer.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98))
    step, seconds = _resume(scorer, optimizer, folder)
    batches = Batches(scorer, pictures, options)
    scorer.train()
    history = []
    begun = saved = time.monotonic()
    while step < options.steps:
        batch = batches.draw(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        with sdpa_kernel(SDPBackend.MATH):  # captions are too short for fused attention: its backward is slower
            parts = losses(scorer, batch, options)
        optimizer.zero_grad(set_to_none=True)
        parts["loss"].backward()
        optimizer.step()
        step += 1
        history.append(parts["loss"].item())
        now = time.monotonic()
        if folder is not None and (step % LOG_EVERY == 0 or step == options.steps):
            _log(folder, step, seconds + now - begun, parts, scorer)
        if folder is not None and (now - saved > 60 * options.save_minutes or step == options.steps):
            save_safely({"model": scorer.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                         "seconds": seconds + now - begun}, folder / CHECKPOINT)  # fmt: skip
            saved = now
    scorer.eval()
    return history


def _resume(scorer: Scorer, optimizer: torch.optim.Optimizer, folder: Path | None) -> tuple[int, float]:
    """Load the checkpoint of `folder`, if any; its step and the seconds trained so far."""
    if folder is None or not (folder / CHECKPOINT).is_file():
        return 0, 0.0
    state = torch.load(folder / CHECKPOINT, weights_only=True)
    scorer.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    logger.info("going on from step %d", state["step"])
    return state["step"], state["seconds"]


def _log(folder: Path, step: int, seconds: float, parts: dict[str, Tensor], scorer: Scorer) -> None:
    row = {"step": step, "seconds": round(seconds, 1), **{k: round(v.item(), 4) for k, v in parts.items()},
           "scale": round(scorer.logit_scale.exp().item(), 2)}  # fmt: skip
    logger.info("%s", "  ".join(f"{k} {v}" for k, v in row.items()))
    path = folder / "log.csv"
    new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)
