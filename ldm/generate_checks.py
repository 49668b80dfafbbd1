"""What is refused before a model is loaded: numbers and texts that no picture can be drawn with, damaged settings."""

from __future__ import annotations

import argparse
import reprlib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MAX_PIXELS = 2**26  # of a picture, as 8192 x 8192: far beyond what models make sense of, and tens of gigabytes to draw
USUAL_SIDE = 1024  # pixels that a side counts as which is left to the model
MAX_ETA = 10.0  # eta above 1 may be tried; this much adds ten times the noise of DDPM
KINDS = {int: "a whole number", float: "a number", None: "a text"}  # values of flags, by their type in argparse
OFTEN_UNSET = ("H", "W", "ckpt_path")  # null in pictures of txt2img.py, though other commands have defaults for them


def check_seed(seed: int, count: int = 1) -> None:
    """Raise ValueError where the seeds of `count` pictures, `seed` and those after it, do not fit into 64 bits."""
    if not -(2**63) <= seed <= 2**64 - count:
        raise ValueError(f"--seed {seed} takes more than 64 bits: give one from 0 to {2**64 - count}")


def check_eta(flag: str, eta: float) -> None:
    """Raise ValueError for an eta of the ddim sampler that is no sensible amount of noise."""
    if not 0.0 <= eta <= MAX_ETA:
        raise ValueError(f"{flag} must lie between 0 (no noise) and {MAX_ETA:g}, got {eta}; 1 is as much as DDPM has")


def check_size(name: str, width: int | None, height: int | None) -> None:
    """Raise ValueError for pictures of absurdly many pixels; `name` says whose size it is, None is the model's own."""
    width, height = width or USUAL_SIDE, height or USUAL_SIDE
    if width * height > MAX_PIXELS:
        raise ValueError(f"{name}: {width} x {height} pixels are too many; give at most {MAX_PIXELS}, 8192 x 8192")


def check_texts(args: argparse.Namespace, *flags: str) -> None:
    """Raise ValueError where a flag's text, or one of its texts, is no Unicode: such bytes were typed or pasted."""
    for flag in flags:
        value = getattr(args, flag)
        for text in [value] if isinstance(value, str) else value or []:
            if not is_unicode(text):
                raise ValueError(f"--{flag} {text!r} holds bytes that are no UTF-8: write the text in UTF-8")


def is_unicode(text: str) -> bool:
    """Whether all of `text` can be written in UTF-8; bytes of the command line that could not be read cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_settings(
    path: str | Path, settings: Mapping[str, Any], parser: argparse.ArgumentParser, flags: Iterable[str]
) -> None:
    """Raise ValueError where one of the `flags` has a value in a picture's `settings` that `parser` would not give."""
    actions = {action.dest: action for action in reversed(parser._actions)}  # of several for one value, the first
    for flag in flags:
        expected = _mismatch(actions[flag], settings[flag])
        if expected:
            raise ValueError(f"{path}'s settings are damaged: {flag} is {reprlib.repr(settings[flag])}, not {expected}")


def _mismatch(action: argparse.Action, value: Any) -> str | None:
    """What a flag's value has to be, where `value` is something else."""
    if value is None and (action.default is None or action.dest in OFTEN_UNSET):
        return None
    if action.nargs == 0:
        return None if isinstance(value, bool) else "true or false"
    kind = KINDS[action.type]  # type: ignore[index]
    if action.nargs is not None:
        fits = isinstance(value, list) and all(_is_a(action.type, part) for part in value)
        return None if fits else f"a list, each entry {kind}"
    if action.choices is not None:
        return None if value in action.choices else f"one of {', '.join(action.choices)}"
    return None if _is_a(action.type, value) else kind


def _is_a(kind: Any, value: Any) -> bool:
    """Whether a value of JSON is one of a flag's type: int, float (finite), or None for text."""
    if kind is None:
        return isinstance(value, str)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole if kind is int else (whole or isinstance(value, float)) and abs(value) <= sys.float_info.max
