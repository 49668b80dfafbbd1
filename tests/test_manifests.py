"""State dicts have the published layout, key by key with dtype and shape: weights load here and there."""

from __future__ import annotations

import gzip
import json
import re
from typing import Any

import pytest

from tests.conftest import DATA
from tests.meta_models import build_on_meta

MANIFESTS: dict[str, dict[str, str]] = json.loads(
    gzip.decompress((DATA / "manifests" / "manifests.json.gz").read_bytes())
)

WITH_EMA = {"model.params.use_ema": True}
TOKENS = "ldm.modules.embedding_manager.EmbeddingManager"
CONFIGS = "configs/latent-diffusion/"
SD = "configs/stable-diffusion/"
# manifest: (config, what was set on top of it)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ti_txt2img-1p4B-finetune": (CONFIGS + "txt2img-1p4B-finetune.yaml", {}),
    "ti_txt2img-1p4B-eval_with_tokens": (CONFIGS + "txt2img-1p4B-eval_with_tokens.yaml", {}),
    "ti_txt2img-1p4B-eval_ema_unfrozen": (
        CONFIGS + "txt2img-1p4B-eval.yaml",
        WITH_EMA
        | {
            "model.params.unfreeze_model": True,
            "model.params.personalization_config": {"target": TOKENS, "params": {"placeholder_strings": ["*"]}},
        },
    ),
    "ld_txt2img-1p4B-eval": (CONFIGS + "txt2img-1p4B-eval.yaml", {}),
    "ld_txt2img-1p4B-eval_ema": (CONFIGS + "txt2img-1p4B-eval.yaml", WITH_EMA),
    "ld_cin256-v2": (CONFIGS + "cin256-v2.yaml", {}),
    "ti_sd-v1-finetune": (SD + "v1-finetune.yaml", {}),
    "ti_sd-v1-finetune_unfrozen": (SD + "v1-finetune_unfrozen.yaml", {}),
    "ti_sd-v1-inference": (SD + "v1-inference.yaml", {}),
    "sd_v1-inference": (SD + "v1-inference-plain.yaml", {}),
    "sd_v1-inference_ema": (SD + "v1-inference-plain.yaml", WITH_EMA),
    "sd2_v2-inference": (SD + "v2-inference.yaml", {}),
    "sd2_v2-inference-v": (SD + "v2-inference-v.yaml", {}),
    "sd2_v2-inpainting-inference": (SD + "v2-inpainting-inference.yaml", {}),
    **{
        manifest: (f"models/{folder}/{manifest.removeprefix(prefix)}/config.yaml", {})
        for prefix, folder in (("ldm_", "ldm"), ("first_stage_", "first_stage_models"))
        for manifest in MANIFESTS
        if manifest.startswith(prefix)
    },
}

# Schedule buffers, which the Stable Diffusion 2 manifests leave out.
SCHEDULE = re.compile(r"[a-z0-9_]*(betas|alphas|alphas_cumprod|posterior)[a-z0-9_]*")


def test_every_manifest_has_its_case():
    assert sorted(CASES) == sorted(MANIFESTS)


@pytest.mark.parametrize("manifest", CASES)
def test_state_dict_is_the_published_one(manifest: str):
    name, overrides = CASES[manifest]
    state = build_on_meta(name, overrides).state_dict()
    actual = {k: " ".join([str(v.dtype).removeprefix("torch."), *map(str, v.shape)]) for k, v in state.items()}
    if manifest.startswith("sd2_"):
        actual = {k: v for k, v in actual.items() if not SCHEDULE.fullmatch(k)}
    expected = MANIFESTS[manifest]
    missing, extra = sorted(expected.keys() - actual.keys()), sorted(actual.keys() - expected.keys())
    assert not missing, f"{len(missing)} keys are missing: {missing[:5]} ..."
    assert not extra, f"{len(extra)} keys were never published: {extra[:5]} ..."
    differing = [f"{k}: {actual[k]} instead of {expected[k]}" for k in expected if actual[k] != expected[k]]
    assert not differing, f"{len(differing)} tensors differ: {differing[:5]} ..."
