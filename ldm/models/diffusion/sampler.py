"""The loop that all samplers share; a sampler is its `step`.

    x_T -> [eps, x_0 = guided denoiser(x, t) -> x = step(x, ...)] x S -> x_0

A step of index i leads from time step `grid.steps[i]`, where acp = `grid.alphas[i]`, to the less noisy level
`grid.alphas_prev[i]`; indices run from S - 1 down to 0. Noise is drawn on the CPU and only where it is used, so that a
seed means the same picture on every device; with one seed per sample it does not depend on the batch either.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ldm.models.diffusion.guidance import Guidance, conditioning_batch_size
from ldm.models.diffusion.noise import NoiseSource, noise_source
from ldm.models.diffusion.schedule import make_ddim_sampling_parameters, make_ddim_timesteps
from ldm.modules.attention import cached_context
from ldm.protocols import Denoiser

Intermediates = dict[str, list[Tensor]]


class Prediction(NamedTuple):
    """What a denoiser says about x_t: its noise and its clean version, (B, ...) each."""

    eps: Tensor
    x0: Tensor


@dataclasses.dataclass(frozen=True)
class Grid:
    """The levels that a chain of S steps visits, in ascending order of noise."""

    steps: np.ndarray  # (S,) time steps for the model, int64 or (between two trained steps) float64
    alphas: Tensor  # (S,) float64, acp at each of them
    alphas_prev: Tensor  # (S,) float64, acp where the step leads
    sigmas: Tensor  # (S,) float64, standard deviation of the fresh noise of a DDIM step

    def __len__(self) -> int:
        return len(self.steps)

    def head(self, count: int) -> Grid:
        """The `count` least noisy levels."""
        return Grid(self.steps[:count], self.alphas[:count], self.alphas_prev[:count], self.sigmas[:count])


@dataclasses.dataclass
class Run:
    """What one run of the loop holds fixed, and the memory of multistep solvers."""

    grid: Grid
    guidance: Guidance = dataclasses.field(default_factory=Guidance)
    noise: NoiseSource = torch.randn
    temperature: float = 1.0
    noise_dropout: float = 0.0
    quantize_x0: bool = False
    mask: Tensor | None = None
    x0: Tensor | None = None
    history: list[Tensor] = dataclasses.field(default_factory=list)

    def draw(self, like: Tensor) -> Tensor:
        """Standard normal noise of the shape, device and dtype of `like`."""
        noise = self.noise(tuple(like.shape))
        if noise.shape != like.shape:
            raise ValueError(f"the noise source gave shape {tuple(noise.shape)}, expected {tuple(like.shape)}")
        return noise.to(like)

    def scaled_noise(self, like: Tensor, sigma: float) -> Tensor | float:
        """Fresh noise of standard deviation `sigma` times the temperature; 0 (no draw) when that vanishes."""
        if sigma * self.temperature == 0:
            return 0.0
        noise = sigma * self.temperature * self.draw(like)
        if not self.noise_dropout:
            return noise
        # what is dropped comes from the same source of noise, so that it follows the seeds too
        keep = torch.special.ndtr(self.draw(like)) >= self.noise_dropout
        return noise * keep / (1 - self.noise_dropout)


def compute_dtype(model: Any) -> torch.dtype:
    """Dtype of the denoiser's weights; float32 for one without parameters."""
    module = getattr(model, "model", model)
    parameters = module.parameters() if isinstance(module, nn.Module) else ()
    return next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)


def cast(cond: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Move a conditioning to `device` and its floating-point tensors to `dtype`."""
    if isinstance(cond, Tensor):
        return cond.to(device, dtype if cond.is_floating_point() else None)
    if isinstance(cond, dict):
        return {key: cast(value, device, dtype) for key, value in cond.items()}
    if isinstance(cond, (list, tuple)):
        return [cast(value, device, dtype) for value in cond]
    return cond


class Sampler(abc.ABC):
    """Base of all samplers: schedule, loop, guidance, masks, noise, callbacks and logs.

    `model` is a `Denoiser`: a LatentDiffusion, or anything with `apply_model`, `num_timesteps`, `parameterization`,
    `alphas_cumprod` and `device`.
    """

    # Published order of a masked step: DDIM and PLMS paste the noised x0 in before it, the ancestral chain after it.
    paste_after_step = False

    def __init__(self, model: Denoiser) -> None:
        self.model = model
        self.ddpm_num_timesteps = model.num_timesteps
        self.grid: Grid | None = None

    @abc.abstractmethod
    def step(self, x: Tensor, i: int, run: Run) -> tuple[Tensor, Tensor]:
        """Lead `x` (B, ...) from level i to the next less noisy one; also returns the estimate of x_0."""

    def check_eta(self, eta: float) -> None:
        """Raise ValueError for an `eta` that this sampler cannot honour."""
        if eta != 0:
            raise ValueError(f"ddim_eta must be 0 for {type(self).__name__}, which adds no noise, got {eta}")

    def make_grid(self, num_steps: int, discretize: str, eta: float) -> Grid:
        """Levels of a chain of `num_steps` steps; the published DDIM ones unless a sampler has its own."""
        if discretize == "uniform" and self.model.alphas_cumprod[-1] <= 0:
            discretize = "trailing"  # the chain begins at pure noise, which only the last time step is
        steps = make_ddim_timesteps(discretize, num_steps, self.ddpm_num_timesteps)
        sigmas, alphas, alphas_prev = make_ddim_sampling_parameters(self.model.alphas_cumprod, steps, eta)
        return Grid(steps, alphas, alphas_prev, sigmas)

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        """Choose the levels of the chain; `stochastic_encode` and `decode` need it first, `sample` calls it itself."""
        del verbose  # published name; there is nothing to say
        self.check_eta(ddim_eta)
        self.grid = self.make_grid(ddim_num_steps, ddim_discretize, ddim_eta)

    def current_grid(self, use_original_steps: bool = False) -> Grid:
        """Levels chosen by `make_schedule`, or all trained ones."""
        if use_original_steps:
            acp = torch.as_tensor(self.model.alphas_cumprod).detach().cpu().double()
            acp_prev = torch.cat([acp.new_ones(1), acp[:-1]])
            return Grid(np.arange(len(acp)), acp, acp_prev, torch.zeros_like(acp))
        if self.grid is None:
            raise ValueError(f"call {type(self).__name__}.make_schedule(num_steps) first")
        return self.grid

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Any = None,
        *,
        eta: float = 0.0,
        x_T: Tensor | None = None,
        seeds: Sequence[int] | None = None,
        noise: NoiseSource | torch.Generator | Iterable[Tensor] | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        guidance_rescale: float = 0.0,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        quantize_x0: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        paste_x0: bool = False,
        timesteps: int | None = None,
        ddim_discretize: str = "uniform",
        callback: Callable[[int], object] | None = None,
        img_callback: Callable[[Tensor, int], object] | None = None,
        log_every_t: int = 100,
        verbose: bool = True,
    ) -> tuple[Tensor, Intermediates]:
        """Draw `batch_size` samples of `shape` (C, h, w) in `S` steps; returns them (B, C, h, w) and the log.

        Start and noise:  `x_T` (B, C, h, w) or drawn; `seeds` one per sample, or `noise` (see `noise_source`);
                          `eta` and `temperature` scale the fresh noise of each step, `noise_dropout` thins it.
        Guidance:         `conditioning` against `unconditional_conditioning` (an empty or a negative prompt).
        Known parts:      where `mask` (B or 1, 1 or C, h, w) is 1, the noised `x0` replaces x at each step; with
                          `paste_x0` the result holds `x0` itself there.
        Chain:            `timesteps` runs only the least noisy levels; `ddim_discretize` "uniform" (where the last
                          time step is pure noise the same as "trailing"), "quad" or "trailing".
        Watching:         `callback(n)` and `img_callback(pred_x0, n)` after step n = 0, 1, ...; the log holds x and
                          the estimates of x_0 of every `log_every_t`-th index; `verbose` shows a progress bar.
        """
        self.make_schedule(S, ddim_discretize, eta)
        grid = self.current_grid()
        run = Run(
            grid=grid if timesteps is None else grid.head(timesteps),
            guidance=self.guidance(
                batch_size, conditioning, unconditional_conditioning, unconditional_guidance_scale, guidance_rescale
            ),
            noise=noise_source(noise, seeds),
            temperature=temperature,
            noise_dropout=noise_dropout,
            quantize_x0=quantize_x0,
            mask=mask,
            x0=x0,
        )
        x = self._start((batch_size, *shape), x_T, run)
        x, log = self.loop(
            x, run, callback=callback, img_callback=img_callback, log_every_t=log_every_t, verbose=verbose
        )
        if paste_x0 and run.mask is not None and run.x0 is not None:
            x = run.x0 * run.mask + x * (1 - run.mask)
        return x, log

    def guidance(
        self, batch_size: int, cond: Any, uncond: Any = None, scale: float = 1.0, rescale: float = 0.0
    ) -> Guidance:
        """Guidance on the model's device and in its precision, checked against the batch size."""
        for name, value in (("conditioning", cond), ("unconditional_conditioning", uncond)):
            found = conditioning_batch_size(value)
            if found not in (None, batch_size):
                raise ValueError(f"{name} has batch size {found} for {batch_size} samples: give one row per sample")
        device, dtype = self.model.device, compute_dtype(self.model)
        return Guidance(cast(cond, device, dtype), cast(uncond, device, dtype), scale, rescale)

    def _start(self, size: tuple[int, ...], x_T: Tensor | None, run: Run) -> Tensor:
        """Check mask and x_T against the batch's `size`; returns x_T on the model's device."""
        device = self.model.device
        if (run.mask is None) != (run.x0 is None):
            raise ValueError("mask and x0 go together: x0 is what the mask keeps")
        if x_T is not None and tuple(x_T.shape) != size:
            raise ValueError(f"x_T has shape {tuple(x_T.shape)}, expected {size}")
        if run.mask is not None and run.x0 is not None:
            run.mask, run.x0 = run.mask.to(device, torch.float32), run.x0.to(device, torch.float32)
        like = torch.empty(size, device=device, dtype=torch.float32)
        return run.draw(like) if x_T is None else x_T.to(like)

    @torch.no_grad()
    def loop(
        self,
        x: Tensor,
        run: Run,
        *,
        callback: Callable[[int], object] | None = None,
        img_callback: Callable[[Tensor, int], object] | None = None,
        log_every_t: int = 100,
        verbose: bool = False,
    ) -> tuple[Tensor, Intermediates]:
        """Run all levels of `run.grid` from the noisiest, starting at `x` (B, ...) on the model's device."""
        total = len(run.grid)
        log: Intermediates = {"x_inter": [x], "pred_x0": [x]}
        bar = tqdm(reversed(range(total)), total=total, desc=type(self).__name__, disable=not verbose, leave=False)
        with cached_context(self.model) if isinstance(self.model, nn.Module) else contextlib.nullcontext():
            for n, i in enumerate(bar):
                x, pred_x0 = self.advance(x, i, run)
                if callback is not None:
                    callback(n)
                if img_callback is not None:
                    img_callback(pred_x0, n)
                if i % log_every_t == 0 or i == total - 1:
                    log["x_inter"].append(x)
                    log["pred_x0"].append(pred_x0)
        return x, log

    def advance(self, x: Tensor, i: int, run: Run) -> tuple[Tensor, Tensor]:
        """One `step`, with what the mask keeps pasted in before or after it."""
        if run.mask is None:
            return self.step(x, i, run)
        if self.paste_after_step:
            x, pred_x0 = self.step(x, i, run)
            return self.paste(x, i, run), pred_x0
        return self.step(self.paste(x, i, run), i, run)

    def paste(self, x: Tensor, i: int, run: Run) -> Tensor:
        """Replace the masked part of `x` by x0 noised to level i."""
        assert run.mask is not None
        assert run.x0 is not None
        alpha = float(run.grid.alphas[i])
        known = alpha**0.5 * run.x0 + (1 - alpha) ** 0.5 * run.draw(x)
        return known * run.mask + x * (1 - run.mask)

    def predict(self, x: Tensor, i: int, run: Run) -> Prediction:
        """Guided noise and x_0 of `x` (B, ...) at level i, whatever the model's parameterisation."""
        t = torch.full((x.shape[0],), run.grid.steps[i].item(), device=x.device)  # int64 or float (B,)
        x_in = x.to(compute_dtype(self.model))
        raw = run.guidance(self.model, x_in, t).to(x)
        return self.quantized(to_prediction(raw, x, float(run.grid.alphas[i]), self.model.parameterization), run)

    def quantized(self, prediction: Prediction, run: Run) -> Prediction:
        """The prediction with x_0 replaced by its nearest codebook entries where the run asks for it."""
        if not run.quantize_x0:
            return prediction
        first_stage: Any = getattr(self.model, "first_stage_model", None)
        if not hasattr(first_stage, "quantize"):
            raise ValueError("quantize_x0 needs a first stage with a codebook (VQModel)")
        return prediction._replace(x0=first_stage.quantize(prediction.x0)[0])

    def stochastic_encode(
        self, x0: Tensor, t: Tensor, use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """Noise `x0` (B, ...) to the levels `t` (B,): indices into the chain, or trained time steps."""
        alpha = self.current_grid(use_original_steps).alphas[t.cpu()]
        alpha = alpha.view(-1, *(1,) * (x0.dim() - 1))  # (B, 1, ..., 1), float64, which not every device has
        noise = torch.randn(x0.shape) if noise is None else noise
        return alpha.sqrt().float().to(x0) * x0 + (1 - alpha).sqrt().float().to(x0) * noise.to(x0)

    @torch.no_grad()
    def decode(
        self,
        x_latent: Tensor,
        cond: Any,
        t_start: int,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        use_original_steps: bool = False,
        callback: Callable[[int], object] | None = None,
        *,
        seeds: Sequence[int] | None = None,
        noise: NoiseSource | torch.Generator | Iterable[Tensor] | None = None,
        guidance_rescale: float = 0.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        verbose: bool = False,
    ) -> Tensor:
        """Denoise `x_latent` (B, ...), noised to index `t_start`, over the `t_start` least noisy levels."""
        run = Run(
            grid=self.current_grid(use_original_steps).head(t_start),
            guidance=self.guidance(
                len(x_latent), cond, unconditional_conditioning, unconditional_guidance_scale, guidance_rescale
            ),
            noise=noise_source(noise, seeds),
            mask=mask,
            x0=x0,
        )
        x = self._start(tuple(x_latent.shape), x_latent, run)
        return self.loop(x, run, callback=callback, verbose=verbose)[0]


def to_prediction(raw: Tensor, x: Tensor, alpha: float, parameterization: str) -> Prediction:
    """Noise and x_0 that the raw output of a model means for `x` at acp = `alpha`."""
    signal, sigma = alpha**0.5, (1 - alpha) ** 0.5
    if parameterization == "eps":
        return Prediction(raw, (x - sigma * raw) / signal)
    if parameterization == "x0":
        return Prediction((x - signal * raw) / sigma, raw)
    if parameterization == "v":
        return Prediction(signal * raw + sigma * x, signal * x - sigma * raw)
    raise ValueError(f"parameterization '{parameterization}' is unknown; choose eps, x0 or v")
