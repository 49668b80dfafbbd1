"""What the commands that draw texts share: their flags, loading the model and its words, drawing and saving."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli import add_debug_flag, add_model_flags
from ldm.generate_checks import check_eta, check_seed, check_settings, check_size, check_texts

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ldm.generate import SamplingOptions

log = logging.getLogger(__name__)

SAMPLERS = ("ddim", "plms", "dpm", "ddpm")
PICTURE_FLAGS = (  # what a picture's metadata holds besides its prompt and seed, under the flags' names
    "negative_prompt", "sampler", "ddim_steps", "ddim_eta", "scale", "guidance_rescale", "H", "W",
    "ckpt_path", "config", "precision", "embedding_path", "rename",
)  # fmt: skip
NEWER_FLAGS = ("prompt_weights", "long_prompts", "clip_skip", "parameterization", "zero_terminal_snr")  # the same


def text_parser(
    prog: str,
    description: str,
    examples: str,
    *,
    size: str = "the model's own, 256 for LDM-1.4B",
    weights: str = "the model that comes along",
    samplers: Sequence[str] = SAMPLERS,
    strength: str = "--strength",
) -> argparse.ArgumentParser:
    """Parser of a command that draws texts; it still lacks the defaults of `--outdir`, `--n_samples`, `--ddim_steps`.

    `size` says how large pictures are by default, `weights` which model draws them; `strength` is the flag for the
    strength of learned words.
    """
    parser = argparse.ArgumentParser(
        prog=prog, description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--prompt", help="the text (default: 'a photo of' the first learned word)")
    add("--negative_prompt", default="", metavar="TEXT", help="what the pictures shall not show")
    add("--from-file", metavar="TXT", help="a file with one prompt per line, instead of --prompt")
    add("--from-image", metavar="PNG", help="take all settings from a picture made here; further flags change them")
    add("--outdir", help="default: %(default)s")
    add("--n_samples", type=int, metavar="N", help="pictures of a prompt at a time (default: %(default)s)")
    add("--n_iter", type=int, default=1, metavar="N", help="how often that many (default: %(default)s)")
    add("--batch_size", type=int, metavar="N", help="at most this many at a time, to save memory (default: n_samples)")
    add("--seed", type=int, default=42, help="picture k of a prompt is drawn with seed + k (default: 42)")
    add("--H", type=int, metavar="PIXELS", help=f"height (default: {size})")
    add("--W", type=int, metavar="PIXELS", help=f"width (default: {size})")
    add("--n_rows", type=int, default=0, metavar="N", help="pictures in a row of the grid (default: n_samples)")
    add("--skip_grid", action="store_true", help="write no grid of all pictures")
    add("--skip_save", action="store_true", help="write no single pictures")
    add_debug_flag(parser)
    _add_sampling_flags(parser, samplers)
    add_model_flags(parser, weights)
    _add_model_options(parser)
    add_word_flags(parser, strength)
    return parser


def _add_sampling_flags(parser: argparse.ArgumentParser, samplers: Sequence[str]) -> None:
    group = parser.add_argument_group("sampling")
    add = group.add_argument
    add("--sampler", default="ddim", choices=samplers, help="default: ddim")
    add("--plms", action="store_const", const="plms", dest="sampler", help="the same as --sampler plms")
    add("--ddim_steps", "--steps", type=int, metavar="N", help="of any sampler (default: %(default)s)")
    add("--ddim_eta", type=float, default=0.0, metavar="ETA", help="ddim: 0 adds no noise, 1 much (default: 0)")
    add("--scale", type=float, default=5.0,
        help="guidance: how closely to follow the text; 1 is none (default: %(default)s)")  # fmt: skip
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


class Collect(argparse.Action):
    """Gathers the values of a flag that is given several times; the first one takes the place of the default."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        """Add `values`."""
        del parser
        earlier = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*([] if earlier is self.default else earlier), *values])


def add_word_flags(parser: argparse.ArgumentParser, strength: str = "--strength") -> None:
    """Add the flags that `load_words_of` reads; it finds the strengths in `args.strength`."""
    group = parser.add_argument_group("learned words")
    add = group.add_argument
    add("--embedding_path", nargs="+", action=Collect, default=[], metavar="FILE", help="files of learned words")
    add("--rename", nargs="+", action=Collect, default=[], metavar="OLD=NEW",
        help="other names for words; where several rename one word, the first is for the first file")  # fmt: skip
    add(strength, nargs="+", action=Collect, type=float, default=[1.0], metavar="S",
        help="1: the learned word, 0: the word it started from; for all files or each (default: 1)")  # fmt: skip


def parse_text_args(
    argv: Sequence[str] | None, parser: argparse.ArgumentParser, own: Sequence[str]
) -> argparse.Namespace:
    """Parse the command line; with --from-image, the picture's settings are the defaults of all flags.

    `own` are the flags that only this command has and that go into its pictures' metadata.
    """
    args = parser.parse_args(argv)
    if args.from_image:
        made_with = _defaults_of_picture(args.from_image, parser, own)
        args = parser.parse_args(argv)
        args.made_with = made_with
    args.recorded = (*PICTURE_FLAGS, *NEWER_FLAGS, *own)
    _check_flags(args)
    return args


def _defaults_of_picture(path: str, parser: argparse.ArgumentParser, own: Sequence[str]) -> dict[str, Any]:
    """Make a picture's settings the defaults of all flags; returns them."""
    from ldm.generate_files import read_settings

    settings = read_settings(path)
    needed = ("prompt", "seed", *PICTURE_FLAGS, *own)
    lacking = set(needed) - set(settings)
    if lacking:
        raise ValueError(f"{path} was not made by {parser.prog}: its settings lack {min(lacking)}")
    flags = [flag for flag in (*needed, *NEWER_FLAGS) if flag in settings]
    check_settings(path, settings, parser, flags)
    parser.set_defaults(n_samples=1, n_iter=1, **{flag: settings[flag] for flag in flags})
    return settings


def _check_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that no model could draw with."""
    for flag in ("n_samples", "n_iter", "batch_size"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise ValueError(f"--{flag} must be at least 1, got {getattr(args, flag)}")
    if (getattr(args, "n_rows", None) or 0) < 0:
        raise ValueError(f"--n_rows must be at least 0, got {args.n_rows}")
    check_seed(args.seed, args.n_samples * args.n_iter)
    check_eta("--ddim_eta", args.ddim_eta)
    check_size("--W and --H", args.W, args.H)
    check_texts(args, "prompt", "negative_prompt", "rename")


def read_prompts(args: argparse.Namespace) -> list[str] | None:
    """The prompts of --from-file or --prompt; None when neither is given, but learned words are."""
    if args.from_file is None:
        if args.prompt is None and not args.embedding_path:
            raise ValueError('say what to draw: --prompt "...", --from-file or --embedding_path; --help has examples')
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
    """Load the embedding files; returns the words that the prompts can use, and keeps them by file in `args`."""
    from ldm.generate_words import fingerprint, load_files, parse_renames

    args.words_of_files = []
    if not args.embedding_path:
        if args.rename:
            raise ValueError(f"--rename {args.rename[0]} needs --embedding_path")
        return []
    if not all(map(math.isfinite, args.strength)):
        raise ValueError(f"the strength of a word must be a number, got {args.strength}")
    names = load_files(model, args.embedding_path, parse_renames(args.rename), args.strength)
    args.words_of_files = list(zip(args.embedding_path, names, strict=True))
    args.embedding_sha256 = [fingerprint(path) for path in args.embedding_path]
    expected = getattr(args, "made_with", {}).get("embedding_sha256")
    if expected and expected != args.embedding_sha256:
        log.warning("the embedding files are not those that %s was made with", args.from_image)
    return [word for _, words in args.words_of_files for word in words]


def check_words(
    prompts: Sequence[str],
    words: Sequence[str],
    negative_prompt: str = "",
    files: Sequence[tuple[str, Sequence[str]]] = (),
) -> None:
    """Warn of prompts in which no learned word occurs, and of `files` (path, its words) that nothing makes use of.

    A word in the negative prompt is used, too, and with every prompt.
    """
    from ldm.generate_words import prompts_without_words
    from ldm.modules.embedding_io import some_words

    def unused(names: Sequence[str], prompts: Sequence[str]) -> bool:
        texts = [*prompts, negative_prompt]
        return len(prompts_without_words(texts, names)) == len(texts)

    idle = [(path, names) for path, names in files if unused(names, prompts)]
    for path, names in idle:
        log.warning("%s: none of its words occurs in a prompt or the negative one; it has %s", path, some_words(names))
    without = [prompt for prompt in prompts if words and unused(words, [prompt])]
    if without and len(idle) < max(len(files), 1):  # else it is said already
        log.warning("no learned word occurs in %r; the files have %s", without[0], some_words(words))


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


def prepare(args: argparse.Namespace) -> tuple[Any, list[str], SamplingOptions]:
    """The model with its learned words, the prompts, and how to sample."""
    prompts = read_prompts(args)
    count = args.n_samples * args.n_iter * len(prompts or [""])
    if args.skip_save and (args.skip_grid or count == 1):
        raise ValueError("nothing would be saved: leave --skip_save" + " or --skip_grid" * args.skip_grid + " out")
    from ldm.generate import adjust_model, load_model
    from ldm.generate_files import require_folder
    from ldm.protocols import TextEncoder

    require_folder(args.outdir)
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
    check_words(prompts, words, args.negative_prompt, args.words_of_files)
    return model, prompts, options


def settings_of(args: argparse.Namespace, prompt: str, seed: int) -> dict[str, Any]:
    """What a picture's metadata says: all that it depends on."""
    settings = {"prompt": prompt, "seed": seed} | {flag: getattr(args, flag) for flag in args.recorded}
    return settings | {"embedding_sha256": getattr(args, "embedding_sha256", [])}


def draw(
    args: argparse.Namespace, prompts: Sequence[str], iterate: Callable[..., Iterator[Tensor]]
) -> tuple[list[Path], list[Path]]:
    """Draw and save all pictures of all prompts; returns their files and those of the grids.

    `iterate(prompts, seeds=, batch_size=, precision=, verbose=)` yields pictures (b, 3, H, W), as `iter_images` does.
    """
    from ldm.generate import require_finite, save_images, to_uint8

    count = args.n_samples * args.n_iter
    seeds = [args.seed + (k % args.n_samples if args.fixed_code else k) for k in range(count)]
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    pictures: list[np.ndarray] = []
    files: list[Path] = []
    for images in iterate(
        [prompt for prompt, _ in jobs],
        seeds=[seed for _, seed in jobs],
        batch_size=args.batch_size or args.n_samples,
        precision=args.precision,
        verbose=True,
    ):
        require_finite(images)
        batch = to_uint8(images)
        if not args.skip_save:
            made = jobs[len(pictures) : len(pictures) + len(batch)]
            files += save_images(batch, Path(args.outdir) / "samples", [settings_of(args, *job) for job in made])
        pictures += list(batch)
    return files, [] if args.skip_grid or len(pictures) == 1 else save_grids(args, prompts, pictures)


def save_grids(args: argparse.Namespace, prompts: Sequence[str], pictures: Sequence[np.ndarray]) -> list[Path]:
    """A grid of each prompt's pictures; of all prompts' where each has one.

    Where prompts have the same name for their files, the second's grid gets a -2 and so on, as their pictures do.
    """
    import numpy as np

    from ldm.generate import save_grid, slug

    count = len(pictures) // len(prompts)
    if count == 1:
        names = [slug(prompts[0]) if len(prompts) == 1 else Path(args.from_file).stem]
        parts = [pictures]
    else:
        of_prompt = {prompt: pictures[k * count : (k + 1) * count] for k, prompt in enumerate(prompts)}
        names, parts = [slug(prompt) for prompt in of_prompt], list(of_prompt.values())
    columns = args.n_rows or (args.n_samples if count > 1 else None)
    files = []
    for k, (name, part) in enumerate(zip(names, parts, strict=True)):
        number = f"-{names[:k].count(name) + 1}" if name in names[:k] else ""
        path = Path(args.outdir) / f"{name}_{args.seed}{number}-grid.png"
        files.append(save_grid(np.stack(part), path, columns))
    return files
