"""UNets: published numbers, every option, checkpointing, dtypes, inputs that are refused."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn import functional

from ldm.modules.diffusionmodules import convolution, openaimodel
from ldm.modules.diffusionmodules.openaimodel import (
    AttentionBlock,
    AttentionPool2d,
    Downsample,
    EncoderUNetModel,
    ResBlock,
    UNetModel,
)
from ldm.modules.diffusionmodules.util import checkpoint, conv_nd, normalization, timestep_embedding
from ldm.util import get_obj_from_str
from tests.conftest import GOLDEN, assert_close

GOLDEN_UNETS = sorted(path.stem for path in GOLDEN.glob("unet_*.json") if path.stem != "unet_blocks")
GOLDEN_BLOCKS = json.loads((GOLDEN / "unet_blocks.json").read_text())["blocks"]
RESAMPLING = {  # constructor arguments that the reference file leaves out
    "up_conv": {"channels": 32, "use_conv": True},
    "up_noconv": {"channels": 32, "use_conv": False},
    "up_conv_out16": {"channels": 32, "use_conv": True, "out_channels": 16},
    "down_conv": {"channels": 32, "use_conv": True},
    "down_noconv": {"channels": 32, "use_conv": False},
    "transposed_up": {"channels": 32},
}
TINY = {
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "attention_resolutions": [2],
    "num_heads": 2,
}
TEXT = {**TINY, "use_spatial_transformer": True, "context_dim": 12}


def build(cls=UNetModel, seed=0, **options):
    """A small network in which no branch is hidden behind zero weights."""
    torch.manual_seed(seed)
    model = cls(**{**TINY, **options})
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape) * 0.05)
    return model.eval()


def inputs(model, size=8, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    dims, kwargs = model.dims, {}
    x = torch.randn(batch, model.in_channels, *[size] * dims, generator=generator)
    if model.context_dim is not None:
        kwargs["context"] = torch.randn(batch, 5, model.context_dim, generator=generator)
    if model.num_classes is not None:
        kwargs["y"] = torch.arange(batch) % model.num_classes
    return {"x": x, "timesteps": torch.linspace(3, 900, batch).long(), **kwargs}


@pytest.mark.parametrize("name", GOLDEN_UNETS)
def test_unets_equal_the_published_numbers(golden, name):
    case = golden(name)
    model = get_obj_from_str(case.meta["cls"])(**case.meta["init"]).eval()
    model.load_state_dict(case.sd)
    given = {k[3:]: v for k, v in case.tensors.items() if k.startswith("in.") and k != "in.cotangent"}
    wanted = {k[5:]: v for k, v in case.tensors.items() if k.startswith("grad.")}
    for key in wanted:
        given[key].requires_grad_()
    out = model(**given)
    assert_close(out, case["out"], name="out")
    (out * case["in.cotangent"]).sum().backward()
    for key, expected in wanted.items():
        assert_close(given[key].grad, expected, name=f"gradient of {key}")


@pytest.mark.parametrize("name", GOLDEN_BLOCKS)
def test_blocks_equal_the_published_numbers(golden, name):
    case, meta = golden("unet_blocks"), GOLDEN_BLOCKS[name]
    module = getattr(openaimodel, meta["cls"])(**meta.get("init", RESAMPLING.get(name, {})))
    prefix = f"{name}.sd."
    module.load_state_dict({k.removeprefix(prefix): v for k, v in case.tensors.items() if k.startswith(prefix)})
    arguments = [case["in.x"], case["in.emb"]] if "in.emb" in meta["call"] else [case["in.x"]]
    assert_close(module(*arguments), case[f"{name}.out"], name=name)


def test_step_embedding_equals_the_published_numbers(golden):
    case = golden("timestep_embedding")
    # The float32 exp of one processor differs from another's in the last bit, which t = 999 turns into 6e-5.
    for dim in (32, 33, 320):
        ours = timestep_embedding(case["in.timesteps"], dim)
        assert_close(ours, case[f"out.timestep_embedding_{dim}"], rel=1e-4, name=str(dim))
    ours = timestep_embedding(torch.tensor([0.5, 3.25]), 16, max_period=100)
    assert_close(ours, case["out.timestep_embedding_16_fractional_maxperiod100"])
    ours = timestep_embedding(case["in.timesteps"][:3], 8, repeat_only=True)
    assert_close(ours, case["out.timestep_embedding_8_repeat_only"])


OPTIONS = {
    "no attention but in the middle": {"attention_resolutions": []},
    "wide stem": {"channel_mult": [2, 2]},
    "one level": {"channel_mult": [1]},
    "scale and shift": {"use_scale_shift_norm": True, "resblock_updown": True},
    "averaging": {"conv_resample": False},
    "head width": {"num_heads": -1, "num_head_channels": 16},
    "head width, transformer": {**TEXT, "num_heads": -1, "num_head_channels": 16, "legacy": True},
    "SD 1": {**TEXT, "use_checkpoint": True, "legacy": False},
    "SD 2": {
        **TEXT,
        "num_heads": -1,
        "num_head_channels": 16,
        "use_linear_in_transformer": True,
        "use_fp16": True,
        "use_checkpoint": True,
        "legacy": False,
    },
    "deep transformer": {**TEXT, "transformer_depth": 3},
    "classes": {"num_classes": 5, "num_heads_upsample": 4},
    "classes and context": {**TEXT, "num_classes": 5},
    "new order": {"use_new_attention_order": True, "legacy": False},
    "codebook": {"n_embed": 7},
    "dropout": {"dropout": 0.2},
    "published, off": {
        "disable_self_attentions": None,
        "num_attention_blocks": None,
        "disable_middle_self_attn": False,
    },
    "sequence": {"dims": 1},
    "volume": {"dims": 3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_trains(options):
    model = build(**options).train()
    given = inputs(model)
    out = model(**given)
    assert out.shape == (2, options.get("n_embed", 4), *given["x"].shape[2:])
    out.square().mean().backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    if "n_embed" in options:  # the published layout keeps the output convolution beside the id predictor
        unused = {name for name in unused if not name.startswith("out.")}
    assert not unused


def test_a_meta_build_costs_nothing_and_runs():
    with torch.device("meta"):
        model = UNetModel(
            image_size=32,
            in_channels=4,
            out_channels=4,
            model_channels=320,
            attention_resolutions=[4, 2, 1],
            num_res_blocks=2,
            channel_mult=[1, 2, 4, 4],
            num_head_channels=64,
            use_spatial_transformer=True,
            use_linear_in_transformer=True,
            context_dim=1024,
            use_fp16=True,
            use_checkpoint=True,
            legacy=False,
        )
        given = {"x": torch.empty(2, 4, 64, 64), "timesteps": torch.empty(2), "context": torch.empty(2, 77, 1024)}
        assert model(**given).shape == (2, 4, 64, 64)
    assert sum(p.numel() for p in model.parameters()) == 865_910_724
    assert model.state_dict()["input_blocks.1.1.proj_in.weight"].shape == (320, 320)


@pytest.mark.parametrize(
    ("options", "encoder", "decoder"),
    [
        ({"num_heads": 4}, 4, 4),
        ({"num_heads": 4, "num_heads_upsample": 2}, 4, 2),
        ({"num_heads": 4, "num_heads_upsample": 2, "legacy": False}, 4, 4),
        ({"num_heads": 4, "num_head_channels": 32}, 2, 2),
        ({"num_heads": -1, "num_head_channels": 16}, 4, 4),
    ],
)
def test_head_rules_of_plain_attention(options, encoder, decoder):
    model = build(**options)  # 64 channels where attention is
    blocks = [m for m in model.modules() if isinstance(m, AttentionBlock)]
    assert [block.num_heads for block in blocks] == [encoder, encoder, decoder, decoder]


@pytest.mark.parametrize(
    ("options", "heads", "inner"),
    [
        ({"num_heads": 4}, 4, 64),
        ({"num_heads": 4, "legacy": False}, 4, 64),
        ({"num_heads": -1, "num_head_channels": 16}, 4, 64),
        ({"num_heads": -1, "num_head_channels": 24}, 2, 64),
        ({"num_heads": -1, "num_head_channels": 24, "legacy": False}, 2, 48),
    ],
)
def test_head_rules_of_transformers(options, heads, inner):
    attention = build(**{**TEXT, **options}).middle_block[1].transformer_blocks[0].attn1
    assert attention.heads == heads
    assert attention.to_q.weight.shape == (inner, inner)


@pytest.mark.parametrize("options", [{"padding": 1}, {"padding": 1, "stride": 2}, {"padding": (0, 2)}, {"bias": False}])
def test_convolutions_of_few_pixels_equal_those_of_many(monkeypatch, options):
    conv = conv_nd(2, 6, 8, 3, **options).requires_grad_(False)
    x = torch.randn(3, 6, 5, 8, requires_grad=True)
    expected = nn.Conv2d.forward(conv, x)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), x)
    monkeypatch.setattr(convolution, "MANY_WEIGHTS", 0)
    monkeypatch.setattr(convolution, "CHANNELS_PER_PIXEL", 0)
    monkeypatch.setattr(nn.Conv2d, "forward", None)  # is not what answers
    actual = conv(x)
    (gradient,) = torch.autograd.grad(actual.square().sum(), x)
    assert actual.is_contiguous()
    assert_close(actual, expected, 1e-6)
    assert_close(gradient, expected_gradient, 1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"groups": 2}, {"dilation": 2}, {"padding_mode": "circular"}, {"padding": "same"}]
)
def test_other_convolutions_are_those_of_the_library(monkeypatch, options):
    monkeypatch.setattr(convolution, "MANY_WEIGHTS", 0)
    monkeypatch.setattr(convolution, "CHANNELS_PER_PIXEL", 0)
    conv = conv_nd(2, 6, 8, 3, **options).requires_grad_(not options)  # weights that train, or an unusual option
    x = torch.randn(1, 6, 8, 8)
    assert_close(conv(x), nn.Conv2d.forward(conv, x), 1e-6)
    if not options:
        conv(x).sum().backward()
        assert conv.weight.grad is not None


@pytest.mark.parametrize(
    ("batch", "height", "width", "bias"), [(1, 8, 8, True), (3, 4, 10, True), (2, 2, 2, False), (5, 6, 4, False)]
)
def test_winograd_equals_the_direct_sum(monkeypatch, batch, height, width, bias):
    conv = conv_nd(2, 6, 9, 3, padding=1, bias=bias).requires_grad_(False)
    x = torch.randn(batch, 6, height, width, requires_grad=True)
    expected = nn.Conv2d.forward(conv, x)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), x)
    monkeypatch.setattr(convolution, "WINOGRAD_CHANNELS", 1)
    monkeypatch.setattr(convolution, "WINOGRAD_TILES", 1)
    monkeypatch.setattr(convolution, "TILES_AT_ONCE", 12)  # batches are done in parts ...
    monkeypatch.setattr(convolution, "NUMBERS_AT_ONCE", 16 * 6 * 4)  # ... and so are kernels
    monkeypatch.setattr(nn.Conv2d, "forward", None)  # is not what answers
    actual = conv(x)
    (gradient,) = torch.autograd.grad(actual.square().sum(), x)
    assert actual.is_contiguous()
    assert_close(actual, expected, 2e-6)
    assert_close(gradient, expected_gradient, 1e-5)
    with torch.inference_mode():
        assert_close(conv(x), expected, 2e-6)
    assert_close(conv(x.contiguous(memory_format=torch.channels_last)), expected, 2e-6)


def test_winograd_at_full_size_is_as_near_to_the_exact_sum(monkeypatch):
    conv = conv_nd(2, 320, 320, 3, padding=1).requires_grad_(False)
    x = torch.randn(1, 320, 32, 32)
    exact = functional.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    monkeypatch.setattr(nn.Conv2d, "forward", None)
    assert_close(conv(x), exact.float(), 2e-6)


@pytest.mark.parametrize(
    ("options", "size"), [({}, (7, 8)), ({"stride": 2}, (8, 8)), ({"padding": 0}, (8, 8)), ({"groups": 2}, (8, 8))]
)
def test_winograd_leaves_the_rest_to_the_library(monkeypatch, options, size):
    monkeypatch.setattr(convolution, "WINOGRAD_CHANNELS", 1)
    monkeypatch.setattr(convolution, "WINOGRAD_TILES", 1)
    monkeypatch.setattr(convolution, "_winograd", None)
    conv = conv_nd(2, 6, 8, 3, **{"padding": 1, **options}).requires_grad_(False)
    x = torch.randn(2, 6, *size)
    assert_close(conv(x), nn.Conv2d.forward(conv, x), 1e-6)


def test_winograd_does_not_take_16_bits(monkeypatch):
    monkeypatch.setattr(convolution, "WINOGRAD_CHANNELS", 1)
    monkeypatch.setattr(convolution, "WINOGRAD_TILES", 1)
    monkeypatch.setattr(convolution, "_winograd", None)
    conv = conv_nd(2, 6, 8, 3, padding=1).requires_grad_(False)
    x = torch.randn(1, 6, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16
    assert conv.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_takes_any_size_that_the_levels_divide():
    model = build(**TEXT)
    x = torch.randn(1, 4, 6, 10)
    assert model(x, torch.tensor([5]), torch.randn(1, 3, 12)).shape == x.shape


def test_samples_of_a_batch_do_not_mix():
    model = build(**TEXT)
    given = inputs(model, batch=3)
    alone = model(**{k: v[1:2] for k, v in given.items()})
    assert_close(alone, model(**given)[1:2])


def gradients(model, given, wanted):
    given = {k: v.detach().requires_grad_() if k in wanted else v for k, v in given.items()}
    torch.manual_seed(7)
    out = model(**given)
    inner = [p for p in model.parameters() if p.requires_grad]
    return [out, *torch.autograd.grad(out.square().sum(), [*inner, *(given[k] for k in wanted)])]


class TestCheckpointing:
    @pytest.fixture(params=["transformer", "attention"])
    def pair(self, request):
        """The same network with and without checkpointing."""
        options = TEXT if request.param == "transformer" else {"num_classes": 5}
        plain, again = build(dropout=0.1, **options), build(dropout=0.1, use_checkpoint=True, **options)
        return plain.train(), again.train()

    @pytest.mark.parametrize("frozen", [False, True])
    @pytest.mark.parametrize("wanted", [["x"], ["context"], ["x", "context"]])
    def test_gradients_are_equal(self, pair, frozen, wanted):
        if pair[0].context_dim is None and "context" in wanted:
            wanted = ["x"]
        given = inputs(pair[0])
        results = []
        for model in pair:
            model.requires_grad_(not frozen)
            results.append(gradients(model, given, wanted))
        for plain, again in zip(*results, strict=True):
            assert_close(again, plain, rel=1e-6)

    def test_stores_less(self, pair):
        stored = []
        for model in pair:
            sizes = []

            def pack(tensor, sizes=sizes):
                sizes.append(tensor.numel())
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                model(**inputs(model))
            stored.append(sum(sizes))
        assert stored[1] < 0.5 * stored[0]

    def test_computes_twice_only_when_a_backward_pass_needs_it(self, pair):
        model = pair[1]
        calls = []
        block = next(m for m in model.middle_block.modules() if isinstance(m, ResBlock))
        block.in_layers[2].register_forward_hook(lambda *_: calls.append(1))
        given = inputs(model)
        with torch.no_grad():
            model(**given)
        assert len(calls) == 1
        model.requires_grad_(False)
        model(**given)  # gradients are on, but nothing asks for them
        assert len(calls) == 2
        model(**{**given, "x": given["x"].requires_grad_()}).sum().backward()
        assert len(calls) == 4

    def test_off_by_flag(self):
        calls = []
        x = torch.ones(1, requires_grad=True)

        def double(x):
            calls.append(1)
            return (2 * x).square()

        checkpoint(double, x, enabled=False).backward()
        assert len(calls) == 1
        checkpoint(double, x, enabled=True).backward()
        assert len(calls) == 3


def test_a_frozen_unet_gives_gradients_to_the_context_alone():
    model = build(**TEXT, use_checkpoint=True).requires_grad_(False)
    given = inputs(model)
    given["context"].requires_grad_()
    model(**given).sum().backward()
    assert given["context"].grad.abs().sum() > 0
    assert given["x"].grad is None
    assert all(p.grad is None for p in model.parameters())


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("options", [TEXT, {"num_classes": 5, "use_scale_shift_norm": True}], ids=["text", "class"])
    def test_half_precision_weights(self, dtype, options):
        model = build(**options)
        given = inputs(model)
        with torch.no_grad():
            expected = model(**given)
            model.to(dtype)
            out = model(**given)
            assert model.dtype == dtype
            assert out.dtype == torch.float32  # the dtype of x, whatever the weights'
            assert_close(out, expected, rel=0.05)
            assert model(**{**given, "x": given["x"].to(dtype)}).dtype == dtype

    @pytest.mark.parametrize("options", [TEXT, {"num_classes": 5, "use_scale_shift_norm": True}], ids=["text", "class"])
    def test_autocast(self, options):
        model = build(**options, use_checkpoint=True)
        given = inputs(model)
        expected = model(**given)
        given["x"].requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(**given)
        assert out.dtype == torch.float32
        assert_close(out.detach(), expected.detach(), rel=0.05)
        out.sum().backward()
        assert given["x"].grad.isfinite().all()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())

    def test_double_precision(self):
        model = build(**TEXT)
        given = inputs(model)
        expected = model(**given)
        assert_close(model.double()(**{**given, "x": given["x"].double()}), expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_group_norm_computes_in_float32(self, dtype):
        x = (1000 + torch.randn(2, 64, 16, 16)).to(dtype)  # a mean and variance that half precision cannot hold
        norm = normalization(64)
        expected = norm(x.float())
        ulp = torch.finfo(dtype).eps * expected.abs().max()
        for module in (norm, norm.to(dtype)):
            out = module(x)
            assert out.dtype == dtype
            assert (out.float() - expected).abs().max() <= ulp

    def test_channels_last(self):
        model = build(**TEXT)
        given = inputs(model)
        expected = model(**given)
        model.to(memory_format=torch.channels_last)
        out = model(**{**given, "x": given["x"].to(memory_format=torch.channels_last)})
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert_close(out, expected)


class TestRefusedInputs:
    @pytest.mark.parametrize(
        ("options", "change", "message"),
        [
            (TEXT, {"context": None}, "context_dim=12, but for the context none was given"),
            ({}, {"context": torch.zeros(2, 5, 12)}, "context_dim=None, but for the context one was given"),
            (TEXT, {"context": torch.zeros(1, 5, 12)}, "with B=2"),
            (TEXT, {"context": torch.zeros(2, 12)}, r"not \(2, 12\)"),
            (TEXT, {"context": torch.zeros(2, 5, 11)}, "width 12, but the context has width 11"),
            ({"num_classes": 5}, {"y": None}, "num_classes=5, but no labels y"),
            ({}, {"y": torch.zeros(2, dtype=torch.long)}, "num_classes=None, but labels y were given"),
            ({"num_classes": 5}, {"y": torch.zeros(3, dtype=torch.long)}, r"labels y are integers \(2,\)"),
            ({"num_classes": 5}, {"y": torch.zeros(2)}, "not torch.float32"),
            ({}, {"x": torch.zeros(2, 4, 8, 7)}, r"\(8, 7\) are not multiples of 2"),
            ({}, {"x": torch.zeros(2, 3, 8, 8)}, "takes 4 channels"),
            ({}, {"x": torch.zeros(4, 8, 8)}, "2 spatial axes"),
            ({}, {"timesteps": None}, r"shape \(2,\), one for each sample, not None"),
            ({}, {"timesteps": torch.tensor(3)}, "timesteps are a tensor"),
        ],
    )
    def test_calls(self, options, change, message):
        model = build(**options)
        with pytest.raises(ValueError, match=message):
            model(**{**inputs(model), **change})

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_heads": -1}, "num_heads or num_head_channels"),
            ({"use_spatial_transformer": True}, "a transformer needs the width"),
            ({"context_dim": 12}, "only it uses a context"),
            ({"model_channels": 40}, "multiple of 32"),
            ({"num_heads": 3}, "64 channels do not split into heads: num_heads=3"),
            ({"num_head_channels": 24}, "num_head_channels=24"),
            ({"dims": 4}, "dims=4"),
            ({"disable_self_attentions": [True]}, r"disable_self_attentions=\[True\]: this published option"),
            ({"num_attention_blocks": [1, 2]}, r"num_attention_blocks=\[1, 2\]"),
            ({"disable_middle_self_attn": True}, "disable_middle_self_attn=True"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            UNetModel(**{**TINY, **options})

    def test_blocks(self):
        with pytest.raises(ValueError, match="up=True and down=True"):
            ResBlock(32, 16, 0.0, up=True, down=True)
        with pytest.raises(ValueError, match="cannot turn 32 channels into 64"):
            Downsample(32, False, out_channels=64)
        with pytest.raises(ValueError, match="Downsample of 32 channels"):
            Downsample(32, True)(torch.zeros(1, 3, 4, 4))
        with pytest.raises(ValueError, match="dims=0"):
            conv_nd(0, 1, 1, 1)
        with pytest.raises(ValueError, match="4 pixels"):
            AttentionPool2d(2, 32, 16)(torch.zeros(1, 32, 3, 3))

    def test_a_misspelt_option_is_refused(self):
        with pytest.raises(TypeError, match="num_head_chanels"):
            UNetModel(**TINY, num_head_chanels=8)


class TestEncoder:
    @pytest.mark.parametrize(
        ("pool", "keys"),
        [
            ("adaptive", {"0.weight", "0.bias", "3.weight", "3.bias"}),
            (
                "attention",
                {"0.weight", "0.bias", "2.positional_embedding"}
                | {f"2.{part}.{kind}" for part in ("qkv_proj", "c_proj") for kind in ("weight", "bias")},
            ),
            ("spatial", {"0.weight", "0.bias", "2.weight", "2.bias"}),
            ("spatial_v2", {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"}),
        ],
    )
    def test_pools(self, pool, keys):
        model = build(EncoderUNetModel, out_channels=10, num_head_channels=16, pool=pool)
        assert {k.removeprefix("out.") for k in model.state_dict() if k.startswith("out.")} == keys
        x = torch.randn(3, 4, 8, 8)
        out = model(x, torch.tensor([1, 10, 100]))
        assert out.shape == (3, 10)
        out.square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        model.bfloat16()
        assert_close(model(x, torch.tensor([1, 10, 100])).detach(), out.detach(), rel=0.1)

    def test_spatial_features_are_the_means_of_all_blocks(self):
        model = build(EncoderUNetModel, out_channels=3, pool="spatial")
        assert model.out[0].in_features == 32 + 32 + 32 + 64 + 64

    def test_shares_the_weights_of_a_unet(self):
        unet, encoder = build(), build(EncoderUNetModel)
        shared = {k: v for k, v in unet.state_dict().items() if not k.startswith(("out.", "output_blocks."))}
        missing, unexpected = encoder.load_state_dict(shared, strict=False)
        assert not unexpected
        assert all(key.startswith("out.") for key in missing)

    def test_refused_options(self):
        with pytest.raises(ValueError, match="pool='max' is not one of"):
            EncoderUNetModel(**TINY, pool="max")
        with pytest.raises(ValueError, match="set num_head_channels"):
            EncoderUNetModel(**TINY, pool="attention")
        with pytest.raises(ValueError, match="timesteps are a tensor"):
            build(EncoderUNetModel)(torch.zeros(2, 4, 8, 8), torch.zeros(2, 1))

    def test_attention_pooling_is_attention_of_the_mean(self):
        torch.manual_seed(0)
        pool = AttentionPool2d(2, 32, 16, 5)
        x = torch.randn(3, 32, 2, 2)
        tokens = torch.cat([x.mean((2, 3))[..., None], x.flatten(2)], 2) + pool.positional_embedding  # (B, C, 5)
        q, k, v = nn.functional.conv1d(tokens, pool.qkv_proj.weight, pool.qkv_proj.bias).chunk(3, 1)
        q, k, v = (part.reshape(3, 2, 16, 5) for part in (q, k, v))
        weights = (torch.einsum("bhdn,bhdm->bhnm", q, k) / 4).softmax(-1)
        out = torch.einsum("bhnm,bhdm->bhdn", weights, v).reshape(3, 32, 5)
        expected = nn.functional.conv1d(out, pool.c_proj.weight, pool.c_proj.bias)[:, :, 0]
        assert_close(pool(x), expected)
