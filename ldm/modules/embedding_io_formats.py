"""The embedding formats of textual inversion, diffusers, AUTOMATIC1111's web UI, kohya's scripts and OneTrainer.

Each reader takes `Contents` and gives None for a file of another format; each writer gives a file's bytes.
"""

from __future__ import annotations

import io
import logging
import re
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint_pickle import PickledObject, TensorMeta
from ldm.modules.embedding_io_file import Contents, EmbeddingFile, EmbeddingFileError, check_vectors, some_words

logger = logging.getLogger(__name__)

MAX_WORDS = 1000
# Where the first encoder's vectors are in files for SDXL, which has two text encoders, and where the second's.
SDXL_KEYS = {"clip_l": "clip_g", "text_encoders_0": "text_encoders_1"}
ENCODER_KEYS = ("clip_l", "text_encoders_0", "clip_h")  # of Stable Diffusion 1.x, 1.x and 2.x
XTI_KEYS = {"IN01", "MID", "OUT11"}
# Keys of single-word files; the word itself is in the metadata or is the file's name.
KOHYA_KEY, ONETRAINER_KEY = "emb_params", "emp_params"
BUNDLED = re.compile(r"bundle_emb\.(.+)\.(?:clip_l|clip_h|emb_params|emp_params|string_to_param\.\*)", re.DOTALL)
WORD_METADATA = ("placeholder", "token", "name")
INIT_WORD = "init_word"  # in the metadata, as `_metadata` writes it
MAX_STEP_DIGITS = 18


def _parameters(value: Any) -> dict[Any, Any]:
    """The entries of a pickled ParameterDict (torch of any age) or of a plain dict."""
    if isinstance(value, PickledObject) and isinstance(value.state, dict):
        value = value.state.get("_parameters")
    return value if isinstance(value, dict) else {}


def _of_type(value: Any, kind: type, words: Mapping[str, Any]) -> dict[str, Any]:
    entries = value.items() if isinstance(value, dict) else ()
    return {k: v for k, v in entries if k in words and type(v) is kind}


def _token_ids(contents: Contents, value: Any, words: Mapping[str, Any]) -> dict[str, int]:
    """Token ids, which are 0-d tensors in the published layout and plain numbers in the web UI's."""
    ids = {}
    for word, entry in _parameters(value).items():
        token_id = entry
        if isinstance(entry, TensorMeta) and entry.dtype == "int64":
            token = contents.tensor(entry)
            token_id = int(token) if token.numel() == 1 else None
        if type(token_id) is int and token_id >= 0 and word in words:
            ids[word] = token_id
    return ids


def read_original(contents: Contents) -> EmbeddingFile | None:
    """`string_to_token` and `string_to_param`, as textual inversion saves them (in a ParameterDict)."""
    tree = contents.tree
    if not isinstance(tree, dict) or "string_to_param" not in tree:
        return None
    vectors = {k: contents.vectors(v) for k, v in _parameters(tree["string_to_param"]).items() if isinstance(k, str)}
    return EmbeddingFile(
        vectors,
        _token_ids(contents, tree.get("string_to_token"), vectors),
        _of_type(tree.get("active"), int, vectors),
        _of_type(tree.get("init_words"), str, vectors),
        {k: v for k, v in tree.items() if isinstance(k, str) and isinstance(v, (str, int, float))},
    )


def write_original(words: EmbeddingFile, suffix: str) -> bytes:
    """The layout of textual inversion's `embeddings.pt`; its readers ignore the further entries."""
    del suffix
    params = nn.ParameterDict()
    for word, vectors in words.vectors.items():
        param = nn.Parameter(check_vectors(vectors).clone())
        try:
            params[word] = param
        except KeyError:  # names such as "a.b" or "keys", which only readers of the raw entries can get back
            params._parameters[word] = param
    tree: dict[str, Any] = {
        **words.info,
        # -1 never occurs in a text; the published code needs an entry for each word.
        "string_to_token": {word: torch.tensor(words.token_ids.get(word, -1)) for word in words.vectors},
        "string_to_param": params,
    }
    tree.update({name: dict(getattr(words, name)) for name in ("active", "init_words") if getattr(words, name)})
    return archive_bytes(tree)


def read_a1111(contents: Contents) -> EmbeddingFile | None:
    """The web UI's `.pt` and `.png`: as `read_original`, but with plain dicts, one word, and its name beside it."""
    tree = contents.tree
    if not isinstance(tree, dict) or not isinstance(tree.get("string_to_param"), dict):
        return None
    words = read_original(contents)
    name = tree.get("name")
    if words is None or len(words.vectors) != 1 or not isinstance(name, str) or not name.strip():
        return words
    (word,) = words.vectors
    words.token_ids.clear()  # always that of "*", whatever the name
    return words.renamed({word: name})


def a1111_tree(words: EmbeddingFile) -> dict[str, Any]:
    """What the web UI stores for one word."""
    word, vectors = _only(words)
    step = words.info.get("step")
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": vectors},
        "name": word,
        "step": step if isinstance(step, int) else None,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
    }


def write_a1111(words: EmbeddingFile, suffix: str) -> bytes:
    """The web UI's `.pt`."""
    del suffix
    return archive_bytes(a1111_tree(words))


def read_sdxl(contents: Contents) -> EmbeddingFile | None:
    """Files with vectors for both of SDXL's encoders; the first one is Stable Diffusion 1.x's."""
    flat = _flat(contents)
    for first, second in SDXL_KEYS.items():
        if first in flat and second in flat:
            logger.warning("%s is for SDXL: taking the vectors of its first text encoder", contents.path)
            return _one_word(contents, contents.vectors(flat[first]))
        if second in flat and first not in flat:
            raise EmbeddingFileError("it only has vectors for SDXL's second text encoder, which no model here has")
    return None


def read_encoder(contents: Contents) -> EmbeddingFile | None:
    """One tensor under the name that ComfyUI has for its text encoder."""
    return next((words for key in ENCODER_KEYS if (words := _read_single(contents, None, key)) is not None), None)


def read_kohya(contents: Contents) -> EmbeddingFile | None:
    """One tensor under kohya's key, or alone."""
    return _read_single(contents, contents.tree if isinstance(contents.tree, TensorMeta) else None, KOHYA_KEY)


def read_onetrainer(contents: Contents) -> EmbeddingFile | None:
    """One tensor under OneTrainer's key."""
    if f"{ONETRAINER_KEY}_out" in _flat(contents):
        logger.warning("%s also has output embeddings, which are left out", contents.path)
    return _read_single(contents, None, ONETRAINER_KEY)


def _read_single(contents: Contents, alone: TensorMeta | None, key: str) -> EmbeddingFile | None:
    """A file of one tensor; the word is in the metadata or is the file's name."""
    value = alone or _flat(contents).get(key)
    if value is None:
        return None
    return _one_word(contents, contents.vectors(value))


def write_kohya(words: EmbeddingFile, suffix: str) -> bytes:
    """`emb_params`, which nearly every program reads."""
    return _write_single(words, suffix, KOHYA_KEY)


def write_onetrainer(words: EmbeddingFile, suffix: str) -> bytes:
    """`emp_params`, as OneTrainer spells it."""
    return _write_single(words, suffix, ONETRAINER_KEY)


def read_bundle(contents: Contents) -> EmbeddingFile | None:
    """Words that travel in a LoRA file, under `bundle_emb.WORD.*` or marked "<embed>" in the metadata."""
    vectors = {}
    for key, value in _flat(contents).items():
        match = BUNDLED.fullmatch(key)
        word = match.group(1) if match else key if contents.metadata.get(key) == "<embed>" else None
        if word is not None:
            vectors[word] = contents.vectors(value)
    return EmbeddingFile(vectors) if vectors else None


def read_diffusers(contents: Contents) -> EmbeddingFile | None:
    """A plain {word: vectors}, as diffusers' `learned_embeds` files are; numbers and texts may stand beside them."""
    flat = _flat(contents)
    if not flat or len(contents.tree) > MAX_WORDS:
        return None
    beside = {k: v for k, v in contents.tree.items() if k not in flat}
    if not all(isinstance(k, str) and isinstance(v, (str, int, float)) for k, v in beside.items()):
        return None
    if set(flat) >= XTI_KEYS:
        raise EmbeddingFileError("it has a vector per layer (extended textual inversion), which no model here can use")
    if any(len(value.shape) > 2 for value in flat.values()) or len({value.shape[-1:] for value in flat.values()}) > 1:
        return None
    vectors = {word: contents.vectors(value) for word, value in flat.items()}
    return EmbeddingFile(vectors, init_words=_init_words(contents, vectors), info=beside | _info(contents))


def write_diffusers(words: EmbeddingFile, suffix: str) -> bytes:
    """One word and its vectors, as a `.safetensors` or, under any other name, a `.bin` file."""
    word, vectors = _only(words)
    if suffix == ".safetensors":
        return _safetensors({word: vectors}, _metadata(words, word))
    return archive_bytes({word: vectors})


def archive_bytes(tree: Any) -> bytes:
    """`torch.save` with just the records that every reader accepts, and the same bytes for the same contents.

    The web UI refuses archives with the further records that today's torch writes.
    """
    saved_bytes, result = io.BytesIO(), io.BytesIO()
    torch.save(tree, saved_bytes)
    with zipfile.ZipFile(saved_bytes) as saved, zipfile.ZipFile(result, "w") as archive:
        for name in saved.namelist():
            part = name.partition("/")[2]
            if re.fullmatch(r"data\.pkl|version|data/\d+", part):
                archive.writestr(zipfile.ZipInfo(f"archive/{part}"), saved.read(name))
    return result.getvalue()


def _safetensors(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    from safetensors.torch import save

    return save(tensors, metadata)


def _write_single(words: EmbeddingFile, suffix: str, key: str) -> bytes:
    word, vectors = _only(words)
    if suffix != ".safetensors":
        return archive_bytes({key: vectors})
    return _safetensors({key: vectors}, _metadata(words, word))


def _metadata(words: EmbeddingFile, word: str) -> dict[str, str]:
    """What a safetensors header says of `word`, for `_word`, `_init_words` and `_info` to read."""
    info = {k: str(v) for k, v in words.info.items()}
    init = {INIT_WORD: words.init_words[word]} if word in words.init_words else {}
    return {**info, **init, "placeholder": word, "format": "pt"}


def _only(words: EmbeddingFile) -> tuple[str, Tensor]:
    if len(words.vectors) != 1:
        raise EmbeddingFileError(
            f"this format holds one word, not {some_words(words.vectors)}: write one file for each"
        )
    ((word, vectors),) = words.vectors.items()
    count = words.active.get(word, len(vectors))  # progressive words: those in use
    return word, check_vectors(vectors)[:count].clone()


def _flat(contents: Contents) -> dict[str, TensorMeta]:
    tree = contents.tree if isinstance(contents.tree, dict) else {}
    return {k: v for k, v in tree.items() if isinstance(k, str) and isinstance(v, TensorMeta)}


def _word(contents: Contents) -> str:
    """The word of a file that holds vectors without one."""
    names: Iterable[str] = (contents.metadata[key] for key in WORD_METADATA if key in contents.metadata)
    return next((name for name in names if name.strip()), contents.path.stem)


def _one_word(contents: Contents, vectors: Tensor) -> EmbeddingFile:
    word = _word(contents)
    return EmbeddingFile({word: vectors}, init_words=_init_words(contents, [word]), info=_info(contents))


def _init_words(contents: Contents, words: Iterable[str]) -> dict[str, str]:
    """The initial word, which the metadata says of a file's only word."""
    init, names = contents.metadata.get(INIT_WORD, ""), list(words)
    return {names[0]: init} if init.strip() and len(names) == 1 else {}


def _info(contents: Contents) -> dict[str, str | int | float]:
    """The rest of the metadata, which is all texts; the step is a number elsewhere."""
    info: dict[str, str | int | float] = dict(contents.metadata)
    step = contents.metadata.get("step", "")
    if step.isascii() and step.isdigit() and len(step) <= MAX_STEP_DIGITS:
        info["step"] = int(step)
    return {k: v for k, v in info.items() if k not in (*WORD_METADATA, INIT_WORD, "format")}
