"""Shared fixtures: reference numbers, deterministic threads."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run in two processes, each on its own core
os.environ.setdefault("LDM_TRUSTED_PACKAGES", "tests")  # configs of tests name classes of tests

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

DATA = Path(__file__).parent / "data"
GOLDEN = Path(os.environ.get("LDM_GOLDEN_DIR", DATA / "golden"))
END_TO_END = DATA / "end_to_end"


@dataclasses.dataclass(frozen=True)
class Golden:
    """One reference case: `meta` is its JSON, `tensors` everything stored, `sd` the module's state dict."""

    meta: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @property
    def sd(self) -> dict[str, torch.Tensor]:
        return {k[3:]: v for k, v in self.tensors.items() if k.startswith("sd.")}

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch on one thread: the same order of summation in every process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """Load a reference case by name."""

    def load(name: str) -> Golden:
        meta = json.loads((GOLDEN / f"{name}.json").read_text())
        path = GOLDEN / f"{name}.safetensors"
        return Golden(meta, load_file(path) if path.exists() else {})

    return load


def assert_close(actual: Any, expected: torch.Tensor, rel: float = 1e-5, name: str = "") -> None:
    """Assert that the largest difference is within `rel` of the largest expected magnitude (exact for integers)."""
    actual = torch.as_tensor(actual)
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)} != {tuple(expected.shape)}"
    if not expected.is_floating_point():
        assert torch.equal(actual.to(expected.dtype), expected), f"{name}: integers differ"
        return
    scale = expected.abs().max().clamp_min(1e-12)
    worst = ((actual.to(expected) - expected).abs().max() / scale).item()
    assert worst <= rel, f"{name}: relative difference {worst:.2e} > {rel:.0e}"
