"""Command to train, evaluate and export the scorer, the judge of the embedded picture world."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaluation.scorer import Scorer
    from evaluation.scorer_data import Pictures

logger = logging.getLogger("train_scorer")

EXAMPLES = """\
examples:
  train, or go on after an interruption (needs 'make data'); the weights end up in models/scorer/emoji64:
    OMP_NUM_THREADS=1 python scripts/train_scorer.py --steps 6800
  train a finished scorer for longer, on fresh pictures:
    python scripts/train_scorer.py --steps 9000 --picture-seed 1
  print the figures of the shipped scorer:
    python scripts/train_scorer.py --evaluate
"""


def build_parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    from ldm.cli import add_debug_flag

    parser = argparse.ArgumentParser(
        prog="train_scorer.py",
        description="Train, evaluate and export the scorer, the judge of the embedded picture world.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, default=Path("data/emoji"), metavar="DIR", help="sprite files (default: %(default)s)")
    add("--work", type=Path, default=Path("data/emoji/scorer"), metavar="DIR",
        help="cache, checkpoint and log (default: %(default)s)")  # fmt: skip
    add("--out", type=Path, default=Path("models/scorer/emoji64"), metavar="DIR",
        help="where the finished scorer goes (default: %(default)s)")  # fmt: skip
    add("--steps", type=int, default=6800, help="optimiser steps in all (default: %(default)s)")
    add("--name-steps", type=int, default=1600, metavar="N",
        help="of these, steps on names and small pictures only, at the start (default: %(default)s)")  # fmt: skip
    add("--pictures", type=int, default=100_000, metavar="N", help="pictures to cache (default: %(default)s)")
    add("--picture-seed", type=int, default=0, metavar="S", help="seed of the cached pictures (default: 0)")
    add("--seed", type=int, default=0, help="seed of weights and batches (default: 0)")
    add("--evaluate", action="store_true", help="train nothing; print the figures of the scorer in --out")
    add("--export", action="store_true", help="train nothing; write the checkpoint in --work to --out")
    add("--count", type=int, default=500, metavar="N", help="pictures per figure (default: %(default)s)")
    add_debug_flag(parser)
    return parser


def new_scorer(pictures: Pictures, seed: int) -> tuple[Scorer, dict[str, Any]]:
    """An untrained scorer that knows the words of the pictures' captions, and its constructor's parameters."""
    import torch

    from evaluation.scorer import Scorer
    from evaluation.scorer_training import vocabulary
    from ldm.modules.encoders.bert import WordPieceTokenizer

    pieces = vocabulary(WordPieceTokenizer(), sorted({*pictures.names, *pictures.others} - {""}))
    params = {
        "embed_dim": 256, "image_size": 64, "widths": [32, 64, 128, 256], "depths": [0, 1, 2, 2],
        "vocab_size": len(pieces), "text_width": 192, "text_layers": 2, "text_heads": 4, "max_length": 32,
    }  # fmt: skip
    torch.manual_seed(seed)
    scorer = Scorer(**params)  # type: ignore[arg-type]
    scorer.pieces.copy_(pieces)
    return scorer, params


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    options = build_parser().parse_args(argv)
    if not options.evaluate:
        _train(options)
    from evaluation.scorer import load_scorer
    from evaluation.scorer_figures import evaluate

    for row in evaluate(load_scorer(options.out), options.data, options.count):
        print(row, flush=True)


def _train(options: argparse.Namespace) -> None:
    import torch

    from evaluation.scorer import save_scorer
    from evaluation.scorer_data import cached_pictures
    from evaluation.scorer_training import CHECKPOINT, TrainOptions, train

    pictures = cached_pictures(options.work, options.data, options.pictures, options.picture_seed)
    scorer, params = new_scorer(pictures, options.seed)
    if options.export:
        scorer.load_state_dict(torch.load(options.work / CHECKPOINT, weights_only=True)["model"])
    else:
        plan = TrainOptions(steps=options.steps, name_steps=options.name_steps, seed=options.seed)
        train(scorer, pictures, plan, options.work)
    save_scorer(scorer, options.out, params)
    logger.info("scorer written to %s", options.out)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from ldm.cli import run_command

    run_command(main)
