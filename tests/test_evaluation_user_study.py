"""The user study: blind pages, answers, ranks; the report and the study's page in a browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from evaluation import user_study
from evaluation.stats import HOLDS
from evaluation.user_study import make_study
from evaluation.user_study_answers import analyse, read_answers, read_key
from evaluation.user_study_page import page
from tests.browser import needs_browser, title_of
from tests.test_scripts_sampling import load

SETUPS = ["three_words", "ours", "short_captions"]


def write_picture(path: Path, colour: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngImagePlugin.PngInfo()
    info.add_text("setup", "three_words")
    Image.fromarray(np.full((8, 8, 3), colour, np.uint8)).save(path, pnginfo=info)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Pictures of three setups for two concepts and two prompts, as --export writes them."""
    folder = tmp_path / "in"
    for number, concept in enumerate(("cat", "mug")):
        for k in range(5):
            write_picture(folder / "training" / concept / f"{k:02}.png", 100 + 10 * number + k)
        for at, setup in enumerate(SETUPS):
            for prompt in ("00-a-photo-of", "01-on-the-beach"):
                for k in range(2):
                    write_picture(folder / setup / concept / prompt / f"{k:03}.png", 20 * at + 10 * number + k)
                (folder / setup / concept / prompt / "prompt.txt").write_text(prompt[3:].replace("-", " "))
    return folder


def answers_of(study: Path, order: list[str], form: str = "form_01") -> list[dict[str, Any]]:
    """Answers of somebody who always ranks the setups in `order`."""
    key = json.loads((study / "key.json").read_text())
    number = form.rpartition("_")[2].lstrip("0")
    return [
        {
            "question": name,
            "ranking": sorted(question["pictures"], key=lambda file: order.index(question["pictures"][file])),
            "seconds": 1.0,
        }
        for name, question in key["questions"].items()
        if name.startswith(f"{number}.")
    ]


def answer_all(study: Path, order: list[str], file: str, person: str | None = None) -> None:
    """Write the answers of `answers_of` as a form does, or without a participant's number as forms once did."""
    folder = study / "answers"
    folder.mkdir(exist_ok=True)
    number = {} if person is None else {"person": person}
    content = {"form": "form_01", **number, "answers": answers_of(study, order)}
    (folder / f"{file}.json").write_text(json.dumps(content))


def orders_of(study: Path) -> list[list[str]]:
    """The setups of each question in the order in which the pages show their pictures."""
    key = json.loads((study / "key.json").read_text())["questions"]
    asked = [q for file in sorted((study / "pages").glob("*.html")) for q in questions_of(file)]
    return [[key[question["id"]]["pictures"][file] for file in question["pictures"]] for question in asked]


def questions_of(form: Path) -> list[dict[str, Any]]:
    """What a form asks."""
    return json.loads(form.read_text().split("const questions = ")[1].split(";\n")[0])


def test_pages_are_blind(pictures: Path, tmp_path: Path):
    pages = make_study(pictures, SETUPS, tmp_path / "study", forms=2, questions=4)
    assert [p.name for p in pages] == ["form_01.html", "form_02.html"]
    shown = tmp_path / "study" / "pages"
    for file in shown.rglob("*"):
        assert not any(setup in file.name for setup in SETUPS)
        if file.is_file():
            content = file.read_bytes()
            assert not any(setup.encode() in content for setup in SETUPS), file
    key = json.loads((tmp_path / "study" / "key.json").read_text())
    assert len(key["questions"]) == 8
    for question in key["questions"].values():
        assert sorted(question["pictures"].values()) == sorted(SETUPS)
    kinds = [question["kind"] for question in key["questions"].values()]
    assert kinds.count("image") == kinds.count("text") == 4
    assert len({tuple(order) for order in orders_of(tmp_path / "study")}) > 1  # it differs between questions
    with pytest.raises(ValueError, match="choose another folder"):
        make_study(pictures, SETUPS, tmp_path / "study")


def test_ranks_from_answers(pictures: Path, tmp_path: Path):
    study = tmp_path / "study"
    make_study(pictures, SETUPS, study, forms=1, questions=4)
    for person in range(6):
        order = SETUPS if person else ["ours", "three_words", "short_captions"]
        answer_all(study, order, f"person{person}")
    result = analyse(study / "answers", study / "key.json", "command")
    means = {key: found.mean for key, found in result.intervals.items()}
    assert means["image_rank", "short_captions"] == 1.0
    assert means["image_rank", "three_words"] == pytest.approx((5 * 3 + 2) / 6)
    assert sum(means["text_rank", setup] for setup in SETUPS) == pytest.approx(1 + 2 + 3)
    assert len(result.findings) == 3  # those that name only setups of this study
    assert result.findings[0].verdict == HOLDS
    assert result.facts["Participants"] == "6"
    assert result.facts["Answers"] == "24"
    published = {row.name: row.published for row in result.table.rows}
    assert published["ours"] == {"text_rank": 3.18, "image_rank": 4.24}


def test_the_commands(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command, study = load("user_study"), tmp_path / "study"
    command.main(["make", "--pictures", str(pictures), "--out", str(study), "--forms", "1", "--setups", *SETUPS])
    answer_all(study, SETUPS, "a")
    answers, key, out = (str(path) for path in (study / "answers", study / "key.json", tmp_path / "out"))
    command.main(["analyse", "--answers", answers, "--key", key, "--out", out])
    assert "| 3 words | 3.000 [3.000, 3.000] |" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").is_file()
    with pytest.raises(ValueError, match="--forms must be at least 1"):
        command.main(["make", "--pictures", "x", "--setups", "a", "b", "--forms", "0"])


def test_mistakes_are_named(pictures: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="two different setups"):
        make_study(pictures, ["ours", "ours"], tmp_path / "study")
    with pytest.raises(FileNotFoundError, match="no pictures of 'two_words'"):
        make_study(pictures, ["ours", "two_words"], tmp_path / "study")


def test_neither_names_nor_order_follow_from_the_seed(pictures: Path, tmp_path: Path):
    """The seed is the default one for most studies, so whoever knows the program would know what it gives."""
    studies = [tmp_path / "a", tmp_path / "b"]
    for study in studies:
        make_study(pictures, SETUPS, study, forms=5, questions=4, seed=0)
    names = [{file.name for file in (study / "pages" / "pictures").iterdir()} for study in studies]
    assert not names[0] & names[1]
    assert orders_of(studies[0]) != orders_of(studies[1])
    asked = [json.loads((study / "key.json").read_text())["questions"] for study in studies]
    for first, second in zip(*(questions.values() for questions in asked), strict=True):
        assert (first["concept"], first["prompt"]) == (second["concept"], second["prompt"])


def test_file_times_say_nothing(pictures: Path, tmp_path: Path):
    make_study(pictures, SETUPS, tmp_path / "study", forms=2, questions=4)
    assert len({file.stat().st_mtime_ns for file in (tmp_path / "study" / "pages").rglob("*")}) == 1


def test_pages_without_a_key_are_not_added_to(pictures: Path, tmp_path: Path):
    study = tmp_path / "study"
    make_study(pictures, SETUPS, study, forms=1)
    (study / "key.json").unlink()
    before = sorted(study.rglob("*"))
    with pytest.raises(ValueError, match="pages holds files, but there is no key to them: delete it or choose"):
        make_study(pictures, SETUPS, study, forms=1)
    assert sorted(study.rglob("*")) == before


def test_a_study_appears_whole_or_not_at_all(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    study = tmp_path / "study"

    def stop(form: str, questions: object) -> str:
        if form == "form_02":
            raise KeyboardInterrupt
        return page(form, questions)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(user_study, "page", stop)
        with pytest.raises(KeyboardInterrupt):
            make_study(pictures, SETUPS, study, forms=2)
    assert not list(study.iterdir())
    (study / "pages").write_text("in the way")
    with pytest.raises(OSError, match="pages"):
        make_study(pictures, SETUPS, study, forms=1)
    assert [path.name for path in study.iterdir()] == ["pages"]
    (study / "pages").unlink()
    (study / "pages").mkdir()
    assert list(make_study(pictures, SETUPS, study, forms=1)) == [study / "pages" / "form_01.html"]


def test_participants_see_what_training_saw(pictures: Path, tmp_path: Path):
    """A photo that lies on its side is turned upright, a cut-out has a white background."""
    for file in (pictures / "training").rglob("*.png"):
        file.unlink()
    photo = Image.new("RGB", (40, 20), "red")
    tags = photo.getexif()
    tags[0x0112], tags[0x010E] = 6, "a secret"
    photo.save(pictures / "training" / "cat" / "00.jpg", exif=tags, comment=b"a secret", icc_profile=b"a secret")
    cut_out = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    cut_out.paste((255, 0, 0, 255), (5, 5, 15, 15))
    cut_out.save(pictures / "training" / "mug" / "00.png")
    (pictures / "training" / "mug" / "._00.png").write_bytes(b"what macOS leaves")
    study = tmp_path / "study"
    (form,) = make_study(pictures, SETUPS, study, forms=1, questions=4)
    found = {}
    for question in questions_of(form):
        for name in question["references"]:
            with Image.open(study / "pages" / "pictures" / name) as image:
                found[image.size] = image.convert("RGB").getpixel((0, 0))
                assert not image.info
    assert found.keys() == {(20, 40), (20, 20)}
    assert found[20, 20] == (255, 255, 255)
    assert all(b"secret" not in file.read_bytes() for file in (study / "pages" / "pictures").iterdir())


def test_how_many_questions_a_form_has(pictures: Path, tmp_path: Path, capsys, caplog: pytest.LogCaptureFixture):
    words = ["make", "--pictures", str(pictures), "--setups", *SETUPS, "--forms", "1"]
    load("user_study").main([*words, "--out", str(tmp_path / "study")])
    assert f"{tmp_path / 'study' / 'pages' / 'form_01.html'}: 4 questions" in capsys.readouterr().out
    assert "each form has only 4 of 20 questions" in caplog.text
    caplog.clear()
    load("user_study").main([*words, "--out", str(tmp_path / "other"), "--questions", "3"])
    assert "form_01.html: 3 questions" in capsys.readouterr().out
    assert not caplog.text


# -- answers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def study(pictures: Path, tmp_path: Path) -> Path:
    """A study with one form."""
    make_study(pictures, SETUPS, tmp_path / "study", forms=1, questions=4)
    (tmp_path / "study" / "answers").mkdir()
    return tmp_path / "study"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no file of answers"),
        ({"answers": None}, "no file of answers"),
        ({"answers": {"1.1": []}}, "no file of answers"),
        ({"answers": [], "person": 3}, "no file of answers"),
        ([1], "should hold a JSON object"),
        ({"answers": [1]}, "does not fit the key"),
        ({"answers": [{"question": "1.1"}]}, "does not fit the key"),
        ({"answers": [{"ranking": []}]}, "does not fit the key"),
        ({"answers": [{"question": [], "ranking": []}]}, "does not fit the key"),
        ({"answers": [{"question": "1.1", "ranking": [["a"], ["b"]]}]}, "does not fit the key"),
        ({"answers": [{"question": "9.1", "ranking": []}]}, "does not fit the key"),
        (b"[" * 100_000, "not JSON that can be read"),
        (b"", "not JSON that can be read"),
        (b"\xff\xfe{", "not in UTF-8"),
    ],
)
def test_answers_that_are_none(study: Path, content: Any, message: str):
    file = study / "answers" / "a.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(ValueError, match=message) as error:
        analyse(study / "answers", study / "key.json")
    assert str(file) in str(error.value)


def test_a_picture_is_ranked_once_and_a_question_answered_once(study: Path):
    (first, *_) = answers = answers_of(study, SETUPS)
    repeated = {**first, "ranking": [*first["ranking"], *first["ranking"][:2]]}
    for content, message in (([repeated], "does not fit the key"), ([*answers, first], "answers '1.1' twice")):
        (study / "answers" / "a.json").write_text(json.dumps({"answers": content}))
        with pytest.raises(ValueError, match=message):
            analyse(study / "answers", study / "key.json")


def test_each_participant_counts_once(study: Path, caplog: pytest.LogCaptureFixture):
    answer_all(study, SETUPS, "form_01-ab", "abcd")
    answer_all(study, SETUPS, "form_01-ab (1)", "abcd")
    answer_all(study, SETUPS, "form_01-cd", "cdef")
    for name in ("old", "older"):
        answer_all(study, SETUPS, name)  # without a number: they may be two people
    assert analyse(study / "answers", study / "key.json").facts["Participants"] == "4"
    assert "form_01-ab.json is left out: it is a copy of" in caplog.text
    answer_all(study, SETUPS[::-1], "form_01-ab (2)", "abcd")
    with pytest.raises(ValueError, match=r"form_01-ab \(2\).json are of one participant and differ: keep the one"):
        analyse(study / "answers", study / "key.json")


def test_files_that_are_passed_over_are_named(study: Path, caplog: pytest.LogCaptureFixture):
    with pytest.raises(FileNotFoundError, match="holds no answers"):
        analyse(study / "answers", study / "key.json")
    answer_all(study, SETUPS, "a")
    (study / "answers" / "b.txt").write_text("{}")
    (study / "answers" / "._a.json").write_bytes(b"what macOS leaves")
    (study / "answers" / "c.json").write_text('{"person": "c", "answers": []}')
    assert analyse(study / "answers", study / "key.json").facts["Participants"] == "1"
    assert "passed over ._a.json, b.txt" in caplog.text
    assert "c.json holds no answer" in caplog.text


def test_files_with_a_byte_order_mark(study: Path):
    answer_all(study, SETUPS, "a")
    for file in (study / "answers" / "a.json", study / "key.json"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert analyse(study / "answers", study / "key.json").facts["Answers"] == "4"


def test_keys_that_are_none(study: Path):
    answer_all(study, SETUPS, "a")
    key, file = read_key(study / "key.json"), study / "other.json"
    question = key["questions"]["1.1"]
    for wrong in (
        {},
        {"setups": SETUPS},
        {"setups": 3, "questions": {}},
        {**key, "questions": []},
        {**key, "questions": {"1.1": {}}},
        {**key, "questions": {"one": question}},
        {**key, "questions": {"1.1": {**question, "kind": ["image"]}}},
        {**key, "questions": {"1.1": {**question, "pictures": {"a.png": "unheard_of"}}}},
    ):
        file.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r"other\.json is no key of a user study: give the key\.json"):
            analyse(study / "answers", file)
    file.write_text("")
    with pytest.raises(ValueError, match=r"other\.json is not JSON"):
        analyse(study / "answers", file)


# -- pages in a browser --------------------------------------------------------------------------------------------


def test_texts_cannot_end_the_script():
    for text in ("</script><b>", "<!--<script>"):
        html = page("form_01", [{"id": "1.1", "kind": "text", "text": text, "references": [], "pictures": []}])
        assert html.count("</script>") == html.count("<script>") == 1
        assert "<!--" not in html


FILL_IN = """
function fillIn() {
  while (document.querySelector("#next")) {
    document.querySelectorAll("button.picture").forEach(button => button.click());
    document.querySelector("#next").click();
  }
  return JSON.parse(document.querySelector("#answers").value);
}
window.confirm = () => true;
"""


def run_in(form: Path, home: Path, script: str) -> Any:
    """What `script`, which may call `fillIn`, gives on a form; the browser's storage is that of `home`."""
    changed = form.with_name("changed.html")
    script = f"<script>{FILL_IN}document.title = JSON.stringify({script});</script></body>"
    changed.write_text(form.read_text().replace("</body>", script))
    return json.loads(title_of(changed, home))


@needs_browser
def test_a_form_is_filled_in_in_a_browser(study: Path, pictures: Path, tmp_path: Path):
    saved = run_in(study / "pages" / "form_01.html", tmp_path, "fillIn()")
    (study / "answers" / "a.json").write_text(json.dumps(saved))
    records = read_answers(study / "answers", read_key(study / "key.json"))
    assert len(records) == 4 * len(SETUPS)
    assert len(saved["person"]) == 16
    # the same form once more: it is filled in, and a copy of it is of the same participant
    again, other = run_in(
        study / "pages" / "form_01.html", tmp_path, '[fillIn(), (document.querySelector("#again").click(), fillIn())]'
    )
    assert again == saved
    assert other["person"] != saved["person"]
    assert len(other["answers"]) == len(saved["answers"])
    (study / "answers" / "a (1).json").write_text(json.dumps(again))
    (study / "answers" / "b.json").write_text(json.dumps(other))
    assert analyse(study / "answers", study / "key.json").facts["Participants"] == "2"


@needs_browser
def test_a_form_with_a_strange_text_where_storage_is_blocked(pictures: Path, tmp_path: Path):
    for file in pictures.rglob("prompt.txt"):
        file.write_text("a <!--<script> b")
    (form,) = make_study(pictures, SETUPS, tmp_path / "study", forms=1, questions=4)
    blocked = """<script>Object.defineProperty(window, "localStorage", {
      get() { throw new DOMException("denied", "SecurityError"); }
    });</script><script>"""
    form.write_text(form.read_text().replace("<script>", blocked, 1))
    saved, texts = run_in(form, tmp_path, "[fillIn(), questions.map(question => question.text)]")
    assert len(saved["answers"]) == 4
    assert set(texts) == {"a <!--<script> b"}
