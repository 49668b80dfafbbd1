"""The user study: blind pages, answers, ranks; the report and the study's page in a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from evaluation.stats import HOLDS
from evaluation.user_study import analyse, make_study, read_answers
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


def answer_all(study: Path, order: list[str], person: str, form: str = "form_01") -> None:
    """Answers of somebody who always ranks the setups in `order`."""
    key = json.loads((study / "key.json").read_text())
    number = form.rpartition("_")[2].lstrip("0")
    answers = [
        {
            "question": name,
            "ranking": sorted(question["pictures"], key=lambda file: order.index(question["pictures"][file])),
            "seconds": 1.0,
        }
        for name, question in key["questions"].items()
        if name.startswith(f"{number}.")
    ]
    folder = study / "answers"
    folder.mkdir(exist_ok=True)
    (folder / f"{person}.json").write_text(json.dumps({"form": form, "answers": answers}))


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
    listed = [re.findall(r'"pictures": \[(.*?)\]', p.read_text()) for p in pages]
    places = set()
    for name, files in zip(key["questions"], sum(listed, []), strict=True):
        order = [key["questions"][name]["pictures"][file] for file in json.loads(f"[{files}]")]
        places.add(tuple(order))
    assert len(places) > 1  # the order differs between questions
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
    make_study(pictures, SETUPS, tmp_path / "study", forms=1)
    key = json.loads((tmp_path / "study" / "key.json").read_text())
    with pytest.raises(FileNotFoundError, match="holds no answers"):
        read_answers(tmp_path, key)
    (tmp_path / "a.json").write_text('{"answers": [{"question": "9.1", "ranking": []}]}')
    with pytest.raises(ValueError, match="does not fit the key"):
        read_answers(tmp_path, key)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match="no file of answers"):
        read_answers(tmp_path, key)


def test_texts_cannot_end_the_script():
    html = page("form_01", [{"id": "1.1", "kind": "text", "text": "</script><b>", "references": [], "pictures": []}])
    assert html.count("</script>") == 1


@needs_browser
def test_a_form_is_filled_in_in_a_browser(pictures: Path, tmp_path: Path):
    study = tmp_path / "study"
    (form,) = make_study(pictures, SETUPS, study, forms=1, questions=2)
    fill_in = """<script>
    while (document.querySelector("#next")) {
      document.querySelectorAll("button.picture").forEach(button => button.click());
      document.querySelector("#next").click();
    }
    document.title = document.querySelector("#answers").value;
    </script></body>"""
    form.write_text(form.read_text().replace("</body>", fill_in))
    (study / "answers").mkdir()
    (study / "answers" / "a.json").write_text(title_of(form, tmp_path))
    records = read_answers(study / "answers", json.loads((study / "key.json").read_text()))
    assert len(records) == 2 * len(SETUPS)
