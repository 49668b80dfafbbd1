"""Command to reproduce a table of a paper: trains what is missing, draws, scores, writes table, figure and report."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

EXAMPLES = """\
examples:
  Figure 10 of the Textual Inversion paper on the model that comes along; a first look within minutes:
    python scripts/reproduce_tables.py --table figure10 --quick
  the whole figure; stop it when you like, the same command goes on:
    python scripts/reproduce_tables.py --table figure10
  on the paper's model with your own folders of pictures (one folder per concept):
    python scripts/reproduce_tables.py --table figure10 --model ldm --concepts concepts --ckpt_path model.ckpt
  a fourth of the cells on this machine; the others do --shard 2/4 ... 4/4 on the same --store:
    python scripts/reproduce_tables.py --table figure10 --shard 1/4
  write table, figure and report from what is done so far:
    python scripts/reproduce_tables.py --table figure10 --report_only
  which tables there are:
    python scripts/reproduce_tables.py --list
"""


def build_parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    from ldm.cli import add_debug_flag

    parser = argparse.ArgumentParser(
        prog="reproduce_tables.py",
        description="Reproduce a table of a paper. What is done is kept under --store and never computed twice; "
        "table.md, table.csv, cells.csv, table.json, table.tex, figure.png and report.html go to results/<table>.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--table", metavar="NAME|YAML", help="a table of configs/evaluation (see --list), or a file of yours like them")
    add("--list", action="store_true", help="list the tables and models")
    add("--model", default="embedded", metavar="NAME", help="embedded, ldm, sd15 or another of --models "
        "(default: embedded)")  # fmt: skip
    add("--models", metavar="YAML", help="a file of yours like configs/evaluation/models.yaml")
    add("--ckpt_path", metavar="FILE|DIR", help="the model's weights (default: where models.yaml says)")
    add("--concepts", metavar="DIR|SET", help="folder with one folder of pictures per concept; for the embedded model "
        "also development, final or style (default: as models.yaml says)")  # fmt: skip
    add("--second", metavar="NAME", help="the second concept of tables with two words, a folder beside the others")
    add("--data", metavar="DIR", help="pictures (and captions) for the tables of first stages and of MS-COCO")
    add("--inception_weights", metavar="FILE", help="feature network behind FID, KID and IS "
        "(pt_inception-2015-12-05-6726825d.pth)")  # fmt: skip
    add("--ratings", metavar="DIR|FILE", help="ratings for DreamBench++, see scripts/rate_dreambench_plus.py")
    add("--names", nargs="+", metavar="NAME", help="only these concepts")
    add("--rows", nargs="+", metavar="ROW", help="do only these rows of the table; the others show what is there")
    add("--seeds", nargs="+", type=int, metavar="N", help="seeds of training (default: as models.yaml says)")
    add("--n_samples", type=int, metavar="N", help="pictures of each prompt (default: as models.yaml says)")
    add("--scorer_weights", nargs="+", default=[], metavar="ALIAS=FILE",
        help="local weight files of the judges, for example clip=ViT-B-32.safetensors")  # fmt: skip
    add("--quick", action="store_true", help="fewer concepts, seeds, steps and pictures: for a first look")
    add("--shard", default="1/1", metavar="I/N", help="do part I of N, to split the work over machines")
    add(
        "--store", default="outputs/evaluation", metavar="DIR", help="where the cells lie (default: outputs/evaluation)"
    )
    add("--out", metavar="DIR", help="where the table goes, and scores of an earlier run are taken from "
        "(default: results/<table>)")  # fmt: skip
    add("--export", metavar="DIR", help="also copy the pictures to DIR/<row>/<concept>/<prompt>/, for a user study")
    add("--report_only", action="store_true", help="compute nothing, write the table from what is there")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto (default: auto)")
    add_debug_flag(parser)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; raises `ValueError` for what does not go together."""
    args = build_parser().parse_args(argv)
    if not args.list and not args.table:
        raise ValueError("say which table: --table figure10, or --list to see them all")
    pairs = [word.partition("=") for word in args.scorer_weights]
    for name, separator, file in pairs:
        if not (name and separator and file):
            raise ValueError(f"--scorer_weights {name}: write ALIAS=FILE, for example clip=ViT-B-32.safetensors")
    args.weights = {name: file for name, _, file in pairs}
    if args.n_samples is not None and args.n_samples < 1:
        raise ValueError(f"--n_samples must be at least 1, got {args.n_samples}")
    return args


def list_tables() -> None:
    """Print the tables and the models."""
    from evaluation.experiments import read_table, read_yaml, table_names
    from ldm.resources import config_path

    for name in table_names():
        print(f"{name:22} {read_table(name).title}")
    print()
    for name, model in read_yaml(config_path("evaluation/models.yaml")).items():
        print(f"--model {name:14} {model['label']}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`."""
    args = parse_args(argv)
    if args.list:
        list_tables()
        return
    import main as training
    from evaluation.cells import parse_shard
    from evaluation.reproduce import Options, reproduce
    from evaluation.tables import markdown_claims, markdown_rows, progress_note, with_interval

    words = sys.argv[1:] if argv is None else list(argv)
    options = Options(
        table=args.table,
        model=args.model,
        models_file=args.models,
        concepts=args.concepts,
        names=args.names,
        rows=args.rows,
        seeds=args.seeds,
        pictures=args.n_samples,
        checkpoint=args.ckpt_path,
        weights=args.weights,
        quick=args.quick,
        part=parse_shard(args.shard),
        store=args.store,
        out=args.out,
        device=args.device,
        report_only=args.report_only,
        second=args.second,
        data=args.data,
        inception_weights=args.inception_weights,
        ratings=args.ratings,
        export=args.export,
        command=shlex.join(["python", "scripts/reproduce_tables.py", *words]),
    )
    result = reproduce(options, training.main)
    measures = [f"{says}: {with_interval(found)}" for says, found in result.measures.items()]
    for line in (*markdown_rows(result), "", *markdown_claims(result), "", *measures, progress_note(result)):
        print(line)
    print(options.out_folder / "report.html")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone runs without being installed
    from ldm.cli import run_command

    run_command(main)
