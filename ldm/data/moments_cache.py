"""Running the first stage once per picture instead of once per step.

Mean and variance of a picture's latents never change; only the sample that a training step draws from them does. So
where a picture has no more than two versions, plain and mirrored, both are encoded before the first step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ldm.data.concepts import ConceptMix
from ldm.data.datamodule import WrappedDataset
from ldm.data.personalized import PersonalizedBase

# Pictures (B, H, W, 3) in [-1, 1] to moments (B, 2C, h, w); None where the first stage has no moments.
Encode = Callable[[np.ndarray], "np.ndarray | None"]


def concepts_of(dataset: Any) -> list[PersonalizedBase]:
    """Return the data sets of single concepts that `dataset` consists of; [] for data of another kind."""
    if isinstance(dataset, WrappedDataset):
        return concepts_of(dataset.data)
    if isinstance(dataset, ConceptMix):
        return [part for inner in dataset.datasets for part in concepts_of(inner)]
    return [dataset] if isinstance(dataset, PersonalizedBase) else []


def obstacle(dataset: PersonalizedBase) -> str | None:
    """Say why the pictures of `dataset` cannot be encoded beforehand; None when they can."""
    if not dataset.loader.is_deterministic:
        return f"crop '{dataset.loader.crop}' shows another part of a picture each time"
    if dataset.loader.size is None:
        return "pictures keep their own sizes (`size` is not set)"
    return None


def cache_moments(dataset: PersonalizedBase, encode: Encode, max_bytes: int) -> bool:
    """Encode every version of every picture and let items carry the result; False where that is not possible.

    One picture is encoded at a time: a training batch needs more memory than that in any case.
    """
    flips = [flip for flip in (False, True) if dataset.loader.flip_p != (0.0 if flip else 1.0)]
    cached: np.ndarray | None = None
    for index in range(dataset.num_images):
        for flip in flips:
            moments = encode(dataset.version(index, flip)[None])
            if moments is None:
                return False
            if cached is None:
                if dataset.num_images * len(flips) * moments.nbytes > max_bytes:
                    return False
                cached = np.zeros((dataset.num_images, 2, *moments.shape[1:]), dtype=np.float32)
            cached[index, int(flip)] = moments[0]
    dataset.moments = cached
    return True
