"""A user study without a server: static pages that ask the paper's two questions.

`make_study` takes a folder of pictures as `reproduce_tables.py --export` writes it. `pages/` may be put on any web
server or opened as files; it holds no word on which setup drew what. That is in `key.json`, which stays at home. Each
participant opens one form and sends back the one file of answers that the page saves, for `user_study_answers`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.cells import write_json
from evaluation.clean_pictures import clean_picture
from evaluation.gallery import TRAINING
from evaluation.tables import write_text
from evaluation.text_files import read_text
from evaluation.user_study_page import page
from ldm.data.image import IMAGE_SUFFIXES

log = logging.getLogger(__name__)

KINDS = ("image", "text")  # the two questions of the paper
KEY_FILE, PAGES = "key.json", "pages"
REFERENCES = 4  # training pictures shown, as in the paper
FILE_TIME = 946_684_800  # of all files, so that theirs tells nothing: 1 January 2000


@dataclasses.dataclass(frozen=True)
class Question:
    """Results of all setups for one concept and prompt, to be ranked by likeness or by text."""

    kind: str
    concept: str
    prompt: str  # folder of the prompt
    text: str
    pictures: Mapping[str, Path]  # by setup
    references: tuple[Path, ...]


def find_questions(folder: Path, setups: Sequence[str], rng: random.Random) -> list[Question]:
    """All questions that the pictures allow: likeness for each concept's first prompt, text for the others.

    One picture of each setup is drawn at random. Raises `FileNotFoundError` for a setup without pictures.
    """
    for setup in setups:
        if not (folder / setup).is_dir():
            raise FileNotFoundError(f"there are no pictures of '{setup}' at {folder / setup}")
    questions = []
    for place in sorted((folder / setups[0]).glob("*/*/")):
        concept, prompt = place.parent.name, place.name
        found = {setup: pictures_in(folder / setup / concept / prompt) for setup in setups}
        if not all(found.values()):
            continue
        chosen = {setup: rng.choice(files) for setup, files in found.items()}
        first = prompt.startswith("00-")
        kind = "image" if first else "text"
        text = read_text(place / "prompt.txt") if (place / "prompt.txt").is_file() else prompt
        references = tuple(pictures_in(folder / TRAINING / concept)[:REFERENCES]) if first else ()
        questions.append(Question(kind, concept, prompt, text, chosen, references))
    if not questions:
        raise ValueError(f"{folder}: no concept and prompt has pictures of all of {', '.join(setups)}")
    return questions


def pictures_in(folder: Path) -> list[Path]:
    """The pictures in a folder by name, without hidden files; none if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))


def make_study(
    folder: str | Path, setups: Sequence[str], out: str | Path, forms: int = 10, questions: int = 20, seed: int = 0
) -> dict[Path, int]:
    """Write `forms` pages of `questions` questions each, half of either kind, and the key.

    Returns how many questions each page has: fewer where the pictures allow no more. `seed` is of the choice of
    questions and pictures alone: names and order are drawn anew each time, for whoever knows the seed could tell what
    follows from it. The pages appear together and with the key, or not at all.
    """
    if len(setups) < 2 or len(set(setups)) != len(setups):
        raise ValueError(f"a ranking needs at least two different setups, got {', '.join(setups) or 'none'}")
    out = Path(out)
    check_free(out)
    rng = random.Random(seed)
    key: dict[str, Any] = {"setups": list(setups), "questions": {}}
    references: dict[Path, str] = {}
    counts = {}
    building = out / f".{PAGES}-{secrets.token_hex(4)}"
    try:
        for number in range(1, forms + 1):
            chosen = choose(find_questions(Path(folder), setups, rng), questions, rng)
            asked = [publish(question, f"{number}.{at}", building / "pictures", key, references)
                     for at, question in enumerate(chosen, start=1)]  # fmt: skip
            form = write_text(building / f"form_{number:02}.html", page(f"form_{number:02}", asked))
            counts[out / PAGES / form.name] = len(chosen)
        put_out(building, out, key)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    if min(counts.values()) < questions:
        log.warning("each form has only %d of %d questions: %s holds too few concepts and prompts for more",
                    min(counts.values()), questions, folder)  # fmt: skip
    return counts


def check_free(out: Path) -> None:
    """Raise `ValueError` for a folder that holds a study, or pages that belong to none."""
    if (out / KEY_FILE).exists():
        raise ValueError(
            f"there is a study in {out} already, whose answers would lose their key: choose another folder"
        )
    if (out / PAGES).is_dir() and any((out / PAGES).iterdir()):
        raise ValueError(f"{out / PAGES} holds files, but there is no key to them: delete it or choose another folder")


def put_out(building: Path, out: Path, key: Mapping[str, Any]) -> None:
    """Write the key, and give the finished pages their place; neither stays without the other."""
    for file in building.rglob("*"):
        os.utime(file, (FILE_TIME, FILE_TIME))
    write_json(out / KEY_FILE, key)
    try:
        if (out / PAGES).is_dir():
            (out / PAGES).rmdir()  # an empty one, which not every system replaces
        building.rename(out / PAGES)
    except BaseException:
        (out / KEY_FILE).unlink()
        raise


def choose(questions: Sequence[Question], count: int, rng: random.Random) -> list[Question]:
    """`count` questions, half of either kind where there are enough, in random order within each kind."""
    chosen: list[Question] = []
    for at, kind in enumerate(KINDS):
        own = [question for question in questions if question.kind == kind]
        rng.shuffle(own)
        chosen += own[: (count + 1 - at) // 2]
    return chosen


def publish(
    question: Question, name: str, folder: Path, key: dict[str, Any], references: dict[Path, str]
) -> dict[str, Any]:
    """Copy a question's pictures under meaningless names, note them in the key; returns what the page shows.

    references: names of the training pictures that were copied before.
    """
    for path in question.references:
        if path not in references:
            references[path] = copy_picture(path, folder)
    order = list(question.pictures)
    random.SystemRandom().shuffle(order)
    pictures = {copy_picture(question.pictures[setup], folder): setup for setup in order}
    about = {"kind": question.kind, "concept": question.concept, "prompt": question.prompt}
    key["questions"][name] = {**about, "pictures": pictures}
    shown_first = [references[path] for path in question.references]
    return {
        "id": name,
        "kind": question.kind,
        "text": question.text,
        "references": shown_first,
        "pictures": list(pictures),
    }


def copy_picture(source: Path, folder: Path) -> str:
    """Copy a picture under a new name without its metadata, which may tell how it was made; returns the name."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{secrets.token_hex(8)}.png"
    clean_picture(source).save(folder / name)
    return name
