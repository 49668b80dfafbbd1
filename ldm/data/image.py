"""The one way from an image file to the array that a model sees.

Every data set and every command that reads a picture goes through here, so that a photo taken upright is upright, a
cut-out has a clean background and a broken file is named, whoever asks.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps

log = logging.getLogger(__name__)

# Twice the size of the largest camera sensors; a small file that claims more is a decompression bomb.
MAX_PIXELS = 178_956_970

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".jp2", ".bmp", ".gif", ".tif", ".tiff",
                            ".tga", ".ppm", ".pgm"})  # fmt: skip
# Of all that Pillow would open by a file's content, whatever its name: kinds that are plain pictures. PostScript, for
# one, is a program, which Pillow would run. HEIF is for those who have a plug-in for it; TGA, which has no mark of its
# own, comes last.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "HEIF", "ICO", "ICNS", "PCX",
           "PSD", "QOI", "SGI", "TGA")  # fmt: skip

INTERPOLATIONS: dict[str, Image.Resampling] = {
    "nearest": Image.Resampling.NEAREST,
    "linear": Image.Resampling.BILINEAR,  # the published name; Pillow 10 dropped its own alias
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
CROPS = ("stretch", "center", "random", "pad")
ALPHAS = ("composite", "drop")

Source = str | Path | bytes | IO[bytes]
Colour = str | Sequence[int]


def open_image(source: Source, name: str | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode the picture in `source` (a path, bytes or a binary file) fully, turned upright by its EXIF orientation.

    `name` is what messages call the source when it is no path. Raises `FileNotFoundError` for a missing file and
    `ValueError` that names the file when it is no image of a kind in `FORMATS`, is truncated, has more than
    `max_pixels` pixels, or colours (LAB) that cannot be made RGB.
    """
    label = name or (str(source) if isinstance(source, (str, Path)) else "the picture")
    try:
        with warnings.catch_warnings():
            # Pillow warns at half of our own limit, which is checked right below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats())
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(f"{label}: {error}; shrink the picture") from error
    except Exception as error:  # decoders raise nearly anything on broken headers
        raise ValueError(f"{label} is not an image that can be read (convert it to JPEG or PNG)") from error
    with image:
        width, height = image.size
        if width * height > max_pixels:
            raise ValueError(f"{label} has {width} x {height} pixels, more than the limit of {max_pixels}; shrink it")
        try:
            image.load()
        except Exception as error:
            if "not available" in str(error):  # Pillow's words where it was built without a decoder
                raise ValueError(f"{label} needs another Pillow (convert it to JPEG or PNG): {error}") from error
            raise ValueError(f"{label} is truncated or damaged: {error}") from error
        if image.mode == "LAB":
            raise ValueError(f"{label} is in LAB colours, which are not read; convert it to RGB")
        return _upright(image, label)


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow knows: it stumbles over names of others."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def open_mask(source: Source, name: str | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """As `open_image` for a mask, as 8-bit grey (mode L): 16 bits are scaled, not clipped; transparency is black."""
    image = open_image(source, name, max_pixels)
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_grey_to_l(image)
    if not image.has_transparency_data:
        return image.convert("L")
    return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA")).convert("L")


def _upright(image: Image.Image, label: str) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block must not cost the picture
        log.warning("%s: its EXIF block cannot be read, so its orientation is ignored", label)
        return image.copy()


def parse_colour(colour: Colour) -> tuple[int, int, int]:
    """Return (red, green, blue) in 0..255 for a colour name, a hex code or three numbers."""
    try:
        rgb = ImageColor.getrgb(colour)[:3] if isinstance(colour, str) else tuple(int(c) for c in colour)
    except ValueError as error:
        raise ValueError(f"'{colour}' is not a colour; use a name, '#rrggbb' or three numbers from 0 to 255") from error
    if len(rgb) != 3 or not all(0 <= c <= 255 for c in rgb):
        raise ValueError(f"{colour!r} is not a colour; use a name, '#rrggbb' or three numbers from 0 to 255")
    return rgb[0], rgb[1], rgb[2]


def alpha_plane(image: Image.Image) -> Image.Image | None:
    """Return the alpha channel (mode L) of `image`, or None where it separates no subject from a background.

    A plane that is below half everywhere is no cut-out (some programs write it all zero, meaning nothing by it), nor is
    a gradient that never gets opaque; one of a single level has nothing to cut. All count as no alpha.
    """
    if not image.has_transparency_data:
        return None
    plane = image.convert("RGBA").getchannel("A")
    counts = plane.histogram()
    levels = [level for level, count in enumerate(counts) if count]
    lowest, highest = levels[0], levels[-1]
    if lowest == highest or highest < 128:
        return None
    # Resizing and lossy compression leave some cut-outs without a pixel of 255, and some subjects are drawn faint.
    two_levels = counts[lowest] + counts[highest] > sum(counts) / 2
    return plane if highest > 250 or two_levels else None


def to_rgb(image: Image.Image, alpha: str = "composite", background: Colour = "white") -> Image.Image:
    """Return `image` as 8-bit RGB; transparency is laid over `background`, or ignored with `alpha="drop"`.

    Dropping is what the published code does; it shows whatever colour lies hidden under transparent pixels.
    Grey levels of 16 bits are scaled, not clipped, to 8.
    """
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_grey_to_l(image).convert("RGB")
    plane = alpha_plane(image) if alpha == "composite" else None
    if plane is None:
        return (image.convert("RGBA") if image.mode == "P" and alpha == "composite" else image).convert("RGB")
    canvas = Image.new("RGB", image.size, parse_colour(background))
    canvas.paste(image.convert("RGBA").convert("RGB"), mask=plane)
    return canvas


def _deep_grey_to_l(image: Image.Image) -> Image.Image:
    """Bring grey of 16 or 32 bits or of floats to 8 bits by the range its values show."""
    values = np.asarray(image, dtype=np.float64)
    top = float(values.max(initial=0.0))
    if image.mode == "F":
        full = 1.0 if top <= 1.0 else 255.0
    else:
        full = 65535.0 if image.mode.startswith("I;16") or top > 255.0 else 255.0
    return Image.fromarray(np.rint(np.clip(values / full, 0.0, 1.0) * 255.0).astype(np.uint8))


def to_array(image: Image.Image) -> np.ndarray:
    """Return an 8-bit RGB picture as float32 (H, W, 3) in [-1, 1]."""
    return (np.asarray(image, dtype=np.uint8) / 127.5 - 1.0).astype(np.float32)


def to_uint8(array: np.ndarray | torch.Tensor) -> np.ndarray:
    """Return values in [-1, 1] as rounded 8-bit levels, the inverse of `to_array` (clipped outside)."""
    values = np.asarray(array, dtype=np.float64)
    return np.rint((np.clip(values, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class ImageLoader:
    """Reads, cuts, resizes and flips a picture; `load` gives the array, `prepare` and `finish` its two halves.

    `prepare` is everything that draws no random number (unless `crop="random"`), so its result can be kept;
    `finish` draws the flip. All draws come from torch's global generator.
    """

    size: int | None = None  # side of the square result in pixels; None keeps the picture's own
    crop: str = "stretch"  # stretch (distorts) | center | random | pad (bars in the background colour)
    interpolation: str = "bicubic"  # a key of INTERPOLATIONS
    flip_p: float = 0.0  # probability of a left-right flip
    alpha: str = "composite"  # composite | drop (as the published code)
    background: Colour = "white"  # behind transparent pixels and in padding
    crop_fraction: tuple[float, float] = (1.0, 1.0)  # side of the centre or random cut, of the shorter side
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        _check_choice("crop", self.crop, CROPS)
        _check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        _check_choice("alpha", self.alpha, ALPHAS)
        if self.size is not None and self.size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {self.size}")
        if not 0.0 <= self.flip_p <= 1.0:
            raise ValueError(f"flip_p is a probability between 0 and 1, got {self.flip_p}")
        low, high = self.crop_fraction
        if not 0.0 < low <= high <= 1.0:
            raise ValueError(f"crop_fraction needs 0 < lowest <= highest <= 1, got {self.crop_fraction}")
        parse_colour(self.background)

    @property
    def is_deterministic(self) -> bool:
        """Whether `prepare` gives the same result each time."""
        return self.crop != "random" and (self.crop != "center" or self.crop_fraction[0] == self.crop_fraction[1])

    def load(self, source: Source, name: str | None = None) -> np.ndarray:
        """Return the picture as float32 (H, W, 3) in [-1, 1]. Errors as `open_image`."""
        return to_array(self.finish(*self.prepare(self.open(source, name)))[0])

    def open(self, source: Source, name: str | None = None) -> Image.Image:
        """`open_image` with this loader's limit."""
        return open_image(source, name, self.max_pixels)

    def prepare(self, *images: Image.Image, nearest: bool = False) -> list[Image.Image]:
        """Cut and resize pictures that belong together (same size, same cut); the first becomes RGB.

        Further ones, such as masks in mode L, keep their mode; padding is 0 there. With `nearest` they are resized
        without mixing values, as labels need.
        """
        first, *others = images
        planes = [to_rgb(first, self.alpha, self.background), *others]
        if any(plane.size != first.size for plane in planes):
            raise ValueError(f"pictures that belong together differ in size: {[plane.size for plane in planes]}")
        if self.crop == "pad":
            planes = [_pad_square(p, parse_colour(self.background) if p.mode == "RGB" else 0) for p in planes]
        elif self.crop in ("center", "random"):
            box = self.box(*first.size)
            planes = [plane.crop(box) for plane in planes]
        if self.size is None:
            return planes
        picture, *rest = planes
        size, filters = (self.size, self.size), INTERPOLATIONS[self.interpolation]
        return [picture.resize(size, filters)] + [
            p.resize(size, INTERPOLATIONS["nearest"] if nearest else filters) for p in rest
        ]

    def draw_flip(self) -> bool:
        """Decide whether to flip, with probability `flip_p`; always draws one number."""
        return torch.rand(1).item() < self.flip_p

    def finish(self, *images: Image.Image, flip: bool | None = None) -> list[Image.Image]:
        """Flip all pictures or none, as `flip` says or, without it, as drawn."""
        flip = self.draw_flip() if flip is None else flip
        return [ImageOps.mirror(image) for image in images] if flip else list(images)

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Return (left, top, right, bottom) of the centre or random cut from a picture of this size."""
        low, high = self.crop_fraction
        fraction = low if low == high else low + (high - low) * torch.rand(1).item()
        side = max(1, round(min(width, height) * fraction))
        if self.crop == "center":
            left, top = (width - side) // 2, (height - side) // 2
        else:
            left = int(torch.randint(width - side + 1, (1,)))
            top = int(torch.randint(height - side + 1, (1,)))
        return left, top, left + side, top + side


def _pad_square(image: Image.Image, fill: int | tuple[int, int, int]) -> Image.Image:
    side = max(image.size)
    canvas = Image.new(image.mode, (side, side), fill)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def _check_choice(option: str, value: str, known: Sequence[str] | dict[str, Image.Resampling]) -> None:
    if value not in known:
        raise ValueError(f"{option} '{value}' is not known; choose one of: {', '.join(known)}")
