"""DreamBench++'s ratings: files, averages, scores in replies, and raters behind an endpoint."""

from __future__ import annotations

import base64
import http.server
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evaluation import ratings
from evaluation.dreambench_plus import add_ratings, averages, category_of, prompt_kind, read_ratings, read_samples
from evaluation.endpoint import Endpoint
from evaluation.experiments import Row, Table
from evaluation.ratings import RUBRICS, messages_for, parse_score, picture_part, rate
from evaluation.results import summarise
from ldm.data.image import ImageLoader
from tests.test_scripts_sampling import load


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
    with pytest.raises(ValueError, match=r"pf\.json: 'cup' is not of the form"):
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


ITEM = {"method": "x", "collection_id": "object_00_cup", "prompt_index": 3, "score": 4}


def write_ratings(folder: Path, files: dict[str, Any]) -> Path:
    """Write JSON files, by relative path."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name).write_bytes(raw)
    return folder


def test_a_merged_file_does_not_count_beside_its_items(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    merged = {"object_00_cup-3": 0}
    write_ratings(tmp_path, {"cp/full/a.json": ITEM, "cp/full2/a.json": {**ITEM, "score": 2}, "cp.json": merged})
    assert read_ratings(tmp_path)["cp"] == {("object_00_cup", 3): [4, 2]}
    assert "cp.json is left out" in caplog.text
    with pytest.raises(ValueError, match="no ratings of 'y', only of x"):
        read_ratings(tmp_path, "y")


def test_ratings_that_name_no_method(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """They count for the only method there is, and for none where there are several."""
    merged = {"object_00_cup-3": 1}
    write_ratings(tmp_path, {"pf.json": merged})
    assert read_ratings(tmp_path, "x")["pf"] == {("object_00_cup", 3): [1]}
    assert "taken for those of 'x'" in caplog.text
    write_ratings(tmp_path, {"cp/a.json": ITEM})
    assert read_ratings(tmp_path, "x")["pf"] == {("object_00_cup", 3): [1]}
    with pytest.raises(ValueError, match="no ratings of 'y', only of x"):
        read_ratings(tmp_path, "y")
    write_ratings(tmp_path, {"cp/b.json": {**ITEM, "method": "y"}})
    for method in ("x", "y", None):
        with pytest.raises(ValueError, match="several methods, x, y: keep the merged file"):
            read_ratings(tmp_path, method)


def test_ratings_without_a_method_count_for_one_row_only(tmp_path: Path):
    table = Table("t", "", "", (Row("x", "x"), Row("y", "y")), columns=("cp",))
    records = [{"row": row, "concept": "object_00_cup", "seed": 0} for row in ("x", "y")]
    both = summarise(table, records, ["object_00_cup"], [0], {}, 2)
    request: Any = type("Request", (), {"concepts": (), "seeds": (0,)})
    write_ratings(tmp_path, {"cp.json": {"object_00_cup-3": 1}})
    with pytest.raises(ValueError, match="name no method, and the table has the rows x, y"):
        add_ratings(both, request, tmp_path)


def test_ratings_of_other_pictures_stay_out_of_the_table(samples: Path, tmp_path: Path, caplog):
    """They are left out with a warning; those that do not say what was rated, as published ones, count."""
    (samples.parent / "all").mkdir()
    samples.rename(samples.parent / "all" / "x")
    table = Table("t", "", "", (Row("x", "x"),), columns=("cp", "pf"))
    result = summarise(table, [{"row": "x", "concept": "object_00_cup", "seed": 0}], ["object_00_cup"], [0], {}, 1)
    request: Any = type("Request", (), {"concepts": [type("C", (), {"label": "object_00_cup"})], "seeds": (0,)})
    cup = next(read_samples(samples.parent / "all" / "x"))
    same, other = ({**ITEM, "prompt_index": 0, "sample_hash": said} for said in (cup.shown("cp"), "f" * 16))
    files = {"cp/full/a.json": same, "cp/full2/a.json": {**other, "score": 0}, "pf/full/a.json": {**ITEM, "score": 1}}
    found = add_ratings(result, request, write_ratings(tmp_path / "r", files), samples.parent / "all")
    assert (found.cells[0]["cp"], found.cells[0]["pf"]) == (1.0, 0.25)
    assert found.facts["Concept preservation"] == "object 1.000, overall 1.000"
    assert "1 of 2 ratings (cp) in" in caplog.text
    files = {"cp/full/a.json": other}
    found = add_ratings(result, request, write_ratings(tmp_path / "s", files), samples.parent / "all")
    assert "cp" not in found.cells[0]
    assert "Concept preservation" not in found.facts
    found = add_ratings(result, request, tmp_path / "s", tmp_path / "nowhere")  # nothing to compare with
    assert found.cells[0]["cp"] == 1.0


def test_ratings_of_an_earlier_table_are_not_merged(tmp_path: Path):
    table = Table("t", "", "", (Row("x", "x"),), columns=("cp", "pf"))
    record = {"row": "x", "concept": "object_00_cup", "seed": 0, "image": 0.5, "cp": 0.25, "pf": 0.25}
    request: Any = type("Request", (), {"concepts": [type("C", (), {"label": "object_00_cup"})], "seeds": (0,)})
    write_ratings(tmp_path, {"cp.json": {"object_00_cup-3": 4}})
    found = add_ratings(summarise(table, [record], ["object_00_cup"], [0], {}, 1), request, tmp_path)
    assert {name: value for name, value in found.cells[0].items() if isinstance(value, float)} == {
        "image": 0.5,
        "cp": 1.0,
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cp/a.json", {"score": 4}, "lacks 'collection_id'"),
        ("cp/a.json", {**ITEM, "collection_id": 3}, "the collection 3 is no name"),
        ("cp/a.json", {**ITEM, "collection_id": "thing_00_x"}, "begins with none of the categories"),
        ("cp/a.json", {**ITEM, "method": 3}, "the method 3 is no name"),
        ("cp/a.json", {**ITEM, "score": True}, "score True is no integer"),
        ("cp/a.json", {**ITEM, "score": 3.0}, r"score 3\.0 is no integer"),
        ("cp/a.json", {**ITEM, "prompt_index": -1}, "prompt number -1 is none from 0 to 8"),
        ("cp/a.json", {**ITEM, "prompt_index": 9}, "prompt number 9 is none from 0 to 8"),
        ("cp/a.json", {**ITEM, "prompt_index": True}, "prompt number True is none from 0 to 8"),
        ("cp/a.json", b"\xff{", "not in UTF-8"),
        ("cp/a.json", b"[" * 100_000, "not JSON that can be read"),
        ("cp/a.json", [1], "should hold a JSON object"),
        ("pf.json", {"object_00_cup-²": 3}, "prompt number '²' is none"),
    ],
)
def test_rating_files_that_are_none(tmp_path: Path, name: str, content: Any, message: str):
    with pytest.raises(ValueError, match=message) as error:
        read_ratings(write_ratings(tmp_path, {name: content}))
    assert str(tmp_path / name) in str(error.value)


def test_hidden_files_are_no_ratings(tmp_path: Path):
    write_ratings(tmp_path, {"cp/a.json": b"\xef\xbb\xbf" + json.dumps(ITEM).encode(), "cp/.a.json.tmp.json": b""})
    assert read_ratings(tmp_path)["cp"] == {("object_00_cup", 3): [4]}


READ = {
    "Score: 3": 3, "It fits.\nscore: 0": 0, "**Score:** 4": 4, "**Score: 4**": 4, "**Score:**\n3": 3,
    "Score: 2\nScore: 2": 2, "Score (0-4): 3": 3, "Score: Good 3": 3, "Score: **very poor** 0": 0, "Score: good (3)": 3,
    "Score: fair - 2": 2, "Score: 4.": 4, "Score: 3/4": 3, "Score: 3 / 4.": 3, "Score: 3 out of 4": 3,
    "Score: 3 (out of 4)": 3, "Score: 3 (good)": 3, "Score: 3 - good": 3, "Score: see below.\nScore: 1": 1,
    "Score: 3.0": 3, "Score: 4.0/4.0": 4, "Score: [3]": 3, 'Score: "3"': 3, "Score: `3`": 3, '{"score": 3}': 3,
    "Score: (3)": 3, "Score: “3”": 3, "```json\n{'score': '2'}\n```": 2, '"score": 3.0,\n': 3,
    '{"score": 3, "reason": "it has 2 handles"}': 3, "Score: 3, because of 1 leg": 3, "Score: 3 because of 1 leg": 3,
    "Overall score: 3 – good, no 2nd arm": 3, "Score: 3/4 (the 3-legged stool has 4 legs)": 3, "Score: 0, no cup": 0,
    "Score: 3, and it fits": 3,
}  # fmt: skip
REFUSED = [
    "Score is 1", "no idea", "Score: 7", "Score: 1 or Score: 2", "Score: 1\nScore: 2", "Score: 3.5", "Score: 3,5",
    "Score: 3-4", "Score: 3 – 4", "Score: 3 to 4", "Score: 3 or four", "Score: 3/10", "Score: 3/40", "Score: 3/4.5",
    "Score: 3 out of 10", "Score: 3 out of ten", "Score: 3 of 5", "Score: between 2 and 3", "Score: below 2",
    "Score: not 3", "Score: about 3", "Score: ~3", "Score: -1", "Score: 3+", "Score: 3%", "Score: 3½",
    "Score: 3 and a half", "Score: 3 point five", "Score: 33", "Score: below 2\nScore: 2", "Score: 3.05", "Score: 5.0",
    "Score: [7]", "Score: [3, 4]", "Score: [2-3]", "Score: [3][4]", "Score: 3 [4]", '{"score": 9}', '{"score": 3.5}',
    '{"shape": 4, "score": 3, "colour": 2}', "Score: 3, 4", "Score: 3, or 4", "Score: 3, or four", "Score: 3 (or 4)",
    "Score: 3, maybe 4", "Score: 3, maybe 4 stars", "Score: 3, rather than 4 here", "Score: 3, shape 4, colour 2",
    "Score: 3, as colour is 4 and shape 2", "Score: 3, almost a 4", "Score: 3 - 4 points", "Score: 3.0.1",
    "Score: -3.0",
]  # fmt: skip


@pytest.mark.parametrize("reply", READ)
def test_scores_in_replies(reply: str):
    assert parse_score(reply) == READ[reply]


@pytest.mark.parametrize("reply", REFUSED)
def test_replies_without_one_clear_score(reply: str):
    with pytest.raises(ValueError, match="no single score"):
        parse_score(reply)


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


@pytest.mark.parametrize(
    ("changed", "again"),
    [("tgt_image", {"cp", "pf"}), ("src_image", {"cp"}), ("text", {"pf"}), ("rubric", {"pf"}), ("rater", {"cp", "pf"})],
)
def test_what_has_changed_is_rated_again(
    service: str, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog, changed: str, again: set[str]
):
    Rater.failures = 0
    out, rater = tmp_path / "ratings", "seer"
    rate(read_samples(samples), Endpoint(service, rater), out, repeats=1)
    before = {file: file.read_text() for file in out.rglob("*.json")}
    assert len(before) == len(Rater.requests) == 4
    if changed == "rater":
        rater = "other"
    elif changed == "rubric":
        monkeypatch.setitem(RUBRICS, "text", RUBRICS["text"] + " Be strict.")
    elif changed == "text":
        (samples / "text" / "object_00_cup" / "0_0.txt").write_text("a large cup")
    else:
        Image.new("RGB", (32, 32), "red").save(samples / changed / "object_00_cup" / "0_0.jpg")
    asked = len(again) * (2 if changed in ("rubric", "rater") else 1)  # of one sample, or of both
    assert rate(read_samples(samples), Endpoint(service, rater), out, repeats=1) == 0
    assert len(Rater.requests) == 4 + asked
    assert f"{asked} ratings in {out} are of something else" in caplog.text
    assert {file.parts[-3] for file in before if file.read_text() != before[file]} == again
    rate(read_samples(samples), Endpoint(service, rater), out, repeats=1)
    assert len(Rater.requests) == 4 + asked


def test_ratings_from_elsewhere_are_not_asked_for_again(service: str, samples: Path, tmp_path: Path):
    """Published ones do not say what was rated and by whom."""
    items = {f"cp/full/textual_inversion-object_00_cup-{k}.json": {**ITEM, "prompt_index": k} for k in range(2)}
    out = write_ratings(tmp_path / "ratings", items)
    assert rate(read_samples(samples), Endpoint(service, "seer"), out, ["cp"], repeats=1) == 0
    assert not Rater.requests
    assert len(read_ratings(out)["cp"]) == 2


def test_a_damaged_sample_does_not_keep_the_others_from_being_rated(
    service: str, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    Rater.failures = 0
    monkeypatch.setattr(ratings, "GIVE_UP_AFTER", 2)  # which is for a service that fails
    damaged = samples / "tgt_image" / "object_00_cup" / "0_0.jpg"
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert rate(read_samples(samples), Endpoint(service, "seer"), tmp_path / "ratings", repeats=1) == 2
    assert str(damaged) in caplog.text
    assert "cp of object_00_cup, prompt 0 cannot be rated" in caplog.text
    assert {key for kind in read_ratings(tmp_path / "ratings").values() for key in kind} == {("object_00_cup", 1)}


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
    for name in ("NO_SUCH_KEY", "sk-secret"):  # the second is a key in the place of its name
        with pytest.raises(ValueError, match="no such environment variable") as error:
            command.main([*words, "--key_env", name])
        assert name not in str(error.value)
    with pytest.raises(ValueError, match="rating needs --samples"):
        command.parse_args(["--out", out])
    with pytest.raises(ValueError, match=r"--url: 'host/v1': begin with http"):
        command.parse_args([*words[:3], "host/v1", *words[4:]])


@pytest.mark.parametrize(
    "words", ["--key sk-secret", "--key=sk-secret", "--api-key sk-secret", "--key_e sk-secret", "sk-secret"]
)
def test_a_key_on_the_command_line_is_refused_and_not_shown(words: str, capsys: pytest.CaptureFixture[str]):
    needed = ["--samples", "s", "--url", "http://localhost/v1", "--model", "m", "--out", "o"]
    with pytest.raises(ValueError, match=r"not known: .* \(a key goes into an environment variable") as error:
        load("rate_dreambench_plus").main([*needed, *words.split()])
    assert "secret" not in str(error.value) + "".join(capsys.readouterr())


def test_keys_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    read_key = load("rate_dreambench_plus").read_key
    monkeypatch.setenv("RATING_KEY", "sk-secret\r\n")
    assert read_key("RATING_KEY") == "sk-secret"
    assert read_key(None) == ""
    for bad, message in (
        ("sk-\nsecret", "no HTTP header takes"),
        ("sk-secret…", "no HTTP header takes"),
        (" \n", "empty"),
    ):
        monkeypatch.setenv("RATING_KEY", bad)
        with pytest.raises(ValueError, match=message) as error:
            read_key("RATING_KEY")
        assert "secret" not in str(error.value)


def test_each_rubric_asks_for_what_it_rates(samples: Path):
    cup = next(read_samples(samples))
    rubric, _, sample = messages_for("cp", cup)
    assert "subject" in rubric["content"]
    assert len(sample["content"]) == 2
    assert sample["content"][0]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    description = messages_for("pf", cup)[-1]["content"]
    assert [part["type"] for part in description] == ["text", "image_url"]
    assert "a cup" in description[0]["text"]


def test_raters_see_what_training_saw(tmp_path: Path):
    """A photo that lies on its side is turned upright, a cut-out has a white background."""
    photo = Image.new("RGB", (64, 32), "red")
    photo.paste("blue", (0, 0, 32, 32))
    tags = photo.getexif()
    tags[0x0112] = 6
    photo.save(tmp_path / "photo.png", exif=tags)
    cut_out = np.zeros((32, 32, 4), np.uint8)
    cut_out[8:24, 8:24] = (255, 0, 0, 255)
    Image.fromarray(cut_out).save(tmp_path / "cut_out.png")
    for name in ("photo", "cut_out"):
        data = picture_part(tmp_path / f"{name}.png")["image_url"]["url"].partition(",")[2]
        seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), dtype=np.float32) / 127.5 - 1
        training = ImageLoader(size=512).load(tmp_path / f"{name}.png")
        assert np.abs(seen - training).mean() < 0.02
