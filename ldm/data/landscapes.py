"""Landscape pictures with a map of what each pixel shows, for semantic synthesis.

Layout below `data_root`: pictures as listed (or in `train/`, `validation/`), and for `train/a/b.jpg` the map
`segmentations/train/a/b.png`, one 8-bit label a pixel, of the picture's size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.folder import ListedPictures
from ldm.data.image import open_image, to_array


class RFWBase(ListedPictures):
    """Items are `image` and `segmentation` (H, W, n_labels), one-hot, cut and flipped alike."""

    default_root = "data/rfw"

    def __init__(
        self,
        size: int | None = None,
        crop_size: int | None = None,
        segmentation_to_float32: bool = False,  # else int64
        n_labels: int = 182,
        shift_segmentation: bool = False,  # label 255, "not labelled", becomes 0 and label k becomes k + 1
        interpolation: str = "bicubic",
        flip_p: float | None = None,
        crop: str | None = None,
        txt_file: str | Path | None = None,
        data_root: str | Path | None = None,
    ) -> None:
        super().__init__(size, crop_size, interpolation, flip_p, crop, txt_file, data_root)
        self.n_labels = n_labels
        self.shift = int(shift_segmentation)
        self.dtype = np.float32 if segmentation_to_float32 else np.int64

    def __getitem__(self, i: int) -> dict[str, Any]:
        image = self.loader.open(self.path(i))
        path = (self.root / "segmentations" / self.names[i]).with_suffix(".png")
        if not path.is_file():
            raise FileNotFoundError(f"{self.path(i)} lacks its label map {path}")
        plane = open_image(path)
        if plane.mode not in ("L", "P") or plane.size != image.size:
            raise ValueError(f"{path} is {plane.mode} of {plane.size}; a label map is 8-bit, here of {image.size}")
        planes = self.loader.finish(*self.loader.prepare(image, plane, nearest=True))
        labels = np.asarray(planes[1], dtype=np.uint8) + np.uint8(self.shift)  # 255 + 1 wraps round to 0
        if labels.max() >= self.n_labels:
            raise ValueError(f"{path} has label {labels.max()}, n_labels is {self.n_labels}")
        one_hot = np.eye(self.n_labels, dtype=self.dtype)[labels]
        return {"image": to_array(planes[0]), "segmentation": one_hot, **self.facts(i)}


class RFWTrain(RFWBase):
    """Training part: cut at random places, flipped at random."""

    list_file = "data/rfw_train.txt"
    random_crop = True
    default_flip_p = 0.5


class RFWValidation(RFWBase):
    """Validation part: cut at the centre."""

    list_file = "data/rfw_validation.txt"
    split = "validation"
