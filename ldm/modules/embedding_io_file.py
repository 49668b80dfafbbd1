"""What every embedding format is read into and written from, and checked access to a file's tensors."""

from __future__ import annotations

import dataclasses
import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint_pickle import ITEM_SIZES, TensorMeta

MAX_FILE_BYTES = 64 << 20  # the largest sensible file, hundreds of words of many vectors, has a tenth of this
MAX_NUMBERS = MAX_FILE_BYTES // 2  # of all words together
MAX_VECTORS = 1024  # per word
MAX_WIDTH = 16384

# What a vector's width says about the text encoder that it belongs to.
WIDTHS = {
    384: "MiniLM",
    768: "Stable Diffusion 1.x (CLIP)",
    1024: "Stable Diffusion 2.x (OpenCLIP)",
    1280: "LDM (BERT)",
}


class EmbeddingFileError(ValueError):
    """A file holds no usable embeddings; the message names the file and says why."""


@dataclasses.dataclass
class EmbeddingFile:
    """Learned words, whatever file format they come from.

    vectors: placeholder -> float32 (n, D), D the same for all.
    token_ids: placeholder -> the vocabulary entry that it stands for, where the file says so.
    active: placeholder -> how many of its vectors are in use, where that is not all of them.
    init_words: placeholder -> the word that it started from, where the file says so.
    info: further scalars (step, name, ...).
    """

    vectors: dict[str, Tensor]
    token_ids: dict[str, int] = dataclasses.field(default_factory=dict)
    active: dict[str, int] = dataclasses.field(default_factory=dict)
    init_words: dict[str, str] = dataclasses.field(default_factory=dict)
    info: dict[str, str | int | float] = dataclasses.field(default_factory=dict)

    @property
    def width(self) -> int:
        """D of the vectors."""
        return next(iter(self.vectors.values())).shape[1]

    def renamed(self, names: Mapping[str, str]) -> EmbeddingFile:
        """The same words with `names` {old: new} applied; a new name has no token id, the old one's is not its own.

        Raises `EmbeddingFileError` for unknown or doubled names.
        """
        unknown = [old for old in names if old not in self.vectors]
        if unknown:
            raise EmbeddingFileError(f"cannot rename {unknown[0]!r}: the file's words are {some_words(self.vectors)}")
        new = [names.get(old, old) for old in self.vectors]
        if len(set(new)) != len(new):
            raise EmbeddingFileError(f"two words would have the same name: {some_words(new)}")
        parts = {
            field: {names.get(k, k): v for k, v in getattr(self, field).items()}
            for field in ("vectors", "active", "init_words")
        }
        token_ids = {k: v for k, v in self.token_ids.items() if names.get(k, k) == k}
        return EmbeddingFile(**parts, token_ids=token_ids, info=dict(self.info))


class Contents:
    """A file's nested `tree`, with a `TensorMeta` (or a tensor) for each tensor, and its header's `metadata`."""

    def __init__(
        self,
        path: Path,
        tree: Any,
        data: bytes | mmap.mmap = b"",
        starts: Mapping[str, int] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self.tree = tree
        self.metadata = dict(metadata or {})
        self._data = data
        self._starts = dict(starts or {})
        self._numbers = 0  # read so far

    def tensor(self, meta: TensorMeta) -> Tensor:
        """Read one tensor."""
        if any(n > MAX_FILE_BYTES for n in meta.shape) or len(meta.shape) > 2:
            raise EmbeddingFileError(f"it holds a tensor of shape {meta.shape}")
        dtype: torch.dtype = getattr(torch, meta.dtype)
        self._numbers += math.prod(meta.shape)
        if self._numbers > MAX_NUMBERS:  # tensors may repeat or share what the file holds
            raise EmbeddingFileError(f"its words have more than {MAX_NUMBERS:,} numbers in all")
        if 0 in meta.shape:
            return torch.empty(meta.shape, dtype=dtype)
        items = 1 + sum((n - 1) * s for n, s in zip(meta.shape, meta.stride, strict=True))
        start = self._starts[meta.storage.key] + meta.offset * ITEM_SIZES[meta.dtype]
        raw = bytearray(self._data[start : start + items * ITEM_SIZES[meta.dtype]])
        if len(raw) < items * ITEM_SIZES[meta.dtype]:
            raise EmbeddingFileError("it is cut off")
        return torch.frombuffer(raw, dtype=dtype).as_strided(meta.shape, meta.stride).contiguous()

    def vectors(self, value: Any) -> Tensor:
        """A word's vectors, float32 (n, D), checked; (D,) counts as one vector."""
        if isinstance(value, Tensor):
            return check_vectors(value)
        if not isinstance(value, TensorMeta):
            raise EmbeddingFileError("it holds something else where a word's vectors should be")
        return check_vectors(self.tensor(value))


def check_vectors(value: Tensor) -> Tensor:
    """`value` as finite float32 (n, D); raises `EmbeddingFileError` when it is no set of vectors."""
    if not value.is_floating_point():
        raise EmbeddingFileError(f"its vectors have the type {value.dtype}, not a floating-point one")
    if value.ndim == 1:
        value = value[None]
    if value.ndim != 2 or not (0 < value.shape[0] <= MAX_VECTORS and 0 < value.shape[1] <= MAX_WIDTH):
        raise EmbeddingFileError(f"a word's vectors have the shape {tuple(value.shape)}")
    value = value.detach().to("cpu", torch.float32)
    if not value.isfinite().all():
        raise EmbeddingFileError("its vectors contain infinite or undefined numbers")
    return value.contiguous()


def some_words(words: Any, most: int = 8) -> str:
    """The first words in quotes, for messages."""
    names = [repr(word) for word in words]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
