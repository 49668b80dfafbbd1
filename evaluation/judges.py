"""Encoders that judge pictures, by name: CLIP models, DINO models, and the scorer of the embedded picture world."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from evaluation.clip_eval_weights import find_weights, weights_name
from evaluation.dino import ARCHITECTURES
from ldm.util import did_you_mean

EMBEDDED = "emoji64"


class Judge(Protocol):
    """What scoring needs: pictures, and for most judges texts, as unit vectors of one space."""

    def encode_image(self, images: Tensor) -> Tensor:
        """Unit vectors (B, D) of pictures (B, 3, H, W) in [-1, 1]."""
        ...

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (B, D) of texts."""
        ...


def load_judge(
    name: str, weights: str | Path | None = None, device: torch.device | str = "cpu", antialias: bool = False
) -> Judge:
    """The judge called `name`: "emoji64", "dino-vits16" and the like, or a CLIP model such as "ViT-B/32".

    weights: local file or folder; without it the places where `evaluation.clip_eval_weights` looks.
    antialias: see `CLIPEvaluator`; the others always smooth.
    """
    if name == EMBEDDED:
        from evaluation.scorer import load_scorer

        return load_scorer(weights, device)
    if name in ARCHITECTURES:
        from evaluation.dino import DINOEncoder

        return DINOEncoder(name, weights, device)
    from evaluation.clip_eval import CLIPEvaluator

    _check_name(name)
    return CLIPEvaluator(device, name, weights, antialias=antialias)


def _check_name(name: str) -> None:
    if name == EMBEDDED or name in ARCHITECTURES:
        return
    from evaluation.clip_eval import architecture

    try:
        architecture(name)
    except ValueError as error:
        known = [EMBEDDED, *ARCHITECTURES, "ViT-B/32"]
        raise ValueError(f"no judge '{name}'{did_you_mean(name, known)}: {error}") from error


def judge_file(name: str, weights: str | Path | None = None) -> Path:
    """The file of a judge's weights; raises `FileNotFoundError` that names it when it is not there.

    Raises `ValueError` for a name that no judge has.
    """
    _check_name(name)
    if name == EMBEDDED:
        from evaluation.scorer import scorer_files

        _, file = scorer_files(weights)
        if not file.is_file():
            raise FileNotFoundError(f"there is no scorer at {file}; scripts/train_scorer.py makes one")
        return file
    return find_weights("dino" if name in ARCHITECTURES else "clip", weights_name(name), weights)


def is_blind_to_text(name: str) -> bool:
    """Whether the judge called `name` encodes pictures only."""
    return name in ARCHITECTURES
