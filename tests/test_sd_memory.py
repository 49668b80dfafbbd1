"""Peak memory of Stable Diffusion 1 at its full size, 512 px, on the CPU: two inversion steps, two sampling steps.

The checkpoint is written to the temporary folder (4.3 GB) with random weights under the published keys. The commands
run as users run them, each in a process of its own that reports its own peak.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.test_checkpoint_memory import write_random

ROOT = Path(__file__).parents[1]
GB = 1e9
LIMITS = {"float32": 12 * GB, "bfloat16": 8 * GB}

RUN = """
import json, runpy, sys
from pathlib import Path
script, sys.argv = sys.argv[1], sys.argv[1:]
sys.path.insert(0, str(Path.cwd()))
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as error:
    if error.code:
        raise
(line,) = [row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM")]
print(json.dumps({"peak": int(line.split()[1]) * 1024}))
"""


def peak_of(script: str, *words: object) -> int:
    """Bytes that a command had in memory at most, mapped files included."""
    command = [sys.executable, "-c", RUN, script, *map(str, words)]
    env = {**os.environ, "OMP_NUM_THREADS": os.environ.get("LDM_MEMORY_THREADS", "2")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])["peak"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("sd")
    write_random(folder / "model.safetensors", "sd_v1-inference")
    yield folder / "model.safetensors"
    (folder / "model.safetensors").unlink()


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_two_sampling_steps(checkpoint: Path, tmp_path: Path, dtype: str):
    precision = "half" if dtype == "bfloat16" else "full"
    flags = ("--n_iter", 1, "--n_samples", 1, "--ddim_steps", 2, "--device", "cpu", "--precision", precision)
    peak = peak_of("scripts/stable_txt2img.py", "--ckpt", checkpoint, "--prompt", "a cat", "--outdir", tmp_path, *flags)
    (picture,) = (tmp_path / "samples").iterdir()
    assert Image.open(picture).size == (512, 512)
    print(f"two sampling steps at 512 px, {dtype}: peak {peak / GB:.2f} GB")
    assert peak <= LIMITS[dtype]


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_two_inversion_steps(checkpoint: Path, tmp_path: Path, dtype: str, batch_size: int):
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for k in range(3):
        picture = Image.fromarray(rng.integers(0, 255, (512, 512, 3), dtype=np.uint8))
        picture.save(tmp_path / "pictures" / f"{k}.png")
    words = ["--base", "configs/stable-diffusion/v1-finetune.yaml", "-t", "--actual_resume", checkpoint]
    words += ["--data_root", tmp_path / "pictures", "--init_word", "cat", "-n", "memory", "--logdir", tmp_path / "logs"]
    words += ["--accelerator", "cpu", "--max_steps", 2, f"data.params.batch_size={batch_size}"]
    words += ["lightning.keep_activations=false"]  # with much memory free they would be kept, which takes more of it
    words += ["data.params.num_workers=0", *(["--precision", "bf16-true"] if dtype == "bfloat16" else [])]
    # what only looks at the run takes most of its time here
    watching = ("image_logger", "sample_grids", "fixed_validation")
    words += [f"lightning.callbacks.{name}.params.disabled=true" for name in watching]
    peak = peak_of("main.py", *words)
    assert list((tmp_path / "logs").rglob("embeddings.pt"))
    print(f"two inversion steps at 512 px, batch {batch_size}, {dtype}: peak {peak / GB:.2f} GB")
    assert peak <= LIMITS[dtype]
