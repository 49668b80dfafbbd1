"""Tiny models for tests of commands: the text-to-image model of the reference runs, and random ones of other kinds."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from ldm.checkpoint import load_model_from_config
from ldm.util import instantiate_from_config
from tests.conftest import END_TO_END

TEXT_WEIGHTS = END_TO_END / "tiny_ldm.safetensors"


def text_config() -> dict[str, Any]:
    """Config of the reference text-to-image model, without a learned word."""
    config = json.loads((END_TO_END / "run_1vec.json").read_text())["config"]
    del config["params"]["personalization_config"]
    config["params"]["cond_stage_config"]["params"]["vocab_file"] = str(END_TO_END / "vocab.txt")
    return {"model": config}


def text_model(dtype: torch.dtype | None = None) -> Any:
    """The reference text-to-image model: 32 x 32 pixels, 36 words."""
    return load_model_from_config(text_config(), TEXT_WEIGHTS, dtype=dtype)


def vq_stage() -> dict[str, Any]:
    """A first stage with a codebook: three channels, 4 x smaller."""
    ddconfig = {
        "double_z": False,
        "z_channels": 3,
        "resolution": 32,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    return {
        "target": "ldm.models.autoencoder.VQModelInterface",
        "params": {"embed_dim": 3, "n_embed": 16, "ddconfig": ddconfig, "lossconfig": {"target": "torch.nn.Identity"}},
    }


def random_config(in_channels: int = 3, context_dim: int | None = None, **options: Any) -> dict[str, Any]:
    """Config of a tiny model on `vq_stage`; `options` are further parameters of LatentDiffusion."""
    unet: dict[str, Any] = {
        "image_size": 8,
        "in_channels": in_channels,
        "out_channels": 3,
        "model_channels": 32,
        "attention_resolutions": [2],
        "num_res_blocks": 1,
        "channel_mult": [1, 2],
        "num_head_channels": 32,
    }
    if context_dim:
        unet |= {"use_spatial_transformer": True, "transformer_depth": 1, "context_dim": context_dim}
    params = {
        "linear_start": 0.0015,
        "linear_end": 0.0195,
        "timesteps": 1000,
        "first_stage_key": "image",
        "image_size": 8,
        "channels": 3,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
        "first_stage_config": vq_stage(),
        **options,
    }
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}


def unconditional_config(**options: Any) -> dict[str, Any]:
    """A model without conditioning."""
    return random_config(cond_stage_config="__is_unconditional__", **options)


def class_config(classes: int = 5) -> dict[str, Any]:
    """A class-conditional model."""
    stage = {
        "target": "ldm.modules.encoders.modules.ClassEmbedder",
        "params": {"embed_dim": 16, "n_classes": classes, "key": "class_label"},
    }
    return random_config(
        context_dim=16,
        cond_stage_key="class_label",
        cond_stage_config=stage,
        conditioning_key="crossattn",
        use_ema=False,
    )


def inpainting_config() -> dict[str, Any]:
    """A model conditioned on the masked picture's latents and the mask."""
    return random_config(
        in_channels=7, cond_stage_key="masked_image", cond_stage_config="__is_first_stage__", concat_mode=True
    )


def write_model(folder: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """Write config.yaml and random weights model.safetensors to `folder`; returns the folder."""
    torch.manual_seed(seed)
    model = instantiate_from_config(copy.deepcopy(config["model"]))
    for parameter in model.parameters():  # zero-initialised layers would hide the conditioning
        if not parameter.abs().sum():
            torch.nn.init.normal_(parameter, std=0.05)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    save_file({k: v.clone().contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    return folder
