"""The trainer's data path against open_clip's loader: the same shards, transforms, tokenizer and batch.

python -m bench loader             images a second, CPU time an image, memory of a worker; then where our time goes

Needs the extra `open_clip`, and open_clip_train with it. The shards are synthetic, of files about as large as
img2dataset writes. What both give for the same record is compared before anything is timed. Other programs on the
machine change the images a second more than the CPU time, which tells most where it is not quiet.
"""

from __future__ import annotations

import argparse
import functools
import gc
import inspect
import io
import multiprocessing
import os
import tarfile
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from train.data.images import decode
from train.data.loader import CHUNK, Loader, Reading
from train.data.sampler import StepSampler
from train.data.sources import open_source
from train.options import DataOptions, ModelOptions
from train.world import World

from . import Row
from .records import Record, table
from .timing import quartiles

LABELS = ("table", "pixels", "batch", "workers", "loader", "part")
SHARDS = 8
WORDS = "a photo of the old red small dog house tree in front over water street light with two people"
COMPARED = 32  # records
DECLARED: list[torch.library.Library] = []  # operators last as long as this


@dataclass(frozen=True)
class Setting:
    """What both loaders have alike."""

    folder: Path
    records: int
    batch: int
    prepare: Any
    tokenize: Callable[[Sequence[str]], Tensor]

    @property
    def steps(self) -> int:
        return self.records // self.batch


@dataclass(frozen=True)
class Pass:
    """Of an epoch: images a second once every worker has given a batch; CPU seconds an image, of all processes and from
    the start on; and of the workers, the largest resident and private memory, in MB."""

    rate: float
    cpu: float
    peak: float
    private: float


def write_shards(folder: Path, records: int, pixels: int) -> float:
    """Pictures of smooth noise with a caption each. Returns KB a picture."""
    draw = np.random.default_rng(0)
    written = 0
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as archive:
            for number in range(shard, records, SHARDS):
                picture = io.BytesIO()
                _photo(draw, pixels).save(picture, "JPEG", quality=90)
                caption = " ".join(draw.choice(WORDS.split(), draw.integers(6, 18)))
                for suffix, data in ((".jpg", picture.getvalue()), (".txt", caption.encode())):
                    member = tarfile.TarInfo(f"{number:09}{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
                written += picture.tell()
    return written / records / 1e3


def _photo(draw: np.random.Generator, pixels: int) -> Image.Image:
    """Noise of three sizes, the coarsest the strongest, as photographs have it."""
    total = np.zeros((pixels, pixels, 3), np.float32)
    for cells, strength in ((6, 1.0), (28, 0.35), (150, 0.25)):
        noise = Image.fromarray(draw.integers(256, size=(cells, cells, 3), dtype=np.uint8))
        total += strength * np.asarray(noise.resize((pixels, pixels), Image.Resampling.BICUBIC), np.float32)
    return Image.fromarray((total / 1.6).astype(np.uint8))


def libraries() -> tuple[Any, Any]:
    """open_clip's bundle of ViT-B-32 with its tokenizer and transforms, and the module of its loader."""
    try:
        _import_torchvision()
        import open_clip_train.data as theirs

        from train.towers import build
    except ImportError as error:
        raise SystemExit(
            f"python -m bench loader needs open_clip's own loader, which cannot be imported ({error}); install "
            "open_clip by pip install 'softclip-kernels[open_clip]', and webdataset, braceexpand and pandas beside it"
        ) from error
    if "eof_value" in inspect.signature(theirs.tar_file_expander).parameters:
        # webdataset after 0.2.86, open_clip's last, marks the end of each shard, which its own grouping cannot read.
        theirs.tar_file_expander = functools.partial(theirs.tar_file_expander, eof_value=None)
    return build(ModelOptions(towers="open_clip:ViT-B-32"), tuple), theirs


def _import_torchvision() -> None:
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        # A wheel for CUDA beside a torch for CPUs: it describes operators at its import that it then does not bring.
        DECLARED.append(torch.library.Library("torchvision", "FRAGMENT"))
        for name in ("nms", "qnms"):
            DECLARED[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def our_batches(setting: Setting, workers: int) -> Iterator[int]:
    """The sizes of the batches of an epoch."""
    options = DataOptions(source=str(setting.folder), workers=workers)
    source = open_source(options.source, options)
    sampler = StepSampler([len(source)], setting.batch, 0)
    reading = Reading(setting.prepare, setting.tokenize, options.max_pixels)
    loader = Loader(source, sampler, reading, options, World(0, 1, torch.device("cpu"), None))
    with closing(loader.batches(0, setting.steps)) as batches:
        for batch in batches:
            yield len(batch.images)


def their_loader(theirs: Any, setting: Setting, workers: int, training: bool = True) -> Any:
    shards = f"{setting.folder}/{{00000..{SHARDS - 1:05}}}.tar"
    arguments = Namespace(
        train_data=shards,
        val_data=shards,
        train_num_samples=setting.records,
        val_num_samples=setting.records,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=setting.batch,
        workers=workers,
        world_size=1,
    )
    transform = setting.prepare.training if training else setting.prepare.evaluation
    found = theirs.get_wds_dataset(arguments, transform, training, tokenizer=setting.tokenize, floor=True)
    return found.dataloader


def their_batches(theirs: Any, setting: Setting, workers: int) -> Iterator[int]:
    for images, _ in their_loader(theirs, setting, workers):
        yield len(images)


def check(theirs: Any, setting: Setting) -> None:
    """Both give the same pixels and tokens for the same records, without augmentation, in the shards' order."""
    images, tokens = next(iter(their_loader(theirs, setting, 0, training=False)))
    options = DataOptions(source=str(setting.folder))
    source = open_source(options.source, options)
    records = [source.read(index) for index in range(min(COMPARED, len(images)))]
    pictures = [decode(record.image, options.max_pixels) for record in records]
    ours = setting.prepare(pictures, None), setting.tokenize([record.captions[0] for record in records])
    for name, mine, other in zip(("pixels", "tokens"), ours, (images, tokens), strict=True):
        if not torch.equal(mine, other[: len(mine)]):
            raise SystemExit(f"the loaders give other {name} for the same records: nothing was timed")


def run_pass(batches: Iterator[int], workers: int) -> Pass:
    """Read an epoch as fast as it comes."""
    before, seen, counted, start = _cpu_seconds(), 0, 0, 0.0
    peaks: list[tuple[float, float]] = [(0.0, 0.0)]
    for number, size in enumerate(batches, start=1):
        seen += size
        if number == max(1, workers):
            start = time.perf_counter()
        elif number > workers:
            counted, end = counted + size, time.perf_counter()
            peaks += [_memory(process.pid) for process in multiprocessing.active_children()]
    del batches
    gc.collect()  # with the loader its workers end, and only then does their time count
    peak, private = (max(column) for column in zip(*peaks, strict=True))
    return Pass(counted / (end - start), (_cpu_seconds() - before) / seen, peak, private)


def _cpu_seconds() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def _memory(process: int | None) -> tuple[float, float]:
    """MB that a process had resident at most, and has by itself now; zeros once it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text().splitlines()
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0, 0.0
    lines = [line.split() for line in status + rollup]
    of = {words[0]: int(words[1]) / 1024 for words in lines if words[0] in ("VmHWM:", "Private_Dirty:")}
    return of.get("VmHWM:", 0.0), of.get("Private_Dirty:", 0.0)


def compare(theirs: Any, setting: Setting, labels: Row, workers: int, rounds: int) -> list[Row]:
    """A row of each loader. They take turns, and the order alternates."""
    contenders: dict[str, Callable[[], Iterator[int]]] = {
        "ours": lambda: our_batches(setting, workers),
        "open_clip": lambda: their_batches(theirs, setting, workers),
    }
    passes: dict[str, list[Pass]] = {name: [] for name in contenders}
    for done in range(rounds):
        for name in contenders if done % 2 else reversed(list(contenders)):
            passes[name].append(run_pass(contenders[name](), workers))
    paired = list(zip(passes["ours"], passes["open_clip"], strict=True))
    rows: list[Row] = []
    for name, of in passes.items():
        row = {**labels, "workers": workers, "loader": name}
        row["images/s a worker"] = quartiles([one.rate / max(1, workers) for one in of])
        row["CPU ms an image"] = quartiles([one.cpu * 1e3 for one in of])
        row |= {"peak MB": max(one.peak for one in of), "private MB": max(one.private for one in of)}
        if name == "ours":
            row["rate over theirs"] = quartiles([mine.rate / other.rate for mine, other in paired])
            row["CPU over theirs"] = quartiles([mine.cpu / other.cpu for mine, other in paired])
        rows.append(row | {"rates": [one.rate for one in of], "cpu": [one.cpu for one in of]})
    return rows


def parts(setting: Setting, labels: Row, rounds: int) -> list[Row]:
    """CPU ms an image of each part of ours, of a chunk, in this process. What is left of its time is
    its way to the step."""
    options = DataOptions(source=str(setting.folder))
    source = open_source(options.source, options)
    some = range(min(CHUNK, setting.batch))
    records = [source.read(index) for index in some]
    pictures = [decode(record.image, options.max_pixels) for record in records]
    work: dict[str, Callable[[], Any]] = {
        "read": lambda: [source.read(index) for index in some],
        "decode": lambda: [decode(record.image, options.max_pixels) for record in records],
        "transform alone": lambda: [setting.prepare.training(picture) for picture in pictures],
        "prepare": lambda: setting.prepare(pictures, np.array(some)),
        "tokenize": lambda: setting.tokenize([record.captions[0] for record in records]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, act in work.items():
            start = time.process_time()
            act()
            seconds[name].append((time.process_time() - start) / len(some))
    return [
        {**labels, "part": name, "CPU ms an image": quartiles([each * 1e3 for each in of])}
        for name, of in seconds.items()
    ]


def measure(theirs: Any, setting: Setting, labels: Row, counts: Sequence[int], rounds: int) -> Iterator[list[Row]]:
    check(theirs, setting)
    yield parts(setting, {"table": "parts", **labels}, rounds)
    for count in counts:
        yield compare(theirs, setting, {"table": "loaders", **labels}, count, rounds)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench loader", description=__doc__.split("\n\n")[0])
    parser.add_argument("--pixels", type=int, nargs="+", default=[224, 1024], help="of a picture's sides")
    parser.add_argument(
        "--workers", type=int, nargs="*", default=[0, 1, 2], help="processes that read; none: the parts only"
    )
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8, help="batches of an epoch (default: 8)")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    most = max(options.workers, default=0)
    if (
        min(options.steps - most, options.rounds, options.batch) < 1
        or min(options.workers, default=0) < 0
        or most > SHARDS
    ):
        parser.error(f"allowed: --workers of 0 to {SHARDS}, more --steps than these, and all else at least 1")
    bundle, theirs = libraries()
    prepare, tokenize = bundle.prepare, bundle.tokenize
    del bundle  # or the towers would count as the workers' memory
    torch.set_num_threads(1)
    record = Record("loader", "cpu", LABELS)
    for pixels in options.pixels:
        with tempfile.TemporaryDirectory(prefix="loader-") as folder:
            count = options.batch * options.steps
            size = write_shards(Path(folder), count, pixels)
            setting = Setting(Path(folder), count, options.batch, prepare, tokenize)
            labels = {"pixels": pixels, "batch": options.batch, "KB a picture": size}
            for rows in measure(theirs, setting, labels, options.workers, options.rounds):
                print(table([_short(row) for row in rows]), flush=True)
                record.add(rows)
    print(f"written to {record.path}")


def _short(row: Row) -> Row:
    """Without the raw figures; a median with its quartiles as text."""
    shown = {name: value for name, value in row.items() if name not in ("rates", "cpu")}
    return {
        name: "{:.3g} [{:.3g}, {:.3g}]".format(*value) if isinstance(value, tuple) else value
        for name, value in shown.items()
    }
