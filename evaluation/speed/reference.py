"""The README's main job as a straightforward loop, without any of the caches: what `bench.py --reference` times.

Each step opens its pictures, encodes them with the first stage and every caption with the text encoder; previews
evaluate the two branches of guidance one after the other.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ldm.checkpoint import load_model_from_config
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.util import freeze

TEMPLATES = ("a photo of a {}", "a rendering of a {}", "a cropped photo of the {}", "the photo of a {}")
PREVIEW_EVERY, PREVIEWS, PREVIEW_STEPS, PREVIEW_SCALE = 50, 4, 25, 3.0


def read_picture(path: Path, size: int) -> np.ndarray:
    """A picture file as (size, size, 3) in [-1, 1], mirrored half of the time."""
    picture = Image.open(path, formats=("PNG", "JPEG", "WEBP")).convert("RGB")
    picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    if random.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(picture, dtype=np.float32) / 127.5 - 1


def encode_one_by_one(model: Any, captions: Sequence[str]) -> Tensor:
    """Context (B, L, D), each caption encoded by itself."""
    stage, manager = model.cond_stage_model, model.embedding_manager
    return torch.cat([stage.encode([caption], embedding_manager=manager) for caption in captions])


def step(model: Any, optimizer: torch.optim.Optimizer, files: Sequence[Path], batch: int, size: int) -> float:
    """One training step; returns its loss."""
    pictures = np.stack([read_picture(random.choice(files), size) for _ in range(batch)])
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2)  # (B, 3, H, W)
    z = model.get_first_stage_encoding(model.encode_first_stage(x))
    context = encode_one_by_one(model, [random.choice(TEMPLATES).format("*") for _ in range(batch)])
    t, noise = torch.randint(model.num_timesteps, (batch,)), torch.randn_like(z)
    output = model.apply_model(model.q_sample(z, t, noise), t, context)
    loss = F.mse_loss(output, model.training_target(z, noise, t))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.no_grad()
def preview(model: Any) -> Tensor:
    """Pictures of the word, with guidance by two evaluations per step."""
    sampler = DDIMSampler(model)
    sampler.make_schedule(PREVIEW_STEPS)
    grid = sampler.current_grid()
    size = model.image_size
    x = torch.randn(PREVIEWS, model.channels, size, size)
    for i in reversed(range(len(grid))):
        t = torch.full((PREVIEWS,), int(grid.steps[i]))
        cond = model.apply_model(x, t, encode_one_by_one(model, ["a photo of a *"] * PREVIEWS))
        uncond = model.apply_model(x, t, encode_one_by_one(model, [""] * PREVIEWS))
        raw = uncond + PREVIEW_SCALE * (cond - uncond)
        alpha, alpha_prev = float(grid.alphas[i]), float(grid.alphas_prev[i])
        x0 = alpha**0.5 * x - (1 - alpha) ** 0.5 * raw  # v-prediction
        eps = alpha**0.5 * raw + (1 - alpha) ** 0.5 * x
        x = alpha_prev**0.5 * x0 + (1 - alpha_prev) ** 0.5 * eps
    return model.decode_first_stage(x)


def run(config: Any, weights: str | Path, data_root: str | Path, steps: int, batch: int = 16, size: int = 64) -> float:
    """Learn a word in `steps` steps; returns the last loss."""
    random.seed(23)
    torch.manual_seed(23)
    model: Any = load_model_from_config(config, weights)
    freeze(model.model)
    freeze(model.cond_stage_model)
    files = sorted(p for p in Path(data_root).iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
    optimizer = torch.optim.AdamW(model.embedding_manager.embedding_parameters(), lr=1e-2, weight_decay=0.0)
    loss = 0.0
    for index in range(steps):
        loss = step(model, optimizer, files, batch, size)
        if index % PREVIEW_EVERY == 0 or index == steps - 1:
            preview(model)
    return loss
