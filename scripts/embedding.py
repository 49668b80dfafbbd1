"""Command for files of learned words: look into them, convert, merge, interpolate, add and subtract. Loads no model."""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections.abc import Container, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.modules.embedding_io import EmbeddingFile

log = logging.getLogger(__name__)

EXAMPLES = """\
examples:
  what is in a file, whatever program wrote it:
    python scripts/embedding.py inspect cat.pt learned_embeds.bin toy.png
  for other programs: diffusers, AUTOMATIC1111 (as a picture), ComfyUI, kohya, OneTrainer, InvokeAI:
    python scripts/embedding.py convert cat.pt learned_embeds.safetensors --format diffusers --rename "*=<cat>"
    python scripts/embedding.py convert cat.pt cat.png
    python scripts/embedding.py convert cat.pt cat.safetensors --format comfyui
  each word of a file in a file of its own, and the other way round:
    python scripts/embedding.py convert both.pt words/ --format diffusers
    python scripts/embedding.py merge cat.pt dog.pt --output both.pt --rename "*=<cat>" "*=<dog>"
  three words between two:
    python scripts/embedding.py interpolate cat.pt dog.pt --at 0.25 0.5 0.75 --output between.pt
  the cat, but less of an animal and more of a statue; plain words come from the model's vocabulary:
    python scripts/embedding.py arithmetic --term 1 cat.pt --term -0.5 ::animal --term 0.5 ::statue \\
        --base v1-5-pruned.ckpt --keep_length --output statue.pt
A word of a file with several is written FILE::WORD, one of the model's vocabulary ::WORD.
"""
# Formats by the program that reads them, besides those named after theirs.
PROGRAMS = {"comfyui": "kohya", "invokeai": "diffusers", "automatic1111": "a1111", "concepts-library": "diffusers"}
FORMAT_OF_SUFFIX = {".png": "a1111-png", ".bin": "diffusers", ".safetensors": "kohya"}
WRITABLE = ("original", "a1111", "a1111-png", "kohya", "onetrainer", "diffusers", *PROGRAMS)
SEPARATOR = "::"
NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)


def build_parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="embedding.py",
        description="Look into files of learned words, convert them, and compute with them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="inspect|convert|merge|interpolate|arithmetic"
    )
    for name, add in COMMANDS.items():
        command = commands.add_parser(name, help=add[2], description=add[2])
        command._negative_number_matcher = NEGATIVE  # argparse's own takes -1e-1 for a flag
        add[0](command)
    return parser


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Flags of `inspect`."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="files of learned words, or concepts-library folders")
    parser.add_argument("--json", action="store_true", help="as JSON")
    _add_debug(parser)


def inspect(args: argparse.Namespace) -> None:
    """Print what each file holds."""
    found = [summary(path) for path in args.files]
    from ldm.cli import shown

    if args.json:
        print(shown(json.dumps(found, indent=2, ensure_ascii=False), keep="\n"))
        return
    for file in found:
        print(f"{shown(file['file'])}: {file['about']}, for {file['model']}")
        for word in file["words"]:
            count = len(word["lengths"])
            lengths = ", ".join(f"{length:.3g}" for length in word["lengths"][:8])
            more = [f"id {word['token_id']}"] if word["token_id"] is not None else []
            more += [f"{word['active']} in use"] if word["active"] is not None else []
            more += [f"started from {word['init_word']!r}"] if word["init_word"] else []
            plural = "s" * (count > 1)
            print("  " + "; ".join([f"{word['word']!r}: {count} vector{plural} of length{plural} {lengths}", *more]))
        for key, value in file["info"].items():
            print(f"  {shown(key)} = {shown(str(value))}")


def summary(path: str | Path) -> dict[str, Any]:
    """What a file holds, as plain data."""
    from ldm.modules.embedding_io import FORMATS, WIDTHS, identify

    name, words = identify(path)
    return {
        "file": str(path),
        "format": name,
        "about": FORMATS[name].about,
        "width": words.width,
        "model": WIDTHS.get(words.width, f"an unknown model (width {words.width})"),
        "words": [
            {
                "word": word,
                "lengths": vectors.norm(dim=1).tolist(),
                "token_id": words.token_ids.get(word),
                "active": words.active.get(word),
                "init_word": words.init_words.get(word),
            }
            for word, vectors in words.vectors.items()
        ],
        "info": words.info,
    }


def add_convert(parser: argparse.ArgumentParser) -> None:
    """Flags of `convert`."""
    parser.add_argument("source", metavar="FILE", help="a file of learned words, or a concepts-library folder")
    parser.add_argument("target", metavar="TARGET",
        help="file to write; a folder (or NAME/) gets a file for each word, and keeps those that it has")  # fmt: skip
    parser.add_argument("--word", metavar="WORD", help="only this word of the file")
    parser.add_argument("--rename", nargs="+", default=[], metavar="OLD=NEW", help="other names for words")
    _add_format(parser)


def convert(args: argparse.Namespace) -> None:
    """Write the words of one file in another format."""
    from ldm.generate_files import slug
    from ldm.generate_words import parse_renames
    from ldm.modules.embedding_io import FORMATS, read_embeddings
    from ldm.modules.embedding_io_maths import pick

    words = read_embeddings(args.source).renamed(dict(parse_renames(args.rename)))
    if args.word is not None:
        pick(words, args.word)
        words = only(words, [args.word])
    target = Path(args.target)
    if not (target.is_dir() or args.target.endswith(("/", "\\"))):
        save(words, target, args.format)
        return
    format = chosen_format(Path(args.target), args.format)
    written: list[Path] = []
    for word in words.vectors:
        # a name such as "*" makes no file name
        stem = slug(word if has_letters(word) else Path(args.source).absolute().stem)
        part = only(words, [word])
        written.append(free_file(target / f"{stem}{FORMATS[format].suffixes[0]}", part, format, written))
        save(part, written[-1], format)


def has_letters(word: str) -> bool:
    """Whether a word has any letter or digit."""
    return any(map(str.isalnum, word))


def as_stored(words: EmbeddingFile, path: Path, format: str) -> EmbeddingFile:
    """The words as a file gets them: in a picture, a word without letters takes the file's name.

    The web UI goes by the name in a picture, and by the file's own elsewhere.
    """
    if format != "a1111-png" or len(words.vectors) != 1:
        return words
    return words.renamed({word: path.stem for word in words.vectors if not has_letters(word)})


def warn_of_vocabulary(words: EmbeddingFile, path: Path) -> None:
    """Warn of a word that diffusers refuses to load, because CLIP's vocabulary has an entry of just that name."""
    from ldm.modules.encoders.clip_tokenizer import SPECIAL_TOKENS, read_vocabulary

    (word,) = words.vectors  # as many as the format holds
    if word in (*SPECIAL_TOKENS, *read_vocabulary()[0]):
        new = word if has_letters(word) else path.stem
        log.warning("%s: diffusers refuses the word %r, which is in CLIP's vocabulary; give it another name, as with "
                    'convert --rename "%s=<%s>"', path, word, word, new)  # fmt: skip


def free_file(path: Path, word: EmbeddingFile, format: str, taken: Container[Path]) -> Path:
    """`path`, or with -2, -3, ... before its suffix, that is not `taken` and is free or holds the same word already."""
    candidate, number = path, 1
    while candidate in taken or (candidate.exists() and not holds(candidate, word, format)):
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")
    return candidate


def holds(path: Path, word: EmbeddingFile, format: str) -> bool:
    """Whether a file has the format, and in it just the one word with the same vectors."""
    from ldm.modules.embedding_io import identify
    from ldm.modules.embedding_io_maths import pick

    word = as_stored(word, path, format)
    try:
        found, there = identify(path)
    except (ValueError, OSError):
        return False
    (name,) = word.vectors
    return found == format and list(there.vectors) == [name] and pick(there)[1].equal(pick(word)[1])


def only(words: EmbeddingFile, names: Sequence[str]) -> EmbeddingFile:
    """The file with some of its words."""
    from ldm.modules.embedding_io import EmbeddingFile

    fields = ("vectors", "token_ids", "active", "init_words")
    parts = {field: {k: v for k, v in getattr(words, field).items() if k in names} for field in fields}
    return EmbeddingFile(**parts, info=dict(words.info))


def add_merge(parser: argparse.ArgumentParser) -> None:
    """Flags of `merge`."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="files of learned words of one and the same model")
    parser.add_argument("--output", "-o", required=True, metavar="FILE", help="file to write, as embeddings.pt")
    parser.add_argument("--rename", nargs="+", default=[], metavar="OLD=NEW",
        help="other names; where several rename one word, the first is for the first file")  # fmt: skip
    _add_debug(parser)


def merge(args: argparse.Namespace) -> None:
    """Put the words of several files into one."""
    from merge_embeddings import main as merge_main

    if not args.output.endswith(".pt"):
        raise ValueError(f"{args.output}: merge writes several words to a .pt file; give it that ending")
    rename = ["--rename", *args.rename] if args.rename else []
    merge_main(["--manager_ckpts", *args.files, "--output_path", args.output, *rename])


def add_interpolate(parser: argparse.ArgumentParser) -> None:
    """Flags of `interpolate`."""
    parser.add_argument("first", metavar="A", help="FILE or FILE::WORD")
    parser.add_argument("second", metavar="B", help="FILE, FILE::WORD, or ::WORD of the vocabulary")
    parser.add_argument("--at", nargs="+", type=float, default=[0.5], metavar="T",
        help="0 is A, 1 is B; several values give several words (default: 0.5)")  # fmt: skip
    parser.add_argument("--mode", default="spherical", choices=("linear", "spherical"),
        help="spherical changes direction and length evenly (default); linear is the straight line")  # fmt: skip
    _add_result(parser)


def interpolate(args: argparse.Namespace) -> None:
    """Write words between two."""
    from ldm.modules.embedding_io import EmbeddingFile
    from ldm.modules.embedding_io_maths import interpolate as between

    (name, a), (_, b) = (vectors_of(term, args.base) for term in (args.first, args.second))
    name = args.name or name
    names = [name if len(args.at) == 1 else f"{name}-{t:g}" for t in args.at]
    if len(set(names)) < len(names):
        raise ValueError(f"--at has a value twice: {args.at}")
    found = {word: between(a, b, t, args.mode) for word, t in zip(names, args.at, strict=True)}
    save(EmbeddingFile(found), Path(args.output), args.format)


def add_arithmetic(parser: argparse.ArgumentParser) -> None:
    """Flags of `arithmetic`."""
    parser.add_argument("--term", nargs=2, action="append", required=True, metavar=("WEIGHT", "WORD"), dest="terms",
        help="a weight and FILE, FILE::WORD or ::WORD of the vocabulary; as often as there are terms")  # fmt: skip
    parser.add_argument("--keep_length", action="store_true", help="give the result the length of the first term")
    _add_result(parser)


def arithmetic(args: argparse.Namespace) -> None:
    """Write a weighted sum of words."""
    from ldm.modules.embedding_io import EmbeddingFile
    from ldm.modules.embedding_io_maths import cancel_out, combine, with_length

    terms: list[tuple[float, Tensor]] = []
    name = args.name
    for weight, source in args.terms:
        try:
            factor = float(weight)
        except ValueError as error:
            raise ValueError(f"--term {weight} {source}: the weight comes first and is a number") from error
        word, vectors = vectors_of(source, args.base)
        name = name or word
        terms.append((factor, vectors))
    result = combine(terms)
    if args.keep_length:
        if cancel_out(terms, result):
            raise ValueError("the terms cancel out, and --keep_length cannot lengthen 0: change the weights")
        result = with_length(result, terms[0][1])
    save(EmbeddingFile({name: result}), Path(args.output), args.format)


def _add_debug(parser: argparse.ArgumentParser) -> None:
    from ldm.cli import add_debug_flag

    add_debug_flag(parser)


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=WRITABLE, metavar="NAME",
        help=f"one of {', '.join(WRITABLE)} (default: by the ending of the file's name, for .pt original)")  # fmt: skip
    _add_debug(parser)


def _add_result(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", "-o", required=True, metavar="FILE", help="file to write")
    parser.add_argument("--name", metavar="WORD", help="name of the result (default: that of the first word)")
    parser.add_argument("--base", metavar="CKPT", help="weights or folder of the model whose vocabulary is meant")
    _add_format(parser)


def chosen_format(path: Path, asked: str | None) -> str:
    """The format that was asked for, else the one that suits the file's name."""
    return PROGRAMS.get(asked, asked) if asked else FORMAT_OF_SUFFIX.get(path.suffix.lower(), "original")


def save(words: EmbeddingFile, path: Path, format: str | None) -> None:
    """Write the words, with the token ids that their names have in the vocabulary, and say so."""
    from ldm.modules.embedding_io import WIDTHS, write_embeddings
    from merge_embeddings import vocabulary

    format = chosen_format(path, format)
    if format == "original":
        token_id = vocabulary(words.width)
        found = {word: token_id(word) for word in words.vectors if word not in words.token_ids}
        words.token_ids |= {word: i for word, i in found.items() if i is not None}
    words = as_stored(words, path, format)
    write_embeddings(words, path, format)
    if format == "diffusers":
        warn_of_vocabulary(words, path)
    names = ", ".join(repr(word) for word in words.vectors)
    print(f"{path}: {names} for {WIDTHS.get(words.width, f'vectors of width {words.width}')}, format {format}")


def vectors_of(term: str, base: str | None) -> tuple[str, Tensor]:
    """Name and vectors (n, D) of FILE, FILE::WORD or ::WORD."""
    from ldm.modules.embedding_io import EmbeddingFileError, read_embeddings
    from ldm.modules.embedding_io_maths import pick

    path, separator, word = term.rpartition(SEPARATOR)
    if not separator:
        path, word = term, ""
    if not path:
        if base is None:
            raise ValueError(f"{term} is a word of the vocabulary: name the model's weights with --base")
        return word, vocabulary_vectors(word, base)
    try:
        return pick(read_embeddings(path), word or None)
    except EmbeddingFileError as error:
        prefix = "" if path in str(error) else f"{path}: "
        raise ValueError(f"{prefix}{error}; write FILE::WORD") from error


TABLES = (  # of the CLIP encoders, then of the BERT ones
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    "cond_stage_model.model.token_embedding.weight",
    "cond_stage_model.transformer.token_emb.weight",
    "cond_stage_model.embeddings.word_embeddings.weight",
)


def vocabulary_vectors(word: str, base: str) -> Tensor:
    """The vector (1, D) of a plain word in the vocabulary of the model `base`; the mean where it is several tokens."""
    import torch

    from ldm.checkpoint import open_checkpoint
    from ldm.generate_model import find_model_files
    from ldm.modules.encoders.bert import WordPieceTokenizer
    from ldm.modules.encoders.clip_tokenizer import CLIPTokenizer

    with open_checkpoint(find_model_files(base).checkpoint) as file:
        table = next((name for name in TABLES if name in file.tensors), None)
        if table is None:
            raise ValueError(f"{base} has no text encoder: --base is the whole model's file or folder")
        tokenizer = WordPieceTokenizer() if table in TABLES[2:] else CLIPTokenizer(pad_token_id=0)
        ids = tokenizer.encode(tokenizer.clean(word))
        if not ids:
            raise ValueError(f"::{word} holds no word")
        rows = file.read(table)
        if max(ids) >= len(rows):
            raise ValueError(f"{base} has another vocabulary than the published models: it has {len(rows)} entries")
        return rows[torch.tensor(ids)].float().mean(0, keepdim=True)


COMMANDS = {
    "inspect": (add_inspect, inspect, "say what files hold: format, model, words, lengths of their vectors"),
    "convert": (add_convert, convert, "write a file's words in another format"),
    "merge": (add_merge, merge, "put the words of several files into one"),
    "interpolate": (add_interpolate, interpolate, "make words between two"),
    "arithmetic": (add_arithmetic, arithmetic, "add and subtract words"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`."""
    args = build_parser().parse_args(argv)
    COMMANDS[args.command][1](args)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone runs without being installed
    from ldm.cli import run_command

    run_command(main)
