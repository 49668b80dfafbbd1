"""Text and JSON that came from elsewhere: read whole, or refused in one line that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark; raises `ValueError` for another encoding."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error.reason}): save it in that encoding") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises `ValueError` for anything else."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # numbers and nesting without end are no JSONDecodeError
        raise ValueError(f"{path} is not JSON that can be read ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} should hold a JSON object, not a {type(value).__name__}")
    return value
