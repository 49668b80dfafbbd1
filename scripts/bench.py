"""Command to measure time, memory and arithmetic of every part, beside the machine's own rate and other code."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

MODELS = ("emoji", "ldm", "sd1")
PRECISIONS = ("float32", "bfloat16")
JOBS = (
    # before the steps that train, so that words are still the same for all where outputs are compared
    *("unet_forward", "encode", "decode", "text", "unet_training", "inversion_step"),
    *("guided_step", "picture", "picture_dpm20", "growth", "load", "startup", "readme_job", "convergence"),
)
EXAMPLES = """\
examples:
  everything, tiny, in a few minutes:
    python scripts/bench.py --quick
  a training step of Stable Diffusion 1 beside diffusers':
    python scripts/bench.py --only sd1/*/inversion_step sd1/*/unet_training --against diffusers
  the README's main job beside a loop without caches:
    python scripts/bench.py --only emoji/*/readme_job --reference
  on a GPU, with compilation:
    python scripts/bench.py --device cuda --compile --cuda-graphs --channels-last

Cells are named model/precision/work. Each is written to the JSON file when it is measured; the same command started
again measures what is missing.
"""


def build_parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    from ldm.cli import add_debug_flag

    parser = argparse.ArgumentParser(
        prog="bench.py",
        description="Measure time, peak memory and model FLOPs of every part with random weights: rounds interleaved "
        "in one process, medians, ratios, and the fraction of the matrix-multiply rate measured alongside.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", nargs="+", default=[], metavar="CELL", help="cells such as sd1/float32/unet_forward; * is any word")
    add("--against", choices=("diffusers",), help="do the same work in this package, if it is installed")
    add("--reference", action="store_true", help="run the README's main job too, as a loop without caches")
    add("--quick", action="store_true", help="tiny models: whether all works, no figures to compare")
    add(
        "--rounds",
        type=int,
        metavar="N",
        help="calls of each contestant; whole pictures and processes are timed once (default: 5, quick: 2)",
    )
    add("--steps", type=int, metavar="N", help="steps of a picture (default: 50, quick: 2)")
    add("--reference-steps", type=int, metavar="N", help="steps of the README's job (default: 125, quick: 2)")
    add("--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, on a busy machine")
    add("--no-memory", action="store_true", help="skip the processes that measure peak memory")
    add("--device", default="auto", help="cpu, cuda, cuda:1 or auto (default: auto)")
    add("--threads", type=int, metavar="N", help="processor threads (default: torch's)")
    add("--compile", action="append_const", dest="switches", const="compile", help="measure torch.compile, too")
    add("--cuda-graphs", action="append_const", dest="switches", const="cuda_graphs",
        help="measure torch.compile with CUDA graphs, too")  # fmt: skip
    add("--channels-last", action="append_const", dest="switches", const="channels_last",
        help="measure convolutions in channels-last order, too")  # fmt: skip
    add("--out", type=Path, default=Path("logs/bench/bench.json"), metavar="JSON", help="default: %(default)s")
    add("--fresh", action="store_true", help="measure everything anew")
    add("--child", help=argparse.SUPPRESS)
    add_debug_flag(parser)
    return parser


def chosen_cells(patterns: Sequence[str], reference: bool) -> list[tuple[str, str, str]]:
    """Cells that match any of the patterns; all without patterns. The README's job only when asked for."""
    from fnmatch import fnmatch

    every = [(m, p, j) for m in MODELS for p in PRECISIONS for j in JOBS if j != "readme_job" or reference]
    unused = [pattern for pattern in patterns if not any(fnmatch("/".join(cell), pattern) for cell in every)]
    if unused:
        raise ValueError(
            f"--only {unused[0]}: no such cell; give model/precision/work with a model of {', '.join(MODELS)}, a "
            f"precision of {', '.join(PRECISIONS)} and work of {', '.join(JOBS)} (readme_job with --reference)"
        )
    return [cell for cell in every if not patterns or any(fnmatch("/".join(cell), p) for p in patterns)]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; counts that were not given follow from --quick."""
    args = build_parser().parse_args(argv)
    for name, usual, quick in (("rounds", 5, 2), ("steps", 50, 2), ("reference_steps", 125, 2)):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        setattr(args, name, value or (quick if args.quick else usual))
    args.cells = chosen_cells(args.only, args.reference)
    args.switches = tuple(args.switches or ())
    return args


def measure(args: argparse.Namespace) -> None:
    """Measure all cells, write JSON, table and plot."""
    import torch

    from evaluation.speed.measure import machine
    from evaluation.speed.peers import missing_packages
    from evaluation.speed.results import Results, plot_growth, table
    from evaluation.speed.session import Plan, run
    from ldm.generate import select_device

    if args.threads:
        torch.set_num_threads(args.threads)
    if args.against and (missing := missing_packages()):
        raise ValueError(f"--against {args.against} needs {' and '.join(missing)}: pip install -e '.[bench]'")
    device = select_device(args.device)
    setting = machine(device) | {
        **{name: getattr(args, name) for name in ("quick", "rounds", "steps", "reference_steps", "clock", "against")},
        "switches": list(args.switches),
    }
    results = Results(args.out, setting, args.fresh)
    plan = Plan(
        rounds=args.rounds,
        device=device,
        quick=args.quick,
        against=args.against,
        switches=args.switches,
        memory=not args.no_memory,
        clock=args.clock,
        steps=args.steps,
        reference_steps=args.reference_steps,
    )
    run(plan, args.cells, results)
    text = table(results.cells)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".md").write_text(text)
    print(text)
    plot = args.out.with_suffix(".png")
    if plot_growth(results.cells, plot):
        print(plot)
    print(args.out)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`."""
    args = parse_args(argv)
    if args.child:
        from evaluation.speed.runs import answer

        print(json.dumps(answer(json.loads(args.child))))
        return
    measure(args)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone runs without being installed
    from ldm.cli import run_command

    run_command(main)
