"""The same work in Hugging Face's diffusers, with the very same weights.

Weights are shared, not copied, so two models fit where one does, and outputs can be compared.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.speed.jobs import GUIDANCE, STEP_COUNT, Job, Ours, training_pass

PEERS = ("diffusers",)
COMPARED = ("unet_forward", "encode", "decode", "text")  # whose outputs must agree


def missing_packages() -> list[str]:
    """Packages that a comparison needs and that are not installed."""
    return [name for name in ("diffusers", "transformers") if importlib.util.find_spec(name) is None]


def agreement(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the largest value."""
    scale = theirs.float().abs().max().clamp_min(1e-12)
    return ((ours.float() - theirs.float()).abs().max() / scale).item()


class Diffusers:
    """The jobs on diffusers' modules; its textual-inversion script's step is `inversion_step`."""

    def __init__(self, ours: Ours) -> None:
        from diffusers import DDIMScheduler

        self.setup, self.inputs, self.context = ours.setup, ours.inputs, ours.context
        self.dtype = ours.setup.torch_dtype
        model = ours.model
        self.scale_factor = float(model.scale_factor)
        with torch.device("meta"):
            self.unet, self.vae = empty_unet(model), empty_vae(model)
        share_weights(model, self.unet, self.vae)
        self.text_encoder = text_encoder_of(model)
        self.schedule = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
        if self.text_encoder is not None:
            self.learn_a_token(ours)

    def learn_a_token(self, ours: Ours) -> None:
        """As the script does: one more row in the vocabulary table, all of which the optimiser holds."""
        encoder = self.text_encoder
        assert encoder is not None
        stage, manager = ours.model.cond_stage_model, ours.model.embedding_manager
        placeholder = next(iter(manager.placeholders.values()))
        ids = stage.tokenize(self.inputs.captions, manager.placeholders)  # (B, L)
        new_id = stage.vocab_size
        self.ids = torch.where(ids == placeholder, new_id, ids).to(self.setup.device)
        self.empty_ids = stage.tokenize([""] * len(ids)).to(self.setup.device)
        vector = next(iter(manager.embedding_parameters())).detach()
        table = nn.Embedding(new_id + 1, vector.shape[1], device=self.setup.device)
        table.weight.data[:new_id] = stage.token_table().weight.detach().float()
        table.weight.data[new_id:] = vector.float()
        encoder.set_input_embeddings(table)
        self.table = table.weight
        self.original = self.table.detach().clone()
        self.frozen = torch.ones(new_id + 1, dtype=torch.bool)
        self.frozen[new_id] = False
        self.optimizer = torch.optim.AdamW([self.table], lr=5e-3, weight_decay=1e-2)

    def jobs(self) -> dict[str, Job]:
        """Jobs under the names that `Ours` gives them."""
        jobs = {
            "unet_forward": Job(self.unet_forward),
            "unet_training": Job(lambda: training_pass(self.network, self.inputs, self.context, self.dtype)),
            "encode": Job(self.encode),
            "decode": Job(lambda: self.decode(self.inputs.latent)),
            "guided_step": Job(lambda: self.sample(STEP_COUNT), per=STEP_COUNT),
            "picture": Job(lambda: self.decode(self.sample(self.setup.steps)), long=True),
        }
        if self.text_encoder is not None:
            jobs |= {"text": Job(self.text), "inversion_step": Job(self.inversion_step)}
        return jobs

    def network(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """Output (B, C, h, w) of the denoiser."""
        return self.unet(x, t, context).sample

    @torch.no_grad()
    def unet_forward(self) -> Tensor:
        """One evaluation of the denoiser."""
        return self.network(self.inputs.latent.to(self.dtype), self.inputs.steps, self.context)

    @torch.no_grad()
    def encode(self) -> Tensor:
        """Pictures to the mean of their latents."""
        return self.vae.encode(self.inputs.picture.to(self.dtype)).latent_dist.mean

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pictures."""
        return self.vae.decode((latents / self.scale_factor).to(self.dtype)).sample

    @torch.no_grad()
    def text(self) -> Tensor:
        """Captions to contexts."""
        return self.encode_text(self.ids)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Context (B, L, D) of token ids (B, L); the text encoder stays in float32, in 16 bits under autocast."""
        assert self.text_encoder is not None
        with torch.autocast(self.setup.device.type, torch.bfloat16, enabled=self.dtype != torch.float32):
            return self.text_encoder(ids)[0].to(self.dtype)

    def inversion_step(self) -> Tensor:
        """One step of the textual-inversion script, which encodes the pictures each time."""
        posterior = self.vae.encode(self.inputs.picture.to(self.dtype)).latent_dist
        latents = posterior.sample().detach() * self.scale_factor
        noise = torch.randn_like(latents)
        steps = torch.randint(self.schedule.config.num_train_timesteps, (len(latents),), device=latents.device)
        noisy = self.schedule.add_noise(latents, noise, steps)
        predicted = self.network(noisy.to(self.dtype), steps, self.encode_text(self.ids))
        loss = F.mse_loss(predicted.float(), noise.float())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.table[self.frozen] = self.original[self.frozen]
        return loss.detach()

    @torch.no_grad()
    def sample(self, steps: int) -> Tensor:
        """Latents of a guided DDIM chain."""
        if self.text_encoder is not None:
            context = torch.cat([self.encode_text(self.empty_ids), self.encode_text(self.ids)])  # (2 B, L, D)
        else:
            context = torch.cat([self.context, self.context])  # as much work as with an empty prompt
        x = self.inputs.latent.to(self.dtype)
        self.schedule.set_timesteps(steps)
        for t in self.schedule.timesteps:
            both = self.network(torch.cat([x, x]), t.expand(2 * len(x)), context)
            low, high = both.chunk(2)
            x = self.schedule.step(low + GUIDANCE * (high - low), t, x).prev_sample
        return x.float()


def empty_unet(model: Any) -> Any:
    """diffusers' denoiser of the same shape as the model's."""
    from diffusers import UNet2DConditionModel

    unet = model.model.diffusion_model
    width = unet.model_channels
    return UNet2DConditionModel(
        sample_size=model.image_size,
        in_channels=unet.in_channels,
        out_channels=unet.out_channels,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        cross_attention_dim=unet.context_dim,
        attention_head_dim=8,  # under this name the configs of Stable Diffusion 1 give the number of heads
    )


def empty_vae(model: Any) -> Any:
    """diffusers' first stage of the same shape as the model's."""
    from diffusers import AutoencoderKL

    width = model.first_stage_model.encoder.conv_in.out_channels
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        layers_per_block=2,
        latent_channels=model.channels,
    )


def share_weights(model: Any, unet: Any, vae: Any) -> None:
    """Let diffusers' modules use the tensors of `model`."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    parts: tuple[tuple[Any, nn.Module, str, Callable[..., Any]], ...] = (
        (unet, model.model.diffusion_model, "model.diffusion_model.", convert_ldm_unet_checkpoint),
        (vae, model.first_stage_model, "first_stage_model.", convert_ldm_vae_checkpoint),
    )
    for theirs, ours, prefix, convert in parts:
        state = {prefix + name: tensor for name, tensor in ours.state_dict().items()}
        theirs.load_state_dict(convert(state, config=theirs.config), assign=True)
        theirs.requires_grad_(False).eval()


def text_encoder_of(model: Any) -> Any:
    """transformers' CLIP text model with the weights of `model`, or None where its text encoder is another."""
    from transformers import CLIPTextConfig, CLIPTextModel

    from ldm.modules.encoders.clip import FrozenCLIPEmbedder

    stage = model.cond_stage_model
    if not isinstance(stage, FrozenCLIPEmbedder):
        return None
    transformer = stage.transformer.text_model
    layers: Any = transformer.encoder.layers
    config = CLIPTextConfig(
        vocab_size=stage.vocab_size,
        hidden_size=stage.embedding_dim,
        intermediate_size=layers[0].mlp.fc1.out_features,
        num_hidden_layers=len(layers),
        num_attention_heads=layers[0].self_attn.heads,
        max_position_embeddings=transformer.embeddings.position_embedding.num_embeddings,
        hidden_act="quick_gelu",
        projection_dim=stage.embedding_dim,
    )
    encoder: Any = CLIPTextModel(config)
    part = getattr(encoder, "text_model", encoder)  # newer versions have no part of that name
    missing = part.load_state_dict(transformer.state_dict(), strict=False).missing_keys
    assert not [key for key in missing if not key.endswith("position_ids")], f"transformers has other names: {missing}"
    return encoder.requires_grad_(False).to(model.device)
