"""How well the scorer judges real pictures of the embedded world, with bootstrap intervals."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluation.scorer import Scorer
from evaluation.scorer_data import Pictures, all_sprites, compose, disturb
from ldm.data.emoji import COLOURS, STYLE_PHRASES, Sprites, plural

CANDIDATES = 100
PLAIN = {"p_scene": 0.0, "p_pattern": 0.0, "p_gradient": 0.0, "p_two_kinds": 0.0}
ONE_KIND = {"p_two_kinds": 0.0}


@dataclasses.dataclass(frozen=True)
class Figure:
    """A mean and its 95 % bootstrap interval."""

    name: str
    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.name:<66} {self.mean:6.3f}  [{self.low:.3f}, {self.high:.3f}]  n={self.count}"


def figure(name: str, values: Sequence[float] | Tensor, groups: Sequence[str], resamples: int = 1000) -> Figure:
    """Mean of `values` with the interval of a bootstrap over `groups` (pictures of one object go together).

    Values that are not a number are left out.
    """
    array = np.asarray(values, dtype=float)
    there = ~np.isnan(array)
    array = array[there]
    keys, group_of = np.unique(np.asarray(groups)[there], return_inverse=True)
    sums, sizes = np.bincount(group_of, array), np.bincount(group_of)
    picked = np.random.default_rng(0).integers(len(keys), size=(resamples, len(keys)))
    means = sums[picked].sum(1) / sizes[picked].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Figure(name, float(array.mean()), float(low), float(high), len(array))


def swap_object(caption: str, name: str, other: str) -> str:
    """The caption with object `other` in the place of `name`, in the plural where `name` is."""
    several = re.compile(rf"\b(two|three)( \w+)? {re.escape(plural(name))}\b")
    if several.search(caption):
        return several.sub(lambda m: f"{m[1]}{m[2] or ''} {plural(other)}", caption, count=1)
    caption = re.sub(rf"\ban? (?={re.escape(name)}\b)", "an " if other[0].lower() in "aeio" else "a ", caption, count=1)
    head, _, tail = caption.partition(name)
    return f"{head}{other}{tail}"


@torch.no_grad()
def encode(scorer: Scorer, images: Tensor, size: int = 128) -> Tensor:
    """Vectors (N, D) of many pictures, some at a time."""
    return torch.cat([scorer.encode_image(part) for part in images.split(size)])


@torch.no_grad()
def caption_ranks(scorer: Scorer, pictures: Pictures, images: Tensor, names: Sequence[str]) -> Tensor:
    """Rank (N,) of each picture's caption among itself and 99 captions that tell of other objects of `names`."""
    vectors = encode(scorer, images)
    rng = np.random.default_rng(0)
    ranks = []
    for i, caption in enumerate(pictures.captions):
        shown = (pictures.names[i], pictures.others[i])
        others = [name for name in names if name not in shown]
        chosen = [others[k] for k in rng.choice(len(others), min(CANDIDATES - 1, len(others)), replace=False)]
        texts = [caption, *(swap_object(caption, shown[0], other) for other in chosen)]
        scores = scorer.encode_text(texts) @ vectors[i]  # (100,)
        ranks.append(1 + int((scores[1:] >= scores[0]).sum()))
    return torch.tensor(ranks)


def pair_similarities(vectors: Tensor, pictures: Pictures) -> tuple[list[float], list[float], list[float], list[float]]:
    """What pictures have in common with others: four numbers for each picture, nan where others are lacking.

    Mean cosine with pictures of its object in other styles on other backgrounds; with pictures of other objects;
    with those of other objects in its style or on its background; and how often the first are above the second.
    """
    names, styles, grounds = (np.asarray(x) for x in (pictures.names, pictures.styles, pictures.backgrounds))
    cosines = (vectors @ vectors.T).numpy()
    same: list[float] = []
    different: list[float] = []
    setting: list[float] = []
    above: list[float] = []
    for i in range(len(names)):
        own = names == names[i]
        partners = cosines[i][own & (styles != styles[i]) & (grounds != grounds[i])]
        rest = cosines[i][~own]
        alike = cosines[i][~own & ((styles == styles[i]) | (grounds == grounds[i]))]
        complete = partners.size and alike.size
        same.append(float(partners.mean()) if complete else math.nan)
        different.append(float(rest.mean()) if complete else math.nan)
        setting.append(float(alike.mean()) if complete else math.nan)
        above.append(float((partners[:, None] > rest).mean()) if complete else math.nan)
    return same, different, setting, above


def evaluate(scorer: Scorer, sprite_folder: str | Path, count: int = 500, seed: int = 10_000) -> list[Figure]:
    """The scorer's figures on `count` fresh pictures for each question, as they are and disturbed."""
    sprites = all_sprites(sprite_folder)
    held_out = sorted(set(Sprites.load(Path(sprite_folder) / "held_out.npy").names))
    known = all_sprites(sprite_folder, ["train.npy"])
    names = sorted(set(sprites.names))
    figures: list[Figure] = []
    for kind, change in (("", _as_they_are), (", disturbed", _disturbed)):
        figures += _object_figures(scorer, sprites, held_out, names, count, seed, kind, change)
        figures += _setting_figures(scorer, sprites, known, count, seed + 10, kind, change)
    return figures


def _as_they_are(images: Tensor) -> Tensor:
    return images


def _disturbed(images: Tensor) -> Tensor:
    return disturb(images, torch.Generator().manual_seed(0))


def _object_figures(
    scorer: Scorer, sprites: Sprites, held_out: list[str], names: list[str], count: int, seed: int, kind: str,
    change: Callable[[Tensor], Tensor],
) -> list[Figure]:  # fmt: skip
    """Captions, object names and pairs of pictures."""
    figures = []
    pictures = compose(sprites, count, seed, names=held_out)
    images = change(pictures.images(slice(None)))
    first = (caption_ranks(scorer, pictures, images, names) == 1).float()
    figures.append(figure(f"held-out objects: caption first among 100{kind}", first, pictures.names))
    rng = np.random.default_rng(seed)
    candidates = [*held_out, *rng.choice([n for n in names if n not in held_out], CANDIDATES - len(held_out), False)]
    pictures = compose(sprites, count, seed + 1, grammar=ONE_KIND, names=held_out)
    images = change(pictures.images(slice(None)))
    for listed in (candidates, names):
        first = (scorer.rank_objects(images, pictures.names, listed) == 1).float()
        figures.append(figure(f"held-out objects: name first among {len(listed)}{kind}", first, pictures.names))
    known = [name for name in names if name not in held_out]
    pictures = compose(sprites, count, seed + 2, grammar=ONE_KIND, names=known)
    images = change(pictures.images(slice(None)))
    first = (scorer.rank_objects(images, pictures.names, names) == 1).float()
    figures.append(figure(f"other objects: name first among {len(names)}{kind}", first, pictures.names))
    pictures = compose(sprites, 2 * count, seed + 3, grammar=ONE_KIND, names=held_out)
    vectors = encode(scorer, change(pictures.images(slice(None))))
    labels = ("cosine, same object, other style and background", "cosine, other objects",
              "cosine, other objects, same style or background", "share of pairs: same object above other")  # fmt: skip
    for label, values in zip(labels, pair_similarities(vectors, pictures), strict=True):
        figures.append(figure(f"held-out objects: {label}{kind}", values, pictures.names))
    return figures


def _setting_figures(
    scorer: Scorer, sprites: Sprites, known: Sprites, count: int, seed: int, kind: str,
    change: Callable[[Tensor], Tensor],
) -> list[Figure]:  # fmt: skip
    """Background colours and styles."""
    figures = []
    pictures = compose(sprites, count, seed, grammar=PLAIN)
    named = scorer.name_background(change(pictures.images(slice(None))))
    right = [float(f"plain:{colour}" == code) for colour, code in zip(named, pictures.backgrounds, strict=True)]
    figures.append(figure(f"background named among {len(COLOURS)} colours{kind}", right, pictures.names))
    for label, source, styles in (("8 styles", known, list(STYLE_PHRASES)), ("9 styles", sprites, None)):
        pictures = compose(source, count, seed + 1, grammar=ONE_KIND)
        listed = styles or sorted(set(source.styles))
        named = scorer.name_style(change(pictures.images(slice(None))), listed)
        right = [float(style == own) for style, own in zip(named, pictures.styles, strict=True)]
        figures.append(figure(f"style named among {label}{kind}", right, pictures.names))
    return figures
