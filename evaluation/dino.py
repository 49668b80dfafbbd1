"""DINO features of pictures, by timm's vision transformers with local weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from evaluation import metrics
from evaluation.clip_eval_weights import find_weights
from ldm.checkpoint import read_state_dict
from ldm.util import did_you_mean, freeze

# Name, timm's architecture, who reports it.
ARCHITECTURES = {
    "dino-vits16": "vit_small_patch16_224",  # DreamBooth
    "dino-vits8": "vit_small_patch8_224",  # DreamBench++
    "dino-vitb16": "vit_base_patch16_224",
    "dino-vitb8": "vit_base_patch8_224",
    "dinov2-vits14": "vit_small_patch14_dinov2",
}
OF_OTHER_SIZE = ("dinov2-vits14",)  # published for 518 pixels
RESIZE, CROP = 256, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


def build_dino(name: str, weights: str | Path | None = None) -> nn.Module:
    """A frozen DINO model with the weights of a local file (default: `models/dino/<name>.safetensors`, `.pth`, ...).

    Raises `FileNotFoundError` that names the file when there is none, and `ValueError` when its weights do not fit.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"there is no DINO model '{name}'{did_you_mean(name, ARCHITECTURES)}")
    file = find_weights("dino", name, weights)
    model = bare_dino(name)
    state = {key.removeprefix("backbone."): value for key, value in read_state_dict(file, dtype=torch.float32).items()}
    unused = ("head.", "mask_token")  # of the training, not of the features
    state = {key: value for key, value in state.items() if not key.startswith(unused)}
    if name in OF_OTHER_SIZE and "pos_embed" in state:
        state["pos_embed"] = resized_positions(state["pos_embed"], model)
    try:
        result = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # sizes
        raise ValueError(f"{file} does not fit {name}: {str(error).splitlines()[-1].strip()}") from error
    if result.missing_keys or result.unexpected_keys:
        key = (result.missing_keys or result.unexpected_keys)[0]
        raise ValueError(f"{file} does not fit {name}: '{key}' is {'missing' if result.missing_keys else 'left over'}")
    return freeze(model)


def bare_dino(name: str) -> nn.Module:
    """The architecture with random weights, for 224-pixel pictures, without a classifier."""
    import timm

    return timm.create_model(ARCHITECTURES[name], pretrained=False, num_classes=0, img_size=CROP)


def resized_positions(positions: Tensor, model: Any) -> Tensor:
    """Position vectors (1, 1 + N, D) of another picture size, interpolated to those of the model's."""
    from timm.layers import resample_abs_pos_embed

    if positions.shape[1] == model.pos_embed.shape[1]:
        return positions
    return resample_abs_pos_embed(positions, model.patch_embed.grid_size, num_prefix_tokens=1)


class DINOEncoder:
    """Pictures as DINO's class-token features.

    name: a key of `ARCHITECTURES`; DreamBooth's "DINO" is dino-vits16.
    weights: local file or folder; default `models/dino/dino-vits16.safetensors` and the like.
    model: use this one instead of building it.
    """

    def __init__(
        self,
        name: str = "dino-vits16",
        weights: str | Path | None = None,
        device: torch.device | str = "cpu",
        model: nn.Module | None = None,
        batch_size: int = 64,
    ) -> None:
        self.name = name
        self.device = torch.device(device)
        self.model: Any = (build_dino(name, weights) if model is None else freeze(model)).to(self.device)
        self.batch_size = batch_size

    def preprocess(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1]: shorter side to 256, middle 224 x 224, ImageNet's mean and deviation."""
        images = ((images.to(self.device, torch.float32) + 1) / 2).clamp(0, 1)
        images = TF.resize(images, [RESIZE], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        return TF.normalize(TF.center_crop(images, [CROP, CROP]), list(MEAN), list(STD))

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Unit vectors (B, D) of pictures (B, 3, H, W) in [-1, 1]."""
        parts = [self.model(self.preprocess(part)).float() for part in images.split(self.batch_size)]
        return metrics.unit(torch.cat(parts))

    def encode_text(self, texts: Sequence[str] | str) -> Tensor:
        """DINO knows no texts: raises `ValueError`."""
        raise ValueError(f"{self.name} encodes pictures only, so it cannot score {texts!r}; use a CLIP model for texts")
