"""How well the embedded model draws what captions say, as its scorer and its own loss tell."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.scorer import Scorer, background_phrase
from evaluation.scorer_data import Pictures, compose
from evaluation.scorer_figures import CANDIDATES, Figure, figure, swap_object
from ldm.data.emoji import COLOURS, STYLE_PHRASES, Scene, Sprites, article, render

# One object in one of the known styles on a plain background, told in full.
TOLD = {
    **{"p_neutral": 0.0, "p_tint": 0.0, "p_place": 0.0, "p_several": 0.0, "p_two_kinds": 0.0, "p_scene": 0.0},
    **{"p_pattern": 0.0, "p_gradient": 0.0, "p_no_background_words": 0.0},
}


@dataclasses.dataclass(frozen=True)
class Request:
    """A caption of a known object and what it asks for: `row` is the drawing that it tells of."""

    caption: str
    row: int
    name: str
    style: str
    colour: str


def draw_requests(sprites: Sprites, count: int, seed: int = 0) -> list[Request]:
    """`count` captions "STYLE OBJECT on a COLOUR background"; objects are uniform, then their styles."""
    rng = np.random.default_rng(seed)
    names = sorted(set(sprites.names))
    requests = []
    for name in rng.choice(names, count, replace=count > len(names)):
        row = int(rng.choice(sprites.where(name)))
        style, colour = sprites.styles[row], str(rng.choice(list(COLOURS)))
        caption = f"{STYLE_PHRASES[style]} {article(str(name))} {background_phrase(colour)}"
        requests.append(Request(caption, row, str(name), style, colour))
    return requests


def real_pictures(requests: Sequence[Request], sprites: Sprites) -> Tensor:
    """What the compositor draws for the requests, (N, 3, 64, 64) in [-1, 1]: the best that a model could do."""
    scenes = [Scene(((r.row, 0.5, 0.5, 0.7),), r.caption, f"plain:{r.colour}", seed=i) for i, r in enumerate(requests)]
    pixels = np.stack([render(scene, sprites)[0] for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def judge(scorer: Scorer, images: Tensor, requests: Sequence[Request], names: Sequence[str], kind: str) -> list[Figure]:
    """Shares of pictures (N, 3, H, W) whose object, background colour and style the scorer finds as asked for.

    The object is ranked among itself and 99 others of `names`, drawn anew for each picture.
    """
    rng = np.random.default_rng(0)
    asked = [r.name for r in requests]
    scores = scorer.object_scores(images, list(names)).numpy()  # (N, number of names)
    first = []
    for row, name in zip(scores, asked, strict=True):
        wrong = [i for i, n in enumerate(names) if n != name]
        others = rng.choice(wrong, min(CANDIDATES - 1, len(wrong)), replace=False)
        first.append(float(row[others].max() < row[list(names).index(name)]))
    colours, styles = scorer.name_background(images), scorer.name_style(images)
    return [
        figure(f"object first among {CANDIDATES}, {kind}", first, asked),
        figure(f"background named among {len(COLOURS)} colours, {kind}",
               [float(c == r.colour) for c, r in zip(colours, requests, strict=True)], asked),
        figure(f"style named among {len(STYLE_PHRASES)}, {kind}",
               [float(s == r.style) for s, r in zip(styles, requests, strict=True)], asked),
    ]  # fmt: skip


@torch.no_grad()
def caption_gap(model: Any, sprites: Sprites, count: int = 256, seed: int = 7, batch: int = 64) -> list[Figure]:
    """Diffusion loss on the same `count` pictures, noise and time steps, with captions ever less true.

    The time steps are spread evenly. Words about the object count only where the loss with the right caption is
    clearly below that with the background's words alone, and with another object's name; the last figures say by how
    much at which time steps.
    """
    pictures = compose(sprites, count, seed, grammar=TOLD)
    generator = torch.Generator().manual_seed(seed)
    times = ((torch.arange(count) + 0.5) * model.num_timesteps / count).long()
    times = times[torch.randperm(count, generator=generator)]  # (N,)
    losses: dict[str, list[float]] = {kind: [] for kind in CAPTIONS}
    for start in range(0, count, batch):
        rows = slice(start, min(start + batch, count))
        posterior = model.encode_first_stage(pictures.images(rows).to(model.device))
        sampled, noise = (torch.randn(posterior.mean.shape, generator=generator) for _ in range(2))  # same anywhere
        latents = model.get_first_stage_encoding(posterior, sampled.to(model.device))
        noise, t = noise.to(model.device), times[rows].to(model.device)
        target, noisy = model.training_target(latents, noise, t), model.q_sample(latents, t, noise)
        for kind, change in CAPTIONS.items():
            texts = [change(pictures, i) for i in range(rows.start, rows.stop)]
            output = model.apply_model(noisy, t, model.get_learned_conditioning(texts))
            losses[kind] += (output - target).square().mean((1, 2, 3)).tolist()
    figures = [figure(f"loss with {kind}", values, pictures.names) for kind, values in losses.items()]
    more = np.array(losses[ANOTHER]) - np.array(losses[RIGHT])  # (N,)
    fifth = -(-model.num_timesteps // 5)
    for first in range(0, model.num_timesteps, fifth):
        there = np.flatnonzero(times.numpy() // fifth == first // fifth)
        name = f"more loss with {ANOTHER}, time steps from {first}"
        if len(there):
            figures.append(figure(name, more[there].tolist(), [pictures.names[i] for i in there]))
    return figures


def _words_of_background(pictures: Pictures, i: int) -> str:
    return background_phrase(pictures.backgrounds[i].removeprefix("plain:"))


def _another_object(pictures: Pictures, i: int) -> str:
    other = next(n for n in pictures.names[i:] + pictures.names if n != pictures.names[i])
    return swap_object(pictures.captions[i], pictures.names[i], other)


RIGHT, ANOTHER = "the right caption", "another object's name"
CAPTIONS: dict[str, Callable[[Pictures, int], str]] = {
    RIGHT: lambda pictures, i: pictures.captions[i],
    "the background's words alone": _words_of_background,
    ANOTHER: _another_object,
    "no caption": lambda pictures, i: "",
    "the caption of another picture": lambda pictures, i: pictures.captions[i - 1],
}


def known_sprites(folder: str | Path) -> Sprites:
    """The drawings that the model was trained on."""
    return Sprites.load(Path(folder) / "train.npy")
