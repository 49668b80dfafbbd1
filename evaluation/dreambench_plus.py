"""DreamBench++ (Peng et al. 2024): its data layout, its samples' layout, its ratings and their averages.

Data: `images/{live_subject/animal,live_subject/human,object,style}/NN.jpg` and `captions/.../NN.txt`, whose first line
names the subject and whose others are the nine prompts. Samples: `{src_image,tgt_image,text}/<collection>/<i>_<j>.*`.
Ratings: integers from 0 to 4, one JSON file for each picture or one file for all.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image

from evaluation.cells import Store
from evaluation.concepts import WORD, Concept
from evaluation.metrics import micro_average
from evaluation.plan import Cell, Request
from evaluation.results import TableResult, summarise

log = logging.getLogger(__name__)

CATEGORIES = ("animal", "human", "object", "style")
PROMPT_KINDS = {"photorealistic": range(0, 4), "style": range(4, 7), "imaginative": range(7, 9)}
KINDS = ("cp", "pf")  # concept preservation, prompt following
HIGHEST = 4
Ratings = dict[tuple[str, int], list[int]]  # by collection and prompt number, one score per repeat


# --------------------------------------------------------------------------------------------------------- data


def read_dreambench_plus(folder: str | Path, names: Sequence[str] | None = None) -> list[Concept]:
    """The benchmark's concepts, one picture each; `names` picks collections such as "object_00_backpack".

    Raises `FileNotFoundError` for a picture without a caption file.
    """
    folder = Path(folder)
    pictures = sorted(path for path in (folder / "images").rglob("*") if path.suffix.lower() in (".jpg", ".png"))
    if not pictures:
        raise FileNotFoundError(f"{folder}/images holds no picture; --concepts names the benchmark's data folder")
    concepts = [_read_collection(folder, picture) for picture in pictures]
    if names is not None:
        known = [concept.label for concept in concepts]
        missing = [name for name in names if name not in known]
        if missing:
            raise ValueError(f"there is no collection '{missing[0]}' in {folder}")
        concepts = [concept for concept in concepts if concept.label in names]
    return concepts


def _read_collection(folder: Path, picture: Path) -> Concept:
    relative = picture.relative_to(folder / "images")
    captions = (folder / "captions" / relative).with_suffix(".txt")
    if not captions.is_file():
        raise FileNotFoundError(f"{picture} has no captions at {captions}")
    subject, *texts = [line.strip() for line in captions.read_text(encoding="utf-8").splitlines() if line.strip()]
    category = relative.parent.name
    if category not in CATEGORIES:
        raise ValueError(f"{picture} lies in '{category}', which is none of {', '.join(CATEGORIES)}")
    group = f"live_subject_{category}" if category in ("animal", "human") else category
    prompts = tuple(with_word(text, subject) for text in texts)
    without = [text for text in prompts if WORD not in text]
    if without:
        log.warning("%s: '%s' does not name the subject '%s', so it is drawn without the word",
                    captions, without[0], subject)  # fmt: skip
    return Concept(
        label=f"{group}_{picture.stem}_{subject.lower().replace(' ', '_')}",
        pictures=(picture,),
        init_word=subject.split()[0].lower(),
        kind="style" if category == "style" else "object",
        name=subject,
        prompts=prompts,
        texts=tuple(texts),
        category=category,
    )


def with_word(text: str, subject: str) -> str:
    """The prompt with the learned word in the subject's place."""
    return re.sub(rf"\b{re.escape(subject)}\b", WORD, text, flags=re.IGNORECASE)


def category_of(collection: str) -> str:
    """Category of a collection's name: "live_subject_animal_00_kitten" gives "animal"."""
    for category in CATEGORIES:
        if collection.startswith((f"{category}_", f"live_subject_{category}_")):
            return category
    raise ValueError(f"'{collection}' begins with none of the categories {', '.join(CATEGORIES)}")


def prompt_kind(number: int) -> str:
    """Kind of prompt `number`, from 0 to 8."""
    for kind, numbers in PROMPT_KINDS.items():
        if number in numbers:
            return kind
    raise ValueError(f"prompt number {number} is not within 0 ... 8")


# ------------------------------------------------------------------------------------------------------- samples


def export_samples(cells: Sequence[Cell], store: Store, folder: Path) -> Path:
    """Copy drawn pictures, reference pictures and prompts to `folder` as the benchmark lays them out.

    The first prompt of a drawing is for reconstruction and no part of the benchmark.
    """
    for cell in cells:
        assert cell.drawing is not None
        drawn = store.folder(cell.drawing.unit)
        for prompt, text in enumerate(cell.concept.texts):
            for k in range(cell.drawing.count):
                name = f"{prompt}_{k}"
                save_jpeg(cell.drawing.file(drawn, prompt + 1, k), target(folder, "tgt_image", cell, f"{name}.jpg"))
                save_jpeg(cell.concept.pictures[0], target(folder, "src_image", cell, f"{name}.jpg"))
                target(folder, "text", cell, f"{name}.txt").write_text(text, encoding="utf-8")
    (folder / "negative_prompt.txt").write_text("", encoding="utf-8")
    return folder


def target(folder: Path, part: str, cell: Cell, name: str) -> Path:
    """Path of a file of the samples; its folder is made."""
    path = folder / part / cell.concept.label / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def save_jpeg(source: Path, path: Path) -> None:
    """Copy a picture as JPEG."""
    if source.suffix.lower() in (".jpg", ".jpeg"):
        shutil.copyfile(source, path)
        return
    with Image.open(source) as image:
        image.convert("RGB").save(path, quality=95)


@dataclasses.dataclass(frozen=True)
class Sample:
    """A picture to rate, with its reference and its prompt."""

    collection: str
    prompt: int
    picture: Path
    reference: Path
    text: str


def read_samples(folder: str | Path) -> Iterator[Sample]:
    """The samples in a folder that has the benchmark's layout."""
    folder = Path(folder)
    pictures = sorted((folder / "tgt_image").glob("*/*_0.*"))
    if not pictures:
        raise FileNotFoundError(f"{folder}/tgt_image holds no samples of the form <collection>/<prompt>_0.jpg")
    for picture in pictures:
        collection, number = picture.parent.name, int(picture.stem.partition("_")[0])
        reference = folder / "src_image" / collection / picture.name
        text = folder / "text" / collection / f"{picture.stem}.txt"
        for path in (reference, text):
            if not path.is_file():
                raise FileNotFoundError(f"{picture} has no {path}")
        yield Sample(collection, number, picture, reference, text.read_text(encoding="utf-8").strip())


# ------------------------------------------------------------------------------------------------------- ratings


def read_ratings(path: str | Path, method: str | None = None) -> dict[str, Ratings]:
    """Ratings {"cp": ..., "pf": ...} of a folder or file.

    A folder has `cp/` and `pf/` with one JSON per item ({method, collection_id, prompt_index, score}) in any
    folders (repeats), or `cp.json` and `pf.json` ({"<collection>-<prompt>": score}). A file holds
    {"<collection>-<prompt>": [cp, pf]}, as people's ratings are published. `method` picks one of several whose items
    lie in one folder; raises `ValueError` if there are several and none is picked.
    """
    path = Path(path)
    if path.is_file():
        return _read_pairs(path)
    found: dict[str, Ratings] = {}
    methods = set()
    for kind in KINDS:
        ratings: Ratings = {}
        merged = [path / f"{kind}.json"] if (path / f"{kind}.json").is_file() else []
        for file in [*merged, *sorted((path / kind).rglob("*.json"))]:
            values = _load(file)
            if "score" in values:
                methods.add(str(values.get("method")))
                if method not in (None, values.get("method")):
                    continue
                values = {f"{values['collection_id']}-{values['prompt_index']}": values["score"]}
            for name, score in values.items():
                ratings.setdefault(_key(name), []).append(_score(score, file))
        found[kind] = ratings
    if method is None and len(methods) > 1:
        raise ValueError(
            f"{path} holds ratings of several methods, {', '.join(sorted(methods))}: choose one (--method)"
        )
    if not any(found.values()):
        if methods:
            raise ValueError(f"{path} holds no ratings of '{method}', only of {', '.join(sorted(methods))}")
        raise FileNotFoundError(f"{path} holds no ratings: neither {' nor '.join(f'{kind}/*.json' for kind in KINDS)}")
    return found


def _read_pairs(path: Path) -> dict[str, Ratings]:
    found: dict[str, Ratings] = {kind: {} for kind in KINDS}
    for name, pair in _load(path).items():
        if not isinstance(pair, list) or len(pair) != len(KINDS):
            raise ValueError(
                f"{path}: '{name}' should have a pair [cp, pf]; a file of single scores goes into a folder, as cp.json"
            )
        for kind, score in zip(KINDS, pair, strict=True):
            found[kind][_key(name)] = [_score(score, path)]
    return found


def _load(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} should hold an object")
    return values


def _key(name: str) -> tuple[str, int]:
    collection, _, number = name.rpartition("-")
    if not collection or not number.isdigit():
        raise ValueError(f"'{name}' is not of the form <collection>-<prompt number>")
    return collection, int(number)


def _score(score: object, file: Path) -> int:
    if not isinstance(score, int) or not 0 <= score <= HIGHEST:
        raise ValueError(f"{file}: the score {score!r} is no integer from 0 to {HIGHEST}")
    return score


def normalised(scores: Sequence[int]) -> float:
    """Mean of scores as a share of the highest."""
    return sum(scores) / len(scores) / HIGHEST


def averages(ratings: Mapping[str, Ratings]) -> dict[str, dict[str, float]]:
    """Averages as the leaderboard has them.

    "cp" by category and overall, "pf" by kind of prompt and overall, "cp_pf" the product of the two overall figures.
    """
    result: dict[str, dict[str, float]] = {}
    for kind, group_of in (("cp", lambda key: category_of(key[0])), ("pf", lambda key: prompt_kind(key[1]))):
        groups: dict[str, list[float]] = {}
        for key, scores in ratings.get(kind, {}).items():
            groups.setdefault(group_of(key), []).append(normalised(scores))
        if groups:
            means = {group: sum(values) / len(values) for group, values in groups.items()}
            result[kind] = means | {"overall": micro_average(means, {g: len(v) for g, v in groups.items()})}
    if len(result) == len(KINDS):
        result["cp_pf"] = {"overall": result["cp"]["overall"] * result["pf"]["overall"]}
    return result


def _rated(ratings: Mapping[str, Ratings], collection: str) -> dict[str, float]:
    """Mean ratings of a collection's pictures, by kind, where there are some."""
    rated = {}
    for kind in KINDS:
        own = [normalised(scores) for (name, _), scores in ratings[kind].items() if name == collection]
        if own:
            rated[kind] = sum(own) / len(own)
    return rated


def add_ratings(result: TableResult, request: Request, path: str | Path) -> TableResult:
    """The table with the ratings as columns "cp" and "pf", and the averages by category among the facts.

    The ratings of a row are those of the method of its name.
    """
    facts, records = dict(result.facts), []
    published = result.table.options.get("published_by_group", {})
    names = {"cp": "Concept preservation", "pf": "Prompt following", "cp_pf": "Product of the two"}
    rows = list(dict.fromkeys(record["row"] for record in result.cells))
    for row in rows:
        ratings = read_ratings(path, row)
        records += [{**record, **_rated(ratings, record["concept"])} for record in result.cells if record["row"] == row]
        for kind, groups in averages(ratings).items():
            theirs = published.get(row, {}).get(kind, {})
            key = names[kind] if len(rows) == 1 else f"{names[kind]}, {row}"
            facts[key] = ", ".join(
                f"{group} {value:.3f}" + (f" (published {theirs[group]:.3f})" if group in theirs else "")
                for group, value in groups.items()
            )
    labels = [concept.label for concept in request.concepts]
    return summarise(result.table, records, labels, request.seeds, facts, result.total)
