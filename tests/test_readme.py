"""What the documents and the help texts tell users to type exists: commands, flags, targets, files, links."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
COMMANDS = sorted([ROOT / "main.py", *ROOT.glob("merge_*.py"), *(ROOT / "scripts").glob("*.py")])


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def shell_lines(text: str) -> Iterator[list[str]]:
    """Words of each command in a shell text; `&&` and `;` part commands, comments and line continuations are undone."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.strip().removeprefix("$ "), comments=True)
        while words:
            cut = next((i for i, word in enumerate(words) if word in ("&&", ";", "|", "&")), len(words))
            yield words[:cut]
            words = words[cut + 1 :]


def documented(document: Path) -> list[list[str]]:
    blocks = re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
    return [words for block in blocks for words in shell_lines(block) if words]


@cache
def command(path: str) -> ModuleType:
    """The module of a command, imported from its file."""
    spec = importlib.util.spec_from_file_location("command_" + re.sub(r"\W", "_", path), ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_python(words: list[str]) -> None:
    """Check `python FILE ...`: the file is there and its parser takes the words."""
    if words[1] == "-m":
        assert words[2] in {"pytest", "venv", "pip"}, f"what is python -m {words[2]}?"
        return
    if words[1] == "-c":
        compile(words[2], "a documented program", "exec")
        return
    assert (ROOT / words[1]).is_file(), f"there is no {words[1]}"
    module = command(words[1])
    parse = getattr(module, "parse_args", None) or module.build_parser().parse_args
    try:
        with contextlib.suppress(FileNotFoundError):  # of the user's own files
            parse(words[2:])
    except (SystemExit, ValueError) as error:
        if not (isinstance(error, SystemExit) and error.code == 0):  # --help
            pytest.fail(f"{words[1]} does not take: {shlex.join(words[2:])} ({error})")
    for config in (w for w in words[2:] if re.match(r"(configs|models)/.*\.yaml$", w)):
        assert (ROOT / config).is_file(), f"there is no {config}"


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(words[1:]) <= set(targets), f"the Makefile has no such target: {shlex.join(words)}"


def check_pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        if match := re.fullmatch(r"\.\[(.+)\]", word):
            assert set(match[1].split(",")) <= set(extras), f"there is no extra {word}"


CHECKS = {"python": check_python, "make": check_make, "pip": check_pip}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_documented_commands_parse(document: Path):
    for words in documented(document):
        if check := CHECKS.get(words[0]):
            check(words)


@pytest.mark.parametrize("path", COMMANDS, ids=name_of)
def test_examples_in_help_texts_parse(path: Path):
    module = command(name_of(path))
    parser: argparse.ArgumentParser = module.build_parser()
    lines = [line.strip() for line in (parser.epilog or "").replace("\\\n", " ").splitlines()]
    for words in shell_lines("\n".join(line for line in lines if line.startswith("python "))):
        check_python(words)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path):
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if not re.match(r"\w+:|#", link):
            assert (document.parent / link.partition("#")[0]).exists(), f"{document.name} links to {link}"
