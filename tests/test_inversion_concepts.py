"""Several concepts in one run: which folder teaches which word, mixed batches, one embedding file each."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import main
from ldm import run
from ldm.callbacks.saving import concept_files
from ldm.data.concepts import ConceptMix
from ldm.util import ConfigError
from tests.conftest import END_TO_END, assert_close
from tests.tiny_inversion import inversion, inversion_config, vectors
from tests.tiny_run import (
    assert_same_state,
    last_checkpoint,
    only_run,
    run_main,
    spawn_main,
    tiny_config,
    write_config,
)

pytestmark = pytest.mark.usefixtures("one_thread")
DATASET = {"target": "ldm.data.personalized.PersonalizedBase", "params": {"size": 8, "repeats": 2}}


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three concepts with 1, 1 and 2 pictures."""
    parent = tmp_path_factory.mktemp("data") / "things"
    for name, numbers in {"cat": [0], "Red Teapot": [1], "clock": [2, 3]}.items():
        (parent / name).mkdir(parents=True)
        for number in numbers:
            shutil.copy(END_TO_END / "images" / f"{number}.png", parent / name)
    (parent / ".hidden").mkdir()
    return parent


def roots(things: Path, *names: str) -> list[Any]:
    return [word for name in names for word in ("--data_root", things / name)]


def plan(config: Path, *words_: Any) -> Any:
    args, overrides = main.parse_args(["--base", str(config), *(str(word) for word in words_)])
    return run.make_plan(args, overrides).config


def manager_of(config: Any) -> tuple[list[str], list[str | None]]:
    params = config.model.params.personalization_config.params
    return list(params.placeholder_strings), list(params.initializer_words)


# ------------------------------------------------------------------------------------------------------------ plans


def test_folders_give_words(things: Path, tmp_path: Path):
    made = plan(inversion(tmp_path), *roots(things, "cat", "Red Teapot"))
    assert manager_of(made) == (["<cat>", "<Red-Teapot>"], ["sculpture", "sculpture"])
    train = made.data.params.train
    assert train.target == "ldm.data.concepts.ConceptMix"
    assert list(train.params.placeholder_tokens) == ["<cat>", "<Red-Teapot>"]
    assert train.params.dataset.params.size == 32


def test_a_folder_of_folders(things: Path, tmp_path: Path):
    made = plan(inversion(tmp_path), "--concepts", "--data_root", things, *("--init_word", "a") * 3)
    assert manager_of(made) == (["<Red-Teapot>", "<cat>", "<clock>"], ["a", "a", "a"])


def test_words_can_be_named(things: Path, tmp_path: Path):
    named = ["--placeholder_string", "*", "--placeholder_string", "@", "--init_word", "cat", "--init_word", "photo"]
    made = plan(inversion(tmp_path), *roots(things, "cat", "clock"), *named)
    assert manager_of(made) == (["*", "@"], ["cat", "photo"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--placeholder_string", "*"], "1 x --placeholder_string .* for 2 concepts"),
        (["--init_word", "a", "--init_word", "b", "--init_word", "c"], "3 x --init_word .* or one for all"),
        (["--placeholder_string", "*", "--placeholder_string", "*"], "two concepts would have the word '\\*'"),
        (["--data_root", "elsewhere/cat"], "two concepts would have the word '<cat>'"),
    ],
)
def test_numbers_that_do_not_match(things: Path, tmp_path: Path, more: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        plan(inversion(tmp_path), *roots(things, "cat", "clock"), *more)


def test_other_mistakes(things: Path, tmp_path: Path):
    config = inversion(tmp_path)
    with pytest.raises(ValueError, match="--placeholder_string was given 2 times"):
        plan(config, *roots(things, "cat"), "--placeholder_string", "a", "--placeholder_string", "b")
    with pytest.raises(ValueError, match="name the folder"):
        plan(config, "--concepts")
    with pytest.raises(ValueError, match="has no subfolders"):
        plan(config, "--concepts", "--data_root", things / "cat")
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        plan(config, "--concepts", "--data_root", things / "nowhere")
    with pytest.raises(ValueError, match="no model.params.personalization_config"):
        plan(write_config(tmp_path / "plain.yaml", tiny_config()), *roots(things, "cat", "clock"))
    mix = {"target": "ldm.data.concepts.ConceptMix",
           "params": {"dataset": DATASET, "data_roots": ["a"], "placeholder_tokens": ["<a>"]}}  # fmt: skip
    odd = inversion_config()
    odd["data"]["params"]["train"] = mix
    with pytest.raises(ConfigError, match="captions with '<a>' but the model learns"):
        plan(write_config(tmp_path / "odd.yaml", odd))


# ------------------------------------------------------------------------------------------------------------- data


def test_concepts_take_turns_whatever_their_sizes(things: Path):
    mix = ConceptMix(DATASET, [things / "cat", things / "clock"], ["<cat>", "<clock>"])
    assert len(mix) == 8  # twice the larger one's two pictures times two repeats
    words_ = ["<cat>" if "<cat>" in mix[i]["caption"] else "<clock>" for i in range(8)]
    assert words_ == ["<cat>", "<clock>"] * 4
    with pytest.raises(IndexError):
        mix[8]


@pytest.mark.parametrize(
    ("words_", "params", "message"),
    [
        (["<a>"], {}, "2 data_roots but 1"),
        (["<a>", "<a>"], {}, "two concepts have the word '<a>'"),
        (["<a>", "<b>"], {"per_image_tokens": True}, "per_image_tokens"),
    ],
)
def test_mixes_that_make_no_sense(things: Path, words_: list[str], params: dict[str, Any], message: str):
    dataset = {**DATASET, "params": {"size": 8, **params}}
    with pytest.raises(ValueError, match=message):
        ConceptMix(dataset, [things / "cat", things / "clock"], words_)


def test_names_of_embedding_files():
    assert concept_files(["*"]) == {}
    assert concept_files(["<my cat>", "<clock>"]) == {
        "<my cat>": "embeddings_my-cat.pt", "<clock>": "embeddings_clock.pt",
    }  # fmt: skip
    odd = concept_files(["*", "@", "best", "gs-5", "a b", "a-b"])
    assert len(set(odd.values())) == 6
    assert not {"embeddings_best.pt", "embeddings_gs-5.pt"} & set(odd.values())
    assert concept_files(["*", "א", "ב"]) == {}  # words of single pictures are no concepts


# ------------------------------------------------------------------------------------------------------------- runs


def test_three_concepts_learn_and_resume(things: Path, tmp_path: Path):
    config = inversion(tmp_path)
    command = ["--base", config, "--concepts", "--data_root", things, "data.params.batch_size=3", "--max_steps"]
    run_main(*command, 6, "-l", tmp_path / "whole")
    whole = only_run(tmp_path / "whole")
    assert whole.name.startswith("things2")
    files = {path.name for path in (whole / "checkpoints").glob("*.pt")}
    assert {"embeddings.pt", "embeddings_cat.pt", "embeddings_Red-Teapot.pt", "embeddings_clock.pt"} <= files
    together = vectors(whole)
    assert set(together) == {"<cat>", "<Red-Teapot>", "<clock>"}
    rows = []
    for word, file in {"<cat>": "cat", "<Red-Teapot>": "Red-Teapot", "<clock>": "clock"}.items():
        alone = vectors(whole, f"embeddings_{file}.pt")
        assert list(alone) == [word]
        assert (alone[word] == together[word]).all()
        rows.append(tuple(alone[word].flatten().tolist()))
    assert len(set(rows)) == 3  # all started from "sculpture"

    run_main(*command, 3, "-l", tmp_path / "part")
    part = only_run(tmp_path / "part")
    run_main("-r", part, "--max_steps", 6)
    assert last_checkpoint(part)["global_step"] == 6
    assert_same_state(whole, part)


def test_a_start_file_must_hold_every_concepts_word(things: Path, tmp_path: Path):
    command = ["--base", inversion(tmp_path), *roots(things, "cat", "clock"), "-l", tmp_path / "logs"]
    with pytest.raises(ValueError, match=r"the captions have the word '<cat>', but the model learns \['\*'\]"):
        run_main(*command, "--embedding_manager_ckpt", END_TO_END / "embeddings_1vec.pt")


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(things: Path, tmp_path: Path):
    command = ["--base", inversion(tmp_path), "--concepts", "--data_root", things, "--scale_lr", "false"]
    run_main(*command, "-l", tmp_path / "one", "data.params.batch_size=4")
    two = spawn_main(*command, "-l", tmp_path / "two", "data.params.batch_size=2", "--devices", 2)
    assert two.returncode == 0, two.stderr[-2000:]
    assert "did not find any unused parameters" not in two.stderr
    one, other = (vectors(only_run(tmp_path / name)) for name in ("one", "two"))
    for word in one:
        assert_close(other[word], one[word])
