"""Command to make new pictures from a picture and a text: variations, edits, edits inside a mask."""

from __future__ import annotations

import argparse
import functools
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

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
  a picture again, or the same with more guidance:
    python scripts/img2img.py --from-image outputs/img2img-samples/samples/a-photo-of_42.png --scale 8
"""
OWN_FLAGS = ("init_img", "mask", "invert", "img_strength", "word_strength")  # that a picture's metadata holds too


def build_parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    from ldm.generate_command import text_parser

    parser = text_parser(
        "img2img.py",
        "Make new pictures from a picture and a text, anywhere in it or only inside a mask.",
        EXAMPLES,
        size="the picture's shape at the model's own size",
        samplers=("ddim", "plms", "dpm"),
        strength="--word_strength",
    )
    parser.set_defaults(outdir="outputs/img2img-samples", n_samples=2, ddim_steps=50, fixed_code=False)
    group = parser.add_argument_group("the picture to start from")
    add = group.add_argument
    add("--init-img", "--init_img", metavar="FILE", help="the picture; needed unless --from-image says it")
    add("--mask", metavar="FILE", help="a picture that is white where something new is drawn; the rest is kept")
    add("--invert", metavar="TEXT",
        help="what the picture shows: start from the noise that leads to it, so that its layout stays")  # fmt: skip
    add("--strength", type=float, dest="img_strength", metavar="S",
        help="share of the steps drawn again: 0 keeps the picture, 1 forgets it (default: 0.75; 1 with --mask "
        "or --invert)")  # fmt: skip
    for flag in ("--C", "--f"):
        parser.add_argument(flag, type=int, metavar="N", help="a published flag without effect: the model says it")
    parser.add_argument(
        "--fixed_code",
        action="store_const",
        const=False,
        help="a published flag without effect: a seed is always the same noise",
    )
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    from ldm.generate_checks import check_texts
    from ldm.generate_command import parse_text_args

    args = parse_text_args(argv, build_parser(), OWN_FLAGS)
    if args.init_img is None:
        raise ValueError("name the picture to start from with --init-img")
    for path in (args.init_img, args.mask):
        if path is not None and not Path(path).is_file():
            raise FileNotFoundError(f"no picture at {path}")
    if args.img_strength is None:
        args.img_strength = 0.75 if args.mask is None and args.invert is None else 1.0
    args.strength = args.word_strength
    check_texts(args, "invert")
    return args


def record_pictures(args: argparse.Namespace) -> None:
    """See that the metadata tells what is in the picture and the mask; warn where --from-image had other ones."""
    from ldm.generate_files import file_hash

    made_with = getattr(args, "made_with", {})
    for flag in ("init_img", "mask"):
        path, name = getattr(args, flag), f"{flag}_sha256"
        found = None if path is None else file_hash(path)
        setattr(args, name, found)
        args.recorded += (name,)
        if path is not None and path == made_with.get(flag) and made_with.get(name) not in (None, found):
            log.warning("%s has changed since %s was made from it", path, args.from_image)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`."""
    args = parse_args(argv)
    from ldm.cli import print_files
    from ldm.generate_command import draw, prepare, sampling_options
    from ldm.generate_edit import Edit, iter_edits, read_pictures

    edit = Edit(args.img_strength, args.invert)  # a mistake shows before a model is loaded
    edit.check(sampling_options(args))
    record_pictures(args)
    model, prompts, options = prepare(args)
    picture, mask = read_pictures(args.init_img, args.mask, model, options)
    if args.invert is not None and args.n_samples * args.n_iter > 1:
        log.warning("--invert starts from one noise for all seeds: the pictures of a prompt will be the same")
    print_files(
        *draw(args, prompts, functools.partial(iter_edits, model, picture, options=options, edit=edit, mask=mask))
    )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone runs without being installed
    from ldm.cli import run_command

    run_command(main)
