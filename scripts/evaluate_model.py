"""Command to score one learned word on one prompt: how like its training pictures and how true to the text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

EXAMPLES = """\
examples:
  with the model that comes along and its own scorer:
    python scripts/evaluate_model.py --embedding_path logs/imgs.../checkpoints/embeddings.pt --data_dir ./imgs
  as in the paper, on the 1.45-billion-parameter model with CLIP ViT-B/32:
    python scripts/evaluate_model.py --ckpt_path models/ldm/text2img-large/model.ckpt --embedding_path embeddings.pt \\
        --data_dir ./imgs --prompt "a photo of * on the moon" --scorer ViT-B/32
  CLIP and DINO together, with the weights of local files:
    python scripts/evaluate_model.py --ckpt_path sd-v1-4.ckpt --embedding_path cat.pt --data_dir ./cat \\
        --scorer ViT-B/32 dino-vits16 --scorer_weights ViT-B-32.safetensors dino_deitsmall16_pretrain.pth
"""
OWN_SCORER, PAPERS_SCORER = "emoji64", "ViT-B/32"
OWN_MODEL = "models/ldm/emoji64"
SETTINGS = ("sampler", "ddim_steps", "scale", "H", "W", "ckpt_path", "config", "precision", "embedding_path")


def build_parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    from ldm.cli import add_debug_flag, add_model_flags

    parser = argparse.ArgumentParser(
        prog="evaluate_model.py",
        description="Draw pictures of a prompt with a learned word, and compare them with its training pictures and "
        "with the prompt's text. Prints raw cosines.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--prompt", help="the text (default: 'a photo of' the first learned word)")
    add("--embedding_path", nargs="+", required=True, metavar="FILE", help="files of learned words")
    add("--data_dir", required=True, metavar="DIR", help="the training pictures")
    add("--out_dir", default="outputs/evaluate_model", metavar="DIR",
        help="where pictures and scores.json go (default: outputs/evaluate_model)")  # fmt: skip
    add("--scorer", nargs="+", metavar="NAME",
        help=f"{OWN_SCORER}, a CLIP model (ViT-B/32, ViT-H-14, ...), a DINO model (dino-vits16, dino-vitb8), or several"
        f" (default: {OWN_SCORER} for the model that comes along, else {PAPERS_SCORER})")  # fmt: skip
    add(
        "--scorer_weights",
        nargs="+",
        default=[],
        metavar="FILE",
        help="their local weight files or folders, in the same order",
    )
    add("--n_samples", type=int, default=64, metavar="N", help="pictures (default: 64, as in the paper)")
    add("--ddim_steps", "--steps", type=int, default=50, metavar="N", help="steps of the sampler (default: 50)")
    add("--sampler", default="ddim", choices=("ddim", "plms", "dpm", "ddpm"), help="default: ddim")
    add("--scale", type=float, default=5.0, help="guidance (default: 5, as published)")
    add("--seed", type=int, default=42, help="picture k is drawn with seed + k (default: 42)")
    add("--batch_size", type=int, default=8, metavar="N", help="pictures at a time (default: 8)")
    add("--H", type=int, metavar="PIXELS", help="height (default: the model's own)")
    add("--W", type=int, metavar="PIXELS", help="width (default: the model's own)")
    add_debug_flag(parser)
    add_model_flags(parser)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; the default scorer depends on the model."""
    from ldm.generate_checks import check_seed, check_size, check_texts

    args = build_parser().parse_args(argv)
    args.scorer = args.scorer or [OWN_SCORER if is_own_model(args.ckpt_path) else PAPERS_SCORER]
    if args.scorer_weights and len(args.scorer_weights) != len(args.scorer):
        raise ValueError(f"{len(args.scorer_weights)} --scorer_weights for {len(args.scorer)} --scorer: give one each")
    for flag in ("n_samples", "batch_size"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} must be at least 1, got {getattr(args, flag)}")
    check_seed(args.seed, args.n_samples)
    check_size("--W and --H", args.W, args.H)
    check_texts(args, "prompt")
    return args


def is_own_model(path: str | None) -> bool:
    """Whether `--ckpt_path` means the model that comes along."""
    from ldm.resources import resource_root

    return path is None or (resource_root() / OWN_MODEL) in (Path(path).resolve(), *Path(path).resolve().parents)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the pictures depend on besides their prompt and seed; goes into their metadata."""
    from ldm.generate_words import fingerprint

    return {flag: getattr(args, flag) for flag in SETTINGS} | {
        "embedding_sha256": [fingerprint(path) for path in args.embedding_path]
    }


def draw(model: Any, args: argparse.Namespace) -> tuple[Tensor, list[Path]]:
    """Pictures (N, 3, H, W) in [-1, 1] of the prompt, saved as they are made, and their files."""
    import torch

    from ldm.generate import SamplingOptions, iter_images, require_finite, save_images, to_uint8

    common = settings_of(args)
    options = SamplingOptions(args.sampler, args.ddim_steps, scale=args.scale, height=args.H, width=args.W)
    seeds = [args.seed + k for k in range(args.n_samples)]
    parts: list[Tensor] = []
    files: list[Path] = []
    for images in iter_images(
        model,
        [args.prompt] * args.n_samples,
        seeds=seeds,
        options=options,
        batch_size=args.batch_size,
        precision=args.precision,
        verbose=True,
    ):
        require_finite(images)
        parts.append(images.clamp(-1, 1).cpu())
        now = seeds[len(files) : len(files) + len(images)]
        files += save_images(to_uint8(images), args.out_dir, [{"prompt": args.prompt, "seed": s} | common for s in now])
    return torch.cat(parts), files


def save_scores(
    args: argparse.Namespace, text: str, scores: dict[str, dict[str, float]], grid: np.ndarray, files: Sequence[Path]
) -> Path:
    """Write `scores.json` with what led to them, and a grid of the pictures; what is not known is null there."""
    import json
    import math

    from ldm.checkpoint import atomic_path
    from ldm.generate import save_grid

    record = {
        "prompt": args.prompt,
        "text": text,
        "data_dir": args.data_dir,
        "n_samples": args.n_samples,
        "seed": args.seed,
        **settings_of(args),
        "pictures": [file.name for file in files],
        "scores": {
            name: {metric: value if math.isfinite(value) else None for metric, value in values.items()}
            for name, values in scores.items()
        },
    }
    save_grid(grid, Path(args.out_dir) / "grid.png")
    path = Path(args.out_dir) / "scores.json"
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`."""
    args = parse_args(argv)
    from evaluation.clip_eval import without_words
    from evaluation.image_dirs import load_folder
    from evaluation.judges import is_blind_to_text, load_judge
    from evaluation.scoring import METRICS, score
    from ldm.generate import load_model, to_uint8
    from ldm.generate_command import check_words
    from ldm.generate_files import require_folder
    from ldm.generate_words import load_words

    weights = args.scorer_weights or [None] * len(args.scorer)
    require_folder(args.out_dir)
    load_folder(args.data_dir, size=8)  # what is wrong with the pictures shows before a large model is loaded
    model = load_model(args.ckpt_path, args.config, device=args.device, precision=args.precision)
    judges = {name: load_judge(name, file, model.device) for name, file in zip(args.scorer, weights, strict=True)}
    words = load_words(model, args.embedding_path)
    args.prompt = f"a photo of {words[0]}" if args.prompt is None else args.prompt
    check_words([args.prompt], words)
    text = without_words(args.prompt, words)
    pictures, files = draw(model, args)
    training = load_folder(args.data_dir, size=min(pictures.shape[2:]))
    scores = {
        name: score(judge, pictures, training, None if is_blind_to_text(name) else text)
        for name, judge in judges.items()
    }
    for name, values in scores.items():
        print(f"{name} (raw cosines, {len(pictures)} pictures)")
        for metric, value in values.items():
            print(f"  {metric:12} {value:7.4f}  {METRICS[metric]}")
    print(save_scores(args, text, scores, to_uint8(pictures), files))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone runs without being installed
    from ldm.cli import run_command

    run_command(main)
