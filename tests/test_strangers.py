"""Files of strangers: configs that would act, words that would fill the memory, texts that would steer a terminal."""

from __future__ import annotations

import json
import logging
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from ldm.checkpoint import CheckpointError, open_checkpoint
from ldm.cli import BAD_INPUT, SafeFormatter, run_command, shown
from ldm.convert import convert
from ldm.data.webdata import expand_shards
from ldm.generate_model import adjust_model, find_model_files
from ldm.models.diffusion.ancestral import AncestralSampler
from ldm.modules.embedding_io import EmbeddingFileError, read_embeddings
from ldm.run_flags import parameters_of
from ldm.util import ConfigError, get_obj_from_str, instantiate_from_config
from tests.test_scripts_sampling import load

WRITER = "pytorch_lightning.loggers.csv_logs.ExperimentWriter"


@pytest.fixture(autouse=True)
def _nothing_else_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LDM_TRUSTED_PACKAGES", raising=False)


def test_a_model_cannot_have_parts_of_a_trainer(tmp_path: Path):
    (tmp_path / "metrics.csv").write_text("mine")
    for target in (WRITER, "pytorch_lightning.loggers.CSVLogger", "pytorch_lightning.callbacks.Timer"):
        with pytest.raises(ConfigError, match="in no package that configs may use"):
            instantiate_from_config({"target": target, "params": {"log_dir": str(tmp_path)}})
    assert (tmp_path / "metrics.csv").read_text() == "mine"


def test_a_trainer_has_callbacks_loggers_and_strategies_only():
    assert parameters_of("pytorch_lightning.loggers.CSVLogger", trainer_part=True)
    assert get_obj_from_str("pytorch_lightning.callbacks.Timer", trainer_part=True)
    with pytest.raises(ConfigError, match="neither a callback nor a logger nor a strategy"):
        get_obj_from_str(WRITER, trainer_part=True)
    with pytest.raises(ConfigError, match="in no package"):
        get_obj_from_str("pytorch_lightning.cli.LightningCLI", trainer_part=True)


def test_words_that_repeat_what_a_file_holds_are_bounded(tmp_path: Path):
    wide = torch.zeros(1, 1).expand(1024, 16384)
    words = {f"w{n}": wide for n in range(20)}
    torch.save({"string_to_token": {}, "string_to_param": words}, tmp_path / "bomb.pt")
    assert (tmp_path / "bomb.pt").stat().st_size < 10_000
    with pytest.raises(EmbeddingFileError, match=r"bomb\.pt.*numbers in all"):
        read_embeddings(tmp_path / "bomb.pt")
    data = 4 * 1024 * 4096
    header = json.dumps(
        {f"w{n}": {"dtype": "F32", "shape": [1024, 4096], "data_offsets": [0, data]} for n in range(40)}
    )
    (tmp_path / "bomb.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(data))
    with pytest.raises(EmbeddingFileError, match=r"bomb\.safetensors.*numbers in all"):
        read_embeddings(tmp_path / "bomb.safetensors")


def test_a_damaged_stream_of_old_torch_is_named(tmp_path: Path):
    path = tmp_path / "old.pt"
    torch.save({"w": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    before, separator, after = content.rpartition(b"]q\x00X\n\x00\x00\x00")  # the list of storage keys
    if not separator:
        start = content.rindex(b"]q\x00X")
        before, after = content[:start], content[start + 4 :]
    end = after.index(b"a.")
    path.write_bytes(before + b"]q\x00]q\x01a." + after[end + 2 :])
    with pytest.raises(CheckpointError, match=r"old\.pt.*damaged"):
        open_checkpoint(path)


def test_a_converted_file_says_what_its_model_predicts(tmp_path: Path):
    save_file(
        {"model.diffusion_model.x": torch.zeros(2)}, tmp_path / "a.safetensors", {"prediction_type": "v_prediction"}
    )
    for name in ("b.ckpt", "c.safetensors"):
        convert(tmp_path / "a.safetensors", tmp_path / name)
        with open_checkpoint(tmp_path / name) as file:
            assert file.scalars["prediction_type"] == "v_prediction"
            assert set(file.tensors) == {"model.diffusion_model.x"}


def test_a_conversion_replaces_nothing(tmp_path: Path):
    save_file({"model.diffusion_model.x": torch.zeros(2)}, tmp_path / "a.safetensors")
    (tmp_path / "b.ckpt").write_text("mine")
    with pytest.raises(CheckpointError, match="already there"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.ckpt")
    assert (tmp_path / "b.ckpt").read_text() == "mine"


def test_weights_at_the_root_have_no_run_directory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Path, "is_file", lambda self: str(self) == "/model.safetensors")
    assert find_model_files("/model.safetensors").config is None


def test_eps_says_nothing_at_the_end_of_a_schedule_without_signal():
    model = SimpleNamespace(parameterization="v", alphas_cumprod=torch.tensor([0.9, 0.0]))
    adjust_model(model)
    with pytest.raises(ValueError, match="use v or x0"):
        adjust_model(model, parameterization="eps")


def test_pixels_are_clipped_as_the_model_says():
    model = SimpleNamespace(clip_denoised=True, alphas_cumprod=torch.tensor([0.9, 0.5]), num_timesteps=2)
    assert AncestralSampler(model).clip_denoised
    assert not AncestralSampler(model, clip_denoised=False).clip_denoised


def test_shards_without_end_are_refused():
    with pytest.raises(ValueError, match="more than 1,000,000 files"):
        expand_shards("http://h/{0..99}{0..99999}{0..999}.tar")


def test_nothing_is_encoded_for_no_picture(tmp_path: Path):
    config = tmp_path / "c.yaml"
    config.write_text("data: {params: {train: {target: x.Y}}}\n")
    words = ["--config", str(config), "--ckpt_path", "x", "--data", "train", "--out", str(tmp_path / "o")]
    for count in ("0", "-1"):
        with pytest.raises(ValueError, match="--count must be at least 1"):
            load("encode_latents").main([*words, "--count", count])


def test_what_a_terminal_would_act_upon_is_written_out(capsys: pytest.CaptureFixture[str]):
    def fail(argv: object) -> None:
        raise ValueError("it would call os\x1b]0;pwn\x07.system")

    with pytest.raises(SystemExit) as exit_info:
        run_command(fail, [])
    assert exit_info.value.code == BAD_INPUT
    assert capsys.readouterr().err == "error: it would call os\\u001b]0;pwn\\u0007.system\n"
    record = logging.LogRecord("x", logging.INFO, "", 0, "a\x1b[2J %s\nb", ("naïve – ü",), None)
    assert SafeFormatter("%(message)s").format(record) == "a\\u001b[2J naïve – ü\nb"
    assert shown("\x9b") == "\\u009b"
