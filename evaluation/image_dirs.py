"""Folders of pictures as tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.data.image import IMAGE_SUFFIXES, ImageLoader
from ldm.data.personalized import find_images


def load_images(paths: Iterable[str | Path], size: int | None = None, crop: str = "stretch") -> Tensor:
    """Pictures (N, 3, H, W) in [-1, 1]; with `size` all are made square of that many pixels.

    crop: "stretch" is what training does to them, "center" cuts out the middle. Raises `ValueError` when the sizes
    differ and no common one is asked for.
    """
    loader = ImageLoader(size=size, crop=crop, flip_p=0.0)
    pictures = [torch.from_numpy(loader.load(path)).permute(2, 0, 1) for path in paths]
    if not pictures:
        raise ValueError("there is no picture to load")
    sizes = {tuple(picture.shape[1:]) for picture in pictures}
    if len(sizes) > 1:
        raise ValueError(f"the pictures are of {len(sizes)} sizes: give the size to make them")
    return torch.stack(pictures)  # (N, 3, H, W)


def load_folder(folder: str | Path, size: int | None = None, count: int | None = None) -> Tensor:
    """Pictures (N, 3, H, W) in [-1, 1] of a folder in the order of their names, the first `count` of them."""
    return load_images(find_images(Path(folder))[:count], size)


def concept_folders(folder: str | Path, names: Sequence[str] | None = None) -> list[Path]:
    """The folders of single concepts in `folder`, by name; all of them or those named.

    A folder that holds pictures itself is one concept. Raises `FileNotFoundError` for what is not there, `ValueError`
    when there are pictures both in the folder and in folders in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; it should hold one folder of pictures for each concept")
    subfolders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if names is not None:
        missing = [name for name in names if not (folder / name).is_dir()]
        if missing:
            raise FileNotFoundError(f"there is no concept '{missing[0]}' in {folder}")
        return [folder / name for name in names]
    own = _holds_pictures(folder)
    inner = [path.name for path in subfolders if _holds_pictures(path)]
    if own and inner:
        raise ValueError(
            f"{folder} holds pictures and folders of pictures ({', '.join(inner[:3])}): one concept is a folder "
            "without the latter, several are folders without pictures beside them; or name those that you mean"
        )
    if own or not subfolders:
        find_images(folder)
        return [folder]
    return subfolders


def _holds_pictures(folder: Path) -> bool:
    return any(
        path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() and not path.name.startswith(".")
        for path in folder.iterdir()
    )
