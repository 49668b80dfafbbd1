"""Pictures from folders and list files: the base of all data sets that are lists of files, and the two general ones."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ldm.data.captions import METADATA_NAMES, read_captions, read_metadata
from ldm.data.image import IMAGE_SUFFIXES, Colour, ImageLoader


class PictureList(Dataset):
    """Pictures at `root / name`; items are `image` (H, W, 3) in [-1, 1], the two paths, and a value of each label."""

    def __init__(
        self,
        root: str | Path,
        names: Sequence[str],
        loader: ImageLoader,
        labels: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        super().__init__()
        self.root = Path(root)
        self.names = list(names)
        self.loader = loader
        self.labels = dict(labels or {})
        wrong = {key: len(values) for key, values in self.labels.items() if len(values) != len(self.names)}
        if wrong:
            raise ValueError(f"{len(self.names)} pictures, but labels of other lengths: {wrong}")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"image": self.loader.load(self.path(i)), **self.facts(i)}

    def path(self, i: int) -> Path:
        """File of picture `i`."""
        return self.root / self.names[i]

    def facts(self, i: int) -> dict[str, Any]:
        """Everything of item `i` but its image."""
        paths = {"relative_file_path_": self.names[i], "file_path_": str(self.path(i))}
        return paths | {key: values[i] for key, values in self.labels.items()}


class ListedPictures(PictureList):
    """Base of the data sets under published names: a list file and a folder, with published places for both.

    The list file has one path a line, relative to `data_root`. Without it the pictures are searched for in
    `data_root/<split>`. A subclass sets the class attributes.
    """

    list_file: str
    default_root: str
    split = "train"  # train | validation
    default_size: int | None = None
    default_flip_p = 0.0
    random_crop = False

    def __init__(
        self,
        size: int | None = None,  # side of the result; with crop_size: of the shorter side before the cut
        crop_size: int | None = None,  # side of the square cut out after resizing
        interpolation: str = "bicubic",
        flip_p: float | None = None,
        crop: str | None = None,  # stretch | center | random | pad
        txt_file: str | Path | None = None,
        data_root: str | Path | None = None,
    ) -> None:
        root, names = self.find(txt_file, data_root)
        super().__init__(root, names, self._make_loader(size, crop_size, interpolation, flip_p, crop))

    def find(self, txt_file: str | Path | None, data_root: str | Path | None) -> tuple[Path, list[str]]:
        """Return the root folder and the names of the pictures."""
        root = Path(data_root or self.default_root)
        return root, list_or_scan(Path(txt_file or self.list_file), root, self.split, type(self).__name__)

    def _make_loader(
        self, size: int | None, crop_size: int | None, interpolation: str, flip_p: float | None, crop: str | None
    ) -> ImageLoader:
        size = size or self.default_size
        fraction = 1.0
        if crop_size is not None:
            size = size or crop_size
            if crop_size > size:
                raise ValueError(f"crop_size {crop_size} is larger than size {size}, the side that it is cut from")
            fraction = crop_size / size
        return ImageLoader(
            size=crop_size or size,
            crop=crop or ("random" if self.random_crop else "center"),
            interpolation=interpolation,
            flip_p=self.default_flip_p if flip_p is None else flip_p,
            crop_fraction=(fraction, fraction),
        )


class ImageFolder(PictureList):
    """Sub-folders are classes: items have `class_label` (index by sorted folder name) and `human_label` (the name)."""

    def __init__(
        self,
        data_root: str | Path,
        size: int | None = None,
        crop: str = "center",  # stretch | center | random | pad
        interpolation: str = "bicubic",
        flip_p: float = 0.0,
        alpha: str = "composite",
        background: Colour = "white",
    ) -> None:
        names = [name for name in scan_images(data_root) if "/" in name]
        if not names:
            raise ValueError(f"{data_root} has no pictures in sub-folders; each class needs a folder, named after it")
        folders = [name.split("/")[0] for name in names]
        self.classes = sorted(set(folders))
        index = {folder: i for i, folder in enumerate(self.classes)}
        labels: dict[str, list[Any]] = {"class_label": [index[folder] for folder in folders], "human_label": folders}
        loader = ImageLoader(
            size=size, crop=crop, interpolation=interpolation, flip_p=flip_p, alpha=alpha, background=background
        )
        super().__init__(data_root, names, loader, labels)


class CaptionedImageFolder(PictureList):
    """Pictures with a `caption`: from `name.txt` beside it, a line of `metadata.jsonl` or `.csv`, or the file name.

    A metadata file has `file_name` (relative to the folder) and `text` for each picture, and then it decides which
    pictures belong to the set.
    """

    def __init__(
        self,
        data_root: str | Path,
        size: int | None = None,
        crop: str = "center",  # stretch | center | random | pad
        interpolation: str = "bicubic",
        flip_p: float = 0.0,
        alpha: str = "composite",
        background: Colour = "white",
        metadata: str | Path | None = None,  # a .jsonl or .csv file elsewhere
        caption_dropout: float = 0.0,  # share of captions replaced by "", for classifier-free guidance
    ) -> None:
        root = Path(data_root)
        names = scan_images(root)
        file = _metadata_file(root, metadata)
        if file is not None:
            names = _listed(names, [name for name, _ in read_metadata(file)], file)
        found = read_captions(root, [root / name for name in names], file)
        captions = [found.get(name, caption_from_name(name)) for name in names]  # an empty caption is one too
        loader = ImageLoader(
            size=size, crop=crop, interpolation=interpolation, flip_p=flip_p, alpha=alpha, background=background
        )
        super().__init__(root, names, loader, {"caption": captions})
        self.caption_dropout = check_probability("caption_dropout", caption_dropout)

    def facts(self, i: int) -> dict[str, Any]:
        """Paths and caption; the caption is dropped at random where asked for."""
        return super().facts(i) | {"caption": drop_caption(self.labels["caption"][i], self.caption_dropout)}


def drop_caption(caption: str, probability: float) -> str:
    """Return `caption`, or "" with the given probability (no number is drawn at probability 0)."""
    return "" if probability > 0 and random.random() < probability else caption


def check_probability(option: str, value: float) -> float:
    """Return `value`; raise `ValueError` when it is no probability."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{option} is a probability between 0 and 1, got {value}")
    return value


def caption_from_name(name: str) -> str:
    """Return the words of a file name: `cats/red_cat-2.png` gives "red cat 2"."""
    return " ".join(Path(name).stem.replace("_", " ").replace("-", " ").split())


def scan_images(folder: str | Path) -> list[str]:
    """Return the pictures below `folder` as sorted relative paths with forward slashes, by file suffix.

    Hidden files and folders are left out. Raises `FileNotFoundError` or `ValueError` where nothing is found.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; data_root names the folder that holds the pictures")
    names = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        kept = (f for f in files if os.path.splitext(f)[1].lower() in IMAGE_SUFFIXES and not f.startswith("."))
        names += [Path(parent, file).relative_to(folder).as_posix() for file in kept]
    if not names:
        raise ValueError(f"{folder} holds no picture ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return sorted(names)


def list_or_scan(list_file: Path, root: Path, split: str, owner: str) -> list[str]:
    """Return the paths in `list_file`; without that file those of the pictures below `root/<split>`.

    Raises `FileNotFoundError` that says which layout `owner` expects.
    """
    if list_file.is_file():
        names = [line.strip() for line in list_file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not names:
            raise ValueError(f"{list_file} is empty; it needs one path a line, relative to {root}")
        return names
    folders = (split, "val") if split == "validation" else (split,)
    for folder in folders:
        if (root / folder).is_dir():
            return [f"{folder}/{name}" for name in scan_images(root / folder)]
    raise FileNotFoundError(
        f"{owner} found no data: it expects either {list_file}, with one path a line relative to {root}, or pictures "
        f"in {root / split}; put them there, or give `data_root` (and `txt_file`)"
    )


def _metadata_file(root: Path, metadata: str | Path | None) -> Path | None:
    if metadata is not None:
        return Path(metadata)
    return next((root / name for name in METADATA_NAMES if (root / name).is_file()), None)


def _listed(present: list[str], listed: list[str], file: Path) -> list[str]:
    missing = sorted(set(listed) - set(present))
    if missing:
        raise FileNotFoundError(
            f"{file} lists {len(missing)} pictures that are not there, such as {missing[0]}; file_name is relative to "
            "the data folder"
        )
    if not listed:
        raise ValueError(f"{file} has no rows; it needs 'file_name' and 'text' for each picture")
    return listed
