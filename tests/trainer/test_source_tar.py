"""Shards: what is corrupt is left out and counted, what is hostile does no harm."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from helpers import ROOT
from helpers.layouts import Member, make_pairs, members_of, picture, tar_of, write_shards

from train.data.record import BadRecordError, DataError, Record, Source
from train.data.sources import open_source, reading, scan
from train.options import DataOptions


class Payload:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


LENIENT = DataOptions(max_bad_fraction=0.9)


def sample(key: str, **changes: bytes | None) -> list[Member]:
    fields = {"captions": [key, f"a drawing of {key}"], "label": 7, "class": "food"}
    members = {"png": picture(), "txt": key.encode(), "json": json.dumps(fields).encode()} | changes
    return [(f"{key}.{suffix}", payload) for suffix, payload in members.items() if payload is not None]


GOOD = [member for i in range(4) for member in sample(f"good{i}")]
NAMES = [f"00000/good{i}" for i in range(4)]


def opened(folder: Path, shard: bytes | Sequence[Member], options: DataOptions = LENIENT) -> Source:
    folder.mkdir(exist_ok=True)
    (folder / "00000.tar").write_bytes(shard if isinstance(shard, bytes) else tar_of(shard))
    return open_source(str(folder), options)


def read_all(source: Source) -> tuple[list[Record], dict[str, int]]:
    """The good records, and why the others are bad, those that were left out at the opening too."""
    records, bad = [], dict(source.left_out)
    for index in range(len(source)):
        try:
            records.append(source.read(index))
        except BadRecordError as error:
            bad[str(error)] = bad.get(str(error), 0) + 1
    return records, bad


def truncated() -> bytes:
    whole = tar_of(GOOD + sample("cut"))
    return whole[: whole.index(b"cut.png") + 600]


def with_field(start: int, field: bytes) -> bytes:
    """An archive whose last header has these bytes in place of its own, and the right sum."""
    shard = bytearray(tar_of([*GOOD, ("x.txt", b"")]))
    header = shard.index(b"x.txt")
    shard[header + start : header + start + len(field)] = field
    block = shard[header : header + 512]
    shard[header + 148 : header + 156] = b"%06o\0 " % (256 + sum(block[:148]) + sum(block[156:]))
    return bytes(shard)


def without_end_mark() -> bytes:
    whole = tar_of([*GOOD, *sample("last")])
    return whole[: whole.index(b"last.json") + 1024]


def noise_for_a_header() -> bytes:
    whole = tar_of(GOOD)
    end = whole.index(b"good3.json")
    return whole[: end + 1024] + b"\1" * 1024


def sparse(key: str) -> list[Member]:
    """A picture that PAX headers claim to be a sparse file of a terabyte."""
    info = tarfile.TarInfo(f"{key}.png")
    info.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": f"{key}.png",
        "GNU.sparse.realsize": str(1 << 40),
    }
    return [(info, b"0\n".ljust(512, b"\0")), *sample(key)[1:]]


def old_sparse(key: str) -> list[Member]:
    info = tarfile.TarInfo(f"{key}.png")
    info.type = tarfile.GNUTYPE_SPARSE
    return [(info, picture()), *sample(key)[1:]]


def huge_member(suffix: str) -> bytes:
    return tar_of([*GOOD, *sample("x", **{suffix: b"a" * (scan.MAX_MEMBER_BYTES + 1)})])


RECORD = b'{"captions": %s, "label": %s, "class": "%s"}'
HOSTILE = {
    "empty caption": (GOOD + sample("x", txt=b" \n"), "empty_caption"),
    "empty caption in json": (GOOD + sample("x", json=RECORD % (b'["a", ""]', b"1", b"food")), "empty_caption"),
    "long caption": (GOOD + sample("x", txt=b"a" * 10_001), "caption_too_long"),
    "broken text": (GOOD + sample("x", txt=b"\xff\xfe"), "broken_text"),
    "megabyte of caption": (GOOD + sample("x", txt=b"a" * 2**20), "caption_too_long"),
    "nothing but control characters": (GOOD + sample("x", txt=b"\0\x1b\x07\xef\xbb\xbf"), "empty_caption"),
    "surrogate": (GOOD + sample("x", json=RECORD % (rb'["a\ud800"]', b"1", b"food")), "broken_text"),
    "surrogate as class": (GOOD + sample("x", json=RECORD % (b'["a"]', b"1", rb"\udfff")), "broken_text"),
    "broken json": (GOOD + sample("x", json=b"{"), "broken_json"),
    "binary json": (GOOD + sample("x", json=b"\xff{}"), "broken_json"),
    "json of a list": (GOOD + sample("x", json=b"[1]"), "broken_json"),
    "deep json": (GOOD + sample("x", json=b"[" * 100000), "broken_json"),
    "captions that are a number": (GOOD + sample("x", json=RECORD % (b"3", b"1", b"food")), "broken_json"),
    "captions that are numbers": (GOOD + sample("x", json=RECORD % (b"[3]", b"1", b"food")), "broken_json"),
    "too many captions": (GOOD + sample("x", json=RECORD % (b'["a"%s]' % (b', "a"' * 256), b"1", b"")), "broken_json"),
    "huge label": (GOOD + sample("x", json=RECORD % (b'["a"]', b"9" * 30, b"food")), "broken_label"),
    "negative label": (GOOD + sample("x", json=RECORD % (b'["a"]', b"-1", b"food")), "broken_label"),
    "long label": (GOOD + sample("x", json=None, cls=b" " * 100 + b"7"), "broken_label"),
    "label in words": (GOOD + sample("x", json=None, cls=b"cat"), "broken_label"),
    "json without a caption": (GOOD + sample("x", txt=None, json=b"{}"), "no_caption"),
    "no picture": (GOOD + sample("x", png=None), "missing_member"),
    "no text": (GOOD + sample("x", txt=None, json=None), "missing_member"),
    "large text": (huge_member("txt"), "member_too_large"),
    "large picture": (huge_member("png"), "member_too_large"),
    "large class": (huge_member("cls"), "member_too_large"),
    "duplicate key": (GOOD + sample("good1"), "duplicate_key"),
    "duplicate key in a row": (GOOD + sample("good3"), "duplicate_key"),
    "sparse": ([*GOOD, *sparse("x")], "missing_member"),
    "old sparse": ([*GOOD, *old_sparse("x")], "missing_member"),
    "truncated": (truncated(), "truncated_tar"),
    "no end mark": (without_end_mark(), "truncated_tar"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_corrupt_record_is_left_out_and_counted(tmp_path: Path, case: str) -> None:
    shard, reason = HOSTILE[case]
    records, bad = read_all(opened(tmp_path, shard))
    assert [record.key for record in records] == NAMES
    assert bad == {reason: 1}
    assert records[0] == Record(NAMES[0], picture(), ("good0", "a drawing of good0"), 7, "food")


@pytest.mark.parametrize(
    "shard",
    (
        with_field(124, b"\xff" * 10 + b"\xfc\x00"),  # of -1024 bytes, on which older tarfile modules run in circles
        with_field(124, b"\x80" + b"\xff" * 11),  # of more bytes than a file can have
        with_field(156, b"L"),  # a long name that never comes
        noise_for_a_header(),
    ),
    ids=("negative size", "absurd size", "long name", "noise"),
)
def test_a_shard_that_breaks_off_keeps_the_records_before_its_last(tmp_path: Path, shard: bytes) -> None:
    records, bad = read_all(opened(tmp_path, shard))
    assert [record.key for record in records] == NAMES[: len(records)] and len(records) >= 3
    assert bad == {"truncated_tar": 1}


def test_headers_without_end_are_no_recursion_without_end(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type = tarfile.XHDTYPE
    source = opened(tmp_path, [*GOOD, *sample("last"), *[(info, b"9 a=bcde\n")] * 5000])
    assert len(source) == 4
    assert source.left_out == {"truncated_tar": 1}


def test_a_long_header_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tarfile.TarInfo("x")
    info.type = tarfile.GNUTYPE_LONGNAME
    monkeypatch.setattr(scan, "MAX_HEADER_BYTES", 5000)
    source = opened(tmp_path, [*GOOD, *sample("last"), (info, b"a" * 6000)])
    assert len(source) == 4
    assert source.left_out == {"truncated_tar": 1}


def test_what_is_left_out_is_capped(tmp_path: Path) -> None:
    shard = [*GOOD, *sample("x", png=None)]
    assert opened(tmp_path, shard, DataOptions(max_bad_fraction=0.2)).left_out == {"missing_member": 1}
    with pytest.raises(DataError, match=r"4 pairs, and 1 that .*missing_member 1.*data\.max_bad_fraction=0\.19"):
        opened(tmp_path, shard, DataOptions(max_bad_fraction=0.19))


@pytest.mark.parametrize("shard", (tar_of(GOOD, "w:gz"), b"", b"not a tar file" * 100), ids=("gzip", "nothing", "text"))
def test_what_is_no_plain_tar_is_refused(tmp_path: Path, shard: bytes) -> None:
    with pytest.raises(DataError, match=r"holds 0 pairs, and 1 that cannot be one \(truncated_tar 1\)"):
        opened(tmp_path, shard)


def test_an_empty_set_of_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds 0 pairs.*data\.image_key.*data\.text_key"):
        opened(tmp_path, tar_of([("x.gif", b"")]), DataOptions(max_bad_fraction=1.0))


def test_foreign_members_are_passed_over_and_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = pickle.dumps(Payload(tmp_path / "unpickled"))
    link, hard = tarfile.TarInfo("link.png"), tarfile.TarInfo("hard.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard.type, hard.linkname = tarfile.LNKTYPE, "good0.txt"
    foreign: list[Member] = [(f"good0.{suffix}", evil) for suffix in ("pyd", "pkl", "pickle", "npy", "pth", "tar")]
    unsafe: list[Member] = [("../escaped.png", picture()), ("/escaped.png", picture()), ("bad\nname.png", picture())]
    for name in ("extract", "extractall", "_extract_one", "extractfile"):
        monkeypatch.setattr(tarfile.TarFile, name, lambda *_, **__: pytest.fail("extracted"), raising=False)
    members = [*GOOD[:3], *foreign, (link, b""), (hard, b""), *GOOD[3:], *unsafe]
    records, bad = read_all(opened(tmp_path / "data", members))
    assert [record.key for record in records] == NAMES
    assert bad == {"unsafe_member": 3}
    written = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {".tar", ".index", ".lock"}


def test_captions_are_cleaned_by_rule(tmp_path: Path) -> None:
    dirty = "\ufeffa\0 \u202ered\u202c\tcat \u200d [PAD] [END]\r\n"
    fields = {"captions": [dirty, "another"]}
    (record,), bad = read_all(opened(tmp_path, sample("x", txt=dirty.encode(), json=json.dumps(fields).encode())))
    assert record.captions == ("a red cat \u200d [PAD] [END]", "another")
    assert not bad


@pytest.mark.parametrize("name", ("pipe:touch owned.tar", "http://127.0.0.1:9/a.tar", "https://h/a.tar"))
def test_a_shard_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="No such file"):
        open_source(name, DataOptions())
    os.mkfifo("pipe.tar")  # reading it would wait forever
    with pytest.raises(DataError, match=r"pipe\.tar is no file"):
        open_source("pipe.tar", DataOptions())
    assert not list(tmp_path.glob("owned*"))


def test_captions_and_labels_come_from_where_shards_have_them(tmp_path: Path) -> None:
    """Suffixes of any case, folders in names, several pictures of one name, and members in any order."""
    members: list[Member] = [
        ("a/x.txt", b"from the text"),
        ("a/x.PNG", picture(seed=1)),
        ("a/x.jpg", picture(form="JPEG", seed=2)),
        ("./y.json", b'{"caption": "from the json", "label": 3}'),
        ("./y.thumb.jpg", b"not asked for"),
        ("./y.jpg", picture(form="JPEG", seed=3)),
        ("z.JPG", picture(form="JPEG", seed=4)),
        ("z.cls", b" 12\n"),
        ("z.json", b'{"captions": null, "caption": "z", "label": "words", "class": "things"}'),
        (".hidden.jpg", b"x"),
        ("README", b"x"),
    ]
    source = opened(tmp_path, members)
    assert source.left_out == {}
    assert read_all(source)[0] == [
        Record("00000/a/x", picture(form="JPEG", seed=2), ("from the text",)),
        Record("00000/./y", picture(form="JPEG", seed=3), ("from the json",), 3),
        Record("00000/z", picture(form="JPEG", seed=4), ("z",), 12, "things"),
    ]


def test_other_suffixes_may_be_chosen(tmp_path: Path) -> None:
    members = [("x.jpg", b"J"), ("x.rgb.png", b"P"), ("x.caption", b"chosen"), ("x.txt", b"not chosen")]
    chosen = DataOptions(image_key=".rgb.PNG; jpg", text_key="caption")
    assert read_all(opened(tmp_path, members, chosen))[0] == [Record("00000/x", b"P", ("chosen",))]
    (record,), _ = read_all(opened(tmp_path, members))
    assert (record.image, record.captions) == (b"J", ("not chosen",)), "another index"


LONG = "a" * 150


@pytest.mark.parametrize("form", (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT))
def test_keys_are_unique_and_fit_into_messages(tmp_path: Path, form: int) -> None:
    """Also those that a header holds in part only, and of shards that hold the same names."""
    names = ["long/" * 25 + "x", "日本", "中国", *([] if form == tarfile.USTAR_FORMAT else [LONG + "1", LONG + "2"])]
    members = [(f"{name}.{suffix}", b"x") for name in names for suffix in ("jpg", "txt")]
    (tmp_path / "b.tar").write_bytes(tar_of(members, form=form))
    source = opened(tmp_path, tar_of(members, form=form))
    keys = [record.key for record in read_all(source)[0]]
    assert len(set(keys)) == len(keys) == 2 * len(names)
    assert all(key.isprintable() for key in keys)
    assert keys[0].startswith("00000/long/long/")


def test_labels_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [
        *sample("a"),
        *sample("b", json=b"{"),
        *sample("c", json=None, cls=b"3"),
        *sample("d", json=None, cls=b""),
    ]
    source = opened(tmp_path, members)
    found = source.labels()
    assert found is not None and found.dtype == np.int64
    assert found.tolist() == [7, -2, 3, -4], "a bad record has a label of its own"
    monkeypatch.setattr(reading.OpenFiles, "read", lambda *_: pytest.fail("read again"))
    assert np.array_equal(source.labels(), found)
    monkeypatch.undo()
    assert opened(tmp_path, [*members, *sample("e", json=None)]).labels() is None
    assert opened(tmp_path, members).labels().tolist() == [7, -2, 3, -4]  # type: ignore[union-attr]


def test_an_img2dataset_folder_is_read_as_its_tool_writes_it(tmp_path: Path) -> None:
    """jpg, txt and JSON by webdataset's own writer, with a parquet file and statistics beside each shard."""
    pairs = make_pairs(12)
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"{shard:05d}.tar")) as writer:
            for pair in pairs[shard * 6 : shard * 6 + 6]:
                fields = {
                    "caption": pair.caption,
                    "url": f"https://example.org/{pair.stem}.jpg",
                    "key": pair.stem,
                    "status": "success",
                    "error_message": None,
                    "width": 16,
                    "height": 16,
                    "original_width": 16,
                    "original_height": 16,
                    "exif": "{}",
                    "sha256": "0" * 64,
                }
                members = {"__key__": pair.stem, "jpg": pair.image, "txt": pair.caption}
                writer.write({**members, "json": json.dumps(fields, indent=4)})
        (tmp_path / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (tmp_path / f"{shard:05d}_stats.json").write_text("{}", encoding="utf-8")
    records, bad = read_all(open_source(str(tmp_path), DataOptions()))
    assert [(record.image, record.captions) for record in records] == [(p.image, (p.caption,)) for p in pairs]
    assert [record.key for record in records][::11] == ["00000/000000000", "00001/000000011"]
    assert not bad


def test_the_webdataset_library_reads_the_same(tmp_path: Path) -> None:
    write_shards(tmp_path, make_pairs(10), 4)
    names = sorted(map(str, tmp_path.glob("*.tar")))
    theirs = webdataset.WebDataset(names, shardshuffle=False, empty_check=False)
    ours, _ = read_all(open_source(str(tmp_path / "{00000..00002}.tar"), DataOptions()))
    assert [(each["jpg"], each["txt"].decode()) for each in theirs] == [(our.image, our.captions[0]) for our in ours]
    assert len(ours) == 10


def test_braces_name_shards_as_in_bash(tmp_path: Path) -> None:
    write_shards(tmp_path, make_pairs(6), 2)

    def keys(spec: str) -> list[str]:
        source = open_source(f"{tmp_path}/{spec}", DataOptions())
        return [record.key.partition("/")[0] for record in read_all(source)[0]]

    assert keys("0000{0..1}.tar") == ["00000"] * 2 + ["00001"] * 2
    assert keys("{00002,00000}.tar") == ["00002"] * 2 + ["00000"] * 2
    assert keys("00001.tar") == ["00001"] * 2
    for spec, message in (
        ("{00000..00009}.tar", r"shard .*00003\.tar cannot be read \(No such file"),
        ("{0..99999999999}.tar", "more than 1000000 shards"),
        ("{0..1.tar", "braces cannot be expanded"),
    ):
        with pytest.raises(DataError, match=message):
            open_source(f"{tmp_path}/{spec}", DataOptions())
    (tmp_path / "00001.tar").rename(tmp_path / "{1}.tar")
    assert keys("{1}.tar") == ["{1}"] * 2


def test_many_files_need_few_handles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_OPEN_FILES", 4)
    write_shards(tmp_path, make_pairs(20), 2)
    source = open_source(str(tmp_path), DataOptions())
    before = len(os.listdir("/proc/self/fd"))
    assert [source.read(index).key[6:] for index in range(20)] == [f"{index:09d}" for index in range(20)]
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_forked_processes_read_at_the_same_time(tmp_path: Path) -> None:
    pairs = make_pairs(40)
    write_shards(tmp_path, pairs, 10)
    source = open_source(str(tmp_path), DataOptions())
    source.read(0)  # its file is open at the fork
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            right = all(source.read(i).image == pairs[i].image for _ in range(10) for i in range(40))
            os._exit(0 if right else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    again = pickle.loads(pickle.dumps(source))
    assert again.read(39) == source.read(39)


def test_a_shard_that_changes_under_a_run_ends_it(tmp_path: Path) -> None:
    pairs = make_pairs(4)
    write_shards(tmp_path, pairs, 2)
    source = open_source(str(tmp_path), DataOptions())
    reopened = pickle.loads(pickle.dumps(source))
    shard = tmp_path / "00001.tar"
    source.read(3)
    whole = shard.read_bytes()
    os.truncate(shard, 2000)
    with pytest.raises(DataError, match=r"00001\.tar was changed since it was indexed"):
        source.read(3)
    with pytest.raises(DataError, match=r"00001\.tar was changed since it was indexed"):
        reopened.read(3)
    shard.write_bytes(b"\1" * len(whole))
    with pytest.raises(DataError, match=r"00001\.tar was changed since it was indexed"):
        source.read(3)
    shard.write_bytes(whole)  # at another time
    with pytest.raises(DataError, match=r"00001\.tar was changed since it was indexed"):
        pickle.loads(pickle.dumps(source)).read(3)
    shard.unlink()
    with pytest.raises(DataError, match=r"00001\.tar can no longer be read \(No such file"):
        pickle.loads(pickle.dumps(source)).read(3)
    assert source.read(0).image == pairs[0].image


def test_a_system_that_reads_less_than_asked_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(write_shards(tmp_path, make_pairs(2), 2)), DataOptions())
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, start: real(file, min(size, 100), start))
    assert source.read(1).image == make_pairs(2)[1].image


def test_a_fingerprint_is_of_what_shards_hold(tmp_path: Path) -> None:
    def fingerprint(name: str, **changes: Any) -> str:
        pairs = make_pairs(6)
        if changes:
            pairs[0] = pairs[0]._replace(**changes)
        return open_source(str(write_shards(tmp_path / name, pairs, 3)), DataOptions()).fingerprint

    first = fingerprint("here")
    assert fingerprint("there") == first
    same_length = picture(form="JPEG", seed=0)[:-3] + b"\0\xff\xd9"
    assert (
        len({first, fingerprint("image", image=same_length), fingerprint("text", caption='picture "9", of thing 0')})
        == 3
    )


def test_a_fingerprint_is_of_names_and_sizes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of records that nobody reads for it."""
    monkeypatch.setattr(reading, "FINGERPRINT_RECORDS", 1)
    pairs = make_pairs(4)

    def fingerprint(folder: Path) -> str:
        return open_source(str(folder), DataOptions()).fingerprint

    folder = write_shards(tmp_path / "here", pairs, 2)
    first = fingerprint(folder)
    longer = [*pairs[:3], pairs[3]._replace(caption="a longer caption than it was")]
    second = fingerprint(write_shards(tmp_path / "there", longer, 2))
    (folder / "00001.tar").rename(folder / "00002.tar")
    assert len({first, second, fingerprint(folder)}) == 3


def test_processes_that_scan_end_with_the_one_that_asked(tmp_path: Path) -> None:
    """It is killed; its children notice by themselves."""
    write_shards(tmp_path, make_pairs(4), 1)
    code = (
        "import sys; from train.data.sources import scan\n"
        f"shards = [{str(tmp_path / '00000.tar')!r}] * 100_000\n"
        "scans = scan.scan_all(shards, scan.Suffixes(('jpg',), ('txt',)), 2)\n"
        "print(next(scans), flush=True)\n"
        "sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None and process.stdout.readline()
    process.kill()
    process.communicate()
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("processes that scan are left")


def test_several_processes_find_what_one_finds(tmp_path: Path) -> None:
    pairs = make_pairs(30)
    write_shards(tmp_path, pairs, 3, label=1)
    (tmp_path / "00004.tar").write_bytes(truncated())
    shards = sorted(map(str, tmp_path.glob("*.tar")))
    suffixes = scan.Suffixes(("jpg", "png"), ("txt",))
    alone = list(scan.scan_all(shards, suffixes, 1))
    assert list(scan.scan_all(shards, suffixes, 3)) == alone
    assert [len(found.entries) // scan.ENTRY.size for found in alone] == [3, 3, 3, 3, 4, 3, 3, 3, 3, 3]
    with pytest.raises(scan.ScanError, match=r"gone\.tar: No such file"):
        list(scan.scan_all([*shards, str(tmp_path / "gone.tar")], suffixes, 2))


def test_a_shard_of_several_gigabytes_is_read_to_its_end(tmp_path: Path) -> None:
    """With holes, which take no room on the disk."""
    path = tmp_path / "00000.tar"
    with path.open("wb") as file:
        for _ in range(3):
            filler = tarfile.TarInfo("filler.bin")
            filler.size = 2 << 30
            file.write(filler.tobuf())
            file.seek(2 << 30, io.SEEK_CUR)
        file.write(tar_of(list(members_of(make_pairs(2)))))
    source = open_source(str(path), DataOptions())
    assert [source.read(index).image for index in range(2)] == [pair.image for pair in make_pairs(2)]
