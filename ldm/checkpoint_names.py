"""How the tensors of a Stable Diffusion checkpoint are called in a diffusers folder, and the other way round.

The original layout numbers blocks along the network, diffusers by level. Everything is one table of module names per
part of the model, made from the few numbers of a `Layout`, and read in both directions. Only the fused attention
input of OpenCLIP's text model is three tensors there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

UNET, FIRST_STAGE, CLIP, OPENCLIP = (
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.transformer.",
    "cond_stage_model.model.",
)
RES_BLOCK = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)
FIRST_STAGE_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
TEXT_LAYER = (
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("attn.out_proj", "self_attn.out_proj"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)
TEXT_INPUTS = ("q_proj", "k_proj", "v_proj")  # the order in OpenCLIP's fused tensor
# Files of older versions of diffusers.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_UNUSED = re.compile(r"(\.|^)(position_ids|logit_scale|text_projection(\.weight)?)$")

Place = tuple[str, tuple[str, ...]]  # component folder, and the names there of the parts of one tensor


@dataclass(frozen=True)
class Layout:
    """What block numbers depend on.

    levels, res_blocks: of the UNet; the decoder has one residual block more per level.
    attention: levels of the UNet's decoder, counted from the smallest, that have transformers.
    first_stage_levels, first_stage_res_blocks: of the autoencoder.
    text_layers: of OpenCLIP's text model, without those that its last state skips.
    """

    levels: int = 0
    res_blocks: int = 0
    attention: frozenset[int] = frozenset()
    first_stage_levels: int = 0
    first_stage_res_blocks: int = 0
    text_layers: int = 0


def original_layout(names: Iterable[str], text_layers: int | None = None) -> Layout:
    """The layout of a state dict under original names; `text_layers` cuts OpenCLIP's last blocks off."""
    names = set(names)
    blocks = 1 + _highest(names, rf"{re.escape(UNET)}input_blocks\.(\d+)\.")
    downs = [i for i in range(blocks) if f"{UNET}input_blocks.{i}.0.op.weight" in names]
    per_level = downs[0] if downs else blocks
    levels = 1 + len(downs)
    attention = (
        level for level in range(levels) if f"{UNET}output_blocks.{level * per_level}.1.proj_in.weight" in names
    )
    layers = 1 + _highest(names, rf"{re.escape(OPENCLIP)}transformer\.resblocks\.(\d+)\.")
    return Layout(
        levels if blocks else 0,
        per_level - 1,
        frozenset(attention),
        1 + _highest(names, rf"{re.escape(FIRST_STAGE)}encoder\.down\.(\d+)\."),
        1 + _highest(names, rf"{re.escape(FIRST_STAGE)}encoder\.down\.0\.block\.(\d+)\."),
        layers if text_layers is None else min(layers, text_layers),
    )


def folder_layout(names: Mapping[str, Iterable[str]]) -> Layout:
    """The layout of a diffusers folder's tensor names by component ("unet", "vae", "text_encoder")."""
    unet, vae = set(names.get("unet", ())), set(names.get("vae", ()))
    levels = 1 + _highest(unet, r"down_blocks\.(\d+)\.")
    return Layout(
        levels,
        1 + _highest(unet, r"down_blocks\.0\.resnets\.(\d+)\."),
        frozenset(i for i in range(levels) if f"up_blocks.{i}.attentions.0.proj_in.weight" in unet),
        1 + _highest(vae, r"encoder\.down_blocks\.(\d+)\."),
        1 + _highest(vae, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        1 + _highest(map(_modern_text, names.get("text_encoder", ())), r"text_model\.encoder\.layers\.(\d+)\."),
    )


def to_folder(names: Iterable[str], layout: Layout) -> dict[str, Place]:
    """{original name: where it is in a diffusers folder} of those of `names` that have a place there."""
    tables = {prefix: (component, table) for prefix, component, table in _tables(layout)}
    places: dict[str, Place] = {}
    for name in names:
        prefix = next((p for p in tables if name.startswith(p)), None)
        if prefix is None or _UNUSED.search(name):
            continue
        component, table = tables[prefix]
        own = name.removeprefix(prefix)
        fused = re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", own)
        if fused and int(fused[1]) < layout.text_layers:
            block = f"text_model.encoder.layers.{fused[1]}.self_attn"
            places[name] = component, tuple(f"{block}.{part}.{fused[2]}" for part in TEXT_INPUTS)
        elif not fused and (there := _translate(own, table)) is not None:
            places[name] = component, (there,)
    return places


def to_original(
    names: Mapping[str, Iterable[str]], layout: Layout, openclip: bool
) -> tuple[dict[str, Place], list[str]]:
    """{original name: where it is} of a diffusers folder's tensors by component, and the names that fit nowhere.

    `openclip`: the text model is that of Stable Diffusion 2, which originally has OpenCLIP's names.
    """
    places: dict[str, Place] = {}
    unknown = []
    for prefix, component, table in _tables(layout):
        if component == "text_encoder" and openclip != (prefix == OPENCLIP):
            continue
        back = {there: here for here, there in table.items()}
        for stored in sorted(names.get(component, ())):
            name = _modern(component, stored)
            if _UNUSED.search(name):
                continue
            fused = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv]_proj)\.(weight|bias)", name)
            if fused and openclip:
                key = f"{prefix}transformer.resblocks.{fused[1]}.attn.in_proj_{fused[3]}"
                parts = (stored[: stored.index(fused[2])] + f"{part}.{fused[3]}" for part in TEXT_INPUTS)
                places[key] = component, tuple(parts)
            elif (here := _translate(name, back)) is not None:
                places[prefix + here] = component, (stored,)
            else:
                unknown.append(f"{component}: {stored}")
    return places, unknown


def _tables(layout: Layout) -> list[tuple[str, str, dict[str, str]]]:
    """(prefix of the original names, component, {module name there below the prefix: module name here})."""
    return [
        (UNET, "unet", _unet_table(layout)),
        (FIRST_STAGE, "vae", _first_stage_table(layout)),
        (CLIP, "text_encoder", {"text_model": "text_model"}),
        (OPENCLIP, "text_encoder", _openclip_table(layout)),
    ]


def _unet_table(layout: Layout) -> dict[str, str]:
    table = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "middle_block.1": "mid_block.attentions.0",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    table |= _res_block("middle_block.0", "mid_block.resnets.0") | _res_block("middle_block.2", "mid_block.resnets.1")
    per_level = layout.res_blocks + 1
    for level in range(layout.levels):
        for j in range(layout.res_blocks):
            here, there = f"input_blocks.{1 + level * per_level + j}", f"down_blocks.{level}"
            table |= _res_block(f"{here}.0", f"{there}.resnets.{j}")
            table[f"{here}.1"] = f"{there}.attentions.{j}"
        if level < layout.levels - 1:
            table[f"input_blocks.{(level + 1) * per_level}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        for j in range(per_level):
            here, there = f"output_blocks.{level * per_level + j}", f"up_blocks.{level}"
            table |= _res_block(f"{here}.0", f"{there}.resnets.{j}")
            if level in layout.attention:
                table[f"{here}.1"] = f"{there}.attentions.{j}"
        if level < layout.levels - 1:
            last = f"output_blocks.{level * per_level + layout.res_blocks}"
            table[f"{last}.{1 + (level in layout.attention)}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return table


def _res_block(here: str, there: str) -> dict[str, str]:
    return {f"{here}.{a}": f"{there}.{b}" for a, b in RES_BLOCK}


def _first_stage_table(layout: Layout) -> dict[str, str]:
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    levels, blocks = layout.first_stage_levels, layout.first_stage_res_blocks
    for half in ("encoder", "decoder"):
        table |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        table[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        for i in (0, 1):
            table |= _first_stage_block(f"{half}.mid.block_{i + 1}", f"{half}.mid_block.resnets.{i}")
        for here, there in FIRST_STAGE_ATTENTION.items():
            table[f"{half}.mid.attn_1.{here}"] = f"{half}.mid_block.attentions.0.{there}"
    for level in range(levels):
        there = f"decoder.up_blocks.{levels - 1 - level}"  # diffusers counts in the order of computation
        for j in range(blocks):
            table |= _first_stage_block(f"encoder.down.{level}.block.{j}", f"encoder.down_blocks.{level}.resnets.{j}")
        for j in range(blocks + 1):
            table |= _first_stage_block(f"decoder.up.{level}.block.{j}", f"{there}.resnets.{j}")
        table[f"encoder.down.{level}.downsample.conv"] = f"encoder.down_blocks.{level}.downsamplers.0.conv"
        table[f"decoder.up.{level}.upsample.conv"] = f"{there}.upsamplers.0.conv"
    return table


def _first_stage_block(here: str, there: str) -> dict[str, str]:
    table = {f"{here}.{name}": f"{there}.{name}" for name in ("norm1", "conv1", "norm2", "conv2")}
    return table | {f"{here}.nin_shortcut": f"{there}.conv_shortcut"}


def _openclip_table(layout: Layout) -> dict[str, str]:
    table = {
        "token_embedding": "text_model.embeddings.token_embedding",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final": "text_model.final_layer_norm",
    }
    for i in range(layout.text_layers):
        for here, there in TEXT_LAYER:
            table[f"transformer.resblocks.{i}.{here}"] = f"text_model.encoder.layers.{i}.{there}"
    return table


def _translate(name: str, table: Mapping[str, str]) -> str | None:
    """`name` with the longest module name in front that `table` has replaced."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        there = table.get(".".join(parts[:count]))
        if there is not None:
            return ".".join([there, *parts[count:]])
    return None


def _modern(component: str, name: str) -> str:
    """A tensor's name as today's diffusers writes it, text models with `text_model.` in front."""
    if component == "text_encoder":
        return _modern_text(name)
    if component == "vae" and ".attentions." in name:
        return re.sub(r"\.(query|key|value|proj_attn)\.", lambda match: f".{_OLD_ATTENTION[match[1]]}.", name)
    return name


def _modern_text(name: str) -> str:
    # recent versions of transformers leave the prefix out
    return f"text_model.{name}" if name.startswith(("embeddings.", "encoder.", "final_layer_norm.")) else name


def _highest(names: Iterable[str], pattern: str) -> int:
    """The highest number that `pattern` finds at the start of a name; -1 if there is none."""
    matches = (re.match(pattern, name) for name in names)
    return max((int(match[1]) for match in matches if match), default=-1)
