"""What every command shares: errors that users cause end in one line, not in a traceback."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

USER_ERRORS = (ValueError, TypeError, OSError)
OUT_OF_MEMORY = ("OutOfMemoryError", "MemoryError")  # by name: torch's own is not worth importing torch for
DEBUG_FLAGS = ("--debug", "-d")
TRUE_WORDS, FALSE_WORDS = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")
BAD_INPUT, INTERRUPTED = 2, 130
MOST_FILES = 8  # that are named on the screen


def add_debug_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--debug`, which `run_command` looks for."""
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")


def asks_for_debug(argv: Sequence[str]) -> bool:
    """Whether `--debug` or `-d` is among the arguments; main.py also takes `-d false`, the last one counts."""
    answer = False
    for word, following in zip(argv, [*argv, ""][1:], strict=True):
        flag, equals, value = word.partition("=")
        if flag in DEBUG_FLAGS:
            answer = (value if equals else following).lower() not in FALSE_WORDS
    return answer


def add_model_flags(parser: argparse.ArgumentParser, weights: str = "the model that comes along") -> None:
    """Add the flags that say which model a command loads, by default `weights`, and where it runs."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--ckpt_path",
        "--ckpt",
        metavar="FILE|DIR",
        help=f"weights (.ckpt, .safetensors), a model's folder or a run directory (default: {weights})",
    )
    group.add_argument("--config", metavar="YAML", help="its config (default: found beside the weights or from them)")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto (default: auto)")
    group.add_argument(
        "--precision",
        default="full",
        choices=("full", "autocast", "half"),
        help="full: float32; autocast: 16 bits where it is safe; half: 16-bit weights (default: %(default)s)",
    )


def print_files(pictures: Sequence[Path], grids: Sequence[Path] = ()) -> None:
    """Say where pictures and grids were written, without flooding the screen."""
    for path in [*pictures[:MOST_FILES], *grids]:
        print(path)
    if len(pictures) > MOST_FILES:
        print(f"... and {len(pictures) - MOST_FILES} more in {pictures[0].parent}")


def run_command(main: Callable[[Sequence[str]], object], argv: Sequence[str] | None = None) -> None:
    """Call `main(argv)` and exit: 0 on success, 2 with `error: ...` for bad input, 130 for Ctrl-C.

    Bad input is what raises ValueError (a ConfigError is one), TypeError or OSError (a missing file, a full disk), and
    what asks for more memory than there is. Anything else is a bug and keeps its traceback, as does everything when
    the arguments ask for it with `--debug` or `-d`.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(SafeFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        main(argv)
    except KeyboardInterrupt:
        if asks_for_debug(argv):
            raise
        sys.exit(INTERRUPTED)
    except Exception as error:
        if asks_for_debug(argv) or not (isinstance(error, USER_ERRORS) or lacks_memory(error)):
            raise
        print(f"error: {shown(describe(error))}", file=sys.stderr)
        sys.exit(BAD_INPUT)


def shown(text: str, keep: str = "") -> str:
    """`text` with all that a terminal would act upon written as in JSON, such as \\u001b; `keep` stays as it is."""
    return "".join(c if c.isprintable() or c in keep else json.dumps(c)[1:-1] for c in text)


class SafeFormatter(logging.Formatter):
    """Names from files of strangers reach the log: what a terminal would act upon is written out."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        return shown(super().format(record), keep="\n\t")


def lacks_memory(error: BaseException) -> bool:
    """Whether the computer or its GPU ran out of memory."""
    return type(error).__name__ in OUT_OF_MEMORY


def describe(error: BaseException) -> str:
    """One line that says what went wrong, also for errors of the operating system."""
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    if lacks_memory(error):
        remedy = "ask for fewer or smaller pictures at a time (batch size, size), or for 16-bit precision"
        return f"out of memory: {remedy} ({' '.join(str(error).split())[:200]})"
    return " ".join(str(error).split()) or type(error).__name__
