"""Losses that train the first stage."""

from __future__ import annotations

from typing import Any

from torch import nn

from ldm.modules.losses.base import FirstStageLoss
from ldm.modules.losses.contperceptual import DummyLoss, LPIPSWithDiscriminator
from ldm.modules.losses.vqperceptual import VQLPIPSWithDiscriminator
from ldm.util import instantiate_from_config, to_plain

__all__ = ["DummyLoss", "FirstStageLoss", "LPIPSWithDiscriminator", "VQLPIPSWithDiscriminator", "build_loss"]

# Published configs name taming's loss, which downloads weights as soon as it is built and takes no code indices;
# ours has the same parameters and state-dict keys.
_TAMING = "taming.modules.losses.vqperceptual."
REPLACED_TARGETS = {
    _TAMING + "VQLPIPSWithDiscriminator": "ldm.modules.losses.VQLPIPSWithDiscriminator",
    _TAMING + "DummyLoss": "ldm.modules.losses.DummyLoss",
    "taming.modules.losses.DummyLoss": "ldm.modules.losses.DummyLoss",
}


def build_loss(config: Any) -> nn.Module:
    """Build the loss of a first stage from its `lossconfig`; taming's targets give the losses of this package."""
    config = to_plain(config)
    if isinstance(config, dict) and config.get("target") in REPLACED_TARGETS:
        config = {**config, "target": REPLACED_TARGETS[config["target"]]}
    return instantiate_from_config(config)
