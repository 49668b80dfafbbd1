"""Open Images: pictures alone, pairs for super-resolution, and pictures with the boxes of the objects in them.

Layout below `data_root` (data/openimages): pictures in `train/` and `validation/`. For boxes also, as published with
the data: `class-descriptions-boxable.csv` (no header: label name, human name) and `train-annotations-bbox.csv`,
`validation-annotations-bbox.csv` (columns ImageID, LabelName, XMin, XMax, YMin, YMax).
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ImageOps

from ldm.data.degradation import SuperResolutionPictures
from ldm.data.folder import ListedPictures
from ldm.data.image import INTERPOLATIONS, to_array, to_rgb

Box = tuple[float, float, float, float]  # left, top, right, bottom, as shares of width and height
ROOT = "data/openimages"


class FullOpenImagesTrain(ListedPictures):
    """All training pictures, cut at random places."""

    list_file = "data/openimages_train.txt"
    default_root = ROOT
    default_size = 384
    random_crop = True


class FullOpenImagesValidation(ListedPictures):
    """All validation pictures, cut at the centre."""

    list_file = "data/openimages_validation.txt"
    default_root = ROOT
    split = "validation"
    default_size = 384


class SuperresOpenImagesAdvancedTrain(SuperResolutionPictures):
    """Training pictures with degraded small versions."""

    list_file = FullOpenImagesTrain.list_file
    default_root = ROOT


class SuperresOpenImagesAdvancedValidation(SuperResolutionPictures):
    """Validation pictures with degraded small versions."""

    list_file = FullOpenImagesValidation.list_file
    default_root = ROOT
    split = "validation"


class LayoutTokens:
    """Writes a layout as 3 tokens an object (class, top left corner, bottom right corner) and 2 for the picture's cut.

    A corner is one token: its place on a grid of isqrt(n_tokens) x isqrt(n_tokens). Absent objects are filled with
    the last token. 30 objects give the 92 tokens of the published layout-to-image model.
    """

    def __init__(self, n_tokens: int = 8192, max_objects: int = 30) -> None:
        self.none = n_tokens - 1
        self.sections = math.isqrt(n_tokens)
        self.max_objects = max_objects

    def __call__(self, objects: Iterable[tuple[int, Box]], cut: Box) -> torch.Tensor:
        """Return (3 * max_objects + 2,) int64."""
        tokens = [token for label, box in list(objects)[: self.max_objects] for token in (label, *self.corners(box))]
        tokens += [self.none] * (3 * self.max_objects - len(tokens))
        return torch.tensor([*tokens, *self.corners(cut)], dtype=torch.long)

    def corners(self, box: Box) -> tuple[int, int]:
        """Tokens of the top left and the bottom right corner."""
        return self._corner(box[0], box[1]), self._corner(box[2], box[3])

    def _corner(self, x: float, y: float) -> int:
        top = self.sections - 1
        return round(min(max(x, 0.0), 1.0) * top) + round(min(max(y, 0.0), 1.0) * top) * self.sections


class OpenImagesBBoxBase(ListedPictures):
    """Items are `image` and `coordinates_bbox`, the layout as tokens; boxes follow the cut and the flip.

    Objects smaller than `min_object_area` (share of the cut) are left out; the largest come first.
    """

    default_root = ROOT

    def __init__(
        self,
        size: int | None = None,
        n_tokens: int = 8192,
        max_objects: int = 30,
        min_object_area: float = 0.00001,
        flip_p: float | None = None,
        txt_file: str | Path | None = None,
        data_root: str | Path | None = None,
    ) -> None:
        super().__init__(size, flip_p=flip_p, txt_file=txt_file, data_root=data_root)
        self.tokens = LayoutTokens(n_tokens, max_objects)
        self.min_object_area = min_object_area
        self.categories = _read_categories(self.root / "class-descriptions-boxable.csv")
        self.boxes = _read_boxes(self.root / f"{self.split}-annotations-bbox.csv", self.categories)

    def __getitem__(self, i: int) -> dict[str, Any]:
        image = to_rgb(self.loader.open(self.path(i)))
        width, height = image.size
        left, top, right, bottom = self.loader.box(width, height)
        cut = (left / width, top / height, right / width, bottom / height)
        image = image.crop((left, top, right, bottom))
        if self.loader.size is not None:
            image = image.resize((self.loader.size,) * 2, INTERPOLATIONS[self.loader.interpolation])
        flip = torch.rand(1).item() < self.loader.flip_p
        objects = [(label, _within(box, cut, flip)) for label, box in self.boxes.get(self.path(i).stem, [])]
        objects = [(label, box) for label, box in objects if _area(box) >= self.min_object_area]
        objects.sort(key=lambda item: -_area(item[1]))
        image = ImageOps.mirror(image) if flip else image
        return {"image": to_array(image), "coordinates_bbox": self.tokens(objects, cut), **self.facts(i)}


class OpenImagesBBoxTrain(OpenImagesBBoxBase):
    """Training part: cut at random places, flipped at random."""

    list_file = "data/openimages_bbox_train.txt"
    random_crop = True
    default_flip_p = 0.5


class OpenImagesBBoxValidation(OpenImagesBBoxBase):
    """Validation part: cut at the centre."""

    list_file = "data/openimages_bbox_validation.txt"
    split = "validation"


def _within(box: Box, cut: Box, flip: bool) -> Box:
    """Express `box` in shares of `cut`, clipped to it; a box outside gets no area."""
    xs = np.clip((np.array([box[0], box[2]]) - cut[0]) / (cut[2] - cut[0]), 0.0, 1.0)
    ys = np.clip((np.array([box[1], box[3]]) - cut[1]) / (cut[3] - cut[1]), 0.0, 1.0)
    left, right = (1.0 - xs[1], 1.0 - xs[0]) if flip else (xs[0], xs[1])
    return float(left), float(ys[0]), float(right), float(ys[1])


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _read_categories(path: Path) -> dict[str, int]:
    """Return the index of each label name, in the order of the file."""
    _require(path)
    with path.open(encoding="utf-8", newline="") as file:
        names = [row[0] for row in csv.reader(file) if row]
    return {name: i for i, name in enumerate(names)}


def _read_boxes(path: Path, categories: dict[str, int]) -> dict[str, list[tuple[int, Box]]]:
    """Return (label index, box) of each object by picture id."""
    _require(path)
    boxes: dict[str, list[tuple[int, Box]]] = defaultdict(list)
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                box = (float(row["XMin"]), float(row["YMin"]), float(row["XMax"]), float(row["YMax"]))
                boxes[row["ImageID"]].append((categories[row["LabelName"]], box))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: {error!r}; see the layout in {__name__}") from error
    return dict(boxes)


def _require(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; boxes need it (see the layout in {__name__})")
