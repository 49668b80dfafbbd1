"""Command to draw pictures from texts, with learned words if embedding files are given."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

EXAMPLES = """\
examples:
  with the model that comes along:
    python scripts/txt2img.py --prompt "a photo of a red apple"
  with a learned word:
    python scripts/txt2img.py --embedding_path logs/imgs.../checkpoints/embeddings.pt --prompt "a painting of *"
  two words, renamed, one at three quarters of its strength:
    python scripts/txt2img.py --embedding_path cat.pt mug.pt --rename "*=<cat>" "*=<mug>" --strength 0.75 1 \\
        --prompt "a photo of <cat> in a <mug>"
  a published model, weights only (its config is found from them):
    python scripts/txt2img.py --ckpt_path models/ldm/text2img-large/model.ckpt --prompt "a sunset" --sampler dpm \\
        --ddim_steps 25
  a picture again, or the same with more guidance:
    python scripts/txt2img.py --from-image outputs/txt2img-samples/samples/a-sunset_42.png --scale 8
"""


def build_parser(prog: str = "txt2img.py", examples: str = EXAMPLES, **defaults: str) -> argparse.ArgumentParser:
    """Parser of the command line, of this command or of one that adds to it and has other `defaults`."""
    from ldm.generate_command import text_parser

    parser = text_parser(
        prog, "Draw pictures from texts, with learned words if embedding files are given.", examples, **defaults
    )
    parser.set_defaults(outdir="outputs/txt2img-samples", n_samples=4, ddim_steps=200)
    parser.add_argument(
        "--fixed_code", action="store_true", help="the same noise each of n_iter times: seeds from --seed on again"
    )
    return parser


def parse_args(argv: Sequence[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Parse the command line, of this command or of one that adds to it."""
    from ldm.generate_command import parse_text_args

    return parse_text_args(argv, parser or build_parser(), own=["strength"])


def run(args: argparse.Namespace) -> None:
    """Load the model, draw and save all that `args` ask for, and print where it is."""
    from ldm.cli import print_files
    from ldm.generate_command import draw, prepare

    model, prompts, options = prepare(args)
    from ldm.generate import iter_images

    print_files(*draw(args, prompts, functools.partial(iter_images, model, options=options)))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`."""
    run(parse_args(argv))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone runs without being installed
    from ldm.cli import run_command

    run_command(main)
