"""CelebA-HQ and FFHQ faces: list files of pictures, also of arrays as `.npy` files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.data.folder import ListedPictures
from ldm.data.image import to_array


class FacesBase(ListedPictures):
    """Items are `image` and the paths; `.npy` files hold one 8-bit picture as (1, 3, H, W), (3, H, W) or (H, W, 3)."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        path = self.path(i)
        image = _array_image(path) if path.suffix == ".npy" else self.loader.open(path)
        return {"image": to_array(self.loader.finish(*self.loader.prepare(image))[0]), **self.facts(i)}


class CelebAHQTrain(FacesBase):
    """CelebA-HQ, training part."""

    list_file = "data/celebahqtrain.txt"
    default_root = "data/celebahq"


class CelebAHQValidation(FacesBase):
    """CelebA-HQ, validation part."""

    list_file = "data/celebahqvalidation.txt"
    default_root = "data/celebahq"
    split = "validation"


class FFHQTrain(FacesBase):
    """FFHQ, training part."""

    list_file = "data/ffhqtrain.txt"
    default_root = "data/ffhq"


class FFHQValidation(FacesBase):
    """FFHQ, validation part."""

    list_file = "data/ffhqvalidation.txt"
    default_root = "data/ffhq"
    split = "validation"


def _array_image(path: Path) -> Image.Image:
    try:
        array = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path} is not a plain array file") from error
    shape = array.shape
    array = array[0] if array.ndim == 4 and array.shape[0] == 1 else array
    array = array.transpose(1, 2, 0) if array.ndim == 3 and array.shape[0] == 3 else array
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"{path} holds {array.dtype} of shape {shape}; a face is uint8, (1, 3, H, W) or (H, W, 3)")
    return Image.fromarray(array)
