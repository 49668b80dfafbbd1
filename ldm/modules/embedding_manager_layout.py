"""Room for words of several vectors: where each position of an expanded row of token ids comes from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Where each position of an expanded token row comes from; all (B, L).

    ids: token ids with each placeholder once per active vector.
    source: position in the row before expansion.
    nth: which of the placeholder's vectors.
    """

    ids: Tensor
    source: Tensor
    nth: Tensor


def expanded(ids: Tensor, counts: Mapping[int, int], end_id: int | None) -> tuple[Layout, Tensor | None]:
    """Layout of token ids (B, L) in which each id of `counts` takes that many positions, and what is cut off for it.

    A row that becomes too long is cut at L, but keeps its first end token. The second part, bool (B, L), is true at
    the tokens before the end that lose positions; None where nothing can be too long or rows have no end token.
    """
    length = ids.shape[1]
    positions = torch.arange(length, device=ids.device).expand_as(ids).contiguous()  # (B, L)
    if all(count == 1 for count in counts.values()):
        return Layout(ids, positions, torch.zeros_like(ids)), None
    width = torch.ones_like(ids)  # positions that each token will take
    for token_id, count in counts.items():
        width = torch.where(ids == token_id, count, width)
    ends = width.cumsum(1)  # (B, L)
    starts = ends - width
    source = torch.searchsorted(ends, positions, right=True)  # (B, L)
    cut = None
    if end_id is not None:
        is_end = ids == end_id
        end = is_end.int().argmax(1, keepdim=True)  # (B, 1), the first end token
        lost = is_end.any(1, keepdim=True) & (starts.gather(1, end) >= length)
        source = torch.where(lost & (positions == length - 1), end, source)
        cut = lost & (positions < end) & (ends >= length)  # the last position is the end token's
    return Layout(ids.gather(1, source), source, positions - starts.gather(1, source)), cut
