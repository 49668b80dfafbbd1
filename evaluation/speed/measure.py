"""Clocks, peak memory, model FLOPs and the machine's own matrix-multiply rate."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ldm.modules.diffusionmodules.convolution import direct_convolutions

CLOCKS = ("wall", "cpu")
MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}
BYTES_PER_GB = 1e9


@dataclasses.dataclass
class Times:
    """Seconds of each call of one job, in the order of the rounds."""

    wall: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)

    def of(self, clock: str) -> list[float]:
        """The list of one clock."""
        return self.wall if clock == "wall" else self.cpu

    def scaled(self, factor: float) -> Times:
        """Every time multiplied by `factor`."""
        return Times([t * factor for t in self.wall], [t * factor for t in self.cpu])


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def timed(call: Callable[[], object], device: torch.device, times: Times) -> None:
    """Call once and append its seconds; CUDA events time the device, `time.process_time` the processor."""
    synchronize(device)
    cpu = time.process_time()
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        wall = begin.elapsed_time(end) / 1000
    else:
        start = time.perf_counter()
        call()
        synchronize(device)
        wall = time.perf_counter() - start
    times.cpu.append(time.process_time() - cpu)
    times.wall.append(wall)


def interleaved(calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, Times]:
    """Time each call once per round, one after the other, so that what slows the machine slows all alike.

    The order is reversed in every other round.
    """
    times = {name: Times() for name in calls}
    for index in range(rounds):
        names = list(calls) if index % 2 == 0 else list(calls)[::-1]
        for name in names:
            timed(calls[name], device, times[name])
    return times


def median_ratio(times: Times, other: Times, clock: str) -> float:
    """Median over the rounds of this one's time divided by the other's."""
    return statistics.median(a / b for a, b in zip(times.of(clock), other.of(clock), strict=True))


def matmul_call(dtype: torch.dtype, device: torch.device, side: int | None = None) -> tuple[Callable[[], object], int]:
    """A square matrix product in `dtype`, and its number of operations."""
    side = side or MATMUL_SIDE.get(device.type, 4096)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b, 2 * side**3


def _cpu_attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **options: Any) -> int:
    del args, out_shape, options
    return sdpa_flop_count(query, key, value)


def _cpu_attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **options: Any) -> int:
    del args, options
    return sdpa_backward_flop_count(grad, query, key, value)


def count_flops(call: Callable[[], object]) -> int:
    """Operations of the matrix products, convolutions and attentions of one call (a multiply-add is two).

    Those of the model as it is defined: what a faster way to the same convolution saves counts as done.
    """
    aten = torch.ops.aten
    fused = {  # torch's table has no row for the CPU's kernels
        aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
    }
    with direct_convolutions(), FlopCounterMode(display=False, custom_mapping=fused) as counter:
        call()
    return counter.get_total_flops()


def peak_memory(device: torch.device) -> float:
    """Peak memory in GB: of this process, or on a CUDA device what tensors took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / BYTES_PER_GB
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / BYTES_PER_GB
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / BYTES_PER_GB


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new peak, where the system can."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what Python has freed goes back first
        Path("/proc/self/clear_refs").write_text("5")


def machine(device: torch.device) -> dict[str, Any]:
    """What a reader has to know about the machine."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": device.type,
        "name": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    rows = info.read_text().splitlines() if info.exists() else []
    return next((row.partition(":")[2].strip() for row in rows if row.startswith("model name")), "unknown")
