"""Concepts of the embedded picture world: objects and a style that its model has never seen, in few pictures.

The drawings come along (`evaluation/emoji/sprites.npz`); the pictures are composed of them, each a function of concept
and number alone. `scripts/data/build_concepts.py` makes that file from the one that `make data` builds.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from evaluation.concepts import FILE, Concept, read_concept
from evaluation.experiments import read_yaml
from ldm.checkpoint import atomic_path
from ldm.data.emoji import Grammar, Sprites, render
from ldm.generate_files import save_png
from ldm.util import did_you_mean

FOLDER = Path(__file__).parent / "emoji"
PICTURES = 25  # as many as Figure 12 needs; most tables learn from the first few
SIZE = 64
SPRITE_SIZE = 64
STYLES = ("fluent-3d", "noto", "twemoji")  # in which the objects are drawn
GRAMMAR = Grammar(p_tint=0.0, p_place=0.0, p_small=0.0, p_several=0.0, p_two_kinds=0.0)  # one, in its own colours


def concept_sets() -> dict[str, list[str]]:
    """Names of the concepts in each set: "development", "final", "style"."""
    return read_yaml(FOLDER / "concepts.yaml")["sets"]


def read_sprites(path: Path = FOLDER / "sprites.npz") -> Sprites:
    """The drawings of all concepts."""
    with np.load(path, allow_pickle=False) as file:
        return Sprites(file["pixels"], file["names"].tolist(), file["styles"].tolist())


def write_concepts(names: Sequence[str], folder: str | Path, pictures: int = PICTURES) -> list[Concept]:
    """The concepts called `names`, with their pictures in `folder`, composed where they are not there yet."""
    described = read_yaml(FOLDER / "concepts.yaml")["concepts"]
    sprites = read_sprites()
    concepts = []
    for name in names:
        if name not in described:
            raise ValueError(f"there is no concept '{name}'{did_you_mean(name, described)}")
        target = Path(folder) / name.replace(" ", "_")
        for number in range(pictures):
            file = target / f"{number:02}.png"
            if not file.is_file():
                save_png(compose(name, number, sprites, described[name].get("style")), file)
        write_description(target / FILE, {"name": name, **described[name]})
        concepts.append(read_concept(target))
    return concepts


def write_description(path: Path, values: dict[str, Any]) -> None:
    """Write `concept.yaml`."""
    known = {key: value for key, value in values.items() if key not in ("style", "shows")}
    text = yaml.safe_dump(known, sort_keys=False, allow_unicode=True, width=120)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def compose(name: str, number: int, sprites: Sprites, style: str | None = None) -> np.ndarray:
    """Picture `number` of a concept, uint8 (64, 64, 3).

    An object is drawn in each of `STYLES` in turn; a style shows one of its objects after the other.
    """
    if style is None:
        rows = sprites.where(name, STYLES[number % len(STYLES)]) or sprites.where(name)
        row = rows[0]
    else:
        rows = sprites.where(style=style)
        row = rows[number % len(rows)]
    rng = np.random.default_rng([zlib.crc32(name.encode()), number])
    scene = GRAMMAR.draw(sprites, rng, {sprites.names[row]: [row]})
    return render(scene, sprites, SIZE)[0]


def build_sprites(sprite_folder: str | Path, out: Path = FOLDER / "sprites.npz") -> None:
    """Write the drawings of all concepts, from the sprite files of `make data`, to `out`."""
    described = read_yaml(FOLDER / "concepts.yaml")["concepts"]
    held_out = Sprites.load(Path(sprite_folder) / "held_out.npy")
    style_set = Sprites.load(Path(sprite_folder) / "style.npy")
    parts: list[tuple[np.ndarray, str, str]] = []
    for name, values in described.items():
        if "style" in values:
            rows = [row for shown in values["shows"] for row in style_set.where(shown, values["style"])[:1]]
            parts += [(small(style_set.pixels[row]), style_set.names[row], values["style"]) for row in rows]
            continue
        for style in STYLES:
            parts += [(small(held_out.pixels[row]), name, style) for row in held_out.where(name, style)[:1]]
    pixels, names, styles = zip(*parts, strict=True)
    with atomic_path(out) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, pixels=np.stack(pixels), names=np.array(names), styles=np.array(styles))


def small(pixels: np.ndarray) -> np.ndarray:
    """A drawing at the size that comes along, uint8 (64, 64, 4)."""
    image = Image.fromarray(np.asarray(pixels)).resize((SPRITE_SIZE, SPRITE_SIZE), Image.Resampling.LANCZOS)
    return np.asarray(image)
