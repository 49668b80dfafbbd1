"""Shards and precomputed latents: every sample once, alike by seed, resumable, damaged ones named."""

from __future__ import annotations

import io
import json
import logging
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ldm.data.datamodule import DataModuleFromConfig
from ldm.data.laion import MASK_MODES, AddMask, MetadataFilter, WebDataModuleFromConfig, random_mask
from ldm.data.latents import LatentWriter, PrecomputedLatents
from ldm.data.webdata import WebDatasetPictures, expand_shards
from ldm.util import instantiate_from_config

PER_SHARD = 6


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path: Path, samples: list[dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples):
            for ending, content in sample.items():
                info = tarfile.TarInfo(f"{path.stem}{number:03d}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Four shards of six samples; the caption of each is its number."""
    for shard in range(4):
        numbers = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
        write_shard(tmp_path / f"s{shard}.tar", [{"png": jpeg(n), "txt": b"%d" % n} for n in numbers])
    return str(tmp_path / "s{0..3}.tar")


def captions(batches: Any) -> list[str]:
    return [caption for batch in batches for caption in batch["caption"]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_pass_gives_each_sample_once(shards: str, num_workers: int) -> None:
    stream = WebDatasetPictures(shards, size=8, shuffle=5)
    batches = list(DataLoader(stream, batch_size=4, num_workers=num_workers))
    assert sorted(map(int, captions(batches))) == list(range(24))
    assert captions(batches) != list(map(str, range(24)))
    assert batches[0]["image"].shape == (4, 8, 8, 3)
    assert captions(DataLoader(WebDatasetPictures(shards, shuffle=5, size=8), 4)) == captions(DataLoader(stream, 4))


def test_without_shuffling_the_order_is_that_of_the_shards(shards: str) -> None:
    assert captions(DataLoader(WebDatasetPictures(shards, shuffle=0), 5)) == list(map(str, range(24)))


def test_processes_share_the_samples(shards: str) -> None:
    seen = []
    for rank in range(3):
        stream = WebDatasetPictures(shards, shuffle=5)
        stream.start_at(0, 1, rank, world_size=3)
        seen += [item["caption"] for item in stream]
    assert sorted(map(int, seen)) == list(range(24))
    seen = []
    for rank in range(5):  # more processes than shards
        stream = WebDatasetPictures(shards, shuffle=5)
        stream.start_at(0, 1, rank, world_size=5)
        seen += [item["caption"] for item in stream]
    assert sorted(map(int, seen)) == list(range(24))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stream_resumes_at_any_batch(shards: str, num_workers: int) -> None:
    def run(first: int) -> list[tuple[str, float]]:
        stream = WebDatasetPictures(shards, size=8, crop="random", flip_p=0.5, shuffle=5, samples_per_epoch=15)
        stream.start_at(first, 3)
        loader = DataLoader(stream, batch_size=3, num_workers=num_workers)
        return [(caption, float(image.sum())) for b in loader for caption, image in zip(*b_values(b), strict=True)]

    def b_values(batch: dict[str, Any]) -> tuple[list[str], torch.Tensor]:
        return batch["caption"], batch["image"]

    whole = run(0)
    assert len(whole) == 15
    second = run(5)
    assert second != whole
    for first in range(1, 5):
        assert run(first) == whole[3 * first :]
        assert run(5 + first) == second[3 * first :]


def test_data_module_serves_streams(shards: str) -> None:
    target = "ldm.data.webdata.WebDatasetPictures"
    params = {"shards": shards, "size": 8, "samples_per_epoch": 12, "caption_dropout": 1.0}
    data = DataModuleFromConfig(batch_size=4, num_workers=0, wrap=True, train={"target": target, "params": params})
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    assert captions(batches) == [""] * 12
    assert loader.state_dict() == {"batch_size": 4, "num_workers": 0}
    with pytest.raises(ValueError, match="samples_per_epoch 2"):
        instantiate_from_config({"target": target, "params": {**params, "samples_per_epoch": 2}}).start_at(0, 4)


class Watcher(pl.LightningModule):
    """Keeps the captions of the batches that it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[str]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["caption"])
        return self.weight.sum() * batch["image"].mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_trainer_resumes_a_stream(shards: str, tmp_path: Path, num_workers: int) -> None:
    def run(steps: int, ckpt: Path | None = None) -> list[list[str]]:
        params = {"shards": shards, "size": 8, "samples_per_epoch": 20, "shuffle": 4}
        train = {"target": "ldm.data.webdata.WebDatasetPictures", "params": params}
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        saver = pl.callbacks.ModelCheckpoint(tmp_path / "ckpt", "{step}", every_n_train_steps=7, save_top_k=-1)
        trainer = pl.Trainer(max_steps=steps, accelerator="cpu", callbacks=[saver], **quiet)
        model = Watcher()
        trainer.fit(model, DataModuleFromConfig(4, train=train, num_workers=num_workers), ckpt_path=ckpt)
        return model.seen

    whole = run(12)
    assert len(whole) == 12
    assert run(12, tmp_path / "ckpt" / "step=7.ckpt") == whole[7:]


def test_damaged_samples_are_named_or_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = [{"png": jpeg(1), "txt": b"a"}, {"png": jpeg(2)[:40], "txt": b"b"}, {"png": jpeg(3)}]
    write_shard(tmp_path / "s.tar", samples)
    shard = str(tmp_path / "s.tar")
    with pytest.raises(ValueError, match=r"s001 in .*s\.tar"):
        list(WebDatasetPictures(shard, shuffle=0))
    with caplog.at_level(logging.WARNING):
        assert [item["caption"] for item in WebDatasetPictures(shard, shuffle=0, on_error="skip")] == ["a"]
    assert "no 'txt' file" in caplog.text
    whole = (tmp_path / "s.tar").read_bytes()
    (tmp_path / "s.tar").write_bytes(whole[:700])
    with pytest.raises(ValueError, match=r"s\.tar, which is no tar file"):
        list(WebDatasetPictures(shard, shuffle=0))
    assert list(WebDatasetPictures(shard, shuffle=0, on_error="skip")) == []


def test_shard_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="is a shell command; set LDM_ALLOW_PIPE=1"):
        expand_shards("pipe:touch harm")
    monkeypatch.setenv("LDM_ALLOW_PIPE", "1")
    assert expand_shards(["pipe:cat a{00..02}.tar", "http://h/x.tar"])[:3] == [f"pipe:cat a0{i}.tar" for i in range(3)]
    with pytest.raises(FileNotFoundError, match="2 of 2 shards"):
        expand_shards(str(tmp_path / "{0..1}.tar"))
    with pytest.raises(ValueError, match="empty"):
        expand_shards([])


@pytest.mark.parametrize("mode", MASK_MODES)
def test_masks_hide_some_of_the_picture(mode: str) -> None:
    np.random.seed(0)
    masks = [random_mask(64, 48, mode) for _ in range(20)]
    assert all(mask.shape == (48, 64) and set(np.unique(mask)) <= {0.0, 1.0} for mask in masks)
    assert all(mask.max() == 1 for mask in masks)
    assert 0.02 < np.mean(masks) < 0.95


def test_masked_image() -> None:
    image = np.full((32, 32, 3), 0.5, dtype=np.float32)
    np.random.seed(0)
    item = AddMask("512train-large", p_drop=0.0)({"jpg": image})
    assert item["mask"].shape == (32, 32, 1)
    assert np.array_equal(item["masked_image"], image * (item["mask"] < 0.5))
    assert AddMask(p_drop=1.0)({"jpg": image})["mask"].min() == 1
    with pytest.raises(ValueError, match="did you mean '512train'"):
        AddMask("512trai")


def test_laion_module_filters_transforms_and_masks(tmp_path: Path) -> None:
    def facts(**values: Any) -> bytes:
        return json.dumps(
            {"original_width": 600, "original_height": 700, "pwatermark": 0.1, "punsafe": 0.0} | values
        ).encode()

    rows = [
        ("good", facts()),
        ("small", facts(original_width=100)),
        ("watermark", facts(pwatermark=0.9)),
        ("unsafe", facts(punsafe=0.5)),
        ("a BADword", facts()),
        ("broken", b"{"),
        ("fine", facts(pwatermark=0.45)),
    ]
    write_shard(tmp_path / "a.tar", [{"jpg": jpeg(9), "txt": text.encode(), "json": meta} for text, meta in rows])
    (tmp_path / "words.yaml").write_text("- badword\n")
    split = {
        "shards": "a.tar",
        "shuffle": 0,
        "image_key": "jpg",
        "image_transforms": [
            {"target": "torchvision.transforms.Resize", "params": {"size": 8, "interpolation": 3}},
            {"target": "torchvision.transforms.RandomCrop", "params": {"size": 8}},
        ],
        "postprocess": {"target": "ldm.data.laion.AddMask", "params": {"mode": "512train-large", "p_drop": 0.25}},
    }
    data = WebDataModuleFromConfig(
        tar_base=str(tmp_path),
        batch_size=2,
        train={**split, "samples_per_epoch": 8},
        validation=split,
        num_workers=0,
        min_size=512,
        max_pwatermark=0.45,
        p_unsafe_threshold=0.1,
        filter_word_list=str(tmp_path / "words.yaml"),
    )
    data.setup()
    (batch,) = data.val_dataloader()
    assert batch["txt"] == ["good", "fine"]
    assert batch["jpg"].shape == batch["masked_image"].shape == (2, 8, 8, 3)
    assert batch["mask"].shape == (2, 8, 8, 1)
    assert len(list(data.train_dataloader())) == 4
    with pytest.raises(FileNotFoundError, match="filter_word_list"):
        MetadataFilter(None, 1.0, None, "absent.yaml").read_words()
    with pytest.raises(ValueError, match="did you mean 'shuffle'"):
        WebDataModuleFromConfig(None, 2, train={"shards": "x", "shufle": 0})


def test_latents_round_trip(tmp_path: Path) -> None:
    moments = torch.randn(3, 2, 8, 4, 4)
    context = torch.randn(3, 5, 6)
    with LatentWriter(tmp_path, 3, (8, 4, 4), versions=2, context_shape=(5, 6)) as writer:
        writer.add(moments[:2], ["one", ["two", "zwei"]], context[:2])
        writer.add(moments[2:].numpy(), ["drei"], context[2:])
    dataset = pickle.loads(pickle.dumps(PrecomputedLatents(tmp_path)))
    assert len(dataset) == 3
    np.random.seed(0)
    items = [dataset[1] for _ in range(30)]
    assert {item["caption"] for item in items} == {"two", "zwei"}
    half = moments[1].half().float().numpy()
    versions = {int(np.array_equal(item["moments"], half[1])) for item in items}
    assert versions == {0, 1}
    assert items[0]["moments"].dtype == np.float32
    assert np.array_equal(items[0]["context"], context[1].half().float().numpy())
    data = DataModuleFromConfig(
        batch_size=3,
        num_workers=0,
        train={"target": "ldm.data.latents.PrecomputedLatents", "params": {"data_root": str(tmp_path)}},
    )
    (batch,) = data.train_dataloader()
    assert batch["moments"].shape == (3, 8, 4, 4)
    dropped = PrecomputedLatents(tmp_path, caption_dropout=1.0)
    assert dropped[0]["caption"] == ""


def test_folders_of_latents_follow_one_another(tmp_path: Path) -> None:
    for name, rows in (("a", 2), ("b", 3)):
        with LatentWriter(tmp_path / name, rows, (2, 1, 1), dtype="float32") as writer:
            writer.add(torch.arange(rows * 2.0).reshape(rows, 2, 1, 1), [f"{name}{i}" for i in range(rows)])
    both = PrecomputedLatents([tmp_path / "a", tmp_path / "b"])
    assert [item["caption"] for item in both] == ["a0", "a1", "b0", "b1", "b2"]
    assert both[4]["moments"][0] == 4.0
    with pytest.raises(IndexError):
        both[5]
    with pytest.raises(ValueError, match="no folder"):
        PrecomputedLatents([])
    with LatentWriter(tmp_path / "c", 1, (2, 1, 1), context_shape=(1,)) as writer:
        writer.add(torch.zeros(1, 2, 1, 1), [""], torch.zeros(1, 1))
    with pytest.raises(ValueError, match="context"):
        PrecomputedLatents([tmp_path / "a", tmp_path / "c"])


def test_unfinished_latents_are_refused(tmp_path: Path) -> None:
    def write(count: int, rows: int, stop: bool = False) -> None:
        with LatentWriter(tmp_path, count, (2, 1, 1), dtype="float32") as writer:
            writer.add(torch.zeros(rows, 2, 1, 1), ["a"] * rows)
            if stop:
                raise RuntimeError("stop")

    write(1, 1)
    assert len(PrecomputedLatents(tmp_path)) == 1
    with pytest.raises(RuntimeError, match="stop"):
        write(1, 1, stop=True)
    with pytest.raises(FileNotFoundError, match="no finished folder"):
        PrecomputedLatents(tmp_path)
    with pytest.raises(ValueError, match="1 of 2"):
        write(2, 1)
    with pytest.raises(ValueError, match="room for 1"):
        write(1, 2)
