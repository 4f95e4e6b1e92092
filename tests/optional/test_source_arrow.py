"""Data sets of Hugging Face's library, saved to disk."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.layouts import make_pairs, picture, write_folder

from train.data.record import BadRecordError, DataError, Record, Source
from train.data.sources import open_source
from train.data.sources.reading import class_number
from train.options import DataOptions

datasets = pytest.importorskip("datasets")

PAIRS = make_pairs(8)
BYTES = [pair.image for pair in PAIRS]
CAPTIONS = [pair.caption for pair in PAIRS]


def saved(folder: Path, columns: dict[str, Any], **features: Any) -> Path:
    """`features`: those of the columns that are not what the library takes them for."""
    rows = datasets.Dataset.from_dict(columns)
    for name, feature in features.items():
        rows = rows.cast_column(name, feature)
    rows.save_to_disk(str(folder))
    return folder


def opened(folder: Path, **options: Any) -> Source:
    return open_source(f"hf:{folder}", DataOptions(**options))


def all_of(source: Source) -> list[Record]:
    return [source.read(index) for index in range(len(source))]


def test_a_saved_split_is_read_as_it_lies(tmp_path: Path) -> None:
    """Pictures as the library keeps them, undecoded; labels with names."""
    columns = {"image": BYTES, "text": CAPTIONS, "label": [number % 2 for number in range(8)], "more": list(range(8))}
    names = datasets.ClassLabel(names=["cat", "dog"])
    source = opened(saved(tmp_path / "set", columns, image=datasets.Image(), label=names))
    assert all_of(source) == [
        Record(f"set:{number}", pair.image, (pair.caption,), number % 2, ("cat", "dog")[number % 2])
        for number, pair in enumerate(PAIRS)
    ]
    labels = source.labels()
    assert labels is not None and labels.dtype == np.int64 and labels.tolist() == [0, 1] * 4
    classes = source.classes()
    assert classes is not None and classes.tolist() == [class_number("cat"), class_number("dog")] * 4
    assert source.left_out == {}
    assert all_of(pickle.loads(pickle.dumps(source))) == all_of(source)


def test_rows_without_a_label_have_none(tmp_path: Path) -> None:
    """The library writes -1 where a ClassLabel is not known."""
    columns = {"image": BYTES[:3], "text": CAPTIONS[:3], "label": [1, -1, None]}
    source = opened(saved(tmp_path / "set", columns, label=datasets.ClassLabel(names=["cat", "dog"])))
    assert [(each.label, each.class_name) for each in all_of(source)] == [(1, "dog"), (None, None), (None, None)]
    assert source.labels() is None and source.classes() is None
    columns["label"] = [0, 1, -1]
    source = opened(saved(tmp_path / "full", columns, label=datasets.ClassLabel(names=["cat", "dog"])))
    assert source.labels() is None


def test_pictures_may_be_bytes_or_lie_beside_the_set(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "pictures", PAIRS)
    paths = [str(folder / f"{pair.stem}.jpg") for pair in PAIRS]
    raw = opened(saved(tmp_path / "raw" / "set", {"image": BYTES, "caption": CAPTIONS}))
    assert all_of(raw) == [Record(f"set:{n}", pair.image, (pair.caption,)) for n, pair in enumerate(PAIRS)]
    assert raw.labels() is None
    # The library would copy the pictures into what it saves.
    table = {"image": [{"bytes": None, "path": path} for path in paths], "caption": CAPTIONS}
    beside = opened(saved(tmp_path / "beside" / "set", table))
    assert all_of(beside) == all_of(raw)
    (folder / "000000003.jpg").unlink()
    with pytest.raises(BadRecordError, match="missing_file"):
        beside.read(3)


def test_a_row_may_have_several_captions(tmp_path: Path) -> None:
    captions = [["a cat", " a cat ", "it"], ["b"], [], [" "], None]
    source = opened(saved(tmp_path / "set", {"image": BYTES[:5], "captions": captions}))
    assert source.read(0).captions == ("a cat", "it")
    for index, reason in ((2, "no_caption"), (3, "empty_caption"), (4, "no_caption")):
        with pytest.raises(BadRecordError, match=reason):
            source.read(index)


def test_a_fingerprint_is_of_what_it_holds(tmp_path: Path) -> None:
    def fingerprint(name: str, image: bytes = BYTES[0], **columns: Any) -> str:
        made = saved(tmp_path / name, {"image": [image, *BYTES[1:]], "caption": CAPTIONS, **columns})
        return opened(made).fingerprint

    first = fingerprint("here")
    assert fingerprint("there") == fingerprint("with more", more=list(range(8))) == first
    assert len({first, fingerprint("other", picture(seed=99)), fingerprint("labels", label=[1] * 8)}) == 3


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone cannot be read as a data set .*save_to_disk"):
        opened(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty cannot be read as a data set"):
        opened(tmp_path / "empty")
    rows = datasets.Dataset.from_dict({"image": BYTES, "caption": CAPTIONS})
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(DataError, match=r"holds several splits; give one of them: hf:.*splits/train, hf:.*splits/test"):
        opened(tmp_path / "splits")
    assert len(opened(tmp_path / "splits" / "test")) == 8
    with pytest.raises(DataError, match=r"has no column 'words'; it has 'image', 'caption': .* data\.caption_column"):
        opened(tmp_path / "splits" / "test", caption_column="words")
