"""The configs of a diffusers folder and the config of a LatentDiffusion, each made from the other.

Only models of the Stable Diffusion 1 and 2 kind have both; any option that one side cannot express is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.checkpoint_folder import read_json
from ldm.checkpoint_formats import CheckpointError

Config = dict[str, Any]

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SCHEDULES = {"scaled_linear": "linear", "linear": "sqrt_linear", "squaredcos_cap_v2": "cosine"}
INPAINTING_CHANNELS = 9  # noisy latent, mask, masked latent
GROUPS = 32
# Options of diffusers' networks that the original ones do not have, with the values that mean "not used".
UNET_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "addition_embed_type": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "norm_eps": (1e-5,),
    "norm_num_groups": (GROUPS,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
}
# The largest sizes that any such model could have: a config must not be able to ask for endless work or memory.
LIMITS = {
    "block_out_channels": 1 << 14,
    "cross_attention_dim": 1 << 14,
    "hidden_size": 1 << 14,
    "in_channels": 1 << 10,
    "intermediate_size": 1 << 16,
    "latent_channels": 1 << 10,
    "layers_per_block": 16,
    "max_position_embeddings": 1 << 12,
    "num_hidden_layers": 128,
    "num_train_timesteps": 1 << 20,
    "out_channels": 1 << 10,
    "transformer_layers_per_block": 32,
    "vocab_size": 1 << 20,
}
FIRST_STAGE_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "mid_block_add_attention": (True,),
    "norm_num_groups": (GROUPS,),
    "shift_factor": (None,),
    "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}


def config_of_folder(path: str | Path) -> Config:
    """The config `{target, params}` of the model in a diffusers folder, from its JSON files.

    Raises `CheckpointError` with the option in question when the model is of another kind.
    """
    path = Path(path)
    parts = {part: read_json(path / part / "config.json") for part in ("unet", "vae", "text_encoder")}
    lacking = [part for part, found in parts.items() if not found]
    if lacking:
        raise CheckpointError(f"{path} has no {lacking[0]}/config.json: is it a whole Stable Diffusion folder?")
    scheduler = read_json(path / "scheduler" / "scheduler_config.json")
    for config in (*parts.values(), scheduler):
        _check_sizes(path, config)
    try:
        return _model_config(parts["unet"], parts["vae"], parts["text_encoder"], scheduler)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is no Stable Diffusion 1 or 2 model: {error}") from error
    except (KeyError, TypeError, ValueError, ZeroDivisionError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{path}: its configs lack something or contradict each other ({error})") from error


def _check_sizes(path: Path, config: Config) -> None:
    for key, most in LIMITS.items():
        value = config.get(key)
        values = value if isinstance(value, list) else [value]
        if len(values) > 16 or any(isinstance(v, (int, float)) and not 1 <= v <= most for v in values):
            raise CheckpointError(f"{path}: {key} is {str(value)[:100]} in its configs, which no such model has")


def _model_config(unet: Config, vae: Config, text: Config, scheduler: Config) -> Config:
    channels = int(vae["latent_channels"])
    inputs = int(unet["in_channels"])
    inpaints = inputs != channels
    if inputs not in (channels, INPAINTING_CHANNELS):
        raise CheckpointError(f"its UNet takes {inputs} channels, for latents of {channels}")
    prediction = PREDICTIONS.get(scheduler.get("prediction_type", "epsilon"))
    if prediction is None:
        raise CheckpointError(f"its prediction_type is {scheduler['prediction_type']!r}")
    params = {
        **_schedule_params(scheduler),
        "parameterization": prediction,
        "zero_terminal_snr": bool(scheduler.get("rescale_betas_zero_snr", False)),
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "image_size": int(unet.get("sample_size") or 64),
        "channels": channels,
        "conditioning_key": "hybrid" if inpaints else "crossattn",
        "scale_factor": float(vae.get("scaling_factor", 0.18215)),
        "use_ema": False,
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            "params": _unet_params(unet),
        },
        "first_stage_config": {
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": _first_stage_params(vae),
        },
        "cond_stage_config": _text_config(text),
    }
    name = "LatentInpaintDiffusion" if inpaints else "LatentDiffusion"
    return {"target": f"ldm.models.diffusion.ddpm.{name}", "params": params}


def _schedule_params(scheduler: Config) -> Config:
    steps = int(scheduler.get("num_train_timesteps", 1000))
    betas = scheduler.get("trained_betas")
    if betas is not None:
        return {"timesteps": steps, "given_betas": [float(beta) for beta in betas]}
    kind = SCHEDULES.get(scheduler.get("beta_schedule", "scaled_linear"))
    if kind is None:
        raise CheckpointError(f"its beta_schedule is {scheduler['beta_schedule']!r}")
    return {
        "timesteps": steps,
        "beta_schedule": kind,
        "linear_start": float(scheduler.get("beta_start", 0.00085)),
        "linear_end": float(scheduler.get("beta_end", 0.012)),
    }


def _check_fixed(what: str, config: Config, fixed: Mapping[str, tuple[Any, ...]]) -> None:
    for key, values in fixed.items():
        if config.get(key, values[0]) not in values:
            raise CheckpointError(f"its {what} has {key} = {config[key]!r}, which can only be {values[0]!r} here")


def _unet_params(unet: Config) -> Config:
    _check_fixed("UNet", unet, UNET_FIXED)
    widths = [int(width) for width in unet["block_out_channels"]]
    crosses = [name.startswith("CrossAttn") for name in unet["down_block_types"]]
    expected = ["CrossAttnUpBlock2D" if cross else "UpBlock2D" for cross in reversed(crosses)]
    if list(unet["up_block_types"]) != expected or len(crosses) != len(widths):
        raise CheckpointError(f"the blocks of its UNet are {unet['down_block_types']} and {unet['up_block_types']}")
    heads = unet.get("num_attention_heads") or unet.get("attention_head_dim", 8)  # a misnomer of old: both count heads
    counts = [heads] * len(widths) if isinstance(heads, int) else [int(count) for count in heads]
    head_widths = {width // count for width, count in zip(widths, counts, strict=True)}
    if len(set(counts)) == 1:
        attention = {"num_heads": counts[0]}
    elif len(head_widths) == 1:
        attention = {"num_head_channels": head_widths.pop()}
    else:
        raise CheckpointError(f"its UNet has {counts} attention heads")
    return {
        "image_size": 32,
        "in_channels": int(unet["in_channels"]),
        "out_channels": int(unet["out_channels"]),
        "model_channels": widths[0],
        "attention_resolutions": [2**level for level, cross in enumerate(crosses) if cross],
        "num_res_blocks": _single(unet, "layers_per_block", 2),
        "channel_mult": _multiples(widths),
        **attention,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": bool(unet.get("use_linear_projection", False)),
        "transformer_depth": _single(unet, "transformer_layers_per_block", 1),
        "context_dim": _single(unet, "cross_attention_dim", 768),
        "legacy": False,
    }


def _single(config: Config, key: str, default: int) -> int:
    value = config.get(key, default)
    values = set(value) if isinstance(value, list) else {value}
    if len(values) != 1:
        raise CheckpointError(f"its UNet has different {key} in its blocks: {value}")
    return int(values.pop())


def _multiples(widths: list[int]) -> list[int]:
    if any(width % widths[0] for width in widths):
        raise CheckpointError(f"its widths {widths} are no multiples of the first")
    return [width // widths[0] for width in widths]


def _first_stage_params(vae: Config) -> Config:
    _check_fixed("VAE", vae, FIRST_STAGE_FIXED)
    blocks = {*vae["down_block_types"], *vae["up_block_types"]} - {"DownEncoderBlock2D", "UpDecoderBlock2D"}
    if blocks:
        raise CheckpointError(f"its VAE has blocks of the kind {sorted(blocks)[0]}")
    widths = [int(width) for width in vae["block_out_channels"]]
    channels = int(vae["latent_channels"])
    return {
        "embed_dim": channels,
        "lossconfig": {"target": "torch.nn.Identity"},
        "ddconfig": {
            "double_z": True,
            "z_channels": channels,
            "resolution": int(vae.get("sample_size") or 256),
            "in_channels": int(vae["in_channels"]),
            "out_ch": int(vae["out_channels"]),
            "ch": widths[0],
            "ch_mult": _multiples(widths),
            "num_res_blocks": int(vae["layers_per_block"]),
            "attn_resolutions": [],
            "dropout": 0.0,
        },
    }


def _text_config(text: Config) -> Config:
    act, width = text.get("hidden_act", "quick_gelu"), int(text["hidden_size"])
    positions = int(text.get("max_position_embeddings", 77))
    sizes = {"vocab_size": int(text.get("vocab_size", 49408))}
    layers, heads = int(text["num_hidden_layers"]), int(text["num_attention_heads"])
    if act == "gelu":
        sizes |= {"width": width, "heads": heads, "layers": layers, "embed_dim": width, "context_length": positions}
        # its last layer is the one before OpenCLIP's last
        mlp_ratio = int(text["intermediate_size"]) / width
        params = {"layer": "last", "text_config": {**sizes, "mlp_ratio": mlp_ratio}, "max_length": positions}
        return {"target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder", "params": params}
    sizes |= {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"intermediate_size": int(text["intermediate_size"]), "max_position_embeddings": positions}
    params = {"text_config": {**sizes, "hidden_act": act}, "max_length": positions}
    return {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder", "params": params}


# --- the other way ---------------------------------------------------------------------------------------------------


def folder_configs(model: Config, size: int | None = None) -> dict[str, Config]:
    """{component: its JSON} of a diffusers folder for a model config `{target, params}`.

    `size` is the side of the pictures in pixels that pipelines draw by default. Raises `CheckpointError` for models
    that diffusers' Stable Diffusion pipelines cannot hold.
    """
    try:
        params = model["params"]
        unet, stage = params["unet_config"]["params"], params["first_stage_config"]["params"]
        side = size // 2 ** (len(stage["ddconfig"]["ch_mult"]) - 1) if size else int(params["image_size"])
        return {
            "unet": _unet_json(unet, side),
            "vae": _first_stage_json(stage, float(params.get("scale_factor", 1.0)), size),
            "text_encoder": _text_json(params["cond_stage_config"]),
            "scheduler": _scheduler_json(params),
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the config is none of a Stable Diffusion model: it lacks {error}") from error


def _unet_json(unet: Config, side: int) -> Config:
    mult, width = unet["channel_mult"], unet["model_channels"]
    widths = [int(m) * width for m in mult]
    if not unet.get("use_spatial_transformer") or unet.get("num_classes") is not None or unet.get("legacy", True):
        raise CheckpointError("only UNets like Stable Diffusion's have a place in diffusers' pipelines")
    crosses = [2**level in unet["attention_resolutions"] for level in range(len(mult))]
    per_head = unet.get("num_head_channels", -1)
    heads = [w // per_head for w in widths] if per_head > 0 else int(unet["num_heads"])
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": heads,
        "block_out_channels": widths,
        "center_input_sample": False,
        "cross_attention_dim": unet["context_dim"],
        "down_block_types": ["CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in crosses],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": unet["in_channels"],
        "layers_per_block": unet["num_res_blocks"],
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-5,
        "norm_num_groups": GROUPS,
        "out_channels": unet["out_channels"],
        "sample_size": side,
        "transformer_layers_per_block": unet.get("transformer_depth", 1),
        "up_block_types": ["CrossAttnUpBlock2D" if cross else "UpBlock2D" for cross in reversed(crosses)],
        "use_linear_projection": bool(unet.get("use_linear_in_transformer", False)),
    }


def _first_stage_json(stage: Config, scale: float, size: int | None) -> Config:
    config = stage["ddconfig"]
    if config.get("attn_resolutions") or not config.get("double_z", True) or stage["embed_dim"] != config["z_channels"]:
        raise CheckpointError("only first stages like Stable Diffusion's have a place in diffusers' pipelines")
    levels = len(config["ch_mult"])
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [config["ch"] * int(m) for m in config["ch_mult"]],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": config["in_channels"],
        "latent_channels": config["z_channels"],
        "layers_per_block": config["num_res_blocks"],
        "norm_num_groups": GROUPS,
        "out_channels": config["out_ch"],
        "sample_size": size or config["resolution"],
        "scaling_factor": scale,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def _text_json(config: Config) -> Config:
    kind, params = config["target"].rpartition(".")[2], config.get("params") or {}
    sizes = dict(params.get("text_config") or {})
    if kind == "FrozenOpenCLIPEmbedder":
        full = {"width": 1024, "heads": 16, "layers": 24, "vocab_size": 49408, "context_length": 77, "mlp_ratio": 4.0}
        sizes = {**full, **sizes}
        skipped = params.get("layer", "last") == "penultimate"
        names = {"hidden_size": "width", "num_attention_heads": "heads", "vocab_size": "vocab_size"}
        found = {theirs: sizes[ours] for theirs, ours in names.items()}
        found |= {
            "hidden_act": "quick_gelu" if sizes.get("quick_gelu") else "gelu",
            "num_hidden_layers": sizes["layers"] - skipped,
            "intermediate_size": int(sizes["width"] * sizes["mlp_ratio"]),
            "max_position_embeddings": sizes["context_length"],
            "pad_token_id": 1,
        }
        if found["hidden_act"] != "gelu":
            raise CheckpointError("an OpenCLIP text model with quick_gelu has no place in diffusers' pipelines")
    elif kind == "FrozenCLIPEmbedder":
        found = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        found |= {"hidden_act": "quick_gelu", "vocab_size": 49408, "max_position_embeddings": 77, "pad_token_id": 1}
        found |= sizes
        if found["hidden_act"] == "gelu":
            raise CheckpointError("a CLIP text model with gelu would be taken for OpenCLIP's")
    else:
        raise CheckpointError(f"diffusers' Stable Diffusion pipelines have no place for the text model {kind}")
    return {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-5,
        "model_type": "clip_text_model",
        "projection_dim": found["hidden_size"],
        **found,
    }


def _scheduler_json(params: Config) -> Config:
    schedules = {ours: theirs for theirs, ours in SCHEDULES.items()}
    predictions = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    zero_snr = bool(params.get("zero_terminal_snr", False))
    found = {
        "_class_name": "DDIMScheduler",
        "beta_end": params.get("linear_end", 2e-2),
        "beta_schedule": schedules[params.get("beta_schedule", "linear")],
        "beta_start": params.get("linear_start", 1e-4),
        "clip_sample": False,
        "num_train_timesteps": params.get("timesteps", 1000),
        "prediction_type": predictions[params.get("parameterization", "eps")],
        "rescale_betas_zero_snr": zero_snr,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        # without it the chain would begin above the level that holds no signal
        "timestep_spacing": "trailing" if zero_snr else "leading",
    }
    betas = params.get("given_betas")
    return found if betas is None else {**found, "trained_betas": [float(beta) for beta in betas]}


def text_layers(model: Config) -> int | None:
    """How many of OpenCLIP's blocks the model's text encoder runs; None: all that the file has."""
    config = model["params"]["cond_stage_config"]
    if not isinstance(config, Mapping) or not config["target"].endswith("FrozenOpenCLIPEmbedder"):
        return None
    params = config.get("params") or {}
    layers = (params.get("text_config") or {}).get("layers", 24)
    return layers - (params.get("layer", "last") == "penultimate")
