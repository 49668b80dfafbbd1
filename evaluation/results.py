"""From finished cells to a table: means, intervals, verdicts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from evaluation.cells import Store
from evaluation.claims import Finding, bootstrap_interval, check_claim, look_up_in
from evaluation.experiments import ModelSpec, Quick, Row, Table, sampling_options, training_options
from evaluation.plan import Cell, Request, left_out
from evaluation.scoring import METRICS
from evaluation.stats import FAILS, HOLDS, UNDECIDED, Bootstrap, Interval

METRIC_LABELS = {
    "image": "image similarity",
    "text": "text similarity",
    "text_mean": "text similarity (mean of cosines)",
    "diversity": "diversity",
    "nearest": "nearest training picture",
    "nearest_max": "nearest, largest",
    "image_distinct": "image similarity, no self-pairs",
    "second_image": "similarity to the second concept",
}


@dataclasses.dataclass(frozen=True)
class TableResult:
    """A table with our figures.

    intervals: by (metric, row), at the table's scale; what is not there was not measured.
    measures: figures made of others, by what they say.
    concepts: one record {concept, "metric(row)": mean over seeds, measure: value} for each concept.
    cells: one record for each finished cell, for those who want to compute something else.
    facts: what the figures were made with, for people.
    """

    table: Table
    intervals: Mapping[tuple[str, str], Interval]
    findings: Sequence[Finding]
    measures: Mapping[str, Interval]
    concepts: Sequence[Mapping[str, Any]]
    cells: Sequence[Mapping[str, Any]]
    facts: Mapping[str, str]
    done: int
    total: int

    def interval(self, metric: str, row: Row) -> Interval | None:
        """Our figure of a row; None where it was not measured."""
        return self.intervals.get((metric, row.name))

    def metrics(self) -> list[str]:
        """The table's columns, then the extra ones that were measured."""
        measured = {metric for metric, _ in self.intervals}
        wanted = dict.fromkeys((*self.table.columns, *self.table.extra))
        return [metric for metric in wanted if metric in measured or metric in self.table.columns]

    def label(self, metric: str) -> str:
        """What a metric is called in the table."""
        return self.table.labels.get(metric, METRIC_LABELS.get(metric, metric.replace("_", " ")))

    def verdicts(self) -> dict[str, int]:
        """How many claims hold, do not, are undecided."""
        found = [finding.verdict for finding in self.findings]
        return {verdict: found.count(verdict) for verdict in (HOLDS, FAILS, UNDECIDED)}


def collect(request: Request, cells: Sequence[Cell], store: Store, facts: Mapping[str, str]) -> TableResult:
    """The table from all cells that are done."""
    table = request.table
    records = []
    for cell in cells:
        result = store.result(cell.scoring.unit)
        if result is not None:
            record = {"row": cell.row.name, "concept": cell.concept.label, "seed": cell.seed}
            if cell.concept.category:
                record["category"] = cell.concept.category
            records.append(record | result["metrics"] | {"key": cell.scoring.unit.key})
    known = {**describe(request), **facts}
    return summarise(table, records, [c.label for c in request.concepts], request.seeds, known, len(cells))


def summarise(
    table: Table,
    records: Sequence[Mapping[str, Any]],
    concepts: Sequence[str],
    seeds: Sequence[int],
    facts: Mapping[str, str],
    total: int,
) -> TableResult:
    """Means, intervals and verdicts of records {row, concept, seed, metric: value, ...}."""
    values = arrays(records, concepts, seeds)
    for (metric, _), array in values.items():
        array *= table.scale.get(metric, 1.0)
    bootstrap = Bootstrap(len(concepts), len(seeds))
    means = {key: bootstrap.mean(array) for key, array in values.items()}
    missing = np.full((len(concepts), len(seeds)), math.nan)
    named = {pair for claim in table.claims for pair in claim.rows()}
    named |= {pair for measure in table.measures for pair in measure.rows()}
    values |= dict.fromkeys(named - set(values), missing)
    return TableResult(
        table=table,
        intervals={key: bootstrap.interval(values[key]) for key, mean in means.items() if not math.isnan(mean)},
        findings=[check_claim(claim, shared(values, claim.rows()), bootstrap) for claim in table.claims],
        measures={
            measure.says: bootstrap_interval(measure.compute, shared(values, measure.rows()), bootstrap)
            for measure in table.measures
        },
        concepts=concept_records(table, concepts, values, bootstrap),
        cells=list(records),
        facts=facts,
        done=len(records),
        total=total,
    )


def shared(
    values: Mapping[tuple[str, str], np.ndarray], pairs: Iterable[tuple[str, str]]
) -> dict[tuple[str, str], np.ndarray]:
    """Values (concepts, seeds) of some (metric, row) pairs, not-a-number where any of them is not there.

    So differences between them are paired also while some rows lack concepts that others have.
    """
    chosen = {pair: values[pair] for pair in pairs}
    unknown = np.any([np.isnan(array) for array in chosen.values()], axis=0)
    return {pair: np.where(unknown, math.nan, array) for pair, array in chosen.items()}


def concept_records(
    table: Table, concepts: Sequence[str], values: Mapping[tuple[str, str], np.ndarray], bootstrap: Bootstrap
) -> list[dict[str, Any]]:
    """For each concept the means over its seeds of the table's columns, and the table's measures."""
    columns = {
        f"{metric}({row})": bootstrap.by_concept(array)
        for (metric, row), array in values.items()
        if metric in table.columns
    }
    for measure in table.measures:
        paired = {pair: bootstrap.by_concept(array) for pair, array in shared(values, measure.rows()).items()}
        columns[measure.says] = measure.compute(look_up_in(paired))
    return [
        {"concept": concept} | {name: float(array[at]) for name, array in columns.items()}
        for at, concept in enumerate(concepts)
    ]


def arrays(
    records: Sequence[Mapping[str, Any]], concepts: Sequence[str], seeds: Sequence[int]
) -> dict[tuple[str, str], np.ndarray]:
    """Values (concepts, seeds) by (metric, row); not-a-number where there is none."""
    values: dict[tuple[str, str], np.ndarray] = {}
    for record in records:
        at = concepts.index(record["concept"]), seeds.index(record["seed"])
        for metric, value in record.items():
            if isinstance(value, float):
                key = (metric, record["row"])
                values.setdefault(key, np.full((len(concepts), len(seeds)), math.nan))[at] = value
    return values


def describe(request: Request) -> dict[str, str]:
    """What a table was made with, for people."""
    model = request.model
    sampling, training = model.sampling, model.training
    quick = model.quick if request.quick else None
    if quick is not None:
        sampling = {**sampling, **quick.sampling}
        training = {**training, **{k: quick.scaled(v) for k, v in training.items() if k == "steps"}}
    facts = {
        "Model": model.label,
        "Judge": ", ".join(model.judges.values()) + " (raw cosines unless a scale is named)",
        "Concepts": f"{len(request.concepts)}: {', '.join(concept.label for concept in request.concepts)}",
        "Seeds": ", ".join(map(str, request.seeds)),
        "Pictures": f"{request.pictures} of each prompt",
        "Sampling": ", ".join(f"{key} {value}" for key, value in sampling.items()),
        "Training": ", ".join(f"{key} {value}" for key, value in training.items()),
    }
    for row in request.table.rows:
        if own := what_is_its_own(row, model, quick):
            facts[f"Row '{row.label}'"] = own
    if request.quick:
        facts["Quick form"] = "fewer concepts, seeds, steps and pictures: for a first look only"
    if missing := left_out(request):
        facts["Rows left out"] = missing
    return facts


def what_is_its_own(row: Row, model: ModelSpec, quick: Quick | None) -> str:
    """In what a row differs from the model's training and sampling, for people; empty if in nothing."""
    if row.source == "published":
        return ""
    learned = dataclasses.asdict(training_options(model, row, quick)) if row.source == "word" else {}
    drawn = dataclasses.asdict(sampling_options(model, row, quick)) if row.source != "training_pictures" else {}
    return ", ".join(
        f"{key} {values[key]}"
        for said, values in ((row.training, learned), (row.sampling, drawn))
        for key in said
        if key in values
    )


def metric_notes(result: TableResult) -> list[str]:
    """One line on each metric of the table that has a definition."""
    notes = []
    for metric in result.metrics():
        if metric in METRICS:
            factor = result.table.scale.get(metric)
            notes.append(f"{result.label(metric)}: {METRICS[metric]}" + (f", times {factor:g}" if factor else ""))
    return notes
