"""Text, token, class and spatial conditioners against the reference numbers and the published state dicts."""

from __future__ import annotations

import torch

from ldm.modules.encoders.modules import BERTEmbedder, TransformerEmbedder
from ldm.protocols import TextEncoder
from tests.conftest import END_TO_END, assert_close


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


def test_bert_embedder_is_a_text_encoder():
    model = BERTEmbedder(n_embed=16, n_layer=1, vocab_size=36, max_seq_len=16, vocab_file=END_TO_END / "vocab.txt")
    assert isinstance(model, TextEncoder)
    assert (model.embedding_dim, model.max_length, model.vocab_size, model.end_token_id) == (16, 16, 36, 3)
    assert model.encode(["a photo of a cat", ""]).shape == (2, 16, 16)
    table = model.transformer.token_emb.weight
    rows = model.embed(torch.tensor([[5, 36, 99]]))
    assert torch.equal(rows[0, 0], table[5])
    assert not rows[0, 1:].any()
