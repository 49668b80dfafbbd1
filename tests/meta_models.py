"""Building the model of a shipped config on the meta device: all of its structure, none of its memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from ldm.resources import config_path
from ldm.util import instantiate_from_config, to_plain


def load_config(name: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A shipped YAML as plain dicts, with dotted-key `overrides` applied."""
    config = OmegaConf.load(config_path(name))
    for key, value in (overrides or {}).items():
        OmegaConf.update(config, key, value, force_add=True)
    return to_plain(config)


def without_files(config: Any) -> Any:
    """`config` less every `ckpt_path`: structure needs no weights."""
    if isinstance(config, Mapping):
        return {k: without_files(v) for k, v in config.items() if k != "ckpt_path"}
    if isinstance(config, list):
        return [without_files(v) for v in config]
    return config


def build_on_meta(name: str, overrides: Mapping[str, Any] | None = None) -> nn.Module:
    """The model of the shipped config `name`, with all tensors that its construction makes on the meta device."""
    with torch.device("meta"):
        return instantiate_from_config(without_files(load_config(name, overrides)["model"]))
