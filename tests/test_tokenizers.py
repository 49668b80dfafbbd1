"""Tokenizers against reference ids, and placeholders matched in the text."""

from __future__ import annotations

import hashlib
import json
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ldm.modules.encoders.bert import VOCAB_FILE, WordPieceTokenizer
from ldm.modules.encoders.clip_tokenizer import CLIPTokenizer
from ldm.modules.encoders.modules import BERTEmbedder, BERTTokenizer, FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder
from ldm.modules.encoders.text import split_at_placeholders, text_to_ids
from tests.conftest import END_TO_END

SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
NEW = 60000  # an id behind every vocabulary


@pytest.fixture(scope="module")
def bert():
    return BERTEmbedder(n_embed=8, n_layer=1)


@pytest.fixture(scope="module")
def clip():
    return FrozenCLIPEmbedder(text_config=SMALL)


@pytest.fixture(scope="module")
def openclip():
    return FrozenOpenCLIPEmbedder(text_config={"width": 8, "layers": 1, "heads": 1, "embed_dim": 8})


# --- ids ------------------------------------------------------------------------------------------------------------


def test_clip_ids_meet_reference(golden, clip):
    case = golden("clip_tokens")
    assert torch.equal(clip.tokenize(case.meta["prompts"]), case["input_ids"])
    for word, token_id in case.meta["single_token_ids"].items():
        ids = clip.word_ids(word)
        assert ids == [token_id] if token_id is not None else len(ids) > 1, word


def test_openclip_ids_are_open_clips_own_and_pad_with_zeros(golden, openclip):
    import open_clip

    prompts = golden("clip_tokens").meta["prompts"] + ["&amp;amp;lt;b&gt;", "<end_of_text> x", "İSTANBUL ΑΣ"]
    assert torch.equal(openclip.tokenize(prompts), open_clip.tokenize(prompts))


def test_end_to_end_captions_meet_reference(golden):
    model = BERTEmbedder(8, 1, vocab_size=36, max_seq_len=16, vocab_file=END_TO_END / "vocab.txt")
    captions = json.loads((END_TO_END / "inputs.json").read_text())["captions"]
    tokens = load_file(END_TO_END / "inputs.safetensors")["tokens"]
    assert torch.equal(torch.stack([model.tokenize(step, {"*": 5}) for step in captions]), tokens)


def test_packaged_vocabulary_is_bert_base_uncased():
    data = VOCAB_FILE.read_bytes()
    assert hashlib.sha256(data).hexdigest() == "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
    lines = data.decode().splitlines()
    assert len(lines) == 30522
    assert [lines.index(t) for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "*")] == [
        0,
        100,
        101,
        102,
        103,
        1008,
    ]
    readme = (VOCAB_FILE.parent / "README.md").read_text()
    assert VOCAB_FILE.name in readme
    assert "Apache" in readme


# What Hugging Face's BertTokenizerFast 5.23 gives for this vocabulary, without [CLS] and [SEP].
BERT_IDS = {
    "a photo of a *": [1037, 6302, 1997, 1037, 1008],
    "A Photo, of  my *'s cat!!": [1037, 6302, 1010, 1997, 2026, 1008, 1005, 1055, 4937, 999, 999],
    "Ñandú — 42nd": [16660, 8566, 1517, 21373],
    "unaffable": [14477, 20961, 3468],
    "[MASK] x": [103, 1060],
    "中文字 mixed": [1746, 1861, 100, 3816],
    "don't_stop\u200b now": [2123, 1005, 1056, 1035, 2644, 2085],
    "": [],
}


def test_bert_frames_and_pads(bert):
    ids = bert.tokenize(["a photo of a *", ""])
    assert ids[0, :8].tolist() == [101, 1037, 6302, 1997, 1037, 1008, 102, 0]
    assert ids[1, :3].tolist() == [101, 102, 0]
    assert not ids[0, 7:].any()


@pytest.mark.parametrize("text", list(BERT_IDS))
def test_bert_word_pieces(bert, text):
    assert bert.word_ids(text) == BERT_IDS[text]


def test_bert_knows_when_it_does_not_know(bert):
    assert bert.word_ids("🦄") == [bert.unk_token_id]
    assert bert.word_ids("x" * 101) == [bert.unk_token_id]
    assert bert.id_to_word(100) == "[UNK]"


def test_bert_tokenizer_class_keeps_its_published_forms():
    tokenizer = BERTTokenizer(vq_interface=False, max_length=8)
    ids = tokenizer(["a cat", "a photo of a cat and a dog"])
    assert ids.tolist()[0] == [101, 1037, 4937, 102, 0, 0, 0, 0]
    assert ids[1, -1] == 102
    assert torch.equal(tokenizer.encode("a cat"), ids[:1])
    none, nothing, (_, _, wrapped) = BERTTokenizer(max_length=8).encode("a cat")
    assert none is nothing is None
    assert torch.equal(wrapped, ids[:1])
    assert tokenizer.decode("a cat") == "a cat"


def test_wrong_vocabulary_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="one word piece per line"):
        WordPieceTokenizer(tmp_path / "vocab.txt")
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"\[PAD\]"):
        WordPieceTokenizer(tmp_path / "vocab.txt")


def test_clip_cleanings_differ_where_they_should():
    trained, fast = CLIPTokenizer(49407), CLIPTokenizer(49407, cleaning="nfc")
    assert trained.encode(trained.clean("“cat” &amp; dog")) == trained.encode('"cat" & dog')
    assert fast.encode(fast.clean("“cat”")) != fast.encode('"cat"')
    assert trained.encode("a <|endoftext|>")[-1] == trained.end_token_id
    with pytest.raises(ValueError, match="ftfy"):
        CLIPTokenizer(0, cleaning="all")


# --- placeholders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "placeholders", "expected"),
    [
        ("a photo of *", ["*"], ["a photo of ", "[*]"]),
        ("*", ["*"], ["[*]"]),
        ("", ["*"], []),
        ("no word", ["*"], ["no word"]),
        ("my *'s", ["*"], ["my ", "[*]", "'s"]),
        ("a<my-cat>b", ["<my-cat>"], ["a", "[<my-cat>]", "b"]),
        ("<my-cat2> <my-cat>", ["<my-cat>", "<my-cat2>"], ["[<my-cat2>]", " ", "[<my-cat>]"]),
        ("a catfish, a cat", ["cat"], ["a catfish, a ", "[cat]"]),
        ("cat's cat2 cat_x", ["cat"], ["[cat]", "'s cat2 cat_x"]),
        ("sks1 sks10", ["sks1", "sks10"], ["[sks1]", " ", "[sks10]"]),
        ("A SKS Dog", ["sks"], ["A ", "[sks]", " Dog"]),
        ("Ab aB", ["Ab", "aB"], ["[Ab]", " ", "[aB]"]),
        ("ab", ["Ab", "aB"], ["[Ab]"]),
        ("a red  fox", ["red fox"], ["a ", "[red fox]"]),
        ("**", ["*"], ["[*]", "[*]"]),
        ("**", ["*", "**"], ["[**]"]),
        ("א and אב", ["א"], ["[א]", " and אב"]),
        ("a.b a-b", ["a.b"], ["[a.b]", " a-b"]),
        ("写真の犬だ", ["犬"], ["写真の", "[犬]", "だ"]),  # scripts without spaces between words
        ("写真のsks2だ", ["sks", "sks2"], ["写真の", "[sks2]", "だ"]),
        ("my犬2匹", ["犬"], ["my", "[犬]", "2匹"]),
        ("รูปแมวดำ", ["แมว"], ["รูป", "[แมว]", "ดำ"]),
        ("ຮູບແມວ រូបឆ្មា ကြောင်ပုံ", ["ແມວ", "ឆ្មា", "ပုံ"], ["ຮູບ", "[ແມວ]", " រូប", "[ឆ្មា]", " ကြောင်", "[ပုံ]"]),
        ("개가 кот коты", ["개", "кот"], ["개가 ", "[кот]", " коты"]),
        ("(x) [x]", ["[x]"], ["(x) ", "[[x]]"]),
    ],
)
def test_placeholders_are_found_in_the_text(text, placeholders, expected):
    pieces = split_at_placeholders(text, placeholders)
    assert [f"[{p.placeholder}]" if p.placeholder else p.text for p in pieces] == expected


def test_a_placeholder_needs_a_visible_character():
    with pytest.raises(ValueError, match="visible"):
        split_at_placeholders("a", [" "])


@pytest.mark.parametrize("text", ["a photo of a *", "a * in the style of * with @ and more", "* , * . a *"])
def test_a_one_token_placeholder_leaves_the_ids_as_they_are(bert, clip, openclip, text):
    for encoder in (bert, clip, openclip):
        placeholders = {word: encoder.word_ids(word)[0] for word in ("*", "@", "photo")}
        assert torch.equal(encoder.tokenize([text], placeholders), encoder.tokenize([text]))


def test_any_string_can_be_a_placeholder(bert, clip):
    text = "a photo of <my-cat>, my <My-Cat> by Sks person"
    for encoder in (bert, clip):
        ids = encoder.tokenize([text], {"<my-cat>": NEW, "sks person": NEW + 1})[0].tolist()
        plain = [encoder.word_ids(part) for part in ("a photo of", ",", "my", "by")]
        middle = plain[0] + [NEW] + plain[1] + plain[2] + [NEW] + plain[3] + [NEW + 1]
        assert ids[1 : 1 + len(middle)] == middle


def test_text_is_cleaned_before_placeholders_are_matched(clip):
    assert clip.tokenize(["a &lt;my-cat&gt;"], {"<my-cat>": NEW})[0, 2] == NEW
    assert clip.tokenize(["a “cat”"], {"“cat”": NEW})[0, 2] == NEW


def test_half_a_surrogate_pair_is_no_error(bert, clip):
    for encoder in (bert, clip):
        assert encoder.word_ids("a \ud83d cat") == encoder.word_ids("a ? cat")


def test_accents_match_however_they_are_written(bert):
    assert bert.tokenize(["a cafe\u0301"], {"caf\u00e9": NEW})[0, 2] == NEW


def test_dropped_words_are_named_with_placeholders(bert, caplog):
    with caplog.at_level(logging.WARNING):
        ids = bert.tokenize(["a " * 75 + "<my-cat> and unaffable"], {"<my-cat>": NEW})
    assert NEW not in ids
    assert "<my-cat> and unaffable" in caplog.text


TEXT = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("ab *<>&;'\u0301中😀Σİ")), max_size=40)


@settings(max_examples=150, deadline=None)
@given(TEXT, st.booleans())
def test_any_text_gives_framed_ids(bert, clip, text, fast):
    for encoder in (bert, clip):
        ids = encoder.tokenize([text], {"*": NEW, "ab": NEW + 1})[0].tolist()
        tokenizer = encoder.tokenizer
        assert len(ids) == encoder.max_length
        assert ids[0] == tokenizer.start_token_id
        assert tokenizer.end_token_id in ids[1:]
        assert ids.count(NEW) == tokenizer.clean(text).count("*")
    tokenizer = CLIPTokenizer(0, cleaning="nfc" if fast else "ftfy+html")
    assert all(0 <= i < tokenizer.vocab_size for i in text_to_ids(tokenizer, text))
