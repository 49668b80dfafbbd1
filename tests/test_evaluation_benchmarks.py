"""DreamBooth's and DreamBench++'s protocols on two subjects, with a ViT-B/32 of random weights; ratings."""

from __future__ import annotations

import functools
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

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
from evaluation.dreambench_plus import (
    averages,
    category_of,
    prompt_kind,
    read_dreambench_plus,
    read_ratings,
    read_samples,
    with_word,
)
from evaluation.experiments import read_table, read_yaml
from evaluation.ratings import Endpoint, messages_for, parse_score, rate
from evaluation.reproduce import Options, reproduce
from ldm.resources import config_path
from tests.test_scripts_sampling import load
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


# -- ratings -------------------------------------------------------------------------------------------------------


def test_averages_as_on_the_leaderboard():
    """Ratings whose category means are the published ones average to the published overall figures."""
    counts = {"live_subject_animal": 45, "live_subject_human": 20, "object": 65, "style": 20}
    means = {"live_subject_animal": 0.502, "live_subject_human": 0.358, "object": 0.305, "style": 0.358}
    kinds = {"photorealistic": 0.671, "style": 0.686, "imaginative": 0.437}
    cp, pf = {}, {}
    for group, count in counts.items():
        for k in range(count):
            for prompt in range(9):
                key = (f"{group}_{k:02}_thing", prompt)
                # 1000 repeats whose mean is the wanted share of 4
                cp[key] = spread(means[group])
                pf[key] = spread(kinds[prompt_kind(prompt)])
    found = averages({"cp": cp, "pf": pf})
    assert round(found["cp"]["animal"], 3) == 0.502
    assert round(found["cp"]["overall"], 3) == 0.378
    assert round(found["pf"]["overall"], 3) == 0.624
    assert round(found["cp_pf"]["overall"], 3) == 0.236
    assert "pf" not in averages({"cp": cp, "pf": {}})


def spread(share: float) -> list[int]:
    """Scores from 0 to 4 of mean `4 * share`, to three digits."""
    whole, rest = divmod(round(4000 * share), 1000)
    return [whole + 1] * rest + [whole] * (1000 - rest)


def test_rating_files_of_every_form(tmp_path: Path):
    item = {"method": "x", "collection_id": "object_00_cup", "prompt_index": 3, "score": 4, "content": "..."}
    for repeat, score in (("full", 4), ("full2", 2)):
        (tmp_path / "cp" / repeat).mkdir(parents=True)
        (tmp_path / "cp" / repeat / "x-object_00_cup-3.json").write_text(json.dumps({**item, "score": score}))
    (tmp_path / "pf.json").write_text(json.dumps({"object_00_cup-3": 1}))
    found = read_ratings(tmp_path)
    assert found == {"cp": {("object_00_cup", 3): [4, 2]}, "pf": {("object_00_cup", 3): [1]}}
    assert averages(found)["cp"] == {"object": 0.75, "overall": 0.75}
    people = tmp_path / "people.json"
    people.write_text(json.dumps({"object_00_cup-3": [3, 2]}))
    assert read_ratings(people)["pf"] == {("object_00_cup", 3): [2]}
    for bad, message in ((4, r"should have a pair \[cp, pf\]"), ([3, 9], "no integer from 0 to 4")):
        people.write_text(json.dumps({"object_00_cup-3": bad}))
        with pytest.raises(ValueError, match=message):
            read_ratings(people)
    people.unlink()
    (tmp_path / "pf.json").write_text(json.dumps({"object_00_cup-3": 5}))
    with pytest.raises(ValueError, match="no integer from 0 to 4"):
        read_ratings(tmp_path)
    (tmp_path / "pf.json").write_text(json.dumps({"cup": 1}))
    with pytest.raises(ValueError, match="'cup' is not of the form"):
        read_ratings(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no ratings"):
        read_ratings(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="none of the categories"):
        category_of("thing_00_x")


def test_ratings_of_several_methods_are_kept_apart(tmp_path: Path):
    for method, score in (("ti", 0), ("db", 4)):
        (tmp_path / "cp").mkdir(exist_ok=True)
        item = {"method": method, "collection_id": "object_00_cup", "prompt_index": 3, "score": score}
        (tmp_path / "cp" / f"{method}-object_00_cup-3.json").write_text(json.dumps(item))
    assert read_ratings(tmp_path, "db")["cp"] == {("object_00_cup", 3): [4]}
    with pytest.raises(ValueError, match="several methods, db, ti"):
        read_ratings(tmp_path)
    with pytest.raises(ValueError, match="no ratings of 'x', only of db, ti"):
        read_ratings(tmp_path, "x")


@pytest.mark.parametrize(
    ("reply", "score"),
    [("Score: 3", 3), ("It fits.\nscore: 0", 0), ("**Score:** 4", 4), ("Score: 2\nScore: 2", 2), ("Score is 1", None),
     ("no idea", None), ("Score: 7", None), ("Score: 1 or Score: 2", None), ("Score (0-4): 3", 3),
     ("Score: Good 3", 3), ("Score: 3.5", None), ("Score: 4.", 4)],
)  # fmt: skip
def test_scores_in_replies(reply: str, score: int | None):
    if score is None:
        with pytest.raises(ValueError, match="no single score"):
            parse_score(reply)
    else:
        assert parse_score(reply) == score


class Rater(http.server.BaseHTTPRequestHandler):
    """A service that gives 3 for descriptions and 2 for pairs of pictures, after one failure."""

    failures = 1
    code = 503
    requests: list[dict] = []  # noqa: RUF012
    keys: list[str] = []  # noqa: RUF012

    def do_POST(self) -> None:  # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Rater.requests.append(body)
        Rater.keys.append(self.headers.get("Authorization", ""))
        if Rater.failures:
            Rater.failures -= 1
            self.send_error(Rater.code)
            return
        parts = body["messages"][-1]["content"]
        score = 2 if parts[0]["type"] == "image_url" else 3
        reply = json.dumps({"choices": [{"message": {"content": f"Analysis.\nScore: {score}"}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[str]:
    Rater.failures, Rater.code, Rater.requests, Rater.keys = 1, 503, [], []
    server = http.server.HTTPServer(("127.0.0.1", 0), Rater)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    folder = tmp_path / "samples"
    for part in ("src_image", "tgt_image", "text"):
        (folder / part / "object_00_cup").mkdir(parents=True)
    for k in range(2):
        for part in ("src_image", "tgt_image"):
            Image.new("RGB", (32, 32), "blue").save(folder / part / "object_00_cup" / f"{k}_0.jpg")
        (folder / "text" / "object_00_cup" / f"{k}_0.txt").write_text("a cup")
    return folder


def test_ratings_by_an_endpoint(service: str, samples: Path, tmp_path: Path):
    waits: list[float] = []
    endpoint = Endpoint(service, "seer", key="secret")
    out = tmp_path / "ratings"
    assert rate(read_samples(samples), endpoint, out, repeats=2, sleep=waits.append) == 0
    assert waits == [5.0]
    assert len(Rater.requests) == 2 * 2 * 2 + 1
    assert set(Rater.keys) == {"Bearer secret"}
    assert Rater.requests[0]["model"] == "seer"
    assert Rater.requests[0]["temperature"] == 1.0
    found = averages(read_ratings(out))
    assert found["cp"]["overall"] == 0.5
    assert found["pf"]["overall"] == 0.75
    assert (out / "cp" / "full2" / "textual_inversion-object_00_cup-1.json").is_file()
    assert not any("secret" in file.read_text() for file in out.rglob("*.json"))
    before = len(Rater.requests)
    rate(read_samples(samples), endpoint, out, repeats=2)
    assert len(Rater.requests) == before


def test_a_service_that_will_not_answer_is_asked_no_more(service: str, samples: Path, tmp_path: Path):
    endpoint, waits = Endpoint(service, "seer", key="wrong"), []
    Rater.failures, Rater.code = 100, 401
    with pytest.raises(ValueError, match="answered 401"):
        rate(read_samples(samples), endpoint, tmp_path / "ratings", sleep=waits.append)
    assert len(Rater.requests) == 1
    Rater.code = 503
    with pytest.raises(OSError, match="5 ratings failed one after the other"):
        rate(read_samples(samples), endpoint, tmp_path / "ratings", sleep=waits.append)
    assert waits == [5.0, 10.0] * 5


def test_the_rating_command(service: str, samples: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    Rater.failures = 0
    command, out = load("rate_dreambench_plus"), str(tmp_path / "ratings")
    monkeypatch.setenv("RATING_KEY", "secret")
    words = ["--samples", str(samples), "--url", service, "--model", "seer", "--out", out, "--repeats", "1"]
    command.main([*words, "--key_env", "RATING_KEY"])
    assert "cp     object 0.500  overall 0.500" in capsys.readouterr().out
    command.main(["--out", out, "--averages_only"])
    assert "cp_pf  overall 0.375" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no such environment variable"):
        command.main([*words, "--key_env", "NO_SUCH_KEY"])
    with pytest.raises(ValueError, match="rating needs --samples"):
        command.parse_args(["--out", out])
    with pytest.raises(ValueError, match="begin with http"):
        command.parse_args([*words[:3], "host/v1", *words[4:]])


def test_each_rubric_asks_for_what_it_rates(samples: Path):
    cup = next(read_samples(samples))
    rubric, _, sample = messages_for("cp", cup)
    assert "subject" in rubric["content"]
    assert len(sample["content"]) == 2
    assert sample["content"][0]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    description = messages_for("pf", cup)[-1]["content"]
    assert [part["type"] for part in description] == ["text", "image_url"]
    assert "a cup" in description[0]["text"]
