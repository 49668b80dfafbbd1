"""WebDataset shards: tar files of samples, for what outgrows one disk or one folder.

In a shard the files of one sample share their name up to the first dot: `000017.jpg`, `000017.txt`, `000017.json`.

The order depends on the seed, the epoch, the number of processes and the number of workers, on nothing else. With
`samples_per_epoch` a run resumes in the middle of an epoch with exactly the batches that it would have seen: what was
trained is read past without decoding. Without it an epoch is one pass over the shards, and a resumed run starts
its epoch anew.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import random
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from ldm.data.folder import check_probability, drop_caption
from ldm.data.image import Colour, ImageLoader, to_array
from ldm.data.seeding import derive_seed, seeded

log = logging.getLogger(__name__)

Raw = dict[str, Any]  # "__key__", "__url__", and bytes by file ending
PIPE_VARIABLE = "LDM_ALLOW_PIPE"
MAX_SHARDS = 1_000_000
ON_ERROR = ("raise", "skip")


class ShardStream(IterableDataset):
    """Decoded samples of shards, split over processes and workers.

    `select` says which undecoded samples take part; `decode` makes an item of one. A damaged sample raises
    `ValueError` with its name and shard, or is left out with a warning (`on_error="skip"`; then a run resumed after it
    may see other batches than an unbroken one).
    """

    def __init__(
        self,
        shards: str | Sequence[str],  # paths or URLs; {000..123} stands for the numbers between
        decode: Callable[[Raw], dict[str, Any]],
        select: Callable[[Raw], bool] | None = None,
        shuffle: int = 1000,  # samples in the buffer that mixes their order; 0 keeps shards and samples in order
        samples_per_epoch: int | None = None,  # over all processes
        seed: int = 23,
        on_error: str = "raise",
    ) -> None:
        super().__init__()
        if on_error not in ON_ERROR:
            raise ValueError(f"on_error '{on_error}' is not known; choose one of: {', '.join(ON_ERROR)}")
        self.shards = expand_shards(shards)
        self.decode = decode
        self.select = select
        self.shuffle = shuffle
        self.samples_per_epoch = samples_per_epoch
        self.seed = seed
        self.on_error = on_error
        self.start_at(0, 1)

    def start_at(self, batch: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        """Let the next iteration begin with batch number `batch` of the run, as process `rank` of `world_size`.

        Where epochs have no set length, that is a fresh pass whose order depends on `batch`.
        """
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        if self.samples_per_epoch is None:
            self.epoch, self.first = batch, 0
            return
        if self._batches() < 1:
            raise ValueError(
                f"samples_per_epoch {self.samples_per_epoch} gives no batch of {batch_size} to each of {world_size} "
                "processes"
            )
        self.epoch, self.first = divmod(batch, self._batches())

    def __len__(self) -> int:
        if self.samples_per_epoch is None:
            raise TypeError("shards are of unknown length; set samples_per_epoch")
        return self._batches() * self.batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if self.samples_per_epoch is None:
            return self._items(self.epoch, self.rank * workers + worker, self.world_size * workers, 0)
        # Workers deliver batches by turns, beginning with worker 0 at the first batch of this iteration, whose turn
        # in an unbroken epoch was that of worker `first % workers`. Each takes over the stream of its turn.
        turn = (self.first + worker) % workers
        batches_before = len(range(turn, self.first, workers))
        batches_left = len(range(self.first + worker, self._batches(), workers))
        stream = self._items(
            self.epoch, self.rank * workers + turn, self.world_size * workers, batches_before * self.batch_size
        )
        return itertools.islice(stream, batches_left * self.batch_size)

    def _batches(self) -> int:
        return (self.samples_per_epoch or 0) // (self.batch_size * self.world_size)

    def _items(self, epoch: int, stream: int, streams: int, skip: int) -> Iterator[dict[str, Any]]:
        for number, raw in enumerate(self._shuffled(epoch, stream, streams)):
            if number < skip:
                continue
            try:
                with seeded(self.seed, epoch, stream, number):
                    item = self.decode(raw)
            except ValueError as error:
                message = f"{raw['__key__']} in {raw['__url__']}: {error}"
                if self.on_error == "raise":
                    raise ValueError(message) from error
                log.warning("skipped %s", message)
                continue
            yield item

    def _shuffled(self, epoch: int, stream: int, streams: int) -> Iterator[Raw]:
        """Pass over the shards, for ever where an epoch has a length, through a buffer that mixes neighbours."""
        samples = self._samples(epoch, stream, streams)
        if self.shuffle < 2:
            yield from samples
            return
        rng = random.Random(derive_seed(self.seed, epoch, stream, 0))
        buffer: list[Raw] = []
        for raw in samples:
            if len(buffer) < self.shuffle:
                buffer.append(raw)
                continue
            place = rng.randrange(self.shuffle)
            yield buffer[place]
            buffer[place] = raw
        rng.shuffle(buffer)
        yield from buffer

    def _samples(self, epoch: int, stream: int, streams: int) -> Iterator[Raw]:
        passes = itertools.count() if self.samples_per_epoch is not None else range(1)
        for number in passes:
            order = list(self.shards)
            if self.shuffle:
                random.Random(derive_seed(self.seed, epoch, number)).shuffle(order)
            found = 0
            for raw in self._share(order, stream, streams):
                if self.select is None or self.select(raw):
                    found += 1
                    yield raw
            if not found and self.samples_per_epoch is not None:
                raise ValueError(f"part {stream + 1} of {streams} of the shards has no sample that is wanted")

    def _share(self, shards: list[str], stream: int, streams: int) -> Iterator[Raw]:
        """Give each stream its own shards; where there are fewer shards than streams, its own samples of all."""
        if len(shards) >= streams:
            return self._read(shards[stream::streams])
        return itertools.islice(self._read(shards), stream, None, streams)

    def _read(self, shards: list[str]) -> Iterator[Raw]:
        for shard in shards:
            try:
                yield from read_shard(shard)
            except ValueError as error:
                if self.on_error == "raise":
                    raise
                log.warning("skipped the rest of %s", error)


class WebDatasetPictures(ShardStream):
    """Items are `image` (H, W, 3) in [-1, 1] and `caption`, from `jpg`/`png`/... and `txt` files of each sample."""

    def __init__(
        self,
        shards: str | Sequence[str],
        size: int | None = None,
        crop: str = "center",  # stretch | center | random | pad
        interpolation: str = "bicubic",
        flip_p: float = 0.0,
        alpha: str = "composite",
        background: Colour = "white",
        image_key: str = "jpg;jpeg;png;webp",  # file endings, the first present is taken
        caption_key: str = "txt",
        caption_dropout: float = 0.0,  # share of captions replaced by "", for classifier-free guidance
        shuffle: int = 1000,
        samples_per_epoch: int | None = None,
        seed: int = 23,
        on_error: str = "raise",
    ) -> None:
        super().__init__(shards, self._decode, None, shuffle, samples_per_epoch, seed, on_error)
        self.loader = ImageLoader(
            size=size, crop=crop, interpolation=interpolation, flip_p=flip_p, alpha=alpha, background=background
        )
        self.image_key = image_key
        self.caption_key = caption_key
        self.caption_dropout = check_probability("caption_dropout", caption_dropout)

    def _decode(self, raw: Raw) -> dict[str, Any]:
        image = self.loader.open(first_of(raw, self.image_key))
        caption = drop_caption(text_of(raw, self.caption_key), self.caption_dropout)
        return {"image": to_array(self.loader.finish(*self.loader.prepare(image))[0]), "caption": caption}


def first_of(raw: Raw, endings: str) -> bytes:
    """Return the content of the first of `endings` ("jpg;png") that the sample has."""
    for ending in endings.split(";"):
        if ending in raw:
            return raw[ending]
    present = ", ".join(key for key in raw if not key.startswith("__"))
    raise ValueError(f"the sample has no '{endings}' file, only: {present}")


def text_of(raw: Raw, endings: str) -> str:
    """Return the text of the first of `endings` that the sample has."""
    return first_of(raw, endings).decode("utf-8", errors="replace").strip()


def expand_shards(shards: str | Sequence[str]) -> list[str]:
    """Return every shard that paths or URLs with {000..123} parts name.

    Raises `FileNotFoundError` for local files that are not there, and `ValueError` for `pipe:` shards, which are shell
    commands, unless the environment variable `LDM_ALLOW_PIPE=1` says that the config is trusted.
    """
    from webdataset.shardlists import expand_urls

    patterns = [shards] if isinstance(shards, str) else list(shards)
    for pattern in patterns:
        ranges = re.findall(r"\{(\d+)\.\.(\d+)\}", pattern)
        if math.prod(max(0, int(last) - int(first)) + 1 for first, last in ranges) > MAX_SHARDS:
            raise ValueError(f"shards '{pattern}' names more than {MAX_SHARDS:,} files")
    found = [shard for pattern in patterns for shard in expand_urls(pattern)]
    pipes = [shard for shard in found if shard.startswith("pipe:")]
    if pipes and os.environ.get(PIPE_VARIABLE) != "1":
        raise ValueError(f"shard '{pipes[0]}' is a shell command; set {PIPE_VARIABLE}=1 if you trust the config")
    local = [shard for shard in found if ":" not in shard]
    missing = [shard for shard in local if not Path(shard).is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(found)} shards are not there, such as {missing[0]}")
    if not found:
        raise ValueError("shards is empty; give paths or URLs of .tar files")
    return found


def read_shard(shard: str) -> Iterator[Raw]:
    """Yield the undecoded samples of a shard. Raises `ValueError` that names a damaged or unreachable one."""
    from webdataset.tariterators import tarfile_samples

    try:
        yield from tarfile_samples([{"url": shard}])
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        reason = error.args[0] if error.args else type(error).__name__
        raise ValueError(f"{shard}, which is no tar file that can be read to its end: {reason}") from error
