"""Models of the shape of Stable Diffusion 1 and 2, tiny and random, as configs and as original checkpoint files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.checkpoint import save_safely, save_safetensors
from ldm.util import instantiate_from_config

KINDS = ("sd1", "sd2", "sd1-inpainting")
CONTEXT = 32
SCHEDULE = {"linear_start": 0.00085, "linear_end": 0.012, "timesteps": 1000}


def sd_config(kind: str, **options: Any) -> dict[str, Any]:
    """Model config `{target, params}`; `options` are further parameters of LatentDiffusion."""
    inpaints = kind.endswith("inpainting")
    unet: dict[str, Any] = {
        "image_size": 8,
        "in_channels": 9 if inpaints else 4,
        "out_channels": 4,
        "model_channels": 32,
        "attention_resolutions": [2, 1],
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 2],
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "context_dim": CONTEXT,
        "legacy": False,
    }
    text: dict[str, Any] = {
        "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
        "params": {
            "text_config": {
                "hidden_size": CONTEXT,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
            }
        },
    }
    if kind == "sd2":
        unet |= {"num_head_channels": 16, "use_linear_in_transformer": True}
        sizes = {"width": CONTEXT, "heads": 2, "layers": 24, "embed_dim": CONTEXT, "mlp_ratio": 2.0}
        text = {
            "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
            "params": {"layer": "penultimate", "text_config": sizes},
        }
    else:
        unet["num_heads"] = 4
    ddconfig = {
        "double_z": True,
        "z_channels": 4,
        "resolution": 32,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    stage = {"embed_dim": 4, "ddconfig": ddconfig, "lossconfig": {"target": "torch.nn.Identity"}}
    params = {
        **SCHEDULE,
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "image_size": 8,
        "channels": 4,
        "conditioning_key": "hybrid" if inpaints else "crossattn",
        "scale_factor": 0.18215,
        "use_ema": False,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
        "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": stage},
        "cond_stage_config": text,
        **options,
    }
    name = "LatentInpaintDiffusion" if inpaints else "LatentDiffusion"
    return {"target": f"ldm.models.diffusion.ddpm.{name}", "params": params}


def sd_model(kind: str, seed: int = 0, **options: Any) -> Any:
    """The model with random weights, none of them zero, in eval mode."""
    torch.manual_seed(seed)
    model = instantiate_from_config(sd_config(kind, **options)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def write_sd(path: Path, kind: str, **options: Any) -> Path:
    """The model's original checkpoint, as the ending of `path` says."""
    state = {name: tensor.clone().contiguous() for name, tensor in sd_model(kind, **options).state_dict().items()}
    if path.suffix == ".ckpt":
        save_safely({"state_dict": state, "global_step": 7}, path)
    else:
        save_safetensors(state, path)
    return path
