"""Ratings of pictures by any vision-language model behind an OpenAI-compatible endpoint, for DreamBench++.

The rubrics are written here, after what the benchmark says its ratings look at; figures from other rubrics or models
are close relatives of the published ones, not the same.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import logging
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from evaluation.cells import duration, write_json
from evaluation.dreambench_plus import HIGHEST, KINDS, Sample, category_of

log = logging.getLogger(__name__)

SIDE = 512  # pixels of the pictures that are sent
ATTEMPTS = 3
PAUSE = 5.0  # seconds before the second attempt; twice that before the third
GIVE_UP_AFTER = 5  # items in a row without a rating
# "Score: 3", "**Score (0-4):** 3", "score: good 3", but no "3.5"
REPLY = re.compile(r"\bscore\b[\s*_]*(?:\([^)]*\))?[\s*_]*:[\s*_]*(?:[a-z]+\s+)?(\d+)(?!\.?\d)", re.IGNORECASE)
REFUSALS = (401, 403, 404)  # key or address are wrong: asking again changes nothing
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


class Refused(ValueError):  # noqa: N818 - what the service did
    """The service knows neither the key nor the address."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where to ask: an OpenAI-compatible service.

    url: its base, such as "https://host/v1"; the path /chat/completions is added.
    key: sent as a bearer token if not empty; never written anywhere.
    """

    url: str
    model: str
    key: str = ""
    temperature: float = 1.0
    timeout: float = 120.0

    def ask(self, messages: Sequence[dict[str, Any]]) -> str:
        """The reply to a conversation.

        Raises `OSError` when the service does not answer as it should, and `Refused` when it never will.
        """
        body = {"model": self.model, "messages": list(messages), "temperature": self.temperature, "max_tokens": 512}
        address = self.url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
        if self.key:
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")  # for this host alone
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                answer = json.load(response)
            return str(answer["choices"][0]["message"]["content"])
        except urllib.error.HTTPError as error:
            said = error.read(300).decode(errors="replace")
            kind = Refused if error.code in REFUSALS else OSError
            raise kind(f"{self.url} answered {error.code}: {said}") from error
        except (json.JSONDecodeError, KeyError, IndexError, TypeError) as error:
            raise OSError(f"{self.url} gave no chat completion ({error})") from error


def messages_for(kind: str, sample: Sample) -> list[dict[str, Any]]:
    """The conversation that asks for a rating of kind "cp" or "pf"."""
    if kind == "cp":
        rubric = RUBRICS["style" if category_of(sample.collection) == "style" else "subject"]
        content = [picture_part(sample.reference), picture_part(sample.picture)]
    else:
        rubric = RUBRICS["text"]
        content = [{"type": "text", "text": f"Description: {sample.text}"}, picture_part(sample.picture)]
    return [
        {"role": "user", "content": rubric},
        {"role": "assistant", "content": ACKNOWLEDGEMENT},
        {"role": "user", "content": content},
    ]


def picture_part(path: Path) -> dict[str, Any]:
    """A picture as a part of a message: 512 x 512 pixels, within the message."""
    with Image.open(path) as image:
        small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    small.save(out, format="JPEG", quality=95)
    data = base64.b64encode(out.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}


def parse_score(reply: str) -> int:
    """The one score in a reply; raises `ValueError` when there is none, several, or one out of range."""
    scores = {int(found) for found in REPLY.findall(reply)}
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

    Each rating is a file `<out>/<kind>/full<n>/<method>-<collection>-<prompt>.json`; what is there is not asked again.
    Raises `Refused`, and `ConnectionError` after several failures in a row.
    """
    every = list(samples)
    jobs = [(kind, repeat, sample) for repeat in range(1, repeats + 1) for sample in every for kind in kinds]
    waiting = [(kind, sample, path) for kind, repeat, sample in jobs
               if not (path := rating_file(out, kind, repeat, method, sample)).is_file()]  # fmt: skip
    failed, in_a_row, began = 0, 0, time.monotonic()
    for number, (kind, sample, path) in enumerate(waiting, start=1):
        found = rate_one(kind, sample, endpoint, sleep)
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
            write_json(path, {**record, "score": score, "content": reply, "rater": endpoint.model})
        if number % 20 == 0 or number == len(waiting):
            left = (time.monotonic() - began) / number * (len(waiting) - number)
            log.info("%d of %d ratings, %d failed, about %s left", number, len(waiting), failed, duration(left))
    return failed


def rating_file(out: Path, kind: str, repeat: int, method: str, sample: Sample) -> Path:
    """Where a rating goes; the first repeat's folder is called "full", as published."""
    folder = "full" if repeat == 1 else f"full{repeat}"
    return out / kind / folder / f"{method}-{sample.collection}-{sample.prompt}.json"


def rate_one(kind: str, sample: Sample, endpoint: Endpoint, sleep: Callable[[float], None]) -> tuple[int, str] | None:
    """Score and reply for one sample; None after three attempts in vain."""
    messages = messages_for(kind, sample)
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
