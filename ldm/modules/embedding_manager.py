"""Pseudo-words: trainable vectors that stand for placeholder strings in any text encoder's input.

The encoder matches placeholders in the text (see `encoders.text`) and calls the manager between its vocabulary table
and its transformer: `embedded = manager(token_ids, embedded)`. Neither the tokenizer nor the table ever changes.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.data.templates import per_img_token_list
from ldm.modules.embedding_io import WIDTHS, EmbeddingFile, read_embeddings, some_words, write_embeddings
from ldm.modules.embedding_manager_layout import Layout, expanded
from ldm.modules.embedding_manager_vectors import NamedVectors
from ldm.protocols import TextEncoder

logger = logging.getLogger(__name__)

PROGRESSIVE_EVERY = 2000  # steps after which progressive words get one more vector, as published
MULTI_TOKEN_INITS = ("mean", "vectors")
MOST_WARNINGS = 100  # of prompts that are too long: captions may be without end


class EmbeddingManager(nn.Module):
    """Swaps placeholder tokens for their vectors; a placeholder of n vectors takes n positions.

    embedder: the text encoder; not part of this module's parameters.
    placeholder_strings: the pseudo-words, any strings.
    initializer_words: for each placeholder the word to start from; without one the vectors are drawn at random, at
        the scale of the vocabulary table's rows.
    per_image_tokens: adds the 22 Hebrew letters as placeholders, one for each single picture.
    num_vectors_per_token: vectors per placeholder.
    progressive_words: start with one vector and use one more every `progressive_every` steps, see `set_global_step`.
    multi_token_init: what to do with an initial word of k > num_vectors_per_token tokens: "mean" starts every vector
        from their mean, "vectors" gives the placeholder k vectors.
    published_clip_init: add the first position's vector to initial words, as the published code does for CLIP.
    seed: for the random vectors.
    embedding_manager_ckpt: file of words to start from, see `load`; null and '' (in published configs) are none.
    """

    def __init__(
        self,
        embedder: TextEncoder,
        placeholder_strings: Sequence[str] | None = None,
        initializer_words: Sequence[str | None] | None = None,
        per_image_tokens: bool = False,
        num_vectors_per_token: int = 1,
        progressive_words: bool = False,
        progressive_every: int = PROGRESSIVE_EVERY,
        multi_token_init: str = "mean",
        published_clip_init: bool = False,
        seed: int = 0,
        embedding_manager_ckpt: str | Path | None = None,
    ) -> None:
        super().__init__()
        if isinstance(placeholder_strings, str) or isinstance(initializer_words, str):
            raise ValueError("placeholder_strings and initializer_words are lists of words, not one text")
        words = list(initializer_words or [])
        names = [*(placeholder_strings or []), *(per_img_token_list if per_image_tokens else [])]
        if num_vectors_per_token < 1 or progressive_every < 1:
            raise ValueError("num_vectors_per_token and progressive_every must be at least 1")
        if num_vectors_per_token >= embedder.max_length:
            raise ValueError(
                f"num_vectors_per_token {num_vectors_per_token}: a prompt has room for {embedder.max_length} tokens"
            )
        if multi_token_init not in MULTI_TOKEN_INITS:
            raise ValueError(f"multi_token_init {multi_token_init!r} is unknown; known: {', '.join(MULTI_TOKEN_INITS)}")
        if published_clip_init and not hasattr(embedder, "embed_at_start"):
            raise ValueError(f"published_clip_init is for SD 1.x's CLIP, not for {type(embedder).__name__}")
        if len(words) > len(names):
            raise ValueError(f"{len(words)} initializer_words for only {len(names)} placeholder_strings")
        self._embedder = (embedder,)  # a tuple, so that the encoder does not become a submodule
        self.num_vectors_per_token = num_vectors_per_token
        self.progressive_words = progressive_words
        self.progressive_every = progressive_every
        self.multi_token_init = multi_token_init
        self.published_clip_init = published_clip_init
        self.seed = seed
        self.string_to_param_dict = NamedVectors(trainable=True)
        self.initial_embeddings = NamedVectors(trainable=False)
        self.init_words: dict[str, str] = {}
        self._ids: dict[str, int] = {}
        self.counts_in_files: dict[str, int] = {}  # vectors in use there, of the words that came from files
        self._reached = 1  # vectors that progressive words have come to by now
        self._truncated: set[tuple[int, ...]] = set()
        for name, word in zip(names, [*words, *[None] * (len(names) - len(words))], strict=True):
            self.add(name, init_word=word)
        if embedding_manager_ckpt:
            self.load(embedding_manager_ckpt)

    @property
    def embedder(self) -> TextEncoder:
        """The text encoder."""
        return self._embedder[0]

    @property
    def placeholders(self) -> Mapping[str, int]:
        """Placeholder strings and the ids that stand for them: the vocabulary's, or one outside it."""
        return dict(self._ids)

    def active(self, name: str) -> int:
        """How many vectors of a placeholder are in use."""
        total = len(self.string_to_param_dict[name])
        if not self.progressive_words:
            return self.counts_in_files.get(name, total)
        return min(max(self.counts_in_files.get(name, 1), self._reached), total)

    # --- placeholders -----------------------------------------------------------------------------------------------

    def add(self, name: str, vectors: Tensor | None = None, init_word: str | None = None) -> None:
        """Add a placeholder with given vectors (n, D), or with those of `init_word`, or with random ones."""
        if not name.strip():
            raise ValueError(f"{name!r} cannot be a placeholder: it has no visible character")
        if name in self._ids:
            raise ValueError(f"there is already a placeholder {name!r}: rename one of the two")
        initial = self._from_word(init_word, None if vectors is None else len(vectors)) if init_word else None
        if vectors is None:
            vectors = self._random(name, self.num_vectors_per_token) if initial is None else initial
        if vectors.shape[1] != self.embedder.embedding_dim:
            raise ValueError(self._wrong_width(name, vectors.shape[1]))
        self.string_to_param_dict[name] = vectors.to(self._table_rows([0]).device)
        if initial is not None:
            assert init_word is not None
            self.initial_embeddings[name] = initial
            self.init_words[name] = init_word
        self._ids[name] = self._id_for(name)

    def remove(self, name: str) -> None:
        """Forget a placeholder."""
        for store in (self.string_to_param_dict, self.initial_embeddings):
            if name in store:
                del store[name]
        for entries in (self._ids, self.counts_in_files, self.init_words):
            entries.pop(name, None)

    def rename(self, old: str, new: str) -> None:
        """Let another string stand for the vectors of placeholder `old`."""
        if old not in self._ids:
            raise ValueError(f"there is no placeholder {old!r} to rename, only {some_words(self._ids)}")
        if new == old:
            return
        self.add(new, self.string_to_param_dict[old])
        self.counts_in_files[new] = self.active(old)
        if old in self.initial_embeddings:
            self.initial_embeddings[new] = self.initial_embeddings[old]
            self.init_words[new] = self.init_words[old]
        self.remove(old)

    def initialize(self) -> None:
        """Start all vectors again from the encoder's present weights; for use after a checkpoint was loaded."""
        for name, word in ((name, self.init_words.get(name)) for name in self._ids):
            count = len(self.string_to_param_dict[name])
            vectors = self._from_word(word, count) if word else self._random(name, count)
            self.string_to_param_dict[name] = vectors
            if word:
                self.initial_embeddings[name] = vectors

    def _id_for(self, name: str) -> int:
        """A placeholder that is one vocabulary entry keeps its id, any other gets a free one behind the vocabulary."""
        taken = set(self._ids.values())
        ids = self.embedder.word_ids(name)
        is_entry = len(ids) == 1 and self.embedder.id_to_word(ids[0]).strip().lower() == name.strip().lower()
        if is_entry and ids[0] not in taken:
            return ids[0]
        free = self.embedder.vocab_size
        while free in taken:
            free += 1
        return free

    def _table_rows(self, ids: Sequence[int]) -> Tensor:
        return self.embedder.embed(torch.tensor(list(ids))).detach().float()

    def _from_word(self, word: str, count: int | None = None) -> Tensor:
        """Vectors (n, D) of an initial word; `count` fixes n, else it follows from the options."""
        if not self._knows(word):
            raise ValueError(f"the initial word {word!r} is not in the text encoder's vocabulary: choose another")
        ids = self.embedder.word_ids(word)
        if self.published_clip_init:
            rows = self.embedder.embed_at_start(torch.tensor(ids)).detach().float()  # type: ignore[attr-defined]
        else:
            rows = self._table_rows(ids)  # (k, D)
        n = count or self.num_vectors_per_token
        if count is None and self.multi_token_init == "vectors":
            n = max(n, len(ids))
        if len(ids) > n:
            logger.warning("initial word %r is %d tokens: starting from their mean", word, len(ids))
            return rows.mean(0, keepdim=True).expand(n, -1)
        if len(ids) > 1:
            logger.warning("initial word %r is %d tokens: one vector for each, of %d in all", word, len(ids), n)
        return torch.cat([rows, rows[-1:].expand(n - len(ids), -1)])

    def _knows(self, word: str) -> bool:
        ids = self.embedder.word_ids(word)
        return bool(ids) and getattr(self.embedder, "unk_token_id", None) not in ids

    def _random(self, name: str, count: int) -> Tensor:
        """Vectors (count, D) as long as the table's rows are, the same for the same seed and name."""
        step = max(1, self.embedder.vocab_size // 2048)
        rows = self._table_rows(range(0, self.embedder.vocab_size, step))
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + self.seed)
        noise = torch.randn(count, self.embedder.embedding_dim, generator=generator)
        return noise.to(rows.device) * rows.std()

    # --- in the forward pass ----------------------------------------------------------------------------------------

    def forward(self, token_ids: Tensor, embedded: Tensor) -> Tensor:
        """Vocabulary rows `embedded` (B, L, D) of `token_ids` (B, L) with the placeholders' vectors put in.

        A placeholder of n vectors pushes the rest of its row to the right. What no longer fits is cut off, but the
        end token stays. Neither argument is changed.
        """
        layout = self.layout(token_ids)
        first, offsets = 0, torch.full_like(layout.ids, -1)
        tables = []
        for name, token_id in self._ids.items():
            here = layout.ids == token_id  # (B, L)
            offsets = torch.where(here, first + layout.nth, offsets)
            tables.append(self.string_to_param_dict[name])
            first += len(tables[-1])
        if not tables:
            return embedded
        embedded = embedded.gather(1, layout.source.unsqueeze(-1).expand_as(embedded))  # (B, L, D)
        vectors = torch.cat(tables)[offsets.clamp(min=0)].to(embedded.dtype)  # (B, L, D)
        return torch.where((offsets >= 0).unsqueeze(-1), vectors, embedded)

    def expand(self, token_ids: Tensor) -> Tensor:
        """Token ids (B, L) with each placeholder repeated once per active vector, cut at L as in `forward`."""
        return self.layout(token_ids).ids

    def layout(self, ids: Tensor) -> Layout:
        """Where each position of the expanded token ids (B, L) comes from."""
        counts = {token_id: self.active(name) for name, token_id in self._ids.items()}
        layout, cut = expanded(ids, counts, self.embedder.end_token_id)
        if cut is not None and not ids.is_meta:
            self._warn_of(ids, cut)
        return layout

    def _warn_of(self, ids: Tensor, cut: Tensor) -> None:
        """Say once for each long prompt, `MOST_WARNINGS` at most, which of its words were cut off."""
        if len(self._truncated) >= MOST_WARNINGS or not bool(cut.any()):
            return
        names = {token_id: name for name, token_id in self._ids.items()}
        for row in cut.any(1).nonzero().flatten().tolist():
            prompt = tuple(ids[row].tolist())
            if prompt in self._truncated:
                continue
            self._truncated.add(prompt)
            words = [names.get(i) or self.embedder.id_to_word(i) for i in ids[row][cut[row]].tolist()]
            logger.warning(
                "prompt with its vectors is longer than %d tokens, dropped its end: %r", ids.shape[1], " ".join(words)
            )

    def set_global_step(self, step: int) -> None:
        """Tell progressive words how far training is: 1 + step // progressive_every vectors are in use.

        Words from a file never use fewer than they did in it.
        """
        self._reached = 1 + step // self.progressive_every

    # --- losses and statistics --------------------------------------------------------------------------------------

    def embedding_parameters(self) -> Iterator[nn.Parameter]:
        """The trainable vectors, one parameter (n, D) per placeholder."""
        return self.string_to_param_dict.parameters()

    def get_embedding_norms_squared(self) -> Tensor:
        """Squared length of every vector of every placeholder (N,)."""
        vectors = torch.cat([self.string_to_param_dict[name] for name in self._ids])  # (N, D)
        return vectors.square().sum(-1)

    def embedding_to_coarse_loss(self) -> Tensor:
        """Sum of squared distances to the initial word's vectors, mean over the placeholders that have one; 0-d."""
        names = list(self.initial_embeddings)
        if not names:
            return self._table_rows([0]).new_zeros(())
        pairs = ((self.string_to_param_dict[n], self.initial_embeddings[n]) for n in names)
        return torch.stack([(now - start.float()).square().sum() for now, start in pairs]).mean()

    @torch.no_grad()
    def nearest_words(self, name: str, count: int = 5) -> list[list[tuple[str, float]]]:
        """For each vector of a placeholder the nearest vocabulary entries, with cosine similarities."""
        table = nn.functional.normalize(self._table_rows(range(self.embedder.vocab_size)), dim=-1)  # (V, D)
        vectors = nn.functional.normalize(self.string_to_param_dict[name], dim=-1)  # (n, D)
        values, ids = (vectors.to(table.device) @ table.T).topk(count)  # (n, count)
        return [
            [(self.embedder.id_to_word(i), v) for i, v in zip(row_ids, row_values, strict=True)]
            for row_ids, row_values in zip(ids.tolist(), values.tolist(), strict=True)
        ]

    # --- files ------------------------------------------------------------------------------------------------------

    def run_entries(self) -> dict[str, dict[str, Any]]:
        """What a run's checkpoint says of this manager besides its vectors, for `resume`."""
        return {"initial_words": dict(self.init_words), "counts_in_files": dict(self.counts_in_files)}

    def resume(self, checkpoint: Mapping[str, Any], prefix: str) -> None:
        """Go on as in the run of a checkpoint, whose state dict has the vectors' names after `prefix`.

        Raises `ValueError` where it has other words, or other initial words, than this manager: its vectors would be
        left out, or go on under the name of a word that they did not start from.
        """
        prefix = f"{prefix}string_to_param_dict."
        saved = {key.removeprefix(prefix) for key in checkpoint["state_dict"] if key.startswith(prefix)}
        own = {key for key, _ in self.string_to_param_dict.named_parameters()}
        if saved != own:
            raise ValueError(
                f"the run learns {some_words(sorted(saved))}, not {some_words(sorted(own))}: a resumed run keeps its "
                "words; to go on under another name, start a new run with --embedding_manager_ckpt"
            )
        for name, word in checkpoint.get("initial_words", {}).items():
            if self.init_words.get(name) != word:
                raise ValueError(
                    f"{name!r} started from {word!r}, not from {self.init_words.get(name)!r}: the initial word of a "
                    "resumed run cannot change; start a new run for that"
                )
        if self.progressive_words:  # older checkpoints have no counts: then those of the file did not matter
            self.counts_in_files = dict(checkpoint.get("counts_in_files", {}))

    def save(
        self,
        path: str | Path,
        info: Mapping[str, str | int | float] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        """Write all placeholders, or those of `names`, in the published layout, with scalars such as {"step": 500}."""
        ids = {name: token_id for name, token_id in self._ids.items() if names is None or name in names}
        vectors = {name: self.string_to_param_dict[name].detach() for name in ids}
        active = {name: self.active(name) for name in ids}
        init_words = {name: word for name, word in self.init_words.items() if name in ids}
        write_embeddings(EmbeddingFile(vectors, ids, active, init_words, dict(info or {})), path)

    def load(
        self, path: str | Path, add: bool = False, rename: Mapping[str, str] | None = None, strength: float = 1.0
    ) -> list[str]:
        """Read a file's placeholders with as many vectors as it holds; returns their names.

        add: keep the placeholders that are there; otherwise the file's replace them.
        rename: {name in the file: name here}.
        strength: 1 takes the vectors as they are, 0 the initial word's, between and beyond is linear.
        """
        words = read_embeddings(path).renamed(rename or {})
        if words.width != self.embedder.embedding_dim:
            raise ValueError(f"{path}: {self._wrong_width(next(iter(words.vectors)), words.width)}")
        taken = [name for name in words.vectors if add and name in self._ids]
        if taken:
            raise ValueError(f"{path}: there is already a placeholder {taken[0]!r}; rename the one in the file")
        starts = {k: w for k, w in words.init_words.items() if self._knows(w)}
        words.vectors = {
            name: self._at_strength(path, name, vectors, starts.get(name) or self.init_words.get(name), strength)
            for name, vectors in words.vectors.items()
        }
        for name in [] if add else list(self._ids):
            if name not in words.vectors:
                self.remove(name)
        for name, vectors in words.vectors.items():
            if name not in self._ids or self.string_to_param_dict[name].shape != vectors.shape:
                init_word = self.init_words.get(name) or starts.get(name)
                self.remove(name)
                self.add(name, vectors, init_word)
            elif name not in self.init_words and name in starts:
                self.initial_embeddings[name] = self._from_word(starts[name], len(vectors)).to(vectors.device)
                self.init_words[name] = starts[name]
            self.string_to_param_dict[name] = vectors.to(self.string_to_param_dict[name].device)
            self.counts_in_files[name] = words.active.get(name, len(vectors))
        return list(words.vectors)

    def _at_strength(self, path: str | Path, name: str, vectors: Tensor, word: str | None, strength: float) -> Tensor:
        if strength == 1.0:
            return vectors
        if word is None:
            raise ValueError(
                f"{path} does not say which word {name!r} started from, which a strength other than 1 needs"
            )
        initial = self._from_word(word, len(vectors)).to(vectors)
        return initial + strength * (vectors - initial)

    def _wrong_width(self, name: str, width: int) -> str:
        own = self.embedder.embedding_dim
        here, there = WIDTHS.get(own, "an unknown model"), WIDTHS.get(width, "an unknown model")
        return f"{name!r} has vectors of width {width} ({there}), but this text encoder's are {own} wide ({here})"
