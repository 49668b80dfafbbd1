"""What tables keep, notice and survive: narrower commands, lost and changed files, cells that fail, moved stores."""

from __future__ import annotations

import csv
import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import yaml

import main
from evaluation.cells import Progress, Store, Unit
from evaluation.concepts import read_concept
from evaluation.experiments import read_model, read_table
from evaluation.kept import read_lines
from evaluation.plan import Planner
from evaluation.reproduce import Options, make_request, reproduce, write_result
from evaluation.results import summarise
from evaluation.tables import cells_csv
from evaluation.training_runs import device_flags
from ldm.util import ConfigError
from tests.tiny_evaluation import write_concept, write_concepts, write_judge, write_models_file

TABLE = {
    "title": "A small table",
    "source": "nobody",
    "columns": ["text", "image"],
    "rows": {"set": {"source": "training_pictures"}, "bare": {"source": "no_word"}, "ours": {}},
}


def write_table(path: Path, **rows: dict) -> str:
    path.write_text(yaml.safe_dump(TABLE | {"rows": TABLE["rows"] | rows}))
    return str(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Options:
    """Options of a small table with two concepts and two seeds, done."""
    root = tmp_path_factory.mktemp("world")
    options = Options(
        table=write_table(root / "small.yaml"), model="tiny",
        models_file=str(write_models_file(root, seeds=[0, 1])), concepts=str(write_concepts(root / "concepts")),
        weights={"own": str(write_judge(root / "judge"))}, store=str(root / "store"), out=str(root / "results"),
        device="cpu",
    )  # fmt: skip
    assert reproduce(options, main.main).done == 12
    return options


@pytest.fixture
def moved(world: Options, tmp_path: Path) -> Options:
    """The table's folder without its store."""
    shutil.copytree(world.out_folder, tmp_path / "results")
    return dataclasses.replace(world, store=str(tmp_path / "store"), out=str(tmp_path / "results"))


def refuse(words: list[str]) -> None:
    raise AssertionError(f"trained: {words}")


# -- scores that are kept ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "narrower", [{"names": ["cat"]}, {"seeds": [1]}, {"quick": True}, {"pictures": 3}], ids=lambda value: str(value)
)
def test_a_narrower_command_loses_no_score(narrower: dict, moved: Options, tmp_path: Path):
    report = dataclasses.replace(moved, report_only=True)
    before = {line["key"]: line["image"] for line in read_lines(moved.out_folder)}
    assert reproduce(dataclasses.replace(report, **narrower), refuse).done < 12
    assert {line["key"]: line["image"] for line in read_lines(moved.out_folder)} == before
    whole = dataclasses.replace(report, store=str(tmp_path / "another"))
    assert reproduce(whole, refuse).done == 12
    assert not (moved.out_folder / "kept.csv").exists()


def test_two_stores_write_one_table(world: Options, tmp_path: Path):
    """What one machine has written while another was computing is in the other's table, too."""
    out = tmp_path / "results"
    shutil.copytree(world.out_folder, out)
    lines = (out / "cells.csv").read_text().splitlines(keepends=True)
    (out / "cells.csv").unlink()

    def train(words: list[str]) -> None:
        (out / "cells.csv").write_text("".join(line for line in lines if line.startswith(("row", "set", "bare"))))
        main.main(words)

    options = dataclasses.replace(world, store=str(tmp_path / "store"), out=str(out), rows=["ours"], names=["cat"])
    assert reproduce(options, train).done == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-7], "ends within a line"),
        (lambda text: text.replace("image", "=HYPERLINK(1)"), "is no metric"),
        (lambda text: text.replace("bare,cat,0,", "bare,cat,0,0.5,"), "more or fewer columns"),
        (lambda text: re.sub(r"bare,cat,0,[^,]+,", "bare,cat,0,inf,", text), "image is inf"),
    ],
)
def test_damage_is_named(change, message: str, moved: Options):
    path = moved.out_folder / "cells.csv"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=rf"cells\.csv is no table of cells .*{message}"):
        reproduce(dataclasses.replace(moved, report_only=True), refuse)


def test_a_line_without_scores_is_computed_again(moved: Options):
    path = moved.out_folder / "cells.csv"
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    told = ("row", "concept", "seed", "key")
    path.write_text(cells_csv([{k: v if k in told else "" for k, v in line.items()} for line in lines]))
    rows = dataclasses.replace(moved, rows=["set"])
    assert reproduce(rows, refuse).done == 4


def test_the_hash_is_the_last_column_and_formulas_are_text():
    text = cells_csv([{"row": "a", "key": "k", "image": -0.5}, {"row": "=1+1", "image_distinct": 1.0}])
    assert text.splitlines() == ["row,image,image_distinct,key", "a,-0.5,,k", "'=1+1,,1,"]


def test_pictures_to_export_are_drawn_for_one_seed(moved: Options, tmp_path: Path):
    reproduce(dataclasses.replace(moved, rows=["bare"], export=str(tmp_path / "pictures")), refuse)
    assert len(list((tmp_path / "store" / "draw").glob("*/result.json"))) == 1  # both concepts have the same prompts


def test_pictures_that_cannot_be_exported_are_counted(moved: Options, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    reproduce(dataclasses.replace(moved, report_only=True, export=str(tmp_path / "pictures")), refuse)
    assert "the pictures of 4 of 4 cells are not there" in caplog.text


# -- settings that count -------------------------------------------------------------------------------------------


def keys_of(options: Options) -> list[str]:
    model = read_model(options.model, options.models_file)
    request = make_request(options, read_table(options.table), model, Store(options.store))
    return [job.unit.key for cell in Planner(request).cells() for job in cell.trainings]


def test_sentences_in_a_file_count_by_their_content(world: Options, tmp_path: Path):
    (tmp_path / "sentences.txt").write_text("a photo of {}\n")
    table = write_table(tmp_path / "t.yaml", ours={"training": {"templates": str(tmp_path / "sentences.txt")}})
    options = dataclasses.replace(world, table=table)
    before = keys_of(options)
    assert before == keys_of(options)
    (tmp_path / "sentences.txt").write_text("a drawing of {}\n")
    assert not set(before) & set(keys_of(options))


def test_pictures_that_change_meanwhile_are_noticed(world: Options, tmp_path: Path):
    concepts = write_concepts(tmp_path / "concepts")
    options = dataclasses.replace(
        world, concepts=str(concepts), store=str(tmp_path / "store"), out=str(tmp_path / "out"), seeds=[0]
    )

    def train(words: list[str]) -> None:
        shutil.copy(concepts / "mug" / "1.png", concepts / "mug" / "0.png")
        main.main(words)

    with pytest.raises(ValueError, match="1 of the table's cells failed.*pictures of 'mug' have changed"):
        reproduce(options, train)
    assert reproduce(dataclasses.replace(options, names=["cat"], report_only=True), refuse).done == 3


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"captions": {"short": "a red thing"}}, "captions: short should be a list of texts"),
        ({"captions": ["a red thing"]}, r"captions should be like \{short"),
        ({"captions": {"short": [5]}}, "should be a list of texts"),
        ({"prompts": "* on the beach"}, "prompts should be a list of texts"),
        ({"init_word": " "}, "init_word should be a word in quotes"),
    ],
)
def test_mistakes_in_a_concept_are_named(said: dict, message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        read_concept(write_concept(tmp_path / "cat", 0, **said))


def test_a_concept_is_called_as_its_folder_whatever_it_was_reached_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(write_concept(tmp_path / "cat", 0))
    assert read_concept(".").label == "cat"


def test_seeds_and_names_as_the_user_says(world: Options):
    model = read_model("tiny", world.models_file)
    options = dataclasses.replace(world, seeds=[1, 1], quick=True, names=["cat", "mug"], pictures=5)
    request = make_request(options, read_table(world.table), model, Store(world.store))
    assert request.seeds == (1,)
    assert len(request.concepts) == 2
    assert request.pictures == 5


# -- what goes wrong -----------------------------------------------------------------------------------------------


def test_a_word_that_fails_leaves_the_others(world: Options, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    options = dataclasses.replace(world, store=str(tmp_path / "store"), out=str(tmp_path / "out"), seeds=[0])
    calls: list[int] = []

    def train(words: list[str]) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("the word's vectors are not finite")
        main.main(words)

    with pytest.raises(ValueError, match="1 of the table's cells failed, the first: the word's vectors"):
        reproduce(options, train)
    assert "failed, and what needs it is left out" in caplog.text
    assert len(read_lines(tmp_path / "out")) == 5  # of six
    assert reproduce(options, main.main).done == 6


def test_what_fails_for_every_unit_stops(tmp_path: Path):
    done: list[str] = []

    def fail(unit: Unit, folder: Path) -> dict:
        done.append(unit.key)
        raise ValueError("no memory card")

    with pytest.raises(ValueError, match="no memory card"):
        Progress(Store(tmp_path)).run("Units", [Unit("train", {"n": n}) for n in range(9)], fail)
    assert len(done) == 3


def test_a_concept_that_fails_does_not_keep_the_others_from_being_done(tmp_path: Path):
    units = [Unit("train", {"concept": concept, "n": n}) for concept in "abc" for n in range(5)]
    tried: list[str] = []

    def run(bad: str) -> list[str]:
        progress = Progress(Store(tmp_path / bad))

        def work(unit: Unit, folder: Path) -> dict:
            tried.append(unit.settings["concept"])
            if unit.settings["concept"] in bad:
                raise ValueError(f"no word for {unit.settings['concept']}")
            return {}

        tried.clear()
        progress.run("Units", units, work, group=lambda unit: unit.settings["concept"])
        return list(progress.failures)

    assert len(run("a")) == 5
    assert len(run("ab")) == 10
    with pytest.raises(ValueError, match="no word for c"):
        run("abc")
    assert tried == ["a"] * 5 + ["b"] * 5 + ["c"]


def test_a_run_that_is_given_up_still_writes_its_table(world: Options, tmp_path: Path):
    options = dataclasses.replace(world, store=str(tmp_path / "store"), out=str(tmp_path / "out"), seeds=[0, 1, 2])

    def train(words: list[str]) -> None:
        raise ValueError("the word's vectors are not finite")

    with pytest.raises(ValueError, match="of the table's cells failed, the first: the word's vectors"):
        reproduce(options, train)
    assert (tmp_path / "out" / "table.md").is_file()


def test_folders_that_could_not_be_used_are_named_before_the_work(world: Options, tmp_path: Path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "holiday.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    options = dataclasses.replace(world, store=str(tmp_path / "store"), out=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="holds 'holiday.txt'"):
        reproduce(dataclasses.replace(options, export=str(tmp_path / "export")), refuse)
    with pytest.raises(OSError, match="file"):
        reproduce(dataclasses.replace(options, out=str(tmp_path / "file" / "out")), refuse)
    with pytest.raises(FileNotFoundError, match="--ratings"):
        reproduce(dataclasses.replace(options, ratings=str(tmp_path / "nothing")), refuse)
    assert not list((tmp_path / "store").glob("*/*/result.json"))


def test_deleted_pictures_and_words_are_made_again_where_they_are_needed(world: Options, tmp_path: Path):
    store = Path(shutil.copytree(world.store, tmp_path / "store"))
    for path in [*store.rglob("*.png"), *store.rglob("embeddings_gs-*.pt")]:
        path.unlink()
    options = dataclasses.replace(world, store=str(store), out=str(tmp_path / "out"))
    assert reproduce(options, refuse).done == 12  # the scores are there
    for result in store.glob("score/*/result.json"):
        result.unlink()
    assert reproduce(options, main.main).done == 12


def test_an_interrupted_training_goes_on_in_another_place(world: Options, tmp_path: Path):
    options = dataclasses.replace(
        world, store=str(tmp_path / "here"), out=str(tmp_path / "out"), names=["cat"], seeds=[0]
    )

    def stop_midway(words: list[str]) -> None:
        send = {"target": "tests.tiny_run.SignalAt", "params": {"step": 1, "name": "SIGINT"}}
        main.main([*words, f"+lightning.callbacks.send={send}"])

    with pytest.raises(KeyboardInterrupt):
        reproduce(options, stop_midway)
    shutil.move(tmp_path / "here", tmp_path / "there")
    calls: list[list[str]] = []

    def train(words: list[str]) -> None:
        calls.append(words)
        main.main(words)

    assert reproduce(dataclasses.replace(options, store=str(tmp_path / "there")), train).done == 3
    assert [call[0] for call in calls] == ["-r"]
    assert "--gpus" in calls[0]


def test_devices_are_said_in_one_flag_so_that_a_new_one_wins():
    found = [device_flags(name) for name in ("auto", "cpu", "mps", "cuda", "cuda:1")]
    assert found == [["--gpus", word] for word in ("auto", "cpu", "mps", "0,", "1,")]


def test_the_table_is_written_though_its_figure_cannot_be(world: Options, tmp_path: Path):
    plot = {"x": "at", "y": ["image"], "scale": "log"}
    table = dataclasses.replace(read_table(world.table), plot=plot)
    nothing = summarise(table, [{"row": "set", "concept": "cat", "seed": 0, "image": 0.5}], ["cat"], [0], {}, 3)
    assert (tmp_path / "a" / "figure.png") in write_result(nothing, tmp_path / "a")
    labels = dataclasses.replace(table, plot={"x": "text", "y": "image"}, labels={"image": r"$\frac$"})
    record = {"row": "set", "concept": "cat", "seed": 0, "image": 0.5, "text": 0.1}
    assert (tmp_path / "b" / "figure.png") in write_result(
        summarise(labels, [record], ["cat"], [0], {}, 3), tmp_path / "b"
    )


@pytest.mark.parametrize("content", ["[]", '{"metrics": 5}', "\xff"])
def test_a_damaged_result_is_named(content: str, tmp_path: Path):
    store, unit = Store(tmp_path), Unit("score", {})
    store.begin(unit)
    (store.folder(unit) / "result.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"result\.json is damaged .*delete it"):
        store.result(unit)


def test_flags_that_a_table_of_models_does_not_take_are_refused(world: Options):
    for change in ({"names": ["cat"]}, {"seeds": [1]}, {"pictures": 3}, {"export": "there"}):
        with pytest.raises(ValueError, match="is for tables of learned words"):
            reproduce(dataclasses.replace(world, table="ldm_coco", concepts=None, data=".", **change), refuse)
