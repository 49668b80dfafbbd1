"""Scores of earlier runs, read back from a table's own `cells.csv`.

So a table grows over several sittings and machines although the pictures and words under the store are gone: what has
been scored with the same settings is neither learned nor drawn again.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from pathlib import Path

from evaluation.cells import Store
from evaluation.plan import Cell

log = logging.getLogger(__name__)

FILE = "cells.csv"
KEY = "key"  # the column with the hash of all that a score depends on
NO_METRICS = ("row", "concept", "seed", "category", KEY)


def take_over(cells: Sequence[Cell], store: Store, folder: Path) -> int:
    """Put scores of `<folder>/cells.csv` into the store where they are missing; returns how many.

    Raises `ValueError` for a file that is not what this project writes.
    """
    path = folder / FILE
    known = read_scores(path) if path.is_file() else {}
    taken = 0
    for unit in {cell.scoring.unit.key: cell.scoring.unit for cell in cells}.values():
        if unit.key not in known:
            continue
        with store.lock(unit):
            if not store.is_done(unit):
                store.begin(unit)
                store.finish(unit, {"metrics": known[unit.key], "taken_from": path.as_posix()})
                taken += 1
    if taken:
        log.info("%d scores of %s are of these settings, and are kept", taken, path)
    return taken


def read_scores(path: Path) -> dict[str, dict[str, float]]:
    """{hash of the settings: {metric: value}}; empty for a table without hashes."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = [line for line in csv.DictReader(file) if line.get(KEY)]
        return {
            line[KEY]: {name: float(value) for name, value in line.items() if name not in NO_METRICS and value}
            for line in lines
        }
    except (ValueError, TypeError, AttributeError, csv.Error) as error:
        raise ValueError(f"{path} is no table of cells ({error}): delete it to compute them again") from error
