"""Command to measure how well the embedded model draws what captions say."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

EXAMPLES = """\
examples:
  the shipped model (needs 'make data' for the names and drawings of the known objects):
    python scripts/evaluate_generator.py --out_dir outputs/generator
  a model in training, with the loss gap between right and wrong captions only:
    python scripts/evaluate_generator.py --ckpt_path logs/RUN --gap_only
"""
GRID = 50  # pictures shown


def build_parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    from ldm.cli import add_debug_flag, add_model_flags

    parser = argparse.ArgumentParser(
        prog="evaluate_generator.py",
        description="Draw captions of known objects with the embedded model; let its scorer name object, background and"
        " style; compare the loss with right, partial and wrong captions.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, default=Path("data/emoji"), metavar="DIR", help="sprite files (default: %(default)s)")
    add("--scorer", type=Path, metavar="DIR", help="the judge (default: the one that comes along)")
    add("--out_dir", type=Path, default=Path("outputs/generator"), metavar="DIR",
        help="where grid and figures go (default: %(default)s)")  # fmt: skip
    add("--count", type=int, default=200, metavar="N", help="captions (default: %(default)s)")
    add("--ddim_steps", "--steps", type=int, default=50, metavar="N", help="steps of the sampler (default: 50)")
    add("--sampler", default="ddim", choices=("ddim", "plms", "dpm", "ddpm"), help="default: ddim")
    add("--scale", type=float, default=5.0, help="guidance (default: %(default)s)")
    add("--seed", type=int, default=0, help="of captions and pictures (default: 0)")
    add("--batch_size", type=int, default=8, metavar="N", help="pictures at a time (default: 8)")
    add("--gap", type=int, default=256, metavar="N", help="pictures for the loss gap, 0: none (default: 256)")
    add("--gap_only", action="store_true", help="draw nothing; the figures go to gap.json")
    add_debug_flag(parser)
    add_model_flags(parser)
    return parser


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    options = build_parser().parse_args(argv)
    for flag, least in (("count", 1), ("batch_size", 1), ("ddim_steps", 1), ("gap", 0)):
        if getattr(options, flag) < least or (flag, getattr(options, flag)) == ("gap", 1):
            more = " (or 2 and more: each loss is compared with another picture's caption)" if flag == "gap" else ""
            raise ValueError(f"--{flag} must be at least {least}{more}, got {getattr(options, flag)}")
    import dataclasses
    import json

    import torch
    from tqdm import tqdm

    from evaluation.generator_figures import caption_gap, draw_requests, judge, known_sprites, real_pictures
    from evaluation.scorer import load_scorer
    from ldm import generate
    from ldm.checkpoint import atomic_path
    from ldm.generate_files import require_folder

    require_folder(options.out_dir)
    sprites = known_sprites(options.data)
    model = generate.load_model(options.ckpt_path, options.config, device=options.device, precision=options.precision)
    figures = []
    if options.gap or options.gap_only:
        with model.ema_scope(), generate.precision_context(options.precision, model.device):
            figures += caption_gap(model, sprites, options.gap or 256)
    if not options.gap_only:
        scorer = load_scorer(options.scorer)
        requests = draw_requests(sprites, options.count, options.seed)
        how = generate.SamplingOptions(sampler=options.sampler, steps=options.ddim_steps, scale=options.scale)
        parts = generate.iter_images(
            model, [r.caption for r in requests], seeds=options.seed, options=how, batch_size=options.batch_size,
            precision=options.precision,
        )  # fmt: skip
        images = torch.cat([part.cpu() for part in tqdm(parts, unit="batch")]).clamp(-1, 1)  # (N, 3, 64, 64)
        names = sorted(set(sprites.names))
        figures += judge(scorer, images, requests, names, "drawn by the model")
        figures += judge(scorer, real_pictures(requests, sprites), requests, names, "real pictures")
        asked = {"prompts": [r.caption for r in requests[:GRID]]}
        generate.save_grid(generate.to_uint8(images[:GRID]), options.out_dir / "grid.png", columns=10, settings=asked)
    for value in figures:
        print(value)
    name = "gap.json" if options.gap_only else "figures.json"
    with atomic_path(options.out_dir / name) as temporary:
        temporary.write_text(json.dumps([dataclasses.asdict(value) for value in figures], indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from ldm.cli import run_command

    run_command(main)
