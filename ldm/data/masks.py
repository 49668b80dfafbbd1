"""Which files of a folder are masks, and of which picture: `cat_mask.png` belongs to `cat.jpg`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ldm.data.image import IMAGE_SUFFIXES

MASK_SUFFIX = "_mask"
SIDE_CARS = frozenset({".txt", ".jsonl", ".csv", ".yaml"})  # these lie beside pictures and are none


def visible_files(folder: Path) -> list[Path]:
    """The files at the top level of `folder`, by name, without hidden ones."""
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def has_mask_name(path: Path) -> bool:
    """Whether a file is named as masks are, whatever its capitals."""
    return path.stem.lower().endswith(MASK_SUFFIX) and path.suffix.lower() not in SIDE_CARS


def find_masks(files: Sequence[Path]) -> dict[Path, list[Path]]:
    """{mask: the files it belongs to} for the masks among the `files` of one folder.

    Suffixes and capitals do not count, nor whether the other file is of a kind that can be read: beside `cat.heic`,
    too, `cat_mask.png` is no picture of the concept. A file of such a name without another one is a picture.
    """
    by_stem: dict[str, list[Path]] = {}
    for path in files:
        if path.suffix.lower() not in SIDE_CARS:
            by_stem.setdefault(path.stem.lower(), []).append(path)
    found = {}
    for mask in filter(has_mask_name, files):
        stem = mask.stem[: -len(MASK_SUFFIX)]
        alike = by_stem.get(stem.lower(), [])
        if alike:  # where `cat.png` and `Cat.png` are two pictures, each has its own
            found[mask] = [path for path in alike if path.stem == stem] or alike
    return found


def mask_of_each(files: Sequence[Path]) -> dict[Path, Path]:
    """{file: its mask} for those of the `files` of one folder that have one; of several, a PNG goes first."""

    def rank(mask: Path) -> tuple[bool, bool, str]:
        return mask.suffix.lower() != ".png", mask.suffix.lower() not in IMAGE_SUFFIXES, mask.name

    chosen: dict[Path, Path] = {}
    for mask, pictures in sorted(find_masks(files).items(), key=lambda pair: rank(pair[0])):
        for picture in pictures:
            chosen.setdefault(picture, mask)
    return chosen
