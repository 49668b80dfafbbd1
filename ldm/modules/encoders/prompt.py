"""Prompts with weighted words, and prompts of any length, for every text conditioner; both only when asked for.

Weights: `(word:1.2)` by the number, `(word)` by 1.1, `[word]` by 1 / 1.1, nested ones multiply, `\\(` is a bracket of
the text. What a weighted token adds to the state of the empty prompt at its place is multiplied by its weight, which
suits any text model, whatever the mean and scale of its states are.

Length: the tokens are cut into chunks that are encoded one by one and joined: L, 2 L, 3 L, ... states.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.modules.encoders.text import PlaceholderEditor, TextConditioner, frame, split_at_placeholders, text_to_ids

STEP = 1.1  # weight of plain brackets
MAX_WEIGHT = 100.0
CLOSES = {")": ("(", STEP), "]": ("[", 1 / STEP)}  # partner and weight
_SYNTAX = re.compile(
    r"""\\(?P<escaped>[()\[\]\\])
    |(?P<open>[(\[])
    |:\s*(?P<number>[+-]?(?:\d+\.?\d*|\.\d+))\s*(?P<numbered>\))
    |(?P<close>[)\]])
    |(?P<text>[^\\()\[\]:]+|.)""",
    re.DOTALL | re.VERBOSE,
)

Manager = Callable[[Tensor, Tensor], Tensor] | None


@dataclasses.dataclass(frozen=True)
class PromptOptions:
    """How prompts are read; by default as plain text of at most the model's length."""

    weights: bool = False  # `(word:1.2)` and the like change how much words count
    long: bool = False  # as many chunks as the text needs, instead of cutting it off

    @property
    def plain(self) -> bool:
        """Whether a conditioner's own `encode` does it all."""
        return not (self.weights or self.long)


class Span(NamedTuple):
    """A stretch of text and how much it counts."""

    text: str
    weight: float


class Chunk(NamedTuple):
    """Token ids without start, end and padding, and the weight of each."""

    ids: list[int]
    weights: list[float]


def parse_weights(prompt: str, placeholders: Iterable[str] = ()) -> list[Span]:
    """The stretches of `prompt` with their weights, brackets removed; neighbours of one weight are joined.

    Brackets without a partner are text, and so is anything inside a placeholder. Raises `ValueError` for weights
    beyond +-100.
    """
    spans: list[list[Any]] = []  # [text, weight]
    opened: list[tuple[str, int]] = []  # bracket, index of the first span inside

    def close(bracket: str, factor: float) -> bool:
        if not opened or opened[-1][0] != bracket:
            return False
        start = opened.pop()[1]
        spans[start][0] = ""  # the bracket itself
        for span in spans[start:]:
            span[1] *= factor
        return True

    for piece in split_at_placeholders(prompt, placeholders):
        if piece.placeholder is not None:
            spans.append([piece.text, 1.0])
            continue
        for match in _SYNTAX.finditer(piece.text):
            kind = match.lastgroup
            if kind == "open":
                opened.append((match.group(), len(spans)))
            closing = ("(", float(match["number"])) if kind == "numbered" else CLOSES.get(match.group())
            if closing is not None and close(*closing):
                continue
            spans.append([match["escaped"] or match.group(), 1.0])
    return _joined(spans, prompt)


def _joined(spans: Iterable[Sequence[Any]], prompt: str) -> list[Span]:
    joined: list[Span] = []
    for text, weight in spans:
        if not text:
            continue
        if not abs(weight) <= MAX_WEIGHT:
            raise ValueError(f"{text!r} in {prompt!r} has the weight {weight:g}: give one within +-{MAX_WEIGHT:g}")
        if joined and joined[-1].weight == weight:
            joined[-1] = Span(joined[-1].text + text, weight)
        else:
            joined.append(Span(text, weight))
    return joined


def split_prompt(stage: TextConditioner, prompt: str, options: PromptOptions, manager: Manager = None) -> list[Chunk]:
    """The prompt's chunks, at least one; without `options.long` exactly one, of any length."""
    placeholders = _placeholders(manager)
    text = stage.tokenizer.clean(prompt)
    names = [stage.tokenizer.clean(name) for name in placeholders]
    spans = parse_weights(text, names) if options.weights else [Span(text, 1.0)]
    chunks = [Chunk([], [])]
    widths = _widths(placeholders, manager)
    used, room = 0, stage.max_length - 2
    for span in spans:
        for token_id in text_to_ids(stage.tokenizer, span.text, placeholders):
            width = widths.get(token_id, 1)
            if options.long and used + width > room and chunks[-1].ids:
                chunks.append(Chunk([], []))
                used = 0
            chunks[-1].ids.append(token_id)
            chunks[-1].weights.append(span.weight)
            used += width
    return chunks


def _placeholders(manager: Manager) -> Mapping[str, int]:
    return manager.placeholders if isinstance(manager, PlaceholderEditor) else {}


def _widths(placeholders: Mapping[str, int], manager: Any) -> dict[int, int]:
    """Positions that each placeholder's id takes, where that is not one."""
    active = getattr(manager, "active", None)
    return {} if active is None else {token_id: active(name) for name, token_id in placeholders.items()}


def encode_prompts(
    stage: Any, prompts: Sequence[str], options: PromptOptions, manager: Manager = None, min_chunks: int = 1
) -> Tensor:
    """Conditioning (B, K L, D) of `prompts`, K chunks of L states for each; shorter ones go on with empty chunks.

    K is the largest number of chunks among the prompts and `min_chunks`. Raises `ValueError` when `stage` is no text
    conditioner.
    """
    if not isinstance(stage, TextConditioner):
        raise ValueError(f"weights and long prompts need one of our text encoders, not {type(stage).__name__}")
    rows = [split_prompt(stage, prompt, options, manager) for prompt in prompts]
    count = max(min_chunks, *map(len, rows)) if rows else min_chunks
    chunks = [chunk for row in rows for chunk in (*row, *[Chunk([], [])] * (count - len(row)))]
    placeholders = _placeholders(manager)
    for prompt, row in zip(prompts, rows, strict=True):
        for chunk in row:
            stage.check_ids(chunk.ids, placeholders, prompt)
            stage.warn_if_long(chunk.ids, placeholders, prompt)
    ids = torch.tensor([frame(stage.tokenizer, chunk.ids, stage.max_length) for chunk in chunks])  # (B K, L)
    context = stage.encode(ids, manager)  # (B K, L, D)
    if any(weight != 1.0 for chunk in chunks for weight in chunk.weights):
        weights = torch.tensor([_frame_weights(chunk, stage.max_length) for chunk in chunks])  # (B K, L)
        layout = getattr(manager, "layout", None)
        if layout is not None:  # a placeholder's weight counts for all its vectors
            weights = weights.gather(1, layout(ids).source)
        empty = stage.encode([""], manager)  # (1, L, D)
        # written so that a weight of 1 changes no bit
        context = context + (weights.to(context) - 1).unsqueeze(-1) * (context - empty)
    return context.unflatten(0, (len(rows), count)).flatten(1, 2)  # (B, K L, D)


def _frame_weights(chunk: Chunk, length: int) -> list[float]:
    """Weights at the places where `frame` puts the tokens; 1 for start, end and padding."""
    weights = chunk.weights[: length - 2]
    return [1.0, *weights, *[1.0] * (length - 1 - len(weights))]
