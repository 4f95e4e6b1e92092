"""Folders, tables and several sources in a row; and the same pairs in every layout."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import parity
from helpers.data import tiny
from helpers.layouts import Pair, make_pairs, members_of, picture, tar_of, write_folder, write_shards, write_table

from train.config import Config
from train.data import emoji, open_training_data
from train.data.record import BadRecordError, DataError, Record, Source
from train.data.sources import open_source
from train.options import ConfigError, DataOptions

Write = Callable[[Path, list[Pair]], Path]
LAYOUTS: dict[str, Write] = {
    "shards": lambda folder, pairs: write_shards(folder, pairs, 20),
    "one shard": lambda folder, pairs: write_shards(folder, pairs, 64) / "00000.tar",
    "folder": write_folder,
    "csv": lambda folder, pairs: write_table(folder / "pairs.csv", pairs),
    "tsv": lambda folder, pairs: write_table(folder / "pairs.tsv", pairs, "\t"),
}


def opened(spec: object, **options: object) -> Source:
    return open_source(str(spec), DataOptions(**options))  # type: ignore[arg-type]


def reason(source: Source, index: int) -> str:
    """Why a record is bad."""
    with pytest.raises(BadRecordError) as refusal:
        source.read(index)
    return str(refusal.value)


def files_of(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


# --- Every layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_source_gives_the_pairs_in_their_order_whatever_the_layout(tmp_path: Path, layout: str) -> None:
    pairs = make_pairs(64)
    spec = LAYOUTS[layout](tmp_path / "data", pairs)
    source = opened(spec)
    assert [source.read(i).image for i in range(len(source))] == [p.image for p in pairs]
    assert [source.read(i).captions for i in range(len(source))] == [(p.caption,) for p in pairs]
    assert len({source.read(i).key for i in range(len(source))}) == 64
    assert source.left_out == {} and source.labels() is None
    assert opened(spec).fingerprint == source.fingerprint
    other = [pairs[0]._replace(caption="another"), *pairs[1:]]  # the first is one of those that a fingerprint reads
    assert opened(LAYOUTS[layout](tmp_path / "other", other)).fingerprint != source.fingerprint
    assert opened(LAYOUTS[layout](tmp_path / "moved", pairs)).fingerprint == source.fingerprint


def test_the_same_pairs_give_the_same_losses_whatever_the_layout(tmp_path: Path) -> None:
    pairs = make_pairs(64)

    def losses(spec: Path) -> list[float]:
        sections = tiny(tmp_path)
        sections["data"] = {"source": str(spec)}
        sections["optimizer"] |= {"steps": 6}
        config = Config.from_dict(sections)
        training = open_training_data(config)
        files = parity.towers.build(config.model, training.captions).files
        return parity.train(parity.Problem(config, training, files, {}), parity.exact).losses

    found = {name: losses(write(tmp_path / name, pairs)) for name, write in LAYOUTS.items()}
    assert len(set(found["shards"])) == 6
    assert found == dict.fromkeys(found, found["shards"])


def test_what_is_no_form_of_data_is_named_with_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    for spec, message in (
        (tmp_path / "gone", r"gone' is not there; allowed:\nDIR .*hf:DIR"),
        (tmp_path / "gone.csv", r"gone\.csv' is not there; allowed"),
        (tmp_path / "notes.txt", r"notes\.txt' is no form of data; allowed"),
        ("parquet:x", "'parquet:x' is not there; allowed"),
        ("stream:x.tar", "'stream:x.tar' can only be trained on"),
        ("", "'' is no form of data"),
    ):
        with pytest.raises(DataError, match=f"(?s){message}"):
            opened(spec)


def test_a_data_set_of_a_library_needs_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"needs the library `datasets`; pip install softclip-kernels\[hf\]"):
        opened(f"hf:{tmp_path}")


# --- Folders


def test_a_folder_is_read_in_order_with_all_below_it(tmp_path: Path) -> None:
    names = ("b.jpg", "a.x.jpg", "B.PNG", "z/1.webp", "c/2.jpg", "c/deep/3.jpeg")
    files = {name: name.encode() for name in names}
    files |= {name.rpartition(".")[0] + ".txt": f"of {name}".encode() for name in names}
    files |= {
        ".hidden.jpg": b"",
        ".hidden/x.jpg": b"",
        "notes.md": b"",
        "alone.txt": b"",
        "a.jpg": b"",
        "bad\n.jpg": b"",
    }
    os.symlink("..", (files_of(tmp_path, files) / "z" / "circle"))
    source = opened(tmp_path, max_bad_fraction=0.5)
    records = [source.read(i) for i in range(len(source))]
    assert [record.key for record in records] == ["B.PNG", "a.x.jpg", "b.jpg", "c/2.jpg", "c/deep/3.jpeg", "z/1.webp"]
    assert all(record.image == record.key.encode() for record in records)
    assert all(record.captions == (f"of {record.key}",) for record in records)
    assert source.left_out == {"missing_member": 1, "unsafe_member": 1}
    with pytest.raises(DataError, match=r"6 pairs, and 2 that cannot be one .*data\.max_bad_fraction=0\.2"):
        opened(tmp_path, max_bad_fraction=0.2)


def test_folders_of_classes_make_captions_and_labels(tmp_path: Path) -> None:
    names = ("great_tit/b.jpg", "cat/a.jpg", "cat/deep/c.jpg", "great_tit/a.png", "loose.jpg")
    source = opened(files_of(tmp_path, {name: name.encode() for name in names}), max_bad_fraction=0.2)
    assert [source.read(i) for i in range(len(source))] == [
        Record("cat/a.jpg", b"cat/a.jpg", ("a photo of a cat",), 0, "cat"),
        Record("cat/deep/c.jpg", b"cat/deep/c.jpg", ("a photo of a cat",), 0, "cat"),
        Record("great_tit/a.png", b"great_tit/a.png", ("a photo of a great tit",), 1, "great tit"),
        Record("great_tit/b.jpg", b"great_tit/b.jpg", ("a photo of a great tit",), 1, "great tit"),
    ]
    labels = source.labels()
    assert labels is not None and labels.dtype == np.int64 and labels.tolist() == [0, 0, 1, 1]
    assert source.left_out == {"missing_member": 1}


def test_what_is_bad_in_a_folder_is_named(tmp_path: Path) -> None:
    files = {f"{stem}.jpg": b"x" for stem in "abcd"} | {f"{stem}.txt": b"x" for stem in "abcd"}
    folder = files_of(tmp_path, files | {"a.txt": b"\xff", "b.txt": b" ", "c.txt": b"y" * 50_000})
    source = opened(folder)
    (folder / "d.jpg").unlink()
    os.mkfifo(folder / "d.jpg")  # reading it would wait forever
    assert [reason(source, i) for i in range(4)] == ["broken_text", "empty_caption", "caption_too_long", "not_a_file"]
    (folder / "d.jpg").unlink()
    with pytest.raises(DataError, match=r"d\.jpg can no longer be read \(No such file.*leave data alone"):
        source.read(3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds 0 pairs.*data\.image_key"):
        opened(tmp_path / "empty")


# --- Tables


def table(folder: Path, text: str | bytes, name: str = "pairs.csv") -> Path:
    """With a picture b"1" to b"4" at 1.jpg to 4.jpg."""
    files_of(folder, {f"{number}.jpg": str(number).encode() for number in range(1, 5)})
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / name


def test_a_table_is_quoted_as_its_standard_says(tmp_path: Path) -> None:
    """Line breaks and quotes within quotes, empty lines, a mark of the byte order, a last line without an end."""
    text = (
        '\ufeffcaption, image ,label,class,more\r\n"two\r\nlines, ""quoted""",1.jpg,3,food,\r\n\r\n'
        'é,2.jpg,4,,x\r\n"\n\n",3.jpg,5,,"a\nb"\r\n' + f"last,{tmp_path / '4.jpg'},6,,"
    )
    source = opened(table(tmp_path, text))
    assert source.read(0) == Record("pairs.csv:1", b"1", ('two lines, "quoted"',), 3, "food")
    assert source.read(1) == Record("pairs.csv:2", b"2", ("é",), 4)
    assert reason(source, 2) == "empty_caption"
    assert source.read(3) == Record("pairs.csv:4", b"4", ("last",), 6)
    assert len(source) == 4
    labels = source.labels()
    assert labels is not None and labels.tolist() == [3, 4, 5, 6]


def test_columns_are_found_by_custom_or_by_name(tmp_path: Path) -> None:
    path = table(tmp_path, "id,text,path,alt,thumb\n7,a,1.jpg,b,2.jpg\n")
    assert opened(path).read(0) == Record("pairs.csv:1", b"1", ("a",))
    assert opened(path, image_column="thumb", caption_column="alt").read(0) == Record("pairs.csv:1", b"2", ("b",))
    with pytest.raises(DataError, match=r"no column 'url'; it has 'id', 'text', .*: name one by data\.image_column"):
        opened(path, image_column="url")
    with pytest.raises(DataError, match=r"no column 'caption' or .* 'text'; it has 'path', 'alt': .*caption_column"):
        opened(table(tmp_path, "path,alt\n1.jpg,b\n"))
    for text in ("", "image,caption\n"):
        with pytest.raises(DataError, match=r"has no column 'image'|holds 0 pairs"):
            opened(table(tmp_path, text))


def test_what_is_bad_in_a_table_is_named(tmp_path: Path) -> None:
    rows = b"gone.jpg,a,1", b"1.jpg,a", b"1.jpg,a,b,c", b"1.jpg,\xff,1", b"1.jpg,a,x", b"\0,a,1", b",a,1", b"2.jpg,ok,"
    source = opened(table(tmp_path, b"\n".join((b"image,caption,label", *rows))))
    assert [reason(source, i) for i in range(7)] == [
        "missing_file",
        "broken_row",
        "broken_row",
        "broken_text",
        "broken_label",
        "missing_file",
        "not_a_file",
    ]
    assert source.read(7) == Record("pairs.csv:8", b"2", ("ok",))
    assert source.labels() is None, "the last one has none"


@pytest.mark.parametrize(
    "text", ('image,caption\n1.jpg,"never closed' + "\nx" * 100_000, "image,caption\n" + "x" * 2**21)
)
def test_a_table_that_is_none_is_refused_with_the_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"pairs\.csv, line \d+: .*is a quote opened there and not closed"):
        opened(table(tmp_path, text))


def test_a_table_that_changes_is_indexed_anew_and_ends_a_run(tmp_path: Path) -> None:
    path = table(tmp_path, "image,caption\n1.jpg,a\n")
    before = opened(path)
    (tmp_path / "t.csv").write_text("image,caption\n1.jpg,b\n2.jpg,c\n")
    (tmp_path / "t.csv").replace(path)
    after = opened(path)
    assert [after.read(i).captions for i in range(len(after))] == [("b",), ("c",)]
    assert after.fingerprint != before.fingerprint
    path.write_text("image,caption\n")
    with pytest.raises(DataError, match=r"pairs\.csv was changed since it was indexed"):
        after.read(0)


# --- Several sources, and the emoji set


def test_sources_follow_one_another(tmp_path: Path) -> None:
    pairs = make_pairs(10)
    write_shards(tmp_path / "shards", pairs[:4], 2, label=1)
    files_of(tmp_path / "things", {"cat/a.jpg": b"a", "dog/b.jpg": b"b"})
    write_table(tmp_path / "table" / "pairs.csv", pairs[4:])
    both = opened(f"{tmp_path}/shards::{tmp_path}/things")
    labels = both.labels()
    assert labels is not None and labels.tolist() == [1, 1, 1, 1, 0, 1]
    source = opened(f"{tmp_path}/shards::{tmp_path}/things::{tmp_path}/table/pairs.csv")
    assert source.lengths == (4, 2, 6)  # type: ignore[attr-defined]
    images = [source.read(i).image for i in range(len(source))]
    assert images == [*(p.image for p in pairs[:4]), b"a", b"b", *(p.image for p in pairs[4:])]
    keys = [source.read(i).key for i in (0, 4, 11)]
    assert keys == ["1:00000/000000000", "2:cat/a.jpg", "3:pairs.csv:6"]
    assert source.labels() is None
    assert opened(f"{tmp_path}/things::{tmp_path}/shards").fingerprint != both.fingerprint
    with pytest.raises(DataError, match="gone' is not there"):
        opened(f"{tmp_path}/shards::{tmp_path}/gone")


def test_the_emoji_set_is_prepared_and_read_by_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def prepare(root: None, *, size: int, seed: int) -> Path:
        asked.append((size, seed))
        for split, start in (("train", 0), ("heldout", 3)):
            for shard in range(2):
                pairs = make_pairs(6)[start + shard : start + shard + 1]
                (tmp_path / f"{split}-{shard:06d}.tar").write_bytes(tar_of(list(members_of(pairs))))
        return tmp_path

    monkeypatch.setattr(emoji, "prepare_emoji", prepare)
    for spec, first in (("emoji:train", 0), ("emoji:heldout@64", 3)):
        source = opened(spec, seed=5)
        assert [source.read(i).image for i in range(len(source))] == [
            picture(form="JPEG", seed=first + i) for i in (0, 1)
        ]
    assert asked == [(48, 5), (64, 5)]
    with pytest.raises(DataError, match="no split 'tests'; allowed: train, heldout, concepts, vendor; of more vendors"):
        opened("emoji:tests")
    for spec in ("emoji:", "emoji:*", "emoji:../x"):
        with pytest.raises(DataError, match="no split"):
            opened(spec)
    with pytest.raises(DataError, match="'big' is no number of pixels"):
        opened("emoji:train@big")
