"""ImageNet: pictures with class labels, and pairs for super-resolution.

Layout below `data_root`: `data/<synset>/*.JPEG`, or the same without `data/`. Optional files there: `filelist.txt` (one
path a line, relative to the folder that holds the synsets) and `synset_human.txt` (`n01440764 tench, Tinca tinca`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.data.degradation import SuperResolutionPictures
from ldm.data.folder import PictureList, scan_images
from ldm.data.image import ImageLoader
from ldm.util import did_you_mean

DEFAULTS: dict[str, Any] = {
    "size": 256,
    "random_crop": False,
    "flip_p": 0.0,
    "sub_indices": None,  # classes to keep, such as "0-9,20"
    "keep_orig_class_label": False,  # with sub_indices: labels as in the full set, else counted anew from 0
}


def default_root(name: str) -> Path:
    """Where the published code keeps ImageNet: below the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "autoencoders" / "data" / name


class ImageNetBase(PictureList):
    """Items are `image`, `class_label` (index by sorted synset), `synsets`, `human_label` and the paths."""

    folder_name: str

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        data_root: str | Path | None = None,
        process_images: bool = True,  # False leaves `image` out
    ) -> None:
        for key in config or {}:
            if key not in DEFAULTS:
                known = ", ".join(DEFAULTS)
                raise ValueError(f"config has no '{key}'{did_you_mean(key, DEFAULTS)}; it takes: {known}")
        options = {**DEFAULTS, **(config or {})}
        base = Path(data_root) if data_root else default_root(self.folder_name)
        root, names = imagenet_files(base, type(self).__name__)
        synsets = sorted({name.split("/")[0] for name in names})
        kept = parse_indices(options["sub_indices"], len(synsets))
        renumber = options["sub_indices"] is not None and not options["keep_orig_class_label"]
        index = {synsets[old]: new if renumber else old for new, old in enumerate(kept)}
        names = [name for name in names if name.split("/")[0] in index]
        human = _human_labels(base)
        of = [name.split("/")[0] for name in names]
        labels: dict[str, list[Any]] = {
            "class_label": [index[synset] for synset in of],
            "synsets": of,
            "human_label": [human.get(synset, synset) for synset in of],
        }
        crop = "random" if options["random_crop"] else "center"
        super().__init__(root, names, ImageLoader(options["size"], crop, flip_p=options["flip_p"]), labels)
        self.process_images = process_images

    def __getitem__(self, i: int) -> dict[str, Any]:
        return super().__getitem__(i) if self.process_images else self.facts(i)


class ImageNetTrain(ImageNetBase):
    """The training part of ILSVRC 2012."""

    folder_name = "ILSVRC2012_train"


class ImageNetValidation(ImageNetBase):
    """The validation part of ILSVRC 2012, sorted into folders by synset."""

    folder_name = "ILSVRC2012_validation"


class ImageNetSR(SuperResolutionPictures):
    """ImageNet pictures with degraded small versions; options as `SuperResolutionPictures`."""

    folder_name: str

    def __init__(
        self,
        size: int | None = None,
        degradation: str | None = None,
        downscale_f: int = 4,
        min_crop_f: float = 0.5,
        max_crop_f: float = 1.0,
        random_crop: bool = True,
        data_root: str | Path | None = None,
    ) -> None:
        base = Path(data_root) if data_root else default_root(self.folder_name)
        self.found = imagenet_files(base, type(self).__name__)
        super().__init__(size, degradation, downscale_f, min_crop_f, max_crop_f, random_crop, data_root=self.found[0])

    def find(self, txt_file: str | Path | None, data_root: str | Path | None) -> tuple[Path, list[str]]:
        """All pictures of all synsets."""
        return self.found


class ImageNetSRTrain(ImageNetSR):
    """Pairs from the training part."""

    folder_name = ImageNetTrain.folder_name


class ImageNetSRValidation(ImageNetSR):
    """Pairs from the validation part."""

    folder_name = ImageNetValidation.folder_name


def imagenet_files(base: Path, owner: str) -> tuple[Path, list[str]]:
    """Return the folder that holds the synset folders, and the pictures' paths relative to it."""
    root = base / "data" if (base / "data").is_dir() else base
    if not root.is_dir():
        raise FileNotFoundError(
            f"{owner} found no data: it expects {base}/data/<synset>/*.JPEG (or {base}/<synset>/*.JPEG); put the "
            "pictures there, or give `data_root`"
        )
    file = base / "filelist.txt"
    names = file.read_text(encoding="utf-8").split() if file.is_file() else scan_images(root)
    names = [name for name in names if "/" in name]
    if not names:
        raise ValueError(f"{root} has no pictures in sub-folders; each synset needs a folder, named after it")
    return root, names


def parse_indices(text: str | int | None, count: int) -> list[int]:
    """Return the indices that text such as "0-9,20" names; all below `count` for None."""
    if text is None:
        return list(range(count))
    indices: list[int] = []
    for part in str(text).replace(" ", "").split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise ValueError(f"sub_indices '{text}' is not a list of numbers and ranges such as '0-9,20'")
        indices += range(int(first), int(last or first) + 1)
    if not indices or max(indices) >= count:
        raise ValueError(f"sub_indices '{text}' goes past the {count} classes found, which count from 0")
    return indices


def _human_labels(base: Path) -> dict[str, str]:
    file = base / "synset_human.txt"
    if not file.is_file():
        return {}
    rows = (line.split(" ", 1) for line in file.read_text(encoding="utf-8").splitlines() if " " in line)
    return {synset: text.strip() for synset, text in rows}
