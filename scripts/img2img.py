"""Command to make new pictures from a picture and a text: variations, edits, edits inside a mask."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from ldm.generate import SamplingOptions
    from ldm.generate_edit import Edit

log = logging.getLogger("img2img")

EXAMPLES = """\
examples:
  variations of a picture of a learned thing:
    python scripts/img2img.py --init-img cat.png --embedding_path cat.pt --prompt "a photo of *" --strength 0.5
  put the thing where the mask is white; all else stays as it is:
    python scripts/img2img.py --init-img room.png --mask room_mask.png --embedding_path cat.pt --prompt "a photo of *"
  another style in the same layout, from the noise that leads to the picture (DDIM inversion):
    python scripts/img2img.py --init-img cat.png --invert "a photo of *" --embedding_path cat.pt \\
        --prompt "a silhouette of *" --scale 2
"""
SETTINGS = (  # what a picture's metadata holds besides its prompt and seed, under the flags' names
    "init_img", "mask", "invert", "img_strength", "negative_prompt", "sampler", "ddim_steps", "ddim_eta", "scale",
    "guidance_rescale", "H", "W", "ckpt_path", "config", "precision", "embedding_path", "rename", "word_strength",
    "prompt_weights", "long_prompts",
)  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    from ldm.cli import add_debug_flag, add_model_flags

    parser = argparse.ArgumentParser(
        prog="img2img.py",
        description="Make new pictures from a picture and a text, anywhere in it or only inside a mask.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--init-img", "--init_img", required=True, metavar="FILE", help="the picture to start from")
    add("--mask", metavar="FILE", help="a picture that is white where something new is drawn; the rest is kept")
    add("--prompt", help="the text (default: 'a photo of' the first learned word)")
    add("--from-file", metavar="TXT", help="a file with one prompt per line, instead of --prompt")
    add("--negative_prompt", default="", metavar="TEXT", help="what the pictures shall not show")
    add("--outdir", default="outputs/img2img-samples", help="default: outputs/img2img-samples")
    add("--n_samples", type=int, default=2, metavar="N", help="pictures of each prompt at a time (default: 2)")
    add("--n_iter", type=int, default=1, metavar="N", help="how often that many (default: 1)")
    add("--n_rows", type=int, default=0, metavar="N", help="pictures in a row of the grid (default: n_samples)")
    add("--seed", type=int, default=42, help="picture k of a prompt is drawn with seed + k (default: 42)")
    add("--H", type=int, metavar="PIXELS", help="height (default: the picture's shape at the model's own size)")
    add("--W", type=int, metavar="PIXELS", help="width (default: as the height)")
    add("--skip_grid", action="store_true", help="write no grid of all pictures")
    add("--skip_save", action="store_true", help="write no single pictures")
    for flag in ("--C", "--f"):
        add(flag, type=int, metavar="N", help="a published flag without effect: the model says it")
    add("--fixed_code", action="store_true", help="a published flag without effect: a seed is always the same noise")
    add_debug_flag(parser)
    _add_sampling_flags(parser)
    add_model_flags(parser)
    group = parser.add_argument_group("learned words")
    add = group.add_argument
    add("--embedding_path", nargs="+", default=[], metavar="FILE", help="files of learned words")
    add("--rename", nargs="+", default=[], metavar="OLD=NEW", help="other names for words, as in txt2img.py")
    add("--word_strength", nargs="+", type=float, default=[1.0], metavar="S",
        help="1: the learned word, 0: the word it started from; for all files or each (default: 1)")  # fmt: skip
    return parser


def _add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    add = group.add_argument
    add("--strength", type=float, dest="img_strength", metavar="S",
        help="share of the steps drawn again: 0 keeps the picture, 1 forgets it (default: 0.75; 1 with --mask "
        "or --invert)")  # fmt: skip
    add("--invert", metavar="TEXT",
        help="what the picture shows: start from the noise that leads to it, so that its layout stays")  # fmt: skip
    add("--sampler", default="ddim", choices=("ddim", "plms", "dpm"), help="default: ddim")
    add("--plms", action="store_const", const="plms", dest="sampler", help="the same as --sampler plms")
    add("--ddim_steps", "--steps", type=int, default=50, metavar="N", help="steps at strength 1 (default: 50)")
    add("--ddim_eta", type=float, default=0.0, metavar="ETA", help="ddim: 0 adds no noise, 1 much (default: 0)")
    add("--scale", type=float, default=5.0, help="guidance: how closely to follow the text; 1 is none (default: 5)")
    add("--guidance_rescale", type=float, default=0.0, metavar="R", help="0 to 1, against over-exposure (default: 0)")
    add("--prompt_weights", action="store_true", help="(word:1.2) counts more, (word:0.8) and [word] less; \\( is a (")
    add("--long_prompts", action="store_true", help="encode prompts longer than the text model's length in chunks")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    args = build_parser().parse_args(argv)
    for flag in ("n_samples", "n_iter"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} must be at least 1, got {getattr(args, flag)}")
    for path in (args.init_img, args.mask):
        if path is not None and not Path(path).is_file():
            raise FileNotFoundError(f"no picture at {path}")
    if args.img_strength is None:
        args.img_strength = 0.75 if args.mask is None and args.invert is None else 1.0
    return args


def load_words_of(model: Any, args: argparse.Namespace) -> list[str]:
    """Load the embedding files; returns the words that the prompts can use."""
    from ldm.generate_words import fingerprint, load_words, parse_renames

    if not args.embedding_path:
        if args.rename:
            raise ValueError(f"--rename {args.rename[0]} needs --embedding_path")
        return []
    args.embedding_sha256 = [fingerprint(path) for path in args.embedding_path]
    return load_words(model, args.embedding_path, parse_renames(args.rename), args.word_strength)


def settings_of(args: argparse.Namespace, prompt: str, seed: int) -> dict[str, Any]:
    """What a picture's metadata says: all that it depends on."""
    settings = {"prompt": prompt, "seed": seed} | {flag: getattr(args, flag) for flag in SETTINGS}
    return settings | {"embedding_sha256": getattr(args, "embedding_sha256", [])}


def draw(
    model: Any, args: argparse.Namespace, prompts: Sequence[str], options: SamplingOptions, edit: Edit
) -> tuple[list[np.ndarray], list[Path]]:
    """Draw and save all pictures of all prompts; returns them, in the prompts' order, and the files."""
    from ldm.generate import save_images, to_uint8
    from ldm.generate_edit import iter_edits, read_pictures

    picture, mask = read_pictures(args.init_img, args.mask, model, options)
    jobs = [(prompt, args.seed + k) for prompt in prompts for k in range(args.n_samples * args.n_iter)]
    pictures: list[np.ndarray] = []
    files: list[Path] = []
    for images in iter_edits(
        model,
        picture,
        [prompt for prompt, _ in jobs],
        seeds=[seed for _, seed in jobs],
        options=options,
        edit=edit,
        mask=mask,
        batch_size=args.n_samples,
        precision=args.precision,
        verbose=True,
    ):
        batch = to_uint8(images)
        if not args.skip_save:
            made = jobs[len(pictures) : len(pictures) + len(batch)]
            files += save_images(batch, Path(args.outdir) / "samples", [settings_of(args, *job) for job in made])
        pictures += list(batch)
    return pictures, files


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`."""
    args = parse_args(argv)
    from scripts.txt2img import check_words, read_prompts, sampling_options, save_grids

    prompts = read_prompts(args)
    if prompts is None and not args.embedding_path:
        raise ValueError('say what to draw: --prompt "...", --from-file or --embedding_path; --help has examples')
    from ldm.generate import load_model
    from ldm.generate_edit import Edit
    from ldm.protocols import TextEncoder

    edit, options = Edit(args.img_strength, args.invert), sampling_options(args)  # mistakes show before a model loads
    model = load_model(args.ckpt_path, args.config, device=args.device, precision=args.precision, size=args.H)
    if not isinstance(getattr(model, "cond_stage_model", None), TextEncoder):
        raise ValueError("this model draws no texts: name a text model with --ckpt_path")
    words = load_words_of(model, args)
    prompts = prompts or [f"a photo of {words[0]}"]
    check_words(prompts, words)
    if args.invert is not None and args.n_samples * args.n_iter > 1:
        log.warning("--invert starts from one noise for all seeds: the pictures of a prompt will be the same")
    pictures, files = draw(model, args, prompts, options, edit)
    grids = [] if args.skip_grid or len(pictures) == 1 else save_grids(args, prompts, pictures)
    for path in [*files[:8], *grids]:
        print(path)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone runs without being installed
    from ldm.cli import run_command

    run_command(main)
