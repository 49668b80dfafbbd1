"""Small tensors under names that users choose, which `nn.ParameterDict` only takes if they suit Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn


class NamedVectors(nn.Module):
    """Float32 vectors under arbitrary names, trainable or not; `half()` and the like leave their precision alone.

    The names are the state dict's keys, as in the published `ParameterDict`. Only a "." cannot be part of a key: it
    is written "%2E" there.
    """

    def __init__(self, trainable: bool) -> None:
        super().__init__()
        self._trainable = trainable
        self._key_of: dict[str, str] = {}

    @property
    def _store(self) -> dict[str, Any]:
        # Written directly, since `register_parameter` refuses names that a module's attributes have ("keys").
        return self._parameters if self._trainable else self._buffers

    def __contains__(self, name: str) -> bool:
        return name in self._key_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._key_of)

    def __len__(self) -> int:
        return len(self._key_of)

    def __getitem__(self, name: str) -> Tensor:
        """Vectors (n, D) of one name."""
        return self._store[self._key_of[name]]

    def __setitem__(self, name: str, value: Tensor) -> None:
        value = value.detach().float()
        if name in self and self[name].shape == value.shape and self[name].device == value.device:
            with torch.no_grad():  # optimisers keep hold of the parameter
                self[name].copy_(value)
            return
        odd = "." in name or "%2" in name
        key = self._key_of.setdefault(name, name.replace("%", "%25").replace(".", "%2E") if odd else name)
        self._store[key] = nn.Parameter(value.clone()) if self._trainable else value.clone()

    def __delitem__(self, name: str) -> None:
        del self._store[self._key_of.pop(name)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move_only, recurse)
        return self
