"""Does the units of a table: trains what is missing, then draws, then scores."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaluation.cells import NeedsFailedError, Progress, Store, Unit
from evaluation.experiments import ModelSpec
from evaluation.image_dirs import load_images
from evaluation.judges import Judge, is_blind_to_text, load_judge
from evaluation.plan import Cell, Drawing, LearnedWord, Scoring
from evaluation.scoring import score_features, score_set
from evaluation.training_runs import TrainCommand, learn, quiet, word_file
from ldm.generate_model import select_device

log = logging.getLogger(__name__)

AVERAGED_OVER_EDITING = ("text", "text_mean")
FIRST_WORD = "*"  # the name under which every word is learned


class Workshop:
    """Holds what the units share: one model at a time, and the judges.

    train: main.py's command.
    weights: judges' local weight files, by alias.
    antialias: as the table has it.
    """

    def __init__(
        self,
        model: ModelSpec,
        store: Store,
        train: TrainCommand,
        device: str = "auto",
        weights: Mapping[str, str] | None = None,
        antialias: bool = False,
    ) -> None:
        self.spec = model
        self.store = store
        self.train = train
        self.device = device
        self.weights = weights or {}
        self.antialias = antialias
        self.failures: list[ValueError] = []
        self._model: Any = None
        self._judges: dict[str, Judge] = {}
        self._given: dict[tuple[str, tuple[Path, ...]], Tensor] = {}
        self._texts: dict[tuple[str, str], Tensor] = {}

    def run(self, cells: Sequence[Cell], progress: Progress | None = None, pictures_of_seed: int | None = None) -> None:
        """Do all that is missing: what one concept and seed needs before the next, so that a stopped run leaves scores.

        Words are learned before pictures are drawn, so that only one model is in memory. What fails by itself, such as
        a word that diverged, is left out with all that needs it, and found in `failures`.
        pictures_of_seed: draw this seed's pictures of scores that came from an earlier run, too.
        """
        progress = progress or Progress(self.store)
        missing = [cell for cell in cells if not self.has(cell, cell.seed == pictures_of_seed)]
        if len(missing) < len(cells):
            log.info("%d of %d cells are there", len(cells) - len(missing), len(cells))
        if not missing:
            return
        for alias in self.spec.judges:
            self.judge(alias)  # what is wrong with their files shows before hours of training
        cells = missing
        for cell in cells:
            self.forget_what_is_lost(cell)
        trainings = {job.unit.key: job for cell in cells for job in cell.trainings}
        drawings = {cell.drawing.unit.key: cell.drawing for cell in cells if cell.drawing is not None}
        scorings = {cell.scoring.unit.key: cell.scoring for cell in cells}

        def train(unit: Unit, folder: Path) -> Mapping[str, Any]:
            self.forget_model()
            return learn(trainings[unit.key], folder, self.spec, self.train, self.device)

        def draw(unit: Unit, folder: Path) -> Mapping[str, Any]:
            job = drawings[unit.key]
            if any(word.training.unit.key in progress.failures for word in job.words):
                raise NeedsFailedError
            return self.draw(job, folder)

        def judge(unit: Unit, folder: Path) -> Mapping[str, Any]:
            del folder
            job = scorings[unit.key]
            if job.drawing is not None and not self.store.is_done(job.drawing.unit):
                raise NeedsFailedError
            return self.score(job)

        work = {"train": train, "draw": draw, "score": judge}
        self.do_all(cells, progress, lambda unit, folder: work[unit.kind](unit, folder))
        self.failures = list(progress.failures.values())
        self.forget_model()

    def do_all(
        self, cells: Sequence[Cell], progress: Progress, work: Callable[[Unit, Path], Mapping[str, Any]]
    ) -> None:
        """Do the units of cells; what is wrong with some concepts, or even with all of them, is found in `failures`."""
        concepts = {unit.key: cell.concept.label for cell in cells for unit in units_of(cell)}
        try:
            progress.run("Units", ordered_units(cells), work, group=lambda unit: concepts[unit.key])
        except ValueError as error:
            if error not in progress.failures.values():
                raise
            log.error("too many failures one after the other, so the rest is left: %s", error)

    def has(self, cell: Cell, pictures: bool) -> bool:
        """Whether a cell's score is there, and if they are wanted its pictures."""
        return self.store.is_done(cell.scoring.unit) and not (pictures and self.lacks_pictures(cell))

    def lacks_pictures(self, cell: Cell) -> bool:
        """Whether any of a cell's drawn pictures is not there (they may have been deleted to save space)."""
        job = cell.drawing
        if job is None:
            return False
        folder = self.store.folder(job.unit)
        return not all(job.file(folder, prompt, picture).is_file() for prompt, picture, _, _ in job.jobs())

    def forget_what_is_lost(self, cell: Cell) -> None:
        """Do a missing cell's drawing again when its pictures are gone, and its training when its words are."""
        if cell.drawing is None or not self.lacks_pictures(cell):
            return
        self.store.forget(cell.drawing.unit)
        for word in cell.drawing.words:
            unit = word.training.unit
            if self.store.is_done(unit) and not any(self.store.folder(unit).glob("embeddings_gs-*.pt")):
                self.store.forget(unit)

    # --------------------------------------------------------------------------------------------------- drawing

    @property
    def model(self) -> Any:
        """The base model, loaded when it is needed."""
        if self._model is None:
            from ldm.generate import load_model

            log.info("Loading %s", self.spec.label)
            with quiet("ldm"):
                precision = str(self.spec.sampling.get("precision", "full"))
                self._model = load_model(
                    self.spec.checkpoint_path, device=self.device, precision=precision, size=self.spec.size
                )
        return self._model

    def forget_model(self) -> None:
        """Give the base model's memory back."""
        if self._model is not None:
            self._model = None
            gc.collect()

    def draw(self, job: Drawing, folder: Path) -> dict[str, Any]:
        """Draw the pictures that are not there yet."""
        from ldm.generate import SamplingOptions, iter_images, require_finite, save_png, to_uint8

        missing = [entry for entry in job.jobs() if not job.file(folder, *entry[:2]).is_file()]
        result = {"pictures": len(job.prompts) * job.count}
        if not missing:
            return result
        self.load_words(job.words)
        sampling = job.sampling
        options = SamplingOptions(
            sampling.sampler, sampling.steps, sampling.eta, sampling.scale, height=sampling.height, width=sampling.width
        )
        batches = iter_images(
            self.model,
            [text for _, _, text, _ in missing],
            seeds=[seed for _, _, _, seed in missing],
            options=options,
            batch_size=sampling.batch_size,
            precision=sampling.precision,
        )
        left = iter(missing)
        for batch in batches:
            require_finite(batch)
            for image in to_uint8(batch):
                prompt, picture, text, seed = next(left)
                save_png(image, job.file(folder, prompt, picture), {"prompt": text, "seed": seed})
        return result

    def load_words(self, words: Sequence[LearnedWord]) -> None:
        """Give the model the learned words of a drawing."""
        from ldm.generate_words import load_words

        if not words:
            return
        files = []
        for word in words:
            unit = word.training.unit
            files.append(word_file(self.store.folder(unit), word.step, self.store.result(unit) or {}))
        with quiet("ldm"):
            load_words(self.model, files, [(FIRST_WORD, word.name) for word in words])

    # --------------------------------------------------------------------------------------------------- scoring

    def judge(self, alias: str) -> Judge:
        """The judge of that alias, loaded when it is needed."""
        if alias not in self._judges:
            name = self.spec.judges[alias]
            device = select_device(self.device)
            self._judges[alias] = load_judge(name, self.weights.get(alias), device, self.antialias)
        return self._judges[alias]

    def score(self, job: Scoring) -> dict[str, Any]:
        """Scores of every prompt, and of all prompts together as the table wants them."""
        per_prompt: list[dict[str, float]] = [{} for _ in job.texts]
        for number, (alias, name) in enumerate(self.spec.judges.items()):
            prefix = "" if number == 0 else f"{alias}_"
            reference = self.given_pictures(alias, job.training)
            other = self.given_pictures(alias, job.second) if job.second else None
            for index, text in enumerate(job.texts):
                made = reference if job.drawing is None else self.judge(alias).encode_image(self.pictures(job, index))
                words = None if is_blind_to_text(name) else self.text(alias, text)
                values = score_features(made, reference, words)
                if job.drawing is None:
                    values |= score_set(made)
                    if not job.table.self_pairs:
                        values["image"] = values["image_distinct"]
                if other is not None:
                    values["second_image"] = score_features(made, other)["image"]
                per_prompt[index] |= {f"{prefix}{key}": value for key, value in values.items()}
        return {"metrics": summary(per_prompt, job.table.image_over), "prompts": per_prompt}

    def given_pictures(self, alias: str, paths: tuple[Path, ...]) -> Tensor:
        """Features (N, D) of a concept's own pictures, as training sees them; encoded once for all cells."""
        if (alias, paths) not in self._given:
            self._given[alias, paths] = self.judge(alias).encode_image(load_images(paths, self.spec.size))
        return self._given[alias, paths]

    def text(self, alias: str, text: str) -> Tensor:
        """Features (1, D) of a text; encoded once for all cells."""
        if (alias, text) not in self._texts:
            self._texts[alias, text] = self.judge(alias).encode_text([text])
        return self._texts[alias, text]

    def pictures(self, job: Scoring, prompt: int) -> Tensor:
        """Drawn pictures (N, 3, H, W) of a prompt."""
        assert job.drawing is not None
        folder = self.store.folder(job.drawing.unit)
        return load_images(job.drawing.file(folder, prompt, k) for k in range(job.drawing.count))


def units_of(cell: Cell) -> list[Unit]:
    """What a cell needs."""
    drawing = [] if cell.drawing is None else [cell.drawing.unit]
    return [*(job.unit for job in cell.trainings), *drawing, cell.scoring.unit]


def ordered_units(cells: Sequence[Cell]) -> list[Unit]:
    """Trainings, then drawings, then scores of each concept and seed, in the order of the cells."""
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.concept.label, cell.seed), []).append(cell)
    units = []
    for group in groups.values():
        units += [job.unit for cell in group for job in cell.trainings]
        units += [cell.drawing.unit for cell in group if cell.drawing is not None]
        units += [cell.scoring.unit for cell in group]
    return units


def summary(per_prompt: Sequence[Mapping[str, float]], image_over: str) -> dict[str, float]:
    """One value of each metric: text over the prompts for editing, the rest as the table says.

    per_prompt: the prompt for reconstruction first.
    """
    editing = per_prompt[1:] or per_prompt
    rest = {"reconstruction": per_prompt[:1], "editing": editing, "all": per_prompt}[image_over]
    values = {}
    for metric in per_prompt[0]:
        is_text = metric.endswith(AVERAGED_OVER_EDITING)
        over = editing if is_text else per_prompt if metric.endswith("diversity") else rest
        column = torch.tensor([prompt[metric] for prompt in over], dtype=torch.float64)
        values[metric] = (column.max() if metric.endswith("nearest_max") else column.mean()).item()
    return values
