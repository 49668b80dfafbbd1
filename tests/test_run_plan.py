"""From the command line to a plan: flags, config merge, overrides, run directories, resume rules."""

from __future__ import annotations

import datetime
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import main
from ldm import run
from ldm.cli import asks_for_debug
from ldm.run_flags import placeholder_of
from ldm.util import ConfigError
from tests.tiny_run import ROOT, tiny_config, write_config

NOW = datetime.datetime(2025, 1, 31, 12, 5, 9)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_config(tmp_path / "tiny.yaml", tiny_config())


def inversion_config(**data: Any) -> dict[str, Any]:
    """A config that learns a word; only its names matter here."""
    dataset = {"target": "ldm.data.personalized.PersonalizedBase", "params": {"size": 32, **data}}
    manager = {"target": "ldm.modules.embedding_manager.EmbeddingManager", "params": {"placeholder_strings": ["*"]}}
    return {
        "model": {
            "base_learning_rate": 5e-3,
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {"personalization_config": manager},
        },
        "data": {
            "target": "main.DataModuleFromConfig",
            "params": {"batch_size": 4, "train": dataset, "validation": dataset},
        },
    }


@pytest.fixture
def inversion(tmp_path: Path) -> Path:
    return write_config(tmp_path / "inversion.yaml", inversion_config())


def plan(*words: Any) -> run.RunPlan:
    args, overrides = main.parse_args([str(word) for word in words])
    return run.make_plan(args, overrides, now=NOW)


# ---------------------------------------------------------------------------------------------------- the command


def test_help_is_quick_and_has_examples():
    began = time.perf_counter()
    answer = subprocess.run([sys.executable, "main.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    took = time.perf_counter() - began
    assert "examples:" in answer.stdout
    assert "--actual_resume" in answer.stdout
    assert took < 5  # torch is not imported: a tenth of a second on an idle machine


def test_help_does_not_import_torch():
    code = "import sys, main; main.build_parser().format_help(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_defaults_are_the_published_ones(base: Path):
    made = plan("--base", base)
    assert (made.seed, made.scale_lr, made.train, made.test) == (23, True, False, True)
    assert made.run_dir == Path("logs/2025-01-31T12-05-09_tiny")
    assert made.resume is None


def test_yaml_targets_resolve():
    import ldm.callbacks
    import ldm.data.datamodule
    from ldm.util import get_obj_from_str

    assert get_obj_from_str("main.ImageLogger") is ldm.callbacks.ImageLogger
    assert get_obj_from_str("main.DataModuleFromConfig") is ldm.data.datamodule.DataModuleFromConfig
    for name in main.YAML_TARGETS:
        get_obj_from_str(f"main.{name}", trainer_part=True)
    with pytest.raises(ConfigError, match="did you mean 'ImageLogger'"):
        get_obj_from_str("main.ImageLoger")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_step", "3"], "did you mean '--max_steps'"),
        (["--model.params.x=3"], "without dashes: model.params.x=3"),
        (["nonsense"], "neither a flag nor an override"),
        (["--scale_lr", "perhaps"], "neither true nor false"),
        (["-d", "perhaps"], "neither true nor false"),
    ],
)
def test_bad_flags_say_what_to_write(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_info:
        main.parse_args(words)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flag", [[], ["-t"], ["-t", "true"], ["--train", "false"]])
def test_train_flag(base: Path, flag: list[str]):
    wanted = bool(flag) and flag[-1] != "false"
    assert plan("--base", base, *flag).train is wanted
    says_so = write_config(base.with_name("train.yaml"), {"train": True})
    assert plan("--base", base, says_so, *flag).train is (wanted or not flag)


@pytest.mark.parametrize("flag", ["-d", "--debug"])
def test_debug_flag(flag: str):
    for values, wanted in (([], True), (["true"], True), (["False"], False)):
        words = [flag, *values, "-t", "model.base_learning_rate=1"]
        assert main.parse_args(words)[0].debug is wanted
        assert asks_for_debug(words) is wanted
    assert not main.parse_args([f"{flag}=no"])[0].debug
    assert not asks_for_debug([f"{flag}=no"])
    assert not asks_for_debug(["-t"])
    assert not asks_for_debug([])


def test_overrides_may_follow_any_flag(base: Path):
    made = plan("-t", "model.base_learning_rate=1e-4", "--base", base, "data.params.batch_size=2", "-s", 5)
    assert made.train
    assert made.config.model.base_learning_rate == 1e-4
    assert made.config.data.params.batch_size == 2
    assert made.seed == made.config.seed == 5


def test_an_override_may_be_long(base: Path):
    values = list(range(200))
    made = plan("--base", base, f"+data.params.train.params.many={values}")
    assert made.config.data.params.train.params.many == values


def test_trainer_flags_win_over_the_config(base: Path):
    made = plan("--base", base, "--max_steps", 3, "--limit_val_batches", "1.0", "--devices", "0,1", "--gpus", "0,")
    trainer = made.lightning.trainer
    assert (trainer.max_steps, trainer.limit_val_batches, trainer.devices, trainer.gpus) == (3, 1.0, "0,1", "0,")
    assert isinstance(plan("--base", base, "--limit_val_batches", "1").lightning.trainer.limit_val_batches, int)


# ------------------------------------------------------------------------------------------------------- configs


def test_later_configs_win(base: Path):
    other = write_config(base.with_name("other.yaml"), {"model": {"base_learning_rate": 7.0}})
    merged = plan("--base", base, other).config
    assert merged.model.base_learning_rate == 7.0
    assert merged.model.target.endswith("DDPM")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": {}}, "unknown key 'modle' at the top level.*did you mean 'model'"),
        ({"model": {"parms": {}}}, "unknown key 'parms' in section 'model'.*did you mean 'params'"),
        ({"lightning": {"trainers": {}}}, "unknown key 'trainers' in section 'lightning'.*did you mean 'trainer'"),
    ],
)
def test_misspelt_sections(base: Path, changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        plan("--base", base, write_config(base.with_name("bad.yaml"), changes))


def test_broken_config_files(tmp_path: Path):
    for text, message in (("a: [1", "is not a YAML file"), ("- 1", "holds a list"), ("data: {}", "no 'model' section")):
        path = tmp_path / "bad.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            plan("--base", path)
    with pytest.raises(FileNotFoundError, match="missing.yaml"):
        plan("--base", tmp_path / "missing.yaml")
    with pytest.raises(ValueError, match="give --base"):
        plan("-t")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.params.timestep=5", "no 'timestep' in 'model.params'.*did you mean 'timesteps'"),
        ("modl.params.timesteps=5", "no 'modl' in 'the config'.*did you mean 'model'"),
        ("model.params.unet_config.params.model_chanels=5", "did you mean 'model_channels'"),
        ("data.params.train.params.siz=5", "did you mean 'size'"),
        ("data.params.batch_sizes=5", "did you mean 'batch_size'"),
        ("lightning.trainr.max_steps=5", "did you mean 'trainer'"),
        ("model.target.x=5", "'model.target' is a value"),
        ("model.params.timesteps=[1", "not YAML"),
        ("seed=-1", "seed is -1; it must be a number from 0 to 4294967295"),
        ("model.base_learning_rate=abc", "model.base_learning_rate is 'abc'; it must be a number at least 0"),
        ("model.base_learning_rate=-1", "must be a number at least 0"),
        ("lightning.trainer.accumulate_grad_batches=0", "accumulate_grad_batches is 0; it must be a number at least 1"),
    ],
)
def test_bad_overrides(base: Path, override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        plan("--base", base, override)


def test_overrides_may_add_what_the_target_takes(base: Path):
    made = plan(
        "--base", base,
        "model.params.ema_decay=0.9",  # a parameter of DDPM that the config does not name
        "model.params.scheduler_config.target=ldm.lr_scheduler.LambdaLinearScheduler",
        "data.params.validation.target=tests.tiny_run.Squares",
        "lightning.callbacks.image_logger.params.batch_frequency=3",
        "+model.params.unet_config.params.anything=null",
        "model.params.given_betas=[0.1, 0.2]",
    )  # fmt: skip
    params = made.config.model.params
    assert params.ema_decay == 0.9
    assert params.unet_config.params.anything is None
    assert list(params.given_betas) == [0.1, 0.2]
    assert made.config.data.params.validation.target == "tests.tiny_run.Squares"
    assert made.lightning.callbacks.image_logger.params.batch_frequency == 3


def test_overrides_reach_into_lists(base: Path):
    made = plan("--base", base, "model.params.unet_config.params.channel_mult.0=2")
    assert list(made.config.model.params.unet_config.params.channel_mult) == [2]


# --------------------------------------------------------------------------------------------- model and data flags


def test_data_root_names_the_run_and_reaches_all_sets(inversion: Path, tmp_path: Path):
    made = plan("--base", inversion, "--data_root", tmp_path / "imgs", "-n", "cat", "-f", "_a", "-l", "out", "-p", "p")
    assert made.run_dir == Path("out/p/imgs2025-01-31T12-05-09_cat_a")
    for split in ("train", "validation"):
        assert made.config.data.params[split].params.data_root == str(tmp_path / "imgs")
    unnamed = plan("--base", inversion, "--data_root", tmp_path / "imgs", "--datadir_in_name", "false")
    assert unnamed.run_dir.name == "2025-01-31T12-05-09_inversion"


def test_a_linked_data_root_names_the_run_as_given(inversion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "target").mkdir()
    (tmp_path / "cat").symlink_to(tmp_path / "target")
    assert plan("--base", inversion, "--data_root", f"{tmp_path}/cat/").run_dir.name.startswith("cat2025")
    assert placeholder_of(str(tmp_path / "cat")) == "<cat>"
    monkeypatch.chdir(tmp_path / "target")
    assert plan("--base", inversion, "--data_root", ".").run_dir.name.startswith("target2025")


def test_data_root_needs_a_data_set_that_takes_it(base: Path):
    with pytest.raises(ValueError, match="no data set of this config takes a 'data_root'"):
        plan("--base", base, "--data_root", "x")


def test_one_placeholder_for_model_and_captions(inversion: Path, tmp_path: Path):
    made = plan("--base", inversion, "--placeholder_string", "<my-cat>", "--init_word", "cat").config
    manager = made.model.params.personalization_config.params
    assert list(manager.placeholder_strings) == ["<my-cat>"]
    assert list(manager.initializer_words) == ["cat"]
    assert made.data.params.train.params.placeholder_token == "<my-cat>"
    assert made.data.params.validation.params.placeholder_token == "<my-cat>"
    assert plan("--base", inversion).config.data.params.train.params.placeholder_token == "*"
    contradiction = write_config(tmp_path / "two.yaml", inversion_config(placeholder_token="&"))
    with pytest.raises(ConfigError, match="'&' but the model learns"):
        plan("--base", contradiction)


def test_word_flags_replace_the_first_of_several_words(tmp_path: Path):
    several = inversion_config()
    learner = several["model"]["params"]["personalization_config"]["params"]
    learner |= {"placeholder_strings": ["*", "@"], "initializer_words": ["cat", "photo"]}
    base = write_config(tmp_path / "several.yaml", several)
    made = plan("--base", base, "--placeholder_string", "<my-${cat}>", "--init_word", "dog").config
    manager = made.model.params.personalization_config.params
    assert list(manager.placeholder_strings) == ["<my-${cat}>", "@"]
    assert list(manager.initializer_words) == ["dog", "photo"]
    assert made.data.params.train.params.placeholder_token == "<my-${cat}>"


@pytest.mark.parametrize("value", ["", "words.pt"])
def test_a_published_config_may_name_words_to_start_from(inversion: Path, tmp_path: Path, value: str):
    published = inversion_config()
    published["model"]["params"]["personalization_config"]["params"]["embedding_manager_ckpt"] = value
    made = plan("--base", write_config(tmp_path / "published.yaml", published)).config
    assert made.model.params.personalization_config.params.embedding_manager_ckpt == value
    path = "model.params.personalization_config.params.embedding_manager_ckpt"
    assert OmegaConf.select(plan("--base", inversion, f"{path}=other.pt").config, path) == "other.pt"


def test_word_flags_need_an_inversion(base: Path):
    with pytest.raises(ValueError, match="--init_word"):
        plan("--base", base, "--init_word", "cat")
    with pytest.raises(ValueError, match="--embedding_manager_ckpt"):
        plan("--base", base, "--embedding_manager_ckpt", "x.pt")


@pytest.mark.parametrize("flag", ["--ckpt_path", "--actual_resume"])
def test_base_weights(inversion: Path, flag: str):
    assert plan("--base", inversion, flag, "m.ckpt").config.model.params.ckpt_path == "m.ckpt"


# ------------------------------------------------------------------------------------------------------- resume


@pytest.fixture
def stopped_run(tmp_path: Path) -> Path:
    """A run directory as a killed run leaves it."""
    folder = tmp_path / "logs" / "imgs2025-01-01T00-00-00_cat"
    config = tiny_config()
    lightning = config.pop("lightning")
    write_config(folder / "configs" / "2025-01-01T00-00-00-project.yaml", {**config, "seed": 7, "train": True})
    write_config(folder / "configs" / "2025-01-01T00-00-00-lightning.yaml", {"lightning": lightning})
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"x")
    return folder


def test_resume_from_directory_or_file(stopped_run: Path):
    for path in (stopped_run, stopped_run / "checkpoints", stopped_run / "checkpoints" / "last.ckpt"):
        made = plan("-r", path)
        assert made.run_dir.resolve() == stopped_run.resolve()
        assert made.resume is not None
        assert made.resume.resolve() == (stopped_run / "checkpoints" / "last.ckpt").resolve()
        assert (made.seed, made.train) == (7, True)
        assert made.lightning.trainer.max_steps == 7


def test_resume_from_a_moved_directory_and_with_changes(stopped_run: Path, tmp_path: Path):
    moved = stopped_run.rename(tmp_path / "elsewhere")
    made = plan("-r", moved, "--max_steps", 9, "data.params.batch_size=2")
    assert made.run_dir == moved
    assert made.lightning.trainer.max_steps == 9
    assert made.config.data.params.batch_size == 2


def test_resume_before_the_first_checkpoint_starts_over(stopped_run: Path):
    (stopped_run / "checkpoints" / "last.ckpt").unlink()
    made = plan("-r", stopped_run)
    assert made.resume is None
    assert made.run_dir == stopped_run


def test_resume_errors(stopped_run: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="there is no"):
        plan("-r", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="not a run directory"):
        plan("-r", tmp_path)
    with pytest.raises(ValueError, match="only one of them"):
        plan("-r", stopped_run, "-n", "other")
    loose = tmp_path / "model.ckpt"
    loose.write_bytes(b"x")
    with pytest.raises(ValueError, match="pass it as --ckpt_path"):
        plan("-r", loose)


def test_later_starts_win_and_never_share_a_name(stopped_run: Path):
    write_config(stopped_run / "configs" / f"{NOW:%Y-%m-%dT%H-%M-%S}-project.yaml", {"seed": 8})
    write_config(stopped_run / "configs" / f"{NOW:%Y-%m-%dT%H-%M-%S}-lightning.yaml", {"lightning": {}})
    made = plan("-r", stopped_run)
    assert made.seed == 8
    assert made.started == "2025-01-31T12-05-10"


def test_taken_run_directories_get_a_number(base: Path, tmp_path: Path):
    (tmp_path / "l" / "2025-01-31T12-05-09_tiny").mkdir(parents=True)
    assert plan("--base", base, "-l", tmp_path / "l").run_dir.name == "2025-01-31T12-05-09_tiny-2"


def test_a_plan_holds_all_that_a_resume_needs(inversion: Path):
    made = plan("--base", inversion, "-t", "-s", 3, "--scale_lr", "false", "--ckpt_path", "m.ckpt")
    again = OmegaConf.create(OmegaConf.to_yaml(made.config))
    assert (again.seed, again.scale_lr, again.train) == (3, False, True)
    assert again.model.params.ckpt_path == "m.ckpt"
