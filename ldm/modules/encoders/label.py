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
        labels = batch if isinstance(batch, Tensor) else batch[key or self.key]
        return self.embedding(labels[:, None])  # (B, 1, D)
