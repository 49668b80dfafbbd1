"""A captioned picture world made of emoji drawings: a small grammar, and the compositor that draws its sentences.

One picture shows one drawing (sometimes two or three) on a plain, graded, patterned or scenic background; the caption
says style, colour, object, count, size, place and background. Every picture is a function of (seed, index) alone.
The drawings come from a sprite file written by `scripts/data/build_emoji.py`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

# The words of the world. The tables are the whole truth: captions use nothing else, and the scorer asks for these.
STYLE_PHRASES: dict[str, str] = {
    "fluent-3d": "a 3d render of",
    "fluent-flat": "a flat icon of",
    "high-contrast": "a silhouette of",
    "noto": "a sticker of",
    "noto-v1": "a clipart of",
    "fxemoji": "a doodle of",
    "twemoji": "a vector drawing of",
    "emojione": "a cartoon of",
}
# Drawings that no generator is trained on have words too: the scorer, which knows all drawings, uses them.
HELD_OUT_STYLE_PHRASES: dict[str, str] = {"openmoji": "an openmoji drawing of"}
# Used for every style alike, so that a prompt without a style word has a meaning too.
NEUTRAL_PHRASES = ("a picture of", "an image of", "a photo of", "a drawing of", "")
COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "black": (18, 18, 22),
    "gray": (128, 130, 134),
    "red": (214, 40, 44),
    "orange": (244, 140, 30),
    "yellow": (250, 216, 56),
    "green": (52, 160, 72),
    "teal": (28, 150, 150),
    "blue": (44, 92, 210),
    "purple": (126, 58, 180),
    "pink": (246, 140, 186),
    "brown": (122, 78, 46),
}
TINTS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "gray")
SCENES: dict[str, str] = {
    "on the beach": "beach",
    "on grass": "grass",
    "at night": "night",
    "in the snow": "snow",
    "under water": "water",
    "in the desert": "desert",
}
PATTERNS = ("striped", "checkered", "dotted")
PLACES: dict[str, tuple[float, float]] = {
    "on the left": (0.27, 0.5),
    "on the right": (0.73, 0.5),
    "at the top": (0.5, 0.27),
    "at the bottom": (0.5, 0.73),
}
COUNTS = {2: "two", 3: "three"}
# Share of the picture's width that the drawing's longer side takes.
SIZES = {"small": (0.30, 0.40), "": (0.62, 0.80), "large": (0.84, 0.96)}


@dataclasses.dataclass(frozen=True)
class Sprites:
    """Drawings: `pixels` uint8 RGBA (N, S, S, 4); row i shows `names[i]` in style `styles[i]`."""

    pixels: np.ndarray
    names: list[str]
    styles: list[str]

    @classmethod
    def load(cls, path: str | Path) -> Sprites:
        """Read a sprite file (`NAME.npy` with `NAME.json` beside it); pixels stay memory-mapped."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no sprite file; run 'make data' (scripts/data/build_emoji.py) to make it")
        index = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return cls(np.load(path, mmap_mode="r"), index["names"], index["styles"])

    def where(self, name: str | None = None, style: str | None = None) -> list[int]:
        """Rows that show `name` in `style` (None: any)."""
        rows = zip(self.names, self.styles, strict=True)
        return [i for i, (n, s) in enumerate(rows) if name in (None, n) and style in (None, s)]


@dataclasses.dataclass(frozen=True)
class Scene:
    """One sentence of the grammar, ready to draw; `objects`: (sprite row, centre x, centre y, share of width)."""

    objects: tuple[tuple[int, float, float, float], ...]
    caption: str
    background: str
    tint: str = ""
    flip: bool = False
    angle: float = 0.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Grammar:
    """How often each part of a caption occurs."""

    p_neutral: float = 0.35
    p_tint: float = 0.12
    p_place: float = 0.12
    p_small: float = 0.08
    p_large: float = 0.08
    p_several: float = 0.06
    p_two_kinds: float = 0.04
    p_scene: float = 0.15
    p_pattern: float = 0.06
    p_gradient: float = 0.12
    p_no_background_words: float = 0.08
    p_flip: float = 0.5  # mirrored drawings; the caption does not say so
    tilt: float = 4.0  # standard deviation in degrees
    jitter: float = 0.02  # of the centre where no word says the place: standard deviation, share of the picture's width
    size_spread: float = 1.0  # share of the ranges of SIZES that is used, around their middle

    def draw(self, sprites: Sprites, rng: np.random.Generator, by_name: Mapping[str, Sequence[int]]) -> Scene:
        """Draw a sentence; objects are uniform over names, then over their drawings."""
        names = list(by_name)
        name = names[rng.integers(len(names))]
        row = int(rng.choice(by_name[name]))
        style = sprites.styles[row]
        phrase = NEUTRAL_PHRASES[rng.integers(len(NEUTRAL_PHRASES))] if rng.random() < self.p_neutral else ""
        phrase = phrase or (STYLE_PHRASES | HELD_OUT_STYLE_PHRASES)[style] if rng.random() > 0.05 else ""
        tint = TINTS[rng.integers(len(TINTS))] if rng.random() < self.p_tint and style != "high-contrast" else ""
        background, words = self._background(rng)
        placed, subject = self._subject(sprites, rng, by_name, row, name, tint)
        caption = " ".join(part for part in (phrase, subject, words) if part)
        return Scene(placed, caption, background, tint, bool(rng.random() < self.p_flip),
                     float(rng.normal(0, self.tilt)), int(rng.integers(2**31)))  # fmt: skip

    def _subject(
        self, sprites: Sprites, rng: np.random.Generator, by_name: Mapping[str, Sequence[int]], row: int, name: str,
        tint: str,
    ) -> tuple[tuple[tuple[int, float, float, float], ...], str]:  # fmt: skip
        """Place the drawing or drawings; the noun phrase with size, colour, count and place."""
        kind = rng.random()
        if kind < self.p_several:
            count = int(rng.integers(2, 4))
            spots = ((0.27, 0.5), (0.73, 0.5)) if count == 2 else ((0.27, 0.7), (0.73, 0.7), (0.5, 0.27))
            size = 0.42
            noun = f"{COUNTS[count]} {tint + ' ' if tint else ''}{plural(name)}"
            return tuple((row, x, y, size) for x, y in spots), noun
        noun = f"{tint + ' ' if tint else ''}{name}"
        if kind < self.p_several + self.p_two_kinds:
            others = [r for r in sprites.where(style=sprites.styles[row]) if sprites.names[r] in by_name and r != row]
            other = others[rng.integers(len(others))] if others else row
            if sprites.names[other] != name:
                both = f"{article(noun)} and {article(f'{tint} ' * bool(tint) + sprites.names[other])}"
                return ((row, 0.27, 0.5, 0.45), (other, 0.73, 0.5, 0.45)), both
        size_word = ""
        draw = rng.random()
        if draw < self.p_small:
            size_word = "small"
        elif draw < self.p_small + self.p_large:
            size_word = "large"
        smallest, largest = SIZES[size_word]
        margin = (largest - smallest) * (1 - self.size_spread) / 2
        size = float(rng.uniform(smallest + margin, largest - margin))
        x, y = (float(v) for v in rng.normal(0.5, self.jitter, 2))
        place = ""
        if rng.random() < self.p_place and size_word != "large":
            place = list(PLACES)[rng.integers(len(PLACES))]
            x, y = PLACES[place]
            size = min(size, 0.5)
        noun = article(f"{size_word} {noun}".strip())
        return ((row, x, y, size),), f"{noun} {place}".strip()

    def _background(self, rng: np.random.Generator) -> tuple[str, str]:
        """A background code for `paint_background` and the words for it."""
        colours = list(COLOURS)
        first, second = (colours[i] for i in rng.choice(len(colours), 2, replace=False))
        kind = rng.random()
        if kind < self.p_scene:
            words = list(SCENES)[rng.integers(len(SCENES))]
            return f"scene:{SCENES[words]}", words
        kind -= self.p_scene
        if kind < self.p_pattern:
            pattern = PATTERNS[rng.integers(len(PATTERNS))]
            return f"{pattern}:{first}:{second}", f"on a {pattern} {first} and {second} background"
        kind -= self.p_pattern
        if kind < self.p_gradient:
            return f"gradient:{first}:{second}", f"on a {first} to {second} background"
        words = "" if rng.random() < self.p_no_background_words else f"on {article(first)} background"
        return f"plain:{first}", words


def article(noun: str) -> str:
    """`a` or `an` before a noun phrase."""
    return f"{'an' if noun[0].lower() in 'aeio' else 'a'} {noun}"


def plural(name: str) -> str:
    """Plural of an object's name, good enough for the names of the world."""
    if name.endswith(("s", "x", "ch", "sh")):
        return name if name.endswith("s") and not name.endswith(("ss", "us")) else f"{name}es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return f"{name[:-1]}ies"
    return f"{name}s"


def render(scene: Scene, sprites: Sprites, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene: picture uint8 (size, size, 3) and the objects' coverage, uint8 (size, size)."""
    rng = np.random.default_rng(scene.seed)
    canvas = Image.fromarray(paint_background(scene.background, size, rng))
    coverage = Image.new("L", (size, size), 0)
    # A black silhouette would vanish on a dark ground, so there it is drawn in white.
    dark = scene.background.startswith(("plain:black", "scene:night"))
    for row, x, y, share in scene.objects:
        tint = "white" if dark and sprites.styles[row] == "high-contrast" else scene.tint
        sprite = Image.fromarray(tinted(np.asarray(sprites.pixels[row]), tint))
        if scene.flip:
            sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if scene.angle:
            sprite = sprite.rotate(scene.angle, Image.Resampling.BICUBIC)
        side = max(4, round(share * size))
        sprite = sprite.resize((side, side), Image.Resampling.BICUBIC)  # Pillow premultiplies alpha by itself
        corner = (round(x * size - side / 2), round(y * size - side / 2))
        canvas.paste(sprite, corner, sprite)
        alpha = sprite.getchannel("A")
        coverage.paste(alpha, corner, alpha)
    return np.asarray(canvas), np.asarray(coverage)


def tinted(pixels: np.ndarray, tint: str) -> np.ndarray:
    """Colourise a drawing (S, S, 4): its brightness becomes a ramp from dark over the tint to white."""
    if not tint:
        return pixels
    if tint == "white":
        return np.concatenate([np.full_like(pixels[..., :3], 250), pixels[..., 3:]], axis=-1)
    light = pixels[..., :3].astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32) / 255  # (S, S)
    ramp = np.array([0.0, 0.5, 1.0])
    colour = np.array(COLOURS[tint], np.float32)
    stops = np.stack([colour * 0.25, colour, colour * 0.35 + 255 * 0.65])  # (3, 3)
    out = np.stack([np.interp(light, ramp, stops[:, c]) for c in range(3)], axis=-1)
    return np.concatenate([out.astype(np.uint8), pixels[..., 3:]], axis=-1)


def paint_background(code: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Paint `kind:detail...` as uint8 (size, size, 3); colours vary a little from picture to picture."""
    kind, *details = code.split(":")
    y, x = np.mgrid[0:size, 0:size] / max(size - 1, 1)
    if kind == "scene":
        return _to_uint8(_SCENE_PAINTERS[details[0]](x, y, rng))
    first, second = (_colour(name, rng) for name in (details * 2)[:2])
    if kind == "plain":
        weight = np.zeros_like(x)
    elif kind == "gradient":
        weight = x if rng.random() < 0.5 else y
    elif kind == "striped":
        weight = (np.floor((x if rng.random() < 0.5 else y) * 8) % 2).astype(float)
    elif kind == "checkered":
        weight = ((np.floor(x * 6) + np.floor(y * 6)) % 2).astype(float)
    elif kind == "dotted":
        weight = (np.hypot(x * 6 % 1 - 0.5, y * 6 % 1 - 0.5) < 0.28).astype(float)
    else:
        raise ValueError(f"background '{code}' is unknown")
    return _to_uint8(first * (1 - weight[..., None]) + second * weight[..., None])


def _colour(name: str, rng: np.random.Generator) -> np.ndarray:
    return np.clip(np.array(COLOURS[name], np.float32) + rng.normal(0, 6, 3), 0, 255)


def _to_uint8(picture: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _blend(x: np.ndarray, stops: Sequence[tuple[float, tuple[int, int, int]]]) -> np.ndarray:
    """Piecewise linear colour ramp over `x` (S, S)."""
    positions = [p for p, _ in stops]
    colours = np.array([c for _, c in stops], np.float32)
    return np.stack([np.interp(x, positions, colours[:, c]) for c in range(3)], axis=-1)


def _beach(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    sky, sea = 0.35 + rng.normal(0, 0.02), 0.58 + rng.normal(0, 0.02)
    wave = y + 0.015 * np.sin(x * 14 + rng.uniform(0, 6))
    picture = _blend(y, [(0, (96, 178, 246)), (sky, (190, 226, 250))])
    picture[y >= sky] = (24, 120, 190)
    picture[wave >= sea] = (238, 214, 150)
    return picture


def _grass(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    hill = 0.52 + 0.05 * np.sin(x * 4 + rng.uniform(0, 6))
    picture = _blend(y, [(0, (110, 190, 250)), (0.5, (206, 234, 250))])
    picture[y >= hill] = _blend(y, [(0.5, (110, 190, 70)), (1, (50, 130, 44))])[y >= hill]
    return picture


def _night(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    picture = _blend(y, [(0, (8, 10, 40)), (1, (32, 36, 90))])
    for cx, cy in rng.uniform(0, 1, (14, 2)):
        picture[np.hypot(x - cx, y - cy) < 0.018] = (250, 246, 210)
    return picture


def _snow(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    ground = 0.66 + 0.04 * np.sin(x * 5 + rng.uniform(0, 6))
    picture = _blend(y, [(0, (150, 176, 204)), (0.7, (206, 220, 234))])
    picture[y >= ground] = (244, 248, 252)
    for cx, cy in rng.uniform(0, 1, (22, 2)):
        picture[np.hypot(x - cx, y - cy) < 0.02] = (255, 255, 255)
    return picture


def _water(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    picture = _blend(y + 0.03 * np.sin(x * 9 + rng.uniform(0, 6)), [(0, (60, 190, 214)), (1, (8, 60, 120))])
    for cx, cy, r in rng.uniform((0, 0, 0.015), (1, 1, 0.05), (9, 3)):
        ring = np.abs(np.hypot(x - cx, y - cy) - r) < 0.01
        picture[ring] = (190, 236, 246)
    return picture


def _desert(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    dune = 0.55 + 0.07 * np.sin(x * 5 + rng.uniform(0, 6))
    picture = _blend(y, [(0, (246, 170, 90)), (0.6, (252, 222, 160))])
    picture[y >= dune] = _blend(y, [(0.5, (226, 164, 84)), (1, (180, 110, 48))])[y >= dune]
    return picture


_SCENE_PAINTERS = {
    "beach": _beach,
    "grass": _grass,
    "night": _night,
    "snow": _snow,
    "water": _water,
    "desert": _desert,
}


class EmojiCompositions(Dataset):
    """Composed pictures with captions; item i is a function of (seed, i) alone.

    `sprites`: the sprite file; `length`: number of pictures; `size`: pixels; `grammar`: probabilities that differ
    from `Grammar`'s; `names`: restrict to these objects. Items: `image` float32 (size, size, 3) in [-1, 1],
    `caption`, and with `coverage` the objects' share of each pixel, float32 (size, size) in [0, 1].
    """

    def __init__(
        self,
        sprites: str | Path,
        length: int = 100_000,
        size: int = 64,
        seed: int = 0,
        grammar: Mapping[str, float] | None = None,
        names: Sequence[str] | None = None,
        coverage: bool = False,
    ):
        self.sprites = Sprites.load(sprites)
        self.length = length
        self.size = size
        self.seed = seed
        self.grammar = Grammar(**(grammar or {}))
        self.coverage = coverage
        self.by_name: dict[str, list[int]] = {}
        for row, name in enumerate(self.sprites.names):
            if names is None or name in names:
                self.by_name.setdefault(name, []).append(row)
        if not self.by_name:
            raise ValueError(f"{sprites}: none of the objects {list(names or ())} is drawn there")

    def __len__(self) -> int:
        return self.length

    def scene(self, index: int) -> Scene:
        """The sentence of item `index`."""
        return self.grammar.draw(self.sprites, np.random.default_rng([self.seed, index]), self.by_name)

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = self.scene(index)
        picture, coverage = render(scene, self.sprites, self.size)
        item: dict[str, Any] = {"image": picture.astype(np.float32) / 127.5 - 1.0, "caption": scene.caption}
        if self.coverage:
            item["coverage"] = coverage.astype(np.float32) / 255.0
        return item
