"""Attention blocks: published numbers, masks, fused kernels, cached contexts, checkpointing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.modules.attention import (
    BasicTransformerBlock,
    CrossAttention,
    FeedForward,
    LinearAttention,
    SpatialSelfAttention,
    SpatialTransformer,
    cached_context,
)
from ldm.modules.diffusionmodules.util import Attention16, attend
from tests.conftest import assert_close

GOLDEN_BLOCKS = {
    "cross_attention": (lambda: CrossAttention(32, context_dim=20, heads=4, dim_head=8), ("seq", "context")),
    "cross_attention_masked": (
        lambda: CrossAttention(32, context_dim=20, heads=4, dim_head=8),
        ("seq", "context", "mask"),
    ),
    "self_attention": (lambda: CrossAttention(32, heads=2, dim_head=64), ("seq",)),
    "btb_context": (lambda: BasicTransformerBlock(32, 4, 8, context_dim=20), ("seq", "context")),
    "btb_nocontext_noglu": (lambda: BasicTransformerBlock(32, 2, 16, gated_ff=False, checkpoint=False), ("seq",)),
    "st_context_depth2": (lambda: SpatialTransformer(32, 4, 8, depth=2, context_dim=20), ("image", "context")),
    "st_inner64_nocontext": (lambda: SpatialTransformer(32, 4, 16), ("image",)),
    "ff_glu": (lambda: FeedForward(32, glu=True), ("seq",)),
    "ff_gelu_out12": (lambda: FeedForward(32, dim_out=12, mult=2), ("seq",)),
    "linear_attention": (lambda: LinearAttention(32, heads=2, dim_head=8), ("image",)),
    "spatial_self_attention": (lambda: SpatialSelfAttention(32), ("image",)),
}


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter noise, so that zero-initialised branches show."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module


@pytest.mark.parametrize("name", GOLDEN_BLOCKS)
def test_blocks_equal_the_published_numbers(golden, name):
    case = golden("attention_blocks")
    build, inputs = GOLDEN_BLOCKS[name]
    module = build()
    prefix = f"{name}.sd."
    module.load_state_dict({k.removeprefix(prefix): v for k, v in case.tensors.items() if k.startswith(prefix)})
    assert_close(module(*(case[f"in.{key}"] for key in inputs)), case[f"{name}.out"], name=name)


def naive_attention(layer, x, context=None, mask=None):
    """Attention written out as sums, with the published fill value under the mask."""
    context = x if context is None else context
    heads = layer.heads

    def split(tokens):
        return tokens.reshape(*tokens.shape[:2], heads, -1)

    q, k, v = split(layer.to_q(x)), split(layer.to_k(context)), split(layer.to_v(context))
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask.flatten(1)[:, None, None], -torch.finfo(scores.dtype).max)
    out = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)
    return layer.to_out(out.flatten(2))


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 17),
    keys=st.integers(1, 9),
    heads=st.integers(1, 4),
    dim_head=st.integers(1, 9),
    masking=st.sampled_from(["none", "random", "empty"]),
    own=st.booleans(),
    seed=st.integers(0, 99),
)
def test_cross_attention_is_attention(batch, queries, keys, heads, dim_head, masking, own, seed):
    torch.manual_seed(seed)
    layer = CrossAttention(6, None if own else 5, heads, dim_head)
    x = torch.randn(batch, queries, 6, requires_grad=True)
    context = None if own else torch.randn(batch, keys, 5, requires_grad=True)
    length = queries if own else keys
    mask = None if masking == "none" else torch.rand(batch, length) < (0.5 if masking == "random" else 0)
    ours, expected = layer(x, context, mask), naive_attention(layer, x, context, mask)
    assert_close(ours, expected)
    inputs = [x] if own else [x, context]
    weights = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, weights), torch.autograd.grad(expected, inputs, weights), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [1024, 96])
def test_gradients_in_16_bits_are_exact_to_16_bits(monkeypatch, rows):
    monkeypatch.setattr(Attention16, "ROWS", rows)
    generator = torch.Generator().manual_seed(0)
    # Heads are beside the channels in memory, as the projections give them.
    q, k, v, grad = (torch.randn(2, n, 3, 24, generator=generator).bfloat16() for n in (200, 160, 160, 200))

    def gradients(attention, dtype):
        parts = [t.to(dtype).transpose(1, 2).requires_grad_() for t in (q, k, v)]
        out = attention(*parts)
        return [out.detach(), *torch.autograd.grad(out, parts, grad.to(dtype).transpose(1, 2))]

    expected = gradients(nn.functional.scaled_dot_product_attention, torch.float32)
    for wanted, found in zip(expected, gradients(attend, torch.bfloat16), strict=True):
        assert found.dtype == torch.bfloat16
        assert found.shape == wanted.shape
        assert (found - wanted).norm() < 1e-2 * wanted.norm()


def test_masked_positions_have_no_influence():
    layer, x, context = CrossAttention(8, 4, 2, 4), torch.randn(2, 5, 8), torch.randn(2, 6, 4)
    mask = torch.tensor([[True, False, True, True, False, True], [True] * 6])
    changed = context.masked_fill(~mask[..., None], 100.0)
    assert_close(layer(x, changed, mask), layer(x, context, mask))
    assert_close(layer(x, context, mask)[1:], layer(x[1:], context[1:]))


def test_a_mask_may_be_a_picture():
    layer, x, context = CrossAttention(8, 4, 2, 4), torch.randn(2, 5, 8), torch.randn(2, 6, 4)
    mask = torch.rand(2, 2, 3) < 0.7
    assert torch.equal(layer(x, context, mask), layer(x, context, mask.flatten(1)))


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 5, dtype=torch.bool), torch.ones(1, 6, dtype=torch.bool), torch.ones(2, 6)]
)
def test_a_wrong_mask_is_refused(mask):
    with pytest.raises(ValueError, match="boolean with 6 entries for each of 2 samples"):
        CrossAttention(8, 4, 2, 4)(torch.randn(2, 5, 8), torch.randn(2, 6, 4), mask)


def test_a_missing_or_misfitting_context_is_refused():
    layer = CrossAttention(8, 4, 2, 4)
    with pytest.raises(ValueError, match="width 4, but no context was given"):
        layer(torch.randn(2, 5, 8))
    with pytest.raises(ValueError, match="width 4, but the context has width 3"):
        layer(torch.randn(2, 5, 8), torch.randn(2, 6, 3))
    with pytest.raises(ValueError, match="3 contexts for 2 transformer blocks"):
        SpatialTransformer(32, 2, 16, depth=2, context_dim=4)(torch.randn(1, 32, 2, 2), [torch.randn(1, 1, 4)] * 3)
    with pytest.raises(ValueError, match="names 3 widths for 2"):
        SpatialTransformer(32, 2, 16, depth=2, context_dim=[4, 4, 4])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_attention_qualifies_for_the_fused_kernel(memory_format):
    """The kernel with linear memory refuses some strides and masks; then the quadratic one would silently step in."""
    image = torch.randn(2, 32, 8, 8).to(memory_format=memory_format)
    context = torch.randn(2, 5, 12)
    mask = torch.rand(2, 5) < 0.5
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        SpatialTransformer(32, 2, 16, context_dim=12)(image, context).sum().backward()
        SpatialSelfAttention(32)(image).sum().backward()
        CrossAttention(32, 12, 2, 16)(image.flatten(2).transpose(1, 2), context, mask).sum().backward()


def test_linear_projections_differ_from_convolutions_in_the_weight_shape_alone():
    conv = randomise(SpatialTransformer(32, 2, 16, context_dim=12))
    linear = SpatialTransformer(32, 2, 16, context_dim=12, use_linear=True)
    assert conv.proj_in.weight.shape == (32, 32, 1, 1)
    assert linear.proj_in.weight.shape == linear.proj_out.weight.shape == (32, 32)
    linear.load_state_dict({k: v.reshape(linear.state_dict()[k].shape) for k, v in conv.state_dict().items()})
    image, context = torch.randn(2, 32, 4, 6), torch.randn(2, 5, 12)
    assert torch.equal(conv(image, context), linear(image, context))


def test_each_block_may_have_its_own_context():
    module = randomise(SpatialTransformer(32, 2, 16, depth=2, context_dim=[12, 7])).eval()
    image, first, second = torch.randn(2, 32, 4, 4), torch.randn(2, 5, 12), torch.randn(2, 3, 7)
    tokens = module.proj_in(module.norm(image).flatten(2).transpose(1, 2))
    tokens = module.transformer_blocks[1](module.transformer_blocks[0](tokens, first), second)
    expected = image + module.proj_out(tokens).transpose(1, 2).reshape(image.shape)
    assert_close(module(image, [first, second]), expected)


@pytest.mark.parametrize("build", [lambda: SpatialTransformer(32, 2, 16), lambda: SpatialSelfAttention(32)])
def test_feature_maps_keep_their_memory_format(build):
    module = randomise(build())
    image = torch.randn(2, 32, 4, 6)
    out = module(image.to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert module(image).is_contiguous()
    assert_close(out, module(image))


def test_checkpointing_changes_no_gradient():
    x, context = torch.randn(2, 5, 16, requires_grad=True), torch.randn(2, 3, 8, requires_grad=True)
    block = randomise(BasicTransformerBlock(16, 2, 8, dropout=0.3, context_dim=8))
    gradients = []
    for checkpoint in (False, True):
        block.checkpoint = checkpoint
        torch.manual_seed(1)
        out = block(x, context)
        gradients.append([out, *torch.autograd.grad(out.square().sum(), [x, context, *block.parameters()])])
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


class TestCachedContext:
    @pytest.fixture
    def module(self):
        return randomise(SpatialTransformer(32, 2, 16, depth=2, context_dim=12)).eval()

    @pytest.fixture
    def calls(self, module):
        """How often each block has projected a context to keys."""
        counts = [0, 0]
        for i, block in enumerate(module.transformer_blocks):

            def count(*_, i=i):
                counts[i] += 1

            block.attn2.to_k.register_forward_hook(count)
        return counts

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_projects_once_and_changes_nothing(self, module, calls, mode):
        images, context = torch.randn(3, 2, 32, 4, 4), torch.randn(2, 5, 12)
        with mode():
            plain = [module(image, context) for image in images]
            assert calls == [3, 3]
            with cached_context(module):
                cached = [module(image, context) for image in images]
            assert calls == [4, 4]
            module(images[0], context)
            assert calls == [5, 5]  # off again outside
        assert all(torch.equal(a, b) for a, b in zip(plain, cached, strict=True))

    @torch.no_grad()
    def test_tells_contexts_apart(self, module, calls):
        image, first, second = torch.randn(2, 32, 4, 4), torch.randn(2, 5, 12), torch.randn(2, 3, 12)
        expected = [module(image, context) for context in (first, second)]
        with cached_context(module):
            for _ in range(2):
                for context, out in zip((first, second), expected, strict=True):
                    assert torch.equal(module(image, context), out)
        assert calls == [4, 4]

    @torch.no_grad()
    def test_notices_a_change_in_place(self, module):
        image, context = torch.randn(2, 32, 4, 4), torch.randn(2, 5, 12)
        with cached_context(module):
            module(image, context)
            context.mul_(2)
            changed = module(image, context)
        assert torch.equal(changed, module(image, context))

    @torch.no_grad()
    def test_notices_another_precision(self, module):
        image, context = torch.randn(2, 32, 4, 4), torch.randn(2, 5, 12)
        with cached_context(module):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                module(image, context)
            assert torch.equal(module(image, context), module(image, context.clone()))

    def test_does_not_apply_where_gradients_are_on(self, module, calls):
        image, context = torch.randn(2, 32, 4, 4), torch.randn(2, 5, 12, requires_grad=True)
        with cached_context(module):
            for _ in range(2):
                (gradient,) = torch.autograd.grad(module(image, context).sum(), context)
                assert gradient.abs().sum() > 0
        assert calls == [2, 2]

    @torch.no_grad()
    def test_forgets_old_contexts(self, module):
        image = torch.randn(2, 32, 4, 4)
        with cached_context(module):
            for _ in range(9):
                module(image, torch.randn(2, 5, 12))
            cache = module.transformer_blocks[0].attn2.context_cache
            assert len(cache.entries) == cache.size

    def test_ends_with_an_error(self, module):
        def fail():
            with cached_context(module):
                raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            fail()
        assert module.transformer_blocks[0].attn2.context_cache is None
