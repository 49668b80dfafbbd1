"""Stable Diffusion weights between original files and diffusers folders; see test_interop.py for diffusers itself."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from ldm.checkpoint import CheckpointError, load_model_from_config, load_weights, read_state_dict, recognise
from ldm.checkpoint_folder_config import config_of_folder, folder_configs
from ldm.checkpoint_names import OPENCLIP
from ldm.convert import convert
from ldm.generate import find_model_files, load_model
from ldm.modules.embedding_io import EmbeddingFile, write_embeddings
from ldm.resources import config_path
from ldm.util import instantiate_from_config
from tests.checkpoint_files import assert_same
from tests.tiny_sd import KINDS, sd_config, sd_model, write_sd

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{kind: folder with config.yaml, model.ckpt and the diffusers folder made of them}."""
    made = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        (folder / "config.yaml").write_text(yaml.safe_dump({"model": sd_config(kind)}))
        write_sd(folder / "model.ckpt", kind)
        convert(folder / "model.ckpt", folder / "diffusers", config=folder / "config.yaml")
        made[kind] = folder
    return made


def weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What both layouts hold: no schedule, no block that is never run."""
    unused = (f"{OPENCLIP}transformer.resblocks.23.", f"{OPENCLIP}text_projection", f"{OPENCLIP}logit_scale")
    return {k: v for k, v in state.items() if "." in k and not k.startswith(unused) and "position_ids" not in k}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_weights_come_back_bit_by_bit(folders: dict[str, Path], tmp_path: Path, kind: str, suffix: str):
    before = read_state_dict(folders[kind] / "model.ckpt")
    back = convert(folders[kind] / "diffusers", tmp_path / f"back{suffix}")
    assert_same(read_state_dict(back), weights(before))
    assert_same(read_state_dict(folders[kind] / "diffusers"), weights(before))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_folder_loads_like_a_file(folders: dict[str, Path], kind: str, dtype: torch.dtype | None):
    """With its own configs and with the original one."""
    expected = sd_model(kind).eval()
    for config in (None, folders[kind] / "config.yaml"):
        model = load_model_from_config(config, folders[kind] / "diffusers", dtype=dtype)
        assert type(model) is type(expected)
        actual = weights(model.state_dict())
        assert_same(actual, {k: v.to(dtype or v.dtype) for k, v in weights(expected.state_dict()).items()})
        assert torch.equal(model.alphas_cumprod, expected.alphas_cumprod)
    if dtype is None:
        assert torch.equal(model.get_learned_conditioning(["a cat"]), expected.get_learned_conditioning(["a cat"]))


def test_the_config_of_a_folder_describes_the_same_model():
    for name in ("v1-inference", "v2-inference-v", "v1-inpainting-inference", "v2-inpainting-inference"):
        ours = yaml.safe_load(config_path(f"stable-diffusion/{name}.yaml").read_text())["model"]
        made = folder_configs(ours)
        assert made["unet"]["attention_head_dim"] == ([5, 10, 20, 20] if "v2" in name else 8)
        assert made["text_encoder"]["num_hidden_layers"] == (23 if "v2" in name else 12)
        assert made["scheduler"]["prediction_type"] == ("v_prediction" if name.endswith("v") else "epsilon")
        assert folder_configs(ours, size=768)["unet"]["sample_size"] == 96


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_configs_go_both_ways(tmp_path: Path, kind: str, parameterization: str):
    zero_snr = parameterization == "v"
    ours = sd_config(kind, parameterization=parameterization, zero_terminal_snr=zero_snr)
    for name, content in folder_configs(ours).items():
        (tmp_path / name).mkdir()
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (tmp_path / name / file).write_text(json.dumps(content))
    model, again = instantiate_from_config(ours), instantiate_from_config(config_of_folder(tmp_path))
    shapes = {k: v.shape for k, v in weights(model.state_dict()).items()}
    assert {k: v.shape for k, v in weights(again.state_dict()).items()} == shapes
    assert torch.equal(again.alphas_cumprod, model.alphas_cumprod)
    assert (again.parameterization, again.scale_factor, again.conditioning_key) == (
        parameterization,
        model.scale_factor,
        model.conditioning_key,
    )


def test_names_are_those_of_published_folders(folders: dict[str, Path]):
    unet = load_file(folders["sd1"] / "diffusers" / "unet" / "diffusion_pytorch_model.safetensors")
    vae = load_file(folders["sd1"] / "diffusers" / "vae" / "diffusion_pytorch_model.safetensors")
    text = load_file(folders["sd1"] / "diffusers" / "text_encoder" / "model.safetensors")
    assert {
        "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0.weight",
        "down_blocks.1.downsamplers.0.conv.weight",
        "up_blocks.0.upsamplers.0.conv.bias",
        "up_blocks.1.resnets.2.conv_shortcut.weight",
        "mid_block.attentions.0.proj_in.weight",
        "time_embedding.linear_2.bias",
    } <= set(unet)
    assert vae["encoder.mid_block.attentions.0.to_q.weight"].dim() == 2
    assert {"decoder.up_blocks.2.resnets.1.conv2.weight", "post_quant_conv.bias"} <= set(vae)
    assert "text_model.encoder.layers.1.self_attn.q_proj.weight" in text
    assert not any("position_ids" in name for name in text)
    index = json.loads((folders["sd1-inpainting"] / "diffusers" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionInpaintPipeline"


def test_averages_are_chosen_or_left_out(tmp_path: Path):
    state = {k: v.clone().contiguous() for k, v in sd_model("sd1").state_dict().items()}
    averages = {
        "model_ema." + k.removeprefix("model.").replace(".", ""): v + 1
        for k, v in state.items()
        if k.startswith("model.")
    }
    save_file(state | averages | {"model_ema.decay": torch.tensor(0.9)}, tmp_path / "full.safetensors")
    key = "model.diffusion_model.out.2.weight"
    for choice, expected in (("live", state[key]), ("ema", state[key] + 1), ("both", state[key])):
        back = read_state_dict(convert(tmp_path / "full.safetensors", tmp_path / f"{choice}.ckpt", weights=choice))
        assert torch.equal(back[key], expected)
        assert ("model_ema.decay" in back) == (choice == "both")
    half = read_state_dict(convert(tmp_path / "live.ckpt", tmp_path / "half.safetensors", dtype=torch.float16))
    assert half[key].dtype == torch.float16
    assert half["alphas_cumprod"].dtype == torch.float32
    with pytest.raises(CheckpointError, match="holds no averaged weights"):
        convert(tmp_path / "live.ckpt", tmp_path / "none.ckpt", weights="ema")
    with pytest.raises(CheckpointError, match="one set of weights"):
        convert(tmp_path / "full.safetensors", tmp_path / "folder", weights="both")


def test_older_folders_and_their_variants_are_read(folders: dict[str, Path], tmp_path: Path):
    """Pickles instead of safetensors, old names of the VAE's attention, parts of files, fp16 beside the rest."""
    source = folders["sd2"] / "diffusers"
    for part in ("unet", "vae", "text_encoder", "scheduler"):
        (tmp_path / part).mkdir()
        for file in (source / part).glob("*.json"):
            (tmp_path / part / file.name).write_text(file.read_text())
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    vae = load_file(source / "vae" / "diffusion_pytorch_model.safetensors")
    for now, then in old.items():
        vae = {k.replace(f"attentions.0.{now}.", f"attentions.0.{then}."): v for k, v in vae.items()}
    torch.save(vae, tmp_path / "vae" / "diffusion_pytorch_model.bin")
    text = load_file(source / "text_encoder" / "model.safetensors")
    text = {k.removeprefix("text_model."): v for k, v in text.items()}
    torch.save(
        text | {"embeddings.position_ids": torch.arange(77)[None]}, tmp_path / "text_encoder" / "pytorch_model.bin"
    )
    unet = load_file(source / "unet" / "diffusion_pytorch_model.safetensors")
    halves = [dict(sorted(unet.items())[i::2]) for i in (0, 1)]
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name, half in zip(names, halves, strict=True):
        save_file(half, tmp_path / "unet" / name)
    index = {"weight_map": {key: name for name, half in zip(names, halves, strict=True) for key in half}}
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    expected = read_state_dict(source)
    assert_same(read_state_dict(tmp_path), expected)
    with pytest.raises(CheckpointError, match="no weights of variant 'fp16'"):
        convert(tmp_path, tmp_path / "x.ckpt", variant="fp16")
    for value in ("../../secret.safetensors", ["a"], 5, None):
        index["weight_map"]["conv_in.bias"] = value  # type: ignore[assignment]
        (tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="does not list files beside it"):
            read_state_dict(tmp_path)


def copy_with(source: Path, target: Path, part: str, **changed: Any) -> Path:
    """A folder of links to `source` with keys of one JSON file changed."""
    for file in (path for path in source.rglob("*") if path.is_file()):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(file)
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    content = json.loads((target / part / name).read_text()) | changed
    (target / part / name).unlink()
    (target / part / name).write_text(json.dumps(content))
    return target


@pytest.mark.parametrize(
    ("part", "changed", "message"),
    [
        ("unet", {"addition_embed_type": "text_time"}, "addition_embed_type"),
        ("unet", {"in_channels": 5}, "5 channels"),
        ("unet", {"layers_per_block": [2, 1, 2]}, "different layers_per_block"),
        ("unet", {"block_out_channels": None}, "lack something or contradict"),
        ("unet", {"down_block_types": ["CrossAttnDownBlock2D"]}, "blocks of its UNet"),
        ("unet", {"norm_num_groups": 16}, "norm_num_groups = 16"),
        ("unet", {"layers_per_block": 10**9}, "which no such model has"),
        ("unet", {"block_out_channels": [32] * 99}, "which no such model has"),
        ("text_encoder", {"num_hidden_layers": 10**9}, "which no such model has"),
        ("unet", {"block_out_channels": [-32]}, "which no such model has"),
        ("vae", {"latent_channels": "four"}, "lack something or contradict"),
        ("vae", {"shift_factor": 0.1}, "shift_factor"),
        ("scheduler", {"prediction_type": "flow"}, "prediction_type is 'flow'"),
        ("scheduler", {"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'"),
    ],
)
def test_folders_of_other_models_are_refused(
    folders: dict[str, Path], tmp_path: Path, part: str, changed: dict[str, Any], message: str
):
    folder = copy_with(folders["sd1"] / "diffusers", tmp_path / "folder", part, **changed)
    with pytest.raises(CheckpointError, match=message):
        load_model_from_config(None, folder)


def test_broken_folders_are_refused(folders: dict[str, Path], tmp_path: Path):
    source = folders["sd1"] / "diffusers"
    folder = copy_with(source, tmp_path / "a", "unet")
    weight_file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weight_file)
    weight_file.unlink()
    with pytest.raises(CheckpointError, match="unet has no weights"):
        read_state_dict(folder)
    save_file(tensors | {"add_embedding.linear_1.weight": torch.zeros(2, 2)}, weight_file)
    with pytest.raises(CheckpointError, match="is no Stable Diffusion 1 or 2 model"):
        read_state_dict(folder)
    weight_file.write_bytes(weight_file.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="cut off"):
        read_state_dict(folder)
    (folder / "unet" / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="holds a list"):
        load_model_from_config(None, folder)
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="without unet/config.json"):
        read_state_dict(folder)


def test_commands_and_recognition_take_folders(folders: dict[str, Path], tmp_path: Path):
    folder = folders["sd1"] / "diffusers"
    assert find_model_files(folder).checkpoint == folder
    assert load_model(folder, device="cpu").image_size == 8
    assert "UNet (4 to 4 channels" in recognise(folder).sentence
    model = sd_model("sd1", seed=1)
    report = load_weights(model, folder)
    assert not report.missing
    assert not report.unexpected
    for target in (folder, tmp_path / "x.ckpt"):
        (tmp_path / "x.ckpt").touch()
        if target == folder:
            with pytest.raises(CheckpointError, match="already there"):
                convert(folders["sd1"] / "model.ckpt", target)


def command() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert_checkpoint", ROOT / "scripts" / "convert_checkpoint.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_converts(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source, config = folders["sd1"] / "model.ckpt", folders["sd1"] / "config.yaml"
    command().main([str(source), str(tmp_path / "half"), "--config", str(config), "--dtype", "float16", "--size", "64"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "half")
    assert json.loads((tmp_path / "half" / "unet" / "config.json").read_text())["sample_size"] == 16
    state = read_state_dict(tmp_path / "half")
    assert {v.dtype for v in state.values()} == {torch.float16}
    with pytest.raises(CheckpointError, match="no published config has"):
        command().main([str(source), str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


def test_a_file_of_words_is_no_model_to_convert(tmp_path: Path):
    write_embeddings(EmbeddingFile({"*": torch.ones(1, 8)}), tmp_path / "cat.pt")
    with pytest.raises(CheckpointError, match="cat.pt holds no weights of a model"):
        convert(tmp_path / "cat.pt", tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()
