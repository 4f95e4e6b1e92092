"""Shards as the trainer reads them: what is corrupt is skipped and counted, what is hostile does no harm."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import re
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT
from helpers.saved_runs import Payload
from PIL import Image, ImageFile
from tokenizers import Tokenizer
from train.data.manifest import Manifest, Shard, read_manifest, write_manifest
from train.tokenizer import END, PAD, PAD_ID, START, encode, train_tokenizer

from train.data import DataError, load_pairs
from train.files import sha256_of

SIZE = 16


def picture(mode: str = "RGBA", size: int = SIZE, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (size, size), 200).save(buffer, form)
    return buffer.getvalue()


def sample(key: str, **changes: bytes) -> list[tuple[str, bytes]]:
    record = {"captions": [key, f"a drawing of {key}"], "concept": 7, "group": "food", "vendor": "noto"}
    members = {"png": picture(), "txt": key.encode(), "json": json.dumps(record).encode()} | changes
    return [(f"{key}.{suffix}", payload) for suffix, payload in members.items()]


GOOD = [member for i in range(4) for member in sample(f"good{i}")]


def tar_of(members: Sequence[tuple[str | tarfile.TarInfo, bytes]], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for name, payload in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return buffer.getvalue()


def folder_with(folder: Path, shard: bytes, samples: int = 5, name: str = "train-000000.tar") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "train-000000.tar").write_bytes(shard)
    write_manifest(folder, Manifest(SIZE, 0, {}, ("food",), {"train": (Shard(name, samples, ""),)}, {}, {}, "none"))
    return folder


def png_bomb(width: int) -> bytes:
    """A picture that claims to be `width` × `width`."""
    return picture()[:16] + width.to_bytes(4, "big") * 2 + picture()[24:]


def jpeg_bomb(width: int) -> bytes:
    data = picture("RGB", form="JPEG")
    sides = data.index(b"\xff\xc0") + 5  # in the frame header, after its length and the bits of a sample
    return data[:sides] + width.to_bytes(2, "big") * 2 + data[sides + 4 :]


def truncated() -> bytes:
    whole = tar_of(GOOD + sample("cut"))
    return whole[: whole.index(b"cut.png") + 600]


def negative_size() -> bytes:
    """A member that claims -1024 bytes, on which older tarfile modules run in circles."""
    shard = bytearray(tar_of([*GOOD, ("x.bin", b"")]))
    start = shard.index(b"x.bin")
    shard[start + 124 : start + 136] = b"\xff" * 10 + b"\xfc\x00"
    block = shard[start : start + 512]
    shard[start + 148 : start + 156] = b"%06o\0 " % (256 + sum(block[:148]) + sum(block[156:]))
    return bytes(shard)


RECORD = b'{"captions": %s, "concept": %s, "group": "%s", "vendor": "noto"}'
HOSTILE = {
    "text named png": (tar_of(GOOD + sample("x", png=b"not a picture")), "not_an_image"),
    "gif named png": (tar_of(GOOD + sample("x", png=picture("L", form="GIF"))), "not_an_image"),
    "pickle named png": (tar_of(GOOD + sample("x", png=pickle.dumps({}))), "not_an_image"),
    "cut png": (tar_of(GOOD + sample("x", png=picture()[:60])), "broken_image"),
    "png bomb": (tar_of(GOOD + sample("x", png=png_bomb(60000))), "image_too_large"),
    "jpeg bomb": (tar_of(GOOD + sample("x", png=jpeg_bomb(60000))), "image_too_large"),
    "jpeg that pillow takes for no bomb": (tar_of(GOOD + sample("x", png=jpeg_bomb(2000))), "image_too_large"),
    "cut jpeg": (tar_of(GOOD + sample("x", png=picture("RGB", form="JPEG")[:400])), "broken_image"),
    "other size": (tar_of(GOOD + sample("x", png=picture(size=SIZE + 1))), "wrong_image_size"),
    "empty caption": (tar_of(GOOD + sample("x", txt=b" \n")), "empty_caption"),
    "empty caption in json": (tar_of(GOOD + sample("x", json=RECORD % (b'["a", ""]', b"1", b"food"))), "empty_caption"),
    "long caption": (tar_of(GOOD + sample("x", txt=b"a" * 5000)), "caption_too_long"),
    "broken text": (tar_of(GOOD + sample("x", txt=b"\xff\xfe")), "broken_text"),
    "megabyte of caption": (tar_of(GOOD + sample("x", txt=b"a" * 2**20)), "caption_too_long"),
    "nothing but control characters": (tar_of(GOOD + sample("x", txt=b"\0\x1b\x07\xef\xbb\xbf")), "empty_caption"),
    "surrogate": (tar_of(GOOD + sample("x", json=RECORD % (rb'["a\ud800"]', b"1", b"food"))), "broken_text"),
    "surrogate as vendor": (
        tar_of(GOOD + sample("x", json=rb'{"captions": ["a"], "concept": 1, "group": "food", "vendor": "\udfff"}')),
        "broken_json",
    ),
    "broken json": (tar_of(GOOD + sample("x", json=b"{")), "broken_json"),
    "deep json": (tar_of(GOOD + sample("x", json=b"[" * 100000)), "broken_json"),
    "huge concept": (tar_of(GOOD + sample("x", json=RECORD % (b'["a"]', b"9" * 30, b"food"))), "broken_json"),
    "unknown group": (tar_of(GOOD + sample("x", json=RECORD % (b'["a"]', b"1", b"cars"))), "unknown_group"),
    "no picture": (tar_of(GOOD + sample("x")[1:]), "missing_member"),
    "large member": (tar_of(GOOD + sample("x", txt=b"a" * (5 << 20))), "member_too_large"),
    "duplicate key": (tar_of(GOOD + sample("good1")), "duplicate_key"),
    "duplicate key in a row": (tar_of(GOOD + sample("good3")), "duplicate_key"),
    "truncated": (truncated(), "truncated_tar"),
    "negative size": (negative_size(), "truncated_tar"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_corrupt_sample_is_skipped_counted_and_capped(tmp_path: Path, case: str) -> None:
    shard, reason = HOSTILE[case]
    folder = folder_with(tmp_path, shard)
    pairs = load_pairs(folder, "train", max_bad_fraction=0.2)
    assert pairs.keys == ("good0", "good1", "good2", "good3")
    assert pairs.bad == {reason: 1}
    assert pairs.captions[0] == ("good0", "a drawing of good0")
    with pytest.raises(DataError, match=f"{reason}.*raise max_bad_fraction"):
        load_pairs(folder, "train", max_bad_fraction=0.19)


def test_captions_are_cleaned_by_rule(tmp_path: Path) -> None:
    """Text of the world, from the shard to the tokens."""
    dirty = "\ufeffa\0 \u202ered\u202c\tcat \u200d [PAD] [END]\r\n"
    record = {"captions": [dirty], "concept": 1, "group": "food", "vendor": "noto"}
    shard = tar_of(sample("x", txt=dirty.encode(), json=json.dumps(record).encode()))
    pairs = load_pairs(folder_with(tmp_path, shard, 1), "train")
    assert pairs.captions == [("a red cat \u200d [PAD] [END]",)]
    assert not pairs.bad
    tokenizer = Tokenizer.from_str(
        train_tokenizer(["a red cat", "pad end"], 300).to_str()
    )  # as ranks and resumed runs do
    special = {tokenizer.token_to_id(token) for token in (PAD, START, END)}
    tokens = encode(tokenizer, pairs.captions[0], 40)[0].tolist()
    length = tokens.index(PAD_ID)
    assert length > 20
    assert tokens[0] == tokenizer.token_to_id(START) and tokens[length - 1] == tokenizer.token_to_id(END)
    assert not special & set(tokens[1 : length - 1]), "the text of a special token is text"
    assert tokens[length:] == [PAD_ID] * (40 - length)


def test_a_name_that_no_log_can_hold_is_unsafe(tmp_path: Path) -> None:
    pairs = load_pairs(folder_with(tmp_path, tar_of(GOOD + sample("bad\nname"))), "train", max_bad_fraction=0.8)
    assert pairs.bad == {"unsafe_member": 3, "truncated_tar": 1}


def test_a_shard_is_what_its_manifest_describes(tmp_path: Path) -> None:
    """Of any folder, a user's own too."""
    folder = folder_with(tmp_path, tar_of(GOOD), 4)
    shard = next(folder.glob("*.tar"))
    manifest = read_manifest(folder)
    described = Shard(shard.name, 4, sha256_of(shard))
    write_manifest(folder, replace(manifest, shards={"train": (described,)}))
    assert len(load_pairs(folder, "train")) == 4
    whole = shard.read_bytes()
    shard.write_bytes(whole + b"\0" * 512)
    with pytest.raises(
        DataError, match=rf"the shard .*{shard.name} is not .* \(SHA-256 \w+, there {described.sha256}\)"
    ):
        load_pairs(folder, "train")
    shard.unlink()
    with pytest.raises(DataError, match="lacks the shard"):
        load_pairs(folder, "train")
    os.mkfifo(shard)  # reading it would wait forever
    with pytest.raises(DataError, match=r"is no file; allowed: a plain tar file"):
        load_pairs(folder, "train")


def test_what_is_no_folder_of_data_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "odd" / "manifest.json").mkdir(parents=True)
    for folder in (file, tmp_path / "odd"):
        with pytest.raises(DataError, match=r"manifest\.json cannot be read \(.*give a folder that"):
            load_pairs(folder, "train")
    with pytest.raises(DataError, match=r"holds no manifest\.json"):
        load_pairs(tmp_path / "none", "train")


def test_no_message_advises_to_delete_data() -> None:
    """Of all that the trainer says: its strings, docstrings aside."""
    advice = re.compile(r"\b(delete|rm -r|wipe|erase)\b|remove the (data|folder|shard|cache)", re.IGNORECASE)
    found = []
    for path in sorted((ROOT / "train").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        spoken = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in spoken:
                found += [f"{path.name}: {node.value}"] if advice.search(node.value) else []
    assert not found


@pytest.mark.parametrize("data", (png_bomb(60000), jpeg_bomb(60000), jpeg_bomb(2000)), ids=("png", "jpeg", "2000"))
def test_bomb_is_refused_before_any_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    folder = folder_with(tmp_path, tar_of(sample("x", png=data)), 1)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("a decoder saw the bomb"))
    if data == png_bomb(60000):  # judged by its header before Pillow sees it
        monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("Pillow saw the bomb"))
    with pytest.raises(DataError, match="image_too_large"):
        load_pairs(folder, "train")


def test_a_jpeg_is_read_where_a_png_is_expected(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, tar_of(sample("x", png=picture("RGB", form="JPEG"))), 1)
    assert load_pairs(folder, "train").images.shape == (1, 4, SIZE, SIZE)


@pytest.mark.parametrize(
    ("mode", "form"),
    (("1", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("RGB", "PNG"), ("I;16", "PNG"), ("CMYK", "JPEG")),
)
def test_pictures_of_any_mode_become_rgba(tmp_path: Path, mode: str, form: str) -> None:
    pairs = load_pairs(folder_with(tmp_path, tar_of(sample("x", png=picture(mode, form=form))), 1), "train")
    assert pairs.images.shape == (1, 4, SIZE, SIZE)


def test_compressed_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="truncated_tar': 5"):
        load_pairs(folder_with(tmp_path, tar_of(GOOD, "w:gz")), "train")


def test_foreign_members_are_ignored_and_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = pickle.dumps(Payload(tmp_path / "unpickled"))
    link, hard = tarfile.TarInfo("link.png"), tarfile.TarInfo("hard.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard.type, hard.linkname = tarfile.LNKTYPE, "good0.txt"
    foreign = [(f"good0.{suffix}", evil) for suffix in ("pyd", "pkl", "pickle", "npy", "pth", "tar")]
    shard = tar_of([*GOOD[:3], *foreign, (link, b""), (hard, b""), *GOOD[3:], ("../escaped.png", picture())])
    folder = folder_with(tmp_path / "data", shard, 4)
    before = sorted(tmp_path.rglob("*"))
    for name in ("extract", "extractall", "_extract_one"):
        monkeypatch.setattr(tarfile.TarFile, name, lambda *_, **__: pytest.fail("extracted to disk"), raising=False)
    pairs = load_pairs(folder, "train", max_bad_fraction=0.25)
    assert len(pairs) == 4
    assert pairs.bad == {"unsafe_member": 1}
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ("pipe:touch owned.tar", "../train.tar", "/train.tar", "a/b.tar", "http://h/a.tar", 3))
def test_shard_names_are_plain_files(tmp_path: Path, name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = folder_with(tmp_path / "data", tar_of(GOOD), 4, name)
    with pytest.raises(DataError, match="only plain"):
        load_pairs(folder, "train")
    assert not list(tmp_path.glob("owned*"))


@pytest.mark.parametrize("text", ("[]", "{", "[" * 99999, '{"format": 1, "shards": []}', '{"format": 99}'))
def test_a_broken_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (folder_with(tmp_path, tar_of(GOOD), 4) / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"python -m train\.data"):
        load_pairs(tmp_path, "train")
