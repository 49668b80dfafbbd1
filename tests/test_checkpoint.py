"""Checkpoint files: reading, loading, recognising and saving them; whatever else a file may be gets one sentence."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from ldm.checkpoint import (
    CheckpointError,
    atomic_path,
    load_model_from_config,
    load_weights,
    read_state_dict,
    recognise,
    save_safely,
    save_safetensors,
)
from ldm.checkpoint_pickle import MAX_PICKLE_BYTES
from ldm.checkpoint_save import SaveError
from ldm.modules.ema import LitEma
from tests.conftest import END_TO_END
from tests.test_manifests import CASES, MANIFESTS

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


# -- reading -------------------------------------------------------------------------------------------------------


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


# -- files that are no checkpoints ---------------------------------------------------------------------------------


def stranger(kind: str) -> bytes:
    """The bytes of a file that someone may take for a checkpoint."""
    zipped, unrelated = io.BytesIO(), io.BytesIO()
    torch.save({"w": torch.ones(1000)}, zipped)
    with zipfile.ZipFile(unrelated, "w") as archive:
        archive.writestr("notes.txt", "hello")
    contents = {
        "empty": b"",
        "text": b"prompt: a photo of *\n",
        "page": b"\n<!DOCTYPE html><html><body>Log in</body></html>",
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4265380512\n",
        "picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "zip": unrelated.getvalue(),
        "cut zip": zipped.getvalue()[:-500],
        "cut safetensors": struct.pack("<Q", 60)
        + b'{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}     '
        + bytes(8),
        "huge header": struct.pack("<Q", 1 << 60) + b"{" + bytes(100),
        "noise": bytes(range(255, 0, -1)) * 4,
        "plain pickle": pickle.dumps({"a": [1, 2]}),
        "cut pickle": pickle.dumps({"a": list(range(1000))})[:-20],
        "text pickle": b"cos\nsystem\n(S'mkdir hacked'\ntR.",
    }
    return contents[kind]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("empty", "is empty"),
        ("text", "is a text file (it begins 'prompt: a photo of *')"),
        ("page", "is a web page"),
        ("pointer", "git lfs pull"),
        ("picture", "is a PNG picture"),
        ("zip", "torch.save did not write"),
        ("cut zip", "is cut off or damaged"),
        ("cut safetensors", "is cut off"),
        ("huge header", "claims a header of"),
        ("noise", "neither a torch.save file nor safetensors"),
        ("plain pickle", "is a plain Python pickle"),
        ("cut pickle", "damaged or cut-off pickle"),
        ("text pickle", "would run code: it would call os.system"),
    ],
)
def test_strangers_get_one_sentence_with_the_file_name(tmp_path: Path, kind: str, words: str):
    path = tmp_path / "model.ckpt"
    path.write_bytes(stranger(kind))
    for use in (read_state_dict, recognise, lambda p: load_weights(make_net(), p)):
        with pytest.raises(CheckpointError) as caught:
            use(path)
        message = str(caught.value)
        assert words in message
        assert "model.ckpt" in message
        assert "\n" not in message


def test_missing_files_and_folders(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nowhere.ckpt"):
        read_state_dict(tmp_path / "nowhere.ckpt")
    (tmp_path / "a.ckpt").touch()
    with pytest.raises(CheckpointError, match="a folder; name the file: a.ckpt"):
        read_state_dict(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="diffusers folder"):
        read_state_dict(tmp_path)
    assert "diffusers folder" in recognise(tmp_path).sentence


def payloads(folder: Path) -> list[RunsCode]:
    target = str(folder / "hacked")
    return [
        RunsCode(os.mkdir, target),
        RunsCode(os.system, f"mkdir {target}"),
        RunsCode(eval, f"__import__('os').mkdir({target!r})"),
        RunsCode(exec, f"import os; os.mkdir({target!r})"),
        RunsCode(subprocess.Popen, ["mkdir", target]),
        RunsCode(torch.save, 1, target),
        RunsCode(getattr, Path, "mkdir"),
        RunsCode(Path(target).mkdir),
    ]


@pytest.mark.parametrize("writer", ["zip", "legacy"])
@pytest.mark.parametrize("which", range(8))
@pytest.mark.parametrize("place", ["top", "beside", "key"])
def test_code_in_a_pickle_is_refused_by_name_and_never_runs(tmp_path: Path, writer: str, which: int, place: str):
    payload = payloads(tmp_path)[which]
    content: Any = {
        "top": payload,
        "beside": {"state_dict": {"w": torch.ones(2)}, "extra": [payload]},
        "key": {"state_dict": {"w": torch.ones(2), (1, payload): 2}},
    }[place]
    path = tmp_path / "model.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=writer == "zip")
    with pytest.raises(CheckpointError, match=r"model.ckpt is a pickle that would run code: it would call \S+ when"):
        read_state_dict(path)
    assert not (tmp_path / "hacked").exists()


@given(data=st.data())
@FUZZ
def test_random_pickles_never_run_and_always_end_in_a_sentence(tmp_path: Path, data: st.DataObject):
    leaves = st.none() | st.integers() | st.floats() | st.text() | st.binary() | st.sampled_from(payloads(tmp_path))
    tree = st.recursive(
        leaves, lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner), max_leaves=20
    )
    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps(data.draw(tree), protocol=data.draw(st.integers(0, 5))))
    with pytest.raises(CheckpointError, match=r"model\.pt"):
        read_state_dict(path)
    assert not (tmp_path / "hacked").exists()


@pytest.fixture(scope="module", params=WRITERS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = write(tmp_path_factory.mktemp("whole") / "a", make_net().state_dict(), request.param)
    return path.read_bytes()


@given(cut=st.floats(0, 1, exclude_max=True))
@FUZZ
def test_cut_off_anywhere(tmp_path: Path, whole: bytes, cut: float):
    path = tmp_path / "model.ckpt"
    path.write_bytes(whole[: int(len(whole) * cut)])
    with pytest.raises(CheckpointError, match=r"model\.ckpt"):
        read_state_dict(path)


@given(start=st.floats(0, 1, exclude_max=True), noise=st.binary(min_size=1, max_size=40))
@FUZZ
def test_damaged_anywhere(tmp_path: Path, whole: bytes, start: float, noise: bytes):
    """Damage gives a sentence or, within the numbers or names, other tensors; never another error."""
    begin = int(len(whole) * start)
    path = tmp_path / "model.ckpt"
    path.write_bytes(whole[:begin] + noise + whole[begin + len(noise) :])
    for tensor in read_or_refuse(path).values():
        assert tensor.float().sum() is not None  # every byte that the tensor claims is there


@given(
    noise=st.binary(max_size=300), head=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", struct.pack("<Q", 40) + b"{"])
)
@FUZZ
def test_random_bytes(tmp_path: Path, noise: bytes, head: bytes):
    path = tmp_path / "model.safetensors"
    path.write_bytes(head + noise)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_state_dict(path)


@given(
    shape=st.lists(st.integers(-1, 1 << 70), max_size=3),
    begin=st.integers(-1, 1 << 70),
    end=st.integers(-1, 1 << 70),
    dtype=st.sampled_from(["F32", "F16", "F99", 4, None]),
)
@FUZZ
def test_safetensors_headers_that_claim_anything(tmp_path: Path, shape: list[int], begin: int, end: int, dtype: Any):
    header = json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    for tensor in read_or_refuse(path).values():
        assert tensor.numel() * tensor.element_size() == end - begin <= 64


def tensor_pickle(numel: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """A torch.save archive of one 16-byte storage whose index claims what the arguments say."""

    storage = object()

    class Writer(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if obj is storage else None

    index = io.BytesIO()
    rebuild = RunsCode(torch._utils._rebuild_tensor_v2, storage, offset, shape, stride, False, OrderedDict())
    Writer(index, protocol=2).dump({"w": rebuild})
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", index.getvalue())
        file.writestr("archive/data/0", np.arange(4, dtype=np.float32).tobytes())
    return archive.getvalue()


@pytest.mark.parametrize(
    ("numel", "offset", "shape", "stride"),
    [
        (1 << 50, 0, (4,), (1,)),
        (4, 0, (5,), (1,)),
        (4, 1, (4,), (1,)),
        (4, 1 << 60, (1,), (1,)),
        (4, 0, (2, 2), (4, 1)),
        (4, 0, (-4,), (1,)),
        (4, 0, (4,), (-1,)),
        (4, -1, (4,), (1,)),
        (4, 0, (1 << 40,), (0,)),
        (4, 0, (2, 2), (1,)),
        (4, 0, (4.0,), (1,)),
    ],
)
def test_index_that_points_outside_its_numbers(tmp_path: Path, numel: int, offset: int, shape: Any, stride: Any):
    path = tmp_path / "model.pt"
    path.write_bytes(tensor_pickle(4, 0, (2, 2), (2, 1)))
    assert read_state_dict(path)["w"].tolist() == [[0, 1], [2, 3]]
    path.write_bytes(tensor_pickle(numel, offset, shape, stride))
    with pytest.raises(CheckpointError, match=r"model\.pt is damaged"):
        read_state_dict(path)


@pytest.mark.parametrize(
    "index",
    [
        b"\x80\x02" + b"N" + b"\x85" * 200_000 + b"K\x01\x86.",  # deep nesting
        b"\x80\x02}(" + b"N" + b"\x85" * 200_000 + b"K\x01u.",  # a deep tuple as a dict key
        b"\x80\x02Nr\xff\xff\xff\x7f.",  # a memo slot of two billion
        b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"a.",  # a string of exabytes
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
        b"\x80\x02" + b"(" * 100_000 + b".",
        b"\x80\x02]q\x00h\x00a.",  # a list that holds itself
        b"\x80\x02\x82\x01.",
        b"\x80\x02" + b"0" * 10 + b".",
    ],
)
def test_pickles_made_to_exhaust_or_confuse(tmp_path: Path, index: bytes):
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", index)
    for content in (path.read_bytes(), index):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model\.pt"):
            read_state_dict(path)


def test_compressed_foreign_and_oversized_archives(tmp_path: Path):
    path = tmp_path / "model.pt"
    good = tensor_pickle(4, 0, (4,), (1,))
    with zipfile.ZipFile(io.BytesIO(good)) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(CheckpointError, match="packed again"):
        read_state_dict(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"")
        archive.writestr("a/constants.pkl", b"")
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_state_dict(path)
    with zipfile.ZipFile(path, "w") as archive, archive.open("a/data.pkl", "w") as index:
        for _ in range(MAX_PICKLE_BYTES // (1 << 20) + 1):
            index.write(bytes(1 << 20))
    with pytest.raises(CheckpointError, match="data.pkl takes"):
        read_state_dict(path)


# -- loading into modules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_fills_real_and_meta_modules(tmp_path: Path, writer: str, device: str, dtype: torch.dtype | None):
    source = make_net().requires_grad_(False)
    source[0].weight.requires_grad_(True)
    path = write(tmp_path / "a.ckpt", source.state_dict(), writer)
    torch.manual_seed(1)
    with torch.device(device):
        net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Conv1d(8, 2, 1)).requires_grad_(False)
    net[0].weight.requires_grad_(True)
    report = load_weights(net, path, dtype=dtype, strict=True)
    assert len(report.loaded) == len(source.state_dict())
    assert not report.missing
    expected = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in source.state_dict().items()}
    assert_same(net.state_dict(), expected)
    assert [p.requires_grad for p in net.parameters()] == [p.requires_grad for p in source.parameters()]
    assert (net[0].weight.data_ptr() % 2) == 0
    net[0].weight.data.zero_()
    assert_same(read_state_dict(path), source.state_dict())


def test_a_half_precision_file_fills_a_float32_module_in_float32(tmp_path: Path):
    path = write(tmp_path / "a.ckpt", {k: v.half() for k, v in nn.Linear(4, 4).state_dict().items()})
    with torch.device("meta"):
        net = nn.Linear(4, 4)
        holder = nn.Sequential(net)
    load_weights(holder, write(tmp_path / "b.ckpt", {f"0.{k}": v for k, v in read_state_dict(path).items()}))
    assert holder[0].weight.dtype == torch.float32


def test_report_says_what_was_missing_and_left_over(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    state = make_net().state_dict()
    state["extra.weight"] = state.pop("2.bias")
    state["0.position_ids"] = torch.arange(3)
    state["betas"] = torch.zeros(3)
    path = write(tmp_path / "a.ckpt", state)
    with caplog.at_level(logging.INFO):
        report = load_weights(make_net(), path)
    assert report.missing == ["2.bias"]
    assert report.unexpected == ["extra.weight"]
    assert report.ignored == ["0.position_ids", "betas"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == str(report)
    assert "a.ckpt" in line
    assert "1 missing from the file (2.bias)" in line
    with pytest.raises(CheckpointError, match=r"1 keys are missing \(2.bias\), 1 left over"):
        load_weights(make_net(), path, strict=True)


def test_prefix_and_ignored_keys(tmp_path: Path):
    state = {f"first_stage_model.{k}": v for k, v in make_net().state_dict().items()}
    path = write(tmp_path / "a.ckpt", {**state, "model.w": torch.ones(1)})
    with pytest.raises(CheckpointError, match="none of its keys fits"):
        load_weights(make_net(), path)
    net = make_net()
    before = net[0].weight.detach().clone()
    net[0].weight.data += 1
    report = load_weights(net, path, prefix="first_stage_model.", ignore_keys=["first_stage_model.0"])
    assert report.unexpected == []
    assert set(report.missing) == {"0.weight", "0.bias"}
    assert torch.equal(net[0].weight, before + 1)


def test_a_wrong_file_leaves_the_module_as_it_was(tmp_path: Path):
    state = make_net().state_dict()
    state["0.weight"] += 1
    state["2.weight"] = torch.ones(7, 7, 1)
    net = make_net()
    with pytest.raises(
        CheckpointError, match=r"does not fit Sequential: 1 tensors differ in shape.*\(7, 7, 1\) in the"
    ):
        load_weights(net, write(tmp_path / "a.ckpt", state))
    assert_same(net.state_dict(), make_net().state_dict())


def test_tensors_with_two_names_load_from_either(tmp_path: Path):
    def shared() -> nn.ModuleDict:
        part = nn.Linear(3, 3)
        return nn.ModuleDict({"first_stage_model": part, "cond_stage_model": part})

    source = shared()
    both = source.state_dict()
    one = {k: v for k, v in both.items() if k.startswith("first")}
    for state in (both, one):
        with torch.device("meta"):
            net = shared()
        report = load_weights(net, write(tmp_path / "a.ckpt", state))
        assert not report.missing
        assert not report.unexpected
        assert_same(net.state_dict(), both)
        assert net["first_stage_model"].weight is net["cond_stage_model"].weight


class Averaged(nn.Module):
    """A model with averaged weights, as published ones are laid out."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"diffusion_model": nn.Sequential(nn.Linear(3, 3))})
        self.model_ema = LitEma(self.model)


def test_averaged_weights(tmp_path: Path):
    source = Averaged()
    source.model_ema.diffusion_model0weight.fill_(5.0)
    path = write(tmp_path / "ema.ckpt", source.state_dict())
    net = Averaged()
    load_weights(net, path)
    assert_same(net.state_dict(), source.state_dict())
    load_weights(net, path, use_ema_weights=True)
    assert (net.model["diffusion_model"][0].weight == 5).all()

    plain = write(tmp_path / "plain.ckpt", {k: v for k, v in source.state_dict().items() if "ema" not in k})
    with torch.device("meta"):
        net = Averaged()
    load_weights(net, plain)
    assert torch.equal(net.model_ema.diffusion_model0weight, source.model["diffusion_model"][0].weight)
    assert net.model_ema.diffusion_model0weight is not net.model["diffusion_model"][0].weight
    with pytest.raises(CheckpointError, match=r"plain.ckpt holds no averaged weights"):
        load_weights(Averaged(), plain, use_ema_weights=True)


def test_linear_layers_and_1x1_convolutions_exchange_weights(tmp_path: Path):
    source = nn.Sequential(nn.Linear(3, 5))
    net = nn.Sequential(nn.Conv2d(3, 5, 1))
    load_weights(net, write(tmp_path / "a.ckpt", source.state_dict()))
    assert torch.equal(net[0].weight[:, :, 0, 0], source[0].weight)


# -- models from configs -------------------------------------------------------------------------------------------


TINY = END_TO_END / "tiny_ldm.safetensors"


@pytest.fixture
def tiny() -> dict[str, Any]:
    """Config of the tiny latent diffusion model whose weights are among the tests' data."""
    config = json.loads((END_TO_END / "run_1vec.json").read_text())["config"]
    config["params"]["cond_stage_config"]["params"]["vocab_file"] = str(END_TO_END / "vocab.txt")
    config["params"]["first_stage_config"]["params"]["ckpt_path"] = "models/first_stage_models/kl-f8/model.ckpt"
    return config


@pytest.fixture(params=[1 << 17, 100])
def deferred(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model has no parameter that is large enough to wait for the file; lower the limit as well."""
    monkeypatch.setattr("ldm.checkpoint.DEFERRED_NUMEL", request.param)


@pytest.mark.usefixtures("deferred")
def test_builds_the_configured_model_around_the_files_weights(tiny: dict[str, Any]):
    model = load_model_from_config({"model": tiny}, TINY)
    assert not model.training
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    expected = read_state_dict(TINY)
    actual = model.state_dict()
    assert set(expected) - set(actual) <= {k for k in expected if k.endswith("position_ids")}
    for key, tensor in actual.items():
        if key in expected:
            assert torch.equal(tensor, expected[key]), key
    # The learned word starts from the loaded table, and what is computed was computed.
    word = next(iter(model.embedding_manager.parameters()))
    table = expected["cond_stage_model.transformer.token_emb.weight"]
    assert (word == table).all(-1).any()
    assert (model.lvlb_weights.isfinite() & (model.lvlb_weights > 0)).all()
    assert model.alphas_cumprod[0] == pytest.approx(1 - 0.00085, abs=1e-6)


@pytest.mark.usefixtures("deferred")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_schedule_exact(tiny: dict[str, Any], dtype: torch.dtype):
    model = load_model_from_config(tiny, TINY, dtype=dtype)
    parts = (model.model, model.first_stage_model, model.cond_stage_model)
    assert {p.dtype for part in parts for p in part.parameters()} == {dtype}
    assert model.alphas_cumprod.dtype == torch.float32
    expected = read_state_dict(TINY)
    for key in ("model.diffusion_model.out.2.weight", "first_stage_model.quant_conv.bias"):
        assert torch.equal(model.state_dict()[key], expected[key].to(dtype))


@pytest.mark.usefixtures("deferred")
def test_configs_from_files_and_average_copies(tmp_path: Path, tiny: dict[str, Any]):
    from omegaconf import OmegaConf

    tiny["params"] |= {"use_ema": True, "personalization_config": None}
    OmegaConf.save({"model": tiny}, tmp_path / "model.yaml")
    model = load_model_from_config(tmp_path / "model.yaml", TINY)
    averages = dict(model.model_ema.named_buffers())
    for name, parameter in model.model.named_parameters():
        assert torch.equal(averages[name.replace(".", "")], parameter)
    with pytest.raises(FileNotFoundError, match="no config at .*other.yaml"):
        load_model_from_config(tmp_path / "other.yaml", TINY)


@pytest.mark.usefixtures("deferred")
def test_wrong_pairings_name_both_models(tmp_path: Path, tiny: dict[str, Any]):
    tiny["params"]["unet_config"]["params"]["in_channels"] = 9
    with pytest.raises(CheckpointError) as caught:
        load_model_from_config(tiny, TINY)
    message = str(caught.value)
    assert "does not fit LatentDiffusion: 1 tensors differ in shape" in message
    assert "(32, 4, 3, 3) in the file, (32, 9, 3, 3) in the model" in message
    assert "The file holds a UNet (4 to 4 channels, width 32, context 64)" in message
    assert "The model that the config builds holds a UNet (9 to 4 channels, width 32, context 64)" in message


def test_a_file_without_some_weights_builds_no_model(
    tmp_path: Path, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ldm.checkpoint.DEFERRED_NUMEL", 100)
    state = {k: v for k, v in read_state_dict(TINY).items() if not k.startswith("first_stage_model.decoder.")}
    path = write(tmp_path / "part.safetensors", state, "safetensors")
    with pytest.raises(
        CheckpointError, match=r"part.safetensors lacks \d+ tensors of the model \(first_stage_model.dec"
    ):
        load_model_from_config(tiny, path)


def test_the_file_alone_finds_its_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ldm.checkpoint_recognise._published", lambda: [])
    with pytest.raises(CheckpointError, match="no shipped config fits: the file holds a UNet"):
        load_model_from_config(None, TINY)
    with pytest.raises(ValueError, match="neither a config nor a checkpoint"):
        load_model_from_config()


# -- recognition ---------------------------------------------------------------------------------------------------


def shapes_of(manifest: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(map(int, row.split()[1:])) for key, row in MANIFESTS[manifest].items()}


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_every_published_model_finds_its_config(manifest: str):
    config = CASES[manifest][0]
    # These files hold the same models: which words are learned is no matter of the file.
    config = re.sub(r"txt2img-1p4B-\w+", "txt2img-1p4B-eval", config)
    config = re.sub(r"v1-(finetune\w*|inference-plain)", "v1-inference", config)
    info = recognise(shapes_of(manifest))
    assert config in (info.config, *info.others)
    assert info.require_config().is_file()
    if not info.others:
        return
    assert all(name in info.sentence for name in (info.config, *info.others))
    assert "as the first" in info.sentence


@pytest.mark.parametrize(
    ("manifest", "name", "size", "config"),
    [
        ("sd2_v2-inference", "512-base-ema.ckpt", None, "configs/stable-diffusion/v2-inference.yaml"),
        ("sd2_v2-inference", "v2-1_768-ema-pruned.ckpt", None, "configs/stable-diffusion/v2-inference-v.yaml"),
        ("sd2_v2-inference", "model.ckpt", 768, "configs/stable-diffusion/v2-inference-v.yaml"),
        ("ldm_celeba256", "ldm/ffhq256/model.ckpt", None, "models/ldm/ffhq256/config.yaml"),
        ("ldm_celeba256", "lsun_bedrooms.ckpt", None, "models/ldm/lsun_beds256/config.yaml"),
        (
            "ldm_semantic_synthesis256",
            "semantic_synthesis512/model.ckpt",
            None,
            "models/ldm/semantic_synthesis512/config.yaml",
        ),
    ],
)
def test_size_or_path_choose_among_models_of_one_shape(
    tmp_path: Path, manifest: str, name: str, size: int | None, config: str
):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {}
    end = 0
    for key, shape in shapes_of(manifest).items():
        begin, end = end, end + 4 * int(np.prod(shape, dtype=np.int64))
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)  # a sparse file: recognition reads the index alone
    info = recognise(path, size)
    assert info.config == config
    assert "alike" in info.sentence


def test_parts_and_other_files_are_named(tmp_path: Path):
    unet = {k: s for k, s in shapes_of("sd_v1-inference").items() if k.startswith("model.diffusion_model.")}
    assert recognise(unet).name == "sd1"
    assert recognise({k.removeprefix("model.diffusion_model."): s for k, s in unet.items()}).name == "sd1"
    vae = {k: s for k, s in shapes_of("sd_v1-inference").items() if k.startswith("first_stage_model.")}
    assert recognise({k.removeprefix("first_stage_model."): s for k, s in vae.items()}).name == "kl-f8"
    wide = dict(shapes_of("sd_v1-inference"))
    key = "model.diffusion_model.input_blocks.0.0.weight"
    wide[key] = (320, 9, 3, 3)
    assert "inpainting" in recognise(wide).sentence
    with pytest.raises(CheckpointError, match="no shipped config fits"):
        recognise(wide).require_config()
    wide[key] = (320, 5, 3, 3)
    assert "which no published config has" in recognise(wide).sentence
    for keys, word in [
        ({"string_to_param": ()}, "embedding"),
        ({"<cat>": (768,)}, "embedding"),
        ({"lora_unet_down.lora_up.weight": (4, 320)}, "LoRA"),
        ({"down_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3)}, "diffusers"),
        ({"something.weight": (3, 3, 3)}, "none of the known models"),
        ({}, "no tensors"),
    ]:
        assert word in recognise(keys).sentence
    path = END_TO_END / "embeddings_1vec.pt"
    assert "embedding file" in recognise(path).sentence


def test_recognition_of_a_full_checkpoint_is_quick_and_needs_no_weights(tmp_path: Path):
    """A sparse zip pickle with the keys of text2img-large: only its index is read."""
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in shapes_of("ld_txt2img-1p4B-eval").items()}
    small = {key: torch.zeros(1).expand(t.shape) if t.numel() < 1 << 24 else torch.zeros(1) for key, t in state.items()}
    path = write(tmp_path / "model.ckpt", small, global_step=1)
    info = recognise(path)
    assert info.traits.unet.startswith("in=4 out=4 width=320 context=1280")


# -- saving --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [save_safely, save_safetensors])
def test_saving_replaces_the_file_at_once(tmp_path: Path, save: Any):
    path = tmp_path / "new" / "a.pt"
    save({"w": torch.ones(2)}, path)
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
from pathlib import Path
from ldm.checkpoint import save_safely, save_safetensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # every write past 100 kB fails as on a full disk
save = {"save_safely": save_safely, "save_safetensors": save_safetensors}[sys.argv[1]]
try:
    save({"w": torch.ones(int(sys.argv[3]))}, sys.argv[2])
except ValueError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.mark.parametrize("save", ["save_safely", "save_safetensors"])
@pytest.mark.parametrize("size", [26_000, 1_000_000])
def test_full_disk_leaves_the_earlier_file_and_says_so(tmp_path: Path, save: str, size: int):
    path = tmp_path / "last.ckpt"
    save_safely({"w": torch.full((3,), 7.0)}, path)
    command = [sys.executable, "-c", FULL_DISK, save, str(path), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("SaveError: could not write")
    assert "last.ckpt" in line
    assert "the disk is full" in line
    assert "the earlier file is intact" in line
    assert read_state_dict(path)["w"].tolist() == [7.0] * 3
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_place_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SaveError, match="could not write .*file/a.pt"):
        save_safely({}, tmp_path / "file" / "a.pt")
