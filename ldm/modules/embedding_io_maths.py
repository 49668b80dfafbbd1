"""Computing with learned words: what a file holds in numbers, between two words, sums of words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.modules.embedding_io_file import EmbeddingFile, EmbeddingFileError, some_words

MODES = ("linear", "spherical")


def pick(words: EmbeddingFile, name: str | None = None) -> tuple[str, Tensor]:
    """One word of a file and its vectors in use (n, D); without `name` the file must hold just one."""
    if name is None and len(words.vectors) > 1:
        raise EmbeddingFileError(f"it holds {some_words(words.vectors)}: say which word")
    name = next(iter(words.vectors)) if name is None else name
    if name not in words.vectors:
        raise EmbeddingFileError(f"it has no word {name!r}, only {some_words(words.vectors)}")
    return name, words.vectors[name][: words.active.get(name)]


def interpolate(a: Tensor, b: Tensor, weight: float, mode: str = "linear") -> Tensor:
    """Vectors (n, D) on the way from `a` (`weight` 0) to `b` (`weight` 1), or beyond them.

    "spherical" turns the direction evenly and changes the length evenly; "linear" takes the straight line, which is
    shorter in between.
    """
    if mode not in MODES:
        raise EmbeddingFileError(f"mode {mode!r} is unknown; choose one of {', '.join(MODES)}")
    a, b = _matched([a, b])
    if mode == "linear":
        return a + weight * (b - a)
    lengths = torch.lerp(_length(a), _length(b), weight)  # (n, 1)
    u, v = a / _length(a), b / _length(b)
    angle = torch.atan2(_length(u - v) / 2, _length(u + v) / 2) * 2  # (n, 1), exact for small angles too
    turned = (torch.sin((1 - weight) * angle) * u + torch.sin(weight * angle) * v) / torch.sin(angle)
    straight = u + weight * (v - u)
    return lengths * torch.where(torch.sin(angle) < 1e-6, straight, turned)  # (n, D)


def combine(terms: Sequence[tuple[float, Tensor]]) -> Tensor:
    """Weighted sum (n, D) of vectors; a word of one vector counts for each vector of the others."""
    if not terms:
        raise EmbeddingFileError("there is nothing to add")
    vectors = _matched([vectors for _, vectors in terms])
    return sum(weight * part for (weight, _), part in zip(terms, vectors, strict=True))  # type: ignore[return-value]


def cancel_out(terms: Sequence[tuple[float, Tensor]], total: Tensor) -> bool:
    """Whether one of the vectors of `total` (n, D), the sum of the `terms`, is 0 but for rounding."""
    largest = max(abs(weight) * float(vectors.norm(dim=-1).max()) for weight, vectors in terms)
    return bool((total.norm(dim=-1) <= 1e-6 * largest).any())


def with_length(vectors: Tensor, like: Tensor) -> Tensor:
    """`vectors` (n, D), each as long as the one of `like` (n or 1, D)."""
    vectors, like = _matched([vectors, like])
    return vectors / _length(vectors) * _length(like)


def _length(vectors: Tensor) -> Tensor:
    """Lengths (n, 1), never 0."""
    return vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def _matched(parts: Sequence[Tensor]) -> list[Tensor]:
    """The vectors with equal n; raises `EmbeddingFileError` when n or D do not go together."""
    widths = sorted({part.shape[1] for part in parts})
    if len(widths) > 1:
        raise EmbeddingFileError(f"words of different models cannot be joined: their vectors have widths {widths}")
    counts = sorted({len(part) for part in parts} - {1})
    if len(counts) > 1:
        raise EmbeddingFileError(f"the words have {' and '.join(map(str, counts))} vectors: give words of one number")
    count = counts[0] if counts else 1
    return [part.expand(count, -1) for part in parts]
