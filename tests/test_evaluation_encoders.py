"""CLIP and DINO judges: published preprocessing and scores, local weight files in every layout, errors that help."""

from __future__ import annotations

import functools
import re
import shutil

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from evaluation import metrics
from evaluation.clip_eval import (
    CLIPEvaluator,
    ImageDirEvaluator,
    LDMCLIPEvaluator,
    architecture,
    build_clip,
    without_words,
)
from evaluation.clip_eval_weights import find_weights, from_hugging_face, read_clip_weights
from evaluation.dino import DINOEncoder, bare_dino, build_dino
from evaluation.image_dirs import concept_folders, load_folder, load_images
from evaluation.judges import judge_file, load_judge
from evaluation.scorer import load_scorer
from ldm.util import ConfigError
from tests.tiny_judges import tiny_clip, tiny_evaluator
from tests.tiny_models import text_model


def pictures(count: int, size: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, size, size + 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# -- scores --------------------------------------------------------------------------------------------------------


def test_similarities_as_published():
    evaluator, generated, training = tiny_evaluator(ImageDirEvaluator), pictures(4), pictures(3, seed=1)
    to_images, to_text = evaluator.evaluate(generated, training, "a photo of * on the moon")
    a, b = evaluator.get_image_features(generated), evaluator.get_image_features(training)
    text = evaluator.get_text_features("a photo of on the moon")
    assert to_images.item() == pytest.approx(np.mean(a.numpy() @ b.numpy().T), abs=1e-6)
    assert to_text.item() == pytest.approx(np.mean(a.numpy() @ text.numpy().T), abs=1e-6)
    torch.testing.assert_close(evaluator.img_to_img_similarity(training, generated), to_images)
    torch.testing.assert_close(evaluator.txt_to_img_similarity("a photo of on the moon", generated), to_text)
    lengths = evaluator.get_image_features(generated, norm=False).norm(dim=1)
    assert not torch.allclose(lengths, torch.ones(4))
    torch.testing.assert_close(evaluator.encode_image(generated).norm(dim=1), torch.ones(4))


def test_preprocessing_as_published():
    evaluator = tiny_evaluator()
    ours = evaluator.preprocess(pictures(2))
    assert ours.shape == (2, 3, 32, 32)
    mean, std = (torch.tensor(v)[:, None, None] for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    small = torch.nn.functional.interpolate((pictures(2) + 1) / 2, (32, 38), mode="bicubic")  # 40 x 48, no smoothing
    torch.testing.assert_close(ours, (small[..., 3:35] - mean) / std)
    smooth = CLIPEvaluator(model=tiny_clip(), antialias=True)
    assert not torch.allclose(smooth.preprocess(pictures(2)), ours)


def test_batches_do_not_matter():
    whole, parts = CLIPEvaluator(model=tiny_clip()), CLIPEvaluator(model=tiny_clip(), batch_size=2)
    torch.testing.assert_close(whole.encode_image(pictures(5)), parts.encode_image(pictures(5)))
    texts = ["a", "b c", "d"]
    torch.testing.assert_close(whole.encode_text(texts), parts.encode_text(texts))


def test_drawing_and_scoring_with_a_model():
    model = text_model()
    evaluator = tiny_evaluator(LDMCLIPEvaluator)
    drawn = evaluator.sample(model, "a photo", n_samples=3, n_steps=2)
    assert drawn.shape == (3, 3, 32, 32)
    assert drawn.abs().max() <= 1
    training = pictures(2, size=32)
    scores = evaluator.evaluate(model, training, "a photo of *", n_samples=2, n_steps=2)
    again = evaluator.evaluate(model, training, "a photo of *", n_samples=2, n_steps=2)
    assert scores == again
    assert all(score.ndim == 0 and -1 <= score <= 1 for score in scores)


def test_placeholders_are_left_out_of_the_text():
    assert without_words("a photo of * on the moon", ["*"]) == "a photo of on the moon"
    assert without_words("A <cat> in the style of @", ["<cat>", "@"]) == "A in the style of"
    assert without_words("plain", ["*"]) == "plain"


@pytest.mark.parametrize("shape", [(3, 8, 8), (0, 3, 8, 8), (1, 1, 8, 8)])
def test_what_are_no_pictures_is_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=re.escape(str(shape))):
        tiny_evaluator().encode_images(torch.zeros(shape))


# -- weights -------------------------------------------------------------------------------------------------------


def to_hugging_face(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names and shapes of a `CLIPModel` file, from open_clip's."""
    outer = {
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "logit_scale": "logit_scale",
    }
    parts = {
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
        "ln_final": "text_model.final_layer_norm",
        "visual.transformer.resblocks": "vision_model.encoder.layers",
        "transformer.resblocks": "text_model.encoder.layers",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
    }
    theirs = {"vision_model.embeddings.position_ids": torch.arange(5)[None]}
    for key, value in state.items():
        if key in outer:
            theirs[outer[key]] = value
        elif key in ("text_projection", "visual.proj"):
            theirs["text_projection.weight" if key[0] == "t" else "visual_projection.weight"] = value.T.contiguous()
        else:
            for ours, name in parts.items():
                key = key.replace(ours, name)
            for letter, part in zip("qkv", value.chunk(3), strict=True) if "in_proj_" in key else ():
                theirs[key.replace("attn.in_proj_", f"self_attn.{letter}_proj.")] = part.clone()
            if "in_proj_" not in key:
                theirs[key] = value
    return theirs


class Program(torch.nn.Module):
    """Something to script that holds CLIP's weights under their names, as OpenAI's files do."""

    def __init__(self) -> None:
        super().__init__()
        self.input_resolution = torch.nn.Parameter(torch.tensor(32.0))
        self.transformer = torch.nn.Linear(2, 2)
        self.logit_scale = torch.nn.Parameter(torch.ones([], dtype=torch.float16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.logit_scale


@pytest.mark.parametrize("layout", ["open_clip.safetensors", "open_clip.pt", "hugging_face.safetensors", "half.bin"])
def test_weight_files_of_every_layout(layout: str, tmp_path, monkeypatch: pytest.MonkeyPatch):
    model = tiny_clip(seed=3)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    if layout.startswith("hugging_face"):
        state = to_hugging_face(state)
    if layout.startswith("half"):
        model = model.half().float()
        state = {key: value.half() for key, value in state.items()}
    path = tmp_path / layout
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    monkeypatch.setattr(open_clip, "create_model", lambda name, load_weights: tiny_clip())
    loaded = build_clip("ViT-B/32", path)
    images, tokens = torch.randn(2, 3, 32, 32), open_clip.tokenize(["a cat", "two dogs"])
    torch.testing.assert_close(loaded.encode_image(images), model.encode_image(images))
    torch.testing.assert_close(loaded.encode_text(tokens), model.encode_text(tokens))
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_openai_programs_are_read_but_not_run(tmp_path):
    path = tmp_path / "ViT-B-32.pt"
    torch.jit.script(Program()).save(str(path))
    state = read_clip_weights(path)
    assert set(state) == {"transformer.weight", "transformer.bias", "logit_scale"}
    assert all(value.dtype == torch.float32 for value in state.values())


def test_a_missing_file_is_named(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"models/clip/ViT-B-32\.safetensors.*nothing is downloaded"):
        CLIPEvaluator()
    with pytest.raises(FileNotFoundError, match=r"models/dino/dino-vits16\.safetensors"):
        load_judge("dino-vits16")
    with pytest.raises(FileNotFoundError, match="looked for .*pytorch_model.bin"):
        find_weights("clip", "ViT-B/32", tmp_path)
    file = tmp_path / "models" / "clip" / "ViT-B-32.pt"
    file.parent.mkdir(parents=True)
    file.touch()
    assert find_weights("clip", "ViT-B-32") == file


def test_weights_of_another_model_are_refused(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(open_clip, "create_model", lambda name, load_weights: tiny_clip())
    state = {key: value.clone() for key, value in tiny_clip().state_dict().items()}
    save_file({**state, "more": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match="'more' is left over"):
        build_clip("ViT-B/32", tmp_path / "more.safetensors")
    del state["ln_final.bias"]
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match="'ln_final.bias' is missing"):
        build_clip("ViT-B/32", tmp_path / "less.safetensors")


def test_names_of_models():
    assert architecture("ViT-B/32") == "ViT-B-32-quickgelu"
    assert architecture("ViT-L/14@336px") == "ViT-L-14-336-quickgelu"
    assert architecture("ViT-H-14") == "ViT-H-14"
    with pytest.raises(ValueError, match="did you mean 'ViT-B/32'"):
        architecture("ViTB/32")
    with pytest.raises(ValueError, match="did you mean 'dino-vits16'"):
        load_judge("dino-vits-16")
    with pytest.raises(ValueError, match="not part of open_clip"):
        CLIPEvaluator(clip_model="ViT-B-16-SigLIP", model=tiny_clip())


def test_dino_features(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, depth=1))
    torch.manual_seed(0)
    model = bare_dino("dino-vits16").eval()
    encoder = DINOEncoder(model=model)
    images = pictures(2)
    assert encoder.preprocess(images).shape == (2, 3, 224, 224)
    class_token = model.forward_features(encoder.preprocess(images))[:, 0]
    torch.testing.assert_close(encoder.encode_image(images), metrics.unit(class_token))
    with pytest.raises(ValueError, match="pictures only"):
        encoder.encode_text(["a cat"])
    state = {f"backbone.{key}": value.clone() for key, value in bare_dino("dino-vits16").state_dict().items()}
    save_file({**state, "head.weight": torch.zeros(1)}, tmp_path / "dino.safetensors")
    loaded = build_dino("dino-vits16", tmp_path / "dino.safetensors")
    torch.testing.assert_close(loaded.cls_token, state["backbone.cls_token"])
    assert loaded.blocks[0].attn.num_heads == 6
    save_file({k: v for k, v in state.items() if "cls" not in k}, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match="'cls_token' is missing"):
        build_dino("dino-vits16", tmp_path / "less.safetensors")


@pytest.mark.parametrize("name", ["dino-vits16", "ViT-B/32"])
def test_weights_of_other_sizes_are_refused_in_one_line(name: str, tmp_path, monkeypatch: pytest.MonkeyPatch):
    small = torch.nn.Linear(2, 2)
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: small)
    monkeypatch.setattr(open_clip, "create_model", lambda *args, **kwargs: small)
    save_file({"weight": torch.zeros(3, 3), "bias": torch.zeros(2)}, tmp_path / "w.safetensors")
    build = build_dino if name.startswith("dino") else build_clip
    with pytest.raises(ValueError, match="w.safetensors does not fit.*size mismatch for weight") as caught:
        build(name, tmp_path / "w.safetensors")
    assert "\n" not in str(caught.value)


def test_dinov2_as_published(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, depth=1))
    model = bare_dino("dinov2-vits14")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    ramp = torch.linspace(0, 1, 37).reshape(1, 37, 1, 1).expand(1, 37, 37, 384)  # of 518 pixels
    state["pos_embed"] = torch.cat([torch.full((1, 1, 384), 5.0), ramp.reshape(1, -1, 384)], dim=1)
    save_file(state | {"mask_token": torch.zeros(1, 384)}, tmp_path / "dinov2.safetensors")
    positions = build_dino("dinov2-vits14", tmp_path / "dinov2.safetensors").pos_embed
    assert positions.shape == (1, 1 + 16 * 16, 384)
    assert torch.all(positions[:, 0] == 5)
    grid = positions[0, 1:, 0].reshape(16, 16)
    torch.testing.assert_close(grid[:, 3], torch.linspace(grid[0, 3], grid[-1, 3], 16), atol=0.02, rtol=0)


def test_judges_by_name():
    with pytest.raises(ValueError, match="no judge 'dino-vits61'.*did you mean 'dino-vits16'"):
        judge_file("dino-vits61")
    shipped = judge_file("emoji64")
    assert judge_file("emoji64", shipped) == judge_file("emoji64", shipped.parent) == shipped
    assert torch.equal(load_scorer(shipped).pieces, load_scorer().pieces)


def test_an_incomplete_file_of_hugging_face_is_named():
    state = {"text_model.encoder.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)}
    with pytest.raises(ConfigError, match="lacks k_proj of 'transformer.resblocks.0.attn.in_proj_weight'"):
        from_hugging_face(state)


def test_loading_clip_says_nothing_of_random_weights(tmp_path, caplog: pytest.LogCaptureFixture):
    model = open_clip.create_model("RN50", load_weights=False)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "clip.safetensors")
    caplog.clear()
    build_clip("RN50", tmp_path / "clip.safetensors")
    assert "randomly" not in caplog.text


# -- pictures ------------------------------------------------------------------------------------------------------


def test_folders_of_pictures(tmp_path):
    for name, shape in (("a", (4, 4)), ("b", (4, 4)), ("c", (6, 4))):
        Image.fromarray(np.full((*shape, 3), 255, np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    assert load_folder(tmp_path, count=2).shape == (2, 3, 4, 4)
    assert load_folder(tmp_path, size=8).shape == (3, 3, 8, 8)
    assert float(load_folder(tmp_path, size=8).min()) == 1.0
    with pytest.raises(ValueError, match="of 2 sizes"):
        load_folder(tmp_path)
    with pytest.raises(ValueError, match="no picture to load"):
        load_images([])
    assert concept_folders(tmp_path) == [tmp_path]
    (tmp_path / "empty").mkdir()
    assert concept_folders(tmp_path) == [tmp_path]
    several = tmp_path / "several"
    (several / "cat").mkdir(parents=True)
    shutil.copy(tmp_path / "a.png", several / "cat")
    assert concept_folders(several) == [several / "cat"]
    shutil.copy(tmp_path / "a.png", several)
    with pytest.raises(ValueError, match=r"holds pictures and folders of pictures \(cat\)"):
        concept_folders(several)
    assert concept_folders(several, ["cat"]) == [several / "cat"]
    with pytest.raises(FileNotFoundError, match="no concept 'dog'"):
        concept_folders(tmp_path, ["dog"])
    with pytest.raises(FileNotFoundError, match="is no folder"):
        concept_folders(tmp_path / "nowhere")
