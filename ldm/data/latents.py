"""First-stage moments written once and read many times, for training without running the first stage.

Layout of a folder: `moments.npy` (N, V, 2C, h, w), mean and log-variance of V versions of each picture (such as plain
and mirrored); `captions.jsonl`, one JSON list of captions a line; optionally `context.npy` (N, ...), such as text
embeddings; and `info.json`, written last, without which the folder is unfinished.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset

from ldm.data.folder import check_probability, drop_caption

INFO = "info.json"
MOMENTS = "moments.npy"
CONTEXT = "context.npy"
CAPTIONS = "captions.jsonl"


class LatentWriter:
    """Writes the folder that `PrecomputedLatents` reads; use it in a `with` block.

    `shape` is (2C, h, w). Until the block ends well the folder has no `info.json` and is refused by the reader.
    """

    def __init__(
        self,
        folder: str | Path,
        count: int,
        shape: Sequence[int],
        versions: int = 1,
        dtype: str = "float16",
        context_shape: Sequence[int] | None = None,
    ) -> None:
        if dtype not in ("float16", "float32"):
            raise ValueError(f"dtype '{dtype}' is not known; choose float16 or float32")
        self.folder = Path(folder)
        self.count = count
        self.dtype = dtype
        self.shape = (versions, *shape)
        self.context_shape = context_shape
        self.written = 0

    def add(
        self,
        moments: torch.Tensor | np.ndarray,  # (B, V, 2C, h, w), or (B, 2C, h, w) for one version
        captions: Sequence[str | Sequence[str]],  # B entries; of several captions one is drawn at random
        context: torch.Tensor | np.ndarray | None = None,  # (B, ...)
    ) -> None:
        """Append a batch."""
        values = _numpy(moments)
        values = values[:, None] if values.ndim == self.moments.ndim - 1 else values
        end = self.written + len(values)
        if end > self.count or len(captions) != len(values):
            room = self.count - self.written
            raise ValueError(f"{len(values)} moments and {len(captions)} captions, room for {room}")
        if (context is None) != (self.context is None):
            raise ValueError("context must be given with every batch if context_shape was given, else with none")
        self.moments[self.written : end] = values
        if context is not None and self.context is not None:
            self.context[self.written : end] = _numpy(context)
        for caption in captions:
            texts = [caption] if isinstance(caption, str) else list(caption)
            self.captions.write(json.dumps(texts, ensure_ascii=False) + "\n")
        self.written = end

    def __enter__(self) -> LatentWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / INFO).unlink(missing_ok=True)
        self.moments = _create(self.folder / MOMENTS, (self.count, *self.shape), self.dtype)
        self.context = None
        if self.context_shape is not None:
            self.context = _create(self.folder / CONTEXT, (self.count, *self.context_shape), self.dtype)
        self.captions = (self.folder / CAPTIONS).open("w", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.captions.close()
        self.moments.flush()
        if self.context is not None:
            self.context.flush()
        if kind is not None:
            return
        if self.written != self.count:
            raise ValueError(f"{self.folder}: {self.written} of {self.count} samples were written")
        info = {"samples": self.count, "context": self.context is not None}
        (self.folder / INFO).write_text(json.dumps(info) + "\n", encoding="utf-8")


class PrecomputedLatents(ConcatDataset):
    """Items are `moments` (2C, h, w) float32, `caption`, and `context` float32 where the folder has it.

    Several folders (a list as `data_root`) follow one another as one data set. Version and caption are drawn at random
    (numpy, `random`) where there are several. `LatentDiffusion` takes `moments` in place of the image.
    """

    def __init__(self, data_root: str | Path | Sequence[str | Path], caption_dropout: float = 0.0) -> None:
        roots = [data_root] if isinstance(data_root, (str, Path)) else list(data_root)
        if not roots:
            raise ValueError("data_root names no folder of latents")
        check_probability("caption_dropout", caption_dropout)
        folders = [_LatentFolder(Path(root), caption_dropout) for root in roots]
        if len({folder.has_context for folder in folders}) > 1:
            raise ValueError(f"of the folders {', '.join(map(str, roots))} some have {CONTEXT}, some have not")
        super().__init__(folders)


class _LatentFolder(Dataset):
    """One finished folder; its arrays are mapped, not read."""

    def __init__(self, folder: Path, caption_dropout: float) -> None:
        self.folder = folder
        self.caption_dropout = caption_dropout
        if not (folder / INFO).is_file():
            raise FileNotFoundError(
                f"{folder} has no {INFO}, so it is no finished folder of latents; write it with LatentWriter"
            )
        info = json.loads((folder / INFO).read_text(encoding="utf-8"))
        lines = (folder / CAPTIONS).read_text(encoding="utf-8").splitlines()
        self.captions: list[list[str]] = [json.loads(line) for line in lines]
        self.has_context = bool(info["context"])
        self._open: dict[str, np.ndarray] = {}
        counts = {info["samples"], len(self.captions), len(self._array(MOMENTS))}
        if len(counts) > 1:
            raise ValueError(f"{folder}: {MOMENTS}, {CAPTIONS} and {INFO} disagree on the number of samples")

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, i: int) -> dict[str, Any]:
        versions = self._array(MOMENTS)[i]
        version = np.random.randint(len(versions)) if len(versions) > 1 else 0
        texts = self.captions[i]
        text = texts[np.random.randint(len(texts))] if len(texts) > 1 else texts[0]
        item: dict[str, Any] = {
            "moments": versions[version].astype(np.float32),
            "caption": drop_caption(text, self.caption_dropout),
        }
        if self.has_context:
            item["context"] = self._array(CONTEXT)[i].astype(np.float32)
        return item

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a worker maps the file itself, instead of receiving a copy of it

    def _array(self, name: str) -> np.ndarray:
        if name not in self._open:
            self._open[name] = np.load(self.folder / name, mmap_mode="r")
        return self._open[name]


def _create(path: Path, shape: tuple[int, ...], dtype: str) -> np.memmap:
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape)


def _numpy(values: torch.Tensor | np.ndarray) -> np.ndarray:
    return values.detach().cpu().float().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
