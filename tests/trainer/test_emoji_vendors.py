"""More vendors of emoji: joined by name, only what is seen in training, and nothing that training gives away."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT
from helpers.drawn import fake_packages, fake_vendor
from PIL import Image, ImageDraw

from train.data import DataError, emoji
from train.data.__main__ import main
from train.data.drawn import SetupError
from train.data.drawn.manifest import read_manifest
from train.data.drawn.near import grey, near
from train.data.emoji import prepare, prepare_vendor, sources, vendors
from train.data.emoji.concepts import read_concepts
from train.data.emoji.splits import UNSEEN_CONCEPT_SHARE, unseen_concepts
from train.data.icons import ICON_SETS
from train.data.sources import open_source
from train.options import DataOptions

SIZE = 16
VENDOR = "fxemoji"


@pytest.fixture
def fetches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is fetched, in order."""
    packages = fake_vendor(fake_packages(tmp_path / "made-up"), VENDOR)
    asked: list[str] = []

    def fetch(root: Path, _: Any, what: str) -> Path:
        asked.append(what)
        return packages

    monkeypatch.setattr(prepare, "fetch", fetch)
    monkeypatch.setattr(vendors, "fetch", fetch)
    monkeypatch.setenv("SOFTCLIP_DATA", str(tmp_path / "cache"))
    return asked


def read(folder: Path, split: str) -> dict[str, dict[str, Any]]:
    """The JSON of a split's samples, by key."""
    found = {}
    for shard in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                file = tar.extractfile(info)
                if file is not None and info.name.endswith(".json"):
                    found[info.name.removesuffix(".json")] = json.loads(file.read())
    return found


def hold_out(monkeypatch: pytest.MonkeyPatch, unseen: set[int]) -> None:
    monkeypatch.setattr(vendors, "unseen_concepts", lambda *_: unseen)


def test_a_vendor_is_joined_by_every_kind_of_name_and_by_no_guess(
    fetches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hold_out(monkeypatch, set())
    samples = read(prepare_vendor(VENDOR, size=SIZE), VENDOR)
    folder = prepare.prepare_emoji(size=SIZE)
    known = read(folder, "train") | read(folder, "concepts")
    # "fruit3", "fruit-4-1", and Unicode's name of fruit 5; "fruit-6" equals "fruit3", and the heart noto's.
    assert {table["captions"][0] for table in samples.values()} == {"fruit 3", "fruit 4", "fruit 5"}
    for key, table in samples.items():
        assert key == f"{table['hexcode']}_{VENDOR}" and table["vendor"] == VENDOR
        twin = next(other for other in known.values() if other["hexcode"] == table["hexcode"])
        assert {**twin, "vendor": VENDOR} == table, "captions, label and class are those of the emoji set"


def test_what_is_dropped_is_counted_by_reason(fetches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    hold_out(monkeypatch, {4})
    made = read_manifest(prepare_vendor(VENDOR, size=SIZE))
    assert made is not None and made.counts == {VENDOR: {VENDOR: 2}}
    assert made.dropped == {
        "blank or unreadable drawing": 0,
        "nearly equal to a training picture of its concept": 1,
        "same pixels as another of the set": 1,
        "unseen concept": 1,
    }


def test_a_vendors_concepts_are_those_that_the_seed_trains_on(fetches: list[str]) -> None:
    concepts, _ = read_concepts(vendors.fetch(Path(), None, ""), 0)
    asked = set()
    for seed in range(6):
        unseen = unseen_concepts(concepts, seed, UNSEEN_CONCEPT_SHARE)
        drawn = {table["label"] for table in read(prepare_vendor(VENDOR, size=SIZE, seed=seed), VENDOR).values()}
        assert not drawn & unseen
        asked |= {3, 4, 5} - drawn
    assert asked, "in some seed one of the drawn concepts is held out"


def test_a_vendor_is_fetched_and_drawn_when_a_source_names_it(fetches: list[str], tmp_path: Path) -> None:
    def opened(spec: str) -> Any:
        return open_source(spec, DataOptions(index=str(tmp_path / "index")))

    opened(f"emoji:train@{SIZE}")
    assert fetches == ["the emoji set"], "the default run fetches no more than it did"
    source = opened(f"emoji:{VENDOR}@{SIZE}")
    assert fetches[1:] == ["the emoji set", f"the emoji of {VENDOR}"]
    fetches.clear()
    assert opened(f"emoji:{VENDOR}@{SIZE}").fingerprint == source.fingerprint and fetches == []
    assert {source.read(number).captions[0] for number in range(len(source))} <= {f"fruit {n}" for n in range(42)}
    for spec in ("emoji:noto", "emoji:fluent", "emoji:fxemoji/names", "emoji:classes"):
        with pytest.raises(DataError, match=r"allowed: train|holds no pictures"):
            opened(spec)
    with pytest.raises(SetupError, match="no vendor of emoji is named 'noto'; allowed: fluent-emoji, "):
        prepare_vendor("noto")
    assert fetches == []


def test_near_is_the_same_shape_whatever_its_size_and_color(tmp_path: Path) -> None:
    def drawn(box: tuple[int, int, int, int], color: str, shape: str = "ellipse") -> np.ndarray:
        image = Image.new("RGBA", (96, 96))
        getattr(ImageDraw.Draw(image), shape)(box, fill=color)
        data = io.BytesIO()
        image.save(data, "PNG")
        return grey(data.getvalue())

    ball = drawn((9, 9, 72, 72), "#c03030")
    assert near(ball, drawn((0, 0, 95, 95), "#c03030")), "larger"
    assert near(ball, drawn((9, 9, 72, 72), "#b83838")), "another red"
    assert not near(ball, drawn((9, 9, 72, 72), "#ffd0d0")), "much lighter"
    assert not near(ball, drawn((9, 9, 72, 72), "#c03030", "rectangle")), "another shape"


def test_the_command_line_prepares_what_is_named_and_lists_what_there_is(
    fetches: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"emoji:{VENDOR}@{SIZE}", "--seed", "1"]) == 0
    shown = capsys.readouterr().out
    assert f"{VENDOR}-size{SIZE}-seed1" in shown and "Apache-2.0    Mozilla" in shown
    assert main(["--list"]) == 0
    shown = capsys.readouterr().out
    rows = {line.split()[0]: line for line in shown.splitlines() if line.startswith(" ")}
    assert rows.keys() == {*sources.VENDOR_PACKAGES, *sources.SHIFT_VENDORS, *ICON_SETS}
    assert rows["noto-v1"].endswith("test, related to noto") and rows["fxemoji"].endswith(" test")
    assert rows["lucide"].endswith("test, related to hugeicons") and rows["bi"].endswith(" test")
    assert rows["noto"].endswith("train, heldout, concepts") and rows["fluent-emoji-flat"].endswith(" vendor")
    assert main(["icons:nothing"]) == 1
    assert "allowed: train, heldout, tabler, " in capsys.readouterr().err
    assert main(["pictures"]) == 1
    assert "'pictures' is not drawn on demand" in capsys.readouterr().err


def test_notice_names_every_package() -> None:
    rows = [line.split() for line in (ROOT / "NOTICE").read_text(encoding="utf-8").splitlines()]
    of_icons = [package for icons in ICON_SETS.values() for package in icons.packages]
    packages = [*sources.PACKAGES, *sources.SHIFT_VENDORS.values(), *of_icons]
    assert len(packages) == len({package.name for package in packages}) == 28
    for package in packages:
        row = next(row for row in rows if row[:1] == [package.name])
        assert row == [package.name, package.version, package.licence, *package.author.split()]


def test_what_is_related_is_known_on_both_sides() -> None:
    assert sources.RELATED.keys() <= emoji.SHIFT_VENDORS.keys()
    assert set(sources.RELATED.values()) <= sources.VENDOR_PACKAGES.keys()
    related = {icons.related for icons in ICON_SETS.values() if not icons.trained} - {None}
    assert related and all(ICON_SETS[str(name)].trained for name in related)
