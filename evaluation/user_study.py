"""A user study without a server: static pages that ask the paper's two questions, and what the answers say.

`make_study` takes a folder of pictures as `reproduce_tables.py --export` writes it. `pages/` may be put on any web
server or opened as files; it holds no word on which setup drew what. That is in `key.json`, which stays at home. Each
participant opens one form and sends back the one file of answers that the page saves.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.cells import write_json
from evaluation.experiments import Row, Table, read_table
from evaluation.gallery import TRAINING
from evaluation.results import TableResult, summarise
from evaluation.tables import write_text
from evaluation.user_study_page import page
from ldm.data.image import IMAGE_SUFFIXES

KINDS = ("image", "text")  # the two questions of the paper
KEY_FILE, PAGES = "key.json", "pages"
REFERENCES = 4  # training pictures shown, as in the paper


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
        text = (place / "prompt.txt").read_text(encoding="utf-8") if (place / "prompt.txt").is_file() else prompt
        references = tuple(pictures_in(folder / TRAINING / concept)[:REFERENCES]) if first else ()
        questions.append(Question(kind, concept, prompt, text, chosen, references))
    if not questions:
        raise ValueError(f"{folder}: no concept and prompt has pictures of all of {', '.join(setups)}")
    return questions


def pictures_in(folder: Path) -> list[Path]:
    """The pictures in a folder by name; none if there is no such folder."""
    return sorted(p for p in folder.glob("*") if p.suffix.lower() in IMAGE_SUFFIXES) if folder.is_dir() else []


def make_study(
    folder: str | Path, setups: Sequence[str], out: str | Path, forms: int = 10, questions: int = 20, seed: int = 0
) -> list[Path]:
    """Write `forms` pages of `questions` questions each, half of either kind, and the key; returns the pages.

    Pictures get meaningless names, and their order is drawn anew for each question of each form.
    """
    if len(setups) < 2 or len(set(setups)) != len(setups):
        raise ValueError(f"a ranking needs at least two different setups, got {', '.join(setups) or 'none'}")
    out = Path(out)
    if (out / KEY_FILE).exists():
        raise ValueError(
            f"there is a study in {out} already, whose answers would lose their key: choose another folder"
        )
    rng = random.Random(seed)
    key: dict[str, Any] = {"setups": list(setups), "questions": {}}
    pages = []
    for number in range(1, forms + 1):
        chosen = choose(find_questions(Path(folder), setups, rng), questions, rng)
        shown = [publish(question, f"{number}.{at}", out, key, rng) for at, question in enumerate(chosen, start=1)]
        pages.append(write_text(out / PAGES / f"form_{number:02}.html", page(f"form_{number:02}", shown)))
    write_json(out / KEY_FILE, key)
    return pages


def choose(questions: Sequence[Question], count: int, rng: random.Random) -> list[Question]:
    """`count` questions, half of either kind where there are enough, in random order within each kind."""
    chosen: list[Question] = []
    for at, kind in enumerate(KINDS):
        own = [question for question in questions if question.kind == kind]
        rng.shuffle(own)
        chosen += own[: (count + 1 - at) // 2]
    return chosen


def publish(question: Question, name: str, out: Path, key: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Copy a question's pictures under meaningless names, note them in the key; returns what the page shows."""
    salt = rng.random()
    names = {}
    for setup, picture in question.pictures.items():
        secret = hashlib.sha256(f"{salt}{setup}{name}".encode()).hexdigest()[:12]
        names[setup] = copy_picture(picture, out / PAGES / "pictures", secret)
    references = [
        copy_picture(path, out / PAGES / "pictures", hashlib.sha256(str(path).encode()).hexdigest()[:12])
        for path in question.references
    ]
    key["questions"][name] = {
        "kind": question.kind,
        "concept": question.concept,
        "prompt": question.prompt,
        "pictures": {file: setup for setup, file in names.items()},
    }
    order = list(names.values())
    rng.shuffle(order)
    return {"id": name, "kind": question.kind, "text": question.text, "references": references, "pictures": order}


def copy_picture(source: Path, folder: Path, stem: str) -> str:
    """Copy a picture without its metadata, which may tell how it was made; returns its file name."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{stem}.png"
    if not target.is_file():
        with Image.open(source) as image:
            image.convert("RGB").save(target)
    return target.name


# ------------------------------------------------------------------------------------------------------- answers


def read_answers(folder: str | Path, key: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Records {row, concept, seed, image_rank or text_rank} of all answer files; "concept" is the participant.

    The best of n gets n, the last 1. Raises `ValueError` for an answer that does not fit the key.
    """
    folder = Path(folder)
    files = [folder] if folder.is_file() else sorted(folder.glob("*.json"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no answers: each participant's page saves one .json file")
    records = []
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            answers = content["answers"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is no file of answers ({error})") from error
        for answer in answers:
            question = key["questions"].get(answer["question"])
            if question is None or set(answer["ranking"]) != set(question["pictures"]):
                raise ValueError(
                    f"{file}: the answer to '{answer['question']}' does not fit the key; is it this study's?"
                )
            count = len(answer["ranking"])
            for place, picture in enumerate(answer["ranking"]):
                row = question["pictures"][picture]
                rank = {f"{question['kind']}_rank": float(count - place)}
                at = int(answer["question"].partition(".")[2]) - 1
                records.append({"row": row, "concept": file.stem, "seed": at, **rank})
    if not records:
        raise ValueError(f"{folder} holds files, but no answer in them")
    return records


def analyse(answers: str | Path, key_file: str | Path, command: str = "") -> TableResult:
    """Mean ranks of the setups with intervals over participants and, within them, questions; and the paper's claims.

    Claims that name a setup outside this study are left out.
    """
    key = json.loads(Path(key_file).read_text(encoding="utf-8"))
    records = read_answers(answers, key)
    people = list(dict.fromkeys(record["concept"] for record in records))
    questions = list(range(1 + max(record["seed"] for record in records)))
    facts = {"Participants": str(len(people)), "Answers": str(len({(r["concept"], r["seed"]) for r in records}))}
    if command:
        facts["Command"] = command
    table = study_table(key["setups"])
    return summarise(table, records, people, questions, facts, len(records))


def study_table(setups: Sequence[str]) -> Table:
    """Figure 10(b) with the rows of this study."""
    table = read_table("figure10b")
    known = {row.name: row for row in table.rows}
    rows = tuple(known.get(setup, Row(setup, setup.replace("_", " "))) for setup in setups)
    claims = tuple(claim for claim in table.claims if {row for _, row in claim.rows()} <= set(setups))
    return dataclasses.replace(table, rows=rows, claims=claims)
