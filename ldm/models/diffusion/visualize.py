"""Pictures for the training log: inputs, reconstructions, conditionings, diffusion and denoising rows, samples."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from ldm.models.diffusion.ancestral import AncestralSampler
from ldm.models.diffusion.ddim import DDIMSampler

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.models.diffusion.ddpm_base import DDPM


@dataclasses.dataclass(frozen=True)
class ImageLogOptions:
    """What to draw: number of pictures, rows, DDIM steps and eta, guidance; see `LatentDiffusion.log_images`."""

    n: int = 8
    n_row: int = 4
    sample: bool = True
    steps: int = 200
    eta: float = 1.0
    quantize_denoised: bool = False
    inpaint: bool = False
    denoise_rows: bool = False
    progressive_rows: bool = False
    diffusion_rows: bool = True
    guidance_scale: float = 1.0
    guidance_label: Sequence[str] | None = None
    use_ema: bool = True


def texts_to_images(texts: Sequence[str], size: tuple[int, int]) -> Tensor:
    """Draw each text on a white picture of `size` (height, width): (B, 3, H, W) in [-1, 1]."""
    height, width = size
    font = ImageFont.load_default(size=max(8, height // 12))
    pictures = []
    for text in texts:
        canvas = Image.new("RGB", (width, height), "white")
        draw = ImageDraw.Draw(canvas)
        draw.multiline_text((2, 2), _wrap(text, draw, font, width - 4), fill="black", font=font)
        pictures.append(np.asarray(canvas, dtype=np.float32) / 127.5 - 1.0)
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)  # (B, 3, H, W)


def _wrap(text: str, draw: ImageDraw.ImageDraw, font: Any, width: int) -> str:
    """Break `text` into lines no wider than `width` pixels where spaces allow it."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and draw.textlength(longer, font=font) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def as_rgb(x: Tensor) -> Tensor:
    """Show (B, C, h, w) as pictures: one channel is repeated, more than three are projected at random but fixed."""
    if x.shape[1] == 3:
        return x
    if x.shape[1] == 1:
        return x.expand(-1, 3, -1, -1)
    weights = torch.randn((3, x.shape[1], 1, 1), generator=torch.Generator().manual_seed(0)).to(x)
    x = F.conv2d(x, weights)  # (B, 3, h, w)
    return 2 * (x - x.min()) / (x.max() - x.min()).clamp_min(1e-8) - 1


def conditioning_pictures(
    model: LatentDiffusion, batch: Mapping[str, Any], n: int, size: tuple[int, int]
) -> Tensor | None:
    """The conditioning as pictures (n, 3, H, W), texts and labels drawn; None when there is none."""
    if model.cond_stage_model is None:
        return None
    key = "human_label" if model.cond_stage_key == "class_label" and "human_label" in batch else model.cond_stage_key
    value = batch.get(key)
    if value is None:
        return None
    if isinstance(value, Tensor) and value.dim() >= 3:
        return as_rgb(model.get_input(batch, key)[:n])
    texts = value if isinstance(value, list | tuple) else [" ".join(map(str, np.atleast_1d(v.tolist()))) for v in value]
    return texts_to_images([str(t) for t in texts[:n]], size)


def log_latent_images(model: LatentDiffusion, batch: Mapping[str, Any], options: ImageLogOptions) -> dict[str, Tensor]:
    """Draw what `options` asks for, for the first `n` items of the batch: key -> (N, 3, H, W) in [-1, 1]."""
    batch = {key: value[: options.n] for key, value in batch.items()}
    z, cond, _ = model.prepare_batch(batch)
    log: dict[str, Tensor] = {"reconstruction": model.decode_first_stage(z)}
    if model.first_stage_key in batch:
        log["inputs"] = model.get_input(batch, model.first_stage_key)
    size = (log["reconstruction"].shape[-2], log["reconstruction"].shape[-1])
    pictures = conditioning_pictures(model, batch, options.n, size)
    if pictures is not None:
        log["conditioning"] = pictures
    if options.diffusion_rows:
        rows = diffusion_row(model, z[: options.n_row])  # (T', n_row, C, h, w)
        log["diffusion_row"] = _decode_rows(model, rows)
    if options.sample:
        scope = model.ema_scope("Sampling") if options.use_ema else contextlib.nullcontext()
        with scope:
            log |= _sampled_images(model, z, cond, options)
    return log


def diffusion_row(model: DDPM, x: Tensor) -> Tensor:
    """`x` (n, C, h, w) noised to every `log_every_t`-th time step: (T', n, C, h, w)."""
    noise = torch.randn_like(x)
    steps = [t for t in range(model.num_timesteps) if t % model.log_every_t == 0 or t == model.num_timesteps - 1]
    return torch.stack([model.q_sample(x, torch.full((len(x),), t, device=x.device), noise) for t in steps])


def _decode_rows(model: LatentDiffusion, rows: Tensor) -> Tensor:
    """(T', n, C, h, w) latents -> (n * T', 3, H, W) pictures, one sample after the other."""
    rows = rearrange(rows, "t n c h w -> (n t) c h w")
    return torch.cat([model.decode_first_stage(part) for part in rows.split(8)])


def _sampled_images(model: LatentDiffusion, z: Tensor, cond: Any, options: ImageLogOptions) -> dict[str, Tensor]:
    sampler = DDIMSampler(model)
    shape = tuple(z.shape[1:])
    common: dict[str, Any] = {
        "S": min(options.steps, model.num_timesteps),
        "batch_size": len(z),
        "shape": shape,
        "conditioning": cond,
        "eta": options.eta,
        "verbose": False,
    }
    samples, intermediates = sampler.sample(**common)
    log = {"samples": model.decode_first_stage(samples)}
    if options.denoise_rows:
        log["denoise_row"] = _decode_rows(model, torch.stack(intermediates["x_inter"])[:, : options.n_row])
    if options.quantize_denoised:
        log["samples_x0_quantized"] = model.decode_first_stage(sampler.sample(**common, quantize_x0=True)[0])
    if options.guidance_scale != 1.0 and isinstance(cond, Tensor) and _is_text(model):
        label = list(options.guidance_label or [""])
        negative = model.get_learned_conditioning(label * len(z) if len(label) == 1 else label[: len(z)])
        guided = sampler.sample(
            **common, unconditional_guidance_scale=options.guidance_scale, unconditional_conditioning=negative
        )[0]
        log["samples_scaled"] = model.decode_first_stage(guided)
    if options.inpaint:
        log |= _inpainted_images(model, sampler, z, common)
    if options.progressive_rows:
        _, states = AncestralSampler(model).sample(
            S=model.num_timesteps,
            batch_size=len(z),
            shape=shape,
            conditioning=cond,
            verbose=False,
            log_every_t=model.log_every_t,
        )
        log["progressive_row"] = _decode_rows(model, torch.stack(states["pred_x0"])[:, : options.n_row])
    return log


def _is_text(model: LatentDiffusion) -> bool:
    from ldm.protocols import TextEncoder

    return isinstance(model.cond_stage_model, TextEncoder)


def _inpainted_images(
    model: LatentDiffusion, sampler: DDIMSampler, z: Tensor, common: dict[str, Any]
) -> dict[str, Tensor]:
    """Fill the middle quarter of each latent (inpainting) and all but it (outpainting)."""
    h, w = z.shape[-2:]
    keep = torch.ones((len(z), 1, h, w), device=z.device)
    keep[:, :, h // 4 : 3 * h // 4, w // 4 : 3 * w // 4] = 0.0
    filled = {}
    for name, mask in (("samples_inpainting", keep), ("samples_outpainting", 1 - keep)):
        samples, _ = sampler.sample(**common, mask=mask, x0=z)
        filled[name] = model.decode_first_stage(samples)
    filled["mask"] = as_rgb(keep * 2 - 1)
    return filled


def log_pixel_images(model: DDPM, batch: Mapping[str, Any], n: int, n_row: int, sample: bool) -> dict[str, Tensor]:
    """Inputs, diffusion row and ancestral samples of a pixel-space model: key -> (N, C, H, W)."""
    x = model.get_input(batch, model.first_stage_key)[:n]
    log = {"inputs": x, "diffusion_row": rearrange(diffusion_row(model, x[:n_row]), "t n c h w -> (n t) c h w")}
    if sample:
        with model.ema_scope("Sampling"):
            log["samples"] = AncestralSampler(model).sample(
                S=model.num_timesteps, batch_size=len(x), shape=tuple(x.shape[1:]), verbose=False
            )[0]
    return log
