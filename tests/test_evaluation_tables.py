"""A whole table on a tiny model: trained, drawn, scored, written; interruptions, changes, shards; shipped tables."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import main
from evaluation.cells import Store
from evaluation.claims import Claim, Measure
from evaluation.concepts import read_concepts
from evaluation.experiments import (
    Prompts,
    TrainingOptions,
    kept_step,
    read_model,
    read_table,
    read_yaml,
    table_names,
    training_options,
)
from evaluation.plan import (
    Planner,
    Request,
    in_place_of_word,
    lacks,
    model_fingerprint,
    what_is_learned,
    wordings,
)
from evaluation.reproduce import Options, make_request, reproduce
from evaluation.results import TableResult, describe, summarise, what_is_its_own
from evaluation.stats import HOLDS
from evaluation.tables import markdown_rows, to_csv, to_latex, to_markdown
from evaluation.training_runs import overrides
from evaluation.workshop import summary
from ldm.resources import config_path, resource_root
from ldm.util import ConfigError
from tests.test_scripts_sampling import ROOT, load
from tests.tiny_evaluation import write_concept, write_concepts, write_judge, write_models_file

TABLE = {
    "title": "A small table",
    "source": "nobody",
    "columns": ["text", "image"],
    "extra": ["diversity", "image_distinct"],
    "plot": {"x": "text", "y": "image"},
    "rows": {
        "set": {"label": "training set", "source": "training_pictures", "published": {"text": 0.2, "image": 0.8}},
        "bare": {"label": "prompt only", "source": "no_word"},
        "said": {"label": "captions & co", "source": "captions", "captions": "short"},
        "ours": {"label": "one word", "published": {"image": 0.7}},
        "early": {"label": "one word, early", "training": {"save_every": 2}, "at_step": 2},
        "late": {"label": "one word, late", "training": {"save_every": 2}},
    },
    "claims": [{"says": "The set is like itself", "holds_if": "image(set) > image(bare)"}],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Options:
    """Options of the table on the tiny model; nothing is done yet."""
    root = tmp_path_factory.mktemp("world")
    (root / "small.yaml").write_text(yaml.safe_dump(TABLE))
    return Options(
        table=str(root / "small.yaml"),
        model="tiny",
        models_file=str(write_models_file(root, seeds=[0])),
        concepts=str(write_concepts(root / "concepts")),
        weights={"own": str(write_judge(root / "judge"))},
        store=str(root / "store"),
        out=str(root / "results"),
        device="cpu",
        command="python ...",
    )


@pytest.fixture(scope="module")
def result(world: Options) -> TableResult:
    """The table, done."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    table = reproduce(world, main.main)
    torch.set_num_threads(threads)
    return table


def refuse(words: list[str]) -> None:
    raise AssertionError(f"trained again: {words}")


# -- a table -------------------------------------------------------------------------------------------------------


def test_every_cell_is_done(result: TableResult):
    assert (result.done, result.total) == (12, 12)
    assert {record["row"] for record in result.cells} == set(TABLE["rows"])
    itself = result.intervals["image", "set"]
    assert itself.mean > result.intervals["image_distinct", "set"].mean
    assert result.findings[0].verdict == HOLDS
    for (metric, _), found in result.intervals.items():
        assert metric == "diversity" or -1 <= found.mean <= 1 + 1e-6


def test_the_files_of_a_table(result: TableResult, world: Options):
    folder = world.out_folder
    names = {path.name for path in folder.iterdir()}
    tables = {"table.md", "table.csv", "cells.csv", "table.json", "table.tex"}
    assert names == {*tables, "figure.png", "report.html", "strips"}
    record = json.loads((folder / "table.json").read_text())
    assert record["rows"]["set"]["published"] == {"text": 0.2, "image": 0.8}
    assert record["rows"]["set"]["ours"]["image"]["mean"] == pytest.approx(
        result.intervals["image", "set"].mean, abs=1e-6
    )
    assert record["claims"][0]["verdict"] == "holds"
    with (folder / "cells.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 12
    markdown = (folder / "table.md").read_text()
    assert "python ..." in markdown
    assert "| one word | " in markdown
    with Image.open(folder / "figure.png") as figure:
        assert figure.width > 400
    page = (folder / "report.html").read_text()
    assert "captions &amp; co" in page
    assert page.count("data:image/jpeg;base64,") == 2 * 6  # two concepts: training pictures and five drawn rows
    assert not re.findall(r'(?:src|href)="(?!data:)', page)  # the page needs no other file


def test_nothing_is_computed_twice(result: TableResult, world: Options):
    again = reproduce(world, refuse)
    assert again.intervals == result.intervals


def test_a_stopped_run_leaves_scores(world: Options, tmp_path: Path):
    options = dataclasses.replace(world, store=str(tmp_path / "store"), out=str(tmp_path / "out"))
    trained: list[list[str]] = []

    def stop_at_the_second_concept(words: list[str]) -> None:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(words)
        main.main(words)

    with pytest.raises(KeyboardInterrupt):
        reproduce(options, stop_at_the_second_concept)
    assert reproduce(dataclasses.replace(options, report_only=True), refuse).done == 6


def test_only_the_rows_that_are_asked_for(world: Options, tmp_path: Path):
    options = dataclasses.replace(world, store=str(tmp_path / "store"), out=str(tmp_path / "out"), rows=["set", "bare"])
    result = reproduce(options, refuse)
    assert {record["row"] for record in result.cells} == {"set", "bare"}
    assert (result.done, result.total) == (4, 12)
    with pytest.raises(ValueError, match="no row 'sets' .did you mean 'set'"):
        reproduce(dataclasses.replace(options, rows=["sets"]), refuse)


def test_a_table_outlives_its_store(result: TableResult, world: Options, tmp_path: Path):
    shutil.copytree(world.out_folder, tmp_path / "results")
    page = (world.out_folder / "report.html").read_text()
    moved = dataclasses.replace(world, store=str(tmp_path / "store"), out=str(tmp_path / "results"))
    again = reproduce(moved, refuse)
    assert (again.done, again.total) == (12, 12)
    for key, interval in result.intervals.items():
        assert again.intervals[key].mean == pytest.approx(interval.mean, rel=1e-4, abs=1e-6)
    for record, earlier in zip(again.cells, result.cells, strict=True):
        numbers = {name: value for name, value in earlier.items() if isinstance(value, float)}
        assert {name: record[name] for name in numbers} == pytest.approx(numbers, rel=1e-5, abs=1e-9)
        assert {**record, **numbers} == earlier
    pictures = re.findall(r"data:image/jpeg;base64,[^\"]*", page)
    assert re.findall(r"data:image/jpeg;base64,[^\"]*", (tmp_path / "results" / "report.html").read_text()) == pictures
    assert len(list((tmp_path / "results" / "strips").iterdir())) == 2 * 5


def test_pictures_that_are_asked_for_are_drawn_again(result: TableResult, world: Options, tmp_path: Path):
    del result
    shutil.copytree(world.out_folder, tmp_path / "results")
    out, pictures = str(tmp_path / "results"), tmp_path / "pictures"
    moved = dataclasses.replace(world, store=str(tmp_path / "store"), out=out, rows=["bare"], export=str(pictures))
    reproduce(moved, refuse)
    assert {path.name for path in pictures.iterdir() if not path.name.startswith(".")} == {"training", "bare"}
    assert {path.name for path in (pictures / "bare").iterdir()} == {"cat", "mug"}


def test_scores_of_other_settings_are_not_taken_over(result: TableResult, world: Options, tmp_path: Path):
    del result
    shutil.copytree(world.out_folder, tmp_path / "results")
    more = dataclasses.replace(world, pictures=3, store=str(tmp_path / "store"), out=str(tmp_path / "results"))
    assert reproduce(dataclasses.replace(more, report_only=True), refuse).done == 2  # the training pictures' own
    assert not list((tmp_path / "results" / "strips").iterdir())


def test_a_damaged_table_of_cells_is_named(world: Options, tmp_path: Path):
    options = dataclasses.replace(world, store=str(tmp_path / "store"), out=str(tmp_path / "out"), report_only=True)
    (tmp_path / "out").mkdir()
    for lines, wrong in (("key,row,image\nabc,ours,many\n", "'many'"), ("key,row\nabc,ours,0.5\n", "")):
        (tmp_path / "out" / "cells.csv").write_text(lines)
        with pytest.raises(ValueError, match=rf"cells\.csv is no table of cells .*{wrong}.* delete it"):
            reproduce(options, refuse)


def test_a_table_of_cells_without_hashes_is_not_taken_over(world: Options, tmp_path: Path):
    (tmp_path / "cells.csv").write_text("row,concept,seed,image\nours,cat,0,0.5\n")
    options = dataclasses.replace(world, store=str(tmp_path / "store"), out=str(tmp_path), report_only=True)
    assert reproduce(options, refuse).done == 0


def test_a_changed_setting_recomputes_only_its_cells(result: TableResult, world: Options, tmp_path: Path):
    del result
    changed = yaml.safe_load(Path(world.table).read_text())
    changed["rows"]["late"]["training"]["vectors"] = 2
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(changed))
    trained: list[list[str]] = []

    def train(words: list[str]) -> None:
        trained.append(words)
        main.main(words)

    options = dataclasses.replace(world, table=str(tmp_path / "small.yaml"), out=str(tmp_path / "out"), names=["cat"])
    reproduce(options, train)
    assert len(trained) == 1
    assert "model.params.personalization_config.params.num_vectors_per_token=2" in trained[0]


def test_rows_that_share_a_training_share_its_states(world: Options, result: TableResult):
    del result
    store, table = Store(world.store), read_table(world.table)
    request = make_request(world, table, read_model("tiny", world.models_file), store)
    cells = {cell.row.name: cell for cell in Planner(request).cells() if cell.concept.label == "cat"}
    assert cells["early"].trainings[0].unit.key == cells["late"].trainings[0].unit.key
    assert cells["early"].drawing.unit.key != cells["late"].drawing.unit.key
    folder = store.folder(cells["late"].trainings[0].unit)
    assert {path.name for path in folder.glob("*.pt")} == {"embeddings_gs-2.pt", "embeddings_gs-4.pt"}
    assert not (folder / "run").exists()
    assert len(list((folder / "pictures").iterdir())) == 2


def test_comments_of_a_config_change_no_result(world: Options, tmp_path: Path):
    model = read_model("tiny", world.models_file)
    text = model.config_file.read_text()
    keys = []
    for name, config in (("plain", text), ("said", f"# comment\n{text}"), ("changed", f"{text}\nseed: 7\n")):
        file = tmp_path / f"{name}.yaml"
        file.write_text(config)
        changed = dataclasses.replace(model, config=str(file))
        cells = Planner(make_request(world, read_table(world.table), changed, Store(world.store))).cells()
        keys.append([job.unit.key for cell in cells for job in cell.trainings])
    assert keys[0] == keys[1]
    assert not set(keys[0]) & set(keys[2])


def test_an_interrupted_training_goes_on(world: Options, tmp_path: Path):
    options = dataclasses.replace(world, store=str(tmp_path / "store"), out=str(tmp_path / "out"), names=["cat"])

    def stop_midway(words: list[str]) -> None:
        send = {"target": "tests.tiny_run.SignalAt", "params": {"step": 1, "name": "SIGINT"}}
        main.main([*words, f"+lightning.callbacks.send={send}"])

    with pytest.raises(KeyboardInterrupt):
        reproduce(options, stop_midway)
    calls: list[list[str]] = []

    def train(words: list[str]) -> None:
        calls.append(words)
        main.main(words)

    result = reproduce(options, train)
    assert calls[0][0] == "-r"
    assert [call[0] for call in calls[1:]] == ["--base"]
    assert (result.done, result.total) == (6, 6)


def test_shards_together_do_everything_once(world: Options, tmp_path: Path):
    options = dataclasses.replace(world, store=str(tmp_path / "store"), out=str(tmp_path / "out"))
    table = read_yaml(Path(world.table))
    table["rows"] = {name: table["rows"][name] for name in ("set", "bare")}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(table))
    options = dataclasses.replace(options, table=str(tmp_path / "two.yaml"))
    done = [reproduce(dataclasses.replace(options, part=(index, 2)), refuse).done for index in (1, 2)]
    assert done == [2, 4]
    assert "Not finished" not in (tmp_path / "out" / "table.md").read_text()


def test_quick_does_less(world: Options):
    model = read_model("tiny", world.models_file)
    request = make_request(dataclasses.replace(world, quick=True), read_table(world.table), model, Store(world.store))
    assert (len(request.concepts), request.seeds, request.pictures) == (1, (0,), 1)
    cells = {cell.row.name: cell for cell in Planner(request).cells()}
    assert cells["ours"].trainings[0].options.steps == 2
    assert cells["early"].drawing.words[0].step == 1


def test_the_command_writes_what_is_there(result: TableResult, world: Options, capsys: pytest.CaptureFixture[str]):
    del result
    command = load("reproduce_tables")
    command.main([
        "--table", world.table, "--model", "tiny", "--models", world.models_file, "--concepts", world.concepts,
        "--scorer_weights", f"own={world.weights['own']}", "--store", world.store, "--out", world.out, "--report_only",
        "--device", "cpu",
    ])  # fmt: skip
    said = capsys.readouterr().out
    assert "| one word |" in said
    assert "The set is like itself" in said
    assert said.strip().endswith("report.html")


def test_the_list_of_tables(capsys: pytest.CaptureFixture[str]):
    load("reproduce_tables").main(["--list"])
    said = capsys.readouterr().out
    assert "figure10" in said
    assert "--model embedded" in said


def test_help_needs_no_torch(tmp_path: Path):
    command = [sys.executable, "-X", "importtime", str(ROOT / "scripts" / "reproduce_tables.py"), "--help"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert "python scripts/reproduce_tables.py" in result.stdout
    assert " torch" not in result.stderr


# -- tables that come along, by the command ------------------------------------------------------------------------


def command_line(world: Options, table: str, out: Path, *more: str) -> list[str]:
    return ["--table", table, "--model", "tiny", "--models", str(world.models_file), "--concepts", str(world.concepts),
            "--scorer_weights", f"own={world.weights['own']}", "--store", world.store, "--out", str(out),
            "--device", "cpu", *more]  # fmt: skip


def run(world: Options, table: str, out: Path, *more: str) -> dict:
    load("reproduce_tables").main(command_line(world, table, out, *more))
    return json.loads((out / "table.json").read_text())


def test_what_a_word_gains_over_its_initial_word(
    result: TableResult, world: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    del result  # its words are used again
    record = run(world, "inversion", tmp_path)
    assert record["done"] == record["total"] == 2 * 3
    ours = {name: row["ours"] for name, row in record["rows"].items()}
    gap = ours["real"]["image"]["mean"] - ours["initial_word"]["image"]["mean"]
    closed = (ours["word"]["image"]["mean"] - ours["initial_word"]["image"]["mean"]) / gap
    assert record["measures"]["Share of the gap that is closed"]["mean"] == pytest.approx(closed, abs=1e-3)
    assert [line["concept"] for line in record["concepts"]] == ["cat", "mug"]
    better = [line["image(word)"] > line["image(initial_word)"] for line in record["concepts"]]
    assert record["claims"][0]["concepts"] == [sum(better), 2]
    said = capsys.readouterr().out
    assert "Share of the gap that is closed" in said
    assert "By concept" in (tmp_path / "report.html").read_text()
    texts = [json.loads(p.read_text())["prompts"] for p in (Path(world.store) / "draw").glob("*/settings.json")]
    assert [["a photo of sculpture"], ["sculpture on the beach"], ["two sculpture"]] in texts


def test_two_words_in_one_prompt(result: TableResult, world: Options, tmp_path: Path):
    del result
    record = run(world, "composition", tmp_path / "out", "--second", "mug", "--export", str(tmp_path / "pictures"))
    assert record["done"] == record["total"] == 4
    assert [line["concept"] for line in record["concepts"]] == ["cat"]
    assert all(row["ours"]["second_image"] for row in record["rows"].values())
    exported = {path.relative_to(tmp_path / "pictures").parts[:2] for path in (tmp_path / "pictures").rglob("*.png")}
    assert exported == {(row, "cat") for row in ("training", "object_only", "style_only", "both", "neither")}


@pytest.mark.slow
@pytest.mark.parametrize("table", ["figure10", "figure12", "style", "custom_diffusion", "sweep_learning_rate"])
def test_every_row_of_a_shipped_table(table: str, result: TableResult, world: Options, tmp_path: Path):
    del result
    options = yaml.safe_load(Path(world.models_file).read_text())
    short = read_yaml(config_path(f"evaluation/{table}.yaml"))
    for row in short["rows"].values():
        if "steps" in row.get("training", {}):
            row["training"]["steps"] = 2
        row.get("sampling", {}).pop("steps", None)
    judges = {"clip": "emoji64"} if "judges" in short else options["tiny"]["judges"]
    short |= {"judges": judges, "options": {}}
    file = tmp_path / f"{table}.yaml"
    file.write_text(yaml.safe_dump(short))
    (alias,) = judges
    record = run(world, str(file), tmp_path / "out", "--names", "cat",
                 "--scorer_weights", f"{alias}={world.weights['own']}")  # fmt: skip
    assert record["done"] == record["total"] > 0
    measured = [name for name, row in record["rows"].items() if any(row["ours"].values())]
    few = {"n5", "n10", "n15", "n20", "n25"}  # more pictures than the concept has
    rows = [row.name for row in read_table(str(file)).rows if row.source != "published" and row.name not in few]
    assert sorted(measured) == sorted(rows)


@pytest.mark.parametrize("name", [name for name in table_names() if read_table(name).kind == "inversion"])
def test_shipped_tables_can_be_planned(name: str, world: Options):
    models = {**read_yaml(config_path("evaluation/models.yaml"))["embedded"], "judges": {"own": "emoji64"}}
    model = read_yaml(Path(world.models_file))["tiny"]
    table = dataclasses.replace(read_table(name, "embedded"), judges={})
    spec = dataclasses.replace(
        read_model("embedded"), config=model["config"], checkpoint=model["checkpoint"], judges=models["judges"]
    )
    if "layout" in table.options or "init_words" in table.options:
        return  # made for folders of pictures
    options = dataclasses.replace(world, concepts=None, names=["crown"], table=name)
    request = make_request(options, table, spec, Store(world.store))
    cells = Planner(request).cells()
    rows = [row for row in table.rows if row.source != "published"]
    assert [cell.row.name for cell in cells] == [row.name for row in rows] * 3  # crown has captions of either kind
    if table.second:
        assert request.second is not None
        assert request.second.kind == "style"


# -- what led to it ------------------------------------------------------------------------------------------------


def test_prompts_of_each_source(world: Options):
    request = make_request(world, read_table(world.table), read_model("tiny", world.models_file), Store(world.store))
    cells = {cell.row.name: cell for cell in Planner(request).cells()}
    assert cells["ours"].drawing.prompts == (("a photo of *",), ("* on the beach",), ("two *",))
    assert cells["bare"].drawing.prompts == (("a photo of",), ("on the beach",), ("two",))
    assert cells["said"].drawing.prompts[1] == ("a red thing on the beach", "a round thing on the beach")
    assert cells["set"].drawing is None
    for cell in cells.values():
        assert cell.scoring.texts == ("a photo of", "on the beach", "two")


def test_settings_without_effect_do_not_train_again():
    plain = TrainingOptions(learning_rate=1e-3, templates="object")
    same = [
        dataclasses.replace(plain, regularisation=0.5),
        dataclasses.replace(plain, style_templates="other"),
        dataclasses.replace(plain, learning_rate=5e-4, learning_rate_factor=2.0),
    ]
    assert all(what_is_learned(options, "object") == what_is_learned(plain, "object") for options in same)
    other = [
        dataclasses.replace(plain, regularisation=0.5, regularised=True),
        dataclasses.replace(plain, templates="paper"),
        dataclasses.replace(plain, vectors=2),
    ]
    assert all(what_is_learned(options, "object") != what_is_learned(plain, "object") for options in other)
    assert what_is_learned(same[1], "style") != what_is_learned(plain, "style")


def test_rows_that_a_concept_cannot_have_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    concepts = write_concepts(tmp_path / "concepts")
    options = Options(table="figure12", model="tiny", models_file=str(write_models_file(tmp_path)),
                      concepts=str(concepts), store=str(tmp_path / "store"))  # fmt: skip
    table = read_table("figure12")
    request = make_request(options, table, read_model("tiny", options.models_file), Store(options.store))
    assert max(len(concept.pictures) for concept in request.concepts) < 10
    rows = {cell.row.name for cell in Planner(request).cells()}
    assert "n1" in rows
    assert not rows & {"n10", "n25"}
    assert "no 25 pictures of cat, mug" in caplog.text


def test_the_config_beside_the_weights_counts_for_pictures(tmp_path: Path):
    for name in ("config.yaml", "model.safetensors"):
        (tmp_path / name).write_bytes((resource_root() / "models/ldm/emoji64" / name).read_bytes())
    before = model_fingerprint(tmp_path, 512)
    assert model_fingerprint(tmp_path, 768) == before
    config = tmp_path / "config.yaml"
    config.write_text(config.read_text().replace("parameterization: v", "parameterization: eps"))
    assert model_fingerprint(tmp_path, 512) != before
    config.unlink()  # then it is the size that tells which published model it is
    assert model_fingerprint(tmp_path, 512) != model_fingerprint(tmp_path, 768)


def test_a_second_concept_needs_a_word_to_start_from(tmp_path: Path):
    concepts = write_concepts(tmp_path / "concepts")
    ink = concepts / "ink"
    ink.mkdir()
    (ink / "a.png").write_bytes(next((concepts / "cat").glob("*.png")).read_bytes())
    options = Options(table="composition", model="tiny", models_file=str(write_models_file(tmp_path)),
                      concepts=str(concepts), store=str(tmp_path / "store"))  # fmt: skip
    table = dataclasses.replace(read_table("composition"), second="ink")
    model = read_model("tiny", options.models_file)
    with pytest.raises(ValueError, match="'ink' names no word to start from"):
        make_request(options, table, model, Store(options.store))
    named = dataclasses.replace(model, init_words={"ink": "painting"})
    request = make_request(options, table, named, Store(options.store))
    assert request.second is not None
    assert (request.second.kind, request.second.init_word) == ("style", "painting")


def test_captions_bring_their_own_article():
    assert in_place_of_word("a * backpack", "a red mug.") == "a red mug backpack"
    assert in_place_of_word("a photo of a *", "the mug") == "a photo of the mug"
    assert in_place_of_word("a photo of a *", "red mug") == "a photo of a red mug"


def test_the_paper_variants_as_overrides(world: Options):
    model = read_model("tiny", world.models_file)
    rows = {row.name: row for row in read_table("figure10").rows}

    def said(name: str) -> dict:
        return overrides(training_options(model, rows[name]), "object")

    manager = "model.params.personalization_config.params"
    assert said("high_lr")["model.base_learning_rate"] == pytest.approx(2e-2)
    assert said("low_lr")["model.base_learning_rate"] == pytest.approx(1e-4)
    assert said("regularised")["model.params.embedding_reg_weight"] == 0.1
    assert "model.params.embedding_reg_weight" not in said("ours")
    assert said("per_image_tokens")[f"{manager}.per_image_tokens"]
    assert said("per_image_tokens")["data.params.train.params.per_image_tokens"]
    assert said("three_words")[f"{manager}.num_vectors_per_token"] == 3
    assert said("three_progressive")[f"{manager}.progressive_every"] == 2  # 40 % of 4 steps
    assert overrides(training_options(model, rows["ours"]), "style")["data.params.train.params.templates"] == "style"


def test_means_over_prompts():
    prompts = [
        {"image": 0.9, "text": 0.1, "diversity": 0.2, "dino_image": 0.5},
        {"image": 0.5, "text": 0.2, "diversity": 0.4, "dino_image": 0.3},
        {"image": 0.1, "text": 0.4, "diversity": 0.6, "dino_image": 0.1},
    ]
    first = summary(prompts, "reconstruction")
    assert first == pytest.approx({"image": 0.9, "text": 0.3, "diversity": 0.4, "dino_image": 0.5})
    assert summary(prompts, "all")["image"] == pytest.approx(0.5)
    assert summary(prompts[:1], "reconstruction")["text"] == pytest.approx(0.1)
    assert summary([{"nearest_max": 0.2}, {"nearest_max": 1.0}], "all")["nearest_max"] == 1.0


def test_missing_cells_are_said(world: Options):
    table = read_table(world.table)
    records = [{"row": "set", "concept": "cat", "seed": 0, "image": 0.5}]
    result = summarise(table, records, ["cat", "mug"], [0], {}, 12)
    assert "Not finished: 1 of 12" in to_markdown(result)
    assert "| one word | – | – | – | 0.700 |" in to_markdown(result)
    assert "0.500 & 0.800" in to_latex(result)
    assert r"captions \& co" in to_latex(result)
    assert "set,training set,,,,0.2,0.5,,,0.8" in to_csv(result)


def test_rows_of_fewer_cells_are_named(world: Options):
    table = read_table(world.table)
    records = [{"row": "set", "concept": c, "seed": 0, "image": 0.5} for c in ("cat", "mug")]
    records.append({"row": "ours", "concept": "cat", "seed": 0, "image": 0.9})
    command = {"Command": "python scripts/reproduce_tables.py --rows set ours"}
    page = to_markdown(summarise(table, records, ["cat", "mug"], [0], command, 12))
    assert (
        "The same command, without --rows, goes on. Of 2 cells that other rows have, there are so far: one word 1."
        in page
    )
    assert "there are so far" not in to_markdown(summarise(table, records[:2], ["cat", "mug"], [0], {}, 12))


def test_measures_of_a_concept_are_paired_over_its_seeds(world: Options):
    measure = Measure("gain", "image(ours) - image(bare)")
    table = dataclasses.replace(read_table(world.table), measures=(measure,), claims=())
    values = {("ours", 0): 0.5, ("ours", 1): 0.7, ("bare", 0): 0.1}
    records = [{"row": row, "concept": "cat", "seed": s, "image": v} for (row, s), v in values.items()]
    result = summarise(table, records, ["cat"], [0, 1], {}, 4)
    assert result.concepts[0]["gain"] == pytest.approx(0.4)
    assert result.concepts[0]["image(ours)"] == pytest.approx(0.6)


def test_real_pictures_are_not_their_own_nearest(result: TableResult):
    by_row = {record["row"]: record for record in result.cells if record["concept"] == "cat"}
    assert by_row["set"]["nearest"] <= by_row["set"]["nearest_max"] < 1 - 1e-6


@pytest.mark.parametrize("name", ["embedded", "ldm", "sd15"])
def test_the_quick_sweep_takes_states_that_are_kept(name: str):
    model = read_model(name)
    table = read_table("sweep_steps", name)
    steps = []
    for row in (row for row in table.rows if row.source == "word"):
        options = training_options(model, row, model.quick)
        steps.append(kept_step(model, row, model.quick))
        assert steps[-1] == options.steps or steps[-1] % options.save_every == 0
        assert kept_step(model, row) == row.at_step
    assert steps == sorted(set(steps))
    assert steps[-1] == training_options(model, table.rows[-1], model.quick).steps
    odd = dataclasses.replace(table.rows[-1], at_step=7)
    with pytest.raises(ConfigError, match="wants the word at step 7, but `save_every` keeps every"):
        kept_step(model, odd)


def test_dreambooths_bare_prompts_have_the_class(world: Options):
    row = read_table("dreambooth").row("prompt_only")
    (concept,) = read_concepts(world.concepts, ["cat"])
    prompts = Prompts("a *", ("a * in the jungle",))
    assert wordings(row, concept, prompts) == (("a sculpture",), ("a sculpture in the jungle",))


def test_more_pictures_than_letters_leave_out_per_image_tokens(tmp_path: Path):
    write_concept(tmp_path / "cat", 0, pictures=23, init_word="sculpture")
    (concept,) = read_concepts(tmp_path)
    row = read_table("figure10").row("per_image_tokens")
    assert "more than 22 pictures" in lacks(row, concept, read_model("ldm"))
    assert lacks(row, concept, read_model("embedded")) is None  # it takes five of them


def test_a_scale_is_for_display_and_claims_alike(world: Options):
    table = dataclasses.replace(read_table(world.table), scale={"text": 2.5}, claims=(Claim("", "text(set) > 0.6"),))
    records = [{"row": "set", "concept": c, "seed": 0, "text": 0.25 + 0.001 * k} for k, c in enumerate("abcdef")]
    result = summarise(table, records, list("abcdef"), [0], {}, 6)
    assert result.intervals["text", "set"].mean == pytest.approx(2.5 * 0.2525)
    assert result.findings[0].verdict == HOLDS
    assert "times 2.5" in to_markdown(result)


# -- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": {}}, "no rows"),
        ({"rows": {"ours": {"lable": "x"}}}, "did you mean 'label'"),
        ({"rows": {"ours": {"source": "words"}}}, "source 'words'"),
        ({"rows": {"ours": {"source": "captions"}}}, "goes with"),
        ({"rows": {"ours": {"training": {"step": 3}}}}, "did you mean 'steps'"),
        ({"rows": {"ours": {"second": True}}}, "no `second` concept"),
        ({"claims": [{"says": "", "holds_if": "image(our) > 0"}]}, "did you mean 'ours'"),
        ({"kind": "inversions"}, "none of inversion"),
        ({"image_over": "some"}, "image_over 'some'"),
        ({"measures": [{"says": "x", "value": "image(our) - 1"}]}, "did you mean 'ours'"),
        ({"measures": [{"says": "x", "value": "image(ours"}]}, "no sum of"),
        ({"titel": ""}, "did you mean 'title'"),
        ({"claims": [{"says": "", "holds_if": "imge(ours) > 0"}]}, "no metric 'imge'.*did you mean 'image'"),
        ({"claims": [{"says": "", "holds_if": 5}]}, "no inequality"),
        ({"claims": [{"says": "", "holds_if": "1 / 0 > image(ours)"}]}, "cannot be computed"),
        ({"claims": [{"says": "", "holds_if": "-" * 5000 + "image(ours) > 0"}]}, "no inequality"),
        ({"claims": "image(ours) > 0"}, "claims should be a list"),
        ({"measures": [{"says": "x", "value": 0.5}]}, "no sum of"),
        ({"columns": "image"}, "columns should be a list of texts"),
        ({"columns": ["clip_image", "images"]}, "no metric 'images'"),
        ({"rows": ["ours"]}, "rows: expected keys and values"),
        ({"for_model": ["x"]}, "for_model: expected keys and values"),
        ({"rows": {"ours": {"prompts": {"editing": "* on the moon"}}}}, "should be a list of texts"),
        ({"rows": {"ours": {"sampling": {"sampler": "dmp"}}}}, "no sampler 'dmp'.*did you mean 'dpm'"),
        ({"rows": {"ours": {"published": {"text": "high"}}}}, "published text is no number"),
    ],
)
def test_mistakes_in_a_table_are_named(change: dict, message: str, tmp_path: Path):
    (tmp_path / "t.yaml").write_text(yaml.safe_dump({**TABLE, "claims": [], **change}))
    with pytest.raises(ConfigError, match=message):
        read_table(str(tmp_path / "t.yaml"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": ["text", "owm_image"]}, "no judge of tiny measures 'owm_image'"),
        ({"claims": [{"says": "", "holds_if": "clip_image(ours) > 0"}]}, "measures 'clip_image'"),
        ({"rows": {"ours": {"prompts": {"editing": ["{} on the moon"]}}}}, r"the prompt '{} on the moon' has no \*"),
    ],
)
def test_mistakes_in_a_table_for_a_model_are_named(change: dict, message: str, world: Options, tmp_path: Path):
    (tmp_path / "t.yaml").write_text(yaml.safe_dump({**TABLE, "claims": [], **change}))
    with pytest.raises(ValueError, match=message):
        reproduce(dataclasses.replace(world, table=str(tmp_path / "t.yaml"), out=str(tmp_path / "out")), refuse)


def test_mistakes_on_the_command_line(world: Options, tmp_path: Path):
    with pytest.raises(ValueError, match="did you mean 'figure10'"):
        read_table("figure_10")
    with pytest.raises(ValueError, match="there is no model 'tini'.*did you mean 'tiny'"):
        read_model("tini", world.models_file)
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        reproduce(dataclasses.replace(world, concepts="nowhere"), refuse)
    with pytest.raises(ValueError, match="has no judge 'clip'"):
        reproduce(dataclasses.replace(world, weights={"clip": "x"}), refuse)
    write_concept(tmp_path / "thing", 0)
    with pytest.raises(ValueError, match="names no word to start from"):
        reproduce(dataclasses.replace(world, concepts=str(tmp_path)), refuse)
    command = load("reproduce_tables")
    with pytest.raises(ValueError, match="say which table"):
        command.parse_args([])
    with pytest.raises(ValueError, match="write ALIAS=FILE"):
        command.parse_args(["--table", "figure10", "--scorer_weights", "ViT.pt"])
    with pytest.raises(ValueError, match="write i/n"):
        command.main(["--table", "figure10", "--shard", "3"])


# -- what comes along ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", table_names())
def test_shipped_tables_are_sound(name: str):
    for model in ("embedded", "ldm", "sd15"):
        table = read_table(name, model)
        assert table.title
        assert table.source
        for row in table.rows:
            assert row.label != row.name or len(row.name) < 12
            assert set(row.published) <= {*table.columns, *table.extra}, row.name
    assert re.match(r"# \w", config_path(f"evaluation/{name}.yaml").read_text())


def test_every_shipped_table_is_documented():
    document = (ROOT / "docs" / "evaluation.md").read_text()
    assert not [name for name in table_names() if f"`{name}`" not in document]


@pytest.mark.parametrize("name", ["embedded", "ldm", "sd15"])
def test_shipped_models_are_sound(name: str):
    model = read_model(name)
    assert model.config_file.is_file()
    assert training_options(model, None).steps >= 100
    for prompts in model.prompts.values():
        assert all("*" in prompt for prompt in (prompts["reconstruction"], *prompts["editing"]))


def test_published_orderings_hold_for_the_published_figures():
    table = read_table("figure10")
    published = {(metric, row.name): value for row in table.rows for metric, value in row.published.items()}
    for claim in table.claims:
        assert claim.difference(lambda metric, row: published[metric, row]) > 0, claim.says


def test_cells_depend_on_the_judge_but_trainings_do_not(world: Options, tmp_path: Path):
    judge = tmp_path / "judge"
    shutil.copytree(world.weights["own"], judge)
    (judge / "model.safetensors").write_bytes((judge / "model.safetensors").read_bytes() + b" ")
    table, model = read_table(world.table), read_model("tiny", world.models_file)
    concepts = tuple(read_concepts(world.concepts))
    cells = [
        Planner(Request(table, model, concepts, (0,), weights={"own": str(folder)})).cells()[3]
        for folder in (world.weights["own"], judge)
    ]
    assert cells[0].trainings[0].unit.key == cells[1].trainings[0].unit.key
    assert cells[0].drawing.unit.key == cells[1].drawing.unit.key
    assert cells[0].scoring.unit.key != cells[1].scoring.unit.key


def test_the_order_of_judges_counts(world: Options):
    """The first one's metrics are those without a prefix."""
    table, model = read_table(world.table), read_model("tiny", world.models_file)
    concepts = tuple(read_concepts(world.concepts))
    weights = {"a": world.weights["own"], "b": world.weights["own"]}
    keys = set()
    for order in ("ab", "ba"):
        both = dataclasses.replace(model, judges=dict.fromkeys(order, "emoji64"))
        request = Request(table, both, concepts, (0,), weights=weights)
        keys.add(Planner(request).cells()[0].scoring.unit.key)
    assert len(keys) == 2


def test_what_rows_change_is_said(world: Options):
    facts = describe(make_request(world, read_table(world.table), read_model("tiny", world.models_file), Store("x")))
    assert facts["Row 'one word, early'"] == "save_every 2"
    assert "Row 'one word'" not in facts
    sampled = read_table("custom_diffusion")
    row = what_is_its_own(sampled.row("textual_inversion"), read_model("sd15"), None)
    assert "learning_rate 0.005" in row
    assert "eta 1.0, scale 6.0" in row


def test_bars_in_texts_do_not_part_a_table(world: Options):
    table = dataclasses.replace(read_table(world.table), labels={"text": "text | other"})
    records = [{"row": row.name, "concept": "cat", "seed": 0, "text": 0.5} for row in table.rows]
    lines = markdown_rows(summarise(table, records, ["cat"], [0], {}, 6))
    assert "text \\| other" in lines[0]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
