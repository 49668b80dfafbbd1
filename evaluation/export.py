"""Folders that are filled with copies for others: what an earlier run left goes, what users put there stays."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from evaluation.cells import write_json
from evaluation.text_files import read_object

LIST = ".exported.json"  # in each such folder: the files that are ours to delete


def export(
    folder: Path,
    files: Mapping[str, Path | str],
    save: Callable[[Path, Path], object] = shutil.copyfile,
    listed_in: str = LIST,
) -> Path:
    """Fill `folder` with `files`: by relative path with "/", texts or pictures that `save(source, target)` copies.

    What an earlier export wrote and this one does not is deleted. Raises `ValueError`, before anything is changed, for
    a folder that holds something else; hidden files do not count.
    listed_in: relative path of the hidden file that says what was written.
    """
    earlier = check_export(folder, listed_in)
    for name in earlier - set(files):
        remove(folder, name)
    write_json(folder / listed_in, {"files": sorted(files)})  # first, so that no file is foreign to the next run
    for name, source in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, Path):
            save(source, target)
        else:
            target.write_text(source, encoding="utf-8")
    return folder


def check_export(folder: Path, listed_in: str = LIST) -> set[str]:
    """The files that the last export to `folder` wrote; raises `ValueError` where `export` would, for hours before."""
    earlier = exported(folder / listed_in)
    foreign = sorted(visible_files(folder) - earlier)
    if foreign:
        raise ValueError(
            f"{folder} holds '{foreign[0]}', which no export wrote: choose another folder, or move away what is there"
        )
    return earlier


def exported(path: Path) -> set[str]:
    """Relative paths of the files that the last export wrote, by its list at `path`; none without a list."""
    if not path.is_file():
        return set()
    names = read_object(path).get("files")
    if not isinstance(names, list) or not all(isinstance(name, str) and is_inside(name) for name in names):
        raise ValueError(f"{path} is no list of exported files: choose another folder to export to")
    return set(names)


def is_inside(name: str) -> bool:
    """Whether a relative path stays in its folder."""
    return not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts and "\\" not in name


def visible_files(folder: Path) -> set[str]:
    """Relative paths of all files in a folder but hidden ones."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return {name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts)}


def remove(folder: Path, name: str) -> None:
    """Delete a file in `folder`, and the folders that are empty without it."""
    (folder / name).unlink(missing_ok=True)
    for parent in PurePosixPath(name).parents:
        try:
            (folder / parent).rmdir()
        except OSError:  # not empty, or never there
            return
