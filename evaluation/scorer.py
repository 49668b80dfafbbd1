"""The judge of the embedded picture world: a small CLIP-like pair of encoders for 64-pixel pictures and captions.

It knows all drawings, those that stay out of the generator's training included, so that it can say what a generated
picture shows: its object, its background colour and its style. `scripts/train_scorer.py` trains it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.data.emoji import COLOURS, HELD_OUT_STYLE_PHRASES, NEUTRAL_PHRASES, STYLE_PHRASES, article

if TYPE_CHECKING:
    from ldm.modules.encoders.bert import WordPieceTokenizer

CONFIG = "models/scorer/emoji64/config.yaml"
WEIGHTS = "model.safetensors"
MAX_LOGIT_SCALE = math.log(100.0)  # as CLIP: similarities count at most a hundredfold
UNKNOWN, SPECIALS = 0, 1  # row 0 of the text table stands for every piece that no caption of the world uses

# Prompts whose mean direction stands for an object, a background or a style; `{}` is its noun phrase.
OBJECT_TEMPLATES = tuple(f"{phrase} {{}}".strip() for phrase in NEUTRAL_PHRASES)
BACKGROUND_TEMPLATES = ("{}", "something {}", "a picture {}", "a picture of something {}")
STYLE_TEMPLATES = ("{} something", "{} a thing", "{} an object")
STYLES: dict[str, str] = STYLE_PHRASES | HELD_OUT_STYLE_PHRASES


class Residual(nn.Module):
    """Two 3 x 3 convolutions with batch norm, added to their input; `stride` 2 halves the picture."""

    def __init__(self, inner: int, outer: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outer)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inner != outer:
            self.shortcut = nn.Conv2d(inner, outer, stride, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform `x` (B, inner, H, W)."""
        h = F.relu(self.norm1(self.conv1(x)))  # (B, outer, H / stride, W / stride)
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class ImageEncoder(nn.Module):
    """Residual network over a picture and its pixels' coordinates, since captions say where things are."""

    def __init__(self, widths: Sequence[int], depths: Sequence[int], embed_dim: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(5, widths[0], 5, 2, 2, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        layers: list[nn.Module] = []
        inner = widths[0]
        for level, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            for block in range(depth):
                layers.append(Residual(inner, width, 2 if level and not block else 1))
                inner = width
        self.layers = nn.Sequential(*layers)
        self.project = nn.Linear(inner, embed_dim, bias=False)
        # Styles look different on every object, so a straight projection of the features is not enough.
        self.refine = nn.Sequential(nn.Linear(inner, 4 * inner), nn.GELU(), nn.Linear(4 * inner, embed_dim, bias=False))

    def features(self, images: Tensor) -> Tensor:
        """What the last level finds in pictures (B, 3, H, W): (B, C)."""
        B, _, H, W = images.shape
        across = torch.linspace(-1, 1, W, device=images.device, dtype=images.dtype).expand(B, 1, H, W)
        down = torch.linspace(-1, 1, H, device=images.device, dtype=images.dtype)[:, None].expand(B, 1, H, W)
        x = torch.cat([images, across, down], dim=1)  # (B, 5, H, W)
        x = x.contiguous(memory_format=torch.channels_last)
        return self.layers(F.relu(self.norm(self.stem(x)))).mean((2, 3))  # (B, C)

    def embed(self, features: Tensor) -> Tensor:
        """Vectors (B, D) of any length from features (B, C)."""
        return self.project(features) + self.refine(features)

    def forward(self, images: Tensor) -> Tensor:
        """Embed pictures (B, 3, H, W) as vectors (B, D) of any length."""
        return self.embed(self.features(images))


class TextEncoder(nn.Module):
    """Pre-norm transformer over word pieces; the mean over the tokens is projected."""

    def __init__(self, vocab_size: int, width: int, layers: int, heads: int, max_length: int, embed_dim: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size + SPECIALS, width)
        self.positions = nn.Parameter(torch.randn(max_length, width) * 0.02)
        nn.init.normal_(self.tokens.weight, std=0.1)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, embed_dim, bias=False)

    def forward(self, rows: Tensor, keep: Tensor) -> Tensor:
        """Embed token rows (B, L) as vectors (B, D) of any length; `keep` (B, L) is False at padding."""
        x = self.tokens(rows) + self.positions[: rows.shape[1]]  # (B, L, width)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~keep)
        weight = keep.unsqueeze(-1).to(x.dtype)
        x = (self.norm(x) * weight).sum(1) / weight.sum(1)  # (B, width)
        return self.project(x)  # (B, D)


class Scorer(nn.Module):
    """Pictures and texts as unit vectors of one space, and questions about pictures answered by it.

    embed_dim: length of the vectors.
    image_size: side of the pictures in pixels; others are resized.
    widths, depths: channels and blocks of the picture network's levels, each at half the size of the one before.
    vocab_size: number of known word pieces; the pieces themselves lie in the buffer `pieces` (bert-base-uncased ids).
    text_width, text_layers, text_heads: sizes of the text transformer.
    max_length: word pieces per text; longer texts are cut.
    """

    pieces: Tensor

    def __init__(
        self,
        embed_dim: int = 256,
        image_size: int = 64,
        widths: Sequence[int] = (32, 64, 128, 256),
        depths: Sequence[int] = (0, 1, 2, 2),
        vocab_size: int = 1,
        text_width: int = 192,
        text_layers: int = 2,
        text_heads: int = 4,
        max_length: int = 32,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.max_length = max_length
        self.image_encoder = ImageEncoder(widths, depths, embed_dim)
        self.text_encoder = TextEncoder(vocab_size, text_width, text_layers, text_heads, max_length, embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.register_buffer("pieces", torch.zeros(vocab_size, dtype=torch.long))

    @functools.cached_property
    def tokenizer(self) -> WordPieceTokenizer:
        """The word-piece tokenizer, read when the first text comes."""
        from ldm.modules.encoders.bert import WordPieceTokenizer

        return WordPieceTokenizer()

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Rows of the text table, int64 (B, L), and which of them are no padding, bool (B, L)."""
        ids = [self.tokenizer.encode(self.tokenizer.clean(text))[: self.max_length] for text in texts]
        length = max(1, *(len(row) for row in ids))
        padded = torch.tensor([row + [-1] * (length - len(row)) for row in ids], device=self.pieces.device)  # (B, L)
        at = torch.searchsorted(self.pieces, padded).clamp_max(len(self.pieces) - 1)
        rows = torch.where(self.pieces[at] == padded, at + SPECIALS, UNKNOWN)
        keep = padded >= 0
        keep[:, 0] = True  # an empty text is one unknown word
        return rows, keep

    def encode_image(self, images: Tensor) -> Tensor:
        """Unit vectors (B, D) of RGB pictures (B, 3, H, W) in [-1, 1]."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected pictures of shape (B, 3, H, W) in [-1, 1], got {tuple(images.shape)}")
        images = images.to(self.pieces.device, self.logit_scale.dtype)
        size = (self.image_size, self.image_size)
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True)  # (B, 3, S, S)
        return F.normalize(self.image_encoder(images).float(), dim=-1)  # (B, D)

    def encode_text(self, texts: Sequence[str] | str) -> Tensor:
        """Unit vectors (B, D) of texts."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise ValueError("there is no text to encode: give at least one")
        return self.encode_rows(*self.tokenize(texts))

    def encode_rows(self, rows: Tensor, keep: Tensor) -> Tensor:
        """Unit vectors (B, D) of texts in the form that `tokenize` gives."""
        return F.normalize(self.text_encoder(rows, keep).float(), dim=-1)

    @torch.no_grad()
    def encode_prompts(self, phrases: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Mean directions (N, D) of N noun phrases over all templates."""
        vectors = self.encode_text([template.format(phrase) for phrase in phrases for template in templates])
        return F.normalize(vectors.unflatten(0, (len(phrases), len(templates))).mean(1), dim=-1)  # (N, D)

    @torch.no_grad()
    def object_scores(self, images: Tensor, objects: Sequence[str]) -> Tensor:
        """Cosines (B, N) of pictures (B, 3, H, W) with the names of N objects."""
        prompts = self.encode_prompts([article(name) for name in objects], OBJECT_TEMPLATES)
        return self.encode_image(images) @ prompts.T  # (B, N)

    def rank_objects(self, images: Tensor, objects: Sequence[str], candidates: Sequence[str]) -> Tensor:
        """Rank (B,) that `objects[i]` has for picture i among itself and all `candidates`; 1 is the best.

        Raises `ValueError` unless there is one object for each picture.
        """
        if len(objects) != len(images):
            raise ValueError(f"{len(images)} pictures need as many objects, got {len(objects)}")
        names = list(dict.fromkeys([*candidates, *objects]))
        listed = torch.tensor([name in set(candidates) for name in names], device=self.pieces.device)  # (N,)
        own = torch.tensor([names.index(name) for name in objects], device=self.pieces.device)  # (B,)
        scores = self.object_scores(images, names)  # (B, N)
        return 1 + ((scores > scores.gather(1, own[:, None])) & listed).sum(1)

    def name_background(self, images: Tensor) -> list[str]:
        """The colour in `ldm.data.emoji.COLOURS` that each picture's background comes closest to."""
        phrases = [background_phrase(colour) for colour in COLOURS]
        return self._name(images, list(COLOURS), self.encode_prompts(phrases, BACKGROUND_TEMPLATES))

    def name_style(self, images: Tensor, styles: Sequence[str] = tuple(STYLE_PHRASES)) -> list[str]:
        """The style among `styles` (keys of `STYLES`) that each picture comes closest to."""
        unknown = [style for style in styles if style not in STYLES]
        if unknown:
            raise ValueError(f"style '{unknown[0]}' is none of {', '.join(STYLES)}")
        return self._name(images, styles, self.encode_prompts([STYLES[s] for s in styles], STYLE_TEMPLATES))

    @torch.no_grad()
    def _name(self, images: Tensor, names: Sequence[str], prompts: Tensor) -> list[str]:
        best = (self.encode_image(images) @ prompts.T).argmax(1)
        return [names[i] for i in best.tolist()]


def background_phrase(colour: str) -> str:
    """How captions speak of a plain background."""
    return f"on {article(colour)} background"


def scorer_files(folder: str | Path | None = None) -> tuple[Path, Path]:
    """Config and weights of the scorer in a folder, which one of the two may stand for; default: the shipped ones."""
    from ldm.resources import config_path

    if folder is None:
        config = config_path(CONFIG)
    else:
        config = (Path(folder).parent if Path(folder).is_file() else Path(folder)) / "config.yaml"
    return config, config.parent / WEIGHTS


def load_scorer(folder: str | Path | None = None, device: str | torch.device = "cpu") -> Scorer:
    """The scorer in `folder` (`config.yaml`, `model.safetensors`; default: the shipped one), ready to judge.

    `folder` may also name one of the two files. Raises `FileNotFoundError` when its weights are missing.
    """
    from omegaconf import OmegaConf
    from safetensors.torch import load_file

    from ldm.util import freeze, instantiate_from_config, to_plain

    config, weights = scorer_files(folder)
    if not config.is_file() or not weights.is_file():
        raise FileNotFoundError(
            f"{config.parent}: no scorer ({config.name}, {WEIGHTS}); scripts/train_scorer.py makes one"
        )
    with torch.device("meta"):
        scorer: Scorer = instantiate_from_config(to_plain(OmegaConf.load(config))["model"])
    state = {k: v.float() if v.is_floating_point() else v for k, v in load_file(weights).items()}
    scorer.load_state_dict(state, assign=True)
    return freeze(scorer.to(device))


def save_scorer(scorer: Scorer, folder: str | Path, params: dict[str, object]) -> None:
    """Write `config.yaml` (`params` are the constructor's) and `model.safetensors` (16 bits) into `folder`."""
    from omegaconf import OmegaConf
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.half() if v.is_floating_point() else v for k, v in scorer.state_dict().items()}
    save_file({k: v.contiguous().cpu() for k, v in state.items()}, folder / WEIGHTS)
    text = OmegaConf.to_yaml({"model": {"target": "evaluation.scorer.Scorer", "params": params}})
    heading = "# The scorer of the embedded picture world, trained by scripts/train_scorer.py\n"
    (folder / "config.yaml").write_text(heading + text, encoding="utf-8")
