"""Orderings that a paper claims, written as inequalities of table cells, and their verdicts.

`text(ours) > text(three_words)` compares two rows; `image(ours) - image(image_only)` and the like are sums with
numbers as factors, `abs(...)` is allowed. An ordering holds when the bootstrap interval of (left - right) is above 0,
does not when it is below 0, and is undecided otherwise. With `every: true` it must hold for each concept by itself,
and the interval is that of the concept that decides (`check_claim`).

A measure is such a sum by itself, as `(image(ours) - image(bare)) / (image(set) - image(bare))`.
"""

from __future__ import annotations

import ast
import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from evaluation.stats import Bootstrap, Interval, interval, smallest
from ldm.util import ConfigError, did_you_mean

OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
SIGNS: dict[type, Callable[[Any], Any]] = {ast.USub: operator.neg, ast.UAdd: operator.pos}
LONGEST = 500  # characters of an expression; deeply nested ones would exhaust the stack
Lookup = Callable[[str, str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Claim:
    """An ordering in words and as an inequality such as `text(ours) > text(three_words)`.

    every: whether it is said of each concept, and not of their mean; see `evaluation.stats.smallest`.
    """

    says: str
    holds_if: str
    every: bool = False

    def difference(self, look_up: Lookup) -> np.ndarray:
        """Left minus right side of `a > b`, or right minus left of `a < b`, for values from `look_up(metric, row)`."""
        left, sign, right = self._sides()
        return sign * (_value(left, look_up, self.holds_if) - _value(right, look_up, self.holds_if))

    def rows(self) -> set[tuple[str, str]]:
        """The (metric, row) pairs that the inequality names."""
        return _named(self.difference, self.holds_if)

    def _sides(self) -> tuple[ast.expr, int, ast.expr]:
        tree = _parse(self.holds_if)
        if not isinstance(tree, ast.Compare) or len(tree.ops) != 1 or not isinstance(tree.ops[0], ast.Gt | ast.Lt):
            raise ConfigError(f"'{self.holds_if}' is no inequality of the form metric(row) > metric(row)")
        return tree.left, 1 if isinstance(tree.ops[0], ast.Gt) else -1, tree.comparators[0]


@dataclasses.dataclass(frozen=True)
class Measure:
    """A figure made of others, such as the share of a gap that is closed."""

    says: str
    value: str

    def compute(self, look_up: Lookup) -> np.ndarray:
        """The figure for values from `look_up(metric, row)`."""
        tree = _parse(self.value)
        if tree is None:
            raise ConfigError(f"'{self.value}' is no sum of metric(row) and numbers")
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(_value(tree, look_up, self.value), dtype=float)

    def rows(self) -> set[tuple[str, str]]:
        """The (metric, row) pairs that it is made of."""
        return _named(self.compute, self.value)


def _parse(text: Any) -> ast.expr | None:
    """The expression that a text is; None if it is none, or one too long to be meant."""
    if not isinstance(text, str) or len(text) > LONGEST:
        return None
    try:
        return ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        return None


def _named(compute: Callable[[Lookup], Any], text: str) -> set[tuple[str, str]]:
    found: set[tuple[str, str]] = set()

    def note(metric: str, row: str) -> np.ndarray:
        found.add((metric, row))
        return np.ones(1)

    try:
        compute(note)
    except (ZeroDivisionError, RecursionError) as error:
        raise ConfigError(f"'{text}' cannot be computed: {error}") from error
    return found


def _value(node: ast.expr, look_up: Lookup, text: str) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left, look_up, text), _value(node.right, look_up, text))
    if isinstance(node, ast.UnaryOp) and type(node.op) in SIGNS:
        return SIGNS[type(node.op)](_value(node.operand, look_up, text))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 1 and not node.keywords:
        (argument,) = node.args
        if node.func.id == "abs":
            return np.abs(_value(argument, look_up, text))
        if isinstance(argument, ast.Name):
            return look_up(node.func.id, argument.id)
    raise ConfigError(f"'{text}': '{ast.unparse(node)}' is neither metric(row) nor a number nor a sum of these")


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim and what the results say about it.

    concepts: for how many concepts it holds by itself (mean over their seeds), of how many; None if that is not known.
    """

    claim: Claim
    difference: Interval
    concepts: tuple[int, int] | None = None

    @property
    def verdict(self) -> str:
        """Holds, does not, or undecided."""
        return self.difference.verdict


def look_up_in(table: Mapping[tuple[str, str], Any]) -> Lookup:
    """Looks values up by (metric, row); raises `ConfigError` for what is not there."""

    def look_up(metric: str, row: str) -> np.ndarray:
        if (metric, row) not in table:
            known = [f"{m}({r})" for m, r in table]
            raise ConfigError(f"no '{metric}({row})' in the table{did_you_mean(f'{metric}({row})', known)}")
        return np.asarray(table[metric, row])

    return look_up


Values = Mapping[tuple[str, str], np.ndarray]


def bootstrap_interval(compute: Callable[[Lookup], Any], values: Values, bootstrap: Bootstrap) -> Interval:
    """Estimate and interval of what `compute` makes of the means of `values` (C, S) by (metric, row)."""
    mean = compute(look_up_in({pair: bootstrap.mean(array) for pair, array in values.items()}))
    replicates = compute(look_up_in({pair: bootstrap.replicates(array) for pair, array in values.items()}))
    results = min((bootstrap.count(array) for array in values.values()), default=0)
    return interval(float(mean), np.asarray(replicates), results=results)


def check_claim(claim: Claim, values: Values, bootstrap: Bootstrap) -> Finding:
    """Decide a claim from `values` (C, S) by (metric, row) that are known for the same concepts and seeds."""
    differences = claim.difference(look_up_in({p: bootstrap.by_concept(array) for p, array in values.items()}))  # (C,)
    known = ~np.isnan(differences)
    concepts = (int((differences[known] > 0).sum()), int(known.sum()))
    if claim.every:
        cells = claim.difference(look_up_in({p: bootstrap.by_cell(array) for p, array in values.items()}))  # (C, S)
        return Finding(claim, smallest(cells), concepts)
    return Finding(claim, bootstrap_interval(claim.difference, values, bootstrap), concepts)
