"""Captions made wrong on purpose: which and how many, what they say then, and what is logged of them."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.data import make_data, tiny
from helpers.layouts import make_pairs, write_shards, write_table
from helpers.saved_runs import rewrite_manifest, write_checkpoint
from helpers.sources import Listed, bad, listed
from hypothesis import given, settings
from hypothesis import strategies as st

from train import checkpoint, towers
from train.config import Config
from train.data import TrainingData, open_training_data
from train.data.noise import ACCOUNT, Noisy, draw_noise
from train.data.record import DataError, Record
from train.data.sources import open_source, reading
from train.options import NOISE, ConfigError, DataOptions

ALL = {"swap": 0.2, "near_swap": 0.2, "partial": 0.1, "wrong_word": 0.2, "junk": 0.1}
LABELS = st.lists(st.integers(0, 30), min_size=40, max_size=80)


def refused_for(labels: list[int], classes: np.ndarray, share: float) -> bool:
    """Whether fewer records go in pairs of one class and two labels than near_swap chooses."""
    members = [[label for label, of in zip(labels, classes, strict=True) if of == one] for one in set(classes)]
    most = sum(min(len(each) // 2, len(each) - max(Counter(each).values())) for each in members)
    return most < round(share * len(labels)) // 2


# --- Which records


@given(LABELS, st.floats(0.5, 1), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_a_swap_never_keeps_the_label(labels: list[int], share: float, seed: int) -> None:
    ids = np.asarray(labels)
    try:
        kinds, others = draw_noise(ids, {"swap": share}, seed)
    except DataError:
        assert max(map(labels.count, labels)) > 5, "refused although no label is frequent"
        return
    moved = others != np.arange(len(ids))
    assert moved.sum() == round(share * len(ids)) and np.array_equal(kinds == 1, moved)
    assert sorted(others) == list(range(len(ids))), "captions are exchanged, none lost"
    assert (ids[others] != ids)[moved].all()


@given(LABELS, st.integers(1, 12), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_a_near_swap_stays_in_the_class_and_is_refused_only_where_none_is_left(
    labels: list[int], spread: int, share: float, seed: int
) -> None:
    ids = np.asarray(labels)
    classes = ids // spread
    try:
        kinds, others = draw_noise(ids, {"near_swap": share}, seed, classes)
    except DataError:
        assert refused_for(labels, classes, share)
        return
    assert not refused_for(labels, classes, share)
    moved = others != np.arange(len(ids))
    assert moved.sum() == round(share * len(ids)) // 2 * 2 and np.array_equal(kinds == 2, moved)
    assert np.array_equal(others[others], np.arange(len(ids))), "two and two"
    assert (ids[others] != ids)[moved].all() and np.array_equal(classes[others], classes)


@given(st.integers(0, 99), st.permutations(list(ALL)), st.floats(0.05, 0.2))
@settings(max_examples=50, deadline=None)
def test_each_record_has_one_kind_at_most_and_each_kind_its_share(seed: int, order: list[str], share: float) -> None:
    ids = np.arange(200) % 50
    shares = dict.fromkeys(order, share)
    kinds, others = draw_noise(ids, shares, seed, ids % 5)
    again = draw_noise(ids, ALL | shares, seed, ids % 5)
    assert kinds.dtype == np.uint8 and others.dtype == np.int32
    assert np.array_equal(again[0], kinds) and np.array_equal(again[1], others)
    counts = dict(zip(NOISE, np.bincount(kinds, minlength=6)[1:].tolist(), strict=True))
    assert counts == dict.fromkeys(ALL, round(share * 200)) | {"near_swap": round(share * 200) // 2 * 2}
    own = others == np.arange(200)
    assert own[np.isin(kinds, [0, 1 + NOISE.index("partial"), 1 + NOISE.index("junk")])].all()
    assert (ids[others] != ids)[
        np.isin(kinds, [1 + NOISE.index(kind) for kind in ("swap", "near_swap", "wrong_word")])
    ].all()


def test_records_are_chosen_at_random_and_a_larger_share_chooses_more() -> None:
    ids = np.arange(1000)
    few, many = (draw_noise(ids, {"junk": share}, 0)[0] > 0 for share in (0.2, 0.5))
    assert many[few].all()
    assert abs(few[:500].sum() - 100) < 40 and not np.array_equal(few, draw_noise(ids, {"junk": 0.2}, 1)[0] > 0)
    _, others = draw_noise(ids, {"near_swap": 1.0}, 0, np.zeros(1000, np.int64))
    assert abs(np.corrcoef(ids, others)[0, 1]) < 0.2


def test_swap_alone_is_what_data_corrupt_was() -> None:
    """As commit d424a59 drew it: runs that were begun then go on."""
    labels = np.arange(12) % 5
    assert draw_noise(labels, {"swap": 0.75}, 3)[1].tolist() == [2, 1, 9, 7, 8, 5, 6, 0, 11, 10, 3, 4]
    assert draw_noise(np.arange(12), {"swap": 0.5}, 0)[1].tolist() == [9, 1, 5, 2, 4, 6, 0, 7, 8, 3, 10, 11]


def test_one_label_alone_is_refused() -> None:
    with pytest.raises(DataError, match=r"data.noise.swap=0.5 chooses 5 of 10 records.*cannot be exchanged"):
        draw_noise(np.ones(10), {"swap": 0.5}, 0)
    with pytest.raises(DataError, match=r"data.noise.wrong_word=0.5, but \(nearly\) all records have one label"):
        draw_noise(np.ones(10), {"wrong_word": 0.5}, 0)
    with pytest.raises(DataError, match=r"near_swap=0.5 chooses 5 of 10 records, and only 0 can exchange"):
        draw_noise(np.ones(10), {"near_swap": 0.5}, 0, np.ones(10))


# --- What they say


def test_each_kind_does_to_captions_what_it_says() -> None:
    source = listed(200, 50)
    noisy, again, other = (Noisy(source, ALL, seed) for seed in (1, 1, 2))
    seen = Counter[str]()
    for index in range(200):
        plain, made = source.read(index), noisy.read(index)
        assert made == again.read(index)
        kind = NOISE[made.noise - 1] if made.noise else ""
        seen[kind] += 1
        assert replace(made, captions=plain.captions, noise=0) == plain, "nothing else is changed"
        donor = int(noisy.others[index])
        if kind in ("swap", "near_swap"):
            assert made.captions == source.read(donor).captions and donor % 50 != index % 50
        elif kind == "partial":
            assert made.captions == ("words",) or index >= 100, "of those the only one that has three letters"
            assert made.captions[0] in ("words", str(index))
        elif kind == "wrong_word":
            for caption in made.captions if donor > 2 else ():  # those numbers are words of all
                extra = [Counter(caption.split()) - Counter(own.split()) for own in plain.captions]
                assert Counter([str(donor)]) in extra and len(caption.split()) in (4, 5)
        elif kind == "junk":
            assert len(made.captions) == 1 and "words" not in made.captions[0]
        else:
            assert made == plain
    assert seen == {"": 40, "swap": 40, "near_swap": 40, "partial": 20, "wrong_word": 40, "junk": 20}
    assert noisy.describe() == "swap 40, near_swap 40, partial 20, wrong_word 40, junk 20"
    assert [made.noise for made in map(other.read, range(200))] != noisy.kinds.tolist()


TEXTS = st.text("ab cd-'.,!é日", min_size=1, max_size=30).map(lambda text: " ".join(text.split())).filter(bool)


@given(st.lists(TEXTS, min_size=1, max_size=4), st.lists(TEXTS, min_size=1, max_size=4), st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_no_caption_comes_out_empty_or_keeps_its_only_word_from_sight(
    own: list[str], theirs: list[str], seed: int
) -> None:
    records = [Record("a", b"", tuple(own), 0), Record("b", b"", tuple(theirs), 1)]
    for kind in ("partial", "wrong_word", "junk"):
        for record, made in zip(records, map(Noisy(Listed(records), {kind: 1.0}, seed).read, range(2)), strict=True):
            assert made.captions and all(text == " ".join(text.split()) and text for text in made.captions)
            if kind == "partial":
                assert any(made.captions[0] in text for text in record.captions)
            if kind == "wrong_word" and all(" " not in text for text in record.captions):
                assert len(made.captions) == len(set(record.captions))
                assert all(any(text in other for other in made.captions) for text in record.captions)


def test_a_keyword_is_a_tag_where_there_are_any() -> None:
    cat = Record("a", b"", ("grey cat", "a drawing of a grey cat", "pet", "whiskers"), 0)
    car = Record("b", b"", ("old car", "a drawing of an old car"), 1)
    partial, wrong = (
        [Noisy(Listed([cat, car]), {kind: 1.0}, seed) for seed in range(40)] for kind in ("partial", "wrong_word")
    )
    assert {noisy.read(0).captions for noisy in partial} == {("pet",), ("whiskers",)}
    assert {noisy.read(1).captions for noisy in partial} == {("old",), ("car",)}
    assert {word for noisy in wrong for word in noisy.read(0).captions[0].split()} == {"grey", "cat", "old", "car"}
    assert {word for noisy in wrong for word in noisy.read(1).captions[0].split()} == {"old", "car", "pet", "whiskers"}


def test_what_is_added_and_what_is_replaced_are_about_half() -> None:
    made = map(Noisy(listed(400), {"wrong_word": 1.0}, 0).read, range(400))
    longer = sum(len(record.captions[0].split()) == 5 for record in made)
    assert abs(longer - 200) < 60


# --- Classes, in every layout


def numbers(*names: str) -> list[int]:
    return [reading.class_number(name) for name in names]


def test_classes_are_alike_in_all_layouts_and_none_where_one_is_missing(tmp_path: Path) -> None:
    options, pairs = DataOptions(max_bad_fraction=0.5), make_pairs(4)
    shards = write_shards(tmp_path / "shards", pairs[:2], 1, **{"class": "big\0cat", "label": 3})
    for name in ("big_cat/a.png", "dog/b.png"):
        (tmp_path / "things" / name).parent.mkdir(parents=True)
        (tmp_path / "things" / name).write_bytes(pairs[0].image)
    table = write_table(tmp_path / "pairs.csv", pairs)
    rows = table.read_text().splitlines()
    (tmp_path / "named.csv").write_text(
        "\n".join(f"{row},{name}" for row, name in zip(rows, ("class", "dog", "big cat", "\ufeff", "dog"), strict=True))
    )
    every = open_source(f"{shards}::{tmp_path / 'things'}::{tmp_path / 'named.csv'}", options)
    expected = [*numbers("big cat", "big cat", "big cat", "dog", "dog", "big cat"), -3, *numbers("dog")]
    assert every.classes() is not None and every.classes().tolist() == expected  # type: ignore[union-attr]
    assert open_source(f"{shards}::{table}", options).classes() is None
    assert open_source(str(write_shards(tmp_path / "bare", pairs, 4)), options).classes() is None


def test_near_swaps_need_classes(tmp_path: Path) -> None:
    pairs = write_shards(tmp_path, make_pairs(8), 4)
    assert Noisy(open_source(str(pairs), DataOptions()), {"swap": 0.5}, 0).describe() == "swap 4"
    with pytest.raises(
        ConfigError, match=r"data.noise.near_swap=0.5, but not every record of data.source names a class"
    ):
        Noisy(open_source(str(pairs), DataOptions()), {"near_swap": 0.5}, 0)


# --- In a run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def training(data: Path, noise: dict[str, float] | None = None, **options: Any) -> TrainingData:
    sections = tiny(data)
    sections["data"] |= {"noise": noise or {}, **options}
    return open_training_data(Config.from_dict(sections))


def test_training_data_make_captions_wrong_and_the_tokenizers_right(data: Path) -> None:
    plain, noisy = training(data), training(data, ALL)
    assert plain.noisy is None, "nothing is kept for each record"
    assert noisy.fingerprint == plain.fingerprint
    assert list(noisy.captions()) == list(plain.captions())
    assert noisy.describe() == (
        "80 pairs (bad samples left out: none; captions made wrong: swap 16, near_swap 16, partial 8, wrong_word 16, "
        "junk 8)"
    )


def test_labels_that_a_target_needs_are_asked_for_before_any_step(data: Path, tmp_path: Path) -> None:
    pairs = write_shards(tmp_path, make_pairs(20), 10)
    for source, words in (
        (str(pairs), "not every record of data.source"),
        (f"stream:{pairs}/00000.tar", "with data.source='stream:"),
    ):
        sections = tiny(data)
        sections["data"] |= {"source": source, "distinct": "none", "epoch_samples": 20}
        sections["loss"]["positives"] = "label"
        with pytest.raises(ConfigError, match=rf"loss.positives='label'.*{words}"):
            open_training_data(Config.from_dict(sections))


def test_the_account_names_every_wrong_caption_and_where_it_is_from(tmp_path: Path) -> None:
    source = listed(100, 25, instead={7: bad(), 8: bad()})
    noisy = Noisy(source, ALL, 0)
    noisy.write_account(tmp_path)
    written = (tmp_path / ACCOUNT).read_bytes()
    assert written[4:8] == bytes(4), "it holds no time: the same noise gives the same file"
    rows = list(csv.DictReader(gzip.decompress(written).decode().splitlines()))
    lost = {7, 8} | {index for index in range(100) if noisy.others[index] in (7, 8)}
    expected = [
        {
            "key": f"r{index}",
            "kind": NOISE[noisy.kinds[index] - 1],
            "from": "" if noisy.others[index] == index else f"r{noisy.others[index]}",
            "caption": noisy.read(index).captions[0],
        }
        for index in range(100)
        if noisy.kinds[index] and index not in lost
    ]
    assert rows == expected and len(rows) > 70


def test_a_checkpoint_with_corrupt_captions_goes_on_with_the_same(data: Path, tmp_path: Path) -> None:
    files = towers.build(Config.from_dict(tiny(data)).model, training(data).captions).files
    folder = write_checkpoint(tmp_path, data, files, 8)
    options = json.loads((folder / checkpoint.CONFIG).read_text())
    del options["data"]["noise"]
    for corrupt, noise in ((0.25, {"swap": 0.25}), (0.0, {})):
        options["data"]["corrupt"] = corrupt
        (folder / checkpoint.CONFIG).write_text(json.dumps(options))
        rewrite_manifest(folder)
        sections = tiny(data)
        sections["data"]["noise"] = noise
        assert checkpoint.read_config(folder) == Config.from_dict(sections)
    options["data"]["corrupt"] = "much"
    (folder / checkpoint.CONFIG).write_text(json.dumps(options))
    with pytest.raises(checkpoint.CheckpointError, match=r"data.noise.swap='much'"):
        checkpoint.read_config(folder)
