"""From prompts to pictures: the one way that commands, training logs and the evaluation sample a model."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.generate_files import (
    make_grid,
    open_npz,
    read_settings,
    require_finite,
    save_grid,
    save_images,
    save_png,
    slug,
    to_uint8,
)
from ldm.generate_model import (
    DEFAULT_MODEL,
    PRECISIONS,
    ModelFiles,
    adjust_model,
    find_model_files,
    load_model,
    precision_context,
    select_device,
    weight_dtype,
)
from ldm.generate_prompts import batches, chunk_counts, encode_prompts
from ldm.models.diffusion.ancestral import AncestralSampler
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampler import Sampler

__all__ = [
    "DEFAULT_MODEL",
    "PRECISIONS",
    "SAMPLERS",
    "ModelFiles",
    "SamplingOptions",
    "adjust_model",
    "encode_prompts",
    "find_model_files",
    "iter_images",
    "latent_shape",
    "load_model",
    "make_grid",
    "open_npz",
    "precision_context",
    "read_settings",
    "require_finite",
    "sample_images",
    "save_grid",
    "save_images",
    "save_png",
    "select_device",
    "slug",
    "to_uint8",
    "weight_dtype",
]

SAMPLERS: dict[str, type[Sampler]] = {
    "ddim": DDIMSampler,
    "plms": PLMSSampler,
    "dpm": DPMSolverSampler,
    "ddpm": AncestralSampler,
}


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How to sample: everything but the prompts and the seeds."""

    sampler: str = "ddim"  # a key of SAMPLERS
    steps: int = 50
    eta: float = 0.0  # DDIM: 0 adds no noise, 1 as much as DDPM
    scale: float = 5.0  # guidance: 1 is none
    guidance_rescale: float = 0.0  # in [0, 1]: against the over-exposure of strong guidance
    negative_prompt: str = ""
    height: int | None = None  # pixels; None: what the model was trained on
    width: int | None = None
    prompt_weights: bool = False  # `(word:1.2)` in prompts changes how much words count
    long_prompts: bool = False  # prompts longer than the text model's length are encoded in chunks

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler '{self.sampler}' is unknown; choose one of {', '.join(SAMPLERS)}")
        if self.steps < 1:
            raise ValueError(f"the number of steps must be at least 1, got {self.steps}")
        for name in ("eta", "scale", "guidance_rescale"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)}")


def first_stage_factor(model: Any) -> int:
    """How many pixels one latent position covers along each axis."""
    first_stage = getattr(model, "first_stage_model", None)
    stages = getattr(getattr(first_stage, "encoder", None), "down", None)
    return 2 ** (len(stages) - 1) * getattr(first_stage, "fold", 1) if stages is not None else 1


def latent_shape(model: Any, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
    """Shape (C, h, w) of the latent of a picture of `height` x `width` pixels; default: the model's own size.

    Raises ValueError with the nearest possible size when the model cannot make this one.
    """
    size = model.image_size
    own = (size, size) if isinstance(size, int) else tuple(size)
    factor = first_stage_factor(model)
    depth = getattr(getattr(getattr(model, "model", None), "diffusion_model", None), "downsampling", 1)
    latent = []
    for name, pixels, default in (("height", height, own[0]), ("width", width, own[1])):
        if pixels is None:
            latent.append(int(default))
            continue
        unit = factor * depth
        if pixels < unit or pixels % unit:
            nearest = max(unit, round(pixels / unit) * unit)
            raise ValueError(f"{name} {pixels} is no multiple of {unit} pixels; the nearest is {nearest}")
        latent.append(pixels // factor)
    return model.channels, latent[0], latent[1]


def part_of(cond: Any, rows: slice) -> Any:
    """The given rows of a conditioning (a tensor, or lists and dicts of tensors)."""
    if isinstance(cond, Mapping):
        return {key: part_of(value, rows) for key, value in cond.items()}
    if isinstance(cond, (list, tuple)):
        return [part_of(value, rows) for value in cond]
    return cond[rows] if isinstance(cond, Tensor) else cond


def _seeds(seeds: int | Sequence[int], prompts: Sequence[str] | None) -> list[int]:
    if isinstance(seeds, int):
        return [seeds + k for k in range(len(prompts) if prompts is not None else 1)]
    if prompts is not None and len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one seed for each picture")
    return [int(seed) for seed in seeds]


@torch.no_grad()
def iter_images(
    model: Any,
    prompts: Sequence[str] | None = None,
    *,
    seeds: int | Sequence[int] = 0,
    options: SamplingOptions | None = None,
    conditioning: Any = None,
    unconditional: Any = None,
    batch_size: int = 4,
    precision: str = "full",
    use_ema: bool = True,
    verbose: bool = False,
) -> Iterator[Tensor]:
    """Yield pictures (b, 3, H, W) in [-1, 1], `batch_size` at a time, as they are made.

    One picture for each prompt; picture k is drawn with `seeds[k]` (or `seeds + k`) and does not depend on the batch
    size. Instead of prompts, `conditioning` may give encoded rows and `unconditional` those for guidance, or be a
    function from a slice of rows to the two; with neither there is one unconditional picture for each seed.
    """
    options = options or SamplingOptions()
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    seeds = _seeds(seeds, prompts)
    sampler = SAMPLERS[options.sampler](model)
    shape = latent_shape(model, options.height, options.width)
    scope = model.ema_scope("Sampling") if use_ema else contextlib.nullcontext()
    with scope, precision_context(precision, model.device):
        counts = [1] * len(seeds) if prompts is None else chunk_counts(model, prompts, options)
        for rows in batches(counts, batch_size):
            if prompts is not None:
                cond, uncond = encode_prompts(model, prompts[rows], options)
            elif callable(conditioning):
                cond, uncond = conditioning(rows)
            else:
                cond, uncond = part_of(conditioning, rows), part_of(unconditional, rows)
            latents, _ = sampler.sample(
                options.steps,
                rows.stop - rows.start,
                shape,
                cond,
                seeds=seeds[rows],
                eta=options.eta,
                unconditional_guidance_scale=options.scale,
                unconditional_conditioning=uncond,
                guidance_rescale=options.guidance_rescale,
                verbose=verbose,
            )
            yield decode(model, latents)


def decode(model: Any, latents: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) of latents (B, C, h, w), in the first stage's own precision; pixel models have none."""
    stage = getattr(model, "first_stage_model", None)
    if stage is None:
        return latents.float()
    parameter = next(stage.parameters(), None) if isinstance(stage, nn.Module) else None
    return model.decode_first_stage(latents if parameter is None else latents.to(parameter.dtype)).float()


def sample_images(model: Any, prompts: Sequence[str] | None = None, **how: Any) -> np.ndarray:
    """Pictures (N, H, W, 3) uint8 of the prompts, all at once; parameters as for `iter_images`."""
    return np.concatenate([to_uint8(batch) for batch in iter_images(model, prompts, **how)])
