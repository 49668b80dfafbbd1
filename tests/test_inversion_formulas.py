"""Inversion steps of every variant against the published formulas, derived here anew from numbers alone.

Taken as given are the networks (UNet, text transformer, first stage), which the reference numbers of other tests cover.
Everything between them is computed a second time: schedule, draws, splicing of vectors, losses, weights, AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.conftest import END_TO_END, assert_close
from tests.test_ddpm import tiny_model

WORDS = (END_TO_END / "vocab.txt").read_text().split()
LENGTH = 16
RATE, MODEL_RATE, STEPS = 0.02, 1e-4, 2
BETAS, EPS = (0.9, 0.999), 1e-8
TWO = {"placeholder_strings": ["*", "@"], "initializer_words": ["sculpture", "cat"]}
ONE = {"placeholder_strings": ["*"], "initializer_words": ["sculpture"]}

# Options of the model and of the embedding manager.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "eps_l2": ({}, ONE),
    "eps_l1": ({"loss_type": "l1"}, ONE),
    "eps_elbo_v_posterior": ({"original_elbo_weight": 0.01, "v_posterior": 0.3}, ONE),
    "x0_l1": ({"parameterization": "x0", "loss_type": "l1"}, ONE),
    "x0_elbo": ({"parameterization": "x0", "original_elbo_weight": 0.5, "l_simple_weight": 0.7}, ONE),
    "v_l2": ({"parameterization": "v"}, ONE),
    "v_l1_elbo": ({"parameterization": "v", "loss_type": "l1", "original_elbo_weight": 0.4}, ONE),
    "logvar": ({"logvar_init": 0.4, "weight_decay": 0.0}, ONE),
    "two_words": ({}, TWO),
    "three_vectors": ({}, {**ONE, "num_vectors_per_token": 3}),
    "two_words_two_vectors_x0": ({"parameterization": "x0"}, {**TWO, "num_vectors_per_token": 2}),
    "regularised": ({"embedding_reg_weight": 0.3}, ONE),
    "two_words_regularised": ({"embedding_reg_weight": 0.3}, TWO),
    "two_words_three_vectors_regularised": ({"embedding_reg_weight": 0.3}, {**TWO, "num_vectors_per_token": 3}),
    "unfrozen": ({"unfreeze_model": True, "model_lr": MODEL_RATE}, ONE),
    "unfrozen_v_two_words_regularised": (
        {"unfreeze_model": True, "model_lr": MODEL_RATE, "parameterization": "v", "embedding_reg_weight": 0.1}, TWO,
    ),
}  # fmt: skip


def build(options: dict[str, Any], manager: dict[str, Any]) -> Any:
    personalization = {"target": "ldm.modules.embedding_manager.EmbeddingManager", "params": manager}
    model = tiny_model(personalization_config=personalization, **options).train()
    model.learning_rate = RATE
    return model


def captions(step: int, manager: dict[str, Any]) -> list[str]:
    """Long enough for vectors to push the end of one out of its row; the last one without the first word."""
    second = manager["placeholder_strings"][-1]
    return [f"a photo of a * with the {second}", f"the close - up photo of one nice * and {second}", f"my {second}"][
        step:
    ] + ["a dark photo of the clean *"]


def pictures(count: int) -> Tensor:
    """(B, 32, 32, 3) in [-1, 1]."""
    files = [END_TO_END / "images" / f"{k % 4}.png" for k in range(count)]
    arrays = [np.asarray(Image.open(file).convert("RGB").resize((32, 32)), np.float32) for file in files]
    return torch.from_numpy(np.stack(arrays)) / 127.5 - 1


def schedule(options: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Products of 1 - beta and the weights of the variational bound, float64 (1000,) each."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    acp = np.cumprod(1 - betas)
    before = np.append(1.0, acp[:-1])
    share = options.get("v_posterior", 0.0)
    variance = (1 - share) * betas * (1 - before) / (1 - acp) + share * betas
    kind = options.get("parameterization", "eps")
    with np.errstate(divide="ignore"):
        weights = {
            "eps": betas**2 / (2 * variance * (1 - betas) * (1 - acp)),
            "x0": 0.5 * acp**0.5 / (2 - acp),  # as published, though 2 (1 - acp) was meant
            "v": np.ones(1000),
        }[kind]
    weights[0] = weights[1]
    return acp, weights


def context(model: Any, texts: Iterable[str], vectors: dict[str, Tensor]) -> Tensor:
    """Text encoding (B, 16, 64) with each word of `vectors` spelt as its rows."""
    table = model.cond_stage_model.token_table().weight
    ids, rows = [], []
    for text in texts:
        spelt: list[tuple[int, Tensor]] = [(WORDS.index("[CLS]"), table[WORDS.index("[CLS]")])]
        for word in text.split():
            number = WORDS.index(word) if word in WORDS else WORDS.index("[UNK]")
            spelt += [(number, row) for row in vectors.get(word, table[number][None])]
        end = (WORDS.index("[SEP]"), table[WORDS.index("[SEP]")])
        spelt = [*spelt[: LENGTH - 1], end]
        spelt += [(WORDS.index("[PAD]"), table[WORDS.index("[PAD]")])] * (LENGTH - len(spelt))
        ids.append([number for number, _ in spelt])
        rows.append(torch.stack([row for _, row in spelt]))
    return model.cond_stage_model.transform(torch.stack(rows), torch.tensor(ids))


def loss_of(model: Any, options: dict[str, Any], texts: list[str], vectors: dict[str, Tensor], start: Any) -> Tensor:
    """The training objective; draws from torch's generator in the published order."""
    count = len(texts)
    with torch.no_grad():
        posterior = model.first_stage_model.encode(pictures(count).permute(0, 3, 1, 2))
        z = 0.18215 * (posterior.mean + posterior.std * torch.randn(posterior.mean.shape))
    t = torch.randint(1000, (count,))
    noise = torch.randn(z.shape)
    acp, weights = schedule(options)
    signal, sigma = (torch.from_numpy(v)[t].float()[:, None, None, None] for v in (acp**0.5, (1 - acp) ** 0.5))
    output = model.model.diffusion_model(signal * z + sigma * noise, t, context=context(model, texts, vectors))
    target = {"eps": noise, "x0": z, "v": signal * noise - sigma * z}[options.get("parameterization", "eps")]
    error = (output - target).abs() if options.get("loss_type") == "l1" else (output - target) ** 2
    each = error.mean((1, 2, 3))
    logvar = options.get("logvar_init", 0.0)
    loss = options.get("l_simple_weight", 1.0) * (each / np.exp(logvar) + logvar).mean()
    loss = loss + options.get("original_elbo_weight", 0.0) * (torch.from_numpy(weights)[t].float() * each).mean()
    distances = [((vectors[name] - start[name]) ** 2).sum() for name in vectors]
    return loss + options.get("embedding_reg_weight", 0.0) * sum(distances) / len(distances)


class HandAdamW:
    """AdamW for one tensor, as in its paper: decay apart from the moments."""

    def __init__(self, rate: float, decay: float) -> None:
        self.rate, self.decay, self.step, self.mean, self.square = rate, decay, 0, 0.0, 0.0

    def __call__(self, value: Tensor, gradient: Tensor) -> Tensor:
        self.step += 1
        self.mean = BETAS[0] * self.mean + (1 - BETAS[0]) * gradient
        self.square = BETAS[1] * self.square + (1 - BETAS[1]) * gradient**2
        mean, square = self.mean / (1 - BETAS[0] ** self.step), self.square / (1 - BETAS[1] ** self.step)
        return value * (1 - self.rate * self.decay) - self.rate * mean / (square**0.5 + EPS)


@pytest.mark.parametrize("case", CASES)
def test_steps_follow_the_formulas(case: str):
    """Losses and gradients of two steps, and where AdamW leads from these gradients."""
    options, manager = CASES[case]
    model, other = build(options, manager), build(options, manager)  # the other one's networks serve the formulas
    table = other.cond_stage_model.token_table().weight.detach()
    number = manager.get("num_vectors_per_token", 1)
    pairs = zip(manager["placeholder_strings"], manager["initializer_words"], strict=True)
    start = {name: table[WORDS.index(word)].clone().expand(number, -1) for name, word in pairs}
    trained: dict[str, tuple[Tensor, Tensor, HandAdamW]] = {}  # by name: the model's, the formulas', the optimiser
    decay = options.get("weight_decay", 0.01)
    for name, rows in start.items():
        own = model.embedding_manager.string_to_param_dict[name]
        trained[name] = own, rows.clone().requires_grad_(), HandAdamW(RATE, decay)
    for part in ("model", "cond_stage_model") if "model_lr" in options else ():
        for (name, own), theirs in zip(
            getattr(model, part).named_parameters(), getattr(other, part).parameters(), strict=True
        ):
            trained[f"{part}.{name}"] = own, theirs, HandAdamW(MODEL_RATE, decay)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = model.configure_optimizers()

    for step in range(STEPS):
        texts = captions(step, manager)
        torch.manual_seed(step)
        loss, _ = model.shared_step({"image": pictures(len(texts)), "caption": texts})
        optimizer.zero_grad()
        loss.backward()
        torch.manual_seed(step)
        vectors = {name: trained[name][1] for name in start}
        expected = loss_of(other, options, texts, vectors, start)
        assert_close(loss.detach(), expected.detach(), 1e-5, f"loss of step {step}")
        gradients = torch.autograd.grad(expected, [theirs for _, theirs, _ in trained.values()], allow_unused=True)
        largest = max(float(g.abs().max()) for g in gradients if g is not None)
        goals = {}
        for (name, (own, _, hand)), gradient in zip(trained.items(), gradients, strict=True):
            assert (own.grad is None) == (gradient is None), name
            if gradient is not None:
                assert float((own.grad - gradient).abs().max()) < 1e-4 * largest, name
                goals[name] = hand(own.detach().clone(), own.grad)
        optimizer.step()
        with torch.no_grad():
            for name, goal in goals.items():
                own, theirs, _ = trained[name]
                assert_close(own.detach(), goal, 1e-6, name)
                theirs.copy_(own)

    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    vectors_moved = {name for name in moved if name.startswith("embedding_manager.")}
    assert len(vectors_moved) == len(start)
    assert moved - vectors_moved <= trained.keys()
    assert ("model.diffusion_model.out.2.weight" in moved) == ("model_lr" in options)


@pytest.mark.parametrize(("step", "active"), [(0, 1), (1999, 1), (2000, 2), (4000, 3), (9000, 3)])
def test_progressive_words_take_the_vectors_of_their_step(step: int, active: int):
    model = build({}, {**ONE, "num_vectors_per_token": 3, "progressive_words": True})
    with torch.no_grad():
        rows = model.embedding_manager.string_to_param_dict["*"]
        rows += torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    model.embedding_manager.set_global_step(step)
    texts = ["a photo of a *", "the * with a cat"]
    expected = context(model, texts, {"*": rows[:active]})
    assert_close(model.get_learned_conditioning(texts).detach(), expected.detach())
