"""The pieces of work that are timed, as this code base does them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from evaluation.speed.models import DTYPES, SIZES, build, pixels_of
from ldm.callbacks.moments import drop_parts
from ldm.generate import SAMPLERS, SamplingOptions, encode_prompts, first_stage_factor

GUIDANCE = 7.5
STEP_COUNT = 4  # steps of the chain that times one of them
CAPTIONS = ("a photo of *", "a rendering of a *", "the photo of a *", "a cropped photo of *")


@dataclasses.dataclass(frozen=True)
class Setup:
    """What one run of jobs holds fixed."""

    model: str
    dtype: str = "float32"
    device: torch.device = torch.device("cpu")
    quick: bool = False
    batch: int | None = None
    pixels: int | None = None
    steps: int = 50

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return DTYPES[self.dtype]

    @property
    def size(self) -> tuple[int, int]:
        """Batch and side of the pictures."""
        default = SIZES[self.model]
        return self.batch or default.batch, self.pixels or pixels_of(self.model, self.quick)


@dataclasses.dataclass(frozen=True)
class Job:
    """A call to time; `per` is how many pieces of the work it does at once."""

    call: Callable[[], Any]
    per: int = 1
    long: bool = False  # minutes at full size: timed once


@dataclasses.dataclass
class Inputs:
    """What every contestant is given."""

    latent: Tensor  # (B, C, h, w) float32
    noise: Tensor  # (B, C, h, w) float32
    picture: Tensor  # (B, 3, H, W) in [-1, 1], float32
    steps: Tensor  # (B,) int64
    captions: list[str]


def make_inputs(setup: Setup, model: Any) -> Inputs:
    """The same random inputs for every contestant."""
    batch, pixels = setup.size
    side = pixels // first_stage_factor(model)
    generator = torch.Generator().manual_seed(1)
    shape = (batch, model.channels, side, side)
    latent, noise = (torch.randn(shape, generator=generator).to(setup.device) for _ in range(2))
    picture = torch.rand((batch, 3, pixels, pixels), generator=generator).to(setup.device) * 2 - 1
    steps = torch.randint(model.num_timesteps, (batch,), generator=generator).to(setup.device)
    return Inputs(latent, noise, picture, steps, [CAPTIONS[k % len(CAPTIONS)] for k in range(batch)])


def training_pass(
    network: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Inputs, context: Tensor, dtype: torch.dtype
) -> Tensor:
    """Forward and backward through the denoiser; returns the gradient at the context."""
    leaf = context.detach().clone().requires_grad_()
    output = network(inputs.latent.to(dtype), inputs.steps, leaf)
    F.mse_loss(output.float(), inputs.noise).backward()
    assert leaf.grad is not None
    return leaf.grad


class Ours:
    """The jobs on a `LatentDiffusion`."""

    def __init__(self, setup: Setup, model: Any = None) -> None:
        self.setup = setup
        self.model = build(setup.model, setup.torch_dtype, setup.device, setup.quick) if model is None else model
        self.model.eval()
        self.inputs = make_inputs(setup, self.model)
        self.moments = torch.cat([self.inputs.latent, torch.full_like(self.inputs.latent, -4.0)], dim=1)
        with torch.no_grad():
            self.context = self.model.get_learned_conditioning(self.inputs.captions)

    @functools.cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """Of the vectors."""
        return self.model.configure_optimizers()

    def only_for(self, job: str) -> None:
        """Let go of what a run that does nothing but `job` would not hold either."""
        if job == "inversion_step":  # the moments are cached; the decoder stays for previews
            drop_parts(self.model.first_stage_model, ("encoder", "quant_conv"))

    def jobs(self) -> dict[str, Job]:
        """All jobs by name."""
        return {
            "unet_forward": Job(self.unet_forward),
            "unet_training": Job(self.unet_training),
            "inversion_step": Job(self.inversion_step),
            "encode": Job(self.encode),
            "decode": Job(self.decode),
            "text": Job(self.text),
            "guided_step": Job(lambda: self.sample("ddim", STEP_COUNT), per=STEP_COUNT),
            "picture": Job(lambda: self.picture("ddim", self.setup.steps), long=True),
            "picture_dpm20": Job(lambda: self.picture("dpm", 20), long=True),
        }

    @torch.no_grad()
    def unet_forward(self) -> Tensor:
        """One evaluation of the denoiser."""
        dtype = self.setup.torch_dtype
        return self.model.apply_model(self.inputs.latent.to(dtype), self.inputs.steps, self.context)

    def unet_training(self) -> Tensor:
        """The denoiser forward and back to the context."""
        return training_pass(self.model.apply_model, self.inputs, self.context, self.setup.torch_dtype)

    def inversion_step(self) -> Tensor:
        """One training step of a word: cached moments, captions, denoiser, back to the vectors, optimiser."""
        batch = {"moments": self.moments, "caption": self.inputs.captions}
        loss, _ = self.model.shared_step(batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def encode(self) -> Tensor:
        """Pictures to the mean of their latents."""
        return self.model.encode_first_stage(self.inputs.picture).mean

    @torch.no_grad()
    def decode(self) -> Tensor:
        """Latents to pictures."""
        return self.model.decode_first_stage(self.inputs.latent)

    @torch.no_grad()
    def text(self) -> Tensor:
        """Captions to contexts."""
        return self.model.get_learned_conditioning(self.inputs.captions)

    @torch.no_grad()
    def sample(self, sampler: str, steps: int, scale: float = GUIDANCE) -> Tensor:
        """Latents of a guided chain, captions encoded on the way."""
        options = SamplingOptions(scale=scale)
        cond, uncond = encode_prompts(self.model, self.inputs.captions, options)
        latents, _ = SAMPLERS[sampler](self.model).sample(
            steps,
            len(self.inputs.latent),
            tuple(self.inputs.latent.shape[1:]),
            cond,
            x_T=self.inputs.latent,
            unconditional_guidance_scale=scale,
            unconditional_conditioning=uncond,
            verbose=False,
        )
        return latents

    @torch.no_grad()
    def picture(self, sampler: str, steps: int, scale: float = GUIDANCE) -> Tensor:
        """Pictures from captions."""
        return self.model.decode_first_stage(self.sample(sampler, steps, scale))
