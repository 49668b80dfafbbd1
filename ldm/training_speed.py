"""What a run may do to be faster without changing a number: compile, and keep activations where they fit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.run import RunPlan
from ldm.util import SLOW_BFLOAT16, ConfigError, emulates_bfloat16

log = logging.getLogger(__name__)

MARGIN = 1.5  # activations that fit so many times over are kept; the rest is for gradients and other work


def speed_up(model: Any, plan: RunPlan, device: torch.device) -> None:
    """Do both where `plan` trains and allows them; warn of a precision that the processor emulates."""
    precision = str((plan.lightning.get("trainer") or {}).get("precision") or "")
    if precision.startswith("bf16") and emulates_bfloat16(device):
        log.warning(SLOW_BFLOAT16, f"--precision {precision}", "32-true")
    if plan.train and plan.lightning.get("keep_activations", True):
        keep_activations(model, int(OmegaConf.select(plan.config, "data.params.batch_size") or 1), device)
    if plan.lightning.get("compile"):
        compile_network(model)


def compile_network(model: Any) -> None:
    """Compile the denoising network's passes with gradients in place; names in checkpoints stay as they are.

    Only the first batch's shape is compiled. Passes of other shapes, such as an epoch's last batch, and those without
    gradients, such as validation and samples, run as they are: each shape would be compiled anew, for minutes, and
    a network compiled for any shape is slower.
    """
    network = getattr(getattr(model, "model", None), "diffusion_model", None)
    if not isinstance(network, nn.Module):
        raise ConfigError(f"--compile: {type(model).__name__} has no denoising network to compile")
    plain, compiled = network.forward, torch.compile(network.forward, dynamic=False)
    trains = any(p.requires_grad for p in network.parameters())
    compiled_shape: torch.Size | None = None

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal compiled_shape
        if not torch.is_grad_enabled():
            return plain(x, *args, **kwargs)
        compiled_shape = compiled_shape or x.shape
        if x.shape != compiled_shape:
            return plain(x, *args, **kwargs)
        if trains and x.ndim == 4:  # (B, C, H, W); on a CPU training in bfloat16 is faster in this layout
            x = x.contiguous(memory_format=torch.channels_last)
        return compiled(x, *args, **kwargs)

    network.forward = forward


def keep_activations(model: Any, batch_size: int, device: torch.device) -> None:
    """Turn off the checkpointing that a config asks for where a word is learned and memory suffices without.

    Published configs ask for it, and computing activations again costs a third of the time; gradients are the same.
    """
    layers = checkpointed_layers(model) if getattr(model, "inverts", False) else []
    network = getattr(getattr(model, "model", None), "diffusion_model", None)
    text_only = getattr(model, "conditioning_key", None) == "crossattn" and isinstance(network, UNetModel)
    free = free_bytes(device)
    if not layers or not text_only or free is None:
        return
    coming = sum(p.numel() * p.element_size() for p in model.parameters() if p.device.type != device.type)
    kept = False
    try:
        for layer, name in layers:
            setattr(layer, name, False)
        needed = activation_bytes(model, batch_size)
        kept = MARGIN * needed + coming <= free
    finally:
        if not kept:
            for layer, name in layers:
                setattr(layer, name, True)
    if kept:
        log.info("Activations (%.1f GB) fit in memory: keeping them, instead of computing them twice", needed / 1e9)


def checkpointed_layers(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Modules of `model` that compute their activations again, and the attribute that says so."""
    names = ("use_checkpoint", "checkpoint")
    return [(m, name) for m in model.modules() for name in names if getattr(m, name, None) is True]


def activation_bytes(model: Any, batch_size: int) -> int:
    """Bytes that one pass of the network keeps for the way back to the context; nothing is computed for it."""
    network = model.model.diffusion_model
    weights = {name: torch.empty_like(p, device="meta") for name, p in network.named_parameters()}
    known = {_storage(weight): 0 for weight in weights.values()}

    def pack(tensor: Tensor) -> Tensor:
        known.setdefault(_storage(tensor), tensor.untyped_storage().nbytes())
        kept.append(tensor)  # while it lives its address is no other's
        return tensor

    kept: list[Tensor] = []
    side = model.image_size
    height, width = (side, side) if isinstance(side, int) else side
    x = torch.empty(batch_size, network.in_channels, height, width, device="meta")
    steps = torch.empty(batch_size, device="meta", dtype=torch.long)
    length = getattr(model.cond_stage_model, "max_length", 77)
    width_of = network.context_dim if isinstance(network.context_dim, int) else network.context_dim[0]
    context = torch.empty(batch_size, length, width_of, device="meta", dtype=network.dtype, requires_grad=True)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        torch.func.functional_call(network, weights, (x, steps), {"context": context})
    return sum(known.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on `device`; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    rows = info.read_text().splitlines() if device.type == "cpu" and info.exists() else []
    available = next((int(row.split()[1]) * 1024 for row in rows if row.startswith("MemAvailable")), None)
    limit, used = (_number_in(Path("/sys/fs/cgroup", name)) for name in ("memory.max", "memory.current"))
    if available is None or limit is None or used is None:
        return available
    return min(available, limit - used)  # a container may have less than the machine


def _number_in(path: Path) -> int | None:
    """The number that a file holds; None without the file or where it says `max`."""
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None
