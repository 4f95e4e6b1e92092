"""The index of shards: made once, by one process, where it can be kept, and anew for what has changed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.layouts import make_pairs, write_shards

from train.data.record import DataError, Source
from train.data.sources import index, open_source, scan, shard_index
from train.options import DataOptions

PAIRS = make_pairs(6)
KEYS = (DataOptions().image_key, DataOptions().text_key)


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards that were scanned, in order."""
    names: list[str] = []
    real = scan.scan_all

    def scan_all(shards: Sequence[str], suffixes: scan.Suffixes, processes: int) -> Iterator[scan.Scan]:
        names.extend(Path(shard).name for shard in shards)
        time.sleep(0.3)  # for whoever comes at the same time
        return real(shards, suffixes, 1)

    monkeypatch.setattr(shard_index, "scan_all", scan_all)
    return names


def shards(folder: Path) -> Path:
    return write_shards(folder / "data", PAIRS, 2)


def check(source: Source) -> None:
    assert [source.read(i).image for i in range(len(source))] == [pair.image for pair in PAIRS]


def test_shards_are_scanned_once_and_those_that_change_again(tmp_path: Path, scanned: list[str]) -> None:
    folder = shards(tmp_path)
    first = open_source(str(folder), DataOptions())
    check(first)
    assert scanned == ["00000.tar", "00001.tar", "00002.tar"]
    scanned.clear()
    check(open_source(str(folder), DataOptions()))
    assert scanned == []
    os.utime(folder / "00001.tar", (1, 1))
    check(open_source(str(folder), DataOptions()))
    assert scanned == ["00001.tar"]
    scanned.clear()
    (folder / "00001.tar").rename(folder / "00003.tar")
    source = open_source(str(folder), DataOptions())
    assert scanned == ["00003.tar"]
    assert [source.read(i).key[:5] for i in range(6)] == ["00000"] * 2 + ["00002"] * 2 + ["00003"] * 2
    assert [source.read(i).image for i in (2, 4)] == [PAIRS[4].image, PAIRS[2].image]
    assert source.fingerprint != first.fingerprint


@pytest.mark.parametrize("damage", ("a byte", "the end", "all but the end", "everything", "the line", "another format"))
def test_a_damaged_index_is_made_anew(tmp_path: Path, scanned: list[str], damage: str) -> None:
    folder = shards(tmp_path)
    open_source(str(folder), DataOptions())
    (kept,) = folder.glob("*.index")
    whole = kept.read_bytes()
    line = whole.index(b'{"format"')
    kept.write_bytes(
        {
            "a byte": b"\1" + whole[1:],
            "the end": whole[:-1],
            "all but the end": whole[-48:],
            "everything": b"",
            "the line": whole.replace(b'"counts": [2, 2, 2]', b'"counts": [2, 1, 3]'),
            "another format": whole[line:],
        }[damage]
    )
    scanned.clear()
    check(open_source(str(folder), DataOptions()))
    assert len(scanned) == 3
    assert kept.read_bytes() == whole


def test_of_several_processes_one_makes_the_index(
    tmp_path: Path, scanned: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Threads here: the kernel holds the lock for an open file, not for a process."""
    monkeypatch.setattr(index, "WORD_SECONDS", 0.05)
    folder = shards(tmp_path)
    with ThreadPoolExecutor(3) as threads:
        for source in threads.map(lambda _: open_source(str(folder), DataOptions()), range(3)):
            check(source)
    assert len(scanned) == 3, "the others waited"
    assert "waiting for another process that makes" in capfd.readouterr().err


def test_an_index_is_kept_where_it_can_be(tmp_path: Path, scanned: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shards(tmp_path)
    monkeypatch.setenv("SOFTCLIP_DATA", str(tmp_path / "cache"))
    places = index.places(folder, ["*.tar", *KEYS], None)
    places[0].with_name(f".{places[0].name}.lock").mkdir()  # as root a folder cannot be made read-only
    for _ in range(2):
        check(open_source(str(folder), DataOptions()))
    assert len(scanned) == 3
    assert [path.parent for path in tmp_path.rglob("*.index")] == [tmp_path / "cache" / "index"]
    chosen = DataOptions(index=str(tmp_path / "chosen"))
    for _ in range(2):
        check(open_source(str(folder), chosen))
    assert len(scanned) == 6
    assert len(list((tmp_path / "chosen").glob("*.index"))) == 1
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"an index cannot be kept \(.*file.*\); set data\.index to a folder with room"):
        open_source(str(folder), DataOptions(index=str(tmp_path / "file")))
    assert not list(tmp_path.rglob("*.tmp"))


def test_an_index_that_breaks_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shards(tmp_path)

    def broken(*_: object) -> Iterator[scan.Scan]:
        yield scan.scan(str(folder / "00000.tar"), scan.Suffixes(("jpg",), ("txt",)))
        raise OSError("the disk is gone")

    monkeypatch.setattr(shard_index, "scan_all", broken)
    with pytest.raises(DataError, match=r"the shard .*00001\.tar cannot be read \(the disk is gone"):
        open_source(str(folder), DataOptions())
    monkeypatch.undo()
    assert not [path for path in folder.iterdir() if path.suffix in (".tmp", ".index")]
    check(open_source(str(folder), DataOptions()))
