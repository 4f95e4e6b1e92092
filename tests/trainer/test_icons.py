"""Icon sets: what an icon is called, what is held out, and the sources that come of it. No network, no npm."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.drawn import fake_icons
from PIL import Image

from train.data import DataError, Record, Source, icons, open_source
from train.data.drawn import SetupError
from train.data.icons import ICON_SETS, TRAINING, label_of, prepare, prepare_icons
from train.data.icons.words import read_icons, without_number, without_style
from train.data.sources.reading import check_label
from train.evaluate.sets import read_classes, read_set
from train.evaluate.shares import ALONE
from train.options import DataOptions

SIZE = 16


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_icons(tmp_path_factory.mktemp("icons"))


@pytest.fixture
def fetches(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is fetched, in order."""
    asked: list[str] = []

    def fetch(root: Path, _: Any, what: str) -> Path:
        asked.append(what.removeprefix("the icon set "))
        return packages

    monkeypatch.setattr(prepare, "fetch", fetch)
    monkeypatch.setenv("SOFTCLIP_DATA", str(tmp_path / "cache"))
    return asked


def records(source: Source) -> list[Record]:
    return [source.read(number) for number in range(len(source))]


def test_a_style_is_taken_off_only_where_there_is_another() -> None:
    strip = without_style(
        ("bold-light", "light", "bold"), ["lamp", "lamp-light", "traffic-light", "pen-bold", "pen-bold-light"]
    )
    told = {key: strip(key) for key in ("lamp", "lamp-light", "traffic-light", "pen-bold", "pen-bold-light", "light")}
    assert told == {
        "lamp": "lamp",
        "lamp-light": "lamp",
        "traffic-light": "traffic-light",
        "pen-bold": "pen",
        "pen-bold-light": "pen",
        "light": "light",
    }


@pytest.mark.parametrize(
    ("base", "plain"),
    (
        ("home-01", "home"),
        ("cup-2", "cup"),
        ("cup-3", "cup"),
        ("key2", "key"),
        ("dice-2", "dice-2"),  # there is a dice-1
        ("rewind-5", "rewind-5"),  # no rewind-2
        ("battery-20", "battery-20"),
        ("cup-20", "cup-20"),  # a measure, beside a row of variants
        ("123", "123"),
    ),
)
def test_a_number_is_taken_off_where_it_counts_variants(base: str, plain: str) -> None:
    known = ["cup", "cup-2", "cup-3", "key", "key2", "dice", "dice-1", "dice-2", "rewind", "rewind-5", "battery", "123"]
    assert without_number(known)(base) == plain


def test_an_icon_is_told_in_words(packages: Path) -> None:
    read = {icon.key: icon for icon in read_icons(packages, ICON_SETS["mdi"], 0)}
    assert "gone" not in read, "withdrawn by its makers"
    assert read["traffic-light"].name == "traffic light" and read["dice-2"].name == "dice 2"
    for key in ("home", "home-outline"):
        assert (read[key].name, read[key].category) == ("home", "Home / House")
        assert read[key].captions == ("home", "an icon of home", "home icon", "house", "home and house: home")
    assert "arrow up" not in read["arrow-down"].captions, "an alias that turns the drawing shows another thing"
    of_numbers = {icon.key: icon.name for icon in read_icons(packages, ICON_SETS["hugeicons"], 0)}
    assert {of_numbers[key] for key in ("cup", "cup-2", "cup-3")} == {"cup"} and of_numbers["car-01"] == "car"


def test_tags_and_categories_come_from_the_makers(packages: Path) -> None:
    (home, filled) = [icon for icon in read_icons(packages, ICON_SETS["tabler"], 0) if icon.name == "home"]
    assert {home.key, filled.key} == {"home", "home-filled"}
    assert home.category == filled.category == "Rooms" and home.captions == filled.captions
    tags = {word for caption in home.captions for word in caption.split(", ")} & {
        "living",
        "roof",
        "door",
        "front door",
    }
    assert len(tags) == 4 and "rooms: home" in home.captions
    (lucide,) = [icon for icon in read_icons(packages, ICON_SETS["lucide"], 0) if icon.name == "home"]
    assert lucide.category is None and {"living, roof", "roof, living"} & set(lucide.captions)
    orders = {
        next(i for i in read_icons(packages, ICON_SETS["tabler"], seed) if i.name == "home").captions
        for seed in range(9)
    }
    assert len(orders) > 1, "the seed orders the tags"


def test_a_label_is_the_names_in_every_set_and_on_every_machine(fetches: list[str]) -> None:
    labels = {}
    for name in ("lucide", "ri"):
        for record in records(open_source(f"icons:{name}@{SIZE}", DataOptions())):
            labels.setdefault(record.captions[0], set()).add(record.label)
    assert all(len(some) == 1 for some in labels.values()) and len(labels) == 42
    assert labels["home"] == {label_of("home")} == {check_label(1416470138769907151)}


def test_a_training_set_holds_out_whole_names_and_another_everything(fetches: list[str]) -> None:
    seen = []
    for seed in (0, 1):
        trained, heldout = (
            records(open_source(f"icons:{name}@{SIZE}", DataOptions(seed=seed))) for name in ("train", "heldout")
        )
        names = {
            part: {(record.key.split(":")[0], record.label) for record in some}
            for part, some in (("train", trained), ("heldout", heldout))
        }
        assert not names["train"] & names["heldout"], "of one set, a name is in one split"
        assert 0.04 < len(heldout) / (len(heldout) + len(trained)) < 0.2
        seen.append(names["heldout"])
        only = records(open_source(f"icons:tabler@{SIZE}", DataOptions(seed=seed)))
        assert [r.image for r in only] == [r.image for r in trained[: len(only)]]
    assert seen[0] != seen[1]
    assert len(open_source(f"icons:bi@{SIZE}", DataOptions())) == 84, "all 42 names, in two styles"
    assert fetches == [*TRAINING, *TRAINING, "bi"], "nothing that was not named, and each size and seed once"


def test_an_icon_is_drawn_in_a_dark_color_of_its_own(fetches: list[str]) -> None:
    colors = []
    for seed in (0, 1):
        for record in records(open_source(f"icons:lucide@{SIZE}", DataOptions(seed=seed))):
            pixels = np.asarray(Image.open(io.BytesIO(record.image)))
            assert pixels.shape == (SIZE, SIZE, 4)
            colors.append(tuple(pixels[pixels[..., 3] == 255][0][:3].tolist()))
    assert max(map(max, colors)) <= 141 and len(set(colors)) > 0.9 * len(colors)
    assert re.fullmatch("#[0-9a-f]{6}", prepare.ink("lucide", "home", 0))


def test_shared_names_are_classes_and_a_view(fetches: list[str]) -> None:
    classes = read_classes("icons:names", 0)
    assert classes == {name: [name] for name in ["arrow down", "home", *sorted(f"tool {tool}" for tool in range(40))]}
    assert fetches == list(TRAINING), "what they are shared by"
    view = open_source(f"icons:hugeicons/names@{SIZE}", DataOptions())
    whole = open_source(f"icons:hugeicons@{SIZE}", DataOptions())
    by_name = [record for record in records(whole) if record.captions[0] in classes]
    assert [(r.key, r.image, r.class_name) for r in records(view)] == [(r.key, r.image, r.captions[0]) for r in by_name]
    labels = view.labels()
    assert labels is not None and labels.tolist() == [record.label for record in by_name]
    assert 0 < len(view) < len(whole) and view.fingerprint != whole.fingerprint
    known = read_set("data.evaluate.icons", view, DataOptions(), ALONE)
    assert len(known) == len(view) and set(known.class_names) <= set(classes)


def test_categories_are_classes(fetches: list[str]) -> None:
    assert read_classes(f"icons:ri@{SIZE}", 0) == {"Home / House": ["home and house"], "Tools": ["tools"]}
    assert {r.class_name for r in records(open_source(f"icons:carbon@{SIZE}", DataOptions()))} == {
        "Home / House",
        "Tools",
    }
    with pytest.raises(DataError, match=r"icons:ph has no classes; allowed: emoji:classes, icons:names, a file"):
        read_classes(f"icons:ph@{SIZE}", 0)


@pytest.mark.parametrize(
    "spec",
    ("icons:", "icons:feather", "icons:lucide/tags", "icons:lucide/", "icons:names/names", "icons:../x", "icons:a@b"),
)
def test_what_is_no_icon_set_is_refused_before_anything_is_fetched(fetches: list[str], spec: str) -> None:
    with pytest.raises(DataError, match=r"allowed: train, heldout, tabler, |no number of pixels"):
        open_source(spec, DataOptions())
    with pytest.raises(DataError, match=r"holds no pictures, but classes; give it as data\.classes"):
        open_source("icons:names", DataOptions())
    assert fetches == []


def test_arguments_out_of_range_are_refused(fetches: list[str]) -> None:
    with pytest.raises(SetupError, match="no icon set is named 'feather'; allowed: tabler, "):
        prepare_icons("feather")
    with pytest.raises(SetupError, match="from 8 to 1024 pixels"):
        prepare_icons("lucide", size=4)
    assert fetches == []


def test_two_thirds_of_the_sets_are_for_training() -> None:
    assert TRAINING == ("tabler", "ph", "mdi", "ri", "mingcute", "boxicons", "solar", "hugeicons")
    assert [name for name in ICON_SETS if icons.splits_of(name) == ("shift",)] == ["lucide", "iconoir", "bi", "carbon"]
