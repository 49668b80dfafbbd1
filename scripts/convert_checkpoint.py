"""Command to bring Stable Diffusion weights from one layout to another: original files and diffusers folders."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

EXAMPLES = """\
examples:
  a published file as a folder for diffusers:
    python scripts/convert_checkpoint.py v1-5-pruned.ckpt sd15
  its averaged weights, in 16 bits:
    python scripts/convert_checkpoint.py v1-5-pruned.ckpt sd15-ema --weights ema --dtype float16
  Stable Diffusion 2 at 768 px, which predicts velocity:
    python scripts/convert_checkpoint.py v2-1_768-ema-pruned.ckpt sd21 --size 768
  a diffusers folder as one file:
    python scripts/convert_checkpoint.py sd15 sd15.safetensors
  a pickle as safetensors, without the averages:
    python scripts/convert_checkpoint.py v1-5-pruned.ckpt v1-5.safetensors
"""


def build_parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    from ldm.cli import add_debug_flag

    parser = argparse.ArgumentParser(
        prog="convert_checkpoint.py",
        description="Convert Stable Diffusion weights between files (.ckpt, .safetensors) and diffusers folders, and"
        " any model's from file to file. The ending of TARGET decides: .ckpt, .safetensors, or else a folder.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a checkpoint file or a diffusers folder")
    add("target", metavar="TARGET", help="what to write; what is there already is refused")
    add("--weights", default="live", choices=("live", "ema", "both"),
        help="of a file that also has averaged weights: the last ones, the averages in their place, or both"
        " (a file only; default: live)")  # fmt: skip
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="type of the weights (default: as they are)")
    add("--config", metavar="YAML", help="the model's config, for a folder (default: found from the weights)")
    add("--size", type=int, metavar="PIXELS",
        help="picture size that the model was trained for, where the weights do not tell")  # fmt: skip
    add("--variant", metavar="WORD", help='which files of a source folder to take, such as "fp16" or "non_ema"')
    add_debug_flag(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`."""
    args = build_parser().parse_args(argv)
    import torch

    from ldm.convert import convert

    dtype = getattr(torch, args.dtype) if args.dtype else None
    print(
        convert(
            args.source,
            args.target,
            weights=args.weights,
            dtype=dtype,
            config=args.config,
            size=args.size,
            variant=args.variant,
        )
    )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone runs without being installed
    from ldm.cli import run_command

    run_command(main)
