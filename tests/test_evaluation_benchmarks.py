"""DreamBooth's and DreamBench++'s protocols on two subjects, with a ViT-B/32 of random weights."""

from __future__ import annotations

import functools
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import timm
import torch
from PIL import Image

import main
from evaluation import plan, workshop
from evaluation.clip_eval import CLIPEvaluator
from evaluation.concepts import WORD
from evaluation.dino import DINOEncoder, bare_dino
from evaluation.dreambench_plus import export_samples, label_of, read_dreambench_plus, read_samples, with_word
from evaluation.experiments import read_table, read_yaml
from evaluation.reproduce import Options, reproduce
from ldm.resources import config_path
from tests.tiny_evaluation import write_concept, write_models_file
from tests.tiny_run import write_config

PROMPTS = [f"a kitten in place {k}" for k in range(9)]


@pytest.fixture
def judges(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """ViT-B/32 and a shallow DINO with random weights in the place of files."""
    file = tmp_path / "weights"
    file.write_bytes(b"random")

    @functools.cache
    def load_random(name: str, weights: object, device: torch.device, antialias: bool) -> object:
        del weights, device
        torch.manual_seed(0)
        if name.startswith("dino"):
            monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, depth=1))
            return DINOEncoder(name, model=bare_dino("dino-vits16"))
        model = open_clip.create_model("ViT-B-32-quickgelu", load_weights=False)
        return CLIPEvaluator(clip_model=name, model=model, antialias=antialias)

    monkeypatch.setattr(workshop, "load_judge", load_random)
    monkeypatch.setattr(plan, "judge_file", lambda name, weights: file)


def shortened(name: str, folder: Path, prompts: int | None = None) -> Path:
    """A table that comes along, with one training step, two sampling steps and perhaps fewer prompts."""
    table = read_yaml(config_path(f"evaluation/{name}.yaml"))
    groups = table["options"].get("prompts_by_kind", {})
    table["options"]["prompts_by_kind"] = {group: texts[:prompts]
                                           for group, texts in groups.items()}  # fmt: skip
    for row in table["rows"].values():
        if "training" in row:
            row["training"]["steps"] = 1
        if "sampling" in row:
            row["sampling"]["steps"] = 2
    return write_config(folder / f"{name}.yaml", table)


def options_for(table: str, root: Path, concepts: Path, prompts: int | None = None, **more: object) -> Options:
    models = write_models_file(root, training={"steps": 1, "batch_size": 1}, seeds=[0])
    return Options(
        table=str(shortened(table, root, prompts)), model="tiny", models_file=str(models), concepts=str(concepts),
        store=str(root / "store"), out=str(root / "out"), device="cpu", **more,
    )  # fmt: skip


def learn_sculpture(words: list[str]) -> None:
    """main.py's command; the tiny model knows few words, so every word starts from one of these."""
    if "--init_word" in words:
        words[words.index("--init_word") + 1] = "sculpture"
    main.main([*words, "data.params.train.params.templates=['a photo of {}']"])


# -- DreamBooth ----------------------------------------------------------------------------------------------------


def check_dreambooth(root: Path, prompts: int, pictures: int | None) -> set[str]:
    """Run the table on a live subject and an object; returns the texts that pictures were compared with."""
    for seed, subject in enumerate(("dog2", "vase")):
        write_concept(root / "dataset" / subject, seed)
    reproduce(options_for("dreambooth", root, root / "dataset", prompts, pictures=pictures), learn_sculpture)
    record = json.loads((root / "out" / "table.json").read_text())
    assert record["done"] == record["total"] == 6
    ours, real = record["rows"]["textual_inversion"]["ours"], record["rows"]["real"]["ours"]
    for metric in ("dino_image", "image", "text_mean"):
        assert -1 <= ours[metric]["mean"] <= 1
    assert real["image"]["mean"] < 1  # a picture is not compared with itself
    assert record["rows"]["dreambooth_sd"]["published"]["dino_image"] == 0.668
    assert len(record["claims"]) == 3
    drawn = list((root / "store" / "draw").rglob("*.png"))
    assert len(drawn) == 2 * 2 * (prompts + 1) * (pictures or 4)  # subjects x rows, one prompt for reconstruction
    texts = [json.loads(p.read_text())["texts"] for p in (root / "store" / "score").glob("*/settings.json")]
    return {text for group in texts for text in group}


@pytest.mark.usefixtures("judges")
def test_dreambooth_on_two_subjects(tmp_path: Path):
    said = check_dreambooth(tmp_path, prompts=3, pictures=1)
    assert {"a dog in the jungle", "a vase in the snow", "a vase"} <= said


@pytest.mark.slow
@pytest.mark.usefixtures("judges")
def test_dreambooth_in_full_on_two_subjects(tmp_path: Path):
    said = check_dreambooth(tmp_path, prompts=25, pictures=None)
    assert {"a dog wearing a santa hat", "a vase floating in an ocean of milk"} <= said


def test_dreambooths_prompts_are_25_for_each_group():
    prompts = read_table("dreambooth").options["prompts_by_kind"]
    assert {group: len(texts) for group, texts in prompts.items()} == {"other": 25, "live": 25}
    assert all(WORD in text for texts in prompts.values() for text in texts)
    assert len(read_table("dreambooth").options["init_words"]) == 30


# -- DreamBench++ --------------------------------------------------------------------------------------------------


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    """Two of the 150 pictures, in the benchmark's layout."""
    folder = tmp_path / "data"
    for place, subject, prompts in (
        ("live_subject/animal", "Kitten", PROMPTS),
        ("style", "ink painting", [f"a tree {k}, in the style of an ink painting" for k in range(9)]),
    ):
        for part in ("images", "captions"):
            (folder / part / place).mkdir(parents=True)
        Image.new("RGB", (48, 40), "red").save(folder / "images" / place / "00.jpg")
        (folder / "captions" / place / "00.txt").write_text("\n".join([subject, *prompts]) + "\n")
    return folder


def test_the_benchmarks_data(benchmark: Path):
    kitten, style = read_dreambench_plus(benchmark)
    assert (kitten.label, style.label) == ("live_subject_animal_00_kitten", "style_00_ink_painting")
    assert (kitten.category, kitten.kind, style.kind) == ("animal", "object", "style")
    assert kitten.prompts[2] == "a * in place 2"
    assert kitten.texts[2] == "a kitten in place 2"
    assert style.prompts[0] == "a tree 0, in the style of an *"
    assert style.init_word == "ink"
    assert [c.label for c in read_dreambench_plus(benchmark, ["style_00_ink_painting"])] == [style.label]
    assert with_word("Cats and a cat", "cat") == "Cats and a *"
    with pytest.raises(ValueError, match="no collection 'x'"):
        read_dreambench_plus(benchmark, ["x"])
    (benchmark / "captions" / "style" / "00.txt").unlink()
    with pytest.raises(FileNotFoundError, match="has no captions"):
        read_dreambench_plus(benchmark)
    with pytest.raises(FileNotFoundError, match="holds no picture"):
        read_dreambench_plus(benchmark / "images")


@pytest.mark.usefixtures("judges")
def test_dreambench_plus_on_two_pictures(benchmark: Path, tmp_path: Path):
    options = options_for("dreambench_plus", tmp_path, benchmark)
    reproduce(options, learn_sculpture)
    samples = tmp_path / "out" / "samples" / "textual_inversion"
    listed = list(read_samples(samples))
    assert len(listed) == 18
    assert listed[2].text == "a kitten in place 2"
    assert (samples / "negative_prompt.txt").read_text() == ""
    for part in ("src_image", "tgt_image", "text"):
        assert len(list((samples / part / "style_00_ink_painting").iterdir())) == 9
    ratings = tmp_path / "ratings"
    for kind, score in (("cp", 2), ("pf", 3)):
        ratings.mkdir(exist_ok=True)
        merged = {f"{sample.collection}-{sample.prompt}": score for sample in listed}
        (ratings / f"{kind}.json").write_text(json.dumps(merged))
    rated = Options(**{**vars(options), "ratings": str(ratings), "report_only": True})
    result = reproduce(rated, learn_sculpture)
    assert result.intervals["cp", "textual_inversion"].mean == pytest.approx(0.5)
    assert result.intervals["pf", "textual_inversion"].mean == pytest.approx(0.75)
    assert result.facts["Product of the two"] == "overall 0.375 (published 0.236)"
    assert result.facts["Prompt following"].startswith("photorealistic 0.750 (published 0.671), style 0.750 (")
    assert [found.mean for found in result.measures.values()] == pytest.approx([0.375])
    # the table's folder, which now holds the ratings, too, is read back without them
    fresh = Options(**{**vars(options), "report_only": True, "store": str(tmp_path / "fresh")})
    unrated = reproduce(fresh, learn_sculpture)
    assert unrated.done == result.done
    assert ("image", "textual_inversion") in unrated.intervals
    assert not {("cp", "textual_inversion"), ("pf", "textual_inversion")} & set(unrated.intervals)


@pytest.mark.parametrize(
    ("captions", "message"),
    [(b"", "00.txt has 0 lines"), (b"\n \n", "00.txt has 0 lines"), (b"Kitten\n", "00.txt has 1 lines"),
     (b"Kitten\n" + 10 * b"a kitten\n", "00.txt has 11 lines"), (b"caf\xe9\na caf\xe9\n", "00.txt is not in UTF-8")],
)  # fmt: skip
def test_captions_that_cannot_be_read_are_named(benchmark: Path, captions: bytes, message: str):
    (benchmark / "captions" / "live_subject" / "animal" / "00.txt").write_bytes(captions)
    with pytest.raises(ValueError, match=message):
        read_dreambench_plus(benchmark)


def test_pictures_and_captions_of_every_make(benchmark: Path):
    """Other suffixes, a byte order mark, and what macOS leaves beside files."""
    animals, captions = (benchmark / part / "live_subject" / "animal" for part in ("images", "captions"))
    (animals / "00.jpg").rename(animals / "00.JPEG")
    (animals / "._00.JPEG").write_bytes(b"?")
    (captions / "00.txt").write_bytes(b"\xef\xbb\xbf" + (captions / "00.txt").read_bytes())
    kitten, _ = read_dreambench_plus(benchmark)
    assert kitten.label == "live_subject_animal_00_kitten"
    assert kitten.texts[0] == "a kitten in place 0"


@pytest.mark.parametrize(
    ("subject", "label"),
    [("Kitten", "kitten"), ("ink painting", "ink_painting"), ("cup (red)", "cup_(red)"), ("Dürer's", "dürer's"),
     ("x/../../escaped", "x_escaped"), ("a\\b", "a_b"), ("cup: red?", "cup_red"), ("///", "sample"),
     ("a" * 300, "a" * 80)],
)  # fmt: skip
def test_labels_are_safe_file_names(subject: str, label: str):
    assert label_of(subject) == label


def cell_of(benchmark: Path, seed: int, level: int, root: Path) -> SimpleNamespace:
    """A drawing of the benchmark's first picture: one picture of each prompt in one grey, after one reconstruction."""
    folder = root / f"drawn{seed}"
    folder.mkdir()
    for prompt in range(10):
        Image.new("RGB", (8, 8), (level,) * 3).save(folder / f"{prompt}.png")
    drawing = SimpleNamespace(unit=folder, count=1, file=lambda drawn, prompt, k: drawn / f"{prompt}.png")
    return SimpleNamespace(drawing=drawing, concept=read_dreambench_plus(benchmark)[0], seed=seed)


STORE = SimpleNamespace(folder=lambda unit: unit)


def test_samples_are_those_of_the_first_seed(benchmark: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    cells = [cell_of(benchmark, seed, level, tmp_path) for seed, level in ((3, 0), (4, 255))]
    listed = list(read_samples(export_samples(cells, STORE, tmp_path / "samples")))
    assert len(listed) == 9
    for sample in listed:
        with Image.open(sample.picture) as image:
            assert image.getpixel((0, 0)) == (0, 0, 0)
    assert "those of seed 3 alone" in caplog.text


def test_samples_stay_in_their_folder(benchmark: Path, tmp_path: Path):
    (benchmark / "captions" / "live_subject" / "animal" / "00.txt").write_text("x/../../../../escaped\na x\n")
    folder = tmp_path / "out" / "samples"
    export_samples([cell_of(benchmark, 0, 0, tmp_path)], STORE, folder)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"samples"}
    assert (folder / "tgt_image" / "live_subject_animal_00_x_escaped" / "0_0.jpg").is_file()


def test_samples_of_an_earlier_export_go(benchmark: Path, tmp_path: Path):
    folder = export_samples([cell_of(benchmark, 0, 0, tmp_path)], STORE, tmp_path / "samples")
    captions = benchmark / "captions" / "live_subject" / "animal" / "00.txt"
    captions.write_text("Kitten\na kitten\n")
    export_samples([cell_of(benchmark, 1, 0, tmp_path)], STORE, folder)
    assert [sample.prompt for sample in read_samples(folder)] == [0]
    captions.write_text("Cat\na cat\n")
    export_samples([cell_of(benchmark, 2, 0, tmp_path)], STORE, folder)
    assert {sample.collection for sample in read_samples(folder)} == {"live_subject_animal_00_cat"}
    assert len(list((folder / "src_image").iterdir())) == 1


def test_references_are_as_training_saw_them(benchmark: Path, tmp_path: Path):
    photo = Image.new("RGB", (40, 20), "red")
    tags = photo.getexif()
    tags[0x0112] = 6  # lies on its side
    photo.save(benchmark / "images" / "live_subject" / "animal" / "00.jpg", exif=tags)
    folder = export_samples([cell_of(benchmark, 0, 0, tmp_path)], STORE, tmp_path / "samples")
    with Image.open(next(read_samples(folder)).reference) as image:
        assert image.size == (20, 40)
        assert not image.getexif()


def test_samples_that_are_none(benchmark: Path, tmp_path: Path):
    folder = export_samples([cell_of(benchmark, 0, 0, tmp_path)], STORE, tmp_path / "samples")
    drawn = folder / "tgt_image" / "live_subject_animal_00_kitten"
    (drawn / "._0_0.jpg").write_bytes(b"what macOS leaves")
    (drawn / "0_0.txt").write_text("no picture")
    assert len(list(read_samples(folder))) == 9
    for name, message in (("x_0.jpg", "prompt number 'x'"), ("9_0.jpg", "prompt number '9'")):
        shutil.copyfile(drawn / "0_0.jpg", drawn / name)
        with pytest.raises(ValueError, match=f"{name}: the {message} is none from 0 to 8"):
            list(read_samples(folder))
        (drawn / name).unlink()
