"""Command to put the learned words of several embedding files into one: read -> rename -> merge -> write.

No model is loaded: which text encoder the words belong to shows in their width.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli import add_debug_flag, run_command, shown

if TYPE_CHECKING:
    from ldm.modules.embedding_io import EmbeddingFile

log = logging.getLogger(__name__)

EXAMPLES = """\
examples:
  two words of one model; the second file's "*" becomes "*2", with a notice:
    python merge_embeddings.py --manager_ckpts cat.pt dog.pt --output_path both.pt
  with names of your own; each rename is used once, by the first file that has the old word:
    python merge_embeddings.py --manager_ckpts cat.pt dog.pt --output_path both.pt --rename "*=<cat>" "*=<dog>"
"""


def build_parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="merge_embeddings.py",
        description="Put the learned words of several embedding files, in any known format, into one file.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--manager_ckpts", nargs="+", required=True, metavar="FILE", help="embedding files of one and the same model")
    add("--output_path", required=True, metavar="FILE",
        help="file to write, in the layout of embeddings.pt: .pt, .bin, .pth or .ckpt")  # fmt: skip
    add("--rename", action="extend", nargs="+", default=[], metavar="OLD=NEW",
        help="new name of a word; words that still share a name get a number")  # fmt: skip
    add("-sd", "--stable_diffusion", action="store_true",
        help="the files are for Stable Diffusion (not needed: it shows in the files)")  # fmt: skip
    add_debug_flag(parser)
    return parser


def rename_words(
    files: Sequence[tuple[str, EmbeddingFile]], renames: Sequence[tuple[str, str]]
) -> list[tuple[str, EmbeddingFile]]:
    """Apply each of `renames` (old, new) once, to the first of `files` in order that has the old word."""
    names: list[dict[str, str]] = [{} for _ in files]
    for old, new in renames:
        free = (k for k, (_, words) in enumerate(files) if old in words.vectors and old not in names[k])
        place = next(free, None)
        if place is None:
            there = ", ".join(repr(word) for _, words in files for word in words.vectors)
            raise ValueError(f"--rename {old}={new}: no file is left that has {old!r}; the words are {there}")
        names[place][old] = new
    renamed = []
    for (path, words), new_names in zip(files, names, strict=True):
        words = words.renamed(new_names)
        for new in new_names.values():
            words.token_ids.pop(new, None)  # that of the old name
        renamed.append((path, words))
    return renamed


def vocabulary(width: int) -> Callable[[str], int | None]:
    """For vectors of this width: a word's token id if it is a single vocabulary entry, else None."""
    from ldm.modules.encoders.bert import WordPieceTokenizer
    from ldm.modules.encoders.clip_tokenizer import CLIPTokenizer

    tokenizer = CLIPTokenizer(pad_token_id=0) if width in (768, 1024) else WordPieceTokenizer()

    def token_id(word: str) -> int | None:
        ids = tokenizer.encode(tokenizer.clean(word))
        same = len(ids) == 1 and tokenizer.decode(ids).strip().lower() == word.strip().lower()
        return ids[0] if same else None

    return token_id


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`."""
    args = build_parser().parse_args(argv)
    from ldm.generate_words import parse_renames
    from ldm.modules.embedding_io import PICKLE_SUFFIXES, WIDTHS, merge, read_embeddings, write_embeddings

    if Path(args.output_path).suffix.lower() not in PICKLE_SUFFIXES:
        raise ValueError(
            f"--output_path {args.output_path}: several words go into a file that ends in "
            f"{', '.join(PICKLE_SUFFIXES)}; give it such an ending"
        )
    files = [(path, read_embeddings(path)) for path in args.manager_ckpts]
    width = files[0][1].width
    if args.stable_diffusion and width not in (768, 1024):
        log.warning("%s is for %s, not for Stable Diffusion: going by the file", files[0][0], WIDTHS.get(width, width))
    token_id = vocabulary(width)
    files = rename_words(files, parse_renames(args.rename))
    merged = merge(files, token_id)
    for word in merged.vectors:
        found = token_id(word) if word not in merged.token_ids else None
        merged.token_ids |= {} if found is None else {word: found}
    write_embeddings(merged, args.output_path)
    for word, vectors in merged.vectors.items():
        print(f"{shown(word)}: {len(vectors)} vector{'s' * (len(vectors) > 1)}")
    print(f"{args.output_path}: {len(merged.vectors)} words for {WIDTHS.get(width, f'vectors of width {width}')}")


if __name__ == "__main__":
    run_command(main)
