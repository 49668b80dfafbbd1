"""Pictures of one concept with captions that hold its placeholder: the data set of textual inversion.

Folder layout: pictures at the top level of `data_root`. Beside a picture `cat.png` may lie `cat_mask.png` (white is the
subject; see `masks`) and `cat.txt` (its caption); `metadata.jsonl` may hold captions as
`{"file_name": ..., "text": ...}` lines.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ldm.data.captions import read_captions, read_text
from ldm.data.image import IMAGE_SUFFIXES, Colour, ImageLoader, alpha_plane, open_image, open_mask, to_array
from ldm.data.masks import SIDE_CARS, find_masks, mask_of_each, visible_files
from ldm.data.seeding import seeded
from ldm.data.templates import (
    TEMPLATE_SETS,
    imagenet_dual_templates_small,
    imagenet_templates_small,
    imagenet_templates_smallest,
    per_img_token_list,
)

__all__ = [
    "PersonalizedBase",
    "find_images",
    "imagenet_dual_templates_small",
    "imagenet_templates_small",
    "imagenet_templates_smallest",
    "per_img_token_list",
]

log = logging.getLogger(__name__)

MASKS = ("auto", "alpha", "file")
FULL_CHECK_LIMIT = (
    200  # up to so many files each is decoded at the start, so that a damaged one is named before training
)
CACHE_BYTES = 256 * 2**20  # prepared pictures kept in memory, where they never change and all fit


class PersonalizedBase(Dataset):
    """Items are `image` (H, W, 3) float32 in [-1, 1], `caption`, and with `masks` also `loss_mask` (H, W) in [0, 1].

    Item i shows picture i modulo their number. The caption is a random template with the placeholder filled in; with
    `per_image_tokens` it takes, with probability `mixing_prob`, a template with a second word that belongs to the
    single picture (paper, Section 5 "Per-image tokens"). Draws come from `random`, numpy and torch, as published,
    unless `seed` ties them to the item. Once `moments` (N, 2, 2C, h, w) is set, what the first stage makes of each
    picture and of its mirror image, items also have their picture's `moments` (2C, h, w) (see `moments_cache`).
    """

    template_set = "object"

    def __init__(
        self,
        data_root: str | Path,
        size: int | None = None,
        repeats: int = 100,  # epoch length in passes over the pictures; only with set="train"
        interpolation: str = "bicubic",
        flip_p: float = 0.5,
        set: str = "train",
        placeholder_token: str = "*",
        per_image_tokens: bool = False,
        center_crop: bool = False,  # published spelling of crop="center"
        mixing_prob: float = 0.25,
        coarse_class_text: str | None = None,  # goes before the placeholder: "dog" gives "a photo of a dog *"
        crop: str | None = None,  # stretch (default) | center | random | pad
        alpha: str = "composite",  # composite | drop
        background: Colour = "white",  # behind transparent pixels and in padding
        templates: str | Path | Sequence[str] | None = None,  # a name in TEMPLATE_SETS, a text file, or the sentences
        captions: str | Path | None = None,  # "sidecar", or the path of a .jsonl or .csv file, instead of templates
        masks: str | None = None,  # auto (file, else alpha, else all ones) | alpha | file
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if center_crop and crop not in (None, "center"):
            raise ValueError(f"center_crop=True contradicts crop='{crop}'; set only one of them")
        if masks not in (None, *MASKS):
            raise ValueError(f"masks '{masks}' is not known; choose one of: {', '.join(MASKS)}, or leave it unset")
        self.loader = ImageLoader(
            size=size,
            crop=crop or ("center" if center_crop else "stretch"),
            interpolation=interpolation,
            flip_p=flip_p,
            alpha=alpha,
            background=background,
        )
        self.data_root = Path(data_root)
        self.image_paths = find_images(self.data_root, warn=set == "train")
        self.num_images = len(self.image_paths)
        if per_image_tokens and self.num_images > len(per_img_token_list):
            raise ValueError(
                f"per_image_tokens has words for {len(per_img_token_list)} pictures, but {self.data_root} holds "
                f"{self.num_images}; use fewer pictures or per_image_tokens=False"
            )
        if repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {repeats}")
        self._length = self.num_images * (repeats if set == "train" else 1)
        self.placeholder_token = placeholder_token
        self.coarse_class_text = coarse_class_text
        self.per_image_tokens = per_image_tokens
        self.mixing_prob = mixing_prob
        self.masks = masks
        self.mask_paths = self._find_masks()
        self.seed = seed
        self.templates, self.dual_templates = resolve_templates(templates, self.template_set)
        self.captions = None if captions is None else self._read_captions(captions)
        self.moments: np.ndarray | None = None
        self._cache: dict[int, list[Image.Image]] = {}
        self._missed: list[Path] = []  # whose subject a random cut left out
        self._keeps_images = self.loader.is_deterministic and size is not None
        self._keeps_images &= self.num_images * (size or 0) ** 2 * (4 if masks else 3) <= CACHE_BYTES

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < self._length:
            raise IndexError(f"item {i} of {self._length}")
        index = i % self.num_images
        with contextlib.nullcontext() if self.seed is None else seeded(self.seed, i):
            caption = self.caption(i)
            planes = self._prepared(index)
            flip = self.loader.draw_flip()
        image, *mask = self.loader.finish(*planes, flip=flip)
        item = {"image": to_array(image), "caption": caption}
        if mask:
            item["loss_mask"] = np.asarray(mask[0], dtype=np.float32) / 255.0
        if self.moments is not None:
            item["moments"] = self.moments[index, int(flip)]
        return item

    def version(self, index: int, flip: bool) -> np.ndarray:
        """Return picture `index`, mirrored or not, as items show it, (H, W, 3); only where no cut is drawn."""
        return to_array(self.loader.finish(*self._prepared(index)[:1], flip=flip)[0])

    def caption(self, i: int) -> str:
        """Draw a caption for item `i` (or return the picture's own, where captions were given)."""
        index = i % self.num_images
        if self.captions is not None:
            return self.captions[index]
        word = (
            f"{self.coarse_class_text} {self.placeholder_token}" if self.coarse_class_text else self.placeholder_token
        )
        # The draw from numpy happens only with per-image tokens: seeded caption sequences depend on it.
        if self.per_image_tokens and np.random.uniform() < self.mixing_prob:
            return random.choice(self.dual_templates).format(word, per_img_token_list[index])
        return random.choice(self.templates).format(word)

    def _prepared(self, index: int) -> list[Image.Image]:
        if index in self._cache:
            return self._cache[index]
        image = self.loader.open(self.image_paths[index])
        if self.masks is None:
            planes = self.loader.prepare(image)
        else:
            planes = self.loader.prepare(image, self._mask(image, index))
            self._check_cut(planes[1], self.image_paths[index])
        if self._keeps_images:
            self._cache[index] = planes
        return planes

    def _mask(self, image: Image.Image, index: int) -> Image.Image:
        """Return the subject of picture `index` as a plane of its size; all white where nothing marks it."""
        path = self.mask_paths.get(self.image_paths[index])
        if path is not None:
            mask = open_mask(path)
            if mask.size != image.size:
                raise ValueError(f"{path} has {mask.size} pixels, its picture {image.size}; make them the same")
            return self._not_empty(mask, path)
        plane = alpha_plane(image) if self.masks in ("auto", "alpha") else None
        return (plane and self._not_empty(plane, self.image_paths[index])) or Image.new("L", image.size, 255)

    @staticmethod
    def _not_empty(mask: Image.Image, path: Path) -> Image.Image:
        if mask.getbbox() is None:
            raise ValueError(f"{path}: the mask is black all over, so nothing of the picture would count")
        return mask

    def _find_masks(self) -> dict[Path, Path]:
        """Return the mask file of each picture that has one, where such files are asked for."""
        if self.masks not in ("auto", "file"):
            return {}
        found = mask_of_each(visible_files(self.data_root))
        if self.masks == "file" and not any(path in found for path in self.image_paths):
            raise ValueError(
                f"masks=file, but no picture in {self.data_root} has a mask; put one beside it, such as "
                f"{self.image_paths[0].stem}_mask.png, white where the subject is, or leave `masks` unset"
            )
        return found

    def _check_cut(self, mask: Image.Image, path: Path) -> None:
        """Warn, or raise where each cut is the same, when a picture's mask, as cut and resized, is black all over."""
        if mask.getbbox() is not None:
            return
        lost = f"{path}: crop={self.loader.crop} at size={self.loader.size} leaves nothing of what its mask shows white"
        remedy = "use crop=pad, or cut the picture so that its subject is in the middle and large enough"
        if self.loader.is_deterministic:
            raise ValueError(f"{lost}, so nothing of the picture would count; {remedy}")
        if path not in self._missed:
            log.warning("%s in some cuts, which count for nothing; %s", lost, remedy)
            self._missed.append(path)

    def _read_captions(self, captions: str | Path) -> list[str]:
        """Return one caption per picture, each checked for the placeholder (`{}` in a caption stands for it)."""
        found = read_captions(self.data_root, self.image_paths, None if captions == "sidecar" else Path(captions))
        missing = [path.name for path in self.image_paths if path.name not in found]
        if missing:
            raise ValueError(
                f"no caption for {', '.join(missing)} in {self.data_root}; add a .txt file of the same name or a line "
                "in metadata.jsonl, or leave `captions` unset to use templates"
            )
        texts = [found[path.name].replace("{}", self.placeholder_token) for path in self.image_paths]
        for path, text in zip(self.image_paths, texts, strict=True):
            if self.placeholder_token not in text:
                raise ValueError(
                    f"the caption of {path.name}, '{text}', lacks the placeholder '{self.placeholder_token}', so the "
                    "word would learn nothing from it; put the placeholder (or {}) where the concept is named"
                )
        return texts


def find_images(folder: Path, warn: bool = True) -> list[Path]:
    """Return the pictures at the top level of `folder`, by name; whatever else lies there is listed in one message.

    Masks (`cat_mask.png` beside `cat.png`; see `masks`), captions and hidden files are left out silently.
    Raises `FileNotFoundError` when there is no such folder, `ValueError` when it holds no picture.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; data_root names the folder that holds the pictures")
    files = visible_files(folder)
    full_check = len(files) <= FULL_CHECK_LIMIT
    images, skipped = [], []
    masks = find_masks(files)
    for path in files:
        if path in masks:
            continue
        problem = _problem(path, full_check)
        if problem is None:
            images.append(path)
        elif path.suffix.lower() not in SIDE_CARS:
            skipped.append(f"{path.name} ({problem})")
    if not images:
        found = f"only {', '.join(skipped)}" if skipped else "no file"
        inside = [path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
        hint = (
            f"; it has folders ({', '.join(sorted(inside)[:3])}): --concepts learns a word for each" if inside else ""
        )
        raise ValueError(f"{folder} holds no picture that can be read, {found}; put JPEG or PNG files there{hint}")
    if skipped:
        log.log(logging.WARNING if warn else logging.INFO, "%s: skipped %s", folder, ", ".join(skipped))
    return images


def _problem(path: Path, full_check: bool) -> str | None:
    if path.suffix.lower() in SIDE_CARS:
        return "not a picture"
    if not full_check:
        return None if path.suffix.lower() in IMAGE_SUFFIXES else "not a picture by its name"
    try:
        open_image(path)
    except ValueError as error:
        return str(error).removeprefix(str(path)).strip(" :")
    return None


def resolve_templates(templates: str | Path | Sequence[str] | None, default: str) -> tuple[list[str], list[str]]:
    """Return (templates, templates with a second word) for what a config gives as `templates`.

    Raises `ValueError` for a sentence without exactly one `{}` and for a name that is neither a set nor a file.
    """
    if templates is None:
        return TEMPLATE_SETS[default]
    if isinstance(templates, (str, Path)):
        if str(templates) in TEMPLATE_SETS:
            return TEMPLATE_SETS[str(templates)]
        path = Path(templates)
        if not path.is_file():
            raise ValueError(
                f"templates '{templates}' is neither a file nor one of: {', '.join(TEMPLATE_SETS)}; a template file "
                "has one sentence per line with {} for the placeholder"
            )
        templates = read_text(path).splitlines()
    wrong = [line for line in templates if not isinstance(line, str)]
    if wrong:
        raise ValueError(f"templates are sentences such as 'a photo of a {{}}', not {wrong[0]!r}")
    sentences = [line.strip() for line in templates if line.strip()]
    if not sentences:
        raise ValueError("templates has no sentence; give at least one, such as 'a photo of a {}'")
    for sentence in sentences:
        if sentence.count("{}") != 1 or "{" in sentence.replace("{}", "") or "}" in sentence.replace("{}", ""):
            raise ValueError(
                f"the template '{sentence}' needs exactly one {{}}, and no other brace, for the placeholder"
            )
    return sentences, [f"{sentence} with {{}}" for sentence in sentences]
