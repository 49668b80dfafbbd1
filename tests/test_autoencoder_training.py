"""First stages learn, with and without a discriminator, on synthetic pictures."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ldm.models.autoencoder import AutoencoderKL, VQModel, VQModelInterface
from ldm.models.first_stage import FirstStage
from tests.conftest import assert_close

DDCONFIG = {
    "ch": 32,
    "out_ch": 3,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "in_channels": 3,
    "resolution": 16,
    "z_channels": 4,
    "attn_type": "none",
}
PLAIN_LOSS = {"disc_factor": 0.0, "perceptual_weight": 0.0}


class Ramps(Dataset[dict[str, Tensor]]):
    """Colour ramps (16, 16, 3) in [-1, 1]."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        corner, across, down = 2 * torch.rand(3, 3, generator=generator) - 1
        grid = torch.linspace(0, 1, 16)
        picture = corner + across * grid[:, None, None] + down * grid[None, :, None]
        return {"image": picture.clamp(-1, 1)}


class EdgeLoss(nn.Module):
    """Stands for a perceptual network: distance of neighbour differences through a fixed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        nn.init.normal_(self.conv.weight, generator=torch.Generator().manual_seed(0))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (self.conv(a) - self.conv(b)).square().mean(dim=(1, 2, 3), keepdim=True)


def kl_model(loss: dict[str, Any] | None = None, **options: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    params = {"kl_weight": 1e-6, **PLAIN_LOSS, **(loss or {})}
    lossconfig = {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": params}
    model = AutoencoderKL({**DDCONFIG, "double_z": True}, lossconfig, embed_dim=4, **options)
    model.learning_rate = 2e-3
    return model


def vq_model(loss: dict[str, Any] | None = None, cls: type[VQModel] = VQModel, **options: Any) -> VQModel:
    torch.manual_seed(0)
    lossconfig = {
        "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
        "params": {**PLAIN_LOSS, **(loss or {})},
    }
    model = cls({**DDCONFIG, "double_z": False}, lossconfig, n_embed=32, embed_dim=4, **options)
    model.learning_rate = 2e-3
    return model


def adversarial(disc_start: int = 3) -> dict[str, Any]:
    return {
        "disc_factor": 1.0,
        "disc_start": disc_start,
        "disc_weight": 0.5,
        "disc_num_layers": 1,
        "disc_ndf": 8,
        "perceptual_weight": 1.0,
        "perceptual_loss": EdgeLoss(),
    }


class Recorder(pl.Callback):
    """Keeps what is logged at each training batch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def make_trainer(steps: int, recorder: Recorder | None = None, **options: Any) -> pl.Trainer:
    callbacks = [recorder] if recorder else []
    return pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=callbacks + options.pop("callbacks", []),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **{"limit_val_batches": 0, "enable_checkpointing": False, **options},
    )


def fit(
    model: FirstStage, steps: int, *, batch_size: int = 4, pictures: int = 4, resume: str | None = None, **options: Any
) -> list[dict[str, float]]:
    """Train and return what was logged at each batch."""
    recorder = Recorder()
    trainer = make_trainer(steps, recorder, **options)
    loader = DataLoader(Ramps(pictures), batch_size=batch_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers and intervals
        trainer.fit(model, loader, DataLoader(Ramps(8), batch_size=8), ckpt_path=resume)
    return recorder.rows


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 0.0) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0.0, atol=atol, msg=name)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("build", [kl_model, vq_model])
def test_reconstruction_error_falls(build: Any, precision: Any) -> None:
    rows = fit(build(), 40, precision=precision)
    assert rows[-1]["train/rec_loss"] < 0.6 * rows[0]["train/rec_loss"]


def test_optimiser_is_adam_with_the_published_betas() -> None:
    single = kl_model().configure_optimizers()
    assert [type(o).__name__ for o in single] == ["Adam"]
    model = vq_model(adversarial(), lr_g_factor=3.0)
    own, judge = model.configure_optimizers()
    assert own.defaults["betas"] == judge.defaults["betas"] == (0.5, 0.9)
    assert own.defaults["lr"] == pytest.approx(3 * judge.defaults["lr"])
    assert {id(p) for p in judge.param_groups[0]["params"]} == {id(p) for p in model.loss.discriminator.parameters()}
    trained = sum(p.numel() for group in (own, judge) for p in group.param_groups[0]["params"])
    assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_learned_logvar_is_optimised() -> None:
    model = kl_model({"learn_logvar": True})
    fit(model, 3)
    assert model.loss.logvar.item() != 0.0
    fixed = kl_model()
    fit(fixed, 3)
    assert fixed.loss.logvar.item() == 0.0


@pytest.mark.parametrize("build", [kl_model, vq_model])
def test_discriminator_joins_at_disc_start(build: Any) -> None:
    model = build(adversarial(disc_start=3))
    initial = copy.deepcopy(model.loss.discriminator.state_dict())
    rows = fit(model, 3)
    assert_same(model.loss.discriminator.state_dict(), initial)
    assert not any("train/disc_loss" in row for row in rows)
    assert all(row["train/disc_factor"] == row["train/d_weight"] == 0.0 for row in rows)

    model = build(adversarial(disc_start=3))
    rows = fit(model, 6)
    assert model.trainer.global_step == 6, "only steps of the autoencoder count"
    assert [("train/disc_loss" in row) for row in rows] == [False] * 3 + [True] * 3
    assert all(row["train/d_weight"] > 0 for row in rows[3:])
    assert not torch.equal(model.loss.discriminator.main[0].weight, initial["main.0.weight"])
    assert all(p.requires_grad for p in model.loss.discriminator.parameters())


def test_discriminator_learns_from_its_own_loss_only() -> None:
    model = vq_model(adversarial(disc_start=0))
    judge = copy.deepcopy(model.loss.discriminator).train()
    inputs = model.get_input(next(iter(DataLoader(Ramps(4), batch_size=4))), "image")
    with torch.no_grad():
        fake = model.train_outputs(inputs)[0]
    judge(fake)  # the autoencoder's term: moves the batch statistics, as in the published training
    loss = 0.5 * (torch.relu(1 - judge(inputs)).mean() + torch.relu(1 + judge(fake)).mean())
    loss.backward()
    optimizer = torch.optim.Adam(judge.parameters(), lr=model.learning_rate, betas=(0.5, 0.9))
    optimizer.step()
    fit(model, 1)
    assert_same(weights(model.loss.discriminator), weights(judge), atol=1e-6)


@pytest.mark.parametrize("loss", [{}, adversarial(disc_start=0)], ids=["plain", "adversarial"])
def test_accumulated_batches_equal_one_large_batch(loss: dict[str, Any]) -> None:
    whole, halves = vq_model({**loss, "use_actnorm": True}), vq_model({**loss, "use_actnorm": True})
    halves.accumulate_grad_batches = 2
    for model in (whole, halves) if loss else ():
        model.loss.disc_weight = 1e-9  # the adaptive weight is a ratio per batch, which does not add up
        for name, buffer in model.loss.discriminator.named_buffers():
            if name.endswith("initialized"):  # else each would be initialised from its own first batch
                buffer.fill_(1)
    gradients: list[Tensor] = []

    class Catch(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            gradients.append(torch.cat([p.grad.flatten() for p in parameters]))

    fit(whole, 1, callbacks=[Catch()])
    fit(halves, 1, batch_size=2, callbacks=[Catch()])
    assert len(gradients) == (4 if loss else 2)
    for large, summed in zip(gradients[: len(gradients) // 2], gradients[len(gradients) // 2 :], strict=True):
        assert_close(summed, large, rel=1e-5)
    assert whole.trainer.global_step == halves.trainer.global_step == 1


def test_the_rest_of_an_epoch_is_stepped() -> None:
    model = vq_model()
    model.accumulate_grad_batches = 2
    fit(model, -1, batch_size=1, pictures=3, max_epochs=1)
    assert model.trainer.global_step == 2


def test_gradients_are_clipped() -> None:
    model = vq_model(adversarial(disc_start=0))
    model.gradient_clip_val = 1e-3
    norms: list[float] = []

    def measure(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.stack([g.norm() for g in grads]).norm()))

    class Watch(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            for optimizer in trainer.optimizers:
                optimizer.register_step_post_hook(measure)

    fit(model, 2, callbacks=[Watch()])
    assert len(norms) == 4
    assert norms == pytest.approx([1e-3] * 4, rel=1e-2)


def test_resumed_run_equals_an_unbroken_one(tmp_path: Path) -> None:
    def build() -> FirstStage:
        scheduler = {
            "target": "ldm.lr_scheduler.LambdaLinearScheduler",
            "params": {"warm_up_steps": [4], "cycle_lengths": [100], "f_start": [0.1], "f_max": [1.0], "f_min": [0.5]},
        }
        return vq_model(adversarial(disc_start=2), use_ema=True, scheduler_config=scheduler)

    unbroken = build()
    fit(unbroken, 6)
    broken = build()
    saver = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=4, save_last=True)
    fit(broken, 4, callbacks=[saver], enable_checkpointing=True)
    resumed = build()
    fit(resumed, 6, resume=str(tmp_path / "last.ckpt"))
    assert resumed.trainer.global_step == 6
    assert_same(weights(resumed), weights(unbroken))
    rates = [optimizer.param_groups[0]["lr"] for optimizer in resumed.trainer.optimizers]
    expected = [optimizer.param_groups[0]["lr"] for optimizer in unbroken.trainer.optimizers]
    assert rates == expected


def test_schedule_sets_the_learning_rate_of_both_optimisers() -> None:
    scheduler = {
        "target": "ldm.lr_scheduler.LambdaLinearScheduler",
        "params": {"warm_up_steps": [10], "cycle_lengths": [100], "f_start": [0.0], "f_max": [1.0], "f_min": [1.0]},
    }
    model = kl_model(adversarial(disc_start=0), scheduler_config=scheduler)
    fit(model, 4)
    for optimizer in model.trainer.optimizers:
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.4 * model.learning_rate)


@pytest.mark.parametrize("build", [kl_model, vq_model])
def test_averaged_weights_follow_and_are_validated(build: Any) -> None:
    model = build(use_ema=True)
    assert not any(name.startswith("loss") for name in model.model_ema.buffer_names), "only the autoencoder"
    rows = fit(model, 4, limit_val_batches=1, check_val_every_n_epoch=4)
    assert {"val/rec_loss", "val_ema/rec_loss", "val/psnr", "val_ema/psnr"} <= set(rows[-1]) | set(
        model.trainer.callback_metrics
    )
    assert int(model.model_ema.num_updates) == 4
    live = model.decoder.conv_out.weight.clone()
    with model.ema_scope():
        assert not torch.equal(model.decoder.conv_out.weight, live)
    assert torch.equal(model.decoder.conv_out.weight, live)


def test_validation_logs_everything_with_a_discriminator() -> None:
    model = vq_model(adversarial(disc_start=0))
    fit(model, 2, limit_val_batches=1, check_val_every_n_epoch=2)
    logged = model.trainer.callback_metrics
    expected = ("rec_loss", "quant_loss", "perplexity", "disc_loss", "g_loss", "d_weight", "psnr", "total_loss")
    assert {f"val/{name}" for name in expected} <= set(logged)
    assert logged["val/d_weight"] == 0.0


def test_interface_of_the_diffusion_model_trains_like_the_model_itself() -> None:
    plain, interface = vq_model(), vq_model(cls=VQModelInterface)
    fit(plain, 2)
    fit(interface, 2)
    assert_same(weights(interface), weights(plain))


def test_batches_are_resized_in_training_only() -> None:
    model = vq_model(batch_resize_range=[8, 26])
    batch = next(iter(DataLoader(Ramps(2), batch_size=2)))
    assert model.train().get_input(batch, "image").shape == (2, 3, 26, 26)  # the largest size comes first
    assert model.eval().get_input(batch, "image").shape == (2, 3, 16, 16)
    sizes: set[int] = set()

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            sizes.add(module.get_input(batch, "image").shape[-1])

    fit(model.train(), 12, callbacks=[Watch()])
    assert sizes == {8, 24, 26}


def test_a_model_without_loss_says_that_it_cannot_train() -> None:
    model = AutoencoderKL({**DDCONFIG, "double_z": True}, {"target": "torch.nn.Identity"}, embed_dim=4)
    with pytest.raises(ValueError, match=r"Identity.*lossconfig"):
        fit(model, 1)


@pytest.mark.parametrize("build", [kl_model, vq_model])
def test_logged_images(build: Any) -> None:
    model = build(use_ema=True).eval()
    batch = next(iter(DataLoader(Ramps(2), batch_size=2)))
    images = model.log_images(batch)
    assert {"inputs", "reconstructions", "reconstructions_ema"} <= set(images)
    assert ("samples" in images) == isinstance(model, AutoencoderKL)
    assert all(value.shape == (2, 3, 16, 16) and not value.requires_grad for value in images.values())
    assert torch.equal(images["inputs"], batch["image"].permute(0, 3, 1, 2))
    assert set(model.log_images(batch, only_inputs=True)) == {"inputs"}
