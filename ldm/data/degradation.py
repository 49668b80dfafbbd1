"""From a picture to the low-resolution input of a super-resolution model."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from ldm.data.folder import ListedPictures
from ldm.data.image import ImageLoader, to_array
from ldm.util import did_you_mean

Degradation = Callable[[Image.Image], Image.Image]

# One filter each. The cv_ names are those of published configs; Pillow's filters serve them too.
FILTERS: dict[str, Image.Resampling] = {
    "cv_nearest": Image.Resampling.NEAREST,
    "cv_bilinear": Image.Resampling.BILINEAR,
    "cv_bicubic": Image.Resampling.BICUBIC,
    "cv_area": Image.Resampling.BOX,
    "cv_lanczos": Image.Resampling.LANCZOS,
    "pil_nearest": Image.Resampling.NEAREST,
    "pil_bilinear": Image.Resampling.BILINEAR,
    "pil_bicubic": Image.Resampling.BICUBIC,
    "pil_box": Image.Resampling.BOX,
    "pil_hamming": Image.Resampling.HAMMING,
    "pil_lanczos": Image.Resampling.LANCZOS,
}
# Chains of blur, shrinking, noise and JPEG in random order, after "Designing a Practical Degradation Model for Deep
# Blind Image Super-Resolution" (Zhang et al. 2021): (highest blur radius, highest noise in levels, lowest JPEG quality)
CHAINS: dict[str, tuple[float, float, int]] = {
    "bsrgan": (2.8, 25.0, 30),
    "bsrgan_light": (1.2, 8.0, 80),
}
SHRINK_FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.BOX)


def make_degradation(name: str, factor: int) -> Degradation:
    """Return a function that makes a picture `factor` times smaller in the way `name` says.

    Chains draw from `random` and numpy. Raises `ValueError` for an unknown name.
    """
    if factor < 1:
        raise ValueError(f"downscale_f must be at least 1, got {factor}")
    if name in FILTERS:
        return lambda image: image.resize(_smaller(image, factor), FILTERS[name])
    if name in CHAINS:
        return lambda image: _chain(image, factor, *CHAINS[name])
    known = [*FILTERS, *CHAINS]
    raise ValueError(f"degradation '{name}' is not known{did_you_mean(name, known)}; choose one of: {', '.join(known)}")


def _smaller(image: Image.Image, factor: int) -> tuple[int, int]:
    return max(1, image.width // factor), max(1, image.height // factor)


def _chain(image: Image.Image, factor: int, blur: float, noise: float, quality: int) -> Image.Image:
    target = _smaller(image, factor)
    steps: list[Degradation] = [
        lambda x: x.filter(ImageFilter.GaussianBlur(random.uniform(0.1, blur))),
        lambda x: x.resize(target, random.choice(SHRINK_FILTERS)),
        lambda x: _add_noise(x, random.uniform(0.5, noise)),
        lambda x: _jpeg(x, random.randint(quality, 95)),
    ]
    random.shuffle(steps)
    for step in steps:
        image = step(image)
    return _jpeg(image, random.randint(quality, 95))  # pictures found on the web were compressed last


def _add_noise(image: Image.Image, level: float) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    shape = values.shape if random.random() < 0.6 else (*values.shape[:2], 1)  # of each colour, or grey
    noisy = values + level * np.random.standard_normal(shape)
    return Image.fromarray(np.rint(np.clip(noisy, 0, 255)).astype(np.uint8))


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer, formats=("JPEG",)).convert("RGB")


class SuperResolutionPictures(ListedPictures):
    """Items are `image` (size, size, 3) and `LR_image`, `downscale_f` times smaller, both in [-1, 1].

    The picture is a square cut of a random share, between `min_crop_f` and `max_crop_f`, of the shorter side.
    """

    def __init__(
        self,
        size: int | None = None,
        degradation: str | None = None,  # a key of FILTERS or CHAINS
        downscale_f: int = 4,
        min_crop_f: float = 0.5,
        max_crop_f: float = 1.0,
        random_crop: bool = True,  # where the cut lies; else at the centre
        txt_file: str | Path | None = None,
        data_root: str | Path | None = None,
    ) -> None:
        if size is None or size % downscale_f:
            raise ValueError(f"size must be a multiple of downscale_f {downscale_f}, got {size}")
        self.degrade = make_degradation(degradation or "pil_bicubic", downscale_f)
        super().__init__(txt_file=txt_file, data_root=data_root)
        crop = "random" if random_crop else "center"
        self.loader = ImageLoader(
            size=size, crop=crop, interpolation="box", crop_fraction=(min_crop_f, max_crop_f), flip_p=0.0
        )

    def __getitem__(self, i: int) -> dict[str, Any]:
        image = self.loader.finish(*self.loader.prepare(self.loader.open(self.path(i))))[0]
        return {"image": to_array(image), "LR_image": to_array(self.degrade(image)), **self.facts(i)}
