"""All that a table needs in small: concepts, a base model to learn words on, a judge, a file of models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from evaluation.scorer import Scorer, save_scorer
from ldm.modules.encoders.bert import WordPieceTokenizer
from tests.tiny_models import TEXT_WEIGHTS, text_config
from tests.tiny_run import write_config

SCORER = {"embed_dim": 16, "image_size": 16, "widths": [8, 16], "depths": [0, 1], "text_width": 16, "text_layers": 1,
          "text_heads": 2, "max_length": 24}  # fmt: skip
CAPTIONS = {"short": ["a red thing", "a round thing"], "long": ["a large red thing with a dark edge"]}


def write_concept(folder: Path, seed: int, pictures: int = 3, **said: Any) -> Path:
    """A folder of small pictures that resemble each other, with a concept.yaml."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 255, (4, 4, 3))
    for number in range(pictures):
        levels = np.clip(base + rng.integers(-30, 30, base.shape), 0, 255).astype(np.uint8)
        Image.fromarray(levels).resize((40, 40), Image.Resampling.BILINEAR).save(folder / f"{number}.png")
    if said:
        (folder / "concept.yaml").write_text(yaml.safe_dump(said))
    return folder


def write_concepts(folder: Path, names: tuple[str, ...] = ("cat", "mug"), **said: Any) -> Path:
    """A folder of concepts that start from "sculpture" and have captions."""
    for seed, name in enumerate(names):
        write_concept(folder / name, seed, init_word="sculpture", captions=CAPTIONS, **said)
    return folder


def write_judge(folder: Path) -> Path:
    """An untrained scorer of the embedded world."""
    torch.manual_seed(0)
    words = ["a", "photo", "of", "red", "two", "on", "beach"]
    pieces = torch.tensor(sorted({i for word in words for i in WordPieceTokenizer().encode(word)}))
    scorer = Scorer(vocab_size=len(pieces), **SCORER)
    scorer.pieces.copy_(pieces)
    save_scorer(scorer, folder, {**SCORER, "vocab_size": len(pieces)})
    return folder


def write_model(folder: Path) -> tuple[Path, Path]:
    """The reference text-to-image model as a folder to sample from, and its config to learn words."""
    model = folder / "model"
    model.mkdir(parents=True)
    (model / "config.yaml").write_text(yaml.safe_dump(text_config()))
    (model / "model.safetensors").symlink_to(TEXT_WEIGHTS)
    config = text_config()
    config["model"]["params"]["personalization_config"] = {
        "target": "ldm.modules.embedding_manager.EmbeddingManager",
        "params": {"placeholder_strings": ["*"], "initializer_words": ["sculpture"]},
    }
    dataset = {"target": "ldm.data.personalized.PersonalizedBase", "params": {"size": 32, "repeats": 2}}
    config["model"]["base_learning_rate"] = 0.005
    config["data"] = {
        "target": "main.DataModuleFromConfig",
        "params": {"batch_size": 2, "num_workers": 0, "train": dataset},
    }
    return model, write_config(folder / "inversion.yaml", config)


def write_models_file(folder: Path, judges: dict[str, str] | None = None, **changed: Any) -> Path:
    """A file like models.yaml with the one model "tiny"."""
    model, config = write_model(folder)
    spec = {
        "label": "a tiny model",
        "config": str(config),
        "checkpoint": str(model),
        "size": 32,
        "judges": judges or {"own": "emoji64"},
        "training": {"steps": 4, "batch_size": 2, "learning_rate": 0.005, "regularisation": 0.1, "pictures": 2},
        "sampling": {"sampler": "dpm", "steps": 2, "batch_size": 64},
        "prompts": {
            "object": {"editing": ["* on the beach", "two *"]},
            "style": {"reconstruction": "a picture in the style of *", "editing": ["a cat in the style of *"]},
        },
        "pictures": 2,
        "seeds": [0, 1],
        "quick": {"steps": 0.5, "concepts": 1, "seeds": 1, "pictures": 1},
        **changed,
    }
    return write_config(folder / "models.yaml", {"tiny": spec})
