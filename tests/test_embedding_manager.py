"""Pseudo-word vectors: reference numbers, expansion, initial words, files, and what the training code relies on."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from ldm.modules.embedding_io import EmbeddingFile, read_embeddings, write_embeddings
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.embedding_manager_vectors import NamedVectors
from ldm.modules.encoders.modules import BERTEmbedder, FrozenBertEmbedder, FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder
from tests.conftest import END_TO_END, assert_close

VOCAB = END_TO_END / "vocab.txt"  # 36 words; "*" is 5, "@" 6, "sculpture" 7, "painting" 8, "cat" 9


class WordTable:
    """The text encoder of the reference case: a table and a few words, no end token."""

    max_length = 9
    end_token_id: int | None = None

    def __init__(self, table, words):
        self.table, self.words = table, words
        self.vocab_size, self.embedding_dim = table.shape

    def tokenize(self, texts, placeholders=None):
        raise NotImplementedError

    def encode(self, texts, embedding_manager=None):
        raise NotImplementedError

    def word_ids(self, word):
        return [self.words[word]]

    def id_to_word(self, token_id):
        return next((w for w, i in self.words.items() if i == token_id), "?")

    def embed(self, token_ids):
        return self.table[token_ids]


def bert(max_seq_len=16) -> BERTEmbedder:
    torch.manual_seed(0)
    model = BERTEmbedder(n_embed=16, n_layer=1, vocab_size=36, max_seq_len=max_seq_len, vocab_file=VOCAB).eval()
    nn.init.normal_(model.transformer.token_emb.weight)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def encoder() -> BERTEmbedder:
    return bert()


def row(encoder, word):
    return encoder.token_table().weight[encoder.word_ids(word)]


# --- reference numbers ----------------------------------------------------------------------------------------------

SINGLE_CASES = (
    "single",
    "single_two_placeholders",
    "three",
    "two_placeholders_2vec",
    "two_placeholders_2vec_reversed",
    "three_long",
)


def reference_manager(case, name, **changes):
    meta = case.meta["cases"]
    options = {**meta.get(name, meta["three"]), **changes}
    manager = EmbeddingManager(WordTable(case["in.token_table"], meta["words"]), **options)
    for placeholder in manager.placeholders:
        source = name if f"{name}.param.{placeholder}" in case.tensors else "three"
        if f"{name}.initial.{placeholder}" in case.tensors:
            assert_close(manager.string_to_param_dict[placeholder], case[f"{name}.initial.{placeholder}"])
        manager.string_to_param_dict[placeholder] = case[f"{source}.param.{placeholder}"]
    return manager


@pytest.mark.parametrize("name", SINGLE_CASES)
def test_manager_meets_reference(golden, name):
    case = golden("embedding_manager")
    manager = reference_manager(case, name)
    tokens = case["in.tokens"]
    embedded = case["in.token_table"][tokens]
    before = tokens.clone(), embedded.clone()
    assert_close(manager(tokens, embedded), case[f"{name}.out"])
    assert torch.equal(tokens, before[0])
    assert torch.equal(embedded, before[1])
    assert_close(manager.expand(tokens), case[f"{name}.tokens_after"])
    assert_close(manager.get_embedding_norms_squared(), case[f"{name}.norms_squared"])
    assert list(manager.placeholders.values()) == case[f"{name}.placeholder_ids"].tolist()
    published = case[f"{name}.coarse_loss"]
    assert_close(manager.embedding_to_coarse_loss(), published.trace())
    if len(published) == 1:
        assert_close(manager.embedding_to_coarse_loss(), published.mean())


@pytest.mark.parametrize("counter", [0, 1998, 1999, 2000, 3998, 3999, 9999])
def test_progressive_words_meet_reference(golden, counter):
    """The published counter is one ahead of the step when it is read."""
    case = golden("embedding_manager")
    name = f"progressive_c{counter}"
    manager = reference_manager(case, name, progressive_words=True)
    manager.set_global_step(counter + 1)
    tokens = case["in.tokens"]
    assert_close(manager(tokens, case["in.token_table"][tokens]), case[f"{name}.out"])
    assert_close(manager.expand(tokens), case[f"{name}.tokens_after"])


def test_state_dict_has_the_published_keys(golden):
    case = golden("embedding_manager")
    words = WordTable(case["in.token_table"], case.meta["cases"]["words"])
    manager = EmbeddingManager(words, ["*", "@"], ["sculpture"], num_vectors_per_token=2)
    published = case.meta["cases"]["state_dict_keys_init_word_for_first_only"]
    shapes = {k: list(v.shape) for k, v in manager.state_dict().items()}
    assert set(shapes) == set(published)
    assert shapes["string_to_param_dict.@"] == [2, 6]  # the published code draws 1280 numbers whatever the width


def clip_encoder(case):
    model = FrozenCLIPEmbedder(text_config=case.meta["init"]["text_config"])
    model.load_state_dict(case.sd, strict=False)
    with torch.no_grad():
        model.token_table().weight[case["in.token_rows"]] = case["in.token_embedding_rows"]
    return model


@pytest.mark.parametrize("name", ["one", "three", "two_ph"])
def test_manager_on_clip_meets_reference(golden, name):
    case = golden("clip_manager")
    encoder, options = clip_encoder(case), case.meta["init"]["managers"]
    options = {**options["one"], "num_vectors_per_token": 3} if name == "three" else options[name]
    manager = EmbeddingManager(encoder, **options, published_clip_init=True)
    for placeholder in manager.placeholders:
        assert_close(manager.string_to_param_dict[placeholder], case[f"{name}.initial.{placeholder}"])
        assert_close(manager.initial_embeddings[placeholder], case[f"{name}.initial.{placeholder}"])
        manager.string_to_param_dict[placeholder] = case[f"{name}.param.{placeholder}"]
    assert {k: v for k, v in case.meta["single_ids"].items() if k in manager.placeholders} == manager.placeholders
    prompts = case.meta["prompts"]
    assert torch.equal(encoder.tokenize(prompts, manager.placeholders), case["in.input_ids"])
    out = encoder.encode(prompts, embedding_manager=manager)
    assert_close(out, case[f"{name}.out"])
    (out * case["in.cotangent"]).sum().backward()
    for placeholder in manager.placeholders:
        assert_close(manager.string_to_param_dict[placeholder].grad, case[f"{name}.grad.{placeholder}"])


def test_plain_clip_start_is_the_token_row(golden):
    case = golden("clip_manager")
    encoder = clip_encoder(case)
    manager = EmbeddingManager(encoder, ["*"], ["sculpture"])
    assert torch.equal(manager.string_to_param_dict["*"], row(encoder, "sculpture"))


# --- starting vectors -----------------------------------------------------------------------------------------------


def test_vectors_start_from_the_word(encoder):
    manager = EmbeddingManager(encoder, ["*", "@"], ["cat"], num_vectors_per_token=3)
    assert torch.equal(manager.string_to_param_dict["*"], row(encoder, "cat").expand(3, -1))
    assert "@" not in manager.initial_embeddings


def test_random_start_has_the_tables_scale_and_repeats(encoder):
    count = encoder.max_length - 1
    wide = EmbeddingManager(encoder, ["*", "@"], num_vectors_per_token=count).string_to_param_dict
    scale = encoder.token_table().weight.std()
    assert abs(wide["*"].std() / scale - 1) < 0.2
    again = EmbeddingManager(encoder, ["@", "*"], num_vectors_per_token=count).string_to_param_dict
    assert torch.equal(wide["*"], again["*"])
    assert not torch.equal(wide["*"], wide["@"])
    other = EmbeddingManager(encoder, ["*"], num_vectors_per_token=count, seed=1).string_to_param_dict
    assert not torch.equal(wide["*"], other["*"])
    with pytest.raises(ValueError, match="a prompt has room for"):
        EmbeddingManager(encoder, ["*"], num_vectors_per_token=count + 1)


def test_initial_words_of_several_tokens(encoder, caplog):
    cat, photo = row(encoder, "cat"), row(encoder, "photo")
    with caplog.at_level(logging.WARNING):
        mean = EmbeddingManager(encoder, ["*"], ["cat photo"])
    assert "2 tokens" in caplog.text
    assert_close(mean.string_to_param_dict["*"], (cat + photo) / 2)
    each = EmbeddingManager(encoder, ["*"], ["cat photo"], multi_token_init="vectors")
    assert torch.equal(each.string_to_param_dict["*"], torch.cat([cat, photo]))
    three = EmbeddingManager(encoder, ["*"], ["cat photo"], num_vectors_per_token=3)
    assert torch.equal(three.string_to_param_dict["*"], torch.cat([cat, photo, photo]))


def test_initialize_follows_loaded_weights():
    encoder = bert()
    manager = EmbeddingManager(encoder, ["*", "@"], ["cat"], num_vectors_per_token=2)
    parameter = manager.string_to_param_dict["*"]
    nn.init.normal_(encoder.token_table().weight)
    manager.initialize()
    assert torch.equal(manager.string_to_param_dict["*"], row(encoder, "cat").expand(2, -1))
    assert torch.equal(manager.initial_embeddings["*"], manager.string_to_param_dict["*"])
    assert manager.string_to_param_dict["*"] is parameter
    with torch.device("meta"):
        late = EmbeddingManager(model := bert(), ["*"], ["cat"])
    model.load_state_dict(encoder.state_dict(), assign=True)
    late.initialize()
    assert torch.equal(late.string_to_param_dict["*"], row(encoder, "cat"))
    assert list(late.embedding_parameters())[0] is late.string_to_param_dict["*"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initializer_words": ["zebra"]}, "'zebra' is not in the text encoder's vocabulary"),
        ({"initializer_words": [" "]}, "vocabulary"),
        ({"initializer_words": ["cat", "photo"]}, "2 initializer_words for only 1"),
        ({"placeholder_strings": ["*", "*"]}, "already a placeholder"),
        ({"placeholder_strings": [" "]}, "visible"),
        ({"num_vectors_per_token": 0}, "at least 1"),
        ({"multi_token_init": "sum"}, "'sum'"),
        ({"published_clip_init": True}, "BERTEmbedder"),
    ],
)
def test_wrong_options_are_named(encoder, options, message):
    with pytest.raises(ValueError, match=message):
        EmbeddingManager(encoder, **{"placeholder_strings": ["*"], **options})


# --- placeholders ---------------------------------------------------------------------------------------------------


def test_one_token_placeholders_keep_their_id_others_get_new_ones(encoder):
    manager = EmbeddingManager(encoder, ["*", "<my-cat>", "zebra", "CAT", "cat"])
    assert manager.placeholders == {"*": 5, "<my-cat>": 36, "zebra": 37, "CAT": 9, "cat": 38}


@pytest.mark.parametrize("name", ["*", "<my-cat>", "sks", "a.b", "keys", "training", "%2E", "🦄", "my cat", "weight"])
def test_any_string_works_as_placeholder(encoder, tmp_path, name):
    manager = EmbeddingManager(encoder, [name], ["cat"])
    vector = torch.full((1, 16), 0.5)
    manager.string_to_param_dict[name] = vector
    with_cat = bert()
    with torch.no_grad():
        with_cat.token_table().weight[9] = 0.5
    assert_close(encoder.encode([f"a photo of {name} one"], manager), with_cat.encode(["a photo of cat one"]))
    other = EmbeddingManager(encoder, [name])
    other.load_state_dict(manager.state_dict(), strict=False)
    assert torch.equal(other.string_to_param_dict[name], vector)
    manager.save(tmp_path / "embeddings.pt")
    fresh = EmbeddingManager(encoder)
    assert fresh.load(tmp_path / "embeddings.pt") == [name]
    assert torch.equal(fresh.string_to_param_dict[name], vector)
    assert fresh.placeholders == manager.placeholders


def test_ordinary_names_are_the_state_dicts_keys(encoder):
    keys = EmbeddingManager(encoder, ["*", "<a>", "keys", "100%"], ["cat"]).state_dict()
    assert list(keys) == [f"string_to_param_dict.{n}" for n in ("*", "<a>", "keys", "100%")] + ["initial_embeddings.*"]


def test_per_image_tokens_are_22_more_placeholders(encoder):
    manager = EmbeddingManager(encoder, ["*"], ["cat"], per_image_tokens=True)
    assert len(manager.placeholders) == 23
    letter = list(manager.placeholders)[1]
    changed = encoder.encode([f"a photo of * with {letter}"], manager)
    assert not torch.equal(changed, encoder.encode(["a photo of * with a"], manager))
    clip = FrozenCLIPEmbedder(
        text_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    )
    ids = EmbeddingManager(clip, ["*"], per_image_tokens=True).placeholders
    assert all(i >= clip.vocab_size for name, i in ids.items() if name != "*")


def test_rename_and_remove(encoder):
    manager = EmbeddingManager(encoder, ["*"], ["cat"], num_vectors_per_token=2)
    before = encoder.encode(["a photo of *"], manager)
    manager.rename("*", "<cat>")
    assert torch.equal(encoder.encode(["a photo of <cat>"], manager), before)
    assert manager.init_words == {"<cat>": "cat"}
    with pytest.raises(ValueError, match="'<cat>'"):
        manager.rename("*", "x")
    manager.add("*")
    with pytest.raises(ValueError, match="already"):
        manager.rename("*", "<cat>")
    manager.remove("*")
    assert list(manager.placeholders) == ["<cat>"]


# --- expansion ------------------------------------------------------------------------------------------------------


def test_end_token_survives_expansion(encoder, caplog):
    manager = EmbeddingManager(encoder, ["*"], ["cat"], num_vectors_per_token=6)
    ids = encoder.tokenize(["a photo of a * with one nice cat up close in a", "a *"], manager.placeholders)
    with caplog.at_level(logging.WARNING):
        expanded = manager.expand(ids)
        out = manager(ids, encoder.embed(ids))
    assert expanded[0, -1] == encoder.end_token_id
    assert torch.equal(out[0, -1], encoder.token_table().weight[encoder.end_token_id])
    assert expanded[1].tolist() == [2, 11, *[5] * 6, 3, *[0] * 7]
    assert len(caplog.records) == 1
    assert "up close" in caplog.text
    assert "a photo" not in caplog.text


def test_every_long_prompt_is_told_once(encoder, caplog, monkeypatch):
    manager = EmbeddingManager(encoder, ["*"], ["cat"], num_vectors_per_token=6)
    prompts = ["a photo of a * with one nice cat up close", "a photo of a * with one nice cat of a painting"]
    for texts in (prompts[:1], prompts, ["a *", *prompts]):
        encoder.encode(texts, manager)
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == ["'up close'", "'of a painting'"]
    encoder.encode(["a photo of one nice cat with a painting of *"], manager)
    assert "dropped its end: '*'" in caplog.text  # some of its vectors are there
    monkeypatch.setattr("ldm.modules.embedding_manager.MOST_WARNINGS", 3)
    encoder.encode(["a painting of a * with one nice cat of a photo"], manager)
    assert len(caplog.records) == 3


def test_padding_attention_follows_the_expanded_row():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = FrozenBertEmbedder(**sizes, vocab_size=36, max_length=16, zero_padding=True, vocab_file=VOCAB)
    manager = EmbeddingManager(encoder, ["*"], ["cat"], num_vectors_per_token=3)
    assert_close(encoder.encode(["a *"], manager), encoder.encode(["a cat cat cat"]))


def test_other_conditioners_take_the_same_manager():
    encoder = FrozenOpenCLIPEmbedder(text_config={"width": 16, "layers": 1, "heads": 2, "embed_dim": 16})
    manager = EmbeddingManager(encoder, ["<my-cat>"], ["cat"], num_vectors_per_token=2)
    assert_close(encoder.encode(["a <my-cat>!"], manager), encoder.encode(["a cat cat!"]))


def test_gradient_reaches_only_vectors_in_the_prompt(encoder):
    manager = EmbeddingManager(encoder, ["*", "@"], ["cat", "photo"], num_vectors_per_token=2)
    encoder.encode(["a photo of *", "one photo"], manager).square().sum().backward()
    gradients = [p.grad.abs().sum(1) for p in manager.embedding_parameters()]
    assert (gradients[0] > 0).all()
    assert not gradients[1].any()


def test_a_manager_without_placeholders_changes_nothing(encoder):
    assert torch.equal(encoder.encode(["a *"], EmbeddingManager(encoder)), encoder.encode(["a *"]))


# --- what training relies on ----------------------------------------------------------------------------------------


def test_progressive_words_follow_the_global_step(encoder, tmp_path):
    manager = EmbeddingManager(encoder, ["*"], num_vectors_per_token=3, progressive_words=True, progressive_every=10)
    counts = []
    for step in (0, 9, 10, 19, 20, 1000):
        manager.set_global_step(step)
        encoder.encode(["a *"] * 4, manager)  # calls do not count
        counts.append(manager.active("*"))
    assert counts == [1, 1, 2, 2, 3, 3]
    manager.set_global_step(10)
    manager.save(tmp_path / "e.pt")
    sampling = EmbeddingManager(encoder)
    sampling.load(tmp_path / "e.pt")
    assert sampling.active("*") == 2
    assert torch.equal(encoder.encode(["a *"], sampling), encoder.encode(["a *"], manager))


def test_progressive_words_from_a_file_keep_its_vectors(encoder, tmp_path):
    def progressive(**options):
        more = {"num_vectors_per_token": 3, "progressive_words": True, "progressive_every": 10}
        return EmbeddingManager(encoder, ["*"], **more, **options)

    def counts(manager):
        found = []
        for step in (0, 10, 20):
            manager.set_global_step(step)
            found.append(manager.active("*"))
        return found

    write_embeddings(EmbeddingFile({"*": torch.randn(3, 16)}, active={"*": 2}), tmp_path / "two.pt")
    write_embeddings(EmbeddingFile({"*": torch.randn(3, 16)}), tmp_path / "all.pt")
    two = progressive(embedding_manager_ckpt=tmp_path / "two.pt")
    assert counts(two) == [2, 2, 3]
    everything = progressive()
    everything.load(tmp_path / "all.pt")
    assert counts(everything) == [3, 3, 3]
    # a resumed run goes by its checkpoint, whatever file it finds; one from before counts were kept, by steps
    saved = {"state_dict": {f"words.{k}": v for k, v in two.state_dict().items()}}
    everything.resume(saved | two.run_entries(), "words.")
    assert counts(everything) == [2, 2, 3]
    everything.resume(saved, "words.")
    assert counts(everything) == [1, 2, 3]


def test_only_the_vectors_are_parameters_and_they_stay_float32(encoder):
    manager = EmbeddingManager(encoder, ["*"], ["cat"])
    assert [tuple(p.shape) for p in manager.parameters()] == [(1, 16)]
    vector = manager.string_to_param_dict["*"].detach().clone()
    manager.half().to(torch.bfloat16)
    assert torch.equal(manager.string_to_param_dict["*"], vector)
    assert manager.initial_embeddings["*"].dtype == torch.float32
    out = manager(torch.tensor([[5, 0]]), torch.zeros(1, 2, 16, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16


def test_coarse_loss_is_zero_at_the_start_and_pulls_back(encoder):
    manager = EmbeddingManager(encoder, ["*", "@"], ["cat"], num_vectors_per_token=2)
    assert manager.embedding_to_coarse_loss() == 0
    with torch.no_grad():
        manager.string_to_param_dict["*"].add_(torch.tensor([[1.0], [2.0]]))
    loss = manager.embedding_to_coarse_loss()
    assert_close(loss, torch.tensor(16.0 + 64.0))
    loss.backward()
    assert_close(manager.string_to_param_dict["*"].grad, torch.tensor([[2.0], [4.0]]).expand(2, 16))
    assert EmbeddingManager(encoder, ["*"]).embedding_to_coarse_loss() == 0


def test_nearest_words(encoder):
    manager = EmbeddingManager(encoder, ["*"], ["cat"], num_vectors_per_token=2)
    words = manager.nearest_words("*", count=3)
    assert len(words) == 2
    assert words[0][0][0] == "cat"
    assert abs(words[0][0][1] - 1) < 1e-5


def test_named_vectors_move_and_count():
    vectors = NamedVectors(trainable=False)
    vectors["a"] = torch.zeros(1, 2)
    vectors["b"] = torch.ones(2, 2)
    del vectors["a"]
    assert list(vectors) == ["b"]
    assert len(vectors) == 1
    assert vectors.to("meta")["b"].is_meta


# --- files ----------------------------------------------------------------------------------------------------------


def test_load_takes_the_vector_count_from_the_file(encoder, tmp_path):
    manager = EmbeddingManager(encoder, ["*", "<x>"], ["cat"], num_vectors_per_token=3)
    with torch.no_grad():
        for parameter in manager.embedding_parameters():
            parameter.uniform_()
    manager.save(tmp_path / "e.pt", {"step": 7})
    other = EmbeddingManager(encoder, ["*", "old"], ["painting"])
    assert other.load(tmp_path / "e.pt") == ["*", "<x>"]
    assert list(other.placeholders) == ["*", "<x>"]
    assert torch.equal(other.string_to_param_dict["<x>"], manager.string_to_param_dict["<x>"])
    assert other.init_words["*"] == "painting"
    assert torch.equal(other.initial_embeddings["*"], row(encoder, "painting").expand(3, -1))
    assert read_embeddings(tmp_path / "e.pt").info == {"step": 7}


def test_load_in_place_keeps_the_parameter(encoder, tmp_path):
    manager = EmbeddingManager(encoder, ["*"], ["cat"])
    parameter = manager.string_to_param_dict["*"]
    write_embeddings(EmbeddingFile({"*": torch.ones(1, 16)}), tmp_path / "e.pt")
    manager.load(tmp_path / "e.pt")
    assert manager.string_to_param_dict["*"] is parameter
    assert (parameter == 1).all()


def test_several_files_with_renames(encoder, tmp_path):
    for number in (1, 2):
        write_embeddings(EmbeddingFile({"*": torch.full((number, 16), float(number))}), tmp_path / f"{number}.pt")
    manager = EmbeddingManager(encoder, ["*"], ["cat"])
    manager.load(tmp_path / "1.pt")
    with pytest.raises(ValueError, match="already a placeholder"):
        manager.load(tmp_path / "2.pt", add=True)
    assert manager.load(tmp_path / "2.pt", add=True, rename={"*": "<two>"}) == ["<two>"]
    assert {n: len(manager.string_to_param_dict[n]) for n in manager.placeholders} == {"*": 1, "<two>": 2}
    with pytest.raises(ValueError, match="cannot rename '@'"):
        manager.load(tmp_path / "2.pt", add=True, rename={"@": "x"})


def test_strength_goes_from_the_initial_word_to_the_vectors(encoder, tmp_path):
    vectors = torch.randn(2, 16)
    write_embeddings(EmbeddingFile({"*": vectors}, init_words={"*": "cat"}), tmp_path / "e.pt")
    start = row(encoder, "cat").expand(2, -1)
    for strength in (0.0, 0.25, 1.0, 1.5):
        manager = EmbeddingManager(encoder)
        manager.load(tmp_path / "e.pt", strength=strength)
        assert_close(manager.string_to_param_dict["*"], start + strength * (vectors - start))
    write_embeddings(EmbeddingFile({"*": vectors}), tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="which word '\\*' started from"):
        EmbeddingManager(encoder).load(tmp_path / "bare.pt", strength=0.5)
    configured = EmbeddingManager(encoder, ["*"], ["cat"])
    configured.load(tmp_path / "bare.pt", strength=0.0)
    assert_close(configured.string_to_param_dict["*"], start)


def test_embedding_of_another_model_is_refused_and_nothing_lost(encoder, tmp_path):
    write_embeddings(EmbeddingFile({"*": torch.zeros(1, 1280)}), tmp_path / "e.pt")
    manager = EmbeddingManager(encoder, ["*"], ["cat"])
    with pytest.raises(ValueError, match=r"e.pt: '\*' has vectors of width 1280 \(LDM"):
        manager.load(tmp_path / "e.pt")
    assert torch.equal(manager.string_to_param_dict["*"], row(encoder, "cat"))


def test_published_file_loads(golden, tmp_path):
    path = END_TO_END / "embeddings_1vec.pt"
    encoder = BERTEmbedder(n_embed=64, n_layer=1, vocab_size=36, max_seq_len=16, vocab_file=VOCAB)
    manager = EmbeddingManager(encoder, ["*"], ["sculpture"])
    manager.load(path)
    assert torch.equal(manager.string_to_param_dict["*"], read_embeddings(path).vectors["*"])
