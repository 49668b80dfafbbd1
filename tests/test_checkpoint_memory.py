"""Peak memory of loading full-size checkpoints: 1.3 times the file in float32, 0.8 times in half precision.

Files with random weights and the exact keys of the published models are written to the temporary folder (5.7 GB and
4.0 GB), loaded by a fresh process that reads every weight and reports its own peak, and sampled from for two steps.
"""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.test_manifests import MANIFESTS

ROOT = Path(__file__).parents[1]
BLOCK = 1 << 22
MANIFEST_OF = {"text2img-large": "ld_txt2img-1p4B-eval", "sd-v1-4": "sd_v1-inference"}

CONVERT = """
import sys
from ldm.checkpoint import read_state_dict, save_safely
save_safely({"state_dict": read_state_dict(sys.argv[1]), "global_step": 470000}, sys.argv[2])
"""

LOAD_AND_SAMPLE = """
import json, sys, time, torch
from pathlib import Path
from ldm.checkpoint import load_model_from_config
from ldm.generate import SamplingOptions, iter_images

def peak():
    (line,) = [row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

begin = time.time()
dtype = getattr(torch, sys.argv[2])
model = load_model_from_config(None, sys.argv[1], dtype=dtype)
report = {"load_peak": peak(), "load_seconds": time.time() - begin}
for tensor in model.state_dict().values():  # mapped weights take memory once they are read
    tensor.sum()
report["touched_peak"] = peak()
assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
assert {p.dtype for p in model.model.parameters()} == {dtype}
begin = time.time()
(picture,) = iter_images(model, ["a photo of a cat"], options=SamplingOptions(steps=2, scale=5.0))
assert picture.isfinite().all()
report |= {"sample_peak": peak(), "sample_seconds": time.time() - begin, "shape": list(picture.shape)}
print(json.dumps(report))
"""


def write_random(path: Path, manifest: str) -> None:
    """A .safetensors file with the manifest's keys and shapes, random weights and the real schedule's size."""
    header: dict[str, Any] = {}
    end = 0
    for key, row in MANIFESTS[manifest].items():
        dtype, *shape = row.split()
        begin, end = end, end + math.prod(map(int, shape)) * np.dtype(dtype).itemsize
        code = {"float32": "F32", "int64": "I64"}[dtype]
        header[key] = {"dtype": code, "shape": [int(n) for n in shape], "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    noise = np.random.default_rng(0).standard_normal(BLOCK, dtype=np.float32) * 0.02
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for key, row in header.items():
            left = (row["data_offsets"][1] - row["data_offsets"][0]) // (8 if row["dtype"] == "I64" else 4)
            if row["dtype"] == "I64":
                file.write(np.arange(left).tobytes())
                continue
            while left:
                count = min(left, BLOCK)
                file.write((noise[:count] + ("norm" in key and key.endswith("weight"))).astype(np.float32).tobytes())
                left -= count


def run(script: str, *args: object) -> str:
    done = subprocess.run([sys.executable, "-c", script, *map(str, args)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=MANIFEST_OF)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    write_random(folder / "model.safetensors", MANIFEST_OF[request.param])
    run(CONVERT, folder / "model.safetensors", folder / "model.ckpt")
    yield folder
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(
    ("name", "dtype", "limit"),
    [
        ("model.ckpt", "float32", 1.3),
        ("model.safetensors", "float32", 1.3),
        ("model.ckpt", "bfloat16", 0.8),
        ("model.safetensors", "float16", 0.8),
    ],
)
def test_loads_within_its_share_of_memory_and_samples(published: Path, name: str, dtype: str, limit: float):
    path = published / name
    report = json.loads(run(LOAD_AND_SAMPLE, path, dtype).splitlines()[-1])
    size = path.stat().st_size
    print(f"{published.name} {name} {dtype}: file {size / 1e9:.2f} GB", report)
    assert report["touched_peak"] <= limit * size
    assert report["shape"][:2] == [1, 3]
