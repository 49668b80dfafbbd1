"""Experiments as YAML: which rows a table has, how each is made, which figures were published, what is claimed.

`configs/evaluation/models.yaml` says how each base model trains, samples and is judged, and with which prompts;
`configs/evaluation/<table>.yaml` says what the rows of a table change about that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from evaluation.claims import Claim, Measure
from evaluation.concepts import KINDS, WORD, texts
from evaluation.scoring import METRICS as JUDGED
from ldm.generate_command import SAMPLERS
from ldm.resources import TABLES, config_path, resource_root
from ldm.run import read_config
from ldm.util import ConfigError, did_you_mean, to_plain

T = TypeVar("T")
MODELS = "models"
TABLE_KINDS = ("inversion", "first_stages", "text_to_image", "user_study")
METRICS = (
    *JUDGED,
    *("fid", "kid", "inception_score", "psnr", "ssim"),  # of whole models
    *("cp", "pf"),  # DreamBench++'s ratings
    *("image_rank", "text_rank"),  # of the user study
)
SOURCES = ("word", "no_word", "initial_word", "captions", "training_pictures", "published")


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """How a word is learned; everything else is as the model's training config says."""

    steps: int = 5000
    batch_size: int = 4
    learning_rate: float = 5e-3  # base rate: main.py multiplies it by the batch size
    learning_rate_factor: float = 1.0
    vectors: int = 1
    progressive: bool = False  # one more vector at 40 % and at 80 % of the steps, the paper's 2000 and 4000 of 5000
    per_image_tokens: bool = False
    regularised: bool = False
    regularisation: float = 0.0  # weight of the squared distance to the initial word, where `regularised`
    pictures: int | None = None  # how many of the concept's pictures to learn from; default: all
    init_word: str | None = None  # instead of the concept's own; "" starts from a random vector
    templates: str | None = None  # of captions, for objects (default: as the training config says)
    style_templates: str = "style"  # for styles
    save_every: int | None = None  # steps between two kept states (default: only the last)
    precision: str | None = None
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # dotted keys of the training config


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How pictures are drawn."""

    sampler: str = "ddim"
    steps: int = 50
    eta: float = 0.0
    scale: float = 5.0
    height: int | None = None
    width: int | None = None
    batch_size: int = 8
    precision: str = "full"

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ConfigError(f"there is no sampler '{self.sampler}'{did_you_mean(self.sampler, SAMPLERS)}")


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What is drawn: one prompt for reconstruction, others for editing; `*` stands for the word, `@` for a second."""

    reconstruction: str = f"a photo of {WORD}"
    editing: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "editing", texts(self.editing, "prompts for editing"))


@dataclasses.dataclass(frozen=True)
class Quick:
    """What --quick changes: less of everything."""

    steps: float = 0.5  # factor
    concepts: int = 3
    seeds: int = 1
    pictures: int = 8
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def scaled(self, steps: int) -> int:
        """A number of steps, reduced."""
        return max(1, round(steps * self.steps))


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A base model and its defaults; see the comments in models.yaml."""

    name: str
    label: str
    config: str
    checkpoint: str
    size: int  # pixels of the training pictures
    judges: Mapping[str, str]
    concepts: str | None = None
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prompts: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    pictures: int = 64
    seeds: tuple[int, ...] = (0,)
    init_words: Mapping[str, str] = dataclasses.field(default_factory=dict)
    quick: Quick = dataclasses.field(default_factory=Quick)

    @property
    def config_file(self) -> Path:
        """The training config: a file of the user's, or one that comes along."""
        return Path(self.config) if Path(self.config).is_file() else config_path(self.config)

    @property
    def checkpoint_path(self) -> Path:
        """The weights: where they are named, or beside the models that come along."""
        path = Path(self.checkpoint)
        return path if path.exists() else resource_root() / path


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table.

    source: what makes the pictures: a learned word, the prompt without it, the word that training starts from or
        captions by people in its place, none (the training pictures themselves), or others ("published": figures only).
    prompts: `{class}` in them is the concept's initial word.
    second: also load the table's second concept as `@`.
    at: position on the axis of a sweep.
    """

    name: str
    label: str = ""
    source: str = "word"
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prompts: Mapping[str, Any] | None = None
    captions: str = ""
    second: bool = False
    at_step: int | None = None
    at: float | None = None
    published: Mapping[str, float] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of tables of another kind

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ConfigError(f"row '{self.name}': source '{self.source}' is none of {', '.join(SOURCES)}")
        if (self.source == "captions") != bool(self.captions):
            raise ConfigError(f"row '{self.name}': `captions: short` or the like goes with `source: captions`")
        for metric, value in self.published.items():
            if not isinstance(value, int | float):
                raise ConfigError(f"row '{self.name}': the published {metric} is no number: {value!r}")


@dataclasses.dataclass(frozen=True)
class Table:
    """A table or figure to reproduce.

    columns: metrics to show beside the published ones; `extra`: metrics to show only.
    image_over: "reconstruction", "editing" or "all": the prompts whose pictures count for image similarity.
    reference: "training" or "all": the pictures of the concept that they are compared with.
    self_pairs: whether training pictures, compared with themselves, count pairs of a picture and itself.
    judges: instead of the model's.
    antialias: whether CLIP's pictures are smoothed before they are shrunk, as Pillow does it.
    text_word: "class" compares with the prompt that has the initial word in the learned one's place; default: none.
    plot: {x, y} two metrics, or {x: at, y: [metrics]} for a sweep, with `label` for its axis.
    scale: factors for display, such as CLIPScore's 2.5; the published figures are given at that scale.
    """

    name: str
    title: str
    source: str
    rows: tuple[Row, ...]
    kind: str = "inversion"
    columns: tuple[str, ...] = ("text", "image")
    extra: tuple[str, ...] = ()
    claims: tuple[Claim, ...] = ()
    measures: tuple[Measure, ...] = ()
    by_concept: bool = False  # whether to show the columns for each concept, too
    notes: tuple[str, ...] = ()
    plot: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scale: Mapping[str, float] = dataclasses.field(default_factory=dict)
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    image_over: str = "reconstruction"
    reference: str = "training"
    second: str | None = None  # the concept whose word is `@`
    self_pairs: bool = True
    judges: Mapping[str, str] = dataclasses.field(default_factory=dict)
    antialias: bool = False
    text_word: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def row(self, name: str) -> Row:
        """The row called `name`."""
        return next(row for row in self.rows if row.name == name)


# ------------------------------------------------------------------------------------------------------- reading


def build(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """`kind(**values)`; an unknown or missing key is a `ConfigError` that names it."""
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: unknown key '{key}'{did_you_mean(key, known) or f'; known: {known}'}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: {str(error).partition(') ')[2] or error}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of keys and values."""
    return to_plain(read_config(path))


def table_names() -> list[str]:
    """The tables that come along."""
    return sorted(path.stem for path in (resource_root() / TABLES).glob("*.yaml") if path.stem != MODELS)


def find_file(name: str) -> Path:
    """Path of a table: a file of the user's, or one that comes along."""
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise FileNotFoundError(f"there is no table at {name}")
        return Path(name)
    if name not in table_names():
        raise ValueError(f"there is no table '{name}'{did_you_mean(name, table_names())}; {', '.join(table_names())}")
    return config_path(f"evaluation/{name}.yaml")


def read_model(name: str, path: str | Path | None = None) -> ModelSpec:
    """The base model called `name` in models.yaml (or in a file of the user's with the same layout)."""
    file = Path(path) if path else config_path(f"evaluation/{MODELS}.yaml")
    models = read_yaml(file)
    if name not in models:
        raise ValueError(f"there is no model '{name}' in {file.name}{did_you_mean(name, models)}; {', '.join(models)}")
    values = dict(models[name], name=name)
    where = f"{file.name}: {name}"
    values["seeds"] = tuple(values.get("seeds", (0,)))
    values["quick"] = build(Quick, values.get("quick", {}), f"{where}.quick")
    spec = build(ModelSpec, values, where)
    if not spec.judges:
        raise ConfigError(f"{where}: there is no judge")
    build(TrainingOptions, spec.training, f"{where}.training")
    build(Sampling, spec.sampling, f"{where}.sampling")
    for kind, prompts in spec.prompts.items():
        if kind not in KINDS:
            raise ConfigError(f"{where}.prompts: '{kind}' is neither {' nor '.join(KINDS)}")
        build(Prompts, prompts, f"{where}.prompts.{kind}")
    return spec


def read_table(name: str, model: str | None = None) -> Table:
    """The table called `name` (see `find_file`); its section `for_model: {<model>: ...}` goes over the rest."""
    path = find_file(name)
    values = read_yaml(path)
    special = values.pop("for_model", None) or {}
    values = merge(values, mapping(special, f"{path.name}: for_model").get(model or "") or {})
    rows = mapping(values.get("rows") or {}, f"{path.name}: rows")
    values["name"] = path.stem
    values["rows"] = tuple(
        build(
            Row, {"label": key, **mapping(row or {}, f"{path.name}: {key}"), "name": key}, f"{path.name}: row '{key}'"
        )
        for key, row in rows.items()
    )
    for key, kind in (("claims", Claim), ("measures", Measure)):
        said = values.get(key) or ()
        if not isinstance(said, list | tuple):
            raise ConfigError(f"{path.name}: {key} should be a list, not {said!r}")
        values[key] = tuple(build(kind, mapping(one, f"{path.name}: {key}"), f"{path.name}: {key}") for one in said)
    for key in ("columns", "extra", "notes"):
        if key in values:
            values[key] = texts(values[key], f"{path.name}: {key}")
    table = build(Table, values, path.name)
    check_table(table, path.name)
    return table


def mapping(values: Any, where: str) -> Mapping[str, Any]:
    """Keys and values; anything else is a `ConfigError`."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected keys and values, not {values!r}")
    return values


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`; mappings are merged key by key, and null takes a key away."""
    out = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(out.get(key), Mapping):
            out[key] = merge(out[key], value)
        elif value is None:
            out.pop(key, None)
        else:
            out[key] = value
    return out


def check_table(table: Table, where: str) -> None:
    """Raise `ConfigError` for what would only show after hours of work."""
    if table.kind not in TABLE_KINDS:
        raise ConfigError(f"{where}: kind '{table.kind}' is none of {', '.join(TABLE_KINDS)}")
    if not table.rows:
        raise ConfigError(f"{where}: the table has no rows")
    choices = {
        "image_over": ("reconstruction", "editing", "all"),
        "reference": ("training", "all"),
        "text_word": (None, "class"),
    }
    for key, known in choices.items():
        if getattr(table, key) not in known:
            raise ConfigError(f"{where}: {key} '{getattr(table, key)}' is neither {' nor '.join(map(str, known))}")
    names = [row.name for row in table.rows]
    for row in table.rows:
        check_row(row, table, where)
    said = [(claim.holds_if, claim.rows()) for claim in table.claims]
    said += [(measure.value, measure.rows()) for measure in table.measures]
    for text, pairs in said:
        for metric, name in pairs:
            if name not in names:
                raise ConfigError(f"{where}: '{text}' names no row{did_you_mean(name, names)}: '{name}'")
            check_metric(metric, f"{where}: '{text}'")
    for metric in (*table.columns, *table.extra):
        check_metric(metric, where)


def check_metric(metric: str, where: str) -> None:
    """Raise `ConfigError` for a metric that nothing measures; a judge's alias may stand before its name."""
    if metric not in METRICS and not any(metric.endswith(f"_{known}") for known in JUDGED):
        raise ConfigError(f"{where}: there is no metric '{metric}'{did_you_mean(metric, METRICS)}")


def check_row(row: Row, table: Table, where: str) -> None:
    """As `check_table`, for one row."""
    build(TrainingOptions, row.training, f"{where}: row '{row.name}'.training")
    build(Sampling, row.sampling, f"{where}: row '{row.name}'.sampling")
    if row.prompts is not None:
        build(Prompts, row.prompts, f"{where}: row '{row.name}'.prompts")
    if row.second and table.second is None:
        raise ConfigError(f"{where}: row '{row.name}' wants a second word, but the table names no `second` concept")


def prompts_for(model: ModelSpec, kind: str, row: Row) -> Prompts:
    """The prompts of a row for concepts of a kind."""
    values = dict(model.prompts.get(kind, {}))
    return build(Prompts, {**values, **(row.prompts or {})}, f"prompts of row '{row.name}'")


def training_options(model: ModelSpec, row: Row | None, quick: Quick | None = None) -> TrainingOptions:
    """The model's training with what the row changes; fewer steps with --quick."""
    options = build(TrainingOptions, merge(model.training, row.training if row else {}), "training")
    if quick is None:
        return options
    every = None if options.save_every is None else quick.scaled(options.save_every)
    return dataclasses.replace(options, steps=quick.scaled(options.steps), save_every=every)


def kept_step(model: ModelSpec, row: Row, quick: Quick | None = None) -> int:
    """The step whose word the row takes: the last, or `at_step`, with --quick the state that is kept in its place.

    Raises `ConfigError` when no state is kept at `at_step`.
    """
    full, options = training_options(model, row), training_options(model, row, quick)
    if row.at_step is None or row.at_step == full.steps:
        return options.steps
    if full.save_every is None or row.at_step % full.save_every or row.at_step > full.steps:
        kept = f"the last of {full.steps}" if full.save_every is None else f"every {full.save_every} to {full.steps}"
        raise ConfigError(f"row '{row.name}' wants the word at step {row.at_step}, but `save_every` keeps {kept}")
    assert options.save_every is not None
    return min(options.steps, row.at_step // full.save_every * options.save_every)


def sampling_options(model: ModelSpec, row: Row, quick: Quick | None = None) -> Sampling:
    """The model's sampling with what the row and --quick change."""
    values = merge(model.sampling, row.sampling)
    return build(Sampling, merge(values, quick.sampling if quick else {}), "sampling")
