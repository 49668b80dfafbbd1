"""The overlays of configs/variants: they fit the base configs, and each does on the reference model what it says."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from ldm.callbacks.validation import held_out
from ldm.data.emoji import NEUTRAL_PHRASES
from ldm.data.personalized import PersonalizedBase
from ldm.data.templates import TEMPLATE_SETS, per_img_token_list
from ldm.modules.embedding_io import read_embeddings
from ldm.resources import config_path, shipped_configs
from ldm.util import check_params, get_obj_from_str, instantiate_from_config, to_plain
from tests.conftest import END_TO_END
from tests.meta_models import without_files
from tests.test_configs import targets
from tests.tiny_inversion import inversion_config, learn, losses, vectors, words
from tests.tiny_run import last_checkpoint, only_run, run_main, write_config

pytestmark = pytest.mark.usefixtures("one_thread")
VARIANTS = [name for name in shipped_configs() if name.startswith("configs/variants/")]
BASES = ["configs/finetune.yaml", "configs/latent-diffusion/txt2img-1p4B-finetune.yaml"]
MANAGER = "model.params.personalization_config.params"


def run(folder: Path, variant: str, *more: Any, steps: int = 3) -> Path:
    """Run directory of `steps` steps on the reference model with a variant."""
    made = inversion_config()
    made["data"]["params"]["validation"] = made["data"]["params"]["train"]  # as the base configs have one
    base, config, *rest = words(write_config(folder / "base.yaml", made), folder)
    if "--data_root" in more:
        rest = ["-l", folder / "logs"]
    run_main(base, config, config_path(f"variants/{variant}.yaml"), *rest, "--max_steps", steps,
             "lightning.trainer.log_every_n_steps=1", *more)  # fmt: skip
    return only_run(folder / "logs")


def captions(run: Path) -> str:
    """What the run's config lets the data say in 50 items."""
    (project,) = (run / "configs").glob("*-project.yaml")
    dataset = instantiate_from_config(OmegaConf.load(project).data.params.train)
    return "\n".join(dataset[i % len(dataset)]["caption"] for i in range(50))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_fit_the_base_configs(base: str, variant: str):
    parts = [OmegaConf.load(config_path(name)) for name in (base, variant)]
    for key, value in _leaves(parts[1]):
        before = OmegaConf.select(parts[0], key)
        assert before != value or key.startswith("lightning."), f"{variant} sets {key} to what {base} has anyway"
    merged = to_plain(OmegaConf.merge(*parts))
    for target, params in targets(merged):
        check_params(target, get_obj_from_str(target), params)
    with torch.device("meta"):
        instantiate_from_config(without_files(merged["model"]))


def test_the_configs_of_the_embedded_model_differ_in_what_makes_a_style():
    thing, style = (
        dict(_leaves(OmegaConf.load(config_path(name)))) for name in ("finetune.yaml", "finetune_style.yaml")
    )
    assert thing.keys() == style.keys()
    differ = {key.split(".")[-1] for key in thing if thing[key] != style[key]}
    assert differ == {"initializer_words", "target", "templates"}


def test_the_sentences_of_the_embedded_model_are_in_the_words_of_its_captions():
    known = {word for phrase in NEUTRAL_PHRASES for word in phrase.split()} | {"a", "{}"}
    assert {word for sentence in TEMPLATE_SETS["emoji"][0] for word in sentence.split()} <= known
    assert len(set(TEMPLATE_SETS["emoji"][0])) == len(TEMPLATE_SETS["emoji"][0])


@pytest.mark.parametrize("name", ["finetune.yaml", "finetune_style.yaml"])
def test_validation_sentences_are_not_trained_on(name: str):
    config = OmegaConf.load(config_path(name))
    params = to_plain(config.data.params.train.params)
    target = get_obj_from_str(config.data.params.train.target)
    dataset: PersonalizedBase = target(data_root=END_TO_END / "images", **params)
    chosen = config.lightning.callbacks.fixed_validation.params.templates
    assert not set(held_out(dataset, list(chosen))) & set(dataset.templates)
    assert not set(held_out(dataset)) & set(dataset.templates)


def _leaves(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if OmegaConf.is_dict(node):
        return [leaf for k, v in node.items() for leaf in _leaves(v, f"{prefix}.{k}" if prefix else str(k))]
    return [(prefix, node)]


def test_pictures_are_drawn_once(tmp_path: Path):
    made = inversion_config()
    del made["lightning"]["callbacks"]["image_logger"]  # as configs/finetune.yaml, which has none
    made["lightning"]["callbacks"]["sample_grids"] = {"params": {"count": 1, "steps": 1}}
    made["data"]["params"]["validation"] = made["data"]["params"]["train"]
    made["model"]["params"]["monitor"] = "val/loss_simple"
    path = learn(write_config(tmp_path / "base.yaml", made), tmp_path, "--max_steps", 1)
    assert {folder.name for folder in (path / "images").iterdir()} == {"contact_sheet.png", "samples"}
    assert [file.name for file in (path / "checkpoints").glob("*.ckpt")] == ["last.ckpt"]


def test_three_vectors(tmp_path: Path):
    path = run(tmp_path, "three_vectors")
    learned = vectors(path)["*"]
    assert learned.shape == (3, 64)
    assert len({tuple(row.tolist()) for row in learned}) == 3  # they started from one word, and went apart


def test_progressive(tmp_path: Path):
    path = run(tmp_path, "progressive", f"{MANAGER}.progressive_every=2", steps=5)
    early, late = (read_embeddings(path / "checkpoints" / f"embeddings_gs-{step}.pt") for step in (2, 5))
    assert (early.active, late.active) == ({"*": 1}, {})  # {}: all three are in use
    assert torch.equal(early.vectors["*"][1], early.vectors["*"][2])
    assert not torch.equal(late.vectors["*"][1], late.vectors["*"][2])


def test_per_image(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = run(tmp_path, "per_image", "data.params.train.params.mixing_prob=1.0", "data.params.batch_size=4",
               "data.params.train.params.repeats=1", "--limit_val_batches", 0)  # fmt: skip
    learned, start = vectors(path), vectors(path, "embeddings_gs-2.pt")
    assert set(learned) == {"*", *per_img_token_list}
    assert not list((path / "checkpoints").glob("embeddings_[!gb]*.pt"))  # words of pictures get no files of their own
    gradients = [name for name in per_img_token_list if (learned[name] - start[name]).abs().max() > 1e-3]
    assert gradients == per_img_token_list[:4]  # one for each picture
    assert " with א" in captions(path)
    assert "got no gradient" not in caplog.text  # letters for pictures that are not there are no mistake


def test_regularised(tmp_path: Path):
    near = run(tmp_path / "near", "regularised", "model.params.embedding_reg_weight=1000", steps=5)
    free = run(tmp_path / "free", "regularised", "model.params.embedding_reg_weight=0", steps=5)
    start = read_embeddings(END_TO_END / "embeddings_1vec.pt").vectors["*"]
    assert start.shape == vectors(near)["*"].shape
    assert losses(near)[0] == pytest.approx(losses(free)[0])  # at the start there is no distance
    moved = [(vectors(path, "embeddings_gs-2.pt")["*"] - vectors(path)["*"]).norm() for path in (near, free)]
    assert moved[0] < moved[1]


def test_style(tmp_path: Path):
    path = run(tmp_path, "style")
    said = captions(path)
    assert all("in the style of *" in line for line in said.splitlines())
    assert read_embeddings(path / "checkpoints" / "embeddings.pt").init_words == {"*": "painting"}


def test_debiased(tmp_path: Path):
    path = run(tmp_path, "debiased", "--init_word", "painting")
    (group,) = last_checkpoint(path)["optimizer_states"][0]["param_groups"]
    usual = OmegaConf.load(config_path("finetune.yaml"))
    assert group["lr"] == pytest.approx(usual.data.params.batch_size * usual.model.base_learning_rate)
    (project,) = (path / "configs").glob("*-project.yaml")
    assert OmegaConf.load(project).data.params.batch_size == 32


def test_editable(tmp_path: Path):
    answers = {"text": [0.5, 0.5, 0.1, 0.1], "image": [0.1, 0.2, 0.3, 0.4]}
    judge = {"target": "tests.test_alignment.Planned", "params": answers}
    params = "lightning.callbacks.alignment.params"
    path = run(tmp_path, "editable", f"{params}.judge={judge}", f"{params}.every_n_train_steps=1", f"{params}.steps=1",
               f"+{params}.count=1", f"+{params}.prompts=['{{}} with a cat']")  # fmt: skip
    assert last_checkpoint(path)["global_step"] == 2
    assert read_embeddings(path / "checkpoints" / "embeddings_best.pt").info["step"] == 1


def test_three_concepts(tmp_path: Path):
    names = ("cat", "painting", "photo")
    for number, name in enumerate(names):
        (tmp_path / "things" / name).mkdir(parents=True)
        shutil.copy(END_TO_END / "images" / f"{number}.png", tmp_path / "things" / name)
    more = [word for name in names for word in ("--init_word", name)]
    path = run(tmp_path, "three_concepts", "--concepts", "--data_root", tmp_path / "things", *more)
    for name in names:
        assert read_embeddings(path / "checkpoints" / f"embeddings_{name}.pt").init_words == {f"<{name}>": name}
