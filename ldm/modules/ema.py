"""Exponential moving average of a module's weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class LitEma(nn.Module):
    """Keeps a moving average of the parameters of `model` that require gradients at construction.

    The averages are buffers under the parameters' names without dots, as published checkpoints have them. With
    `use_num_upates` (spelt as published) the decay of update n (from 1) is min(decay, (1 + n) / (10 + n)), so that
    early averages follow the weights closely.
    """

    decay: Tensor
    num_updates: Tensor

    def __init__(self, model: nn.Module, decay: float = 0.9999, use_num_upates: bool = True) -> None:
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"EMA decay is {decay}; it must lie between 0 and 1")
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0 if use_num_upates else -1, dtype=torch.int32))
        self.buffer_names: dict[str, str] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                short = name.replace(".", "")
                if short in self._buffers:
                    raise ValueError(f"parameter '{name}' has the same name without dots as another one")
                self.buffer_names[name] = short
                self.register_buffer(short, parameter.detach().clone())
        self._stored: list[Tensor] = []

    def _pairs(self, model: nn.Module) -> Iterator[tuple[Tensor, nn.Parameter]]:
        parameters = dict(model.named_parameters())
        for name, short in self.buffer_names.items():
            yield self._buffers[short], parameters[name]  # type: ignore[misc]

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Move the averages one step towards the weights of `model`."""
        # On tensors throughout: a Python `if` would make the host wait for the accelerator at every step.
        counting = self.num_updates >= 0
        self.num_updates += counting
        warm_up = (1 + self.num_updates) / (10 + self.num_updates)
        weight = 1.0 - torch.where(counting, torch.minimum(self.decay, warm_up), self.decay)
        for average, parameter in self._pairs(model):
            average.lerp_(parameter.to(average), weight.to(average.dtype))

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the weights of `model` with the averages."""
        for average, parameter in self._pairs(model):
            parameter.copy_(average)

    @torch.no_grad()
    def store(self, parameters: Iterable[nn.Parameter]) -> None:
        """Remember `parameters` until `restore`."""
        self._stored = [p.clone() for p in parameters]

    @torch.no_grad()
    def restore(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give back the values of the last `store`; pass the same parameters in the same order."""
        for saved, parameter in zip(self._stored, parameters, strict=True):
            parameter.copy_(saved)
        self._stored = []

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Run a block with the averages in place of the weights of `model`, and give the weights back after it."""
        tracked = [parameter for _, parameter in self._pairs(model)]
        self.store(tracked)
        self.copy_to(model)
        try:
            yield
        finally:
            self.restore(tracked)
