"""Classifier-free guidance: joining two conditionings into one batch and mixing what the model says to each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.protocols import Denoiser


def join_conditioning(first: Any, second: Any, name: str = "conditioning") -> Any:
    """Concatenate two conditionings along the batch axis; tensors, lists and dicts of them, or None twice.

    A key that only one of two dicts has is used for both halves: what is fixed for a picture, such as the masked image
    under `c_concat`, need not be repeated in the negative conditioning.
    """
    if first is None and second is None:
        return None
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if first.shape[1:] != second.shape[1:]:
            raise ValueError(
                f"{name}: shapes {tuple(first.shape)} and {tuple(second.shape)} do not match; "
                "guidance needs both prompts encoded to the same length"
            )
        return torch.cat([first, second])
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        keys = [*first, *(key for key in second if key not in first)]
        return {k: join_conditioning(first.get(k, second.get(k)), second.get(k, first.get(k)), k) for k in keys}
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)) and len(first) == len(second):
        return [join_conditioning(a, b, name) for a, b in zip(first, second, strict=True)]
    raise TypeError(
        f"{name}: cannot join {type(first).__name__} with {type(second).__name__}; "
        "give the negative conditioning in the same form as the conditioning"
    )


def conditioning_batch_size(cond: Any) -> int | None:
    """Batch size of the first tensor in a conditioning; None when there is none."""
    if isinstance(cond, Tensor):
        return cond.shape[0]
    parts = cond.values() if isinstance(cond, Mapping) else cond if isinstance(cond, (list, tuple)) else ()
    return next((size for size in map(conditioning_batch_size, parts) if size is not None), None)


class Guidance:
    """A denoiser's raw output moved away from what it says to a second conditioning (Ho and Salimans 2022).

    Both branches run as one batch. The joined conditioning is made once, so that layers that remember what they made
    of a context tensor see the same one at every step. With `scale` 1, or without `uncond`, the model runs on `cond`
    alone. `rescale` in [0, 1] pulls the standard deviation of the result back to that of the conditional branch
    (Lin et al. 2024, section 3.4).
    """

    def __init__(self, cond: Any = None, uncond: Any = None, scale: float = 1.0, rescale: float = 0.0) -> None:
        if not 0 <= rescale <= 1:
            raise ValueError(f"guidance_rescale must lie in [0, 1], got {rescale}")
        self.active = uncond is not None and scale != 1.0
        self.cond = join_conditioning(uncond, cond) if self.active else cond
        self.scale = scale
        self.rescale = rescale

    def __call__(self, model: Denoiser, x: Tensor, t: Tensor) -> Tensor:
        """Guided raw output (B, ...) for `x` (B, ...) at time steps `t` (B,)."""
        if not self.active:
            return model.apply_model(x, t, self.cond)
        both = model.apply_model(torch.cat([x, x]), torch.cat([t, t]), self.cond)  # (2B, ...)
        out_uncond, out_cond = both.chunk(2)  # (B, ...) each
        out = out_uncond + self.scale * (out_cond - out_uncond)
        if self.rescale:
            axes = tuple(range(1, out.dim()))
            ratio = out_cond.std(dim=axes, keepdim=True) / out.std(dim=axes, keepdim=True)
            out = out * (self.rescale * ratio + 1 - self.rescale)
        return out
