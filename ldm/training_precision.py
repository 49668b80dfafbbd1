"""Sixteen-bit weights for models that do not train themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import pytorch_lightning as pl
from pytorch_lightning.plugins.precision import HalfPrecision
from torch import Tensor, nn

HALF: tuple[Literal["bf16-true"], Literal["16-true"]] = ("bf16-true", "16-true")
LOSS_SCALE = 2.0**10  # keeps float16 gradients of a mean over many latents away from zero


class HalfWeights(HalfPrecision):
    """Keeps the frozen weights in 16 bits; what is drawn, summed or learned stays in float32.

    Inputs, noise, latents, loss, learned vectors and their optimiser do not change type: the modules cast what they
    are given, and see to it that their vectors and schedules are not converted. In float16 the loss is multiplied by
    a constant on its way back, and the gradients of the vectors are divided by it.
    """

    def __init__(self, precision: Literal["bf16-true", "16-true"]) -> None:
        super().__init__(precision)
        self.loss_scale = LOSS_SCALE if precision == "16-true" else 1.0

    @contextlib.contextmanager
    def forward_context(self) -> Iterator[None]:
        """Leave torch's default type alone, unlike the parent: noise would be drawn in 16 bits."""
        yield

    def convert_input(self, data: Any) -> Any:
        """Leave batches as they are."""
        return data

    def connect(self, model: nn.Module, optimizers: Any, lr_schedulers: Any) -> tuple[nn.Module, Any, Any]:
        """Undo the loss scale where a gradient arrives."""
        for parameter in model.parameters():
            if parameter.requires_grad and self.loss_scale != 1.0:
                parameter.register_hook(lambda gradient: gradient / self.loss_scale)
        return super().connect(model, optimizers, lr_schedulers)

    def pre_backward(self, tensor: Tensor, module: pl.LightningModule) -> Tensor:  # type: ignore[override]
        """Scale the loss."""
        return super().pre_backward(tensor * self.loss_scale, module)


def use_half_weights(options: dict[str, Any], model: pl.LightningModule) -> None:
    """Replace `precision: bf16-true` or `16-true` among the Trainer's options by `HalfWeights`.

    Raises `ValueError` when the weights are to train.
    """
    precision = options.get("precision")
    if precision not in HALF:
        return
    if not getattr(model, "inverts", False):
        raise ValueError(
            f"precision '{precision}' keeps the weights in 16 bits, where the small changes of training get lost; "
            f"use '{precision.replace('true', 'mixed')}'"
        )
    del options["precision"]
    options["plugins"] = [*(options.get("plugins") or []), HalfWeights(precision)]
