"""Command to make a user study from pictures, and to say what its answers mean: Figure 10(b)."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

EXAMPLES = """\
examples:
  pictures of a table, sorted into folders:
    python scripts/reproduce_tables.py --table figure10 --report_only --export study/in
  ten forms of twenty questions that compare five setups; study/pages goes to the participants, study/key.json stays:
    python scripts/user_study.py make --pictures study/in --out study \\
        --setups three_words ours regularised short_captions long_captions
  what their answers (one file each) say:
    python scripts/user_study.py analyse --answers study/answers --key study/key.json --out results/figure10b
"""


def build_parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    from ldm.cli import add_debug_flag

    parser = argparse.ArgumentParser(
        prog="user_study.py",
        description="Ask people the two questions of the paper's user study: which result is most like the training "
        "pictures, and which fits the text best.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="action", required=True, metavar="make|analyse")
    make = commands.add_parser("make", help="write the pages", description="Write the pages of a study.")
    make.add_argument("--pictures", required=True, metavar="DIR", help="as reproduce_tables.py --export writes them")
    make.add_argument("--setups", required=True, nargs="+", metavar="ROW", help="rows to compare, two or more")
    make.add_argument("--out", default="study", metavar="DIR", help="default: study")
    make.add_argument("--forms", type=int, default=10, metavar="N", help="different forms (default: 10)")
    make.add_argument("--questions", type=int, default=20, metavar="N", help="questions of each form (default: 20)")
    make.add_argument("--seed", type=int, default=0, help="of the choice of questions and pictures (default: 0)")
    analyse = commands.add_parser("analyse", help="ranks from answers", description="Ranks and intervals from answers.")
    analyse.add_argument("--answers", required=True, metavar="DIR", help="the participants' files")
    analyse.add_argument("--key", required=True, metavar="JSON", help="key.json of the study")
    analyse.add_argument("--out", default="results/figure10b", metavar="DIR", help="default: results/figure10b")
    for command in (make, analyse):
        add_debug_flag(command)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`."""
    args = build_parser().parse_args(argv)
    if args.action == "make":
        from evaluation.user_study import KEY_FILE, PAGES, make_study

        for flag in ("forms", "questions"):
            if getattr(args, flag) < 1:
                raise ValueError(f"--{flag} must be at least 1, got {getattr(args, flag)}")
        pages = make_study(args.pictures, args.setups, args.out, args.forms, args.questions, args.seed)
        for form, count in pages.items():
            print(f"{form}: {count} questions")
        print(f"{len(pages)} forms in {Path(args.out) / PAGES}; keep {Path(args.out) / KEY_FILE} to yourself")
        return
    from evaluation.reproduce import write_result
    from evaluation.tables import markdown_claims, markdown_rows
    from evaluation.user_study_answers import analyse

    words = sys.argv[1:] if argv is None else list(argv)
    result = analyse(args.answers, args.key, shlex.join(["python", "scripts/user_study.py", *words]))
    write_result(result, Path(args.out))
    for line in (*markdown_rows(result), "", *markdown_claims(result)):
        print(line)
    print(Path(args.out) / "report.html")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone runs without being installed
    from ldm.cli import run_command

    run_command(main)
