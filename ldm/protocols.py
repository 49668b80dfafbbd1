"""What the parts of the system need of one another, as structural types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Denoiser(Protocol):
    """What a sampler needs of a diffusion model.

    `apply_model(x, t, cond)` takes a noisy latent `x` (B, C, h, w), integer or float time steps `t` (B,) and a
    conditioning (None, a context tensor (B, L, D), or a dict with lists under `c_crossattn` / `c_concat`), and
    returns the raw network output (B, C, h, w), which `parameterization` says how to read: "eps", "x0" or "v".
    """

    num_timesteps: int
    parameterization: str

    @property
    def alphas_cumprod(self) -> Tensor:
        """Cumulative products of 1 - beta, float32 (T,)."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        ...

    def apply_model(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        """Raw network output (B, C, h, w)."""
        ...


@runtime_checkable
class TextEncoder(Protocol):
    """What the embedding manager needs of a text conditioner.

    The vocabulary table is never changed. A placeholder string is matched in the text before tokenising and stands
    in the token ids as the id that `placeholders` maps it to; ids outside the vocabulary are allowed there, since the
    embedding manager overwrites those rows.
    """

    embedding_dim: int
    max_length: int
    vocab_size: int
    end_token_id: int | None

    def tokenize(self, texts: Sequence[str], placeholders: Mapping[str, int] | None = None) -> Tensor:
        """Token ids, int64 (B, max_length), with start, end and padding tokens."""
        ...

    def word_ids(self, word: str) -> list[int]:
        """Token ids of `word` alone, without start, end and padding tokens."""
        ...

    def id_to_word(self, token_id: int) -> str:
        """Text of one vocabulary entry."""
        ...

    def embed(self, token_ids: Tensor) -> Tensor:
        """Rows of the vocabulary table (..., D), without positions; ids outside the vocabulary give zeros."""
        ...

    def encode(self, texts: Sequence[str], embedding_manager: Any = None) -> Tensor:
        """Conditioning sequence (B, L, D_context) of the texts."""
        ...
