"""Pictures for the scorer: composed of all drawings, cached as bytes, and disturbed as generated pictures are."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.emoji import COLOURS, SCENES, Grammar, Sprites, render

logger = logging.getLogger(__name__)

SPRITE_FILES = ("train.npy", "held_out.npy", "style.npy")
# Backgrounds that have a name of their own: codes of `ldm.data.emoji.paint_background`.
BACKGROUNDS = (*(f"plain:{colour}" for colour in COLOURS), *(f"scene:{scene}" for scene in SCENES.values()))


@dataclasses.dataclass(frozen=True)
class Pictures:
    """N composed pictures: `pixels` uint8 (N, H, W, 3); the rest are N labels each.

    `names` and `styles` tell of the (first) object, `others` names a second kind of object or is empty,
    `backgrounds` are codes such as `plain:red`.
    """

    pixels: np.ndarray
    captions: list[str]
    names: list[str]
    others: list[str]
    styles: list[str]
    backgrounds: list[str]

    def __len__(self) -> int:
        return len(self.captions)

    def images(self, rows: Sequence[int] | np.ndarray | slice) -> Tensor:
        """Pictures float32 (B, 3, H, W) in [-1, 1]."""
        picked = np.ascontiguousarray(self.pixels[rows])
        return torch.from_numpy(picked).permute(0, 3, 1, 2).to(torch.float32).contiguous() / 127.5 - 1.0


def all_sprites(folder: str | Path, files: Sequence[str] = SPRITE_FILES) -> Sprites:
    """The drawings of several sprite files as one, in memory."""
    parts = [Sprites.load(Path(folder) / file) for file in files]
    pixels = np.concatenate([part.pixels for part in parts])
    return Sprites(pixels, [n for part in parts for n in part.names], [s for part in parts for s in part.styles])


def compose(
    sprites: Sprites,
    count: int,
    seed: int = 0,
    size: int = 64,
    grammar: Mapping[str, float] | None = None,
    names: Sequence[str] | None = None,
    log_every: int = 20_000,
) -> Pictures:
    """Draw `count` pictures of the grammar; picture i is a function of (seed, i) alone.

    `grammar`: probabilities that differ from `Grammar`'s; `names`: restrict to these objects.
    """
    chosen = Grammar(**(grammar or {}))
    by_name: dict[str, list[int]] = {}
    for row, name in enumerate(sprites.names):
        if names is None or name in names:
            by_name.setdefault(name, []).append(row)
    pixels = np.empty((count, size, size, 3), np.uint8)
    labels: list[tuple[str, str, str, str, str]] = []
    for i in range(count):
        scene = chosen.draw(sprites, np.random.default_rng([seed, i]), by_name)
        pixels[i] = render(scene, sprites, size)[0]
        kinds = [sprites.names[row] for row, *_ in scene.objects]
        other = kinds[-1] if kinds[-1] != kinds[0] else ""
        labels.append((scene.caption, kinds[0], other, sprites.styles[scene.objects[0][0]], scene.background))
        if (i + 1) % log_every == 0:
            logger.info("%d of %d pictures composed", i + 1, count)
    return Pictures(pixels, *(list(column) for column in zip(*labels, strict=True)))


def cached_pictures(folder: str | Path, sprite_folder: str | Path, count: int, seed: int) -> Pictures:
    """`count` pictures of all drawings from the cache in `folder`; composed first if they are not there."""
    stem = Path(folder) / f"pictures-{seed}-{count}"
    labels_file = stem.with_suffix(".json")
    if not labels_file.is_file():
        pictures = compose(all_sprites(sprite_folder), count, seed)
        stem.parent.mkdir(parents=True, exist_ok=True)
        np.save(stem.with_suffix(".npy"), pictures.pixels)
        labels = {f.name: getattr(pictures, f.name) for f in dataclasses.fields(Pictures) if f.name != "pixels"}
        labels_file.write_text(json.dumps(labels, ensure_ascii=False), encoding="utf-8")
    return Pictures(np.load(stem.with_suffix(".npy"), mmap_mode="r"), **json.loads(labels_file.read_text("utf-8")))


def disturb(images: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Distort pictures (B, 3, S, S) in [-1, 1] somewhat, as cameras and image models do; each has its own luck.

    Shapes wobble, colours shift, a half of the pictures loses detail, a third gets the blocks of strong compression,
    and a half gets noise.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(len(images), *shape, generator=generator) * (high - low) + low

    def some(share: float, changed: Tensor, unchanged: Tensor) -> Tensor:
        return torch.where(uniform(0, 1, 1, 1, 1) < share * strength, changed, unchanged)

    images = warp(images, generator, strength)
    gain, shift = 1 + strength * uniform(-0.12, 0.12, 3, 1, 1), strength * uniform(-0.08, 0.08, 3, 1, 1)
    images = (images * (gain + strength * uniform(-0.1, 0.1, 1, 1, 1)) + shift).clamp(-1, 1)
    images = some(0.5, blurred(images, int(torch.randint(20, 50, (), generator=generator))), images)
    images = some(0.33, compressed(images, uniform(0.05, 0.35, 1, 1, 1)), images)
    noise = torch.randn(images.shape, generator=generator) * uniform(0, 0.12, 1, 1, 1)
    return some(0.5, images + noise, images).clamp(-1, 1)


def warp(images: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Turn, scale, shift and bend pictures (B, 3, S, S) a little."""
    B = len(images)
    turn, scale, across, down = (torch.randn(4, B, generator=generator) * strength).clamp(-2, 2)
    turn, scale = turn * math.radians(4), 1 + 0.05 * scale
    cos, sin = scale * torch.cos(turn), scale * torch.sin(turn)
    matrices = torch.stack([cos, -sin, 0.05 * across, sin, cos, 0.05 * down], dim=1).view(B, 2, 3)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)  # (B, S, S, 2)
    amount = 0.05 * strength * torch.rand(B, 1, 1, 1, generator=generator)
    bend = torch.randn(B, 2, 6, 6, generator=generator) * amount
    bend = F.interpolate(bend, images.shape[2:], mode="bilinear", align_corners=True)  # (B, 2, S, S)
    return F.grid_sample(images, grid + bend.permute(0, 2, 3, 1), padding_mode="reflection", align_corners=False)


def blurred(images: Tensor, size: int) -> Tensor:
    """Pictures (B, 3, S, S) with the detail of pictures of `size` pixels only."""
    small = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return F.interpolate(small, images.shape[2:], mode="bilinear")


def compressed(images: Tensor, step: Tensor, block: int = 8) -> Tensor:
    """Pictures (B, 3, S, S) whose blocks' cosine coefficients are rounded, fine ones more, to `step` (B, 1, 1, 1)."""
    k = torch.arange(block, dtype=torch.float32)
    dct = torch.cos(math.pi / block * (k + 0.5) * k[:, None]) * math.sqrt(2 / block)  # (block, block)
    dct[0] /= math.sqrt(2)
    steps = step[..., None, None] * (1 + (k + k[:, None]) / 2)  # (B, 1, 1, 1, block, block)
    B, C, H, W = images.shape
    blocks = images.view(B, C, H // block, block, W // block, block).transpose(3, 4)  # (B, C, h, w, block, block)
    coefficients = torch.round(dct @ blocks @ dct.T / steps) * steps
    return (dct.T @ coefficients @ dct).transpose(3, 4).reshape(B, C, H, W)
