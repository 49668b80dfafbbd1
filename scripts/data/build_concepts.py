"""Command to take the drawings of the evaluation's concepts out of the sprite files that `make data` builds."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

EXAMPLES = """\
examples:
  after `make data`:
    python scripts/data/build_concepts.py --sprites data/emoji
"""


def build_parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    from ldm.cli import add_debug_flag

    parser = argparse.ArgumentParser(
        prog="build_concepts.py",
        description="Write evaluation/emoji/sprites.npz, the drawings that the evaluation's concepts are made of.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sprites", default="data/emoji", metavar="DIR", help="sprite files (default: data/emoji)")
    parser.add_argument("--out", metavar="NPZ", help="default: evaluation/emoji/sprites.npz")
    add_debug_flag(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`."""
    args = build_parser().parse_args(argv)
    from evaluation.emoji_concepts import FOLDER, build_sprites

    out = Path(args.out) if args.out else FOLDER / "sprites.npz"
    build_sprites(args.sprites, out)
    print(f"{out} ({out.stat().st_size / 1024:.0f} KiB)")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that a clone runs without being installed
    from ldm.cli import run_command

    run_command(main)
