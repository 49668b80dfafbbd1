"""Text, token, class and spatial conditioners against reference numbers, and what all text conditioners share."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from ldm.modules.encoders.modules import (
    BERTEmbedder,
    ClassEmbedder,
    FrozenBertEmbedder,
    FrozenCLIPEmbedder,
    FrozenClipImageEmbedder,
    FrozenCLIPTextEmbedder,
    FrozenOpenCLIPEmbedder,
    SpatialRescaler,
    TransformerEmbedder,
)
from ldm.protocols import TextEncoder
from ldm.util import ConfigError
from tests.conftest import END_TO_END, assert_close

VOCAB = END_TO_END / "vocab.txt"
TINY_CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
TINY_OPEN_CLIP = {"width": 16, "layers": 3, "heads": 2, "embed_dim": 12}
TINY_BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def bert() -> BERTEmbedder:
    return BERTEmbedder(n_embed=16, n_layer=1, vocab_size=36, max_seq_len=16, vocab_file=VOCAB).eval()


BUILDERS = {
    "bert": bert,
    "clip": lambda: FrozenCLIPEmbedder(text_config=TINY_CLIP),
    "openclip": lambda: FrozenOpenCLIPEmbedder(text_config=TINY_OPEN_CLIP),
    "minilm": lambda: FrozenBertEmbedder(**TINY_BERT, vocab_size=36, max_length=16, vocab_file=VOCAB),
}


@pytest.fixture(params=list(BUILDERS))
def encoder(request):
    torch.manual_seed(0)
    return BUILDERS[request.param]()


# --- reference numbers ----------------------------------------------------------------------------------------------


def test_bert_embedder_meets_reference(golden):
    case = golden("bert_embedder")
    model = BERTEmbedder(**case.meta["init"]).eval()
    model.load_state_dict(case.sd)
    assert set(model.state_dict()) == set(case.sd)
    tokens = case["in.tokens"]
    assert_close(model.encode(tokens), case["out.encode"])
    assert_close(model(tokens[:, :7]), case["out.encode_len7"])
    assert_close(model.transformer(tokens), case["out.logits"])
    masked = model.transformer(tokens, return_embeddings=True, mask=tokens > 10)
    assert_close(masked, case["out.embeddings_masked"])


def test_transformer_embedder_meets_reference(golden):
    case = golden("transformer_embedder")
    model = TransformerEmbedder(**case.meta["init"]).eval()
    model.load_state_dict(case.sd)
    assert_close(model.encode(case["in.tokens"]), case["out"])


def test_clip_meets_reference(golden):
    case = golden("clip_text_tiny")
    model = FrozenCLIPEmbedder(text_config=case.meta["init"])
    model.load_state_dict(case.sd)
    assert set(model.state_dict()) == set(case.sd)
    ids = case["in.input_ids"]
    assert_close(model.transformer(input_ids=ids), case["out"])
    assert_close(model.encode(ids), case["out"])
    raised = model.transformer(ids, embedding_manager=lambda _, embedded: embedded + 0.5)
    assert_close(raised, case["out.manager_add_half"])


def test_class_embedder_and_rescaler_meet_reference(golden):
    case = golden("class_embedder_and_rescaler")
    classes = ClassEmbedder(8, n_classes=10, key="class_label")
    classes.load_state_dict({"embedding.weight": case["class.sd.embedding.weight"]})
    batch = {"class_label": case["in.class_label"]}
    assert_close(classes(batch), case["class.out"])
    assert_close(classes({"other": batch["class_label"]}, key="other"), case["class.out"])
    assert_close(classes(batch["class_label"]), case["class.out"])
    rescale = SpatialRescaler(n_stages=2, in_channels=6, out_channels=3)
    rescale.load_state_dict({"channel_mapper.weight": case["rescale.sd.channel_mapper.weight"]})
    assert_close(rescale.encode(case["in.x"]), case["rescale.out"])
    assert_close(SpatialRescaler(1, "bicubic", 0.75, in_channels=6)(case["in.x"]), case["rescale_bicubic075.out"])


def test_class_labels_that_do_not_fit_are_named():
    classes = ClassEmbedder(8, n_classes=10, key="class_label")
    with pytest.raises(ValueError, match="the batch has no 'class_label'; it has \\['caption', 'image'\\]"):
        classes({"image": torch.zeros(2), "caption": ["a", "b"]})
    with pytest.raises(ValueError, match="class labels from 3 to 10 for n_classes 10"):
        classes(torch.tensor([3, 10]))


def test_openclip_equals_open_clips_own_text_transformer():
    model = FrozenOpenCLIPEmbedder(text_config=TINY_OPEN_CLIP)
    ids = model.tokenize(["a photo of a cat", ""])
    from open_clip.transformer import TextTransformer

    own = TextTransformer(width=16, layers=3, heads=2, output_dim=12, output_tokens=True).eval()
    own.load_state_dict(model.model.state_dict(), strict=False)
    assert_close(model.encode(ids), own(ids)[1])
    own.transformer.resblocks = own.transformer.resblocks[:-1]
    model.layer = "penultimate"
    assert_close(model.encode(ids), own(ids)[1])


def test_minilm_equals_a_masked_post_norm_transformer():
    model = BUILDERS["minilm"]()
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    ids = model.tokenize(["a photo of a cat", "painting"])
    table = model.embeddings
    x = table.word_embeddings(ids) + table.position_embeddings.weight[:16] + table.token_type_embeddings.weight[0]
    x = table.LayerNorm(x)
    for layer in model.encoder.layer:
        reference = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", batch_first=True, layer_norm_eps=1e-12)
        attention, out = layer.attention["self"], layer.attention["output"]
        parts = (attention.query, attention.key, attention.value)
        state = {
            "self_attn.in_proj_weight": torch.cat([p.weight for p in parts]),
            "self_attn.in_proj_bias": torch.cat([p.bias for p in parts]),
        }
        ours = {"self_attn.out_proj": out.dense, "linear1": layer.intermediate["dense"], "linear2": layer.output.dense}
        ours |= {"norm1": out.LayerNorm, "norm2": layer.output.LayerNorm}
        state |= {f"{name}.{k}": v for name, module in ours.items() for k, v in module.state_dict().items()}
        reference.load_state_dict(state)
        x = reference.eval()(x, src_key_padding_mask=ids == 0)
    keep = (ids != 0).unsqueeze(-1)
    assert_close(model.encode(ids) * keep, x * keep, rel=1e-5)


# --- what all text conditioners share -------------------------------------------------------------------------------


def test_meets_the_protocol(encoder):
    assert isinstance(encoder, TextEncoder)
    ids = encoder.tokenize(["a photo of a cat", ""])
    assert ids.dtype == torch.long
    assert ids.shape == (2, encoder.max_length)
    assert encoder.end_token_id in ids[0]
    context = encoder.encode(["a photo of a cat", ""])
    assert context.shape == (2, encoder.max_length, encoder.embedding_dim)
    assert torch.equal(context, encoder(ids))
    assert encoder.id_to_word(encoder.word_ids("cat")[0]) == "cat"
    assert encoder.tokenize([]).shape == (0, encoder.max_length)


def test_embed_gives_table_rows_and_zeros_outside(encoder):
    rows = encoder.embed(torch.tensor([[5, encoder.vocab_size, encoder.vocab_size + 7]]))
    assert torch.equal(rows[0, 0], encoder.token_table().weight[5])
    assert not rows[0, 1:].any()


def test_the_manager_acts_before_positions_are_added(encoder):
    """Replacing a row by another word's row gives what that word gives."""
    cat, dog = encoder.word_ids("cat")[0], encoder.word_ids("painting")[0]
    row = encoder.token_table().weight[dog]

    def manager(ids, embedded):
        return torch.where((ids == cat).unsqueeze(-1), row, embedded)

    assert_close(encoder.encode(["a photo of a cat"], manager), encoder.encode(["a photo of a painting"]))


def test_long_text_keeps_its_end_token_and_warns_once(encoder, caplog):
    text = "a photo of a cat " * 30 + "painting"
    with caplog.at_level(logging.WARNING):
        ids = [encoder.tokenize([text]) for _ in range(3)][0]
    assert ids[0, -1] == encoder.end_token_id
    assert len(caplog.records) == 1
    assert "painting" in caplog.text
    assert str(encoder.max_length) in caplog.text


def test_a_text_just_fits(encoder, caplog):
    room = encoder.max_length - 2
    ids = encoder.tokenize(["cat " * room])
    assert not caplog.records
    assert (ids[0, 1:-1] == encoder.word_ids("cat")[0]).all()


def test_embed_takes_ids_from_any_device(encoder):
    assert encoder.to("meta").embed(torch.tensor([1, 2])).is_meta


@pytest.mark.parametrize("name", ["clip", "openclip", "minilm"])
def test_frozen_conditioners_stay_frozen(name):
    model = nn.ModuleDict({"stage": BUILDERS[name]()}).train()
    assert not any(m.training for m in model["stage"].modules())
    assert not any(p.requires_grad for p in model.parameters())


def test_gradient_reaches_the_vectors_through_frozen_weights(encoder):
    vector = torch.zeros(encoder.embedding_dim, requires_grad=True)
    out = encoder.encode(["a photo of a cat"], lambda ids, embedded: embedded + vector)
    out.square().sum().backward()
    assert vector.grad.abs().sum() > 0


def test_copies(encoder):
    texts = ["a photo of a cat"]
    assert torch.equal(copy.deepcopy(encoder).encode(texts), encoder.encode(texts))


@pytest.mark.parametrize("name", list(BUILDERS))
def test_builds_on_meta_and_takes_weights(name):
    real = BUILDERS[name]()
    with torch.device("meta"):
        model = BUILDERS[name]()
    model.load_state_dict(real.state_dict(), assign=True)
    assert torch.equal(model.encode(["a photo"]), real.encode(["a photo"]))


def test_half_precision(encoder):
    out = encoder.bfloat16().encode(["a photo of a cat"])
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


# --- single conditioners --------------------------------------------------------------------------------------------


def test_bert_takes_ids_where_it_has_no_tokenizer():
    model = BERTEmbedder(n_embed=16, n_layer=1, vocab_size=40, max_seq_len=8, use_tokenizer=False)
    assert model.end_token_id is None
    assert model.encode(torch.arange(8)[None]).shape == (1, 8, 16)
    with pytest.raises(ValueError, match="takes token ids"):
        model.encode(["a photo"])
    with pytest.raises(ValueError, match="do not fit"):
        model.encode(torch.zeros(1, 9, dtype=torch.long))


def test_vocabulary_that_does_not_fit_the_table_is_refused():
    model = BERTEmbedder(n_embed=16, n_layer=1, vocab_size=100, max_seq_len=8)
    with pytest.raises(ValueError, match="vocabulary rows"):
        model.encode(["a photo"])


def test_embedding_dropout_acts_in_training_only():
    model = BERTEmbedder(16, 1, vocab_size=40, max_seq_len=8, use_tokenizer=False, embedding_dropout=0.5)
    ids = torch.arange(8)[None]
    assert not torch.equal(model.train()(ids), model(ids))
    assert torch.equal(model.eval()(ids), model(ids))


def test_clip_loads_with_and_without_position_ids():
    model = FrozenCLIPEmbedder(text_config=TINY_CLIP)
    key = "transformer.text_model.embeddings.position_ids"
    state = model.state_dict()
    assert state[key].tolist() == [list(range(77))]
    assert state[key].dtype == torch.long
    del state[key]
    model.load_state_dict(state)
    model.load_state_dict(state | {key: torch.full((1, 77), 3.0, dtype=torch.float16)})
    assert model.state_dict()[key].tolist() == [list(range(77))]


def test_clip_skip_leaves_out_last_layers():
    model = FrozenCLIPEmbedder(text_config=TINY_CLIP, clip_skip=2)
    shorter = FrozenCLIPEmbedder(text_config=TINY_CLIP | {"num_hidden_layers": 2})
    shorter.load_state_dict({k: v for k, v in model.state_dict().items() if ".layers.2." not in k})
    assert torch.equal(model.encode(["a cat"]), shorter.encode(["a cat"]))


def test_clip_is_causal():
    model = FrozenCLIPEmbedder(text_config=TINY_CLIP)
    a, b = model.encode(["a photo of a cat", "a photo of the dog"])
    assert torch.equal(a[:4], b[:4])
    assert not torch.equal(a[4], b[4])


def test_exact_gelu_where_asked_for():
    quick = FrozenCLIPEmbedder(text_config=TINY_CLIP)
    exact = FrozenCLIPEmbedder(text_config=TINY_CLIP | {"hidden_act": "gelu"})
    exact.load_state_dict(quick.state_dict())
    assert not torch.equal(quick.encode(["a"]), exact.encode(["a"]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FrozenCLIPEmbedder(version="openai/clip"), "version 'openai/clip' is unknown"),
        (lambda: FrozenCLIPEmbedder(text_config={"hidden_sizes": 3}), "did you mean 'hidden_size'"),
        (lambda: FrozenCLIPEmbedder(text_config={"hidden_act": "relu"}), "quick_gelu"),
        (lambda: FrozenCLIPEmbedder(text_config=TINY_CLIP, clip_skip=4), "clip_skip 4"),
        (lambda: FrozenCLIPEmbedder(text_config=TINY_CLIP, max_length=78), "max_length 78"),
        (lambda: FrozenCLIPEmbedder(text_config=TINY_CLIP, cleaning="none"), "cleaning 'none'"),
        (lambda: FrozenCLIPEmbedder(text_config={"hidden_size": 10, "num_attention_heads": 3}), "divide"),
        (lambda: FrozenOpenCLIPEmbedder(arch="ViT-H-15"), "ViT-H-15"),
        (lambda: FrozenOpenCLIPEmbedder(layer="first"), "penultimate"),
        (lambda: FrozenOpenCLIPEmbedder(text_config={"depth": 3}), "'depth'"),
        (lambda: FrozenBertEmbedder(**TINY_BERT, max_length=513), "max_length 513"),
        (lambda: SpatialRescaler(method="cubic"), "bicubic"),
        (lambda: SpatialRescaler(n_stages=-1), "n_stages"),
        (lambda: FrozenClipImageEmbedder(model="ViT-B/33"), "ViT-B/33"),
    ],
)
def test_wrong_parameters_are_named(build, message):
    with pytest.raises((ValueError, ConfigError), match=message):
        build()


def test_openclip_trains_where_asked_to():
    model = FrozenOpenCLIPEmbedder(text_config=TINY_OPEN_CLIP, freeze=False)
    assert all(p.requires_grad for p in model.parameters())


def test_minilm_ignores_padding_and_can_zero_it():
    short = BUILDERS["minilm"]()
    long = FrozenBertEmbedder(**TINY_BERT, vocab_size=36, max_length=40, zero_padding=True, vocab_file=VOCAB)
    long.load_state_dict(short.state_dict())
    a, b = short.encode(["a photo of a cat"]), long.encode(["a photo of a cat"])
    assert_close(b[:, :7], a[:, :7])
    assert not b[:, 7:].any()
    assert a[:, 7:].any()
    beside = long.encode(["a cat", "a photo of a cat"])  # the longest text decides how much is computed
    assert_close(beside[0, :4], short.encode(["a cat"])[0, :4])
    assert not beside[0, 4:].any()
    assert beside.shape == (2, 40, a.shape[2])


def test_minilm_takes_published_files_with_their_unused_parts():
    model = BUILDERS["minilm"]()
    extra = {"pooler.dense.weight": torch.zeros(16, 16), "embeddings.position_ids": torch.arange(512)[None]}
    parent = nn.ModuleDict({"stage": model})
    parent.load_state_dict({f"stage.{k}": v for k, v in (model.state_dict() | extra).items()})


def test_clip_image_and_text_share_a_space():
    with torch.device("meta"):
        texts, images = FrozenCLIPTextEmbedder(n_repeat=2), FrozenClipImageEmbedder(model="ViT-B/32")
    assert texts.encode(["a cat", "a dog"]).shape == (2, 2, 768)
    assert images.model.encode_image(torch.zeros(1, 3, 224, 224, device="meta")).shape == (1, 512)
    assert "model.visual.conv1.weight" in images.state_dict()
    x = images.preprocess(torch.ones(1, 3, 40, 50))
    assert x.shape == (1, 3, 224, 224)
    expected = (1 - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]
    )
    assert_close(x.mean((0, 2, 3)), expected)
    with pytest.raises(FileNotFoundError, match="no CLIP weights"), torch.device("meta"):
        FrozenClipImageEmbedder(weights="nowhere.pt")
