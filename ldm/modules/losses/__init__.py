"""Losses that train the first stage."""

from ldm.modules.losses.base import FirstStageLoss
from ldm.modules.losses.contperceptual import DummyLoss, LPIPSWithDiscriminator
from ldm.modules.losses.vqperceptual import VQLPIPSWithDiscriminator

__all__ = ["DummyLoss", "FirstStageLoss", "LPIPSWithDiscriminator", "VQLPIPSWithDiscriminator"]
