"""Units of work that lie on disk under a hash of their settings: what is done is never computed twice.

A unit is a kind of work ("train", "draw", "score") with all settings that its outcome depends on. Its folder is
`<root>/<kind>/<hash>/`; it is done when `result.json` is there, which is written last and at once. So an interrupted
run goes on where it stopped, a changed setting gives another folder, and several machines can share one root.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from ldm.checkpoint import atomic_path

try:
    import fcntl
except ImportError:  # Windows: two processes on one store are then not kept apart
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

T = TypeVar("T")
KEY_LENGTH = 16
MOST_FAILURES = 3  # units in a row: then it is not the units
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
SAY_EVERY = 10.0  # seconds between two lines about progress


@dataclasses.dataclass(frozen=True)
class Unit:
    """A piece of work: its kind and all that its outcome depends on, as JSON values."""

    kind: str
    settings: Mapping[str, Any]

    @functools.cached_property
    def key(self) -> str:
        """Hash of the settings."""
        return digest(self.settings)


def digest(settings: Any) -> str:
    """Hash of JSON values; the order of keys does not matter, and 1 and 1.0 differ."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def fingerprint(path: str | Path) -> str:
    """Hash of a file's content; of a folder: all its files."""
    path = Path(path)
    if path.is_dir():
        return digest(
            {file.relative_to(path).as_posix(): fingerprint(file) for file in path.rglob("*") if file.is_file()}
        )
    status = path.stat()
    return _content_hash(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _content_hash(path: Path, size: int, changed: int) -> str:
    """As `fingerprint`; gigabytes of weights are read once as long as neither size nor time of change are others."""
    del size, changed
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:KEY_LENGTH]


class Store:
    """Results of units in a folder."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def folder(self, unit: Unit) -> Path:
        """Where the unit's files go."""
        return self.root / unit.kind / unit.key

    def result(self, unit: Unit) -> dict[str, Any] | None:
        """The unit's result; None while it is not done."""
        path = self.folder(unit) / "result.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): delete it to compute it again") from error
        if not isinstance(found, dict) or not isinstance(found.get("metrics", {}), dict):
            raise ValueError(f"{path} is damaged (it is no result): delete it to compute it again")
        return found

    def is_done(self, unit: Unit) -> bool:
        """Whether the unit's result is there."""
        return (self.folder(unit) / "result.json").is_file()

    def begin(self, unit: Unit) -> Path:
        """Make the unit's folder, with `settings.json` for those who look into it."""
        folder = self.folder(unit)
        if not (folder / "settings.json").is_file():
            write_json(folder / "settings.json", dict(unit.settings))
        return folder

    @contextlib.contextmanager
    def lock(self, unit: Unit) -> Iterator[None]:
        """Keep other processes from working on the unit; waits while one does. The lock ends with its process."""
        path = self.root / unit.kind / f"{unit.key}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            _lock(file, self.root)
            yield

    def forget(self, unit: Unit) -> None:
        """Have the unit done again: what it made is no longer there."""
        (self.folder(unit) / "result.json").unlink(missing_ok=True)

    def finish(self, unit: Unit, result: Mapping[str, Any]) -> None:
        """Write the unit's result, which marks it as done."""
        write_json(self.folder(unit) / "result.json", dict(result))


def _lock(file: IO[str], root: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _warn_of_no_locks(root)


@functools.cache
def _warn_of_no_locks(root: Path) -> None:
    log.warning("%s: this file system knows no locks, so several processes may do the same work", root)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that no half file is ever seen."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------- sharing


def parse_shard(text: str) -> tuple[int, int]:
    """`i/n` with 1 <= i <= n."""
    first, separator, second = text.partition("/")
    if not (separator and first.isdigit() and second.isdigit() and 1 <= int(first) <= int(second)):
        raise ValueError(f"--shard {text}: write i/n with i from 1 to n, such as 1/4 ... 4/4")
    return int(first), int(second)


def shard(
    items: Sequence[T], group: Callable[[T], str], part: tuple[int, int], weight: Callable[[T], int] = lambda item: 0
) -> list[T]:
    """The items of part i of n; items of one group stay together, so that no two parts do the same work.

    Groups are dealt like cards, those with the heaviest items first, so that no part gets all of the hard work.
    """
    index, count = part
    weights: dict[str, int] = {}
    for item in items:
        weights[group(item)] = max(weight(item), weights.get(group(item), 0))
    groups = {key: number for number, key in enumerate(sorted(weights, key=lambda key: -weights[key]))}
    return [item for item in items if groups[group(item)] % count == index - 1]


# ------------------------------------------------------------------------------------------------------ progress


class NeedsFailedError(Exception):
    """Raised by work on a unit whose needs have failed."""


class Progress:
    """Does units one after the other, saying how many are done and how long the rest will take.

    failures: the units whose work raised `ValueError`, with what it said; the others are done all the same.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self.store = store
        self.clock = clock
        self.failures: dict[str, ValueError] = {}

    def run(
        self,
        title: str,
        units: Iterable[Unit],
        work: Callable[[Unit, Path], Mapping[str, Any]],
        group: Callable[[Unit], object] = lambda unit: unit.key,
    ) -> None:
        """Call `work(unit, folder)` for each unit that is not done, and save what it returns with its seconds.

        Raises the `ValueError` of a unit when as many as `MOST_FAILURES` fail one after the other, in as many groups
        (or in all that there are): what is wrong with one concept should not keep the others from being done.
        """
        unique = {(unit.kind, unit.key): unit for unit in units}
        waiting = [unit for unit in unique.values() if not self.store.is_done(unit)]
        done = len(unique) - len(waiting)
        if not waiting:
            log.info("%s: all %d are there", title, len(unique))
        taken: dict[str, list[float]] = {}
        said = -math.inf
        in_a_row: list[object] = []  # groups of units that failed one after the other
        most_groups = min(MOST_FAILURES, len({group(unit) for unit in waiting}))
        for number, unit in enumerate(waiting, 1):
            try:
                seconds = self.do(unit, work)
            except NeedsFailedError:
                continue
            except ValueError as error:
                self.failures[unit.key] = error
                in_a_row.append(group(unit))
                if len(in_a_row) >= MOST_FAILURES and len(set(in_a_row)) >= most_groups:
                    raise
                log.error("%s %s failed, and what needs it is left out: %s", unit.kind, self.store.folder(unit), error)
                continue
            in_a_row = []
            if seconds is None:
                continue
            taken.setdefault(unit.kind, []).append(seconds)
            kinds = [unit.kind for unit in waiting[number:]]
            about = "about" if set(kinds) <= set(taken) else "at least"
            remaining = f", {about} {duration(remaining_time(taken, kinds))} left" if kinds else ""
            if number == len(waiting) or self.clock() - said >= SAY_EVERY:
                said = self.clock()
                log.info("%s: %d of %d done, the last (%s) in %.1f s%s",
                         title, done + number, len(unique), unit.kind, seconds, remaining)  # fmt: skip
        missing = sum(not self.store.is_done(unit) for unit in waiting)
        if waiting and missing:
            log.warning("%s: %d of %d are not done", title, missing, len(unique))
        elif waiting:
            log.info("%s: all %d are there", title, len(unique))

    def do(self, unit: Unit, work: Callable[[Unit, Path], Mapping[str, Any]]) -> float | None:
        """Do one unit and save its result; returns the seconds, or None if another process has done it meanwhile."""
        with self.store.lock(unit):
            if self.store.is_done(unit):
                return None
            started = self.clock()
            result = work(unit, self.store.begin(unit))
            seconds = self.clock() - started
            self.store.finish(unit, {**result, "seconds": round(seconds, 3)})
            return seconds


def remaining_time(taken: Mapping[str, Sequence[float]], kinds: Iterable[str]) -> float:
    """Seconds that units of these kinds will take, as far as some of their kind are done."""
    return sum(sum(taken[kind]) / len(taken[kind]) for kind in kinds if kind in taken)


def duration(seconds: float) -> str:
    """A length of time in words: "45 s", "12 min", "3 h 20 min"."""
    minutes = math.ceil(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
