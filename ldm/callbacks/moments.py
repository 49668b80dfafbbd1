"""First-stage moments before the first step; then the first stage is let go where nothing needs it any more."""

from __future__ import annotations

import hashlib
import logging
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn

from ldm.data.moments_cache import cache_moments, concepts_of, obstacle
from ldm.generate import latent_shape
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

log = logging.getLogger(__name__)

MIB = 2**20


class Dropped(nn.Module):
    """Stands where a part was that the run no longer needs."""

    def forward(self, x: Any) -> Any:
        """Say what to do."""
        raise RuntimeError(
            "this part of the first stage was dropped from memory, since the moments of all pictures are cached; "
            "to keep it: lightning.callbacks.moments_cache.params.drop=false"
        )


class MomentsCache(pl.Callback):
    """Encodes each training picture and its mirror image once, so that steps only draw from the cached moments.

    | option | meaning |
    |---|---|
    | `disabled` | run the first stage in every step |
    | `drop` | let the encoder go afterwards, and the decoder too if no callback draws pictures |
    | `max_megabytes` | cache only up to this size per data set |

    Encoding happens in the precision of the weights. Only data with one or two versions per picture is cached: a
    random crop has too many. Callbacks that need the first stage during training have a true attribute
    `needs_encoder` or `needs_decoder`.
    """

    def __init__(self, disabled: bool = False, drop: bool = True, max_megabytes: float = 1024) -> None:
        super().__init__()
        self.disabled = disabled
        self.drop = drop
        self.max_bytes = int(max_megabytes * MIB)
        self._complete = False
        self._encoded: dict[bytes, np.ndarray | None] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Encode: after the model is on its device, before workers copy the data."""
        datasets = getattr(getattr(trainer, "datamodule", None), "datasets", {})
        self._complete = bool(datasets) and not self.disabled
        if self.disabled or getattr(pl_module, "first_stage_key", None) != "image":
            self._complete = False
            return
        for size in {part.loader.size for dataset in datasets.values() for part in concepts_of(dataset)} - {None}:
            latent_shape(pl_module, size, size)  # says which sizes the model can take
        count = 0
        for split, dataset in datasets.items():
            done = self._cache(split, dataset, pl_module) if split in ("train", "validation") else 0
            count += done
            self._complete &= done > 0
        self._encoded.clear()
        if count:
            log.info("The first stage encoded %d pictures, once for all steps", count)

    def _cache(self, split: str, dataset: Any, pl_module: pl.LightningModule) -> int:
        """Cache one split; returns the number of its pictures, 0 when they cannot be cached."""
        parts = concepts_of(dataset)
        reasons = [reason for part in parts if (reason := obstacle(part)) is not None]
        done = bool(parts) and not reasons
        for part in parts if done else ():
            done = done and cache_moments(part, lambda picture: self._encode(pl_module, picture), self.max_bytes)
        if not done and parts:
            reason = reasons[0] if reasons else "there are too many pictures, or this first stage has no moments"
            log.info("The first stage runs in every step on the %s pictures: %s", split, reason)
        return sum(part.num_images for part in parts) if done else 0

    def _encode(self, pl_module: Any, pictures: np.ndarray) -> np.ndarray | None:
        key = hashlib.sha256(pictures.tobytes()).digest()  # validation often shows the training pictures
        if key not in self._encoded:
            batch = {"image": torch.from_numpy(pictures).to(pl_module.device)}
            posterior = pl_module.encode_first_stage(pl_module.get_input(batch, "image"))
            gaussian = isinstance(posterior, DiagonalGaussianDistribution)
            self._encoded[key] = posterior.parameters.float().cpu().numpy() if gaussian else None
        return self._encoded[key]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Drop what is no longer needed, once every callback has started."""
        del batch, batch_idx
        if not (self._complete and self.drop):
            return
        self._complete = False
        # a checkpoint of a model that trains holds the first stage; other conditionings encode pictures, too
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        text_only = getattr(pl_module, "conditioning_key", None) == "crossattn"
        if not getattr(pl_module, "inverts", False) or not text_only or any(map(needs_encoder, callbacks)):
            return
        stage: Any = pl_module.first_stage_model
        if any(map(needs_decoder, callbacks)):
            freed = drop_parts(stage, ("encoder", "quant_conv"))
        else:
            freed = drop_parts(stage, tuple(name for name, _ in stage.named_children()))
        if freed:
            log.info("Dropped %.1f MB of the first stage from memory", freed / 1e6)


def needs_encoder(callback: Any) -> bool:
    """Whether `callback` encodes pictures during training."""
    return bool(getattr(callback, "needs_encoder", False))


def needs_decoder(callback: Any) -> bool:
    """Whether `callback` draws pictures during training."""
    return bool(getattr(callback, "needs_decoder", False))


def drop_parts(module: nn.Module, names: tuple[str, ...]) -> int:
    """Replace the children `names` of `module` by `Dropped`; returns the bytes of their parameters."""
    freed = 0
    for name in names:
        part = getattr(module, name, None)
        if isinstance(part, nn.Module):
            freed += sum(p.numel() * p.element_size() for p in part.parameters())
            setattr(module, name, Dropped())
    return freed
