"""Ratings of pictures by any vision-language model behind an OpenAI-compatible endpoint, for DreamBench++.

The rubrics are written here, after what the benchmark says its ratings look at; figures from other rubrics or models
are close relatives of the published ones, not the same.
"""

from __future__ import annotations

import base64
import io
import logging
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from evaluation.cells import digest, duration, write_json
from evaluation.clean_pictures import clean_picture
from evaluation.dreambench_plus import HIGHEST, KINDS, SAMPLE_HASH, Sample, category_of
from evaluation.endpoint import Endpoint, Refused
from evaluation.text_files import read_object

log = logging.getLogger(__name__)

SIDE = 512  # pixels of the pictures that are sent
ATTEMPTS = 3
PAUSE = 5.0  # seconds before the second attempt; twice that before the third
GIVE_UP_AFTER = 5  # items in a row without a rating
# What follows "Score:", "**Score (0-4):**", '{"score":' and the like, up to the end of the line
STATED = re.compile(r"\bscore\b[\s*_\"'`]*(?:\([^)\n]{0,40}\)[\s*_]*)?:[\s*_]*([^\n]*)", re.IGNORECASE)
MARKUP = re.compile(r"[*_`\"'“”‘’\[\]{}]")
# "3", "3.0", "good 3", "3/4", "3 out of 4", but no part of another number ("3/10", "33") and no "3 or ...", "3+"
VALUE = re.compile(
    r"\(?(?:(?:excellent|good|fair|very\s+poor|poor)\s+(?:[-–—(]\s*)?)?"
    r"(\d)(?:\.0+)?(?:\s*\(?(?:/|out\s+of\b|of\b)\s*4(?:\.0+)?(?![.,]?\d)\)?)?"
    r"(?!\w|\s*(?:[%+~/½¼¾]|(?:to|and|point|out|of)\b)|[\s,;(–—-]*or\b)",
    re.IGNORECASE,
)
# A number after it is no second score where it counts something ("of 1 leg", "no 2nd arm"; not "or 4", "is 4 and")
COUNT = re.compile(
    r"\b(?!(?:or|to|than|maybe|perhaps|possibly|almost|nearly|score|rating)\b)[a-z]+\s+\d+"
    r"(?:(?:st|nd|rd|th)\b|(?=-?\s*(?!(?:or|to|and|of|out|for|in|if|is|but|overall|points?|stars?)\b)[a-z]))",
    re.IGNORECASE,
)
SCALE = """\
Give one whole number:
4 - excellent
3 - good
2 - fair
1 - poor
0 - very poor"""
RUBRICS = {
    "subject": f"""\
You will see two pictures: first a reference picture of a subject, then a picture that a program drew of what should be
the same subject, perhaps somewhere else, doing something else, or drawn in another manner. Judge only how well the
subject itself was preserved; do not judge background, pose, manner of drawing or beauty. Look at four things:
shape - outline, proportions and parts are those of the reference;
colour - the subject's own colours, where the picture's manner does not ask for others;
texture - surface, pattern and material;
face - for people and animals, the features of the face and the expression they give.
{SCALE}
End with a line of the form "Score: N" and write nothing after it.""",
    "style": f"""\
You will see two pictures: first a reference picture that shows a style, then a picture that a program drew of something
else in what should be the same style. Judge only how well the style was preserved, not what is shown. Look at three
things:
colour - palette, tones and contrast;
stroke - line, brushwork, texture and material;
manner - how things are simplified, shaded and composed.
{SCALE}
End with a line of the form "Score: N" and write nothing after it.""",
    "text": f"""\
You will see a description and a picture that a program drew of it. Judge only how well the picture follows the
description, not its beauty. Look at four things:
relevance - the picture shows what the description is about;
accuracy - named things, properties and numbers are right;
completeness - nothing that the description names is missing;
context - place, action, time and manner of drawing are as described.
Say in one or two sentences what fits and what does not.
{SCALE}
End with a line of the form "Score: N" and write nothing after it.""",
}
ACKNOWLEDGEMENT = "I will judge by these points alone and end with the line of the score."


def messages_for(kind: str, sample: Sample) -> list[dict[str, Any]]:
    """The conversation that asks for a rating of kind "cp" or "pf"."""
    if kind == "cp":
        content = [picture_part(sample.reference), picture_part(sample.picture)]
    else:
        content = [{"type": "text", "text": f"Description: {sample.text}"}, picture_part(sample.picture)]
    return [
        {"role": "user", "content": rubric_for(kind, sample)},
        {"role": "assistant", "content": ACKNOWLEDGEMENT},
        {"role": "user", "content": content},
    ]


def rubric_for(kind: str, sample: Sample) -> str:
    """By what a rating of kind "cp" or "pf" is given."""
    if kind == "pf":
        return RUBRICS["text"]
    return RUBRICS["style" if category_of(sample.collection) == "style" else "subject"]


def picture_part(path: Path) -> dict[str, Any]:
    """A picture, as training sees it, as a part of a message: 512 x 512 pixels, within the message."""
    small = clean_picture(path).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    small.save(out, format="JPEG", quality=95)
    data = base64.b64encode(out.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}


def parse_score(reply: str) -> int:
    """The one score in a reply.

    Raises `ValueError` when there is none, or several, or one out of range, or what is stated is no whole number.
    """
    scores = set()
    for stated in STATED.findall(reply):
        plain = MARKUP.sub("", stated)
        found = VALUE.match(plain)
        if found and not re.search(r"\d", COUNT.sub("", plain[found.end() :])):
            scores.add(int(found[1]))
        elif re.search(r"\d", plain):
            scores.add(-1)  # "3.5", "between 2 and 3", "below 2"
    if len(scores) != 1 or not 0 <= min(scores) <= HIGHEST:
        raise ValueError(f"the reply holds no single score from 0 to {HIGHEST}: {reply[-120:]!r}")
    return scores.pop()


def rate(
    samples: Iterable[Sample],
    endpoint: Endpoint,
    out: Path,
    kinds: Sequence[str] = KINDS,
    repeats: int = 3,
    method: str = "textual_inversion",
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Rate all samples, `repeats` times; returns how many items could not be rated.

    Each rating is a file `<out>/<kind>/full<n>/<method>-<collection>-<prompt>.json`; what is there is not asked again
    unless sample, rubric or rater are others. Raises `Refused`, and `ConnectionError` after several failures in a row.
    """
    every = list(samples)
    jobs = [(kind, sample, rating_file(out, kind, repeat, method, sample))
            for repeat in range(1, repeats + 1) for sample in every for kind in kinds]  # fmt: skip
    waiting = [(kind, sample, path) for kind, sample, path in jobs if not is_rated(path, kind, sample, endpoint.model)]
    if changed := sum(path.is_file() for _, _, path in waiting):
        log.warning("%d ratings in %s are of something else: other pictures, texts or rubrics, or another rater's. "
                    "They are asked for again and replaced", changed, out)  # fmt: skip
    failed, in_a_row, began = 0, 0, time.monotonic()
    for number, (kind, sample, path) in enumerate(waiting, start=1):
        try:
            rated, messages = what_is_rated(kind, sample, endpoint.model), messages_for(kind, sample)
        except (OSError, ValueError) as error:  # the sample's fault and not the service's: others may do
            log.error("%s of %s, prompt %d cannot be rated: %s", kind, sample.collection, sample.prompt, error)
            failed += 1
            continue
        found = rate_one(kind, sample, messages, endpoint, sleep)
        if found is None:
            failed, in_a_row = failed + 1, in_a_row + 1
            if in_a_row == GIVE_UP_AFTER:
                raise ConnectionError(
                    f"{in_a_row} ratings failed one after the other; what was rated before is in {out}"
                )
        else:
            in_a_row = 0
            score, reply = found
            record = {"method": method, "collection_id": sample.collection, "prompt_index": sample.prompt}
            write_json(path, {**record, "score": score, "content": reply, **rated})
        if number % 20 == 0 or number == len(waiting):
            left = (time.monotonic() - began) / number * (len(waiting) - number)
            log.info("%d of %d ratings, %d failed, about %s left", number, len(waiting), failed, duration(left))
    return failed


def rating_file(out: Path, kind: str, repeat: int, method: str, sample: Sample) -> Path:
    """Where a rating goes; the first repeat's folder is called "full", as published."""
    folder = "full" if repeat == 1 else f"full{repeat}"
    return out / kind / folder / f"{method}-{sample.collection}-{sample.prompt}.json"


def what_is_rated(kind: str, sample: Sample, rater: str) -> dict[str, str]:
    """All that a rating depends on, as its file says it."""
    return {"rater": rater, SAMPLE_HASH: sample.shown(kind), "rubric_hash": digest(rubric_for(kind, sample))}


def is_rated(path: Path, kind: str, sample: Sample, rater: str) -> bool:
    """Whether a file has a rating of just this. What it does not say, as published ones, counts as the same."""
    if not path.is_file():
        return False
    said = read_object(path)
    return all(said.get(name, value) == value for name, value in what_is_rated(kind, sample, rater).items())


def rate_one(
    kind: str, sample: Sample, messages: Sequence[dict[str, Any]], endpoint: Endpoint, sleep: Callable[[float], None]
) -> tuple[int, str] | None:
    """Score and reply for one sample; None after three attempts in vain."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            reply = endpoint.ask(messages)
            return parse_score(reply), reply
        except Refused:
            raise
        except (OSError, ValueError) as error:
            log.warning("%s of %s, prompt %d: %s", kind, sample.collection, sample.prompt, error)
            if isinstance(error, OSError) and attempt < ATTEMPTS:
                sleep(PAUSE * attempt)
    return None
