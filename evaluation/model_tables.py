"""Tables of whole models: first stages by what they lose, text-to-image models by FID and IS."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaluation.cells import Progress, Store, Unit, digest, fingerprint, shard
from evaluation.experiments import ModelSpec, Row, Sampling, Table, sampling_options
from evaluation.fidelity import (
    FeatureNetwork,
    check_inception,
    features_of,
    frechet_distance,
    inception_score,
    kernel_distance,
    load_inception,
)
from evaluation.image_dirs import load_images
from evaluation.metrics import psnr, ssim
from evaluation.plan import VERSION, model_fingerprint, plain, what_matters
from evaluation.results import TableResult, summarise
from ldm.data.captions import read_captions
from ldm.data.personalized import find_images
from ldm.generate_model import select_device
from ldm.resources import resource_root

log = logging.getLogger(__name__)

PARTS = 20  # the pictures in so many parts: how much PSNR and SSIM differ between them gives their intervals
ALL = "all pictures"
QUICK_PICTURES = 64
MODELS = "models/first_stage_models"


def batches(files: Sequence[Path], size: int, batch_size: int) -> Iterator[Tensor]:
    """Pictures (B, 3, size, size) in [-1, 1]: the middle square, as the published evaluation takes it."""
    for start in range(0, len(files), batch_size):
        yield load_images(files[start : start + batch_size], size, crop="center")


def names_and_sizes(files: Sequence[Path]) -> str:
    """Hash of the names and sizes of very many files."""
    return digest([[file.name, file.stat().st_size] for file in files])


def to_bytes(images: Tensor) -> Tensor:
    """Pictures in [-1, 1] as uint8."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# -------------------------------------------------------------------------------------------------- first stages


def first_stage_unit(row: Row, table: Table, files: Sequence[Path], network_file: str | None) -> Unit:
    """The unit of one first stage."""
    settings = {
        "version": VERSION,
        "weights": model_fingerprint(stage_folder(row)),
        "pictures": names_and_sizes(files),
        "network": fingerprint(network_file) if network_file else None,
        "options": dict(table.options),
    }
    return Unit("first_stage", plain(settings))


def stage_folder(row: Row) -> Path:
    """Folder of a first stage: `options.name` among those that come along, or a path."""
    name = str(row.options.get("name", row.name))
    path = Path(name)
    return path if path.is_dir() else resource_root() / MODELS / name


def score_first_stage(
    stage: Any, files: Sequence[Path], options: Mapping[str, Any], network: FeatureNetwork | None
) -> dict[str, Any]:
    """PSNR and SSIM of reconstructions, in parts of the pictures, and R-FID and R-IS where there is a feature network.

    KL stages are decoded from the posterior's mode, so the figures do not depend on noise.
    """
    device = next(stage.parameters()).device
    signal, structure = [], []
    pairs: list[tuple[Tensor, Tensor]] = []
    real: list[Tensor] = []
    for images in batches(files, int(options.get("size", 256)), int(options.get("batch_size", 8))):
        made = reconstruct(stage, images.to(device)).cpu().clamp(-1, 1)
        signal.append(psnr(made, images))
        structure.append(ssim(made, images))
        if network is not None:
            pairs.append(network(to_bytes(made)))
            real.append(network(to_bytes(images))[0])
    columns = {"psnr": torch.cat(signal), "ssim": torch.cat(structure)}
    parts = {name: [part.mean().item() for part in split_evenly(column)] for name, column in columns.items()}
    values = {}
    if network is not None:
        features, logits = (torch.cat(part) for part in zip(*pairs, strict=True))
        values["fid"] = frechet_distance(torch.cat(real), features)
        values["inception_score"] = inception_score(logits)
    return {"metrics": values, "parts": parts}


def split_evenly(values: Tensor) -> Sequence[Tensor]:
    """Values (N,) in `PARTS` parts (N, if those are fewer) of nearly the same size, which weigh the same."""
    return values.tensor_split(min(PARTS, len(values)))


@torch.no_grad()
def reconstruct(stage: Any, images: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) through a first stage and back."""
    encoded = stage.encode(images)
    if isinstance(encoded, tuple):  # quantised vectors, loss, codes
        return stage.decode(encoded[0])
    return stage.decode(encoded if isinstance(encoded, Tensor) else encoded.mode())


# ------------------------------------------------------------------------------------------------- text to image


def drawing_units(
    row: Row, table: Table, model: ModelSpec, captions: Sequence[str], quick: bool
) -> list[tuple[Unit, list[tuple[int, str]]]]:
    """Units of `chunk` captions each, with (number, caption) of their pictures; picture k is drawn with seed k."""
    chunk = int(table.options.get("chunk", 100))
    sampling = sampling_options(model, row, model.quick if quick else None)
    weights = model_fingerprint(model.checkpoint_path)
    units = []
    for start in range(0, len(captions), chunk):
        jobs = list(enumerate(captions))[start : start + chunk]
        settings = {"version": VERSION, "weights": weights, "sampling": what_matters(sampling), "first": start,
                    "captions": [text for _, text in jobs]}  # fmt: skip
        units.append((Unit("captions", plain(settings)), jobs))
    return units


def draw_captions(model: Any, sampling: Sampling, jobs: Sequence[tuple[int, str]], folder: Path) -> None:
    """Draw the pictures of a unit that are not there yet."""
    from ldm.generate import SamplingOptions, iter_images, require_finite, save_png, to_uint8

    missing = [(number, text) for number, text in jobs if not (folder / f"{number:06}.png").is_file()]
    options = SamplingOptions(
        sampling.sampler, sampling.steps, sampling.eta, sampling.scale, height=sampling.height, width=sampling.width
    )
    left = iter(missing)
    texts, seeds = [text for _, text in missing], [number for number, _ in missing]
    for batch in iter_images(
        model, texts, seeds=seeds, options=options, batch_size=sampling.batch_size, precision=sampling.precision
    ):
        require_finite(batch)
        for image in to_uint8(batch):
            number, text = next(left)
            save_png(image, folder / f"{number:06}.png", {"prompt": text, "seed": number})


def read_captioned(folder: Path, limit: int | None) -> tuple[list[Path], list[str]]:
    """The pictures of a folder that have captions, the first `limit` if there is one, and their captions."""
    files = find_images(folder)
    captions = read_captions(folder, files, None)
    chosen = [file for file in files if file.name in captions][:limit]
    if not chosen:
        raise ValueError(f"{folder} holds no captions: put them in metadata.jsonl or in .txt files beside the pictures")
    return chosen, [captions[file.name] for file in chosen]


def score_pictures(files: Sequence[Path], real: Sequence[Path], size: int, network: FeatureNetwork) -> dict[str, float]:
    """FID, KID and IS of pictures against real ones."""
    made, logits = features_of((to_bytes(part) for part in batches(files, size, 32)), network)
    true, _ = features_of((to_bytes(part) for part in batches(real, size, 32)), network)
    return {
        "fid": frechet_distance(true, made),
        "kid": kernel_distance(true, made),
        "inception_score": inception_score(logits),
    }


# ------------------------------------------------------------------------------------------------------- the run


class ModelTable:
    """Does what is missing of a table of whole models.

    data: folder of pictures, with captions for text-to-image.
    rows: do only these; default: all. The others show what is there.
    network: the feature network, or None: then FID, KID and IS are left out.
    """

    def __init__(
        self,
        table: Table,
        model: ModelSpec,
        store: Store,
        data: Path,
        network_file: str | None,
        device: str,
        quick: bool,
        rows: Sequence[str] | None = None,
    ) -> None:
        self.table = table
        self.model = model
        self.store = store
        self.network_file = network_file
        self.device = device
        self.quick = quick
        self.rows = [row for row in table.rows if row.source != "published"]
        self.wanted = {row.name for row in self.rows if rows is None or row.name in rows}
        limit = table.options.get("limit")
        if quick:
            limit = min(limit or QUICK_PICTURES, QUICK_PICTURES)
        self.captions: list[str] = []
        if table.kind == "text_to_image":
            self.files, self.captions = read_captioned(data, limit)
        else:
            self.files = find_images(data)[:limit]

    def network(self) -> FeatureNetwork | None:
        """The feature network; None, with a warning, where none is named and the table can do without."""
        if self.network_file is None and self.table.kind == "first_stages":
            log.warning("no --inception_weights: R-FID and R-IS are left out")
            return None
        return load_inception(self.network_file, select_device(self.device))

    def records(self, part: tuple[int, int], report_only: bool) -> list[dict[str, Any]]:
        """What is done: for each row one record, or one for each part of the pictures."""
        compute = self.first_stages if self.table.kind == "first_stages" else self.drawn
        records = []
        for row, unit in compute(part, report_only).items():
            result = self.store.result(unit)
            if result is None:
                continue
            parts: Mapping[str, Sequence[float]] = result.get("parts", {})
            for number in range(max(map(len, parts.values()), default=1)):
                own = {name: values[number] for name, values in parts.items()}
                if number == 0:  # figures of all pictures stand there once, so that they get no interval
                    own |= result["metrics"]
                label = f"part {number}" if parts else ALL
                records.append({"row": row, "concept": label, "seed": 0, **own})
        return records

    def first_stages(self, part: tuple[int, int], report_only: bool) -> dict[str, Unit]:
        """Score the wanted first stages whose weights are there; returns the units of all whose weights are."""
        from ldm.generate import load_model

        units: dict[str, Unit] = {}
        for row in self.rows:
            try:
                units[row.name] = first_stage_unit(row, self.table, self.files, self.network_file)
            except FileNotFoundError as error:
                log.warning("%s is left out: %s", row.label, error)
        if self.wanted.isdisjoint(units):
            raise FileNotFoundError(
                f"{self.table.name}: the weights of no row that is asked for are there; see the warnings for where"
            )
        self.rows = [row for row in self.rows if row.name in units]
        rows = {unit.key: self.table.row(name) for name, unit in units.items()}
        network = None if report_only else self.network()

        def work(unit: Unit, folder: Path) -> Mapping[str, Any]:
            del folder
            stage = load_model(stage_folder(rows[unit.key]), device=self.device)
            return score_first_stage(stage, self.files, self.table.options, network)

        if not report_only:
            wanted = [unit for name, unit in units.items() if name in self.wanted]
            mine = shard(wanted, lambda unit: unit.key, part)
            Progress(self.store).run("First stages", mine, work)
        return units

    def drawn(self, part: tuple[int, int], report_only: bool) -> dict[str, Unit]:
        """Draw the captions' pictures, then score each wanted row whose pictures are all there."""
        from ldm.generate import load_model

        plan = {row.name: drawing_units(row, self.table, self.model, self.captions, self.quick) for row in self.rows}
        jobs = {unit.key: (name, entries) for name, units in plan.items() for unit, entries in units}
        loaded: list[Any] = []

        def draw(unit: Unit, folder: Path) -> Mapping[str, Any]:
            if not loaded:
                precision = str(self.model.sampling.get("precision", "full"))
                loaded.append(load_model(self.model.checkpoint_path, device=self.device, precision=precision))
            name, entries = jobs[unit.key]
            sampling = sampling_options(self.model, self.table.row(name), self.model.quick if self.quick else None)
            draw_captions(loaded[0], sampling, entries, folder)
            return {"pictures": len(entries)}

        wanted = [unit for name, units in plan.items() if name in self.wanted for unit, _ in units]
        if not report_only:
            check_inception(self.network_file)  # or it would be missing after days of drawing
            Progress(self.store).run("Drawings", shard(wanted, lambda unit: unit.key, part), draw)
            loaded.clear()
        whole = {name: units for name, units in plan.items() if all(self.store.is_done(unit) for unit, _ in units)}
        return self.score_drawn(whole, report_only)

    def score_drawn(
        self, whole: Mapping[str, Sequence[tuple[Unit, list[tuple[int, str]]]]], report_only: bool
    ) -> dict[str, Unit]:
        """Score the wanted ones of the rows whose pictures are all drawn; returns the units of all of these."""
        real = names_and_sizes(self.files)
        network_print = fingerprint(self.network_file) if self.network_file else None
        scores = {}
        pictures: dict[str, list[Path]] = {}
        for name, units in whole.items():
            settings = {"drawn": [unit.key for unit, _ in units], "real": real, "network": network_print,
                        "size": self.model.size}  # fmt: skip
            scores[name] = Unit("fidelity", {"version": VERSION, **settings})
            pictures[scores[name].key] = [
                self.store.folder(unit) / f"{number:06}.png" for unit, jobs in units for number, _ in jobs
            ]
        wanted = [unit for name, unit in scores.items() if name in self.wanted]
        if report_only or all(self.store.is_done(unit) for unit in wanted):
            return scores
        network = self.network()
        assert network is not None

        def work(unit: Unit, folder: Path) -> Mapping[str, Any]:
            del folder
            return {"metrics": score_pictures(pictures[unit.key], self.files, self.model.size, network)}

        Progress(self.store).run("Scores", wanted, work)
        return scores

    def result(self, records: Sequence[Mapping[str, Any]], facts: Mapping[str, str]) -> TableResult:
        """The table from what is done. FID and IS have no intervals: they are one figure of all pictures."""
        known = {"Pictures": str(len(self.files)), **facts}
        if self.table.kind == "text_to_image":
            known = {"Model": self.model.label, **known}
        labels = list(dict.fromkeys(record["concept"] for record in records)) or [ALL]
        return summarise(self.table, records, labels, [0], known, len(self.rows) * len(labels))
