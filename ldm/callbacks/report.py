"""One page about a finished inversion: what it saw, how it went, what the word is, how to use it."""

from __future__ import annotations

import contextlib
import csv
import logging
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf

from ldm.callbacks.images import ImageLogger
from ldm.callbacks.report_page import curve, embed_images, escape, figure, page, table
from ldm.callbacks.samples import SampleGrids, prompts_for_words
from ldm.callbacks.validation import BEST, METRIC, FixedValidation
from ldm.checkpoint import atomic_path

log = logging.getLogger(__name__)

PREVIEWS = {SampleGrids: "sample grids", ImageLogger: "training pictures", FixedValidation: METRIC}
SIMILARITIES = {  # of evaluation.alignment, where a run measures them
    "val/text_similarity": "how closely edits of the word follow their text",
    "val/image_similarity": "how like the word's pictures are to those it learned from",
}
MOST_STEPS = 8  # of the sample grids
NEAREST = 5
GRIDS = {"raw": "without guidance", "guided": "with guidance"}


class RunReport(pl.Callback):
    """Writes `report.html` in the run directory at the end: one file, without anything from elsewhere.

    It shows what the other callbacks left there: `images/contact_sheet.png`, the CSV files of the losses and
    `images/samples`. `max_megabytes` bounds its pictures. A report that fails is a warning; the run is not lost.
    """

    def __init__(
        self,
        run_dir: str | Path,
        config: Any = None,
        lightning_config: Any = None,
        started: str = "",  # names the run's config file
        max_megabytes: float = 1.4,
        disabled: bool = False,
    ) -> None:
        super().__init__()
        self.run_dir = Path(run_dir)
        self.config = OmegaConf.create(config or {})
        self.lightning_config = OmegaConf.create(lightning_config or {})
        self.started = started
        self.budget = int(max_megabytes * 1e6)
        self.disabled = disabled
        self.began = 0.0
        self.first_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        del pl_module
        self.began, self.first_step = time.perf_counter(), trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the page."""
        if self.disabled or not trainer.is_global_zero or trainer.global_step == 0:
            return
        path = self.run_dir / "report.html"
        try:
            text = self.render(trainer, pl_module)
            with atomic_path(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        except Exception as error:  # the run itself went well, and its checkpoint is saved after this
            log.warning("The report could not be written: %s", error)
            return
        log.info("Report: %s", path)

    def render(self, trainer: pl.Trainer, pl_module: Any) -> str:
        """The page as HTML."""
        for logger in trainer.loggers:
            with contextlib.suppress(NotImplementedError):
                logger.save()
        sheet = self.run_dir / "images" / "contact_sheet.png"
        grids = sample_grids(self.run_dir / "images" / "samples")
        pictures = embed_images([sheet, *(path for row in grids.values() for path in row.values())], self.budget)
        words = " and ".join(f"“{word}”" for word in pl_module.embedding_manager.placeholders)
        seen = figure(pictures[sheet], "The pictures as the model sees them") if sheet in pictures else ""
        sections = {
            "Use it": self.command(trainer, pl_module),
            "What it saw": seen,
            "How it went": self.losses(trainer),
            "What it draws": draw_grids(grids, pictures),
            "What the word is": word_table(pl_module.embedding_manager),
            "What it cost": self.cost(trainer),
            "Settings": self.settings(trainer, pl_module),
        }
        return page(f"Learning {words}: {self.run_dir.name}", sections)

    # -- sections ------------------------------------------------------------------------------------------------

    def command(self, trainer: pl.Trainer, pl_module: Any) -> str:
        """The command that draws each word, ready to be copied."""
        files = self.run_dir / "checkpoints"
        words = ["python", "scripts/txt2img.py"]
        weights = OmegaConf.select(self.config, "model.params.ckpt_path")
        if weights:
            config = self.run_dir / "configs" / f"{self.started}-project.yaml"
            words += ["--ckpt_path", str(weights), *(["--config", str(config)] if config.is_file() else [])]
        words += ["--embedding_path", str(files / "embeddings.pt"), "--ddim_steps", "50", "--prompt"]
        commands = [shlex.join([*words, prompt]) for prompt in prompts_for_words(trainer, pl_module)]
        best = files / BEST
        note = f"<p>The vectors with the best loss are in <code>{escape(best)}</code>.</p>" if best.is_file() else ""
        return f"<pre>{escape(chr(10).join(commands))}</pre>{note}"

    def losses(self, trainer: pl.Trainer) -> str:
        """The curves of both losses."""
        train, fixed = (read_metric(self.run_dir, name) for name in ("train/loss", METRIC))
        fixer = next((c for c in trainer.callbacks if isinstance(c, FixedValidation)), None)  # type: ignore[attr-defined]
        best = fixer.best_step if fixer is not None and fixer.best is not None else None
        comparable = f"{METRIC} by step: the same pictures, noise and time steps each time"
        if best is not None:
            comparable += f"; best at step {best}"
        curves = curve(fixed, comparable, mark=best)
        curves += curve(train, "train/loss by step (pale) and its running average", smoothed=True)
        for name, meaning in SIMILARITIES.items():
            curves += curve(read_metric(self.run_dir, name), f"{name} by step: {meaning}")
        return curves or "<p class='muted'>Too few losses were logged for a curve.</p>"

    def cost(self, trainer: pl.Trainer) -> str:
        """Time of the run and the share of it that previews took."""
        total = max(time.perf_counter() - self.began, 1e-9)
        steps = trainer.global_step - self.first_step
        since = f" since step {self.first_step}" if self.first_step else ""
        rows = [(f"{steps} steps{since}", f"{total:.1f} s", "")]
        shown = 0.0
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            name = PREVIEWS.get(type(callback), getattr(callback, "shown_as", None))
            if name and callback.seconds:
                shown += callback.seconds
                rows.append((name, f"{callback.seconds:.1f} s", f"{100 * callback.seconds / total:.1f} %"))
        rows.append(("all previews", f"{shown:.1f} s", f"{100 * shown / total:.1f} %"))
        return table(rows, ("", "time", "share"))

    def settings(self, trainer: pl.Trainer, pl_module: Any) -> str:
        """The settings that matter most, and all of them folded up."""
        initial = pl_module.embedding_manager.init_words
        roots = OmegaConf.select(self.config, "data.params.train.params")
        roots = {} if roots is None else roots
        rows = [
            ("pictures from", roots.get("data_root") or ", ".join(map(str, roots.get("data_roots") or [])) or "?"),
            ("initial words", ", ".join(f"{word} from “{start}”" for word, start in initial.items()) or "none"),
            ("steps", trainer.global_step),
            ("learning rate", f"{pl_module.learning_rate:.4g}"),
            ("batch size", OmegaConf.select(self.config, "data.params.batch_size")),
            ("seed", OmegaConf.select(self.config, "seed")),
            ("device, precision", f"{trainer.world_size} x {trainer.strategy.root_device.type}, {trainer.precision}"),
            ("versions", f"torch {torch.__version__}, Lightning {pl.__version__}"),
        ]
        whole = OmegaConf.to_yaml(OmegaConf.merge(self.config, {"lightning": self.lightning_config}))
        return table(rows) + f"<details><summary>The whole config</summary><pre>{escape(whole)}</pre></details>"


def read_metric(run_dir: Path, name: str) -> list[tuple[float, float]]:
    """(step, value) of a logged metric over all parts of a run; a step that was done again counts once."""
    found: dict[float, float] = {}
    for file in sorted(run_dir.glob("csv/*/metrics.csv")):
        with file.open(newline="", encoding="utf-8") as rows:
            found |= {float(row["step"]): float(row[name]) for row in csv.DictReader(rows) if row.get(name)}
    return sorted(found.items())


def sample_grids(folder: Path) -> dict[int, dict[str, Path]]:
    """Grids by step and kind, at most `MOST_STEPS` steps evenly spaced, the first and the last among them."""
    grids: dict[int, dict[str, Path]] = {}
    for path in sorted(folder.glob("*_gs-*.jpg")):
        match = re.fullmatch(r"(\w+)_gs-(\d+)", path.stem)
        if match and match[1] in GRIDS:
            grids.setdefault(int(match[2]), {})[match[1]] = path
    steps = sorted(grids)
    if len(steps) > MOST_STEPS:
        steps = [steps[round(i * (len(steps) - 1) / (MOST_STEPS - 1))] for i in range(MOST_STEPS)]
    return {step: grids[step] for step in steps}


def draw_grids(grids: dict[int, dict[str, Path]], pictures: dict[Path, str]) -> str:
    """A row for each step: the grids of each kind, side by side."""
    rows = []
    for step, kinds in grids.items():
        cells = [
            f'<td><img alt="step {step}, {escape(GRIDS[kind])}" src="{pictures[kinds[kind]]}"></td>'
            for kind in GRIDS
            if kind in kinds and kinds[kind] in pictures
        ]
        rows.append(f"<tr><th>{step}</th>{''.join(cells)}</tr>" if cells else "")
    if not any(rows):
        return ""
    heads = "".join(f"<th>{escape(name)}</th>" for name in GRIDS.values())
    return (
        f"<p class='muted'>The same noise at every step.</p><table><tr><th>step</th>{heads}</tr>{''.join(rows)}</table>"
    )


@torch.no_grad()
def word_table(manager: Any) -> str:
    """Length of each vector, its likeness to where it started, and the nearest words of the vocabulary."""
    lengths = manager.get_embedding_norms_squared().sqrt().tolist()
    rows: list[Sequence[object]] = []
    first = 0
    for name in manager.placeholders:
        vectors = manager.string_to_param_dict[name]
        initial = manager.initial_embeddings
        starts = initial[name] if name in initial else None  # noqa: SIM401 - it is no dict
        near = manager.nearest_words(name, min(NEAREST, manager.embedder.vocab_size))
        for k in range(manager.active(name)):
            start = "–"
            if starts is not None:
                likeness = torch.nn.functional.cosine_similarity(vectors[k], starts[k].to(vectors), dim=0)
                start = f"{float(likeness):.2f} ({manager.init_words[name]}, length {float(starts[k].norm()):.3g})"
            label = name if len(vectors) == 1 else f"{name} [{k + 1}]"
            nearest = ", ".join(f"{word} {value:.2f}" for word, value in near[k])
            rows.append((label, f"{lengths[first + k]:.3g}", start, nearest))
        first += len(vectors)
    note = "<p class='muted'>Likeness is the cosine between two vectors: 1 is the same direction.</p>"
    return table(rows, ("word", "length", "likeness to its start", "nearest vocabulary words")) + note
