"""LAION-style shards filtered by their metadata, with masks for inpainting, as the SD 2 inpainting config asks for.

Each sample has a picture (`jpg`), a caption (`txt`) and metadata (`json`: `original_width`, `original_height`,
`pwatermark`, `punsafe`). Items keep the names of the file endings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader

from ldm.data.datamodule import stream_loader
from ldm.data.image import open_image, to_array, to_rgb
from ldm.data.webdata import Raw, ShardStream, first_of, text_of
from ldm.util import did_you_mean, instantiate_from_config

# (side of the picture, largest number of boxes, of strokes, longest side of a box as share of the picture)
MASK_MODES: dict[str, tuple[int, int, int, float]] = {
    "256train": (256, 3, 4, 0.5),
    "256narrow": (256, 0, 8, 0.0),
    "512train": (512, 4, 5, 0.5),
    "512train-large": (512, 5, 6, 0.75),
}
SPLIT_KEYS = ("shards", "shuffle", "image_key", "image_transforms", "postprocess", "samples_per_epoch")


class AddMask:
    """Adds `mask` (H, W, 1), 1 where the picture is hidden, and `masked_image`, which is 0 there.

    With probability `p_drop` everything is hidden. Draws come from numpy's global generator.
    """

    def __init__(self, mode: str = "512train", p_drop: float = 0.0, image_key: str = "jpg") -> None:
        if mode not in MASK_MODES:
            known = ", ".join(MASK_MODES)
            raise ValueError(f"mode '{mode}' is not known{did_you_mean(mode, MASK_MODES)}; choose one of: {known}")
        self.mode = mode
        self.p_drop = p_drop
        self.image_key = image_key

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Return `sample` with the two keys added."""
        image = np.asarray(sample[self.image_key])
        height, width = image.shape[:2]
        if np.random.uniform() < self.p_drop:
            mask = np.ones((height, width, 1), dtype=np.float32)
        else:
            mask = random_mask(width, height, self.mode)[..., None]
        return {**sample, "mask": mask, "masked_image": (image * (mask < 0.5)).astype(np.float32)}


def random_mask(width: int, height: int, mode: str) -> np.ndarray:
    """Return (height, width) float32 of 0 and 1: random boxes and thick strokes, at least one of them."""
    side, max_boxes, max_strokes, longest = MASK_MODES[mode]
    draw = np.random.default_rng(np.random.randint(2**32, dtype=np.uint64))
    plane = Image.new("L", (width, height), 0)
    pen = ImageDraw.Draw(plane)
    size = np.array([width, height])
    boxes = int(draw.integers(0, max_boxes + 1)) if max_boxes else 0
    for _ in range(boxes):
        extent = np.maximum(1, draw.uniform(0.1, longest, 2) * size)
        corner = draw.uniform(0, 1, 2) * (size - extent)
        pen.rectangle([*corner, *(corner + extent)], fill=255)
    for _ in range(int(draw.integers(0 if boxes else 1, max_strokes + 1))):
        points = draw.uniform(0, 1, (int(draw.integers(2, 6)), 2)) * size
        thickness = max(1, int(draw.uniform(10, 60) * max(width, height) / side))
        pen.line([tuple(point) for point in points], fill=255, width=thickness, joint="curve")
    return (np.asarray(plane) > 127).astype(np.float32)


class WebDataModuleFromConfig(pl.LightningDataModule):
    """Train, validation and test loaders over filtered shards.

    `train` and the others are mappings with `shards` (patterns, below `tar_base` if given), `shuffle`, `image_key`,
    `image_transforms` (configs of transforms of a PIL picture), `postprocess` (config of a function of the item) and
    `samples_per_epoch` (see `ldm.data.webdata` for what it does for resuming).
    """

    def __init__(
        self,
        tar_base: str | None,
        batch_size: int,
        train: Mapping[str, Any] | None = None,
        validation: Mapping[str, Any] | None = None,
        test: Mapping[str, Any] | None = None,
        num_workers: int = 4,
        multinode: bool = True,  # False: each process reads all shards
        min_size: int | None = None,  # shortest side of the original picture, in pixels
        max_pwatermark: float = 1.0,  # highest probability of a watermark
        p_unsafe_threshold: float | None = None,  # highest probability of unsafe content
        filter_word_list: str | None = None,  # YAML or text file of words; captions that hold one are left out
        seed: int = 23,
    ) -> None:
        super().__init__()
        self.tar_base = tar_base
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.multinode = multinode
        self.splits = {
            name: dict(split)
            for name, split in (("train", train), ("validation", validation), ("test", test))
            if split is not None
        }
        for name, split in self.splits.items():
            for key in split:
                if key not in SPLIT_KEYS:
                    raise ValueError(f"{name} has no '{key}'{did_you_mean(key, SPLIT_KEYS)}; it takes: {SPLIT_KEYS}")
        self.select = MetadataFilter(min_size, max_pwatermark, p_unsafe_threshold, filter_word_list)
        self.seed = seed
        self.datasets: dict[str, ShardStream] = {}

    def setup(self, stage: str | None = None) -> None:
        """Find the shards of every split."""
        self.select.read_words()
        for name, split in self.splits.items():
            if name not in self.datasets:
                self.datasets[name] = self._stream(split)

    def train_dataloader(self) -> DataLoader:
        """Return the loader that follows the trainer's progress."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader:
        """Return the validation loader."""
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader:
        """Return the test loader."""
        return self._loader("test")

    def _stream(self, split: Mapping[str, Any]) -> ShardStream:
        shards = [split["shards"]] if isinstance(split["shards"], str) else list(split["shards"])
        if self.tar_base is not None:
            shards = [f"{self.tar_base.rstrip('/')}/{shard}" for shard in shards]
        decode = Decoder(split.get("image_key", "jpg"), split.get("image_transforms") or [], split.get("postprocess"))
        shuffle, length = split.get("shuffle", 0), split.get("samples_per_epoch")
        return ShardStream(shards, decode, self.select, shuffle, length, self.seed, on_error="skip")

    def _loader(self, name: str) -> DataLoader:
        if name not in self.splits:
            raise ValueError(f"there is no '{name}' part in this data module; it has: {', '.join(self.splits)}")
        if name not in self.datasets:
            self.setup()
        trainer = self.trainer if self.multinode else None
        options = {"num_workers": self.num_workers, "generator": torch.Generator().manual_seed(self.seed)}
        return stream_loader(self.datasets[name], self.batch_size, trainer, follow=name == "train", options=options)


class Decoder:
    """Makes {image key: (H, W, 3) in [-1, 1], "txt": caption} of an undecoded sample."""

    def __init__(self, image_key: str, transforms: Sequence[Any], postprocess: Any = None) -> None:
        self.image_key = image_key
        self.transforms = [instantiate_from_config(transform) for transform in transforms]
        self.postprocess = instantiate_from_config(postprocess) if postprocess else None

    def __call__(self, raw: Raw) -> dict[str, Any]:
        """Decode one sample. Raises `ValueError` for a damaged or missing picture."""
        image = to_rgb(open_image(first_of(raw, self.image_key)))
        for transform in self.transforms:
            image = transform(image)
        item = {self.image_key: to_array(image), "txt": text_of(raw, "txt")}
        return self.postprocess(item) if self.postprocess else item


class MetadataFilter:
    """Says which samples take part by their `json` metadata; one without a needed value does not."""

    def __init__(
        self, min_size: int | None, max_pwatermark: float, p_unsafe_threshold: float | None, word_list: str | None
    ) -> None:
        self.min_size = min_size
        self.max_pwatermark = max_pwatermark
        self.p_unsafe_threshold = p_unsafe_threshold
        self.word_list = word_list
        self.words: list[str] = []

    def read_words(self) -> None:
        """Read the word list. Raises `FileNotFoundError` where it is missing."""
        if self.word_list is None or self.words:
            return
        path = Path(self.word_list)
        if not path.is_file():
            raise FileNotFoundError(
                f"filter_word_list {path} is missing; it is a YAML list of words (or lists under names), and null "
                "switches the filter off"
            )
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
        words = content if isinstance(content, list) else [w for group in content.values() for w in group]
        self.words = [str(word).lower() for word in words]

    def __call__(self, raw: Raw) -> bool:
        """Whether `raw` takes part."""
        if self.words:
            caption = raw.get("txt", b"").decode("utf-8", errors="replace").lower()
            if any(word in caption for word in self.words):
                return False
        if self.min_size is None and self.max_pwatermark >= 1.0 and self.p_unsafe_threshold is None:
            return True
        return self._metadata_pass(raw)

    def _metadata_pass(self, raw: Raw) -> bool:
        try:
            facts = json.loads(raw.get("json", b"{}"))
            sides = [float(facts.get("original_width") or 0), float(facts.get("original_height") or 0)]
            if self.min_size is not None and min(sides) < self.min_size:
                return False
            if self.max_pwatermark < 1.0 and float(facts["pwatermark"]) > self.max_pwatermark:
                return False
            return self.p_unsafe_threshold is None or float(facts["punsafe"]) <= self.p_unsafe_threshold
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
