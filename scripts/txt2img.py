"""Command to draw pictures from texts, with learned words if embedding files are given."""

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

log = logging.getLogger("txt2img")

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
PICTURE_FLAGS = (  # what a picture's metadata holds besides its prompt and seed, under the flags' names
    "negative_prompt", "sampler", "ddim_steps", "ddim_eta", "scale", "guidance_rescale", "H", "W",
    "ckpt_path", "config", "precision", "embedding_path", "rename", "strength",
)  # fmt: skip
NEWER_FLAGS = ("prompt_weights", "long_prompts", "clip_skip", "parameterization", "zero_terminal_snr")  # the same


def build_parser(prog: str = "txt2img.py", examples: str = EXAMPLES) -> argparse.ArgumentParser:
    """Parser of the command line, of this command or of one that adds to it."""
    from ldm.cli import add_debug_flag, add_model_flags

    parser = argparse.ArgumentParser(
        prog=prog,
        description="Draw pictures from texts, with learned words if embedding files are given.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--prompt", help="the text (default: 'a photo of' the first learned word)")
    add("--negative_prompt", default="", metavar="TEXT", help="what the pictures shall not show")
    add("--from-file", metavar="TXT", help="a file with one prompt per line, instead of --prompt")
    add("--from-image", metavar="PNG", help="take all settings from a picture made here; further flags change them")
    add("--outdir", default="outputs/txt2img-samples", help="default: %(default)s")
    add("--n_samples", type=int, default=4, metavar="N", help="pictures of a prompt at a time (default: %(default)s)")
    add("--n_iter", type=int, default=1, metavar="N", help="how often that many (default: %(default)s)")
    add("--batch_size", type=int, metavar="N", help="at most this many at a time, to save memory (default: n_samples)")
    add("--seed", type=int, default=42, help="picture k of a prompt is drawn with seed + k (default: 42)")
    add("--fixed_code", action="store_true", help="the same noise each of n_iter times: seeds from --seed on again")
    add("--H", type=int, metavar="PIXELS", help="height (default: the model's own, 256 for LDM-1.4B)")
    add("--W", type=int, metavar="PIXELS", help="width (default: the model's own)")
    add("--n_rows", type=int, default=0, metavar="N", help="pictures in a row of the grid (default: n_samples)")
    add("--skip_grid", action="store_true", help="write no grid of all pictures")
    add("--skip_save", action="store_true", help="write no single pictures")
    add_debug_flag(parser)
    _add_sampling_flags(parser)
    add_model_flags(parser)
    _add_model_options(parser)
    add_word_flags(parser)
    return parser


def _add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    add = group.add_argument
    add("--sampler", default="ddim", choices=("ddim", "plms", "dpm", "ddpm"), help="default: ddim")
    add("--plms", action="store_const", const="plms", dest="sampler", help="the same as --sampler plms")
    add(
        "--ddim_steps",
        "--steps",
        type=int,
        default=200,
        metavar="N",
        help="of any sampler (default: %(default)s)",
    )
    add("--ddim_eta", type=float, default=0.0, metavar="ETA", help="ddim: 0 adds no noise, 1 much (default: 0)")
    add(
        "--scale",
        type=float,
        default=5.0,
        help="guidance: how closely to follow the text; 1 is none (%(default)s)",
    )
    add("--guidance_rescale", type=float, default=0.0, metavar="R", help="0 to 1, against over-exposure (default: 0)")
    add("--prompt_weights", action="store_true", help="(word:1.2) counts more, (word:0.8) and [word] less; \\( is a (")
    add("--long_prompts", action="store_true", help="encode prompts longer than the text model's length in chunks")


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how to use the model, where its config does not say it right")
    add = group.add_argument
    add("--clip_skip", type=int, metavar="N",
        help="leave out the last N - 1 layers of the text model that it would run (default: 1, none)")  # fmt: skip
    add("--parameterization", choices=("eps", "v", "x0"), help="what the model predicts (default: as its config says)")
    add("--zero_terminal_snr", action="store_true",
        help="begin at pure noise; for models of v that were trained so")  # fmt: skip


def add_word_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `load_words_of` reads."""
    group = parser.add_argument_group("learned words")
    add = group.add_argument
    add("--embedding_path", nargs="+", default=[], metavar="FILE", help="files of learned words")
    add("--rename", nargs="+", default=[], metavar="OLD=NEW",
        help="other names for words; where several rename one word, the first is for the first file")  # fmt: skip
    add("--strength", nargs="+", type=float, default=[1.0], metavar="S",
        help="1: the learned word, 0: the word it started from; for all files or each (default: 1)")  # fmt: skip


def parse_args(argv: Sequence[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Parse the command line; with --from-image, the picture's settings are the defaults of all flags."""
    parser = parser or build_parser()
    args = parser.parse_args(argv)
    if args.from_image:
        from ldm.generate_files import read_settings

        settings = read_settings(args.from_image)
        unknown = {"prompt", "seed", *PICTURE_FLAGS} - set(settings)
        if unknown:
            raise ValueError(f"{args.from_image} was not made by txt2img.py: its settings lack {sorted(unknown)[0]}")
        parser.set_defaults(n_samples=1, n_iter=1, prompt=settings["prompt"], seed=settings["seed"])
        parser.set_defaults(**{flag: settings[flag] for flag in (*PICTURE_FLAGS, *NEWER_FLAGS) if flag in settings})
        args = parser.parse_args(argv)
        args.expected_words = settings.get("embedding_sha256", [])
    for flag in ("n_samples", "n_iter", "batch_size"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise ValueError(f"--{flag} must be at least 1, got {getattr(args, flag)}")
    return args


def read_prompts(args: argparse.Namespace) -> list[str] | None:
    """The prompts of --from-file or --prompt; None when neither is given."""
    if args.from_file is None:
        return None if args.prompt is None else [args.prompt]
    try:
        text = Path(args.from_file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{args.from_file} is no text file: write one prompt per line, in UTF-8") from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{args.from_file} holds no prompt: write one per line")
    return prompts


def load_words_of(model: Any, args: argparse.Namespace) -> list[str]:
    """Load the embedding files; returns the words that the prompts can use."""
    from ldm.generate_words import fingerprint, load_words, parse_renames

    if not args.embedding_path:
        if args.rename:
            raise ValueError(f"--rename {args.rename[0]} needs --embedding_path")
        return []
    words = load_words(model, args.embedding_path, parse_renames(args.rename), args.strength)
    args.embedding_sha256 = [fingerprint(path) for path in args.embedding_path]
    expected = getattr(args, "expected_words", [])
    if expected and expected != args.embedding_sha256:
        log.warning("the embedding files are not those that %s was made with", args.from_image)
    return words


def check_words(prompts: Sequence[str], words: Sequence[str]) -> None:
    """Warn of prompts in which no learned word occurs."""
    from ldm.generate_words import prompts_without_words

    without = prompts_without_words(prompts, words) if words else []
    if without:
        names = ", ".join(repr(word) for word in words)
        log.warning("no learned word occurs in %r; the files have %s", without[0], names)


def settings_of(args: argparse.Namespace, prompt: str, seed: int) -> dict[str, Any]:
    """What a picture's metadata says: all that it depends on."""
    settings = {"prompt": prompt, "seed": seed} | {flag: getattr(args, flag) for flag in (*PICTURE_FLAGS, *NEWER_FLAGS)}
    return settings | {"embedding_sha256": getattr(args, "embedding_sha256", [])}


def sampling_options(args: argparse.Namespace) -> SamplingOptions:
    """How to sample, by the flags."""
    from ldm.generate import SamplingOptions

    return SamplingOptions(
        sampler=args.sampler,
        steps=args.ddim_steps,
        eta=args.ddim_eta,
        scale=args.scale,
        guidance_rescale=args.guidance_rescale,
        negative_prompt=args.negative_prompt,
        height=args.H,
        width=args.W,
        prompt_weights=args.prompt_weights,
        long_prompts=args.long_prompts,
    )


def draw(
    model: Any, args: argparse.Namespace, prompts: Sequence[str], options: SamplingOptions
) -> tuple[list[np.ndarray], list[Path]]:
    """Draw and save all pictures of all prompts; returns them, in the prompts' order, and the files."""
    from ldm.generate import iter_images, save_images, to_uint8

    count = args.n_samples * args.n_iter
    seeds = [args.seed + (k % args.n_samples if args.fixed_code else k) for k in range(count)]
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    pictures: list[np.ndarray] = []
    files: list[Path] = []
    for images in iter_images(
        model,
        [prompt for prompt, _ in jobs],
        seeds=[seed for _, seed in jobs],
        options=options,
        batch_size=args.batch_size or args.n_samples,
        precision=args.precision,
        verbose=True,
    ):
        batch = to_uint8(images)
        if not args.skip_save:
            made = jobs[len(pictures) : len(pictures) + len(batch)]
            files += save_images(batch, Path(args.outdir) / "samples", [settings_of(args, *job) for job in made])
        pictures += list(batch)
    return pictures, files


def save_grids(args: argparse.Namespace, prompts: Sequence[str], pictures: Sequence[np.ndarray]) -> list[Path]:
    """A grid of each prompt's pictures; of all prompts' where each has one."""
    import numpy as np

    from ldm.generate import save_grid, slug

    count = len(pictures) // len(prompts)
    if count == 1:
        name = slug(prompts[0]) if len(prompts) == 1 else Path(args.from_file).stem
        groups = {name: pictures}
    else:
        groups = {slug(prompt): pictures[k * count : (k + 1) * count] for k, prompt in enumerate(prompts)}
    columns = args.n_rows or (args.n_samples if count > 1 else None)
    return [
        save_grid(np.stack(part), Path(args.outdir) / f"{name}_{args.seed}-grid.png", columns)
        for name, part in groups.items()
    ]


def run(args: argparse.Namespace) -> None:
    """Load the model, draw and save all that `args` ask for, and print where it is."""
    prompts = read_prompts(args)
    if prompts is None and not args.embedding_path:
        raise ValueError('say what to draw: --prompt "...", --from-file or --embedding_path; --help has examples')
    from ldm.generate import adjust_model, load_model
    from ldm.protocols import TextEncoder

    options = sampling_options(args)  # what is wrong with the flags shows before a large model is loaded
    model = load_model(args.ckpt_path, args.config, device=args.device, precision=args.precision, size=args.H)
    if not isinstance(getattr(model, "cond_stage_model", None), TextEncoder):
        name = type(model).__name__
        raise ValueError(f"this {name} draws no texts: name a text model, or use scripts/sample_diffusion.py")
    if getattr(model, "conditioning_key", None) == "hybrid":
        raise ValueError("this model fills masked parts of pictures: use scripts/inpaint.py")
    adjust_model(model, args.parameterization, args.zero_terminal_snr, args.clip_skip)
    words = load_words_of(model, args)
    prompts = prompts or [f"a photo of {words[0]}"]
    check_words(prompts, words)
    pictures, files = draw(model, args, prompts, options)
    grids = [] if args.skip_grid or len(pictures) == 1 else save_grids(args, prompts, pictures)
    for path in [*files[:8], *grids]:
        print(path)
    if len(files) > 8:
        print(f"... and {len(files) - 8} more in {files[0].parent}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`."""
    run(parse_args(argv))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone runs without being installed
    from ldm.cli import run_command

    run_command(main)
