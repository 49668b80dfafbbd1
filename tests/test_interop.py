"""The same numbers as diffusers and transformers, where they are installed: pip install -e ".[interop]"."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from ldm.checkpoint import load_model_from_config, read_state_dict
from ldm.convert import convert
from ldm.generate_words import load_words
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampler import Sampler
from ldm.modules.embedding_io import read_embeddings, write_embeddings
from ldm.modules.embedding_manager import EmbeddingManager
from tests.checkpoint_files import assert_same
from tests.conftest import assert_close
from tests.tiny_sd import CONTEXT, sd_config, sd_model, write_sd

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.interop

PROMPT = "a photo of a red cat, sitting on 3 books"
# By kind and options: noise prediction, v prediction, and v with a schedule that ends in pure noise.
VARIANTS = {
    "sd1": {},
    "sd2": {"parameterization": "v"},
    "sd2-zero-snr": {"parameterization": "v", "zero_terminal_snr": True},
    "sd1-inpainting": {},
}


def make(folder: Path, variant: str) -> SimpleNamespace:
    """Our model, its folder as `convert` writes it, and diffusers' pipeline that loads it."""
    kind = variant.removesuffix("-zero-snr")
    options = VARIANTS[variant]
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": sd_config(kind, **options)}))
    write_sd(folder / "model.safetensors", kind, **options)
    convert(folder / "model.safetensors", folder / "diffusers", config=folder / "config.yaml")
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder / "diffusers", local_files_only=True)
    return SimpleNamespace(folder=folder, kind=kind, ours=sd_model(kind, **options), pipe=pipe)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SimpleNamespace]:
    return {variant: make(tmp_path_factory.mktemp(variant), variant) for variant in VARIANTS}


def context(pair: SimpleNamespace, text: str) -> Tensor:
    """Text features as diffusers' pipeline makes them."""
    tokenizer = pair.pipe.tokenizer
    ids = tokenizer(text, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        return pair.pipe.text_encoder(ids)[0]


def concat(pair: SimpleNamespace, x: Tensor) -> Tensor:
    """What an inpainting UNet takes beside the noisy latent."""
    if not pair.kind.endswith("inpainting"):
        return x[:, :0]
    return torch.randn(1, 5, *x.shape[2:], generator=torch.Generator().manual_seed(3)).expand(len(x), -1, -1, -1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_unet_and_autoencoder_agree(pairs: dict[str, SimpleNamespace], variant: str):
    pair = pairs[variant]
    torch.manual_seed(0)
    x, text, t = torch.randn(2, 4, 8, 8), torch.randn(2, 77, CONTEXT), torch.tensor([5, 900])
    beside, picture = concat(pair, x), torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        cond = {"c_crossattn": [text], "c_concat": [beside]} if beside.shape[1] else text
        ours = pair.ours.apply_model(x, t, cond)
        assert_close(ours, pair.pipe.unet(torch.cat([x, beside], 1), t, text).sample, 1e-4, "UNet")
        posterior = pair.pipe.vae.encode(picture).latent_dist
        assert_close(pair.ours.first_stage_model.encode(picture).mean, posterior.mean, 1e-4, "encoder")
        assert_close(pair.ours.first_stage_model.encode(picture).std, posterior.std, 1e-4, "encoder")
        assert_close(pair.ours.first_stage_model.decode(x), pair.pipe.vae.decode(x).sample, 1e-4, "decoder")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("text", ["", PROMPT, "ünïcödé 🦄 " * 40])
def test_text_features_agree(pairs: dict[str, SimpleNamespace], variant: str, text: str):
    pair = pairs[variant]
    ours = pair.ours.get_learned_conditioning([text])
    assert_close(ours, context(pair, text), 1e-4)


SAMPLERS: dict[str, tuple[type[Sampler], dict[str, Any], str, dict[str, Any]]] = {
    "ddim": (DDIMSampler, {}, "DDIMScheduler", {}),
    "plms": (PLMSSampler, {}, "PNDMScheduler", {"skip_prk_steps": True}),
    "dpm": (
        DPMSolverSampler,
        {"spacing": "time_uniform"},
        "DPMSolverMultistepScheduler",
        {"timestep_spacing": "linspace", "final_sigmas_type": "sigma_min"},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_trajectories_agree(pairs: dict[str, SimpleNamespace], variant: str, name: str):
    """20 guided steps of diffusers' pipeline, its scheduler and its own loop, against our sampler."""
    if name == "plms" and VARIANTS[variant]:
        pytest.skip("for models of v, PNDM extrapolates v, and PLMS the noise as it does for all")
    if name == "dpm" and variant == "sd2-zero-snr":
        pytest.skip("where there is no signal, the scheduler puts in a little, and ours is exact")
    pair = pairs[variant]
    kind, options, theirs, their_options = SAMPLERS[name]
    scheduler = getattr(diffusers, theirs).from_config(pair.pipe.scheduler.config, **their_options)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    cond, uncond = context(pair, PROMPT), context(pair, "")
    scheduler.set_timesteps(20)
    latents = x * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            both = torch.cat([latents, latents])
            out = pair.pipe.unet(torch.cat([both, concat(pair, both)], 1), t, torch.cat([uncond, cond])).sample
            free, guided = out.chunk(2)
            latents = scheduler.step(free + 5.0 * (guided - free), t, latents).prev_sample
    beside = concat(pair, x)
    ours: Any = [pair.ours.get_learned_conditioning([text]) for text in (PROMPT, "")]
    if beside.shape[1]:
        ours = [{"c_crossattn": [text], "c_concat": [beside]} for text in ours]
    actual, _ = kind(pair.ours, **options).sample(
        20,
        1,
        (4, 8, 8),
        ours[0],
        unconditional_conditioning=ours[1],
        unconditional_guidance_scale=5.0,
        x_T=x,
        verbose=False,
    )
    assert_close(actual, latents, 1e-4)


def test_a_whole_picture_agrees(pairs: dict[str, SimpleNamespace]):
    """The pipeline itself, with its defaults, against prompt to picture here."""
    pair = pairs["sd1"]
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    pair.pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": 7.5, "eta": 0.0, "output_type": "pt"}
    theirs = pair.pipe(PROMPT, latents=x, height=32, width=32, **options).images
    cond, uncond = pair.ours.get_learned_conditioning([PROMPT, ""]).chunk(2)
    latent, _ = DDIMSampler(pair.ours).sample(
        10, 1, (4, 8, 8), cond, unconditional_conditioning=uncond, unconditional_guidance_scale=7.5, x_T=x
    )
    picture = (pair.ours.decode_first_stage(latent) / 2 + 0.5).clamp(0, 1)
    assert_close(picture, theirs, 1e-4)


def test_a_schedule_without_signal_at_the_end_agrees(pairs: dict[str, SimpleNamespace]):
    acp = pairs["sd2-zero-snr"].pipe.scheduler.alphas_cumprod
    assert acp[-1] == 0
    assert_close(pairs["sd2-zero-snr"].ours.alphas_cumprod, acp, 1e-6)


@pytest.mark.parametrize("variant", ["sd1", "sd2", "sd1-inpainting"])
def test_folders_that_diffusers_saves_are_read(pairs: dict[str, SimpleNamespace], tmp_path: Path, variant: str):
    pair = pairs[variant]
    for safe in (True, False):
        pair.pipe.save_pretrained(tmp_path / str(safe), safe_serialization=safe)
        assert_same(read_state_dict(tmp_path / str(safe)), read_state_dict(pair.folder / "diffusers"))
    model = load_model_from_config(None, tmp_path / "True")
    assert torch.equal(model.get_learned_conditioning([PROMPT]), pair.ours.get_learned_conditioning([PROMPT]))
    back = convert(tmp_path / "True", tmp_path / "back.safetensors")
    again = load_model_from_config(pair.folder / "config.yaml", back)
    x, t = torch.randn(1, pair.pipe.unet.config.in_channels, 8, 8), torch.tensor([7])
    with torch.no_grad():
        text = again.get_learned_conditioning([PROMPT])
        unet = again.model.diffusion_model(x, t, context=text)
        assert_close(unet, pair.pipe.unet(x, t, context(pair, PROMPT)).sample, 1e-4)


def trained_words(model: Any, vectors: int) -> EmbeddingManager:
    """A word after a few real steps of training on the text features."""
    manager = EmbeddingManager(model.cond_stage_model, ["<toy>"], ["cat"], num_vectors_per_token=vectors)
    optimizer = torch.optim.AdamW(manager.embedding_parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model.cond_stage_model.encode(["a <toy>"], embedding_manager=manager).square().sum().backward()
        optimizer.step()
    return manager


@pytest.mark.parametrize("variant", ["sd1", "sd2"])
@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("file", ["learned_embeds.safetensors", "learned_embeds.bin"])
def test_a_word_learned_here_means_the_same_there(tmp_path: Path, variant: str, vectors: int, file: str):
    pair = make(tmp_path, variant)
    manager = trained_words(pair.ours, vectors)
    manager.save(tmp_path / "embeddings.pt")
    write_embeddings(read_embeddings(tmp_path / "embeddings.pt"), tmp_path / file, "diffusers")
    pair.pipe.load_textual_inversion(tmp_path / file)
    prompt = "a painting of <toy> in the rain"
    theirs = context(pair, pair.pipe.maybe_convert_prompt(prompt, pair.pipe.tokenizer))
    ours = pair.ours.cond_stage_model.encode([prompt], embedding_manager=manager)
    plain = pair.ours.get_learned_conditioning([prompt.replace("<toy>", "cat")])
    assert (ours - plain).abs().max() > 0.1
    assert_close(ours, theirs, 1e-4)


@pytest.mark.parametrize("variant", ["sd1", "sd2"])
@pytest.mark.parametrize("vectors", [1, 3])
def test_a_word_learned_there_means_the_same_here(tmp_path: Path, variant: str, vectors: int):
    """As diffusers' training script keeps and saves it: new tokens, whose rows of the table are trained."""
    pair = make(tmp_path, variant)
    tokenizer, encoder = pair.pipe.tokenizer, pair.pipe.text_encoder
    names = ["<toy>", *(f"<toy>_{i}" for i in range(1, vectors))]
    tokenizer.add_tokens(names)
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ids = tokenizer.convert_tokens_to_ids(names)
    table = encoder.get_input_embeddings().weight
    learned = torch.randn(vectors, CONTEXT)
    with torch.no_grad():
        table[ids] = learned
    save_file({"<toy>": table[ids[0] : ids[-1] + 1].detach().clone()}, tmp_path / "learned_embeds.safetensors")
    load_words(pair.ours, [tmp_path])
    theirs = context(pair, f"a {' '.join(names)} on a table")
    assert_close(pair.ours.get_learned_conditioning(["a <toy> on a table"]), theirs, 1e-4)
