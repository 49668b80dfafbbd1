"""Random draws that depend on what is drawn for, not on what was drawn before."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def derive_seed(*parts: int) -> int:
    """Return a 63-bit seed that is a fixed function of non-negative integers such as (run seed, epoch, sample)."""
    words = np.random.SeedSequence([int(part) for part in parts]).generate_state(1, np.uint64)
    return int(words[0]) >> 1


@contextlib.contextmanager
def seeded(*parts: int) -> Iterator[None]:
    """Seed `random`, numpy and torch (its CPU generator) from `parts` inside the block; restore all three after it."""
    seed = derive_seed(*parts)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
