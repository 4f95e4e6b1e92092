"""Batches of shards that are read from their beginning: remote ones, or more than one wants to index.

Shards are drawn at random again and again, each worker's by themselves, and samples are drawn from a buffer of those
that were read. So nothing here is a function of the step: a run that goes on draws its shards anew.

The webdataset library reads the archives. Shards are opened here, for the library's own opener would run any command
that a `pipe:` names; what they hold is taken as bytes, and nothing of it is unpickled.
"""

from __future__ import annotations

import contextlib
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np
from braceexpand import braceexpand
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.filters import shuffle
from webdataset.gopen import gopen_curl
from webdataset.tariterators import group_by_keys, tar_file_expander

from ..options import ConfigError, DataOptions
from ..signals import say
from ..world import World
from .captions import captions_of, read_fields
from .images import decode
from .loader import Batches, Chunk, Reading, Sample, chunk_ends, joined
from .record import BadRecordError, DataError, describe_bad
from .sources.reading import split_suffixes
from .workers import count_workers, produce

SCHEME = "stream:"
BUFFER = 1000  # samples that a worker draws from
FIRST_BUFFER = 100  # those before it gives its first one
FAILURES_IN_A_ROW = 20  # shards and samples that may be broken one after another


class Stream:
    """This rank's batches; see loader.Loader, whose place it takes.

    Raises ConfigError where shards are named that it does not read.
    """

    def __init__(self, batch_size: int, seed: int, reading: Reading, options: DataOptions, world: World) -> None:
        self.workers = count_workers(options, world.device, world.ranks_here)
        self._options, self._device, self._seed, self._rank = options, world.device, seed, world.rank
        self._urls = shards_of(options)
        self._ends = chunk_ends(batch_size // world.size, 1 + len(reading.views))
        self._reading = reading

    def batches(self, first: int, last: int) -> Batches:
        """Those of the steps `first` to `last` - 1."""
        if self._rank == 0:
            anew = f", as from here, step {first}" if first else ""
            say(
                f"data.source is a stream of {len(self._urls)} shards in random order, without positions to return to: "
                f"a run that is resumed draws its shards anew{anew}"
            )
        samples = _Samples(self._urls, self._options, self._reading, self._ends, [self._seed, first, self._rank])
        items = produce(
            samples,
            None,
            workers=self.workers,
            ahead=self._options.prefetch * len(self._ends),
            pin=self._device.type == "cuda",
        )
        with contextlib.closing(joined(items, self._ends, self._device)) as batches:
            for _ in range(first, last):
                yield next(batches)


def shards_of(options: DataOptions) -> list[str]:
    """Those of data.source; see shard_urls. Raises ConfigError where the other options do not fit a stream."""
    if options.epoch_samples is None:
        raise ConfigError(
            f"data.source={options.source!r} has no length: give data.epoch_samples, how many samples count as an "
            "epoch (about as many as its shards hold)"
        )
    for option, given in (("data.weights", bool(options.weights)), ("data.noise", bool(options.noise))):
        if given:
            raise ConfigError(f"{option} with data.source={options.source!r}; allowed: without `{SCHEME}`")
    if options.distinct != "none":
        raise ConfigError(f"data.distinct={options.distinct!r} with `{SCHEME}`; allowed: 'none'")
    return shard_urls(options.source)


def shard_urls(source: str) -> list[str]:
    """The shards of `stream:URLS`, with brace ranges, and `::` between several. Raises ConfigError where they are none
    that can be read, DataError where a local one is missing."""
    forms = "allowed: paths of tar files, file:, http: and https: addresses, with ranges such as {00000..00999}"
    urls = [url for part in source.removeprefix(SCHEME).split("::") for url in braceexpand(part)]
    for url in urls:
        scheme = urlparse(url).scheme
        if scheme == "pipe":
            raise ConfigError(f"data.source={source!r}: `pipe:` would run a command, and none is run here; {forms}")
        if scheme not in ("", "file", "http", "https") or url in ("", "-"):
            raise ConfigError(f"data.source={source!r} names {url!r}; {forms}")
        if scheme in ("http", "https") and shutil.which("curl") is None:
            raise ConfigError(f"data.source={source!r}: {url!r} is read by curl, which is not on the PATH; install it")
        if scheme in ("", "file") and not _path(url).is_file():
            raise DataError(f"data.source={source!r}: there is no file {_path(url)}; {forms}")
    return urls


class _Samples(IterableDataset[Chunk | DataError]):
    """A worker's chunks without end; an error is handed over as a value, as loader._Chunks does."""

    def __init__(
        self, urls: list[str], options: DataOptions, reading: Reading, ends: list[int], entropy: list[int]
    ) -> None:
        self._urls, self._reading, self._entropy = urls, reading, entropy
        self._image_keys = split_suffixes(options.image_key)
        self._text_keys = split_suffixes(options.text_key)
        self._wanted = {*self._image_keys, *self._text_keys, "json"}
        self._url, self._broken, self._of_use = "", False, False  # the shard that is read
        self._sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        self._bad: Counter[str] = Counter()
        self._in_a_row: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Chunk | DataError]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        rng = np.random.default_rng([*self._entropy, number])
        samples = self._samples(rng)
        while True:  # chunk `number` of all that the workers make in turn
            try:
                taken = [next(samples) for _ in range(self._sizes[number % len(self._sizes)])]
            except DataError as error:
                yield error
                return
            bad, self._bad = dict(self._bad), Counter()
            yield self._reading.chunk(taken, bad)
            number += workers

    def _samples(self, rng: np.random.Generator) -> Iterator[Sample]:
        mix = shuffle(BUFFER, initial=FIRST_BUFFER, rng=random.Random(int(rng.integers(2**62))))
        for group in mix(self._groups(rng)):
            try:
                image, text = (
                    next((group[key] for key in wanted if key in group), None)
                    for wanted in (self._image_keys, self._text_keys)
                )
                if image is None or (text is None and "json" not in group):
                    raise BadRecordError("missing_member")
                captions = captions_of(text, read_fields(group["json"]) if "json" in group else {})
                picture = decode(image, self._reading.max_pixels)
            except BadRecordError as error:
                self._count(str(error.args[0]))
                continue
            self._in_a_row.clear()
            caption = captions[rng.integers(len(captions))]
            yield Sample(group["__key__"], picture, caption, int(rng.integers(2**62)))

    def _groups(self, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
        """The members of each sample, by suffix."""
        files = tar_file_expander(self._opened(rng), handler=self._failed, select_files=self._select)
        for group in group_by_keys(files, handler=self._failed):
            self._in_a_row.pop("broken_shard", None)
            yield group

    def _select(self, name: str) -> bool:
        wanted = name.rpartition("/")[2].partition(".")[2].lower() in self._wanted
        self._of_use |= wanted
        return wanted

    def _opened(self, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
        while True:
            url = self._urls[rng.integers(len(self._urls))]
            self._url, self._broken, self._of_use = url, False, False
            try:
                remote = urlparse(url).scheme in ("http", "https")
                stream = gopen_curl(url) if remote else _path(url).open("rb")
                try:
                    yield {"url": url, "stream": stream}
                except GeneratorExit:  # nobody reads on, which curl calls a failure
                    with contextlib.suppress(OSError):
                        stream.close()
                    return
                stream.close()
            except OSError as error:
                self._failed(error)
            if not (self._broken or self._of_use):
                self._count("nothing_wanted_in_shard", url)

    def _failed(self, error: Exception) -> bool:
        """A shard that cannot be read, wholly or from here on, is left. The library goes on where this returns True."""
        if not self._broken:
            self._broken = True
            self._count("broken_shard", f"{self._url}: {error.args[0] if error.args else type(error).__name__}")
        return True

    def _count(self, reason: str, words: str = "") -> None:
        self._bad[reason] += 1
        self._in_a_row[reason] += 1
        if self._in_a_row.total() > FAILURES_IN_A_ROW:
            raise DataError(
                f"nothing can be read of the {len(self._urls)} shards of data.source: more than {FAILURES_IN_A_ROW} "
                f"failures one after another ({describe_bad(self._in_a_row)}){words and ', last: ' + words}; see "
                "whether the shards can be reached, and whether data.image_key and data.text_key name what they hold"
            )


def _path(url: str) -> Path:
    return Path(url2pathname(urlparse(url).path) if url.startswith("file:") else url)
