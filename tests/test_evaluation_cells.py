"""Units of work on disk, sharing among machines, progress; concepts and their files."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path

import pytest

from evaluation.cells import Progress, Store, Unit, digest, duration, fingerprint, parse_shard, remaining_time, shard
from evaluation.concepts import Concept, check_concepts, read_concept, read_concepts
from evaluation.emoji_concepts import SIZE, concept_sets, read_sprites, write_concepts
from evaluation.experiments import read_yaml
from evaluation.image_dirs import load_images
from ldm.util import ConfigError
from tests.conftest import DATA
from tests.tiny_evaluation import CAPTIONS, write_concept

ROOT = DATA.parents[1]


def test_a_units_key_is_its_settings(tmp_path: Path):
    one, same = Unit("draw", {"a": 1, "b": [1.5, "x"]}), Unit("draw", {"b": [1.5, "x"], "a": 1})
    other = Unit("draw", {"a": 2, "b": [1.5, "x"]})
    assert one.key == same.key
    assert one.key != other.key
    assert digest({"a": 1}) != digest({"a": 1.0})
    with pytest.raises(ValueError, match="JSON"):
        digest({"a": float("nan")})
    store = Store(tmp_path)
    assert store.folder(one) == tmp_path / "draw" / one.key


def test_only_finished_units_count(tmp_path: Path):
    store, unit = Store(tmp_path), Unit("score", {"a": 1})
    assert store.result(unit) is None
    folder = store.begin(unit)
    assert json.loads((folder / "settings.json").read_text()) == {"a": 1}
    assert not store.is_done(unit)
    store.finish(unit, {"value": 2.5})
    assert store.result(unit) == {"value": 2.5}
    (folder / "result.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        store.result(unit)


def test_nothing_is_done_twice_and_interruptions_cost_one_unit(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    store = Store(tmp_path)
    units = [Unit("draw", {"number": n}) for n in range(5)]
    done: list[int] = []
    times = iter(range(0, 10_000, 20))

    def work(unit: Unit, folder: Path) -> dict[str, int]:
        if len(done) == 2:
            raise KeyboardInterrupt
        assert folder == store.folder(unit)
        done.append(unit.settings["number"])
        return {"number": unit.settings["number"]}

    progress = Progress(store, clock=lambda: next(times))
    with pytest.raises(KeyboardInterrupt):
        progress.run("Drawings", [*units, units[0]], work)
    done.append(-1)  # so that the third unit no longer stops
    with caplog.at_level(logging.INFO):
        progress.run("Drawings", units, work)
    assert done == [0, 1, -1, 2, 3, 4]
    assert store.result(units[4]) == {"number": 4, "seconds": 20}
    assert "Drawings: 3 of 5 done, the last (draw) in 20.0 s, about 40 s left" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        progress.run("Drawings", units, work)
    assert "all 5 are there" in caplog.text


def test_the_remaining_time_knows_kinds_of_work():
    taken = {"train": [100.0, 120.0], "draw": [40.0]}
    assert remaining_time(taken, ["train", "draw", "draw"]) == 110 + 40 + 40
    assert remaining_time(taken, ["score"]) == 0


def test_two_processes_do_not_work_on_one_unit(tmp_path: Path):
    pytest.importorskip("fcntl")
    store, unit = Store(tmp_path), Unit("train", {"a": 1})
    worked: list[str] = []

    def work(unit: Unit, folder: Path) -> dict[str, str]:
        worked.append(str(folder))
        return {}

    other = threading.Thread(target=lambda: Progress(store).run("Trainings", [unit], work))
    with store.lock(unit):
        other.start()
        other.join(0.2)
        assert other.is_alive()  # it waits
        assert not worked
        store.finish(unit, {"done": "here"})
    other.join(10)
    assert not worked  # and finds it done
    assert store.result(unit) == {"done": "here"}


def test_shards_part_the_work_and_keep_groups_together():
    items = [f"{group}{number}" for number in range(3) for group in "abcdefg"]
    parts = [shard(items, lambda item: item[0], (index, 3)) for index in (1, 2, 3)]
    assert sorted(sum(parts, [])) == sorted(items)
    groups = [{item[0] for item in part} for part in parts]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 7
    assert max(map(len, parts)) - min(map(len, parts)) <= 3
    heavy = [shard("abcdefgh", str, (index, 2), weight="bdfh".count) for index in (1, 2)]
    assert [sum(map("bdfh".count, part)) for part in heavy] == [2, 2]
    assert parse_shard("2/4") == (2, 4)
    for text in ("0/4", "5/4", "x", "1/", "-1/2"):
        with pytest.raises(ValueError, match="write i/n"):
            parse_shard(text)


def test_fingerprints_see_content(tmp_path: Path):
    small = tmp_path / "small"
    small.write_bytes(b"abc")
    first = fingerprint(small)
    small.write_bytes(b"abd")
    assert fingerprint(small) != first
    large = tmp_path / "large"
    large.write_bytes(bytes(20 * 2**20))
    before = fingerprint(large)
    with large.open("r+b") as file:
        file.seek(10 * 2**20)
        file.write(b"x")
    assert fingerprint(large) != before


def test_durations_read_well():
    assert [duration(s) for s in (12.3, 89, 100, 3600, 7200, 36_061)] == [
        "12 s", "89 s", "2 min", "60 min", "2 h 0 min", "10 h 2 min",
    ]  # fmt: skip


# -- concepts ------------------------------------------------------------------------------------------------------


def test_a_concept_is_a_folder(tmp_path: Path):
    folder = write_concept(tmp_path / "red_mug", 0, init_word="mug", captions=CAPTIONS, name="mug")
    concept = read_concept(folder, {"init_word": "cup"})
    assert (concept.label, concept.init_word, concept.kind) == ("red_mug", "mug", "object")
    assert [path.name for path in concept.pictures] == ["0.png", "1.png", "2.png"]
    assert concept.content(2) != concept.content(3)
    (folder / "prompts.txt").write_text("a {} on the beach\n\n* in the snow\n")
    assert read_concept(folder).prompts == ("a * on the beach", "* in the snow")
    plain = write_concept(tmp_path / "plain", 1)
    assert read_concept(plain, {"init_word": "cup"}).init_word == "cup"
    assert [c.init_word for c in read_concepts(tmp_path, init_words={"plain": "vase"})] == ["vase", "mug"]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"init_wort": "mug"}, "did you mean 'init_word'"),
        ({"kind": "thing"}, "neither object nor style"),
        ({"prompts": ["on the beach"]}, r"has no \*"),
        ({"prompts": ["a *"], "texts": ["a", "b"]}, "2 texts for 1 prompts"),
        ({"init_word": 7}, "init_word should be a word in quotes to start from, not 7"),
        ({"init_word": True}, "init_word should be a word"),  # YAML reads a bare `on` as true
    ],
)
def test_mistakes_in_a_concept_are_named(said: dict[str, object], message: str, tmp_path: Path):
    folder = write_concept(tmp_path / "mug", 0, **said)
    with pytest.raises(ConfigError, match=message):
        read_concept(folder)


def test_a_concept_is_called_as_its_folder_is_named(tmp_path: Path):
    data = tmp_path / "data"
    for name in ("cat", "dog"):
        write_concept(data / name / "images", 0, init_word="animal")
        (tmp_path / "linked").mkdir(exist_ok=True)
        (tmp_path / "linked" / name).symlink_to(data / name / "images")
    assert [concept.label for concept in read_concepts(tmp_path / "linked")] == ["cat", "dog"]


def test_hidden_files_make_no_concept(tmp_path: Path):
    write_concept(tmp_path / "cat", 0)
    (tmp_path / "._cat.png").write_bytes(b"of another system")
    assert [concept.label for concept in read_concepts(tmp_path)] == ["cat"]


def test_prompts_in_another_encoding_are_named(tmp_path: Path):
    folder = write_concept(tmp_path / "cat", 0)
    (folder / "prompts.txt").write_bytes("a * in a café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"prompts\.txt is not in UTF-8"):
        read_concept(folder)


def test_concepts_need_different_names():
    with pytest.raises(ValueError, match="no concept"):
        check_concepts([])
    with pytest.raises(ValueError, match="'a'"):
        check_concepts([Concept("a", ()), Concept("b", ()), Concept("a", ())])


def test_the_embedded_worlds_concepts(tmp_path: Path):
    held_out = read_yaml(ROOT / "scripts" / "data" / "held_out.json")
    sets = concept_sets()
    assert sets["development"] == held_out["objects_for_development"]
    assert sets["final"] == held_out["objects_for_final_figures"]
    ball, style = write_concepts(["soccer ball", "openmoji"], tmp_path, pictures=4)
    assert (ball.label, ball.name, ball.init_word, style.kind) == ("soccer_ball", "soccer ball", "ball", "style")
    pictures = load_images(ball.pictures)
    assert pictures.shape == (4, 3, SIZE, SIZE)
    assert not any(bool((pictures[0] == pictures[k]).all()) for k in (1, 2, 3))
    again = write_concepts(["soccer ball"], tmp_path / "again", pictures=4)
    assert again[0].content() == ball.content()
    with pytest.raises(ValueError, match="did you mean 'penguin'"):
        write_concepts(["pinguin"], tmp_path)


def test_every_concept_has_drawings_and_captions_of_the_papers_lengths():
    sprites = read_sprites()
    described = read_yaml(ROOT / "evaluation" / "emoji" / "concepts.yaml")
    listed = [name for names in described["sets"].values() for name in names]
    assert set(listed) == set(described["concepts"])
    for name, values in described["concepts"].items():
        assert sprites.where(style=values["style"]) if "style" in values else sprites.where(name), name
        for kind, limit in (("short", 12), ("long", 30)):
            for caption in values["captions"][kind]:
                assert len(caption.split()) <= limit, caption
