"""Bootstrap intervals over concepts and seeds, and what they say about an expected ordering."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from scipy.special import stdtrit

RESAMPLES = 2000
LEVEL = 0.95
HOLDS, FAILS, UNDECIDED = "holds", "does not", "undecided"


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate and its interval; the bounds are not-a-number where there is too little to tell."""

    mean: float
    low: float = math.nan
    high: float = math.nan

    @property
    def verdict(self) -> str:
        """What the interval says about "this is greater than zero": holds, does not, or undecided."""
        if self.low > 0:
            return HOLDS
        return FAILS if self.high < 0 else UNDECIDED

    def text(self, digits: int = 3) -> str:
        """`0.788 [0.780, 0.795]`, or the mean alone where no bounds are known."""
        numbers = [f"{value:.{digits}f}" for value in (self.mean, self.low, self.high)]
        return numbers[0] if math.isnan(self.low) else f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"

    def __str__(self) -> str:
        return self.text()


def interval(mean: float, replicates: np.ndarray, level: float = LEVEL, results: int = 2) -> Interval:
    """Percentile interval from bootstrap replicates (R,) of so many `results`; no bounds for fewer than two."""
    known = replicates[np.isfinite(replicates)]
    if not len(known) or results < 2:
        return Interval(float(mean))
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(mean), float(low), float(high))


class Bootstrap:
    """Two-level resampling of results (concepts, seeds): concepts first, then the seeds within each.

    All rows of a table are resampled together, so that differences between rows are paired: a concept that is hard
    for one setup is hard for the other too. Missing results (not-a-number) are left out of the means.
    """

    def __init__(self, concepts: int, seeds: int, resamples: int = RESAMPLES, seed: int = 0) -> None:
        if concepts < 1 or seeds < 1 or resamples < 1:
            raise ValueError(f"nothing to resample: {concepts} concepts, {seeds} seeds, {resamples} resamples")
        rng = np.random.default_rng(seed)
        self.shape = (concepts, seeds)
        self.resamples = resamples
        self._concepts = rng.integers(concepts, size=(resamples, concepts))
        self._seeds = rng.integers(seeds, size=(resamples, concepts, seeds))

    def mean(self, values: np.ndarray) -> float:
        """Mean over the concepts of the means over their seeds; values (C, S) or (C, 1) without seeds."""
        return float(_mean(_mean(self._full(values))))

    def replicates(self, values: np.ndarray) -> np.ndarray:
        """Bootstrap replicates (R,) of `mean`."""
        drawn = self._full(values)[self._concepts[:, :, None], self._seeds]  # (R, C, S)
        return _mean(_mean(drawn))

    def by_concept(self, values: np.ndarray) -> np.ndarray:
        """Means (C,) over the seeds."""
        return _mean(self._full(values))

    def interval(self, values: np.ndarray, level: float = LEVEL) -> Interval:
        """Mean and percentile interval of results (C, S)."""
        return interval(self.mean(values), self.replicates(values), level, self.count(values))

    def by_cell(self, values: np.ndarray) -> np.ndarray:
        """Results (C, S) of single cells."""
        return self._full(values)

    def count(self, values: np.ndarray) -> int:
        """How many results there are; values without seeds count once for each concept."""
        return int((~np.isnan(np.asarray(values, dtype=float))).sum())

    def _full(self, values: np.ndarray) -> np.ndarray:
        try:
            return np.broadcast_to(np.asarray(values, dtype=float), self.shape)
        except ValueError as error:
            raise ValueError(f"results of shape {np.shape(values)} do not fit {self.shape} concepts, seeds") from error


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is not missing; missing where all is."""
    known = ~np.isnan(values)
    count = known.sum(-1)
    return np.where(count, np.where(known, values, 0.0).sum(-1) / np.maximum(count, 1), math.nan)


def smallest(differences: np.ndarray, level: float = LEVEL) -> Interval:
    """The smallest of the concepts' true differences; `differences` (C, S) are of single seeds.

    Three seeds are too few for a bootstrap, so the bounds are Student's t, with one deviation between seeds for all
    concepts. The lower bound is the least of the concepts' own: it errs only where the bound of the truly smallest
    does. The upper bound, too, is the least, but any of C may be wrong there, so each has the level 1 - (1 - level) / C
    (Bonferroni). Without results of some concept there is no lower bound, without two seeds of any there is neither.
    """
    values = np.asarray(differences, dtype=float)
    counts = (~np.isnan(values)).sum(1)
    known = values[counts > 0]
    if not len(known):
        return Interval(math.nan)
    counts = counts[counts > 0]
    means = _mean(known)
    free = int((counts - 1).sum())
    if free == 0:
        return Interval(float(means.min()))
    error = math.sqrt(np.nansum((known - means[:, None]) ** 2) / free) / np.sqrt(counts)
    tail = (1 - level) / 2
    low = (means - stdtrit(free, 1 - tail) * error).min() if len(known) == len(values) else math.nan
    high = (means + stdtrit(free, 1 - tail / len(values)) * error).min()
    return Interval(float(means.min()), float(low), float(high))


def group_intervals(values: Mapping[str, np.ndarray], resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Interval]:
    """Mean and interval of each named sample (N,); not-a-number is left out."""
    intervals = {}
    for name, sample in values.items():
        column = np.asarray(sample, dtype=float)[:, None]
        intervals[name] = Bootstrap(len(column), 1, resamples, seed).interval(column)
    return intervals
