"""New pictures from one that is there: drawn again from noise, only inside a mask, or with its own layout kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.data.image import open_image, open_mask, to_array, to_rgb
from ldm.generate import SAMPLERS, SamplingOptions, decode, first_stage_factor, precision_context
from ldm.generate_checks import check_size
from ldm.generate_prompts import batches, chunk_counts, encode_prompts
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.noise import SeededNoise
from ldm.models.diffusion.sampler import Sampler


@dataclasses.dataclass(frozen=True)
class Edit:
    """What happens to the picture; how to sample is in `SamplingOptions`."""

    strength: float = 0.75  # share of the steps that are drawn again: 0 keeps the picture, 1 starts from all but noise
    source_prompt: str | None = None  # what the picture shows: start from the noise that leads to it, not from new

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength <= 1.0:
            raise ValueError(f"strength must lie between 0 and 1, got {self.strength}")

    def check(self, options: SamplingOptions) -> None:
        """Raise ValueError where nothing would be drawn, or the sampler cannot lead back to a picture's noise."""
        if self.strength > 0 and int(self.strength * options.steps) == 0:
            share = f"strength {self.strength} of {options.steps} step{'s' * (options.steps > 1)}"
            raise ValueError(
                f"{share} is less than one, so nothing would be drawn: take more steps or a higher strength"
            )
        if self.source_prompt is not None and (options.sampler != "ddim" or options.eta != 0):
            raise ValueError("only the sampler ddim with eta 0 leads back to the noise of a picture")

    def steps(self, sampler: Sampler, asked: int) -> int:
        """How many levels of the sampler's chain are drawn again."""
        levels = len(sampler.current_grid())  # the chain can be a step longer than asked for
        return levels if self.strength == 1.0 else min(int(self.strength * asked), levels)


def fitting_size(model: Any, width: int, height: int, options: SamplingOptions) -> tuple[int, int]:
    """(width, height) in pixels that the model takes: as the options say, else of the picture's shape.

    Then its shorter side becomes as long as that of the model's own pictures.
    """
    own = model.image_size
    factor = first_stage_factor(model)
    unit = factor * model.model.diffusion_model.downsampling
    scale = factor * min([own] if isinstance(own, int) else list(own)) / min(width, height)
    sizes = {"width": (options.width, width), "height": (options.height, height)}
    found = []
    for name, (asked, there) in sizes.items():
        if asked is not None and (asked < unit or asked % unit):
            raise ValueError(f"{name} {asked} is no multiple of {unit} pixels")
        found.append(asked or max(unit, round(there * scale / unit) * unit))
    check_size(f"a picture of {width} x {height} pixels at the model's size (--W and --H change it)", *found)
    return found[0], found[1]


def read_pictures(
    path: str | Path, mask: str | Path | None, model: Any, options: SamplingOptions
) -> tuple[Tensor, Tensor | None]:
    """The picture in a file, (3, H, W) in [-1, 1], and its mask, (1, H, W): 1 where that file is white.

    Both come upright and at a size that the model takes; transparency is laid over white.
    """
    image = to_rgb(open_image(path))
    size = fitting_size(model, image.width, image.height, options)
    picture = torch.from_numpy(to_array(image.resize(size, Image.Resampling.LANCZOS))).permute(2, 0, 1)
    if mask is None:
        return picture, None
    plane = open_mask(mask)
    if abs(plane.width * image.height - plane.height * image.width) > 0.02 * plane.width * image.height:
        sizes = f"{plane.width} x {plane.height} pixels, its picture {image.width} x {image.height}"
        raise ValueError(f"{mask} has {sizes}; give both the same shape")
    return picture, torch.from_numpy(white_part(plane.resize(size, Image.Resampling.BILINEAR), mask)).float()[None]


def white_part(plane: Image.Image, name: str | Path) -> np.ndarray:
    """Where a mask (mode L) is white, (H, W) bool; raises ValueError, with its `name`, when it is so nowhere."""
    white = np.asarray(plane) > 127
    if not white.any():
        raise ValueError(f"{name} is black everywhere: paint white what is to be drawn anew")
    return white


@torch.no_grad()
def encode_picture(model: Any, picture: Tensor) -> Tensor:
    """Scaled latent (1, C, h, w) of a picture (3, H, W) in [-1, 1]; the mean where the first stage gives a Gaussian."""
    posterior = model.encode_first_stage(picture[None].to(model.device))
    if isinstance(posterior, Tensor):
        return model.get_first_stage_encoding(posterior).float()
    return model.get_first_stage_encoding(posterior, noise=torch.zeros_like(posterior.mean, dtype=torch.float32))


@torch.no_grad()
def iter_edits(
    model: Any,
    picture: Tensor,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    options: SamplingOptions | None = None,
    edit: Edit | None = None,
    mask: Tensor | None = None,
    batch_size: int = 4,
    precision: str = "full",
    verbose: bool = False,
) -> Iterator[Tensor]:
    """Yield pictures (b, 3, H, W) in [-1, 1] made from `picture` (3, H, W), one for each prompt with its seed.

    `mask` (1, H, W): only where it is 1 something new is drawn (Avrahami et al. 2023: at each level the noised picture
    replaces what lies outside); outside the picture stays as it is, pixel by pixel.
    """
    options, edit = options or SamplingOptions(), edit or Edit()
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one seed for each picture")
    edit.check(options)
    sampler = SAMPLERS[options.sampler](model)
    with model.ema_scope("Sampling"), precision_context(precision, model.device):
        z = encode_picture(model, picture)  # (1, C, h, w)
        keep = None if mask is None else 1 - F.adaptive_max_pool2d(mask[None].to(z), z.shape[-2:])  # (1, 1, h, w)
        for rows in batches(chunk_counts(model, prompts, options), batch_size):
            batch = z.expand(rows.stop - rows.start, -1, -1, -1)  # (b, C, h, w)
            latents = _edited(sampler, batch, prompts[rows], seeds[rows], options, edit, keep, verbose)
            images = decode(model, latents)  # (b, 3, H, W)
            if mask is not None:
                images = torch.where(mask.to(images) > 0, images, picture.to(images))
            yield images


def _edited(
    sampler: Sampler,
    z: Tensor,
    prompts: Sequence[str],
    seeds: Sequence[int],
    options: SamplingOptions,
    edit: Edit,
    keep: Tensor | None,
    verbose: bool,
) -> Tensor:
    """Latents (b, C, h, w) of one batch."""
    model = sampler.model
    sampler.make_schedule(options.steps, ddim_eta=options.eta)
    count = edit.steps(sampler, options.steps)
    if count == 0:
        return z
    cond, uncond = encode_prompts(model, prompts, options)
    noise = SeededNoise(seeds)
    if edit.source_prompt is None:
        level = torch.full((len(z),), min(count, len(sampler.current_grid()) - 1))
        x = sampler.stochastic_encode(z, level, noise=noise(z.shape))
    else:
        assert isinstance(sampler, DDIMSampler)
        shown = model.get_learned_conditioning([edit.source_prompt] * len(z))  # type: ignore[attr-defined]
        x, _ = sampler.encode(z, shown, count)
    return sampler.decode(
        x,
        cond,
        count,
        unconditional_guidance_scale=options.scale,
        unconditional_conditioning=uncond,
        guidance_rescale=options.guidance_rescale,
        noise=noise,
        mask=keep,
        x0=None if keep is None else z,
        verbose=verbose,
    )
