"""Several concepts at once: one data set of pictures for each, one word for each, in mixed batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ldm.util import instantiate_from_config


class ConceptMix(Dataset):
    """Items of several data sets in turn, so that shuffled batches mix the concepts evenly, whatever their sizes.

    `dataset` is the config of one concept's data set (`PersonalizedBase`); it is built once for each folder of
    `data_roots` with the word of `placeholder_tokens` that belongs to it.
    """

    def __init__(
        self, dataset: Mapping[str, Any], data_roots: Sequence[str | Path], placeholder_tokens: Sequence[str]
    ) -> None:
        super().__init__()
        if not data_roots or len(data_roots) != len(placeholder_tokens):
            raise ValueError(f"{len(data_roots)} data_roots but {len(placeholder_tokens)} placeholder_tokens")
        doubled = [word for word in placeholder_tokens if list(placeholder_tokens).count(word) > 1]
        if doubled:
            raise ValueError(f"two concepts have the word '{doubled[0]}': each needs its own")
        if (dataset.get("params") or {}).get("per_image_tokens"):
            raise ValueError("per_image_tokens name the pictures of one concept: set it to false for several concepts")
        self.datasets = [
            instantiate_from_config(dataset, data_root=root, placeholder_token=word)
            for root, word in zip(data_roots, placeholder_tokens, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.datasets) * max(map(len, self.datasets))

    def __getitem__(self, i: int) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(f"item {i} of {len(self)}")
        number, concept = divmod(i, len(self.datasets))
        dataset = self.datasets[concept]
        return dataset[number % len(dataset)]
