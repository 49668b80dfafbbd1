"""Command to draw pictures from an unconditional or class-conditional model; writes PNG files and one .npz."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ldm.generate import SamplingOptions

EXAMPLES = """\
examples:
  100 pictures of a model, in models/ldm/celeba256/samples/:
    python scripts/sample_diffusion.py -r models/ldm/celeba256 -n 100 -c 200 -e 0
  of a model in training, with all 1000 steps of the ancestral chain:
    python scripts/sample_diffusion.py -r logs/2025-01-31T12-00-00_my-model -n 16 -v
  classes 7 and 207 in turn, guided:
    python scripts/sample_diffusion.py -r models/ldm/cin256 -n 20 --classes 7 207 --scale 3
"""


def build_parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    from ldm.cli import add_debug_flag

    parser = argparse.ArgumentParser(
        prog="sample_diffusion.py",
        description="Draw pictures from an unconditional or class-conditional model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-r", "--resume", metavar="FILE|DIR", help="weights, a model's folder or a run directory")
    add("-n", "--n_samples", type=int, default=50000, metavar="N", help="number of pictures (default: 50000)")
    add("-e", "--eta", type=float, default=1.0, help="eta of the ddim sampler: 0 adds no noise (default: 1.0)")
    add("-v", "--vanilla_sample", action="store_true", help="ancestral sampling over all trained steps")
    add("-l", "--logdir", metavar="DIR", help="where the pictures go (default: beside the weights)")
    add("-c", "--custom_steps", type=int, default=50, metavar="N", help="steps (default: 50)")
    add("--batch_size", type=int, default=10, metavar="N", help="pictures at a time (default: 10)")
    add(
        "--sampler",
        default="ddim",
        choices=("ddim", "plms", "dpm", "ddpm"),
        help="default: ddim; plms and dpm need -e 0",
    )
    add("--classes", type=int, nargs="+", metavar="K", help="class numbers to draw in turn (default: all)")
    add("--scale", type=float, default=1.0, help="guidance of a class-conditional model (default: 1, none)")
    add("--null_class", type=int, metavar="K", help="class that means none, for guidance (default: the last one)")
    add("--seed", type=int, default=42, help="picture k is drawn with seed + k (default: 42)")
    add("--config", metavar="YAML", help="the model's config (default: found beside the weights or from them)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto (default: auto)")
    add("--precision", default="full", choices=("full", "autocast", "half"),
        help="full: float32; autocast: 16 bits where it is safe; half: 16-bit weights (default: full)")  # fmt: skip
    add("--no_npz", action="store_true", help="write no .npz file")
    add_debug_flag(parser)
    return parser


def class_labels(model: Any, args: argparse.Namespace) -> list[int] | None:
    """A class for each picture, or None for an unconditional model."""
    from ldm.modules.encoders.label import ClassEmbedder

    stage = getattr(model, "cond_stage_model", None)
    if stage is None:
        if args.classes is not None:
            raise ValueError("--classes: this model is unconditional")
        return None
    if not isinstance(stage, ClassEmbedder):
        raise ValueError(f"the model is conditioned by {type(stage).__name__}: use scripts/txt2img.py for texts")
    count = stage.embedding.num_embeddings
    classes = args.classes if args.classes is not None else list(range(count))
    for label in [*classes, args.null_class or 0]:
        if not 0 <= label < count:
            raise ValueError(f"class {label}: the model has the classes 0 to {count - 1}")
    return [classes[k % len(classes)] for k in range(args.n_samples)]


def sampling_options(model: Any, args: argparse.Namespace) -> SamplingOptions:
    """How to sample, by the flags."""
    from ldm.generate import SamplingOptions

    if args.vanilla_sample:
        return SamplingOptions(sampler="ddpm", steps=model.num_timesteps, eta=1.0, scale=args.scale)
    return SamplingOptions(sampler=args.sampler, steps=args.custom_steps, eta=args.eta, scale=args.scale)


def encoder_of(model: Any, args: argparse.Namespace, labels: Sequence[int]) -> Callable[[slice], tuple[Any, Any]]:
    """A function from rows to the conditioning of their classes, and to that of no class where guidance needs it."""
    import torch

    stage = model.cond_stage_model
    null = stage.embedding.num_embeddings - 1 if args.null_class is None else args.null_class

    def embed(classes: Sequence[int]) -> torch.Tensor:
        return model.get_learned_conditioning({stage.key: torch.tensor(classes, device=model.device)})  # (B, 1, D)

    def encode(rows: slice) -> tuple[Any, Any]:
        part = labels[rows]
        return embed(part), embed([null] * len(part)) if args.scale != 1 else None

    return encode


def output_folder(args: argparse.Namespace, checkpoint: Path) -> Path:
    """A new folder `samples/<time>` in --logdir, or beside the weights."""
    base = Path(args.logdir) if args.logdir else checkpoint.parent
    return base / "samples" / time.strftime("%Y-%m-%d-%H-%M-%S")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`."""
    args = build_parser().parse_args(argv)
    if args.n_samples < 1 or args.batch_size < 1:
        raise ValueError(f"-n {args.n_samples} and --batch_size {args.batch_size} must be at least 1")
    if args.resume is None:
        raise ValueError("say which model to draw from: -r FILE|DIR; --help has examples")
    from ldm.generate import find_model_files, iter_images, load_model, open_npz, require_finite, save_png, to_uint8
    from ldm.protocols import Denoiser

    files = find_model_files(args.resume, args.config)
    model = load_model(files.checkpoint, files.config, device=args.device, precision=args.precision)
    if not isinstance(model, Denoiser):
        raise ValueError(f"{args.resume} holds a {type(model).__name__}, which draws nothing: name a diffusion model")
    labels = class_labels(model, args)
    options = sampling_options(model, args)
    folder = output_folder(args, files.checkpoint)
    npz = folder / "numpy" / f"{args.n_samples}-samples.npz"
    started, count = time.monotonic(), 0
    with contextlib.nullcontext() if args.no_npz else open_npz(npz, args.n_samples) as append:
        for images in iter_images(
            model,
            seeds=range(args.seed, args.seed + args.n_samples),
            options=options,
            conditioning=encoder_of(model, args, labels) if labels is not None else None,
            batch_size=args.batch_size,
            precision=args.precision,
            verbose=True,
        ):
            require_finite(images)
            pictures = to_uint8(images)
            for image in pictures:
                settings = dataclasses.asdict(options) | {"seed": args.seed + count}
                if labels is not None:
                    settings["class_label"] = labels[count]
                save_png(image, folder / "img" / f"sample_{count:06d}.png", settings)
                count += 1
            if append is not None:
                append(pictures)
    seconds = time.monotonic() - started
    print(f"{count} pictures in {folder / 'img'}, {seconds / count:.2f} s each")
    if not args.no_npz:
        print(f"all of them as one array in {npz}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone runs without being installed
    from ldm.cli import run_command

    run_command(main)
