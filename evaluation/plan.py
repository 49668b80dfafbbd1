"""From a table to units of work: what each cell (row, concept, seed) trains, draws and scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.cells import Unit, digest, fingerprint
from evaluation.clip_eval import without_words
from evaluation.concepts import WORD, Concept
from evaluation.experiments import (
    METRICS,
    ModelSpec,
    Prompts,
    Row,
    Sampling,
    Table,
    TrainingOptions,
    kept_step,
    prompts_for,
    read_yaml,
    sampling_options,
    training_options,
)
from evaluation.judges import judge_file
from evaluation.scoring import METRICS as JUDGED
from ldm.data.templates import per_img_token_list
from ldm.generate_model import find_model_files
from ldm.util import ConfigError, did_you_mean

VERSION = 1  # to be raised when a change of the code makes earlier results wrong
SECOND_WORD = "@"
CLASS = "{class}"  # in prompts: the concept's initial word
TEXT_FILES = (".txt", ".json", ".jsonl", ".csv", ".tsv")
SEED_STRIDE = 1_000_003  # between the sampling seeds of two training seeds


@dataclasses.dataclass(frozen=True)
class Training:
    """One word to learn."""

    unit: Unit
    concept: Concept
    options: TrainingOptions
    seed: int


@dataclasses.dataclass(frozen=True)
class LearnedWord:
    """A state of a training, and what prompts call it."""

    training: Training
    step: int
    name: str


@dataclasses.dataclass(frozen=True)
class Drawing:
    """Pictures to draw: `count` of each prompt; where a prompt has several wordings they take turns."""

    unit: Unit
    words: tuple[LearnedWord, ...]
    prompts: tuple[tuple[str, ...], ...]
    count: int
    seed: int
    sampling: Sampling

    def jobs(self) -> list[tuple[int, int, str, int]]:
        """(prompt number, picture number, text, seed) of every picture."""
        return [
            (p, k, wordings[k % len(wordings)], self.seed + k)
            for p, wordings in enumerate(self.prompts)
            for k in range(self.count)
        ]

    def file(self, folder: Path, prompt: int, picture: int) -> Path:
        """Where a picture goes."""
        return folder / f"p{prompt:02}" / f"{picture:04}.png"


@dataclasses.dataclass(frozen=True)
class Scoring:
    """Pictures to score: those of a drawing, or the training pictures themselves."""

    unit: Unit
    drawing: Drawing | None
    texts: tuple[str, ...]  # one for each prompt; the first prompt is for reconstruction, the others for editing
    training: tuple[Path, ...]
    second: tuple[Path, ...]  # pictures of the second concept
    table: Table


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row for one concept and one seed."""

    row: Row
    concept: Concept
    seed: int
    trainings: tuple[Training, ...]
    drawing: Drawing | None
    scoring: Scoring

    @property
    def group(self) -> str:
        """Cells with the same trainings belong to one shard."""
        return self.trainings[0].unit.key if self.trainings else self.concept.label


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for: a table on a model, for which concepts and seeds."""

    table: Table
    model: ModelSpec
    concepts: tuple[Concept, ...]
    seeds: tuple[int, ...]
    second: Concept | None = None
    quick: bool = False
    weights: Mapping[str, str] = dataclasses.field(default_factory=dict)  # judges' weight files, by alias
    count: int | None = None  # pictures of each prompt, where the user asks for some number

    @property
    def pictures(self) -> int:
        """Pictures of each prompt."""
        if self.count is not None:
            return self.count
        count = int(self.table.options.get("pictures", self.model.pictures))
        return min(count, self.model.quick.pictures) if self.quick else count


class Planner:
    """Makes the cells of a request; hashes the files that results depend on once."""

    def __init__(self, request: Request) -> None:
        self.request = request
        model = request.model
        self.weights = fingerprint(find_model_files(model.checkpoint_path).checkpoint)
        self.drawn_with = model_fingerprint(model.checkpoint_path, model.size)
        self.config_values = read_yaml(model.config_file)
        self.config = digest(self.config_values)  # comments change no result
        judges = {
            alias: [name, fingerprint(judge_file(name, request.weights.get(alias)))]
            for alias, name in model.judges.items()
        }
        # the first one's metrics have no prefix, so the order of several is a part of what scores depend on
        self.judges = judges if len(judges) == 1 else [[alias, *of] for alias, of in judges.items()]

    def cells(self) -> list[Cell]:
        """All cells of the table; rows that a concept cannot have (see `lacks`) are left out."""
        request = self.request
        return [
            self.cell(row, concept, seed)
            for seed in request.seeds
            for concept in request.concepts
            for row in request.table.rows
            if row.source != "published" and lacks(row, concept, request.model) is None
        ]

    def cell(self, row: Row, concept: Concept, seed: int) -> Cell:
        """The cell of a row for a concept and a seed."""
        request = self.request
        options = training_options(request.model, row, request.model.quick if request.quick else None)
        prompts = self.prompts(row, concept)
        words = self.words(row, concept, options, seed)
        drawing = None
        if row.source != "training_pictures":
            drawing = self.drawing(row, wordings(row, concept, prompts), words, seed)
        texts = tuple(self.text(concept, prompt) for prompt in (prompts.reconstruction, *prompts.editing))
        scoring = self.scoring(concept, options, drawing, texts)
        return Cell(row, concept, seed, tuple(word.training for word in words), drawing, scoring)

    def prompts(self, row: Row, concept: Concept) -> Prompts:
        """The row's prompts; those for editing are the concept's own where it has some and the row says none."""
        prompts = prompts_for(self.request.model, concept.kind, row)
        if concept.prompts and not (row.prompts and "editing" in row.prompts):
            prompts = dataclasses.replace(prompts, editing=concept.prompts)
        for text in (prompts.reconstruction, *prompts.editing) if row.source == "word" else ():
            if WORD not in text:
                raise ConfigError(f"row '{row.label}': the prompt '{text}' has no {WORD} for the word")
        named = [text.replace(CLASS, concept.init_word or "") for text in (prompts.reconstruction, *prompts.editing)]
        return Prompts(named[0], tuple(named[1:]))

    def text(self, concept: Concept, prompt: str) -> str:
        """What pictures of a prompt are compared with: the concept's own text for it, else the prompt without words."""
        if concept.texts and prompt in concept.prompts:
            return concept.texts[concept.prompts.index(prompt)]
        if self.request.table.text_word == "class" and concept.init_word:
            prompt = prompt.replace(WORD, concept.init_word)
        return without_words(prompt, [WORD, SECOND_WORD])

    def words(self, row: Row, concept: Concept, options: TrainingOptions, seed: int) -> tuple[LearnedWord, ...]:
        """The words that the row's pictures need."""
        request = self.request
        words = []
        if row.source == "word":
            step = kept_step(request.model, row, request.model.quick if request.quick else None)
            words.append(LearnedWord(self.training(concept, options, seed), step, WORD))
        if row.second:
            assert request.second is not None
            plain = training_options(request.model, None, request.model.quick if request.quick else None)
            words.append(LearnedWord(self.training(request.second, plain, seed), plain.steps, SECOND_WORD))
        return tuple(words)

    def training(self, concept: Concept, options: TrainingOptions, seed: int) -> Training:
        """The training of a word."""
        settings = {
            "version": VERSION,
            "weights": self.weights,
            "config": self.config,
            "pictures": concept.content(options.pictures),
            "kind": concept.kind,
            "init_word": concept.init_word if options.init_word is None else options.init_word,
            "options": what_is_learned(options, concept.kind),
            "seed": seed,
        }
        if files := text_files([settings["options"], self.config_values]):
            settings["files"] = files
        return Training(Unit("train", plain(settings)), concept, options, seed)

    def drawing(
        self, row: Row, prompts: tuple[tuple[str, ...], ...], words: tuple[LearnedWord, ...], seed: int
    ) -> Drawing:
        """The pictures of a row."""
        request = self.request
        sampling = sampling_options(request.model, row, request.model.quick if request.quick else None)
        first = seed * SEED_STRIDE
        settings = {
            "version": VERSION,
            "weights": self.drawn_with,
            "words": [[word.training.unit.key, word.step, word.name] for word in words],
            "prompts": [list(texts) for texts in prompts],
            "count": request.pictures,
            "seed": first,
            "sampling": what_matters(sampling),
        }
        return Drawing(Unit("draw", plain(settings)), words, prompts, request.pictures, first, sampling)

    def scoring(
        self, concept: Concept, options: TrainingOptions, drawing: Drawing | None, texts: tuple[str, ...]
    ) -> Scoring:
        """The scores of a drawing, or of the training pictures."""
        table, second = self.request.table, self.request.second
        count = options.pictures if table.reference == "training" else None
        settings = {
            "version": VERSION,
            "drawing": drawing.unit.key if drawing else None,
            "training": concept.content(count),
            "second": second.content(options.pictures) if second else None,
            "texts": list(texts),
            "judges": self.judges,
            "size": self.request.model.size,
            "image_over": table.image_over,
            "self_pairs": table.self_pairs,
        }
        if drawing is None:
            settings["nearest"] = "other pictures"  # scores of before counted each picture as its own nearest
        if table.antialias:
            settings["antialias"] = True
        pictures = second.pictures[: options.pictures] if second else ()
        return Scoring(Unit("score", plain(settings)), drawing, texts, concept.pictures[:count], pictures, table)


def model_fingerprint(path: str | Path, size: int | None = None) -> list[str | int | None]:
    """Hashes of a model's weights and of the config beside them; where none is, the size that tells which it is."""
    files = find_model_files(path)
    return [fingerprint(files.checkpoint), fingerprint(files.config) if files.config else size]


def what_is_learned(options: TrainingOptions, kind: str) -> dict[str, Any]:
    """The settings that a word of this kind depends on, besides those that `Planner.training` names by themselves."""
    values = dataclasses.asdict(options)
    values["learning_rate"] *= values.pop("learning_rate_factor")
    if not values.pop("regularised"):
        values["regularisation"] = 0.0
    values.pop("templates" if kind == "style" else "style_templates")
    return {key: value for key, value in values.items() if key not in ("pictures", "init_word")}


def what_matters(sampling: Sampling) -> dict[str, Any]:
    """The settings that pictures depend on: how many are drawn at a time is none of them."""
    return {field: value for field, value in dataclasses.asdict(sampling).items() if field != "batch_size"}


def wordings(row: Row, concept: Concept, prompts: Prompts) -> tuple[tuple[str, ...], ...]:
    """The texts that are drawn for each prompt: with the word, without it, or with something in its place."""
    texts = (prompts.reconstruction, *prompts.editing)
    if row.source == "initial_word":
        return tuple((text.replace(WORD, concept.init_word or ""),) for text in texts)
    if row.source == "no_word":
        return tuple((without_words(text, [WORD]),) for text in texts)
    if row.source == "captions":
        captions: Sequence[str] = concept.captions[row.captions]
        return tuple(tuple(in_place_of_word(text, caption) for caption in captions) for text in texts)
    return tuple((text,) for text in texts)


def in_place_of_word(prompt: str, caption: str) -> str:
    """The prompt with a caption in the place of the word; "a * ..." and "a photo of *" both read well with "a mug"."""
    begins_with_article = caption.split(" ", 1)[0].lower() in ("a", "an", "the")
    for article in ("a ", "an ", "the ") if begins_with_article else ():
        prompt = prompt.replace(f" {article}{WORD}", f" {WORD}")
        if prompt.lower().startswith(f"{article}{WORD}"):
            prompt = prompt[len(article) :]
    return prompt.replace(WORD, caption.rstrip("."))


def text_files(values: Any) -> dict[str, str]:
    """Hashes of the text files (templates, captions) that values name, by what the values say."""
    if isinstance(values, str):
        is_file = values.endswith(TEXT_FILES) and Path(values).is_file()
        return {values: fingerprint(values)} if is_file else {}
    parts = values.values() if isinstance(values, Mapping) else values if isinstance(values, list | tuple) else ()
    return {name: found for part in parts for name, found in text_files(part).items()}


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values: tuples become lists, mappings dicts."""

    def convert(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): convert(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [convert(item) for item in value]
        return value

    return convert(settings)


def check_request(request: Request) -> None:
    """Raise `ValueError` for what a request lacks: a word to start from, the second concept, captions."""
    table = request.table
    check_judges(request)
    learns = any(row.source == "word" for row in table.rows)
    named = any(row.source == "initial_word" or CLASS in str(row.prompts) for row in table.rows)
    for concept in (*request.concepts, *([request.second] if request.second else [])):
        if concept.init_word is None and (named or (learns and "init_word" not in request.model.training)):
            raise ValueError(
                f"concept '{concept.label}' names no word to start from: write `init_word: ...` to its concept.yaml"
            )
        if concept.texts and not concept.prompts:
            raise ValueError(f"concept '{concept.label}' has texts but no prompts")
    if any(row.second for row in table.rows) and request.second is None:
        raise ValueError(f"{table.name} needs the concept '{table.second}' too")


def check_judges(request: Request) -> None:
    """Raise `ValueError` for a metric with the alias of a judge that the model does not have."""
    table, others = request.table, list(request.model.judges)[1:]
    known = [*METRICS, *(f"{alias}_{metric}" for alias in others for metric in JUDGED)]
    named = {metric for claim in table.claims for metric, _ in claim.rows()}
    named |= {metric for measure in table.measures for metric, _ in measure.rows()}
    for metric in (*table.columns, *table.extra, *sorted(named)):
        if metric not in known:
            raise ValueError(
                f"{table.name}: no judge of {request.model.name} measures '{metric}'{did_you_mean(metric, known)}"
            )


def lacks(row: Row, concept: Concept, model: ModelSpec) -> str | None:
    """What keeps a concept from having a row: no captions, too few or too many pictures; None if nothing does."""
    if row.source == "captions" and not concept.captions.get(row.captions):
        return f"no {row.captions} captions"
    wanted = row.training.get("pictures")
    if row.source == "word" and wanted is not None and wanted > len(concept.pictures):
        return f"no {wanted} pictures"
    options = training_options(model, row)
    most = len(per_img_token_list)
    if row.source == "word" and options.per_image_tokens and len(concept.pictures[: options.pictures]) > most:
        return f"more than {most} pictures for per-image tokens"
    return None


def left_out(request: Request) -> str:
    """Which rows are left out for which concepts, for people; empty if none is."""
    without: dict[str, list[str]] = {}
    for row in request.table.rows:
        for concept in request.concepts:
            if what := lacks(row, concept, request.model):
                without.setdefault(what, []).append(concept.label)
    return "; ".join(f"{what} of {', '.join(labels)}" for what, labels in without.items())
