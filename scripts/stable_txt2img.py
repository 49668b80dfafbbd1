"""Command to draw pictures with Stable Diffusion: txt2img.py with the flags and defaults published for it."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger("stable_txt2img")

DEFAULT_CKPT = "models/ldm/stable-diffusion-v1/model.ckpt"
LAION400M = {
    "config": None,  # found from the weights
    "ckpt_path": "models/ldm/text2img-large/model.ckpt",
    "outdir": "outputs/txt2img-samples-laion400m",
}
EXAMPLES = """\
examples:
  Stable Diffusion 1, with a word that was learned on it:
    python scripts/stable_txt2img.py --ckpt v1-5-pruned.ckpt --embedding_path embeddings.pt --prompt "a photo of *"
  Stable Diffusion 2 at 768 px (v prediction), 20 steps of DPM-Solver++:
    python scripts/stable_txt2img.py --ckpt v2-1_768-ema-pruned.ckpt --H 768 --W 768 --dpm_solver --ddim_steps 20 \\
        --prompt "a red fox in the snow"
  a folder of diffusers, 16-bit weights, one word stressed, the last layer of the text model left out:
    python scripts/stable_txt2img.py --ckpt sd15 --precision half --clip_skip 2 --prompt_weights \\
        --prompt "a (red:1.3) fox in the snow"
  a model whose schedule ends in pure noise, with the guidance that suits it:
    python scripts/stable_txt2img.py --ckpt fine-tuned.safetensors --parameterization v --zero_terminal_snr \\
        --guidance_rescale 0.7 --prompt "a black cat at night"
"""


def build_parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    from scripts.txt2img import build_parser as txt2img_parser

    parser = txt2img_parser("stable_txt2img.py", EXAMPLES, size="512", weights=DEFAULT_CKPT)
    parser.set_defaults(
        ckpt_path=DEFAULT_CKPT, ddim_steps=50, n_iter=2, n_samples=3, scale=7.5, H=512, W=512, precision="autocast"
    )
    group = parser.add_argument_group("published with Stable Diffusion")
    add = group.add_argument
    add("--dpm_solver", action="store_const", const="dpm", dest="sampler", help="the same as --sampler dpm")
    add("--laion400m", action="store_true", help="draw with text2img-large, where it was published, instead")
    add("--C", type=int, default=4, metavar="N", help="latent channels (default: 4); the model knows its own")
    add("--f", type=int, default=8, metavar="N", help="pixels per latent position (default: 8); as --C")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    from scripts.txt2img import parse_args as parse_txt2img

    args = parse_txt2img(argv, build_parser())
    if args.laion400m:
        vars(args).update(LAION400M)
    if (args.C, args.f) != (4, 8):
        log.warning("--C %d --f %d: what the model says counts", args.C, args.f)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`."""
    args = parse_args(argv)
    from ldm.generate import select_device
    from scripts.txt2img import run

    if args.ckpt_path == DEFAULT_CKPT and not Path(DEFAULT_CKPT).is_file():
        raise FileNotFoundError(f"no weights at {DEFAULT_CKPT}: put them there, or name a file or folder with --ckpt")
    if args.precision == "autocast" and select_device(args.device).type == "cpu":
        args.precision = "full"  # as published: mixed precision was a matter of GPUs; --precision half is for CPUs too
    run(args)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone runs without being installed
    from ldm.cli import run_command

    run_command(main)
