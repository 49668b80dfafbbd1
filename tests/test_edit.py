"""New pictures from a picture: strength, masks, inversion, learned words, the command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import merge_embeddings
from ldm.generate import SAMPLERS, SamplingOptions, latent_shape, sample_images
from ldm.generate_edit import Edit, encode_picture, fitting_size, iter_edits, read_pictures
from ldm.generate_files import read_settings
from ldm.generate_words import load_words, parse_renames
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.modules.embedding_io import EmbeddingFile, write_embeddings
from ldm.util import instantiate_from_config
from scripts import img2img, txt2img
from tests.conftest import END_TO_END
from tests.meta_models import load_config, without_files
from tests.test_generate import word_file
from tests.tiny_models import TEXT_WEIGHTS, text_config, text_model

OPTIONS = SamplingOptions(steps=4, scale=2.0)


@pytest.fixture(scope="module")
def square(tmp_path_factory) -> Path:
    """One of the reference pictures, 32 x 32 pixels."""
    path = tmp_path_factory.mktemp("picture") / "square.png"
    Image.open(END_TO_END / "images" / "0.png").convert("RGB").resize((32, 32)).save(path)
    return path


@pytest.fixture(scope="module")
def model():
    return text_model()


@pytest.fixture(scope="module")
def picture(model, square: Path) -> torch.Tensor:
    return read_pictures(square, None, model, OPTIONS)[0]


def edits(model, picture, prompts=("a photo of a cat",), seeds=None, options=OPTIONS, **how) -> torch.Tensor:
    seeds = list(range(len(prompts))) if seeds is None else seeds
    return torch.cat(list(iter_edits(model, picture, prompts, seeds=seeds, options=options, **how)))


def test_strength_0_gives_the_picture_as_the_first_stage_sees_it(model, picture):
    expected = model.decode_first_stage(encode_picture(model, picture))
    assert torch.equal(edits(model, picture, edit=Edit(0.0)), expected.float())


@pytest.mark.parametrize(("strength", "calls"), [(0.0, 0), (0.25, 1), (0.75, 3), (1.0, 4)])
def test_strength_is_the_share_of_steps_that_are_drawn(model, picture, monkeypatch, strength, calls):
    seen, apply = [], model.apply_model
    monkeypatch.setattr(model, "apply_model", lambda x, t, cond: (seen.append(int(t[0])), apply(x, t, cond))[1])
    edits(model, picture, edit=Edit(strength))
    assert len(seen) == calls
    assert seen == sorted(seen, reverse=True)


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm"])
def test_the_chain_is_the_published_one(model, picture, sampler):
    """Noised to level int(strength S) of the chain, then denoised from there."""
    options = SamplingOptions(sampler=sampler, steps=4, scale=1.0)
    drawn = edits(model, picture, options=options, edit=Edit(0.5), seeds=[7])
    chain = SAMPLERS[sampler](model)
    chain.make_schedule(4)
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(7))[None]
    alpha = chain.current_grid().alphas[2]
    x = alpha.sqrt().float() * encode_picture(model, picture) + (1 - alpha).sqrt().float() * noise
    latents = chain.decode(x, model.get_learned_conditioning(["a photo of a cat"]), 2)
    with torch.no_grad():
        assert torch.allclose(drawn, model.decode_first_stage(latents), atol=1e-6)


def test_a_seed_is_the_same_picture_in_any_batch(model, picture):
    prompts = ["a photo of a cat", "a painting", "a photo"]
    whole = edits(model, picture, prompts, seeds=[3, 4, 5])
    single = edits(model, picture, prompts[1:2], seeds=[4])
    assert torch.allclose(single[0], whole[1], atol=1e-4)
    assert not torch.allclose(edits(model, picture, prompts[1:2], seeds=[9])[0], whole[1], atol=1e-2)


def test_outside_the_mask_every_pixel_stays(model, picture):
    mask = torch.zeros(1, 32, 32)
    mask[:, 8:20, 4:30] = 1
    made = edits(model, picture, ["a photo of a cat", "a painting"], edit=Edit(1.0), mask=mask)
    outside = mask.expand_as(made) == 0
    assert torch.equal(made[outside], picture.expand_as(made)[outside])
    assert float((made - picture)[~outside].abs().mean()) > 0.1
    assert not torch.allclose(made[0], made[1], atol=1e-2)


def test_what_lies_outside_the_mask_guides_what_is_drawn_inside(model, picture):
    mask = torch.zeros(1, 32, 32)
    mask[:, 8:20, 8:20] = 1
    other = -picture
    inside = mask.expand(1, 3, 32, 32) == 1
    one, two = (edits(model, p, edit=Edit(1.0), mask=mask, seeds=[1])[inside] for p in (picture, other))
    assert not torch.allclose(one, two, atol=1e-3)


def test_inversion_starts_from_the_noise_of_the_picture(model, picture):
    """How exactly the chain is inverted is test_samplers' matter; here: which chain, with which texts."""
    options = SamplingOptions(steps=4, scale=3.0)
    shown = Edit(0.5, source_prompt="a photo of a cat")
    made = edits(model, picture, ["a dark painting"], edit=shown, options=options)
    chain = DDIMSampler(model)
    chain.make_schedule(4)
    texts = ("a photo of a cat", "a dark painting", "")
    source, target, empty = (model.get_learned_conditioning([text]) for text in texts)
    x, _ = chain.encode(encode_picture(model, picture), source, 2)
    latents = chain.decode(x, target, 2, unconditional_guidance_scale=3.0, unconditional_conditioning=empty)
    with torch.no_grad():
        assert torch.allclose(made, model.decode_first_stage(latents), atol=1e-6)
    assert torch.equal(made, edits(model, picture, ["a dark painting"], edit=shown, options=options, seeds=[99]))


def test_sizes_follow_the_picture_or_the_flags(model, tmp_path: Path):
    def size(**options: int) -> tuple[int, ...]:
        picture, mask = read_pictures(tmp_path / "wide.png", tmp_path / "mask.png", model, SamplingOptions(**options))
        assert mask is not None
        assert mask.shape[1:] == picture.shape[1:]
        assert 0.2 < mask.mean() < 0.3
        return tuple(picture.shape)

    Image.new("RGB", (300, 200), "red").save(tmp_path / "wide.png")
    mask = Image.new("L", (150, 100), 0)
    mask.paste(255, (0, 0, 75, 50))
    mask.save(tmp_path / "mask.png")
    assert size() == (3, 32, 48)
    assert size(width=40, height=16) == (3, 16, 40)
    with pytest.raises(ValueError, match="width 42 is no multiple of 8"):
        size(width=42)
    with pytest.raises(
        ValueError, match="4 x 20000000 pixels at the model's size .* 32 x 160000000 pixels are too many"
    ):
        fitting_size(model, 4, 20_000_000, SamplingOptions())


@pytest.mark.parametrize(("fold", "latent"), [(1, (4, 16, 32)), (2, (16, 8, 16))])
def test_pictures_of_the_embedded_model_keep_its_size(fold: int, latent: tuple[int, int, int]):
    """A first stage that folds the latent makes it smaller once more, which counts as pixels too."""
    config = without_files(load_config("configs/finetune.yaml")["model"])
    params = config["params"]
    params |= {"channels": 4 * fold**2, "image_size": 16 // fold}
    params["first_stage_config"]["params"]["fold"] = fold
    params["unet_config"]["params"] |= {"in_channels": 4 * fold**2, "out_channels": 4 * fold**2}
    with torch.device("meta"):
        embedded = instantiate_from_config(config)
    assert latent_shape(embedded, 64, 128) == latent
    assert fitting_size(embedded, 300, 300, SamplingOptions()) == (64, 64)
    assert fitting_size(embedded, 300, 150, SamplingOptions()) == (128, 64)


def test_masks_must_fit_and_show_something(model, square: Path, tmp_path: Path):
    Image.new("L", (64, 64), 0).save(tmp_path / "black.png")
    with pytest.raises(ValueError, match="black everywhere"):
        read_pictures(square, tmp_path / "black.png", model, OPTIONS)
    Image.new("L", (64, 32), 255).save(tmp_path / "wide.png")
    with pytest.raises(ValueError, match="64 x 32 pixels, its picture 32 x 32"):
        read_pictures(square, tmp_path / "wide.png", model, OPTIONS)


def test_wrong_options_are_refused(model, picture):
    with pytest.raises(ValueError, match="between 0 and 1, got 1.5"):
        Edit(1.5)
    for other in (SamplingOptions("dpm"), SamplingOptions("plms"), SamplingOptions(eta=0.5)):
        with pytest.raises(ValueError, match="only the sampler ddim"):
            edits(model, picture, options=other, edit=Edit(1.0, "a cat"))
    with pytest.raises(ValueError, match="strength 0.2 of 4 steps is less than one, so nothing would be drawn"):
        edits(model, picture, edit=Edit(0.2))
    with pytest.raises(ValueError, match="1 seeds for 2 prompts"):
        edits(model, picture, ["a", "b"], seeds=[1])


# -- compositions --------------------------------------------------------------------------------------------------


def test_two_words_in_one_prompt_from_two_files_or_a_merged_one(model, tmp_path: Path):
    """Both words change the picture; merging the files first changes nothing."""

    def draw(*files: Path, renames: tuple[str, ...] = ()) -> np.ndarray:
        load_words(model, files, parse_renames(renames))
        options = SamplingOptions(sampler="dpm", steps=2, scale=2.0)
        return sample_images(model, ["a photo of <cat> with the <mug>"], seeds=[1], options=options)[0].astype(int)

    try:
        cat, mug, other = (tmp_path / f"{name}.pt" for name in ("cat", "mug", "other"))
        for seed, file in enumerate((cat, mug, other)):
            vectors = torch.randn(seed + 1, 64, generator=torch.Generator().manual_seed(seed))
            write_embeddings(EmbeddingFile({"*": vectors}), file)
        names = ("*=<cat>", "*=<mug>")
        both = draw(cat, mug, renames=names)
        assert np.abs(both - draw(other, mug, renames=names)).max() > 1
        assert np.abs(both - draw(cat, other, renames=names)).max() > 1
        merge_embeddings.main(["--manager_ckpts", str(cat), str(mug), "--output_path", str(tmp_path / "both.pt"),
                               "--rename", *names])  # fmt: skip
        assert np.array_equal(draw(tmp_path / "both.pt"), both)
    finally:
        model.embedding_manager = None


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "config.yaml").write_text(yaml.safe_dump(text_config()))
    (folder / "model.safetensors").symlink_to(TEXT_WEIGHTS)
    return folder


def call(folder: Path, square: Path, *words: object) -> None:
    common = ["--ckpt_path", folder, "--device", "cpu", "--init-img", square, "--steps", 4]
    img2img.main([str(word) for word in (*common, *words)])


def test_a_learned_word_inside_a_mask(folder: Path, square: Path, tmp_path: Path):
    mask = np.zeros((32, 32), np.uint8)
    mask[8:24, 8:24] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    words = ["--embedding_path", word_file(tmp_path / "cat.pt"), "--rename", "*=<cat>", "--word_strength", 0.9]
    call(
        folder,
        square,
        *words,
        "--mask",
        tmp_path / "mask.png",
        "--prompt",
        "a photo of <cat>",
        "--outdir",
        tmp_path / "out",
    )
    files = sorted((tmp_path / "out" / "samples").iterdir())
    assert [file.name for file in files] == ["a-photo-of-cat_42.png", "a-photo-of-cat_43.png"]
    before = np.asarray(Image.open(square))
    one, two = (np.asarray(Image.open(file)) for file in files)
    assert np.array_equal(one[mask == 0], before[mask == 0])
    assert not np.array_equal(one[mask == 255], two[mask == 255])
    settings = read_settings(files[0])
    assert settings["img_strength"] == 1.0
    assert settings["mask"].endswith("mask.png")
    assert (tmp_path / "out" / "a-photo-of-cat_42-grid.png").is_file()


def test_a_picture_is_repeated_from_its_file(folder: Path, square: Path, tmp_path: Path):
    words = ["--embedding_path", word_file(tmp_path / "cat.pt"), "--word_strength", 0.5, "--seed", 7]
    how = ["--strength", 0.5, "--parameterization", "v", "--n_samples", 1]
    call(folder, square, *words, *how, "--prompt", "a photo of *", "--outdir", tmp_path / "a")
    first = tmp_path / "a" / "samples" / "a-photo-of_7.png"
    img2img.main(["--from-image", str(first), "--device", "cpu", "--outdir", str(tmp_path / "b")])
    again = tmp_path / "b" / "samples" / first.name
    assert np.array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(first)))
    assert read_settings(again) == read_settings(first)
    args = img2img.parse_args(["--from-image", str(first), "--strength", "0.25"])
    assert (args.img_strength, args.parameterization, args.strength) == (0.25, "v", [0.5])
    with pytest.raises(ValueError, match=r"was not made by txt2img\.py: its settings lack strength"):
        txt2img.parse_args(["--from-image", str(first)])


def test_options_of_the_model_change_the_picture(folder: Path, square: Path, tmp_path: Path):
    call(folder, square, "--prompt", "a cat", "--n_samples", 1, "--outdir", tmp_path / "a")
    options = ["--parameterization", "x0", "--zero_terminal_snr"]
    call(folder, square, "--prompt", "a cat", "--n_samples", 1, "--outdir", tmp_path / "b", *options)
    one, two = (np.asarray(Image.open(tmp_path / run / "samples" / "a-cat_42.png")).astype(int) for run in "ab")
    assert np.abs(one - two).max() > 1
    with pytest.raises(ValueError, match="clip_skip is for Stable Diffusion's text models"):
        call(folder, square, "--prompt", "a cat", "--clip_skip", 2)


def test_stressed_words(folder: Path, square: Path, tmp_path: Path):
    prompt = ["--prompt", "a (dark:1.6) photo", "--n_samples", 1]
    call(folder, square, *prompt, "--outdir", tmp_path / "a")
    call(folder, square, *prompt, "--prompt_weights", "--outdir", tmp_path / "b")
    one, two = (np.asarray(Image.open(next((tmp_path / run / "samples").iterdir()))).astype(int) for run in "ab")
    assert np.abs(one - two).max() > 1


def test_strength_by_default(square: Path):
    common = ["--init-img", str(square)]
    assert img2img.parse_args(common).img_strength == 0.75
    assert img2img.parse_args([*common, "--invert", "a cat"]).img_strength == 1.0
    assert img2img.parse_args([*common, "--mask", str(square), "--strength", "0.3"]).img_strength == 0.3
    published = {"ddim_steps": 50, "n_samples": 2, "n_iter": 1, "scale": 5.0, "ddim_eta": 0.0, "seed": 42}
    args = img2img.parse_args([*common, "--C", "4", "--f", "8", "--fixed_code", "--plms", "--n_rows", "3"])
    assert {name: getattr(args, name) for name in published} == published
    assert args.sampler == "plms"
    assert not args.fixed_code
    with pytest.raises(ValueError, match="name the picture to start from with --init-img"):
        img2img.parse_args(["--prompt", "x"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "x", "--mask", "nowhere.png"], "no picture at nowhere.png"),
        (["--prompt", "x", "--strength", "2"], "between 0 and 1"),
        (["--prompt", "x", "--steps", "1", "--ckpt_path", "none.ckpt"], "strength 0.75 of 1 step is less than one"),
        (["--prompt", "x", "--invert", "a", "--plms", "--ckpt_path", "none.ckpt"], "only the sampler ddim with eta 0"),
        (["--prompt", "x", "--invert", "a \udcff"], r"--invert 'a \\udcff' holds bytes that are no UTF-8"),
        (["--prompt", "x", "--rename", "*=y"], "needs --embedding_path"),
        ([], "say what to draw"),
        (["--prompt", "x", "--n_samples", "0"], "--n_samples must be at least 1"),
    ],
)
def test_bad_input(folder: Path, square: Path, words: list[str], message: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call(folder, square, *words)
    assert not list(tmp_path.iterdir())


def test_inversion_says_that_seeds_do_not_matter(folder: Path, square: Path, tmp_path: Path, caplog):
    call(folder, square, "--prompt", "a painting", "--invert", "a photo of a cat", "--outdir", tmp_path, "--skip_grid")
    assert "the pictures of a prompt will be the same" in caplog.text
    one, two = (np.asarray(Image.open(file)) for file in sorted((tmp_path / "samples").iterdir()))
    assert np.abs(one.astype(int) - two).max() <= 1
