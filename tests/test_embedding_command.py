"""scripts/embedding.py and the arithmetic of learned words."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from ldm.checkpoint import save_safetensors
from ldm.modules.embedding_io import EmbeddingFile, EmbeddingFileError, identify, read_embeddings, write_embeddings
from ldm.modules.embedding_io_maths import cancel_out, combine, interpolate, pick, with_length

ROOT = Path(__file__).parents[1]
SD = torch.randn(2, 768, generator=torch.Generator().manual_seed(0))


def run(*words: object) -> None:
    spec = importlib.util.spec_from_file_location("embedding", ROOT / "scripts" / "embedding.py")
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(word) for word in words])


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with cat.pt, dog.pt, both.pt (SD 1) and bert.pt (LDM)."""
    cat = EmbeddingFile({"*": SD[:1]}, {"*": 265}, init_words={"*": "cat"}, info={"step": 500})
    write_embeddings(cat, tmp_path / "cat.pt")
    write_embeddings(EmbeddingFile({"<dog>": SD[1:]}), tmp_path / "dog.pt")
    write_embeddings(EmbeddingFile({"<a>": SD, "<b c>": -SD}, active={"<a>": 1}), tmp_path / "both.pt")
    write_embeddings(EmbeddingFile({"*": torch.ones(1, 1280)}), tmp_path / "bert.pt")
    return tmp_path


# --- arithmetic -----------------------------------------------------------------------------------------------------


def test_interpolation_reaches_both_ends():
    a, b = SD[:1], SD[1:]
    for mode in ("linear", "spherical"):
        assert torch.allclose(interpolate(a, b, 0.0, mode), a, atol=1e-5)
        assert torch.allclose(interpolate(a, b, 1.0, mode), b, atol=1e-5)
        assert torch.allclose(interpolate(a, a, 0.3, mode), a, atol=1e-5)
        assert torch.allclose(interpolate(a, 2 * a, 0.5, mode), 1.5 * a, atol=1e-5)
    assert torch.allclose(interpolate(a, b, 0.5), (a + b) / 2, atol=1e-6)
    assert interpolate(a, -a, 0.5, "spherical").isfinite().all()
    assert interpolate(a, torch.zeros_like(a), 0.5, "spherical").isfinite().all()


def test_spherical_interpolation_turns_evenly():
    a, b = torch.eye(2, 8)[:1] * 2, torch.eye(2, 8)[1:] * 4
    for t in (0.25, 0.5, 0.8):
        c = interpolate(a, b, t, "spherical")
        assert math.isclose(float(c.norm()), 2 + 2 * t, rel_tol=1e-5)
        assert math.isclose(math.atan2(float(c[0, 1]), float(c[0, 0])), t * math.pi / 2, rel_tol=1e-5)


def test_sums_and_lengths():
    one, two = SD[:1], SD
    assert torch.allclose(combine([(1.0, two), (-0.5, one)]), two - 0.5 * one)
    assert torch.allclose(with_length(3 * two, one).norm(dim=1), one.norm().expand(2))
    with pytest.raises(EmbeddingFileError, match="2 and 3 vectors"):
        combine([(1.0, two), (1.0, torch.zeros(3, 768))])
    with pytest.raises(EmbeddingFileError, match=r"different models .*\[768, 1024\]"):
        combine([(1.0, two), (1.0, torch.zeros(1, 1024))])
    with pytest.raises(EmbeddingFileError, match="nothing to add"):
        combine([])
    with pytest.raises(EmbeddingFileError, match="mode 'cubic' is unknown"):
        interpolate(one, one, 0.5, "cubic")


def test_pick_takes_the_vectors_in_use():
    words = EmbeddingFile({"a": SD, "b": SD}, active={"a": 1})
    assert torch.equal(pick(words, "a")[1], SD[:1])
    with pytest.raises(EmbeddingFileError, match="say which word"):
        pick(words)
    with pytest.raises(EmbeddingFileError, match="has no word 'c', only 'a', 'b'"):
        pick(words, "c")


# --- the command ----------------------------------------------------------------------------------------------------


def test_inspect_says_what_is_in_a_file(files: Path, capsys: pytest.CaptureFixture[str]):
    run("inspect", files / "cat.pt", files / "both.pt", files / "bert.pt")
    text = capsys.readouterr().out
    assert "cat.pt: textual inversion's embeddings.pt, for Stable Diffusion 1.x (CLIP)" in text
    assert "'*': 1 vector of length" in text
    assert "id 265; started from 'cat'" in text
    assert "step = 500" in text
    assert "'<a>': 2 vectors of lengths" in text
    assert "1 in use" in text
    assert "LDM (BERT)" in text
    run("inspect", "--json", files / "cat.pt")
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["format"], found["width"], found["words"][0]["token_id"]) == ("original", 768, 265)


@pytest.mark.parametrize(
    ("target", "asked", "format"),
    [
        ("x.pt", None, "original"),
        ("x.png", None, "a1111-png"),
        ("x.bin", None, "diffusers"),
        ("x.safetensors", None, "kohya"),
        ("x.safetensors", "comfyui", "kohya"),
        ("x.safetensors", "diffusers", "diffusers"),
        ("x.safetensors", "invokeai", "diffusers"),
        ("x.safetensors", "onetrainer", "onetrainer"),
        ("x.pt", "automatic1111", "a1111"),
    ],
)
def test_convert_writes_the_format_asked_for(files: Path, target: str, asked: str | None, format: str):
    run("convert", files / "cat.pt", files / target, "--rename", "*=<x>", *(["--format", asked] if asked else []))
    name, words = identify(files / target)
    assert name == format
    assert list(words.vectors) == ["<x>"]
    assert torch.equal(words.vectors["<x>"], SD[:1])


def test_convert_makes_one_file_for_each_word(files: Path):
    run("convert", files / "both.pt", f"{files}/words/", "--format", "diffusers")
    found = sorted((files / "words").iterdir())
    assert [path.name for path in found] == ["a.safetensors", "b-c.safetensors"]
    assert torch.equal(read_embeddings(found[0]).vectors["<a>"], SD[:1])
    alike = EmbeddingFile({"<a>": SD[:1], "a!": SD[1:]})
    write_embeddings(alike, files / "alike.pt")
    run("convert", files / "alike.pt", f"{files}/alike/", "--format", "diffusers")
    back = {path.name: list(read_embeddings(path).vectors) for path in (files / "alike").iterdir()}
    assert back == {"a.safetensors": ["<a>"], "a-2.safetensors": ["a!"]}
    run("convert", files / "both.pt", files / "b.png", "--word", "<b c>")
    assert torch.equal(read_embeddings(files / "b.png").vectors["<b c>"], -SD)


def test_words_that_diffusers_refuses_are_told(files: Path, caplog: pytest.LogCaptureFixture):
    """It takes no word that CLIP's vocabulary has under just that name: "statue" is there at the end of words only."""
    target = files / "x.safetensors"
    run("convert", files / "cat.pt", target, "--format", "diffusers")
    assert list(read_embeddings(target).vectors) == ["*"]
    (message,) = caplog.messages
    assert "x.safetensors: diffusers refuses the word '*'" in message
    assert message.endswith('convert --rename "*=<x>"')
    for word, told in (("cat", True), ("<|endoftext|>", True), ("<cat>", False), ("statue", False), ("Cat", False)):
        caplog.clear()
        run("convert", files / "cat.pt", target, "--format", "diffusers", "--rename", f"*={word}")
        assert [f'"{word}=<{word}>"' in message for message in caplog.messages] == [True] * told
    caplog.clear()
    run("convert", files / "cat.pt", target)  # programs that go by the file's name
    assert not caplog.messages


def test_renamed_words_do_not_keep_the_token_id(files: Path):
    for word, token_id in (("<cat>", {}), ("dog", {"dog": 1929})):
        run("convert", files / "cat.pt", files / "x.pt", "--rename", f"*={word}")
        assert read_embeddings(files / "x.pt").token_ids == token_id


def test_a_picture_takes_the_files_name_for_a_word_without_letters(files: Path, capsys: pytest.CaptureFixture[str]):
    run("convert", files / "cat.pt", files / "tabby.png")
    assert "tabby.png: 'tabby'" in capsys.readouterr().out
    assert list(read_embeddings(files / "tabby.png").vectors) == ["tabby"]
    run("convert", files / "dog.pt", files / "x.png")
    assert list(read_embeddings(files / "x.png").vectors) == ["<dog>"]
    for _ in range(2):  # what is there already is written again
        run("convert", files / "cat.pt", f"{files}/words/", "--format", "a1111-png")
    (found,) = (files / "words").iterdir()
    assert (found.name, list(read_embeddings(found).vectors)) == ("cat.png", ["cat"])


def test_inspect_writes_no_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    metadata = {"\x1b[31mkey": "v\nsecond line = fake", "note": "\x9b2J\u202ecafé", "placeholder": "\x1b]0;word\x07"}
    save_file({"emb_params": SD[:1]}, tmp_path / "a\x1b.safetensors", metadata=metadata)
    run("inspect", tmp_path / "a\x1b.safetensors")
    text = capsys.readouterr().out
    assert all(line.isprintable() for line in text.splitlines())
    assert "  \\u001b[31mkey = v\\nsecond line = fake\n" in text
    assert "  note = \\u009b2J\\u202ecafé\n" in text
    assert "a\\u001b.safetensors: kohya" in text
    run("inspect", "--json", tmp_path / "a\x1b.safetensors")
    text = capsys.readouterr().out
    assert all(line.isprintable() for line in text.split("\n"))
    (found,) = json.loads(text)
    assert found["info"] == {k: v for k, v in metadata.items() if k != "placeholder"}
    assert found["words"][0]["word"] == metadata["placeholder"]


def test_words_without_letters_are_named_by_their_file_and_replace_none(files: Path, capsys):
    write_embeddings(EmbeddingFile({"*": SD[1:]}), files / "mug.pt")
    out = files / "words"
    for source in ("cat.pt", "mug.pt", "cat.pt"):  # what is there already is written again
        run("convert", files / source, f"{out}/", "--format", "diffusers")
    assert sorted(path.name for path in out.iterdir()) == ["cat.safetensors", "mug.safetensors"]
    assert torch.equal(read_embeddings(out / "cat.safetensors").vectors["*"], SD[:1])
    (files / "other").mkdir()
    write_embeddings(EmbeddingFile({"*": -SD[:1]}), files / "other" / "cat.pt")
    capsys.readouterr()
    run("convert", files / "other" / "cat.pt", f"{out}/", "--format", "diffusers")
    assert "cat-2.safetensors: '*'" in capsys.readouterr().out
    assert torch.equal(read_embeddings(out / "cat.safetensors").vectors["*"], SD[:1])
    assert torch.equal(read_embeddings(out / "cat-2.safetensors").vectors["*"], -SD[:1])


def test_files_in_a_folder_of_words_are_kept(files: Path):
    """A file with further words, of another format, or of no words at all is not what convert would write."""
    write_embeddings(EmbeddingFile({"<a>": SD}, active={"<a>": 1}), files / "one.pt")
    before = {path: path.read_bytes() for path in files.iterdir()}
    (files / "a.pt").write_bytes(b"mine")
    run("convert", files / "one.pt", files)
    run("convert", files / "one.pt", files)
    write_embeddings(EmbeddingFile({"<both>": SD[:1]}), files / "single.pt")
    run("convert", files / "single.pt", files)
    run("convert", files / "single.pt", files, "--format", "a1111")
    assert (files / "a.pt").read_bytes() == b"mine"
    assert {path: path.read_bytes() for path in before} == before
    new = {path.name for path in files.iterdir()} - {path.name for path in before}
    assert new == {"a.pt", "a-2.pt", "single.pt", "both-2.pt", "both-3.pt"}
    assert torch.equal(pick(read_embeddings(files / "a-2.pt"))[1], SD[:1])


def test_negative_numbers_may_have_exponents(files: Path):
    run("interpolate", files / "cat.pt", files / "dog.pt", "--at", "-1e-1", "-2.5E0", "-.5", "--mode", "linear", "-o",
        files / "i.pt")  # fmt: skip
    assert list(read_embeddings(files / "i.pt").vectors) == ["*--0.1", "*--2.5", "*--0.5"]
    run("arithmetic", "--term", "-1e-1", files / "cat.pt", "--term", "-5", files / "dog.pt", "-o", files / "x.pt")
    expected = -0.1 * SD[:1] - 5 * SD[1:]
    assert torch.allclose(read_embeddings(files / "x.pt").vectors["*"], expected, atol=1e-5)


def test_merge_names_the_file_that_was_typed(files: Path):
    with pytest.raises(ValueError, match=r"m\.bin: merge writes several words to a \.pt file") as error:
        run("merge", files / "cat.pt", files / "dog.pt", "-o", files / "m.bin")
    assert "--output_path" not in str(error.value)


@pytest.mark.parametrize("weights", [(1, -1, 0), (0, 0, 0), (0.1, 0.2, -0.3)])
def test_a_sum_of_nothing_has_no_length_to_keep(files: Path, weights: tuple[float, ...]):
    terms = [part for weight in weights for part in ("--term", weight, files / "cat.pt")]
    with pytest.raises(ValueError, match="the terms cancel out"):
        run("arithmetic", *terms, "--keep_length", "-o", files / "x.pt")
    assert not (files / "x.pt").exists()
    small = [(1e-7, SD[:1])]
    assert not cancel_out(small, combine(small))


def test_words_of_other_models_are_refused(files: Path):
    with pytest.raises(EmbeddingFileError, match=r"for LDM \(BERT\).*for Stable Diffusion alone"):
        run("convert", files / "bert.pt", files / "x.bin")
    with pytest.raises(EmbeddingFileError, match="one file for each"):
        run("convert", files / "both.pt", files / "x.bin")
    with pytest.raises(EmbeddingFileError, match="different models"):
        run("interpolate", files / "cat.pt", files / "bert.pt", "-o", files / "x.pt")
    with pytest.raises(EmbeddingFileError, match="different models cannot be merged"):
        run("merge", files / "cat.pt", files / "bert.pt", "-o", files / "x.pt")
    with pytest.raises(ValueError, match=r"both.pt: it holds '<a>', '<b c>': say which word; write FILE::WORD"):
        run("interpolate", files / "cat.pt", files / "both.pt", "-o", files / "x.pt")
    assert not (files / "x.pt").exists()


def test_merge_joins_files(files: Path):
    run("merge", files / "cat.pt", files / "dog.pt", "--output", files / "all.pt", "--rename", "*=<cat>")
    assert list(read_embeddings(files / "all.pt").vectors) == ["<cat>", "<dog>"]


def test_interpolate_writes_words_between(files: Path):
    run("interpolate", files / "cat.pt", files / "dog.pt", "--at", 0.25, 0.75, "--mode", "linear", "-o", files / "i.pt")
    words = read_embeddings(files / "i.pt")
    assert list(words.vectors) == ["*-0.25", "*-0.75"]
    assert torch.allclose(words.vectors["*-0.25"], 0.75 * SD[:1] + 0.25 * SD[1:], atol=1e-6)
    run("interpolate", files / "cat.pt", f"{files}/both.pt::<a>", "-o", files / "j.bin", "--name", "<mix>")
    assert torch.allclose(read_embeddings(files / "j.bin").vectors["<mix>"], SD[:1], atol=1e-5)


def test_arithmetic_adds_words_and_vocabulary(files: Path):
    table = torch.randn(49408, 768, generator=torch.Generator().manual_seed(1))
    key = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    save_safetensors({key: table}, files / "model.safetensors")
    terms = ["--term", 1, files / "cat.pt", "--term", -0.5, "::cat", "--term", 1, "::photograph of a cat"]
    run("arithmetic", *terms, "--base", files / "model.safetensors", "-o", files / "x.pt")
    from ldm.modules.encoders.clip_tokenizer import CLIPTokenizer

    ids = CLIPTokenizer(pad_token_id=0).encode("photograph of a cat")
    expected = SD[:1] - 0.5 * table[2368] + table[ids].mean(0)
    assert torch.allclose(read_embeddings(files / "x.pt").vectors["*"], expected, atol=1e-5)
    assert read_embeddings(files / "x.pt").token_ids == {"*": 265}
    run("arithmetic", *terms[:3], "--term", 3, files / "dog.pt", "--keep_length", "-o", files / "y.pt")
    assert torch.allclose(read_embeddings(files / "y.pt").vectors["*"].norm(), SD[0].norm())
    with pytest.raises(ValueError, match="name the model's weights with --base"):
        run("arithmetic", *terms, "-o", files / "z.pt")
    with pytest.raises(ValueError, match="the weight comes first"):
        run("arithmetic", "--term", files / "cat.pt", 1, "-o", files / "z.pt")
    save_safetensors({"model.diffusion_model.x": table[:2]}, files / "unet.safetensors")
    with pytest.raises(ValueError, match="has no text encoder"):
        run("arithmetic", *terms, "--base", files / "unet.safetensors", "-o", files / "z.pt")


def test_arithmetic_with_the_vocabulary_of_the_model_that_comes_along(files: Path):
    write_embeddings(EmbeddingFile({"*": torch.ones(1, 384)}), files / "mini.pt")
    folder = ROOT / "models" / "ldm" / "emoji64"
    terms = ["--term", 1, files / "mini.pt", "--term", 2, "::crown"]
    run("arithmetic", *terms, "--base", folder, "-o", files / "x.pt")
    from ldm.checkpoint import open_checkpoint
    from ldm.modules.encoders.bert import WordPieceTokenizer

    (token,) = WordPieceTokenizer().encode("crown")
    with open_checkpoint(folder / "model.safetensors") as file:
        crown = file.read("cond_stage_model.embeddings.word_embeddings.weight")[token].float()
    assert torch.allclose(read_embeddings(files / "x.pt").vectors["*"], 1 + 2 * crown[None], atol=1e-6)
