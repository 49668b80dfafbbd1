"""Concepts to learn: a few pictures, the word to start from, captions by people, and prompts of their own.

A concept is a folder of pictures; what else is known of it lies in its `concept.yaml`:

    init_word: teapot            # the coarse word that training starts from
    kind: object                 # or style
    name: teapot                 # what a judge that knows names would call it
    captions: {short: [...], long: [...]}
    prompts: ["* on the beach"]  # instead of those of the model, or one per line in prompts.txt
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.cells import digest, fingerprint
from evaluation.image_dirs import concept_folders
from evaluation.text_files import read_text
from ldm.data.personalized import find_images
from ldm.run import read_config
from ldm.util import ConfigError, did_you_mean, to_plain

WORD = "*"  # stands for the learned word in prompts
KINDS = ("object", "style")
FILE = "concept.yaml"
PROMPTS_FILE = "prompts.txt"


@dataclasses.dataclass(frozen=True)
class Concept:
    """A thing or style to learn.

    pictures: in the order in which training takes them.
    texts: what each of `prompts` is compared with; default: the prompt without the word.
    category: for averages by category.
    """

    label: str
    pictures: tuple[Path, ...]
    init_word: str | None = None
    kind: str = "object"
    name: str | None = None
    captions: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    category: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"concept '{self.label}': kind '{self.kind}' is neither {' nor '.join(KINDS)}")
        if self.texts and len(self.texts) != len(self.prompts):
            raise ConfigError(f"concept '{self.label}': {len(self.texts)} texts for {len(self.prompts)} prompts")

    def content(self, count: int | None = None) -> str:
        """Hash of the first `count` pictures' contents."""
        return digest([fingerprint(path) for path in self.pictures[:count]])


def read_concept(folder: str | Path, defaults: Mapping[str, Any] | None = None) -> Concept:
    """The concept in a folder; `defaults` for what its `concept.yaml` does not say."""
    folder = Path(folder)
    said = to_plain(read_config(folder / FILE)) if (folder / FILE).is_file() else {}
    known = [field.name for field in dataclasses.fields(Concept) if field.name not in ("label", "pictures")]
    for key in said:
        if key not in known:
            raise ConfigError(f"{folder / FILE}: unknown key '{key}'{did_you_mean(key, known)}")
    values = {**(defaults or {}), **said}
    if "prompts" not in said and (folder / PROMPTS_FILE).is_file():
        lines = read_text(folder / PROMPTS_FILE).splitlines()
        values["prompts"] = [line.strip().replace("{}", WORD) for line in lines if line.strip()]
    values |= {key: texts(values[key], f"{folder / FILE}: {key}") for key in ("prompts", "texts") if key in values}
    if "captions" in values:
        values["captions"] = checked_captions(values["captions"], f"{folder / FILE}: captions")
    word = values.get("init_word")
    if word is not None and not (isinstance(word, str) and word.strip()):
        raise ConfigError(f"{folder / FILE}: init_word should be a word in quotes to start from, not {word!r}")
    missing = [prompt for prompt in values.get("prompts", ()) if WORD not in prompt]
    if missing:
        raise ConfigError(f"concept '{folder.name}': the prompt '{missing[0]}' has no {WORD} for the word")
    return Concept(Path(os.path.abspath(folder)).name, tuple(find_images(folder)), **values)


def texts(values: Any, what: str) -> tuple[str, ...]:
    """A list of texts; anything else, such as a single text, is a `ConfigError`."""
    if not isinstance(values, list | tuple) or not all(isinstance(value, str) for value in values):
        raise ConfigError(f"{what} should be a list of texts, not {values!r}")
    return tuple(values)


def checked_captions(values: Any, what: str) -> dict[str, tuple[str, ...]]:
    """Lists of captions by their kind."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{what} should be like {{short: [a round teapot]}}, not {values!r}")
    return {str(kind): texts(captions, f"{what}: {kind}") for kind, captions in values.items()}


def read_concepts(
    folder: str | Path,
    names: Sequence[str] | None = None,
    init_words: Mapping[str, str] | None = None,
    kind: str | None = None,
) -> list[Concept]:
    """All concepts of a folder of folders (or those named), see `read_concept`.

    init_words: by folder name, where the folder does not say it itself. kind: where it does not, either.
    """
    words = init_words or {}
    common = {"kind": kind} if kind else {}
    return [
        read_concept(path, common | ({"init_word": words[path.name]} if path.name in words else {}))
        for path in concept_folders(folder, names)
    ]


def check_concepts(concepts: Iterable[Concept]) -> None:
    """Raise `ValueError` for two concepts of one name, and for none at all."""
    labels = [concept.label for concept in concepts]
    if not labels:
        raise ValueError("there is no concept to evaluate")
    twice = {label for label in labels if labels.count(label) > 1}
    if twice:
        raise ValueError(f"two concepts are called '{sorted(twice)[0]}'")
