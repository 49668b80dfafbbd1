"""One run of the benchmark: every cell asked for, measured beside its contestants and the matrix product."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from evaluation.speed import runs
from evaluation.speed.jobs import Job, Ours, Setup
from evaluation.speed.measure import (
    count_flops,
    interleaved,
    matmul_call,
    median_ratio,
    peak_memory,
    reset_peak_memory,
)
from evaluation.speed.peers import COMPARED, Diffusers, agreement
from evaluation.speed.results import Cell, Results, median
from ldm.generate import first_stage_factor

log = logging.getLogger(__name__)

IN_PROCESSES = ("growth", "load", "startup", "readme_job", "convergence")
WITH_MEMORY = ("unet_forward", "unet_training", "inversion_step", "decode", "picture")
CONVERGENCE = (("dpm", 150), ("ddim", 50), ("dpm", 20))  # sampler and steps: converged, and the two to compare
CONVERGENCE_SCALES = (5.0, 7.5)  # guidance: the commands' default, and that of the other jobs
CONVERGENCE_PICTURES = 40  # each with a caption of its own: pictures differ by several dB
# Of the world that the shipped weights know.
OBJECTS = ("cat", "red apple", "rocket", "tree", "dog", "blue car", "fish", "house", "rose", "hat")
WORLD = ("a sticker of a {} on a blue background", "a 3d render of a {} on a white background",
         "a cartoon of a {} at night", "a silhouette of a {} on a yellow background")  # fmt: skip
QUICK_SIDE = 256  # of the matrix product: processors without 16-bit instructions take minutes for a large one
GROWTH = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (4, 1))  # (pictures, sides) in units of half the model's own side


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure, and how."""

    rounds: int = 5
    device: torch.device = torch.device("cpu")
    quick: bool = False
    against: str | None = None
    switches: tuple[str, ...] = ()
    memory: bool = True
    clock: str = "wall"
    steps: int = 50
    reference_steps: int = 125


def switched(model: Any, switch: str) -> Any:
    """Apply a switch (compile, cuda_graphs, channels_last) to the denoiser, in place."""
    network = model.model.diffusion_model
    if switch == "channels_last":
        torch.nn.utils.convert_conv2d_weight_memory_format(network, torch.channels_last)
    else:
        network.compile(mode="reduce-overhead" if switch == "cuda_graphs" else None)
    return model


def run(plan: Plan, cells: Sequence[tuple[str, str, str]], results: Results) -> None:
    """Measure those of the cells (model, precision, work) that `results` lacks."""
    for (model, dtype), group in itertools.groupby(cells, key=lambda cell: cell[:2]):
        setup = Setup(model, dtype, plan.device, plan.quick, steps=plan.steps)
        names = {job: "/".join((model, dtype, job)) for _, _, job in group if _applies(job, model, dtype)}
        missing = {job: name for job, name in names.items() if name not in results.cells}
        _run_timed(plan, setup, {job: name for job, name in missing.items() if job not in IN_PROCESSES}, results)
        for job, name in missing.items():
            if job in IN_PROCESSES:
                log.info("%s", name)
                results.add(name, _process_cell(plan, setup, job))


def _applies(job: str, model: str, dtype: str) -> bool:
    if job in ("readme_job", "convergence"):
        return model == "emoji" and dtype == "float32"
    return job != "startup" or dtype == "float32"


def _contestants(plan: Plan, setup: Setup) -> Iterator[tuple[str, Any]]:
    """Everyone who does the jobs; they share weights where they can."""
    ours = Ours(setup)
    yield "ours", ours
    if plan.against == "diffusers" and setup.model != "emoji":
        yield "diffusers", Diffusers(ours)
    for switch in plan.switches:
        yield f"ours {switch}", Ours(setup, switched(Ours(setup).model, switch))


def _run_timed(plan: Plan, setup: Setup, missing: dict[str, str], results: Results) -> None:
    if not missing:
        return
    everyone = {who: contestant.jobs() for who, contestant in _contestants(plan, setup)}
    for job, name in missing.items():
        log.info("%s", name)
        calls = {who: jobs[job] for who, jobs in everyone.items() if job in jobs}
        results.add(name, timed_cell(plan, setup, job, calls))
    del everyone
    gc.collect()


def timed_cell(plan: Plan, setup: Setup, job: str, jobs: dict[str, Job]) -> Cell:
    """Times of one job by everyone, interleaved with a matrix product in the same precision."""
    product, operations = matmul_call(setup.torch_dtype, plan.device, QUICK_SIDE if plan.quick else None)
    long = next(iter(jobs.values())).long and not plan.quick
    calls: dict[str, Callable[[], object]] = {who: work.call for who, work in jobs.items()}
    # Counting warms up, too; what is compiled cannot be counted.
    flops = {who: 0 if who.startswith("ours ") else count_flops(call) for who, call in calls.items()}
    for who in (who for who, count in flops.items() if not count):
        calls[who]()
    product()
    times = interleaved({**calls, "matmul": product}, 1 if long else plan.rounds, plan.device)
    rate = operations / median(times["matmul"].of(plan.clock))
    cell: Cell = {"contestants": {}, "matmul_gflops": rate / 1e9}
    for who, work in jobs.items():
        own = times[who].scaled(1 / work.per)
        time = median(own.of(plan.clock))
        result: dict[str, Any] = {"wall": own.wall, "cpu": own.cpu, "time": time}
        if flops[who]:
            result["tflop"] = flops[who] / work.per / 1e12
            result["matmul_fraction"] = flops[who] / work.per / time / rate
        if who != "ours":
            result["ratio"] = median_ratio(times["ours"], times[who], plan.clock)
        if plan.memory and job in WITH_MEMORY and who in ("ours", "diffusers"):
            result["peak_gb"] = _peak_of(setup, job, who)
        cell["contestants"][who] = result
    if job in COMPARED and "diffusers" in jobs:
        cell["difference"] = agreement(jobs["ours"].call(), jobs["diffusers"].call())
    return cell


def _peak_of(setup: Setup, job: str, who: str) -> float | None:
    described = dataclasses.asdict(setup) | {"device": str(setup.device)}
    try:
        return float(runs.child({"kind": "memory", "setup": described, "job": job, "who": who})["peak_gb"])
    except RuntimeError as error:  # most likely for want of memory; times are still worth having
        log.warning("%s", error)
        return None


def _process_cell(plan: Plan, setup: Setup, job: str) -> Cell:
    if job == "growth":
        return growth_cell(plan, setup)
    if job == "load":
        return runs.load_cell(setup.model, setup.dtype, plan.quick)
    if job == "startup":
        return runs.startup_cell(setup.model, plan.quick)
    if job == "readme_job":
        return runs.readme_cell(plan.reference_steps, plan.quick, plan.clock)
    return convergence_cell(setup)


def growth_cell(plan: Plan, setup: Setup) -> Cell:
    """Time and peak memory of one evaluation of the denoiser over batch and picture size."""
    model = Ours(setup).model
    least = first_stage_factor(model) * model.model.diffusion_model.downsampling
    unit = max(setup.size[1] // 2, least)
    points = []
    for batch, sides in GROWTH:
        point = Ours(dataclasses.replace(setup, batch=batch, pixels=unit * sides), model)
        reset_peak_memory(plan.device)
        point.unet_forward()  # warms up
        times = interleaved({"forward": point.unet_forward}, max(1, plan.rounds // 2), plan.device)["forward"]
        points.append(
            {
                "batch": batch,
                "pixels": unit * sides,
                "time": median(times.of(plan.clock)),
                "peak_gb": peak_memory(plan.device),
            }
        )
    low, high = points[0], points[3]
    more = f"{high['peak_gb'] - low['peak_gb']:.2f} GB more at {high['pixels']} than at {low['pixels']} pixels"
    return {"growth": points, "text": more}


@torch.no_grad()
def convergence_cell(setup: Setup) -> Cell:
    """PSNR of 20-step DPM-Solver++ and 50-step DDIM pictures to the converged ones, of the shipped weights."""
    from ldm.generate import DEFAULT_MODEL, load_model
    from ldm.resources import resource_root

    weights = Path(resource_root(), DEFAULT_MODEL, "model.safetensors")
    trained = weights.is_file()
    ours = Ours(setup, load_model(str(weights.parent), device="cpu") if trained else None)
    start, batch = ours.inputs.latent, len(ours.inputs.captions)
    captions = [sentence.format(thing) for thing in OBJECTS for sentence in WORLD]
    found_db: dict[float, list[list[float]]] = {scale: [] for scale in CONVERGENCE_SCALES}
    for first in range(0, batch if setup.quick else CONVERGENCE_PICTURES, batch):
        latent = torch.randn(start.shape, generator=torch.Generator().manual_seed(first)).to(start)
        known = captions[first : first + batch] if trained else ours.inputs.captions
        ours.inputs = dataclasses.replace(ours.inputs, latent=latent, captions=known)
        for scale, pairs in found_db.items():
            pairs += distances(ours, scale)
    found = {f"guidance_{scale:g}": compared(pairs) for scale, pairs in found_db.items()}
    lines = [
        "guidance {:g}: DDIM 50 {ddim50_db:.1f} dB, DPM-Solver++ 20 {dpm20_db:.1f} dB to the converged picture, mean "
        "of {pictures} (standard error of the difference {standard_error_db:.1f} dB)".format(scale, **values)
        for scale, values in zip(found_db, found.values(), strict=True)
    ]
    return {"convergence": found | {"trained": trained}, "text": "; ".join(lines) + " (random weights)" * (not trained)}


def distances(ours: Ours, scale: float) -> list[list[float]]:
    """PSNR to the converged picture of DDIM's and of DPM-Solver++'s, for each picture of the batch."""
    from ldm.models.first_stage import psnr

    chains = [ours.picture(*chain, scale).split(1) for chain in CONVERGENCE]
    return [[float(psnr(end, ddim)), float(psnr(end, dpm))] for end, ddim, dpm in zip(*chains, strict=True)]


def compared(pairs: Sequence[Sequence[float]]) -> dict[str, float]:
    """Means over the pictures, and the standard error of their difference."""
    ddim, dpm = torch.tensor(pairs).T
    return {
        "ddim50_db": float(ddim.mean()),
        "dpm20_db": float(dpm.mean()),
        "pictures": len(ddim),
        "standard_error_db": float((dpm - ddim).std() / len(ddim) ** 0.5),
    }
