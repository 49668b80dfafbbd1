"""Class labels as conditioning."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class ClassEmbedder(nn.Module):
    """A learned vector for each class.

    embed_dim: width of the vectors.
    n_classes: number of classes.
    key: where a batch holds the labels.
    """

    def __init__(self, embed_dim: int, n_classes: int = 1000, key: str = "class") -> None:
        super().__init__()
        self.key = key
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, batch: Mapping[str, Tensor] | Tensor, key: str | None = None) -> Tensor:
        """One-token conditioning (B, 1, D) of a batch that holds labels (B,) under `key`, or of the labels."""
        key = key or self.key
        if not isinstance(batch, Tensor) and key not in batch:
            raise ValueError(f"the batch has no '{key}'; it has {sorted(batch)}: set the class embedder's key")
        labels = batch if isinstance(batch, Tensor) else batch[key]
        try:
            return self.embedding(labels[:, None])  # (B, 1, D)
        except IndexError as error:
            raise ValueError(
                f"class labels from {int(labels.min())} to {int(labels.max())} for n_classes "
                f"{self.embedding.num_embeddings}: they must lie from 0 to {self.embedding.num_embeddings - 1}"
            ) from error
