"""Check that an installed package works without the source tree: PYTHONPATH=DIR python -P check_installed.py DIR."""

import sys
from pathlib import Path

import evaluation
import ldm
import main
import merge_embeddings
from ldm.modules.encoders.modules import BERTTokenizer
from ldm.resources import config_path, shipped_configs

for module in (evaluation, ldm, main, merge_embeddings):
    place = module.__file__ or next(iter(module.__path__))
    if not Path(place).is_relative_to(sys.argv[1]):
        sys.exit(f"{module.__name__} came from {place}, not from {sys.argv[1]}")
if len(shipped_configs()) < 42 or not config_path("latent-diffusion/txt2img-1p4B-eval.yaml").is_file():
    sys.exit(f"configs are missing from the installed package, it has only {shipped_configs()}")
BERTTokenizer(device="cpu")  # reads the vocabulary
sys.stdout.write(f"{len(shipped_configs())} configs and the vocabulary are in the installed package\n")
