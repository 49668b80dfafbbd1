"""Captions that lie beside pictures: one `.txt` file for each, or a `metadata.jsonl` or `metadata.csv` for all."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

ENCODING = "utf-8-sig"  # with or without the mark that Windows programs put first
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")


@contextlib.contextmanager
def utf8(path: Path) -> Iterator[None]:
    """Turn an error about bytes that are no UTF-8 into a `ValueError` that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text (byte {error.start}): save it as UTF-8") from error


def read_text(path: Path) -> str:
    """Text of a file; raises `ValueError` that names it when it is not UTF-8."""
    with utf8(path):
        return path.read_text(encoding=ENCODING)


def read_captions(folder: Path, images: Sequence[Path], metadata: Path | None = None) -> dict[str, str]:
    """Return caption by path relative to `folder` (posix) for those of `images` that have one.

    `metadata` names a .jsonl or .csv file with `file_name` and `text` columns; by default the folder's own is taken
    where there is one. A picture's side-car .txt file goes before its metadata line.
    """
    if metadata is None:
        own = (folder / name for name in METADATA_NAMES)
        metadata = next((path for path in own if path.is_file()), None)
    rows = {} if metadata is None else dict(read_metadata(metadata))
    captions = {}
    for image in images:
        name = image.relative_to(folder).as_posix()
        side_car = image.with_suffix(".txt")
        if side_car.is_file():
            captions[name] = read_text(side_car).strip()
        elif name in rows:
            captions[name] = rows[name].strip()
    return captions


def read_metadata(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (file name, text) of each row of a .jsonl or .csv file.

    Raises `ValueError` that names file and line for a row without `file_name` or `text`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no caption file {path}; it has 'file_name' and 'text' for each picture")
    rows = _jsonl_rows(path) if path.suffix == ".jsonl" else _csv_rows(path)
    for number, row in rows:
        name, text = row.get("file_name"), row.get("text")
        if not isinstance(name, str) or not isinstance(text, str):
            raise ValueError(f"{path}, line {number}: needs 'file_name' and 'text', both strings, has {sorted(row)}")
        yield name, text


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    with path.open(encoding=ENCODING) as file, utf8(path):
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: a JSON object is needed, such as {{'file_name': ...}}")
            yield number, row


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    with path.open(encoding=ENCODING, newline="") as file, utf8(path):
        try:
            for number, row in enumerate(csv.DictReader(file), start=2):
                yield number, {key: value for key, value in row.items() if key is not None}
        except csv.Error as error:
            raise ValueError(f"{path} is no table of captions ({error})") from error
