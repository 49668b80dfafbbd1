"""The tuned model of a run that trains more than words, as files that load like any other model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import OmegaConf

from ldm.checkpoint import atomic_path, save_safetensors

log = logging.getLogger(__name__)

WORDS = "embedding_manager."


class ModelWeights(pl.Callback):
    """Writes `model.safetensors` and the `config.yaml` that builds it, at the end of the run.

    The file holds the whole model but for the words, which are in `embeddings.pt` beside it; so the config has no
    `personalization_config`.
    """

    def __init__(self, dirpath: str | Path, config: Any) -> None:
        super().__init__()
        self.dirpath = Path(dirpath)
        self.config = config

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write both files."""
        if not trainer.global_step or not trainer.is_global_zero:
            return
        state = {name: tensor for name, tensor in pl_module.state_dict().items() if not name.startswith(WORDS)}
        path = self.dirpath / "model.safetensors"
        save_safetensors(state, path, {"format": "pt", "step": str(trainer.global_step)})
        plain: Any = OmegaConf.to_container(OmegaConf.create(self.config), resolve=True)
        model = plain["model"]
        own = ("personalization_config", "ckpt_path", "embedding_manager_ckpt", "unfreeze_model", "model_lr")
        model["params"] = {name: value for name, value in model["params"].items() if name not in own}
        with atomic_path(self.dirpath / "config.yaml") as temporary:
            OmegaConf.save({"model": model}, temporary)
        log.info("Tuned model: %s", path)
