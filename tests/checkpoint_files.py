"""Small checkpoint files for the tests, honest and hostile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.checkpoint import CheckpointError, read_state_dict, save_safetensors

WRITERS = ["zip", "legacy", "safetensors"]


def write(path: Path, tensors: dict[str, torch.Tensor], writer: str = "zip", **more: Any) -> Path:
    if writer == "safetensors":
        save_safetensors(tensors, path)
    else:
        content = {"state_dict": tensors, **more} if more else tensors
        torch.save(content, path, _use_new_zipfile_serialization=writer == "zip")
    return path


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Conv1d(8, 2, 1))


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(actual) == sorted(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def read_or_refuse(path: Path) -> dict[str, torch.Tensor]:
    """The file's tensors, or none when it is refused with a sentence that names it; nothing else may be raised."""
    try:
        return read_state_dict(path)
    except CheckpointError as error:
        if path.name not in str(error):
            raise
        return {}


class RunsCode:
    """Unpickling this object makes a folder."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]
