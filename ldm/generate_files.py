"""Writing pictures: PNG with the settings that made them, grids, file names that every system takes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from ldm.checkpoint import atomic_path
from ldm.data.image import open_image
from ldm.generate_checks import is_unicode

SETTINGS_KEY = "ldm-settings"  # PNG text chunk that holds the settings as JSON
LONGEST_SLUG = 80
RESERVED_ON_WINDOWS = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Pictures (B, C, H, W) in [-1, 1] as 8-bit levels (B, H, W, C): rounded and clipped; not-a-number is black."""
    levels = (images.detach().float().nan_to_num(nan=-1.0).clamp(-1, 1) + 1) * 127.5
    return levels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, C)


def require_finite(images: torch.Tensor) -> None:
    """Raise ValueError for pictures with infinite or undefined levels, which would be written as black."""
    if not images.isfinite().all():
        raise ValueError("the picture has infinite or undefined numbers: take a lower --scale, or --precision full")


def require_folder(path: str | Path) -> None:
    """Raise OSError, in one sentence, where files could not be written to the folder `path`, which may be missing."""
    path = Path(path)
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"cannot write to {path}: {there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write to {path}: {there} may not be written to")


def slug(text: str) -> str:
    """A file name part made of `text`: lower case, words joined by hyphens, safe on Windows too; "sample" if empty."""
    plain = unicodedata.normalize("NFC", text).lower()
    words = "-".join(re.findall(r"[^\W_]+", plain))[:LONGEST_SLUG]
    words = words.encode()[: 2 * LONGEST_SLUG].decode(errors="ignore").strip("-")  # systems count bytes
    if not words:
        return "sample"
    return f"{words}-" if words in RESERVED_ON_WINDOWS else words


def save_png(image: np.ndarray, path: str | Path, settings: Mapping[str, Any] | None = None) -> Path:
    """Write a picture (H, W, 3) uint8 with its `settings` in the metadata; never leaves half a file."""
    info = PngImagePlugin.PngInfo()
    if settings is not None:
        text = json.dumps(dict(settings), ensure_ascii=False)
        # paths may hold bytes that are no UTF-8
        info.add_itxt(SETTINGS_KEY, text if is_unicode(text) else json.dumps(dict(settings)))
    with atomic_path(path) as temporary:
        Image.fromarray(image).save(temporary, format="PNG", pnginfo=info)
    return Path(path)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that `save_png` put in a PNG file.

    Raises ValueError when the file holds none (programs that edit or upload pictures drop them).
    """
    text = getattr(open_image(path), "info", {}).get(SETTINGS_KEY)
    try:
        settings = json.loads(text) if text else None
    except (ValueError, RecursionError):  # no JSON, numbers of thousands of digits, brackets in brackets without end
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings: only PNG files that were written here, unedited, have them")
    return settings


def file_hash(path: str | Path) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def save_images(images: np.ndarray, folder: str | Path, settings: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write pictures (N, H, W, 3) uint8 to `folder`, named by prompt and seed; returns the paths.

    `settings[k]` goes into the metadata of picture k; its `prompt` (or `class_label`) and `seed` make the name. A file
    of that name that was made with other settings is kept: the new one gets a number.
    """
    paths = []
    for image, values in zip(images, settings, strict=True):
        subject = values.get("prompt") or (f"class-{values['class_label']}" if "class_label" in values else "")
        stem = f"{slug(subject)}_{values['seed']}" if "seed" in values else slug(subject)
        path = free_path(Path(folder) / f"{stem}.png", values)
        paths.append(save_png(image, path, values))
    return paths


def free_path(path: Path, settings: Mapping[str, Any]) -> Path:
    """`path`, or with -2, -3, ... before its suffix, that is free or holds a picture of the same settings."""
    wanted = json.loads(json.dumps(dict(settings)))
    candidate, number = path, 1
    while candidate.exists():
        try:
            if read_settings(candidate) == wanted:
                break
        except ValueError:
            pass
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")
    return candidate


@contextlib.contextmanager
def open_npz(path: str | Path, count: int) -> Iterator[Callable[[np.ndarray], None]]:
    """Write `count` pictures to an `.npz` file as its `arr_0` (count, H, W, 3) uint8, without holding them in memory.

    The block gets a function that takes the next pictures (b, H, W, 3). The file appears when all are written.
    """
    written = 0
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as entry:

            def append(images: np.ndarray) -> None:
                nonlocal written
                if written == 0:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *images.shape[1:])}
                    np.lib.format.write_array_header_1_0(entry, header)
                entry.write(np.ascontiguousarray(images, dtype=np.uint8).tobytes())
                written += len(images)

            yield append
        if written != count:
            raise ValueError(f"{path} was to hold {count} pictures, got {written}")


def make_grid(images: np.ndarray, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """One picture (H', W', 3) of pictures (N, H, W, 3) in rows of `columns` (default: about square)."""
    count, height, width, channels = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    canvas = np.full(
        (rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, dtype=np.uint8
    )  # white between the pictures
    for k, image in enumerate(images):
        top, left = gap + k // columns * (height + gap), gap + k % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def save_grid(
    images: np.ndarray, path: str | Path, columns: int | None = None, settings: Mapping[str, Any] | None = None
) -> Path:
    """Write pictures (N, H, W, 3) uint8 as one PNG; see `make_grid`."""
    return save_png(make_grid(images, columns), path, settings)
