"""Files that are no checkpoints, broken ones and those that would run code: one sentence each, nothing runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldm.checkpoint import (
    CheckpointError,
    load_weights,
    read_state_dict,
    recognise,
)
from ldm.checkpoint_pickle import MAX_PICKLE_BYTES
from tests.checkpoint_files import WRITERS, RunsCode, make_net, read_or_refuse, write

FUZZ = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def stranger(kind: str) -> bytes:
    """The bytes of a file that someone may take for a checkpoint."""
    zipped, unrelated = io.BytesIO(), io.BytesIO()
    torch.save({"w": torch.ones(1000)}, zipped)
    with zipfile.ZipFile(unrelated, "w") as archive:
        archive.writestr("notes.txt", "hello")
    contents = {
        "empty": b"",
        "text": b"prompt: a photo of *\n",
        "high bytes": b"\xff" * 64,
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
        ("high bytes", "neither a torch.save file nor safetensors"),
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
        # a storage whose name is a tuple of itself, 34 levels deep: 50 gigabytes as text
        b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\nN" + b"2\x86" * 34 + b"X\x03\x00\x00\x00cpuK\x01tQ.",
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


LONG_TEXT = b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20)
LONG_LIST = b"](" + b"N" * 100_000 + b"e"


@pytest.mark.parametrize(
    "index",
    [
        b"\x80\x02](" + LONG_TEXT + b"q\x000" + b"c_codecs\nencode\nh\x00X\x05\x00\x00\x00ascii\x86R" * 2000 + b"e.",
        b"\x80\x02](" + LONG_LIST + b"q\x000" + b"cbuiltins\nlist\nh\x00\x85R" * 2000 + b"e.",
        b"\x80\x04](" + LONG_TEXT + b"q\x000" + b"h\x00h\x00\x93" * 2000 + b"e.",
    ],
)
def test_a_long_value_copied_again_and_again(tmp_path: Path, index: bytes):
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", index)
    with pytest.raises(CheckpointError, match="grows to more than 64 MB|more than 4,096 letters"):
        read_state_dict(path)


def test_compressed_foreign_and_oversized_archives(tmp_path: Path):
    path = tmp_path / "model.pt"
    good = tensor_pickle(4, 0, (4,), (1,))
    with zipfile.ZipFile(io.BytesIO(good)) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(CheckpointError, match="packed again"):
        read_state_dict(path)
    with zipfile.ZipFile(path, "w") as archive, archive.open("a/data.pkl", "w") as index:
        for _ in range(MAX_PICKLE_BYTES // (1 << 20) + 1):
            index.write(bytes(1 << 20))
    with pytest.raises(CheckpointError, match="data.pkl takes"):
        read_state_dict(path)
