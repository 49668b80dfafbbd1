"""The report page: complete, safe, and readable in a browser without scrolling sideways."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from evaluation.claims import Claim
from evaluation.experiments import Row, Table, read_table
from evaluation.figures import draw_sweep, spread, write_figure
from evaluation.gallery import Exhibit, Strip, strip_picture
from evaluation.report import to_html, write_report
from evaluation.results import TableResult, summarise
from evaluation.stats import FAILS, HOLDS, UNDECIDED
from evaluation.tables import to_markdown
from tests.browser import needs_browser, title_of

FIND = """<script>
const badges = [...document.querySelectorAll(".tile b")].map(tile => Number(tile.textContent));
document.title = JSON.stringify({
  width: document.documentElement.scrollWidth, window: window.innerWidth, badges,
  claims: document.querySelectorAll(".claims li").length,
  rows: document.querySelectorAll("table")[0].rows.length,
  broken: [...document.images].filter(image => !image.complete || !image.naturalWidth).length,
  images: document.images.length,
  top: document.querySelector(".summary").getBoundingClientRect().bottom,
});
</script></body>"""


@pytest.fixture(scope="module")
def result() -> TableResult:
    """Figure 10 with made-up results of six concepts that follow the published figures."""
    table = read_table("figure10")
    rng = np.random.default_rng(0)
    records = [
        {"row": row.name, "concept": concept, "seed": seed, "diversity": 0.3}
        | {metric: value + rng.normal(0, 0.01) for metric, value in row.published.items()}
        for row in table.rows
        for concept in "abcdef"
        for seed in (0, 1)
    ]
    facts = {"Model": "a <model> & more", "Command": "python scripts/reproduce_tables.py --table figure10"}
    return summarise(table, records, list("abcdef"), [0, 1], facts, len(records))


@pytest.fixture
def exhibit(tmp_path: Path) -> Exhibit:
    file = tmp_path / "a.png"
    Image.new("RGB", (32, 32), "red").save(file)
    strips = [Strip("training pictures", strip_picture([file] * 4), ("",) * 4)]
    strips += [
        Strip(f"row {k}", strip_picture([file] * 9), ("a photo of *",) * 4 + ("* at night",) * 5) for k in range(3)
    ]
    return Exhibit("cat", tuple(strips))


def test_figures_of_points_and_sweeps(result: TableResult, tmp_path: Path):
    points = write_figure(result, tmp_path / "points.png")
    assert points is not None
    with Image.open(points) as figure:
        assert figure.width > 1.5 * figure.height  # two panels
    sweep = read_table("figure12")
    records = [
        {"row": row.name, "concept": concept, "seed": 0, **row.published} for row in sweep.rows for concept in "ab"
    ]
    drawn = write_figure(summarise(sweep, records, ["a", "b"], [0], {}, 20), tmp_path / "sweep.png")
    assert drawn is not None
    assert drawn.stat().st_size > 10_000
    assert write_figure(summarise(sweep, [], ["a"], [0], {}, 1), tmp_path / "none.png") is None


def test_names_of_lines_that_nearly_meet_can_be_read(tmp_path: Path):
    sweep = read_table("figure12")
    near = {"image_only": 0.100, "prompt_only": 0.101, "short_captions": 0.102, "long_captions": 0.790}
    records = [
        {"row": row.name, "concept": "a", "seed": 0, "text": near.get(row.name, 0.3), "image": near.get(row.name, 0.8)}
        for row in sweep.rows
    ]
    figure = draw_sweep(summarise(sweep, records, ["a"], [0], {}, 1))
    figure.draw_without_rendering()
    for axis in figure.axes:
        boxes = sorted((text.get_window_extent() for text in axis.texts), key=lambda box: box.y0)
        assert len(boxes) == 4
        assert all(below.y1 <= above.y0 + 1 for below, above in zip(boxes, boxes[1:], strict=False))  # within a pixel
        assert all(box.x0 >= axis.get_window_extent().x1 for box in boxes)  # nothing is drawn over them


@given(st.lists(st.floats(0, 1), max_size=20))
def test_spread_places_keep_their_order_and_distance(places: list[float]):
    moved = spread(sorted(places), 0.05)
    assert all(after - before >= 0.05 - 1e-9 for before, after in zip(moved, moved[1:], strict=False))
    assert max(moved, default=1.0) <= 1.0
    if all(b - a > 0.05 for a, b in zip(sorted(places), sorted(places)[1:], strict=False)):
        assert moved == sorted(places)


def test_the_page_is_escaped_and_says_what_it_rests_on(result: TableResult):
    page = to_html(result)
    assert " Model: a &lt;model&gt; &amp; more." in page
    assert "Model:" not in to_html(dataclasses.replace(result, facts={}))
    assert "<model>" not in page
    assert "too narrow" not in page
    few = summarise(result.table, [r for r in result.cells if r["concept"] in "ab"], ["a", "b"], [0, 1], {}, 48)
    assert "With 2 concepts the intervals are too narrow" in to_html(few)
    assert "What the paper claims" in page
    table = Table("t", "<t>", "nobody", (Row("a", "<b>"),), claims=(Claim("<i>", "image(a) > 0"),))
    one = summarise(table, [{"row": "a", "concept": "x", "seed": 0, "image": 1.0}], ["x"], [0], {}, 1)
    assert "&lt;b&gt;" in to_html(one)
    for text in (to_html(one), to_markdown(one)):
        assert "No published figures: nobody." in text
        assert "What should hold" in text


@pytest.fixture(scope="module")
def by_concept() -> TableResult:
    """What words gain for four concepts; in one of them a word is worse than its initial word."""
    table = read_table("inversion")
    means = {"initial_word": (0.5, 0.30), "word": (0.7, 0.29), "real": (0.8, 0.2)}
    records = [
        {"row": row, "concept": c, "seed": s, "image": image, "text": text}
        for row, (image, text) in means.items()
        for c in "abcd"
        for s in (0, 1, 2)
    ]
    for record in records:
        if record["row"] == "word":
            record["image"] += 0.001 * record["seed"] - 0.25 * (record["concept"] == "d")
    return summarise(table, records, list("abcd"), [0, 1, 2], {}, len(records))


def test_a_claim_about_every_concept(by_concept: TableResult):
    first, second, third = by_concept.findings
    assert (first.verdict, first.concepts) == (FAILS, (3, 4))
    assert first.difference.mean == pytest.approx(-0.049)
    assert (third.verdict, third.concepts) == (HOLDS, (4, 4))
    assert second.concepts == (3, 4)
    better = summarise(by_concept.table, [r for r in by_concept.cells if r["concept"] != "d"], list("abc"), [0, 1, 2],
                       {}, 36)  # fmt: skip
    assert better.findings[0].concepts == (3, 3)
    assert better.findings[0].verdict == HOLDS
    missing = summarise(by_concept.table, better.cells, list("abcd"), [0, 1, 2], {}, 36)
    assert missing.findings[0].concepts == (3, 3)
    assert missing.findings[0].verdict == UNDECIDED  # not every concept is there


def test_what_a_row_lacks_is_left_out_of_the_others_in_a_claim():
    claims = [{"says": "", "holds_if": "image(captions) < image(word)"}]
    rows = {"word": {}, "captions": {"source": "captions", "captions": "short"}}
    table = Table("t", "", "", tuple(Row(name, **row) for name, row in rows.items()),
                  claims=tuple(Claim(**claim) for claim in claims))  # fmt: skip
    level = dict(zip("abcdefghij", np.linspace(0.3, 0.8, 10), strict=True))  # those with captions are the easy ones
    records = [{"row": "word", "concept": c, "seed": s, "image": level[c] + 0.01 * s} for c in level for s in (0, 1)]
    records += [{**r, "row": "captions", "image": r["image"] - 0.1} for r in records if r["concept"] in "fghij"]
    (finding,) = summarise(table, records, list(level), [0, 1], {}, 30).findings
    assert finding.difference.mean == pytest.approx(0.1)
    assert (finding.verdict, finding.concepts) == (HOLDS, (5, 5))


def test_measures_and_concepts_are_shown(by_concept: TableResult):
    says = "Share of the gap that is closed"
    assert by_concept.measures[says].mean == pytest.approx((0.201 * 3 - 0.049) / 4 / 0.3)
    assert [line[says] for line in by_concept.concepts] == pytest.approx([0.201 / 0.3] * 3 + [-0.049 / 0.3])
    markdown, page = to_markdown(by_concept), to_html(by_concept)
    assert f"- {says}: **0.462 [" in markdown
    assert "3 of 4" in markdown
    assert "| a | 0.500 | 0.701 | 0.800 | 0.300 |" in markdown
    assert "3 of 4 concepts" in page
    assert "By concept" in page


@needs_browser
@pytest.mark.parametrize("width", [1100, 520])
def test_the_page_in_a_browser(result: TableResult, exhibit: Exhibit, width: int, tmp_path: Path):
    page = write_report(result, tmp_path / "report.html", write_figure(result, tmp_path / "figure.png"), [exhibit])
    page.write_text(page.read_text().replace("</body>", FIND))
    found = json.loads(title_of(page, tmp_path, width))
    assert found["width"] <= found["window"]
    assert found["broken"] == 0
    assert found["images"] == 1 + 4
    assert found["claims"] == sum(found["badges"]) == len(result.table.claims)
    assert found["rows"] == 1 + len(result.table.rows)
    assert found["top"] < 400  # the verdicts are in sight at once
