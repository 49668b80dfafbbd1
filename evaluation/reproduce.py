"""From a table's name to its files: finds concepts and models, does what is missing, writes what is known."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from evaluation.cells import Store, shard
from evaluation.concepts import Concept, check_concepts, read_concepts
from evaluation.emoji_concepts import concept_sets, write_concepts
from evaluation.experiments import ModelSpec, Table, read_model, read_table
from evaluation.export import check_export
from evaluation.figures import write_figure
from evaluation.gallery import EXPORT_LIST, Exhibit, export_pictures, make_gallery, save_strips
from evaluation.kept import keep_others, take_over
from evaluation.plan import Cell, Planner, Request, check_request, left_out
from evaluation.report import write_report
from evaluation.results import TableResult, collect
from evaluation.tables import write_tables
from evaluation.training_runs import TrainCommand
from evaluation.workshop import Workshop
from ldm.util import did_you_mean

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Options:
    """What a user asks for; None means what the model or the table says."""

    table: str
    model: str = "embedded"
    models_file: str | None = None
    concepts: str | None = None
    names: Sequence[str] | None = None
    rows: Sequence[str] | None = None  # do only these; the others show what is there
    seeds: Sequence[int] | None = None
    pictures: int | None = None
    checkpoint: str | None = None
    weights: Mapping[str, str] = dataclasses.field(default_factory=dict)
    quick: bool = False
    part: tuple[int, int] = (1, 1)
    store: str = "outputs/evaluation"
    out: str | None = None
    device: str = "auto"
    report_only: bool = False
    command: str = ""
    second: str | None = None  # instead of the table's second concept
    data: str | None = None  # pictures for tables of whole models
    inception_weights: str | None = None
    ratings: str | None = None  # of DreamBench++
    export: str | None = None  # folder to copy all pictures to, by row, concept and prompt

    @property
    def out_folder(self) -> Path:
        """Where the table's files go."""
        return Path(self.out) if self.out else Path("results") / Path(self.table).stem


def reproduce(options: Options, train: TrainCommand) -> TableResult:
    """Do what is missing of a table (or of this machine's share), and write its files."""
    table = read_table(options.table, options.model)
    if options.second:
        table = dataclasses.replace(table, second=options.second)
    if table.kind == "user_study":
        raise ValueError(f"{table.name} is answered by people: see scripts/user_study.py --help")
    model = chosen_model(options, table)
    store = Store(options.store)
    if table.kind != "inversion":
        return reproduce_models(table, model, options, store)
    request = make_request(options, table, model, store)
    cells = Planner(request).cells()
    take_over(cells, store, options.out_folder)
    wanted = chosen_rows(options, table)
    mine = shard([c for c in cells if c.row.name in wanted], lambda cell: cell.group, options.part, work_of)
    if not options.report_only:
        log.info("%s on %s: %d cells%s", table.name, model.name, len(cells), share(len(mine), len(cells)))
        pictures = options.export is not None or table.options.get("layout") == "dreambench_plus"
        workshop = Workshop(model, store, train, options.device, options.weights, table.antialias)
        check_folders(options, table)
        workshop.run(mine, pictures_of_seed=request.seeds[0] if pictures else None)
        take_over(cells, store, options.out_folder)  # what another machine has written meanwhile
    result = collect(request, cells, store, {"Command": options.command} if options.command else {})
    if table.options.get("layout") == "dreambench_plus":
        result = finish_dreambench_plus(result, request, cells, store, options)
    keep_others(options.out_folder, {cell.scoring.unit.key for cell in cells})
    write_result(result, options.out_folder, make_gallery(request, cells, store, options.out_folder))
    if options.export:
        warn_of_missing_pictures(request, cells, store)
        export_pictures(request, cells, store, Path(options.export))
    if not options.report_only and workshop.failures:
        raise ValueError(f"{len(workshop.failures)} of the table's cells failed, the first: {workshop.failures[0]}")
    return result


def check_folders(options: Options, table: Table) -> None:
    """Raise for folders and files that could not be used after hours of work."""
    options.out_folder.mkdir(parents=True, exist_ok=True)
    if not os.access(options.out_folder, os.W_OK):
        raise PermissionError(f"--out {options.out_folder} may not be written to")
    if options.export:
        check_export(Path(options.export), EXPORT_LIST)
    if table.options.get("layout") == "dreambench_plus":
        for row in table.rows:
            check_export(samples_folder(options) / row.name)
    if options.ratings and not Path(options.ratings).exists():
        raise FileNotFoundError(f"--ratings {options.ratings} is not there")


def samples_folder(options: Options) -> Path:
    """Where the rows' pictures go in the layout of DreamBench++."""
    return options.out_folder / "samples"


def warn_of_missing_pictures(request: Request, cells: Sequence[Cell], store: Store) -> None:
    """Say so when some of the pictures that are to be copied are not in the store."""
    own = [cell.drawing.unit for cell in cells if cell.drawing is not None and cell.seed == request.seeds[0]]
    missing = sum(not store.is_done(unit) for unit in own)
    if missing:
        log.warning("the pictures of %d of %d cells are not there: the command without --report_only draws them",
                    missing, len(own))  # fmt: skip


def work_of(cell: Cell) -> int:
    """How much work a cell is, roughly: a word to learn and pictures to draw, pictures alone, neither."""
    return 2 * bool(cell.trainings) + (cell.drawing is not None)


def reproduce_models(table: Table, model: ModelSpec, options: Options, store: Store) -> TableResult:
    """As `reproduce`, for tables of whole models."""
    from evaluation.model_tables import ModelTable

    ignored = {"--names": options.names, "--seeds": options.seeds, "--n_samples": options.pictures,
               "--export": options.export, "--concepts": options.concepts}  # fmt: skip
    for flag, value in ignored.items():
        if value is not None:
            raise ValueError(f"{flag} is for tables of learned words; {table.name} takes pictures from --data")
    chosen_rows(options, table)
    if options.data is None:
        raise ValueError(f"{table.name} needs pictures: name their folder with --data")
    work = ModelTable(
        table, model, store, Path(options.data), options.inception_weights, options.device, options.quick, options.rows
    )
    records = work.records(options.part, options.report_only)
    result = work.result(records, {"Command": options.command} if options.command else {})
    write_result(result, options.out_folder)
    return result


def finish_dreambench_plus(
    result: TableResult, request: Request, cells: Sequence[Cell], store: Store, options: Options
) -> TableResult:
    """Lay the pictures out as the benchmark does, and add the ratings where there are some."""
    from evaluation.dreambench_plus import add_ratings, export_samples

    for row in request.table.rows:
        own = [cell for cell in cells if cell.row.name == row.name and cell.seed == request.seeds[0]]
        if own and all(cell.drawing and store.is_done(cell.drawing.unit) for cell in own):
            folder = export_samples(own, store, samples_folder(options) / row.name)
            log.info("Pictures in the benchmark's layout, to be rated: %s", folder)
    return add_ratings(result, request, options.ratings, samples_folder(options)) if options.ratings else result


def share(count: int, total: int) -> str:
    """Says how many of the cells are asked for, where it is not all."""
    return f", of which {count} are asked for" if count < total else ""


def chosen_rows(options: Options, table: Table) -> Sequence[str]:
    """Names of the rows to do: those that the user names, or all."""
    names = [row.name for row in table.rows]
    for row in options.rows or ():
        if row not in names:
            raise ValueError(f"{table.name} has no row '{row}'{did_you_mean(row, names)}; it has {', '.join(names)}")
    return options.rows or names


def write_result(result: TableResult, folder: Path, gallery: Sequence[Exhibit] = ()) -> list[Path]:
    """Write the table in all formats, the figure and the report; returns the files."""
    tables = write_tables(result, folder)
    try:
        figure = write_figure(result, folder / "figure.png")
    except ValueError as error:  # of matplotlib, of a label or a scale that it cannot draw
        log.warning("the figure is left out: %s", " ".join(str(error).split()))
        figure = None
    report = write_report(result, folder / "report.html", figure, gallery)
    save_strips(gallery, folder)
    return [*tables, *([figure] if figure else []), report]


# ------------------------------------------------------------------------------------------------------- request


def chosen_model(options: Options, table: Table) -> ModelSpec:
    """The model of models.yaml, with the weights that the user names and the judges that the table wants."""
    model = read_model(options.model, options.models_file)
    if table.judges:
        model = dataclasses.replace(model, judges=table.judges)
    for alias in options.weights:
        if alias not in model.judges:
            raise ValueError(f"{model.name} has no judge '{alias}'{did_you_mean(alias, model.judges)}")
    return dataclasses.replace(model, checkpoint=options.checkpoint) if options.checkpoint else model


def make_request(options: Options, table: Table, model: ModelSpec, store: Store) -> Request:
    """The request that the options mean."""
    concepts, second = find_concepts(options, table, model, store)
    seeds = tuple(dict.fromkeys(options.seeds or model.seeds))
    if options.quick:
        concepts = concepts if options.names else concepts[: model.quick.concepts]
        seeds = seeds if options.seeds else seeds[: model.quick.seeds]
    request = Request(
        table, model, tuple(concepts), seeds, second, options.quick, options.weights, count=options.pictures
    )
    check_concepts(concepts)
    check_request(request)
    if missing := left_out(request):
        log.warning("rows left out: %s", missing)
    return request


def find_concepts(
    options: Options, table: Table, model: ModelSpec, store: Store
) -> tuple[list[Concept], Concept | None]:
    """The concepts to learn, and the table's second one."""
    source = options.concepts or table.options.get("concepts") or model.concepts
    if source is None:
        raise ValueError(f"name the folder of concepts with --concepts: {model.name} comes with none")
    names = options.names or (None if options.concepts else table.options.get("names"))
    sets = concept_sets()
    chosen = [source] if isinstance(source, str) else list(source)
    if all(name in sets for name in chosen):
        concepts = write_concepts(names or [name for part in chosen for name in sets[part]], store.root / "concepts")
    elif len(chosen) == 1 and Path(chosen[0]).is_dir():
        concepts = read_folder(chosen[0], names, table, model)
    else:
        hint = did_you_mean(str(source), sets)
        raise FileNotFoundError(f"--concepts {source} is neither a folder nor one of {', '.join(sets)}{hint}")
    second = None
    if table.second:
        if chosen[0] in sets:
            second = second_concept(table.second, store)
        else:
            kind = table.options.get("second_kind")
            second = read_concepts(chosen[0], [table.second], known_words(table, model), kind)[0]
        concepts = [concept for concept in concepts if concept.label != second.label]
    return concepts, second


def read_folder(folder: str, names: Sequence[str] | None, table: Table, model: ModelSpec) -> list[Concept]:
    """The concepts of a folder of the user's, in the layout that the table knows."""
    if table.options.get("layout") == "dreambench_plus":
        from evaluation.dreambench_plus import read_dreambench_plus

        return read_dreambench_plus(folder, names)
    prompts = table.options.get("prompts_by_kind", {})
    return [
        with_prompts(concept, prompts, table) for concept in read_concepts(folder, names, known_words(table, model))
    ]


def known_words(table: Table, model: ModelSpec) -> dict[str, str]:
    """Words to start from, by folder name."""
    return {**model.init_words, **table.options.get("init_words", {})}


def second_concept(name: str, store: Store) -> Concept:
    """A concept of the embedded picture world."""
    return write_concepts([name], store.root / "concepts")[0]


def with_prompts(concept: Concept, prompts: Mapping[str, Sequence[str]], table: Table) -> Concept:
    """The concept with the prompts that the table has for its group, unless it has its own.

    The groups are listed in the table's options as `groups: {live: [dog, cat]}`; the rest is "other".
    """
    if concept.prompts or not prompts:
        return concept
    groups: Mapping[str, Sequence[str]] = table.options.get("groups", {})
    group = next((name for name, labels in groups.items() if concept.label in labels), "other")
    return dataclasses.replace(concept, prompts=tuple(prompts[group]), category=group)
