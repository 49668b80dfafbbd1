"""Check that the package in the folder given as argument works without the source tree. Run with `python -P`."""

import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])  # before the editable install of the same environment

import evaluation  # noqa: E402
import ldm  # noqa: E402
import main  # noqa: E402
import merge_embeddings  # noqa: E402
from ldm.modules.encoders.modules import BERTTokenizer  # noqa: E402
from ldm.resources import config_path, shipped_configs  # noqa: E402

for module in (evaluation, ldm, main, merge_embeddings):
    place = module.__file__ or next(iter(module.__path__))
    if not Path(place).is_relative_to(sys.argv[1]):
        sys.exit(f"{module.__name__} came from {place}, not from the installed package")
if len(shipped_configs()) < 42 or not config_path("latent-diffusion/txt2img-1p4B-eval.yaml").is_file():
    sys.exit(f"configs are missing from the installed package, it has only {shipped_configs()}")
BERTTokenizer(device="cpu")  # reads the vocabulary
sys.stdout.write(f"{len(shipped_configs())} configs and the vocabulary are in the installed package\n")
