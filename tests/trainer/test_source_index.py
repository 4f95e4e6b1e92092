"""The index of shards: made once, kept where it can be, and believed only while it is whole and the shards are the
same."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from helpers.layouts import Pair, make_pairs, members_of, tar_of, write_shards

from train import lock
from train.data.record import DataError, Source
from train.data.sources import index, open_source, reading, scan, shard_index
from train.options import DataOptions

PAIRS = make_pairs(6)
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards that were scanned, to be cleared."""
    names: list[str] = []

    def scan_all(shards: Sequence[str], suffixes: scan.Suffixes, processes: int) -> Iterator[scan.Scan]:
        names.extend(map(os.path.basename, shards))
        return scan.scan_all(shards, suffixes, 1)

    monkeypatch.setattr(shard_index, "scan_all", scan_all)
    return names


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three shards of two pairs; the cache is another folder."""
    monkeypatch.setenv("SOFTCLIP_DATA", str(tmp_path / "cache"))
    return write_shards(tmp_path / "shards", PAIRS, 2, label=5)


def opened(folder: Path, pairs: Sequence[Pair] = PAIRS, **options: Any) -> Source:
    """The source, which holds these pairs."""
    source = open_source(str(folder), DataOptions(**options))
    assert [source.read(number).image for number in range(len(source))] == [pair.image for pair in pairs]
    return source


def taken(scanned: list[str]) -> list[str]:
    names = scanned.copy()
    scanned.clear()
    return names


def kept_in(folder: Path, suffix: str = ".index") -> Path:
    """The one file of a folder that holds an index."""
    (path,) = folder.glob(f"*{suffix}")
    return path


ALL = ["00000.tar", "00001.tar", "00002.tar"]


def test_an_index_is_made_once(folder: Path, scanned: list[str], tmp_path: Path) -> None:
    first = opened(folder)
    assert taken(scanned) == ALL
    before = kept_in(folder).stat()
    again = opened(folder)
    assert taken(scanned) == []
    assert again.fingerprint == first.fingerprint
    assert kept_in(folder).stat() == before
    moved = shutil.copytree(folder, tmp_path / "moved")  # which keeps the times
    assert opened(moved).fingerprint == first.fingerprint
    assert taken(scanned) == [], "it serves wherever its folder is seen"
    assert not (tmp_path / "cache").exists()


def test_what_was_left_out_is_kept_with_it(folder: Path, scanned: list[str]) -> None:
    (folder / "00001.tar").write_bytes(tar_of([*members_of(PAIRS[2:4]), ("lost.jpg", b"x")]))
    for expected in (ALL, [], ["00003.tar"]):
        source = open_source(str(folder), DataOptions(max_bad_fraction=0.5))
        assert source.left_out == {"missing_member": 1}
        assert taken(scanned) == expected
        if not expected:
            (folder / "00003.tar").write_bytes(tar_of(list(members_of(make_pairs(8)[6:]))))


def test_only_changed_shards_are_scanned_again(folder: Path, scanned: list[str]) -> None:
    opened(folder)
    new = make_pairs(20)
    taken(scanned)

    def write(name: str, pairs: Sequence[Pair]) -> None:
        (folder / name).write_bytes(tar_of(list(members_of(pairs))))

    write("00001.tar", new[6:9])
    opened(folder, [*PAIRS[:2], *new[6:9], *PAIRS[4:]])
    assert taken(scanned) == ["00001.tar"]
    write("000.tar", new[9:10])  # the first: all others have other numbers now
    opened(folder, [new[9], *PAIRS[:2], *new[6:9], *PAIRS[4:]])
    assert taken(scanned) == ["000.tar"]
    (folder / "00000.tar").unlink()
    opened(folder, [new[9], *new[6:9], *PAIRS[4:]])
    assert taken(scanned) == []


def test_size_and_time_tell_a_changed_shard(folder: Path, scanned: list[str]) -> None:
    opened(folder)
    taken(scanned)
    shard = folder / "00001.tar"
    status = shard.stat()
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    opened(folder)
    assert taken(scanned) == ["00001.tar"]
    status = shard.stat()
    with shard.open("ab") as file:
        file.write(bytes(1024))
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    opened(folder)
    assert taken(scanned) == ["00001.tar"]


def test_other_options_and_other_names_have_another_index(folder: Path, scanned: list[str]) -> None:
    first = opened(folder)
    taken(scanned)
    for options in ({"image_key": "jpg;png"}, {"text_key": "txt;caption"}):
        opened(folder, **options)
        assert taken(scanned) == ALL
    open_source(str(folder / "{00001..00002}.tar"), DataOptions())
    assert taken(scanned) == ALL[1:]
    opened(folder, image_key="jpg;png")
    assert opened(folder).fingerprint == first.fingerprint
    assert taken(scanned) == [], "none of them took another's place"
    assert len(list(folder.glob("*.index"))) == 4


def test_an_index_of_other_suffixes_lends_no_entries(folder: Path) -> None:
    path, shards = folder / "x.index", [(name, reading.stamp_of(folder / name, "shard")) for name in ALL]
    for suffixes, count in ((scan.Suffixes(("jpg",), ("txt",)), 6), (scan.Suffixes(("png",), ("txt",)), 0)):
        assert len(shard_index.index_shards(folder, shards, suffixes, [path]).entries) == count


def flipped(data: bytes, place: int) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 1
    return bytes(changed)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda data: b"",
    "cut at its end": lambda data: data[:-1],
    "half": lambda data: data[: len(data) // 2],
    "without its first entry": lambda data: data[scan.ENTRY.size :],
    "longer": lambda data: data + b"\0",
    "another first byte": lambda data: flipped(data, 0),
    "another last entry": lambda data: flipped(data, 6 * scan.ENTRY.size - 1),
    "another stamp": lambda data: flipped(data, data.index(b"00000.tar") + 13),
    "other counts": lambda data: data.replace(b"[2, 2, 2]", b"[1, 3, 2]"),
    "another sum": lambda data: flipped(data, -48),
    "another length": lambda data: data[:-16] + b"\xff" * 8 + data[-8:],
    "another mark": lambda data: flipped(data, -1),
    "noise": lambda data: b"\x5a" * len(data),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_index_is_made_anew(folder: Path, scanned: list[str], case: str) -> None:
    opened(folder)
    path = kept_in(folder)
    whole = path.read_bytes()
    damaged = DAMAGE[case](whole)
    assert damaged != whole
    path.write_bytes(damaged)
    taken(scanned)
    opened(folder)
    assert taken(scanned) == ALL
    assert path.read_bytes() == whole


LINES: dict[str, Callable[[bytes], bytes]] = {
    "a list": lambda line: b"[]",
    "no facts": lambda line: b"{}",
    "deep": lambda line: b"[" * 100_000,
    "no JSON": lambda line: b"\xff",
    "fewer entries": lambda line: line.replace(b'"count": 6', b'"count": 5'),
    "more entries": lambda line: line.replace(b'"count": 6', b'"count": 7'),
}


@pytest.mark.parametrize("case", LINES)
def test_a_line_that_makes_no_sense_is_not_believed(folder: Path, scanned: list[str], case: str) -> None:
    """Though its sum is right."""
    opened(folder)
    path = kept_in(folder)
    whole = path.read_bytes()
    entries, line = whole[: 6 * scan.ENTRY.size], whole[6 * scan.ENTRY.size : -index._TAIL.size]
    wrong = LINES[case](line)
    assert wrong != line
    tail = index._TAIL.pack(hashlib.sha256(wrong).digest(), len(wrong), index._MARK)
    path.write_bytes(entries + wrong + tail)
    taken(scanned)
    opened(folder)
    assert taken(scanned) == ALL
    assert path.read_bytes() == whole


def test_an_index_of_another_format_or_type_is_made_anew(
    folder: Path, scanned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(folder)
    taken(scanned)
    with monkeypatch.context() as later:
        later.setattr(index, "FORMAT", index.FORMAT + 1)
        opened(folder)
        assert taken(scanned) == ALL
    opened(folder)
    assert taken(scanned) == ALL
    path = kept_in(folder)
    assert index.read(path, shard_index.ENTRY) is not None
    assert index.read(path, np.dtype("V32")) is None
    assert index.read(path, np.dtype("<i8")) is None


def test_a_kept_array_cannot_be_written(folder: Path) -> None:
    opened(folder)
    kept = index.read(kept_in(folder), shard_index.ENTRY)
    assert kept is not None and isinstance(kept.entries, np.memmap), "it is shared by all processes"
    with pytest.raises(ValueError, match="read-only"):
        kept.entries["shard"] = 1


def test_entries_are_those_of_the_scan() -> None:
    """32 bytes each, of the same fields."""
    values = (1, 2**32 - 1, 3, -4, 5, -6, 7, -8)
    assert np.frombuffer(scan.ENTRY.pack(*values), shard_index.ENTRY).item() == values
    assert scan.ENTRY.size == shard_index.ENTRY.itemsize == 32


def test_of_two_processes_one_scans_and_the_other_waits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "WORD_SECONDS", 0.05)
    scans, started, waiting, go_on = FORK.Value("i", 0), FORK.Event(), FORK.Event(), FORK.Event()
    results = FORK.SimpleQueue()

    def slow(shards: Sequence[str], suffixes: scan.Suffixes, processes: int) -> Iterator[scan.Scan]:
        with scans.get_lock():
            scans.value += 1
        started.set()
        assert go_on.wait(30)
        return scan.scan_all(shards, suffixes, 1)

    monkeypatch.setattr(shard_index, "scan_all", slow)
    monkeypatch.setattr(index, "say", lambda words: waiting.set())
    processes = [FORK.Process(target=lambda: results.put(opened(folder).fingerprint)) for _ in range(2)]
    processes[0].start()
    assert started.wait(30)
    processes[1].start()
    assert waiting.wait(30), "the second one says that it waits"
    assert scans.value == 1
    go_on.set()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    assert results.get() == results.get() == opened(folder).fingerprint
    assert scans.value == 1


def test_one_that_is_killed_leaves_no_half_index(
    folder: Path, scanned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fatal(file: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as killed:
        killed.setattr(os, "fsync", fatal)  # all is written but not yet known to be on the disk
        process = FORK.Process(target=lambda: open_source(str(folder), DataOptions()))
        process.start()
        process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert not list(folder.glob("*.index"))
    assert list(folder.glob(".*.tmp")), "it was at work"
    opened(folder)
    assert scanned == ALL
    assert not list(folder.glob(".*.tmp")), "what it left is no longer there"


def test_an_index_and_its_name_are_flushed_to_the_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append(os.readlink(f"/proc/self/fd/{file}")))
    opened(folder)
    assert [Path(name).suffix for name in flushed] == [".tmp", ""]
    assert flushed[1] == str(folder)


def test_a_shard_that_cannot_be_read_leaves_no_index(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(shards: Sequence[str], *_: Any) -> Iterator[scan.Scan]:
        yield scan.scan(shards[0], scan.Suffixes(("jpg",), ("txt",)))
        raise scan.ScanError("Input/output error")

    monkeypatch.setattr(shard_index, "scan_all", failing)
    with pytest.raises(DataError, match=r"the shard .*00001\.tar cannot be read \(Input/output error\)"):
        opened(folder)
    assert not [path for path in folder.iterdir() if path.suffix in (".index", ".tmp")]


def deny(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Nothing can be written in the folder. (Permissions would not keep root from it.)"""
    real = Path.open

    def checked(path: Path, mode: str = "r", *rest: Any, **named: Any) -> IO[Any]:
        if path.is_relative_to(folder) and mode[0] in "wa":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, mode, *rest, **named)

    monkeypatch.setattr(Path, "open", checked)


def test_a_folder_that_cannot_be_written_has_its_index_in_the_cache(
    folder: Path, scanned: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = set(folder.iterdir())
    deny(monkeypatch, folder)
    opened(folder)
    assert taken(scanned) == ALL
    assert set(folder.iterdir()) == files
    assert kept_in(tmp_path / "cache" / "index")
    opened(folder)
    assert taken(scanned) == []
    other = write_shards(tmp_path / "other", make_pairs(4)[2:], 2)  # of the same names
    deny(monkeypatch, other)
    opened(other, make_pairs(4)[2:])
    opened(folder)
    assert taken(scanned) == ["00000.tar"]


def test_the_cache_is_in_the_home_folder_unless_the_variable_says_otherwise(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SOFTCLIP_DATA")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    deny(monkeypatch, folder)
    opened(folder)
    assert kept_in(tmp_path / "home" / ".cache" / "softclip_kernels" / "index")


def test_the_index_is_kept_where_the_options_say(folder: Path, scanned: list[str], tmp_path: Path) -> None:
    chosen = tmp_path / "chosen" / "deep"
    files = set(folder.iterdir())
    opened(folder, index=str(chosen))
    opened(folder, index=str(chosen))
    assert taken(scanned) == ALL
    assert set(folder.iterdir()) == files
    assert kept_in(chosen)
    assert not (tmp_path / "cache").exists()


def test_nowhere_to_keep_it_is_an_error(
    folder: Path, scanned: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"an index cannot be kept \(.*: .*/file.*set data\.index to a folder"):
        opened(folder, index=str(tmp_path / "file" / "below"))
    deny(monkeypatch, tmp_path)
    with pytest.raises(DataError, match=r"\(Read-only .*shards/.*; Read-only .*cache/index/.*data\.index"):
        opened(folder)
    assert scanned == [], "nothing is scanned for nothing"


def test_a_disk_that_is_full_is_passed_over(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = os.fsync, [1]

    def full(file: int) -> None:
        if left:
            left.pop()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file)

    monkeypatch.setattr(os, "fsync", full)
    opened(folder)
    assert not [path for path in folder.iterdir() if path.suffix in (".index", ".tmp")]
    assert kept_in(tmp_path / "cache" / "index")
    left.append(1)
    with pytest.raises(DataError, match=r"No space left on device: .*\.index \(.* MB free\)\); set data\.index"):
        opened(folder, index=str(tmp_path / "chosen"))


def test_a_file_system_without_locks_serves(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int) -> Callable[..., bool]:
        def take(file: IO[str], patience: float) -> bool:
            raise OSError(number, os.strerror(number))

        return take

    monkeypatch.setattr(lock, "take", refuse(errno.EIO))
    with pytest.raises(DataError, match=r"cannot be kept \(Input/output error"):
        opened(folder, index=str(tmp_path / "chosen"))
    monkeypatch.setattr(lock, "take", refuse(errno.ENOLCK))
    opened(folder)
    assert kept_in(folder)


def test_labels_are_kept_beside_and_made_anew_with_the_shards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    real = reading.OpenFiles.read
    monkeypatch.setattr(reading.OpenFiles, "read", lambda self, *place: (reads.append(1), real(self, *place))[1])

    def labels() -> tuple[list[int] | None, bool]:
        """And whether shards were read for them."""
        source = open_source(str(folder), DataOptions())
        reads.clear()
        found = source.labels()
        return None if found is None else found.tolist(), bool(reads)

    assert labels() == ([5] * 6, True)
    assert kept_in(folder, ".labels").stem == kept_in(folder).stem
    assert labels() == ([5] * 6, False)
    shard = folder / "00001.tar"
    status = shard.stat()
    shard.write_bytes(shard.read_bytes().replace(b'{"label": 5}', b'{"label": 8}'))  # nothing else: the same entries
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert labels() == ([5, 5, 8, 8, 5, 5], True)
    path = kept_in(folder, ".labels")
    path.write_bytes(flipped(path.read_bytes(), 0))
    assert labels() == ([5, 5, 8, 8, 5, 5], True)
    (folder / "00003.tar").write_bytes(tar_of(list(members_of(make_pairs(8)[6:]))))  # without
    assert labels() == (None, True)
    assert labels() == (None, False), "that there are none is kept too"


def test_progress_is_said_and_felt(monkeypatch: pytest.MonkeyPatch) -> None:
    said, ticks, now = list[str](), list[int](), [0.0]
    monkeypatch.setattr(reading, "say", said.append)
    monkeypatch.setattr(reading.heartbeat, "tick", lambda: ticks.append(1))
    monkeypatch.setattr(reading.time, "monotonic", lambda: now[0])
    progress = reading.Progress("shards are indexed", 30)
    for done in range(1, 31):
        now[0] += 1
        progress.at(done)
    assert said == ["11 of 30 shards are indexed", "22 of 30 shards are indexed"]
    assert len(ticks) == 30
