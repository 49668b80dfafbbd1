"""DreamBench++ (Peng et al. 2024): its data layout, its samples' layout, its ratings and their averages.

Data: `images/{live_subject/animal,live_subject/human,object,style}/NN.jpg` and `captions/.../NN.txt`, whose first line
names the subject and whose others are the nine prompts. Samples: `{src_image,tgt_image,text}/<collection>/<i>_<j>.*`.
Ratings: integers from 0 to 4, one JSON file for each picture or one file for all.
Hidden files, which some systems leave beside others, are passed over everywhere.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from evaluation.cells import Store, digest, fingerprint
from evaluation.clean_pictures import clean_picture
from evaluation.concepts import WORD, Concept
from evaluation.export import export
from evaluation.metrics import micro_average
from evaluation.plan import Cell, Request
from evaluation.results import TableResult, summarise
from evaluation.text_files import read_object, read_text
from ldm.data.image import IMAGE_SUFFIXES
from ldm.generate_files import LONGEST_SLUG, slug

log = logging.getLogger(__name__)

CATEGORIES = ("animal", "human", "object", "style")
PROMPT_KINDS = {"photorealistic": range(0, 4), "style": range(4, 7), "imaginative": range(7, 9)}
PROMPTS = 9
KINDS = ("cp", "pf")  # concept preservation, prompt following
HIGHEST = 4
SAMPLE_HASH = "sample_hash"  # what an item says of the sample that it rates; published ones do not
Ratings = dict[tuple[str, int], list[int]]  # by collection and prompt number, one score per repeat


# --------------------------------------------------------------------------------------------------------- data


def read_dreambench_plus(folder: str | Path, names: Sequence[str] | None = None) -> list[Concept]:
    """The benchmark's concepts, one picture each; `names` picks collections such as "object_00_backpack".

    Raises `FileNotFoundError` for a picture without a caption file.
    """
    folder = Path(folder)
    pictures = sorted(visible_pictures((folder / "images").rglob("*")))
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


def visible_pictures(paths: Iterable[Path]) -> Iterator[Path]:
    """Those of the files that are pictures by name and not hidden."""
    return (path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."))


def _read_collection(folder: Path, picture: Path) -> Concept:
    relative = picture.relative_to(folder / "images")
    captions = (folder / "captions" / relative).with_suffix(".txt")
    if not captions.is_file():
        raise FileNotFoundError(f"{picture} has no captions at {captions}")
    lines = [line.strip() for line in read_text(captions).splitlines() if line.strip()]
    if not 2 <= len(lines) <= 1 + PROMPTS:
        raise ValueError(
            f"{captions} has {len(lines)} lines: it should have the subject and then up to {PROMPTS} prompts"
        )
    subject, *texts = lines
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
        label=f"{group}_{picture.stem}_{label_of(subject)}",
        pictures=(picture,),
        init_word=subject.split()[0].lower(),
        kind="style" if category == "style" else "object",
        name=subject,
        prompts=prompts,
        texts=tuple(texts),
        category=category,
    )


def label_of(subject: str) -> str:
    """A subject as a part of a file name: as the benchmark writes it, unless that is unsafe or long."""
    plain = subject.lower().replace(" ", "_")
    return plain if re.fullmatch(rf"[\w().,'&+-]{{1,{LONGEST_SLUG}}}", plain) else slug(subject).replace("-", "_")


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
    """Copy one row's drawn pictures, reference pictures and prompts to `folder` as the benchmark lays them out.

    The first prompt of a drawing is for reconstruction and no part of the benchmark; of several seeds the first one's
    pictures are taken, for the layout has no place for more. See `export` for what was there before.
    """
    seed = cells[0].seed
    if any(cell.seed != seed for cell in cells):
        log.info("%s: the benchmark's layout has one picture for each, so it gets those of seed %d alone", folder, seed)
    files: dict[str, Path | str] = {"negative_prompt.txt": ""}
    for cell in cells:
        if cell.drawing is None or cell.seed != seed:
            continue
        drawn = store.folder(cell.drawing.unit)
        for prompt, text in enumerate(cell.concept.texts):
            for k in range(cell.drawing.count):
                name = f"{cell.concept.label}/{prompt}_{k}"
                files[f"tgt_image/{name}.jpg"] = cell.drawing.file(drawn, prompt + 1, k)
                files[f"src_image/{name}.jpg"] = cell.concept.pictures[0]
                files[f"text/{name}.txt"] = text
    encoded = functools.lru_cache(maxsize=2)(to_jpeg)  # each reference is written once for every prompt
    return export(folder, files, lambda source, target: target.write_bytes(encoded(source)))


def to_jpeg(path: Path) -> bytes:
    """A picture, as training sees it, in JPEG."""
    out = io.BytesIO()
    clean_picture(path).save(out, format="JPEG", quality=95)
    return out.getvalue()


@dataclasses.dataclass(frozen=True)
class Sample:
    """A picture to rate, with its reference and its prompt."""

    collection: str
    prompt: int
    picture: Path
    reference: Path
    text: str

    def shown(self, kind: str) -> str:
        """Hash of what is rated: the picture with its reference ("cp") or with its text ("pf")."""
        return digest([fingerprint(self.picture), fingerprint(self.reference) if kind == "cp" else self.text])


def read_samples(folder: str | Path) -> Iterator[Sample]:
    """The samples in a folder that has the benchmark's layout."""
    folder = Path(folder)
    pictures = sorted(visible_pictures((folder / "tgt_image").glob("*/*_0.*")))
    if not pictures:
        raise FileNotFoundError(f"{folder}/tgt_image holds no samples of the form <collection>/<prompt>_0.jpg")
    for picture in pictures:
        collection, number = _key(picture.parent.name, picture.stem.removesuffix("_0"), picture)
        reference = folder / "src_image" / collection / picture.name
        text = folder / "text" / collection / f"{picture.stem}.txt"
        for path in (reference, text):
            if not path.is_file():
                raise FileNotFoundError(f"{picture} has no {path}")
        yield Sample(collection, number, picture, reference, read_text(text).strip())


# ------------------------------------------------------------------------------------------------------- ratings


@dataclasses.dataclass(frozen=True)
class Rating:
    """A score, and whose and which picture it is of; `method` and `shown` are None where the file does not say."""

    key: tuple[str, int]
    score: int
    method: str | None = None
    shown: str | None = None


def read_ratings(path: str | Path, method: str | None = None) -> dict[str, Ratings]:
    """Ratings {"cp": ..., "pf": ...} of one method in a folder or file, see `load_ratings` and `ratings_of`."""
    return ratings_of(method, load_ratings(path), path)


def load_ratings(path: str | Path) -> dict[str, list[Rating]]:
    """All ratings, by kind, in a folder or file.

    A folder has `cp/` and `pf/` with one JSON per item ({method, collection_id, prompt_index, score}) in any
    folders (repeats), or `cp.json` and `pf.json` ({"<collection>-<prompt>": score}); where there are both, the items
    count and the merged file does not. A file holds {"<collection>-<prompt>": [cp, pf]}, as people's ratings are
    published. Only single items name their method.
    """
    path = Path(path)
    if path.is_file():
        return _read_pairs(path)
    found = {}
    for kind in KINDS:
        items = [file for file in sorted((path / kind).rglob("*.json")) if not file.name.startswith(".")]
        merged = path / f"{kind}.json"
        if items and merged.is_file():
            log.warning("%s is left out: the single ratings in %s count", merged, path / kind)
        if not items and merged.is_file():
            values = read_object(merged)
            found[kind] = [Rating(_split(name, merged), _score(score, merged)) for name, score in values.items()]
        else:
            found[kind] = [_read_item(file) for file in items]
    if not any(found.values()):
        raise FileNotFoundError(f"{path} holds no ratings: neither {' nor '.join(f'{kind}/*.json' for kind in KINDS)}")
    return found


def ratings_of(
    method: str | None, ratings: Mapping[str, Sequence[Rating]], path: str | Path, samples: Path | None = None
) -> dict[str, Ratings]:
    """The ratings of one method, or of the only one that is named, and with them those that name none.

    Raises `ValueError` when several are named and none is picked, or when it is not clear whose the unnamed ones are.
    path: what messages name.
    samples: folder of the method's samples; ratings of others than these are left out, with a warning.
    """
    every = [rating for kind in ratings.values() for rating in kind]
    named = sorted({rating.method for rating in every if rating.method is not None})
    unnamed = any(rating.method is None for rating in every)
    if len(named) > 1 and (method is None or unnamed):
        remedy = "keep the merged file, which names none, elsewhere" if unnamed else "choose one (--method)"
        raise ValueError(f"{path} holds ratings of several methods, {', '.join(named)}: {remedy}")
    if method is not None and named and method not in named:
        raise ValueError(f"{path} holds no ratings of '{method}', only of {', '.join(named)}")
    if method is not None and unnamed:
        log.warning("%s holds ratings that name no method: they are taken for those of '%s'", path, method)
    found: dict[str, Ratings] = {}
    for kind, group in ratings.items():
        found[kind] = {}
        own = [rating for rating in group if method is None or rating.method in (None, method)]
        for rating in own if samples is None else _of_samples(kind, own, path, samples):
            found[kind].setdefault(rating.key, []).append(rating.score)
    return found


def _of_samples(kind: str, ratings: Sequence[Rating], path: str | Path, samples: Path) -> list[Rating]:
    """Without the ratings whose hash is not that of the sample; where either is not known, there is no telling."""
    listed = read_samples(samples) if (samples / "tgt_image").is_dir() else ()
    shown = {(sample.collection, sample.prompt): sample.shown(kind) for sample in listed}
    fitting = [rating for rating in ratings if rating.shown in (None, shown.get(rating.key, rating.shown))]
    if len(fitting) < len(ratings):
        log.warning("%d of %d ratings (%s) in %s are of others than the pictures and texts in %s, and are left out: "
                    "rate these with scripts/rate_dreambench_plus.py",
                    len(ratings) - len(fitting), len(ratings), kind, path, samples)  # fmt: skip
    return fitting


def _read_item(file: Path) -> Rating:
    values = read_object(file)
    for name in ("collection_id", "prompt_index", "score"):
        if name not in values:
            raise ValueError(f"{file} lacks '{name}'; a file of several ratings goes beside its folder, as cp.json")
    method = values.get("method")
    if not isinstance(method, str | None):
        raise ValueError(f"{file}: the method {method!r} is no name")
    key = _key(values["collection_id"], values["prompt_index"], file)
    return Rating(key, _score(values["score"], file), method, values.get(SAMPLE_HASH))


def _read_pairs(path: Path) -> dict[str, list[Rating]]:
    found: dict[str, list[Rating]] = {kind: [] for kind in KINDS}
    for name, pair in read_object(path).items():
        if not isinstance(pair, list) or len(pair) != len(KINDS):
            raise ValueError(
                f"{path}: '{name}' should have a pair [cp, pf]; a file of single scores goes into a folder, as cp.json"
            )
        for kind, score in zip(KINDS, pair, strict=True):
            found[kind].append(Rating(_split(name, path), _score(score, path)))
    return found


def _split(name: str, file: Path) -> tuple[str, int]:
    collection, _, number = name.rpartition("-")
    if not collection or not number:
        raise ValueError(f"{file}: '{name}' is not of the form <collection>-<prompt number>")
    return _key(collection, number, file)


def _key(collection: object, number: object, file: Path) -> tuple[str, int]:
    """Collection and prompt number, which may be written as a text; raises `ValueError` that names the file."""
    if not isinstance(collection, str):
        raise ValueError(f"{file}: the collection {collection!r} is no name")
    if str(number) not in map(str, range(PROMPTS)):
        raise ValueError(f"{file}: the prompt number {number!r} is none from 0 to {PROMPTS - 1}")
    try:
        category_of(collection)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return collection, int(str(number))


def _score(score: object, file: Path) -> int:
    if not isinstance(score, int) or isinstance(score, bool) or not 0 <= score <= HIGHEST:
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


def add_ratings(result: TableResult, request: Request, path: str | Path, samples: Path | None = None) -> TableResult:
    """The table with the ratings as columns "cp" and "pf", and the averages by category among the facts.

    The ratings of a row are those of the method of its name. Raises `ValueError` for ratings that name no method when
    there are several rows, which they would all count for.
    samples: folder with a folder of samples for each row; ratings of other samples are left out, with a warning.
    """
    facts, records = dict(result.facts), []
    published = result.table.options.get("published_by_group", {})
    names = {"cp": "Concept preservation", "pf": "Prompt following", "cp_pf": "Product of the two"}
    rows = list(dict.fromkeys(record["row"] for record in result.cells))
    every = load_ratings(path)
    if len(rows) > 1 and any(rating.method is None for group in every.values() for rating in group):
        raise ValueError(f"{path} holds ratings that name no method, and the table has the rows {', '.join(rows)}: "
                         "give single ratings, which name theirs, or one row")  # fmt: skip
    for row in rows:
        ratings = ratings_of(row, every, path, samples / row if samples else None)
        for record in result.cells:
            if record["row"] == row:
                measured = {name: value for name, value in record.items() if name not in KINDS}
                records.append(measured | _rated(ratings, record["concept"]))
        for kind, groups in averages(ratings).items():
            theirs = published.get(row, {}).get(kind, {})
            key = names[kind] if len(rows) == 1 else f"{names[kind]}, {row}"
            facts[key] = ", ".join(
                f"{group} {value:.3f}" + (f" (published {theirs[group]:.3f})" if group in theirs else "")
                for group, value in groups.items()
            )
    labels = [concept.label for concept in request.concepts]
    return summarise(result.table, records, labels, request.seeds, facts, result.total)
