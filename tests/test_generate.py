"""From prompts to files: seeds, sizes, precision, metadata, names, learned words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ldm import generate as G
from ldm.generate_command import check_words
from ldm.generate_words import load_files, load_words, parse_renames, prompts_without_words
from ldm.modules.embedding_io import EmbeddingFile, write_embeddings
from tests.conftest import END_TO_END
from tests.tiny_models import text_config, text_model

PROMPTS = ["a photo of a cat", "a painting of a cat", "a photo of the cat"]
QUICK = G.SamplingOptions(sampler="dpm", steps=2, scale=3.0)


@pytest.fixture(scope="module")
def model():
    return text_model()


# -- sampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", G.SAMPLERS)
def test_same_seed_same_picture_whatever_the_batch(model, sampler):
    options = G.SamplingOptions(sampler=sampler, steps=2, eta=float(sampler == "ddim"), scale=3.0)
    whole = G.sample_images(model, PROMPTS, seeds=[5, 6, 7], options=options, batch_size=3)
    assert whole.shape == (3, 32, 32, 3)
    assert whole.dtype == np.uint8
    single = G.sample_images(model, PROMPTS[1:2], seeds=6, options=options)
    # levels may differ by one: arithmetic in a larger batch rounds differently
    assert np.abs(single[0].astype(int) - whole[1]).max() <= 1
    split = G.sample_images(model, PROMPTS, seeds=5, options=options, batch_size=2)
    assert np.abs(split.astype(int) - whole).max() <= 1
    assert np.abs(whole[0].astype(int) - whole[1]).max() > 1


def test_negative_prompt_and_scale_matter(model):
    def draw(**changes):
        options = G.SamplingOptions(**{"sampler": "dpm", "steps": 2, "scale": 4.0} | changes)
        return G.sample_images(model, PROMPTS[:1], options=options)

    plain = draw()
    assert not np.array_equal(plain, draw(negative_prompt="a dark photo"))
    assert not np.array_equal(plain, draw(scale=1.0))
    assert np.array_equal(draw(scale=1.0), draw(scale=1.0, negative_prompt="a dark photo"))


def test_encoded_conditioning_is_the_same_as_prompts(model):
    by_prompt = G.sample_images(model, PROMPTS, seeds=1, options=QUICK)
    cond, uncond = G.encode_prompts(model, PROMPTS, QUICK)
    encoded = G.sample_images(model, seeds=[1, 2, 3], options=QUICK, conditioning=cond, unconditional=uncond)
    by_function = G.sample_images(
        model, seeds=[1, 2, 3], options=QUICK, conditioning=lambda rows: (cond[rows], uncond[rows])
    )
    assert np.array_equal(by_prompt, encoded)
    assert np.array_equal(by_prompt, by_function)


def test_the_context_is_projected_once(model):
    calls = []
    layers = [m for name, m in model.model.named_modules() if name.endswith("attn2.to_k")]
    handles = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in layers]
    G.sample_images(model, PROMPTS[:2], options=G.SamplingOptions(steps=5, scale=3.0))
    for handle in handles:
        handle.remove()
    assert len(calls) == len(layers) > 0


def test_sizes(model):
    assert G.latent_shape(model) == (4, 8, 8)
    assert G.latent_shape(model, 64, 48) == (4, 16, 12)
    assert G.sample_images(model, PROMPTS[:1], options=G.SamplingOptions(steps=1, height=16, width=40)).shape == (
        1,
        16,
        40,
        3,
    )
    with pytest.raises(ValueError, match="height 20 is no multiple of 8 pixels; the nearest is 16"):
        G.latent_shape(model, 20)


@pytest.mark.parametrize("precision", ["autocast", "half"])
def test_low_precision_draws_nearly_the_same(model, precision):
    expected = G.sample_images(model, PROMPTS[:2], options=QUICK)
    low = text_model(dtype=G.weight_dtype(precision, torch.device("cpu")))
    found = G.sample_images(low, PROMPTS[:2], options=QUICK, precision=precision)
    assert np.abs(found.astype(int) - expected).mean() < 6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: G.SamplingOptions(sampler="euler"), "ddim, plms, dpm, ddpm"),
        (lambda m: G.SamplingOptions(steps=0), "at least 1"),
        (lambda m: G.sample_images(m, PROMPTS, seeds=[1]), "one seed for each"),
        (lambda m: G.sample_images(m, PROMPTS, batch_size=0), "batch_size"),
        (lambda m: G.sample_images(m, PROMPTS, precision="fp8"), "full, autocast, half"),
        (lambda m: G.select_device("gpu"), "auto, cpu"),
        (lambda m: G.select_device("cuda:99"), "not there"),
        (lambda m: G.find_model_files(None, "x.yaml"), "--ckpt_path"),
    ],
)
def test_bad_input_is_named(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


def test_device_auto_is_there():
    assert G.select_device("auto").type in ("cuda", "mps", "cpu")
    assert G.select_device("cpu") == torch.device("cpu")


# -- models --------------------------------------------------------------------------------------------------------


def test_finding_a_models_files(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "configs").mkdir()
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    last.touch()
    for time in ("2025-01-01T00-00-00", "2025-01-02T00-00-00"):
        (tmp_path / "run" / "configs" / f"{time}-project.yaml").touch()
    newest = tmp_path / "run" / "configs" / "2025-01-02T00-00-00-project.yaml"
    assert G.find_model_files(tmp_path / "run") == G.ModelFiles(last, newest)
    assert G.find_model_files(last) == G.ModelFiles(last, newest)
    (tmp_path / "model.ckpt").touch()
    assert G.find_model_files(tmp_path) == G.ModelFiles(tmp_path / "model.ckpt", None)
    (tmp_path / "config.yaml").touch()
    assert G.find_model_files(tmp_path).config == tmp_path / "config.yaml"
    assert G.find_model_files(tmp_path, newest).config == newest
    for path, message in ((tmp_path / "run" / "configs", "no weights in"), (tmp_path / "x.ckpt", "no checkpoint at")):
        with pytest.raises(FileNotFoundError, match=message):
            G.find_model_files(path)


# -- files ---------------------------------------------------------------------------------------------------------


def test_levels_are_rounded():
    x = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.5, 0.999, 1.0, float("nan")]).view(1, 1, 1, -1)
    assert G.to_uint8(x).ravel().tolist() == [0, 0, 0, 128, 191, 255, 255, 0]


def test_settings_survive_in_the_picture(tmp_path):
    settings = {"prompt": "a photo of <Käthe> * 🐈", "seed": 7, "scale": 5.0, "H": None, "rename": ["*=<a>"]}
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    path = G.save_png(image, tmp_path / "deep" / "er" / "x.png", settings)
    assert np.array_equal(np.asarray(Image.open(path)), image)
    assert G.read_settings(path) == settings
    Image.fromarray(image).save(tmp_path / "plain.png")
    with pytest.raises(ValueError, match="holds no settings"):
        G.read_settings(tmp_path / "plain.png")


def test_other_settings_do_not_overwrite(tmp_path):
    image = np.zeros((1, 4, 4, 3), dtype=np.uint8)
    base = {"prompt": "a cat", "seed": 3, "scale": 5.0}
    first = G.save_images(image, tmp_path, [base])
    assert [p.name for p in first] == ["a-cat_3.png"]
    assert G.save_images(image + 1, tmp_path, [base]) == first
    assert [p.name for p in G.save_images(image, tmp_path, [base | {"scale": 7.0}])] == ["a-cat_3-2.png"]
    assert len(list(tmp_path.iterdir())) == 2


@given(st.text(max_size=200))
def test_slugs_are_file_names_everywhere(text):
    name = G.slug(text)
    assert 0 < len(name) <= 81
    assert len(name.encode()) <= 160
    assert not set(name) & set('<>:"/\\|?*. \0\n\t')
    assert name.upper() not in {"CON", "PRN", "AUX", "NUL", "COM1", "LPT9"}
    assert G.slug(text) == name


def test_slugs_can_be_read():
    assert G.slug("A photo of *, in the <style-1>!") == "a-photo-of-in-the-style-1"
    assert G.slug("???") == "sample"
    assert G.slug("CON") == "con-"
    assert G.slug("\u732b" * 200) == "\u732b" * 53


def test_long_names_can_be_written(tmp_path):
    image = np.zeros((1, 4, 4, 3), dtype=np.uint8)
    (path,) = G.save_images(image, tmp_path, [{"prompt": "\U00020000" * 90, "seed": 123456789012}])
    assert path.is_file()
    long = tmp_path / ("\u732b" * 83 + ".png")  # 253 bytes
    assert G.save_png(image[0], long).is_file()
    assert len(list(tmp_path.iterdir())) == 2


def test_grid(tmp_path):
    images = np.stack([np.full((4, 6, 3), k * 10, dtype=np.uint8) for k in range(5)])
    grid = G.make_grid(images, columns=2, gap=1)
    assert grid.shape == (3 * 5 + 1, 2 * 7 + 1, 3)
    assert (grid[1:5, 8:14] == 10).all()
    assert (grid[11:15, 1:7] == 40).all()
    assert (grid[11:15, 8:14] == 255).all()
    assert Image.open(G.save_grid(images, tmp_path / "g.png", columns=2)).size == (2 * 8 + 2, 3 * 6 + 2)


def test_npz_is_written_as_it_comes(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    with G.open_npz(tmp_path / "a.npz", 5) as append:
        append(images[:3])
        append(images[3:])
    assert np.array_equal(np.load(tmp_path / "a.npz")["arr_0"], images)
    with pytest.raises(ValueError, match="was to hold 5 pictures, got 3"), G.open_npz(tmp_path / "b.npz", 5) as append:
        append(images[:3])
    assert not (tmp_path / "b.npz").exists()


# -- learned words -------------------------------------------------------------------------------------------------


def word_file(path: Path, names=("*",), seed=0, init_word="cat", count=1) -> Path:
    generator = torch.Generator().manual_seed(seed)
    vectors = {name: torch.randn(count, 64, generator=generator) for name in names}
    write_embeddings(EmbeddingFile(vectors, init_words=dict.fromkeys(names, init_word) if init_word else {}), path)
    return path


def test_words_change_the_picture(model, tmp_path):
    fresh = text_model()
    before = G.sample_images(fresh, ["a photo of *"], options=QUICK)
    load_words(fresh, [word_file(tmp_path / "a.pt")])
    after = G.sample_images(fresh, ["a photo of *"], options=QUICK)
    assert not np.array_equal(before, after)
    # at strength 0 the word is the one it started from
    load_words(fresh, [tmp_path / "a.pt"], strengths=[0.0])
    initial = G.sample_images(fresh, ["a photo of *"], options=QUICK)
    assert np.array_equal(initial, G.sample_images(fresh, ["a photo of cat"], options=QUICK))


def test_several_files_and_their_names(tmp_path, caplog):
    a, b = word_file(tmp_path / "a.pt"), word_file(tmp_path / "b.pt", seed=1)
    assert load_words(text_model(), [a, b], parse_renames(["*=<cat>", "*=<dog>"])) == ["<cat>", "<dog>"]
    assert not caplog.records
    assert load_words(text_model(), [a, b]) == ["*", "*2"]
    assert "written '*2'" in caplog.text
    assert load_words(text_model(), [a, b], [("*", "<cat>")]) == ["<cat>", "*"]
    model = text_model()
    load_words(model, [a, b], parse_renames(["*=<cat>", "*=<dog>"]), strengths=[1.0, 0.5])
    assert not torch.equal(
        model.get_learned_conditioning(["a photo of <cat>"]), model.get_learned_conditioning(["a photo of <dog>"])
    )


def test_bad_words_are_named(tmp_path):
    a = word_file(tmp_path / "a.pt")
    unknown_start = word_file(tmp_path / "b.pt", init_word=None)
    with pytest.raises(ValueError, match="no file has that word; there are '\\*'"):
        load_words(text_model(), [a], [("<x>", "<y>")])
    with pytest.raises(ValueError, match="2 strengths for 1"):
        load_words(text_model(), [a], strengths=[1.0, 0.5])
    with pytest.raises(ValueError, match="which word"):
        load_words(text_model(), [unknown_start], strengths=[0.5])
    with pytest.raises(ValueError, match="already|same name"):
        load_words(text_model(), [a, unknown_start], [("*", "<x>"), ("*", "<x>")])
    with pytest.raises(ValueError, match="OLD=NEW"):
        parse_renames(["<x>"])


@pytest.mark.parametrize(
    ("word", "pair"),
    [
        ("*=<cat>", ("*", "<cat>")),
        ("*=<a=b>", ("*", "<a=b>")),
        ("<a=b>=<c=d>", ("<a=b>", "<c=d>")),
        ("<a==", ("<a", "=")),
        ("==x", ("=", "x")),
        ("a=b=c", ("a", "b=c")),
    ],
)
def test_renames_are_parted_at_the_first_sign_that_works(word, pair):
    assert parse_renames([word]) == [pair]


@pytest.mark.parametrize("word", ["", "=", "a=", "=b", " = b", "=="])
def test_renames_without_two_words_are_refused(word):
    with pytest.raises(ValueError, match="OLD=NEW"):
        parse_renames([word])


def test_prompts_that_lack_the_words():
    assert prompts_without_words(["a *", "a cat", "<x> here"], ["*", "<x>"]) == ["a cat"]


def test_words_are_known_by_file(tmp_path):
    files = [word_file(tmp_path / "a.pt"), word_file(tmp_path / "b.pt", ["*", "<dog>"], seed=1)]
    assert load_files(text_model(), files) == [["*"], ["*2", "<dog>"]]


CAT, DOG = ("cat.pt", ["<cat>"]), ("dog.pt", ["<dog>", "<pup>"])


@pytest.mark.parametrize(
    ("prompts", "negative", "files", "warnings"),
    [
        (["a <cat>"], "", [CAT], []),
        (["a cat"], "<cat>, blurred", [CAT], []),  # a word to keep away from
        (["a cat", "a dog"], "<cat>", [CAT], []),
        (["a <dog>"], "<cat>", [CAT, DOG], []),
        (["a <cat>", "a <pup>"], "", [CAT, DOG], []),
        (["a <cat>"], "a pup", [CAT, DOG], ["dog.pt: none of its words occurs"]),
        (["a <cat>", "a cat"], "", [CAT], ["no learned word occurs in 'a cat'"]),
        (["a cat"], "dark", [CAT], ["cat.pt: none of its words occurs"]),
        (["a cat"], "dark", [CAT, DOG], ["cat.pt: none of its words occurs", "dog.pt: none of its words occurs"]),
        (["a cat"], "", [], []),
    ],
)
def test_words_that_nothing_makes_use_of_are_named(prompts, negative, files, warnings, caplog):
    check_words(prompts, [word for _, words in files for word in words], negative, files)
    assert len(caplog.messages) == len(warnings)
    assert all(message.startswith(start) for message, start in zip(caplog.messages, warnings, strict=True))


def test_reference_model_is_what_the_config_says():
    config = json.loads((END_TO_END / "run_1vec.json").read_text())["config"]
    assert text_config()["model"]["target"] == config["target"]
