"""Checkpoint files: every format and layout is read, saving never leaves half a file."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ldm.checkpoint import (
    atomic_path,
    load_weights,
    read_state_dict,
    save_safely,
    save_safetensors,
)
from ldm.checkpoint_save import SaveError
from tests.checkpoint_files import WRITERS, assert_same, make_net, write

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


@pytest.mark.parametrize("writer", WRITERS)
def test_reads_every_dtype_layout_and_nesting(tmp_path: Path, writer: str):
    tensors = {f"{dtype}": (torch.arange(6).reshape(2, 3) % 2).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 3), "big": torch.randn(1500, 1700)}
    for name in ("flat.anything", "nested.ckpt"):
        more = {"global_step": 7} if name.startswith("nested") else {}
        assert_same(read_state_dict(write(tmp_path / name, tensors, writer, **more)), tensors)


@pytest.mark.parametrize("writer", ["zip", "legacy"])
def test_reads_views_and_shared_storage(tmp_path: Path, writer: str):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "base": base,
        "transposed": base.T,
        "row": base[2],
        "step": base[::2, 1::2],
        "wide": base[:1].expand(3, 6),
    }
    path = write(tmp_path / "views.pt", tensors, writer)
    assert_same(read_state_dict(path), tensors)
    assert_same(read_state_dict(path, dtype=torch.float16), {k: v.half() for k, v in tensors.items()})


def test_conversion_leaves_integers_alone(tmp_path: Path):
    tensors = {"w": torch.randn(5_000_000), "steps": torch.tensor(3)}
    read = read_state_dict(write(tmp_path / "a.ckpt", tensors), dtype=torch.bfloat16)
    assert torch.equal(read["w"], tensors["w"].bfloat16())
    assert read["steps"].dtype == torch.int64


def test_mapped_tensors_outlive_the_file_and_never_change_it(tmp_path: Path):
    path = write(tmp_path / "a.safetensors", {"w": torch.ones(4)}, "safetensors")
    before = path.read_bytes()
    read = read_state_dict(path)
    read["w"].add_(1)
    assert path.read_bytes() == before
    save_safetensors({"w": torch.zeros(4)}, path)
    assert read["w"].tolist() == [2.0] * 4


def test_reads_lightning_checkpoints_with_settings_and_optimiser(tmp_path: Path):
    from omegaconf import OmegaConf
    from pytorch_lightning.callbacks import ModelCheckpoint

    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters())
    net[0](torch.randn(3, 4)).sum().backward()
    optimizer.step()
    extra = {
        "callbacks": {ModelCheckpoint: {"best_model_score": torch.tensor(1.0), "best_model_path": "x"}},
        "optimizer_states": [optimizer.state_dict()],
        "hyper_parameters": OmegaConf.create({"a": {"b": [1, 2.0, None]}}),
        "args": Namespace(lr=1.0, path=Path("somewhere")),
        "score": np.float64(0.5),
        "array": np.arange(3),
        "counts": OrderedDict(a={1, 2}, b=frozenset({3}), c=b"bytes", d=torch.Size([1, 2])),
        "global_step": 470_000,
    }
    for writer in ("zip", "legacy"):
        path = write(tmp_path / f"{writer}.ckpt", net.state_dict(), writer, **extra)
        assert_same(read_state_dict(path), net.state_dict())
        assert load_weights(make_net(), path).global_step == 470_000


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_every_pickle_protocol(tmp_path: Path, protocol: int):
    torch.save({"state_dict": make_net().state_dict()}, tmp_path / "a.pt", pickle_protocol=protocol)
    assert_same(read_state_dict(tmp_path / "a.pt"), make_net().state_dict())


def test_reads_parameters_and_float8(tmp_path: Path):
    tensors = {"p": nn.Parameter(torch.ones(2)), "f8": torch.ones(3).to(torch.float8_e4m3fn)}
    for writer in ("zip", "safetensors"):
        read = read_state_dict(write(tmp_path / writer, tensors, writer))
        assert read["p"].tolist() == [1, 1]
        assert not read["p"].requires_grad
        assert read["f8"].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("save", [save_safely, save_safetensors])
def test_saving_replaces_the_file_at_once(tmp_path: Path, save: Any):
    path = tmp_path / "new" / "a.pt"
    save({"w": torch.ones(2)}, path)
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # not private
    path.chmod(0o640)
    link = tmp_path / "link.pt"
    link.symlink_to(path)
    save({"w": torch.zeros(2)}, link)
    assert link.is_symlink()
    assert read_state_dict(path)["w"].tolist() == [0, 0]
    assert path.stat().st_mode & 0o777 == 0o640
    assert [p.name for p in path.parent.iterdir()] == ["a.pt"]


def test_shared_and_strided_tensors_save_as_safetensors(tmp_path: Path):
    base = torch.arange(6.0).reshape(2, 3)
    tensors = {"a": base, "b": base, "c": base.T, "d": base[1]}
    save_safetensors(tensors, tmp_path / "a.safetensors", {"made": "here"})
    assert_same(read_state_dict(tmp_path / "a.safetensors"), tensors)


def test_a_block_that_fails_leaves_the_earlier_file(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("new")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


FULL_DISK = """
import resource, signal, sys, torch
from ldm.checkpoint import save_safely, save_safetensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # every write past 100 kB fails as on a full disk
for save in (save_safely, save_safetensors):
    for size in (26_000, 1_000_000):
        try:
            save({"w": torch.ones(size)}, sys.argv[1])
        except ValueError as error:
            print(f"{type(error).__name__}: {error}")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_full_disk_leaves_the_earlier_file_and_says_so(tmp_path: Path):
    path = tmp_path / "last.ckpt"
    save_safely({"w": torch.full((3,), 7.0)}, path)
    command = [sys.executable, "-c", FULL_DISK, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stderr
    for line in lines:
        assert line.startswith(f"SaveError: could not write {path}: the disk is full")
        assert line.endswith("the earlier file is intact")
    assert read_state_dict(path)["w"].tolist() == [7.0] * 3
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("save", [save_safely, save_safetensors])
def test_a_disk_that_is_really_full(tmp_path: Path, save: Any):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        path = tmp_path / "a.pt"
        save({"w": torch.ones(10)}, path)
        before = path.read_bytes()
        with pytest.raises(SaveError, match="the disk is full .*; the earlier file is intact"):
            save({"w": torch.ones(100_000)}, path)
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_place_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SaveError, match="could not write .*file/a.pt"):
        save_safely({}, tmp_path / "file" / "a.pt")


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(4)
        self.weight = torch.nn.Parameter(torch.randn(3, 4))
        self.sizes, self.names = [1, 2], ["a", "b"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) @ self.weight.T


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("traced", [False, True])
def test_weights_of_torchscript_programs_are_read_without_their_code(tmp_path: Path, traced: bool):
    model = torch.nn.Sequential(Block(), torch.nn.BatchNorm1d(3)).eval()
    program = torch.jit.trace(model, torch.randn(2, 4)) if traced else torch.jit.script(model)
    torch.jit.save(program, str(tmp_path / "model.pt"))
    read, expected = read_state_dict(tmp_path / "model.pt"), model.state_dict()
    assert sorted(read) == sorted(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(read[name], tensor, rtol=0, atol=0)
