"""Command to rate DreamBench++ samples with a vision-language model, or to average ratings that are there."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

EXAMPLES = """\
examples:
  rate the samples that reproduce_tables.py wrote, with a model behind an OpenAI-compatible endpoint:
    RATING_KEY=... python scripts/rate_dreambench_plus.py --samples results/dreambench_plus/samples/textual_inversion \\
        --url https://api.example.com/v1 --model a-vision-model --key_env RATING_KEY --out ratings
  a model that runs here, without a key:
    python scripts/rate_dreambench_plus.py --samples samples --url http://localhost:8000/v1 --model local --out ratings
  averages of ratings that are there (a folder, or people's ratings in one file):
    python scripts/rate_dreambench_plus.py --out ratings --averages_only
"""


def build_parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    from ldm.cli import add_debug_flag

    parser = argparse.ArgumentParser(
        prog="rate_dreambench_plus.py",
        description="Rate samples for concept preservation and prompt following, from 0 to 4, and print the averages "
        "as the leaderboard has them. Ratings that are there are not asked for again.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # "--key sk-..." is no --key_env
    )
    add = parser.add_argument
    add("--samples", metavar="DIR", help="folder with src_image, tgt_image and text")
    add("--url", help="base of an OpenAI-compatible service, such as http://localhost:8000/v1")
    add("--model", help="what the service calls its model")
    add("--key_env", metavar="NAME", help="environment variable that holds the key (default: no key)")
    add("--out", required=True, metavar="DIR|FILE", help="where the ratings are")
    add("--method", help="name of the method in the files (default: textual_inversion, or the only one that is there; "
        "merged files and people's ratings name none)")  # fmt: skip
    add("--kinds", nargs="+", default=["cp", "pf"], choices=("cp", "pf"), help="default: both")
    add("--repeats", type=int, default=3, metavar="N", help="ratings of each sample (default: 3, as published)")
    add("--averages_only", action="store_true", help="ask nothing, average what is there")
    add_debug_flag(parser)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; raises `ValueError` for what is missing or wrong."""
    from evaluation.endpoint import check_url

    args, unknown = build_parser().parse_known_args(argv)
    if unknown:  # argparse would show what follows a "--key"
        flags = [word.partition("=")[0] for word in unknown if word.startswith("--")]
        named = ", ".join(flags) or "words that belong to no flag"
        raise ValueError(
            f"not known: {named}; see --help (a key goes into an environment variable that --key_env names)"
        )
    if not args.averages_only:
        for flag in ("samples", "url", "model"):
            if getattr(args, flag) is None:
                raise ValueError(f"rating needs --{flag} (or --averages_only)")
        try:
            check_url(args.url)
        except ValueError as error:
            raise ValueError(f"--url: {error}") from error
    if args.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {args.repeats}")
    return args


def read_key(name: str | None) -> str:
    """The key in the environment variable `name`; empty without a name. Errors quote neither, for `name` may be one."""
    import os

    from evaluation.endpoint import fits_header

    if name is None:
        return ""
    key = os.environ.get(name, "").strip()  # files that keys are read from end in a line break
    if not key:
        raise ValueError("--key_env: there is no such environment variable, or it is empty; give its name, not the key")
    if not fits_header(key):
        raise ValueError(
            "--key_env: the key in this variable holds a character that no HTTP header takes: copy it anew"
        )
    return key


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`."""
    args = parse_args(argv)
    from evaluation.dreambench_plus import averages, read_ratings, read_samples

    if not args.averages_only:
        from evaluation.ratings import Endpoint, rate

        endpoint = Endpoint(args.url, args.model, read_key(args.key_env))
        args.method = args.method or "textual_inversion"
        failed = rate(read_samples(args.samples), endpoint, Path(args.out), args.kinds, args.repeats, args.method)
        if failed:
            print(f"{failed} ratings failed: run the command again to ask for them")
    for kind, groups in averages(read_ratings(args.out, args.method)).items():
        print(f"{kind:6}", "  ".join(f"{group} {value:.3f}" for group, value in groups.items()))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone runs without being installed
    from ldm.cli import run_command

    run_command(main)
