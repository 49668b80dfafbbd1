"""Weighted and long prompts, on every text conditioner."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldm.generate import SamplingOptions, encode_prompts, sample_images
from ldm.generate_prompts import batches, chunk_counts
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.encoders.modules import BERTEmbedder, FrozenBertEmbedder, FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder
from ldm.modules.encoders.prompt import PromptOptions, Span, parse_weights, split_prompt
from ldm.modules.encoders.prompt import encode_prompts as encode
from tests.tiny_models import text_model
from tests.tiny_sd import sd_model

WEIGHTED, LONG = PromptOptions(weights=True), PromptOptions(long=True)
LONG_TEXT = "one red cat and two dogs, " * 30


@pytest.fixture(scope="module", params=["clip", "openclip", "bert", "minilm"])
def stage(request: pytest.FixtureRequest):
    torch.manual_seed(0)
    if request.param == "clip":
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        return FrozenCLIPEmbedder(text_config=sizes)
    if request.param == "openclip":
        return FrozenOpenCLIPEmbedder(text_config={"width": 16, "layers": 2, "heads": 2, "embed_dim": 16})
    if request.param == "minilm":
        return FrozenBertEmbedder(16, 1, 2, 16, zero_padding=True)
    return BERTEmbedder(n_embed=16, n_layer=1).eval()


# --- syntax ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "spans"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("", []),
        ("a (red:1.2) cat", [("a ", 1.0), ("red", 1.2), (" cat", 1.0)]),
        ("(red)", [("red", 1.1)]),
        ("[red]", [("red", 1 / 1.1)]),
        ("((red))", [("red", 1.1 * 1.1)]),
        ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 1.0), (" c", 0.5)]),
        ("(a: b : 1.5 )", [("a: b ", 1.5)]),
        ("(a:-1)", [("a", -1.0)]),
        ("(a:.5)", [("a", 0.5)]),
        (r"\(a:1.2\) \\ \[b\]", [(r"(a:1.2) \ [b]", 1.0)]),
        ("a:1.2) b] (c [d", [("a:1.2) b] (c [d", 1.0)]),
        ("(a]b)", [("a]b", 1.1)]),
        ("at 10:30) :)", [("at 10:30) :)", 1.0)]),
        ("()", []),
        ("(a:1)", [("a", 1.0)]),
    ],
)
def test_brackets(prompt: str, spans: list[tuple[str, float]]):
    parsed = parse_weights(prompt)
    assert [span.text for span in parsed] == [text for text, _ in spans]
    assert [span.weight for span in parsed] == pytest.approx([weight for _, weight in spans])


def test_a_placeholder_is_never_taken_apart():
    assert parse_weights("(my (cat) x:2) (a)", ["(cat)"]) == [Span("my (cat) x", 2.0), Span(" ", 1.0), Span("a", 1.1)]
    assert parse_weights("<a:1.2) (<a:1.2):3)", ["<a:1.2)"]) == [Span("<a:1.2) ", 1.0), Span("<a:1.2)", 3.0)]


HUGE = "9" * 400


@pytest.mark.parametrize(
    "prompt", ["(a:101)", "(a:-101)", f"(a:{HUGE})", f"((a:0):{HUGE})", "(" * 60 + "a" + ")" * 60], ids=range(5)
)
def test_senseless_weights_are_refused(prompt: str):
    with pytest.raises(ValueError, match="give one within"):
        parse_weights(prompt)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab ()[]:\\.12-*<>é🦄", max_size=40))
def test_any_text_parses_and_loses_only_brackets(text: str):
    try:
        spans = parse_weights(text, ["*"])
    except ValueError:
        return
    assert all(math.isfinite(span.weight) and span.text for span in spans)
    assert "".join(c for c in text if c in "ab*<>é🦄") == "".join(
        c for span in spans for c in span.text if c in "ab*<>é🦄"
    )


# --- weights --------------------------------------------------------------------------------------------------------


def test_without_brackets_nothing_changes(stage):
    texts = ["a photo of a cat", "", "the dog, at 10:30"]
    assert torch.equal(encode(stage, texts, WEIGHTED), stage.encode(texts))
    assert torch.equal(encode(stage, ["(a:1) photo"], WEIGHTED), stage.encode(["a photo"]))


def test_weights_scale_what_a_token_adds_to_the_empty_prompt(stage):
    plain, empty = stage.encode(["a red cat"]), stage.encode([""])
    weighted = encode(stage, ["a (red:1.5) cat"], WEIGHTED)
    assert torch.equal(weighted[0, [0, 1, 3, 4, 76]], plain[0, [0, 1, 3, 4, 76]])
    assert torch.allclose(weighted[0, 2], empty[0, 2] + 1.5 * (plain[0, 2] - empty[0, 2]), atol=1e-6)
    none = encode(stage, ["a (red:0) cat"], WEIGHTED)
    assert torch.allclose(none[0, 2], empty[0, 2], atol=1e-6)


def test_a_learned_words_weight_counts_for_all_its_vectors(stage):
    manager = EmbeddingManager(stage, ["<toy>"], num_vectors_per_token=3)
    with torch.no_grad():
        plain, empty = stage.encode(["a <toy> here"], manager), stage.encode([""], manager)
        weighted = encode(stage, ["a (<toy>:2) here"], WEIGHTED, manager)
    changed = (weighted != plain).any(-1)[0].nonzero().flatten().tolist()
    assert changed == [2, 3, 4]
    assert torch.allclose(weighted[0, 2:5], 2 * plain[0, 2:5] - empty[0, 2:5], atol=1e-5)


# --- length ---------------------------------------------------------------------------------------------------------


def test_short_prompts_are_one_chunk(stage):
    assert torch.equal(encode(stage, ["a cat", ""], LONG), stage.encode(["a cat", ""]))


def test_long_prompts_are_encoded_chunk_by_chunk(stage):
    ids = [token for chunk in split_prompt(stage, LONG_TEXT, LONG) for token in chunk.ids]
    assert ids == split_prompt(stage, LONG_TEXT, PromptOptions())[0].ids
    count = math.ceil(len(ids) / 75)
    assert count > 2
    context = encode(stage, [LONG_TEXT, "a cat"], LONG)
    assert context.shape == (2, 77 * count, 16)
    first = stage.tokenizer.decode(ids[:75])
    assert torch.allclose(context[0, :77], stage.encode([first])[0], atol=1e-5)
    assert torch.allclose(context[1, :77], stage.encode(["a cat"])[0], atol=1e-6)
    assert torch.allclose(context[1, 77:154], stage.encode([""])[0], atol=1e-6)


def test_a_learned_word_is_never_cut(stage):
    manager = EmbeddingManager(stage, ["<toy>"], num_vectors_per_token=4)
    chunks = split_prompt(stage, "cat " * 73 + "<toy> dog", LONG, manager)
    assert [len(chunk.ids) for chunk in chunks] == [73, 2]
    with torch.no_grad():
        context = encode(stage, ["cat " * 73 + "<toy> dog"], LONG, manager)
        assert torch.allclose(context[0, 77:], stage.encode(["<toy> dog"], manager)[0], atol=1e-5)


def test_other_conditioners_are_refused():
    with pytest.raises(ValueError, match="need one of our text encoders"):
        encode(torch.nn.Identity(), ["a"], LONG)


def test_batches_keep_order_and_never_mix_counts():
    counts = [1, 1, 1, 2, 2, 1]
    rows = list(batches(counts, 2))
    assert [i for part in rows for i in range(part.start, part.stop)] == list(range(6))
    assert all(len(set(counts[part])) == 1 and part.stop - part.start <= 2 for part in rows)


# --- pictures -------------------------------------------------------------------------------------------------------


def pictures(prompts: list[str], batch_size: int, **options) -> Tensor:
    how = SamplingOptions("dpm", steps=2, **options)
    images = sample_images(text_model(), prompts, seeds=[5] * len(prompts), options=how, batch_size=batch_size)
    return torch.from_numpy(images)


def test_a_picture_does_not_depend_on_the_prompts_beside_it():
    texts = ["a photo of a red circle", "a photo of " * 12, "a (blue:1.3) circle"]
    options = {"prompt_weights": True, "long_prompts": True, "negative_prompt": "a red circle " * 3}
    together = pictures(texts, 3, **options)
    for text, picture in zip(texts, together, strict=True):
        assert (pictures([text], 1, **options)[0].int() - picture.int()).abs().max() <= 1
    assert (together[2].int() - pictures(texts[2:], 1)[0].int()).abs().max() > 1


def test_guidance_needs_both_prompts_of_one_length():
    model = sd_model("sd1")
    options = SamplingOptions(long_prompts=True, negative_prompt=LONG_TEXT)
    cond, uncond = encode_prompts(model, ["a cat", LONG_TEXT * 2], options)
    assert cond.shape == uncond.shape
    counts = chunk_counts(model, ["a cat", LONG_TEXT * 2], options)
    assert cond.shape[1] == 77 * max(counts)
    assert counts[0] == chunk_counts(model, [LONG_TEXT], options)[0] < counts[1]
    assert encode_prompts(model, ["a"], SamplingOptions(scale=1.0, long_prompts=True))[1] is None
