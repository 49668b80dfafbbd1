"""The models that are measured, at full size or tiny, with random weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from ldm.resources import config_path
from ldm.util import freeze, instantiate_from_config, to_plain

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BLOCK = 1 << 22  # random numbers drawn; larger weights repeat them


@dataclasses.dataclass(frozen=True)
class Size:
    """One model as it is used."""

    config: str
    pixels: int
    batch: int
    quick: dict[str, Any] = dataclasses.field(default_factory=dict)  # overrides that make it tiny


SIZES = {
    "emoji": Size("configs/finetune.yaml", 64, 4, {"unet_config.params.model_channels": 32}),
    "ldm": Size(
        "configs/latent-diffusion/txt2img-1p4B-finetune.yaml",
        256,
        4,
        {
            "unet_config.params.model_channels": 32,
            "unet_config.params.context_dim": 64,
            "cond_stage_config.params.n_embed": 64,
            "cond_stage_config.params.n_layer": 2,
            "first_stage_config.params.ddconfig.ch": 32,
        },
    ),
    "sd1": Size(
        "configs/stable-diffusion/v1-finetune.yaml",
        512,
        1,
        {
            "unet_config.params.model_channels": 32,
            "unet_config.params.context_dim": 64,
            "cond_stage_config.params.text_config": {
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
            },
            "first_stage_config.params.ddconfig.ch": 32,
        },
    ),
}
QUICK_PIXELS = 64


def pixels_of(name: str, quick: bool) -> int:
    """Side of the pictures of model `name`."""
    return min(QUICK_PIXELS, SIZES[name].pixels) if quick else SIZES[name].pixels


def model_config(name: str, quick: bool = False) -> dict[str, Any]:
    """The `model` section of the config; activations are kept, not computed again."""
    size = SIZES[name]
    config = OmegaConf.load(config_path(size.config)).model
    config.params.pop("ckpt_path", None)
    config.params.unet_config.params.use_checkpoint = False
    for key, value in (size.quick if quick else {}).items():
        OmegaConf.update(config.params, key, value, force_add=True)
    plain: dict[str, Any] = to_plain(config)
    return plain


@torch.no_grad()
def build(name: str, dtype: torch.dtype, device: torch.device, quick: bool = False) -> Any:
    """Model `name` with random weights, ready to learn a word: everything but the word's vector is frozen."""
    config = model_config(name, quick)
    word = config["params"].pop("personalization_config")
    with torch.device("meta"):
        model = instantiate_from_config(config)
    fill(model)
    model.embedding_manager = instantiate_from_config(word, model.cond_stage_model)
    freeze(model.model)
    freeze(model.cond_stage_model)
    model.learning_rate = 5e-3
    return model.to(device, dtype)


def fill(model: nn.Module) -> None:
    """Replace tensors of the meta device by random weights that keep the size of what passes through them."""
    noise = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                weight = random_weight(parameter, noise, is_scale=name == "weight")
                module._parameters[name] = nn.Parameter(weight, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)


def random_weight(like: Tensor, noise: Tensor, is_scale: bool) -> Tensor:
    """Ones for scales, zeros for biases, else noise divided by the root of the fan-in."""
    if like.dim() < 2:
        return torch.ones(like.shape) if is_scale else torch.zeros(like.shape)
    count = like.numel()
    repeated = noise.repeat(-(-count // len(noise)))[:count].view(like.shape)
    return repeated / like[0].numel() ** 0.5
