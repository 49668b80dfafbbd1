"""What the answers of a user study say: one file from each participant, checked against the key, to ranks."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.experiments import Row, Table, read_table
from evaluation.results import TableResult, summarise
from evaluation.text_files import read_object
from evaluation.user_study import KEY_FILE, KINDS

log = logging.getLogger(__name__)

Rankings = dict[str, list[str]]  # by question, the files of its pictures, the best first


def read_key(file: str | Path) -> dict[str, Any]:
    """The key of a study; raises `ValueError` for a file that is none."""
    key = read_object(Path(file))
    setups: Any = key.get("setups")
    questions: Any = key.get("questions")
    fits = isinstance(setups, list) and all(isinstance(setup, str) for setup in setups) and isinstance(questions, dict)
    if not fits or not all(is_question(name, question, setups) for name, question in questions.items()):
        raise ValueError(f"{file} is no key of a user study: give the {KEY_FILE} that was written with its pages")
    return key


def is_question(name: str, question: Any, setups: Sequence[str]) -> bool:
    """Whether an entry of a key is what `make_study` writes."""
    if not re.fullmatch(r"\d+\.[1-9]\d*", name) or not isinstance(question, dict) or question.get("kind") not in KINDS:
        return False
    pictures = question.get("pictures")
    return isinstance(pictures, dict) and bool(pictures) and all(setup in setups for setup in pictures.values())


def read_answers(folder: str | Path, key: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Records {row, concept, seed, image_rank or text_rank} of all answers; "concept" is the participant.

    The best of n gets n, the last 1. Each participant counts once: files of one that are the same are left out with a
    warning. Files without a participant's number count as one each. Raises `ValueError` for an answer that does not
    fit the key, and for files of one participant that differ.
    """
    folder = Path(folder)
    records = []
    seen: dict[str, tuple[Path, Rankings]] = {}
    for file in answer_files(folder):
        person, rankings = read_rankings(file, key)
        if person is not None:
            first, before = seen.setdefault(person, (file, rankings))
            if before != rankings:
                raise ValueError(f"{first} and {file} are of one participant and differ: keep the one that counts")
            if first != file:
                log.warning("%s is left out: it is a copy of %s", file, first)
                continue
        if not rankings:
            log.warning("%s holds no answer", file)
        records += to_records(file.stem, rankings, key)
    if not records:
        raise ValueError(f"{folder} holds files, but no answer in them")
    return records


def answer_files(folder: Path) -> list[Path]:
    """The files of answers in a folder, or the one that is named; says which others it passes over."""
    if folder.is_file():
        return [folder]
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [path for path in there if path.suffix == ".json" and not path.name.startswith(".")]
    if others := [path.name for path in there if path not in files]:
        log.warning("%s: passed over %s, which are no .json files of answers", folder, ", ".join(others))
    if not files:
        raise FileNotFoundError(f"{folder} holds no answers: each participant's page saves one .json file")
    return files


def read_rankings(file: Path, key: Mapping[str, Any]) -> tuple[str | None, Rankings]:
    """The participant's number, None in older files, and the rankings of a file."""
    content = read_object(file)
    person, answers = content.get("person"), content.get("answers")
    if not isinstance(answers, list) or not isinstance(person, str | None):
        raise ValueError(f"{file} is no file of answers: it should have a list of answers, as a form saves it")
    rankings: Rankings = {}
    for answer in answers:
        said: dict[str, Any] = answer if isinstance(answer, dict) else {}
        name = str(said.get("question"))
        question = key["questions"].get(name)
        if question is None or not is_ranking(said.get("ranking"), question["pictures"]):
            raise ValueError(f"{file}: the answer to {name[:40]!r} does not fit the key; is it this study's?")
        if name in rankings:
            raise ValueError(f"{file} answers '{name}' twice: ask the participant for the file as the form saved it")
        rankings[name] = said["ranking"]
    return person, rankings


def is_ranking(ranking: Any, pictures: Mapping[str, str]) -> bool:
    """Whether a ranking names each of the pictures once."""
    names = isinstance(ranking, list) and all(isinstance(name, str) for name in ranking)
    return names and sorted(ranking) == sorted(pictures)


def to_records(person: str, rankings: Rankings, key: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A record for each picture of each ranking."""
    records = []
    for name, ranking in rankings.items():
        question = key["questions"][name]
        at = int(name.partition(".")[2]) - 1
        for place, picture in enumerate(ranking):
            rank = {f"{question['kind']}_rank": float(len(ranking) - place)}
            records.append({"row": question["pictures"][picture], "concept": person, "seed": at, **rank})
    return records


def analyse(answers: str | Path, key_file: str | Path, command: str = "") -> TableResult:
    """Mean ranks of the setups with intervals over participants and, within them, questions; and the paper's claims.

    Claims that name a setup outside this study are left out.
    """
    key = read_key(key_file)
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
