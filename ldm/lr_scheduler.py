"""Learning-rate factors by step, for `torch.optim.lr_scheduler.LambdaLR`."""

from __future__ import annotations

import bisect
import itertools
import logging
import math
from collections.abc import Sequence

logger = logging.getLogger(__name__)


def _ramp(start: float, end: float, fraction: float) -> float:
    return start + (end - start) * fraction


def _cosine(start: float, end: float, fraction: float) -> float:
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * min(fraction, 1.0)))


class _Report:
    """Logs the factor every `interval` steps; never for 0."""

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def __call__(self, step: int, factor: float) -> float:
        if self.interval > 0 and step % self.interval == 0:
            logger.info("step %d: learning rate factor %g", step, factor)
        return factor


class LambdaWarmUpCosineScheduler:
    """Straight line from `lr_start` to `lr_max` over the warm-up, then a cosine down to `lr_min`, which it keeps.

    `max_decay_steps` counts from step 0. The values are factors on the optimiser's learning rate.
    """

    def __init__(
        self,
        warm_up_steps: int,
        lr_min: float,
        lr_max: float,
        lr_start: float,
        max_decay_steps: int,
        verbosity_interval: int = 0,
    ) -> None:
        self.warm_up_steps = warm_up_steps
        self.lr_min = lr_min
        self.lr_max = lr_max
        self.lr_start = lr_start
        self.max_decay_steps = max_decay_steps
        self.report = _Report(verbosity_interval)

    def schedule(self, n: int) -> float:
        """Factor at step `n`."""
        if n < self.warm_up_steps:
            return self.report(n, _ramp(self.lr_start, self.lr_max, n / self.warm_up_steps))
        decay_steps = self.max_decay_steps - self.warm_up_steps
        fraction = (n - self.warm_up_steps) / decay_steps if decay_steps > 0 else 1.0
        return self.report(n, _cosine(self.lr_max, self.lr_min, fraction))

    def __call__(self, n: int) -> float:
        """Factor at step `n`."""
        return self.schedule(n)


class _Cycles:
    """Cycles one after the other, each with its own warm-up and decay; after the last one the factor stays."""

    def __init__(
        self,
        warm_up_steps: Sequence[int],
        f_min: Sequence[float],
        f_max: Sequence[float],
        f_start: Sequence[float],
        cycle_lengths: Sequence[int],
        verbosity_interval: int = 0,
    ) -> None:
        lists = {
            "warm_up_steps": warm_up_steps,
            "f_min": f_min,
            "f_max": f_max,
            "f_start": f_start,
            "cycle_lengths": cycle_lengths,
        }
        for name, values in lists.items():
            if len(values) != len(cycle_lengths) or not len(values):
                raise ValueError(f"{name} is {values}, but cycle_lengths is {cycle_lengths}; give one value per cycle")
        self.warm_up_steps = warm_up_steps
        self.f_min = f_min
        self.f_max = f_max
        self.f_start = f_start
        self.cycle_lengths = cycle_lengths
        self.report = _Report(verbosity_interval)

    def decay(self, cycle: int, n: int) -> float:
        """Factor at step `n` of `cycle`, after its warm-up."""
        raise NotImplementedError

    def schedule(self, n: int) -> float:
        """Factor at step `n`; the last step of a cycle is still its own."""
        ends = list(itertools.accumulate(self.cycle_lengths))
        n_held = min(n, ends[-1])  # past the last cycle the factor stays
        cycle = bisect.bisect_left(ends, n_held)
        local = n_held - (ends[cycle] - self.cycle_lengths[cycle])
        warm_up = self.warm_up_steps[cycle]
        if local < warm_up:
            return self.report(n, _ramp(self.f_start[cycle], self.f_max[cycle], local / warm_up))
        return self.report(n, self.decay(cycle, local))

    def __call__(self, n: int) -> float:
        """Factor at step `n`."""
        return self.schedule(n)


class LambdaWarmUpCosineScheduler2(_Cycles):
    """Cycles of a linear warm-up from `f_start` to `f_max` and a cosine down to `f_min`; one list entry per cycle."""

    def decay(self, cycle: int, n: int) -> float:
        """Cosine from the end of the warm-up to the end of the cycle."""
        decay_steps = self.cycle_lengths[cycle] - self.warm_up_steps[cycle]
        fraction = (n - self.warm_up_steps[cycle]) / decay_steps if decay_steps > 0 else 1.0
        return _cosine(self.f_max[cycle], self.f_min[cycle], fraction)


class LambdaLinearScheduler(_Cycles):
    """Cycles of a linear warm-up from `f_start` to `f_max` and a linear decay to `f_min`; one list entry per cycle.

    The line of the decay starts at step 0 of the cycle, so the factor drops a little where the warm-up ends.
    """

    def decay(self, cycle: int, n: int) -> float:
        """Line from `f_max` at the start of the cycle to `f_min` at its end."""
        return _ramp(self.f_max[cycle], self.f_min[cycle], n / self.cycle_lengths[cycle])
