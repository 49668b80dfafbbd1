"""Scores of earlier runs, read back from a table's own folder.

So a table grows over several sittings and machines although the pictures and words under the store are gone: what has
been scored with the same settings is neither learned nor drawn again. `cells.csv` has the cells of the table as it is;
those of other settings (fewer seeds, another model, the quick form) that lay there before are kept in `kept.csv`.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from evaluation.cells import Store
from evaluation.dreambench_plus import KINDS
from evaluation.plan import Cell
from evaluation.tables import KEY, cells_csv, write_text

log = logging.getLogger(__name__)

FILE, KEPT = "cells.csv", "kept.csv"
# Ratings (`KINDS`) come from files of their own: the hash of a score does not depend on them
NO_METRICS = ("row", "concept", "seed", "category", *KINDS, KEY)


def take_over(cells: Sequence[Cell], store: Store, folder: Path) -> int:
    """Put scores of a table's folder into the store where they are missing; returns how many.

    Raises `ValueError` for a file that is not what this project writes.
    """
    known = {line[KEY]: line for line in read_lines(folder)}
    taken = 0
    for unit in {cell.scoring.unit.key: cell.scoring.unit for cell in cells}.values():
        values = metrics_of(known[unit.key]) if unit.key in known else {}
        if not values:
            continue
        with store.lock(unit):
            if not store.is_done(unit):
                store.begin(unit)
                store.finish(unit, {"metrics": values, "taken_from": folder.as_posix()})
                taken += 1
    if taken:
        log.info("%d scores of %s are of these settings, and are kept", taken, folder)
    return taken


def keep_others(folder: Path, keys: Collection[str]) -> None:
    """Before `cells.csv` is written with the cells `keys`, move its other cells to `kept.csv`."""
    others = {line[KEY]: line for line in read_lines(folder) if line[KEY] not in keys}
    if others:
        write_text(folder / KEPT, cells_csv(list(others.values())))
    else:
        (folder / KEPT).unlink(missing_ok=True)


def read_lines(folder: Path) -> list[dict[str, str]]:
    """The lines of `kept.csv` and `cells.csv` that have a hash.

    Raises `ValueError` for a file that was cut off, has something else than numbers, or strange columns.
    """
    lines: list[dict[str, str]] = []
    for path in (folder / KEPT, folder / FILE):
        if not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
            if text and not text.endswith("\n"):
                raise ValueError("it ends within a line")
            every = list(csv.DictReader(io.StringIO(text, newline="")))
            if any(None in line or None in line.values() for line in every):
                raise ValueError("a line has more or fewer columns than the first")
            found = [line for line in every if line.get(KEY)]
            for line in found:
                metrics_of(line)
        except (ValueError, TypeError, AttributeError, csv.Error) as error:
            raise ValueError(f"{path} is no table of cells ({error}): delete it to compute them again") from error
        lines += found
    return lines


def metrics_of(line: Mapping[str, str]) -> dict[str, float]:
    """The metrics of a line but ratings; not-a-number is one (diversity of a single picture), infinity is a mistake."""
    values = {}
    for name, text in line.items():
        if name in NO_METRICS or not text:
            continue
        if not re.fullmatch(r"\w+", name):
            raise ValueError(f"the column {name!r} is no metric")
        values[name] = float(text)
        if math.isinf(values[name]):
            raise ValueError(f"{name} is {text}")
    return values
