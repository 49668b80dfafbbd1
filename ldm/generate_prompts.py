"""From prompts to the conditioning that a sampler takes: plain, weighted, or longer than the text model's length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ldm.modules.encoders import prompt as weighted
from ldm.modules.encoders.prompt import PromptOptions, split_prompt

if TYPE_CHECKING:
    from ldm.generate import SamplingOptions


def encode_prompts(model: Any, prompts: Sequence[str], options: SamplingOptions) -> tuple[Any, Any]:
    """Conditioning of the prompts, and of the negative prompt where guidance needs it (else None)."""
    how = prompt_options(options)
    chunks = max(chunk_counts(model, prompts, options), default=1)
    cond = _encode(model, prompts, how, chunks)
    if options.scale == 1.0:
        return cond, None
    return cond, _encode(model, [options.negative_prompt] * len(prompts), how, chunks)


def prompt_options(options: SamplingOptions) -> PromptOptions:
    """How the prompts are to be read."""
    return PromptOptions(options.prompt_weights, options.long_prompts)


def _encode(model: Any, prompts: Sequence[str], how: PromptOptions, chunks: int) -> Any:
    if how.plain:
        return model.get_learned_conditioning(list(prompts))
    distinct = list(dict.fromkeys(prompts))
    context: Tensor = weighted.encode_prompts(model.cond_stage_model, distinct, how, model.embedding_manager, chunks)
    return context[[distinct.index(text) for text in prompts]]  # (B, K L, D)


def chunk_counts(model: Any, prompts: Sequence[str], options: SamplingOptions) -> list[int]:
    """How many chunks of text each picture is drawn with: those of its prompt or of the negative one."""
    how = prompt_options(options)
    if not how.long:
        return [1] * len(prompts)

    def count(text: str) -> int:
        return len(split_prompt(model.cond_stage_model, text, how, model.embedding_manager))

    least = 1 if options.scale == 1.0 else count(options.negative_prompt)
    known = {text: max(least, count(text)) for text in set(prompts)}
    return [known[text] for text in prompts]


def batches(counts: Sequence[int], batch_size: int) -> Iterator[slice]:
    """Rows in order, `batch_size` at a time and never two different counts in one batch.

    A shorter prompt beside a longer one would have to be padded, and its picture would depend on its neighbours.
    """
    start = 0
    for _, group in groupby(counts):
        end = start + len(list(group))
        for begin in range(start, end, batch_size):
            yield slice(begin, min(begin + batch_size, end))
        start = end
