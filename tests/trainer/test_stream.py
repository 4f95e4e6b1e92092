"""Batches of shards that are read from their beginning, through the webdataset library."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.sources import png, prepare, tokenize

from train.data.loader import Batch, Reading
from train.data.record import DataError
from train.data.shards import write_shard
from train.data.stream import FAILURES_IN_A_ROW, Stream, shard_urls
from train.options import ConfigError, DataOptions
from train.world import World

SHARDS, EACH = 4, 25


def sample(number: int) -> tuple[str, dict[str, bytes]]:
    members = {"png": png((0, number, 7)), "txt": f"{number} in words".encode()}
    return f"r{number}", members | {"json": json.dumps({"captions": [f"{number} again"]}).encode()}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(SHARDS):
        write_shard(folder / f"{shard:05d}.tar", map(sample, range(shard * EACH, (shard + 1) * EACH)))
    return folder


def stream(urls: object, rank: int = 0, ranks: int = 1, seed: int = 0, **options: Any) -> Stream:
    given = DataOptions(**{"source": f"stream:{urls}", "epoch_samples": 100, **options})
    reading = Reading(prepare, tokenize, given.max_pixels)
    return Stream(24, seed, reading, given, World(rank, ranks, torch.device("cpu"), None))


def batches(made: Stream, first: int = 0, last: int = 8) -> list[Batch]:
    with closing(made.batches(first, last)) as these:
        return list(these)


def keys(made: list[Batch]) -> list[str]:
    return [key for batch in made for key in batch.keys]


@pytest.mark.parametrize("workers", (0, 2))
def test_batches_hold_pairs_of_all_shards(shards: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.data.loader.CHUNK", 9)
    made = batches(stream(shards / "{00000..00003}.tar", workers=workers), last=30)
    assert len(made) == 30
    words = set()
    for batch in made:
        assert batch.images.shape == (24, 3, 4, 4) and batch.tokens.shape == (24, 16) and batch.bad == {}
        assert batch.labels.tolist() == [-1] * 24 and batch.noise.tolist() == [0] * 24 and batch.views == ()
        for key, image, tokens in zip(batch.keys, batch.images, batch.tokens, strict=True):
            number, _, way = bytes(tokens.tolist()).rstrip(b"\0").decode().partition(" ")
            words.add(way)
            assert key == f"r{number}" and image[1].floor().unique().tolist() == [int(number)]
    assert words == {"in words", "again"}
    drawn = keys(made)
    assert len(set(drawn)) == SHARDS * EACH
    assert drawn[:24] != sorted(drawn[:24], key=lambda key: int(key[1:])), "shuffled"


def test_ranks_workers_seeds_and_resumed_runs_draw_their_own(shards: Path) -> None:
    urls = shards / "{00000..00003}.tar"
    first = keys(batches(stream(urls, ranks=2)))
    assert first == keys(batches(stream(urls, ranks=2)))
    others = [
        keys(batches(stream(urls, rank=1, ranks=2))),
        keys(batches(stream(urls, ranks=2, seed=1))),
        keys(batches(stream(urls, ranks=2), first=3, last=11)),
        keys(batches(stream(urls, ranks=2, workers=1, prefetch=2), first=4, last=12)),
    ]
    assert all(len(other) == len(first) == 12 * 8 and other != first for other in others)
    two = batches(stream(urls, workers=2), last=40)
    assert two[0].keys != two[1].keys


def test_it_says_that_it_has_no_positions(shards: Path, capfd: pytest.CaptureFixture[str]) -> None:
    batches(stream(shards / "{00000..00001}.tar"), last=1)
    said = "data.source is a stream of 2 shards in random order, without positions to return to: a run that is resumed "
    assert capfd.readouterr().err == f"{said}draws its shards anew\n"
    batches(stream(shards / "{00000..00001}.tar"), first=5, last=6)
    assert capfd.readouterr().err == f"{said}draws its shards anew, as from here, step 5\n"
    batches(stream(shards / "00000.tar", rank=1, ranks=2), last=1)
    assert capfd.readouterr().err == ""


@pytest.fixture
def server(shards: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=shards)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_shards_come_from_the_network_too(shards: Path, server: str) -> None:
    made = batches(stream(f"{server}/{{00000..00001}}.tar::file://{shards}/00002.tar", workers=1), last=20)
    assert {int(key[1:]) // EACH for key in keys(made)} == {0, 1, 2}


def test_broken_shards_and_samples_are_left_out_and_counted(shards: Path, tmp_path: Path) -> None:
    whole = (shards / "00000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "noise.tar").write_bytes(b"noise" * 1000)
    odd = {
        "no-text": {"png": png((0, 1, 7))},
        "no-picture": {"txt": b"words"},
        "gif": {"png": b"GIF89a", "txt": b"words"},
        "latin": {"png": png((0, 1, 7)), "txt": b"\xe9"},
        "empty": {"png": png((0, 1, 7)), "txt": b" \n"},
        "odd-json": {"png": png((0, 1, 7)), "json": b"[1]"},
        "pickle": {"png": png((0, 1, 7)), "pyd": b"cos\nsystem\n(S'false'\ntR."},
    }
    write_shard(tmp_path / "odd.tar", odd.items())
    made = batches(stream(f"{tmp_path}/{{cut,noise,odd}}.tar::{shards}/00001.tar"), last=20)
    reasons = {reason for batch in made for reason in batch.bad}
    assert reasons == {"broken_shard", "missing_member", "not_an_image", "broken_text", "empty_caption", "broken_json"}
    assert {int(key[1:]) // EACH for key in keys(made)} == {0, 1}


@pytest.mark.parametrize(
    ("what", "words"),
    (
        ("keys", r"\(missing_member \d+\)"),
        ("no keys", r"\(nothing_wanted_in_shard \d+\), last: .*0000\d.tar"),
        ("address", r"\(broken_shard \d+\), last: http://.*/\d.tar: "),
    ),
    ids=lambda one: one.split("\\")[0],
)
def test_where_nothing_can_be_read_it_ends(shards: Path, server: str, what: str, words: str) -> None:
    urls: object = shards / "{00000..00003}.tar"
    options: dict[str, Any] = {"workers": int(what == "keys")}
    if what == "address":
        urls = f"{server}/{{8..9}}.tar"
    else:
        options["image_key"] = "jpg"
    if what == "no keys":
        write_shard(shards / "00009.tar", [("r1", {"bin": b"1"})])
        urls = shards / "00009.tar"
    with pytest.raises(
        DataError, match=rf"nothing can be read of .*more than {FAILURES_IN_A_ROW} failures one after another {words}"
    ):
        batches(stream(urls, **options))


def test_what_it_does_not_read_is_refused_by_name(shards: Path) -> None:
    for url, words in (
        ("pipe:cat 00000.tar", "`pipe:` would run a command"),
        ("s3://bucket/00000.tar", "names 's3://bucket/00000.tar'; allowed: paths of tar files, file:"),
        ("-", "names '-'"),
        ("", "names ''"),
        (f"{shards}/00000.tar::pipe:x", "would run"),
    ):
        with pytest.raises(ConfigError, match=words):
            shard_urls(f"stream:{url}")
    with pytest.raises(DataError, match=r"there is no file .*gone.tar; allowed: paths"):
        shard_urls(f"stream:{shards}/gone.tar")
    one = shards / "00000.tar"
    with pytest.raises(ConfigError, match=r"has no length: give data.epoch_samples"):
        stream(one, epoch_samples=None)
    for option, value in (("weights", (1.0,)), ("noise", {"swap": 0.1}), ("distinct", "label")):
        with pytest.raises(ConfigError, match=rf"data.{option}.*`?stream:"):
            stream(one, **{option: value})


def test_addresses_need_curl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"read by curl, which is not on the PATH"):
        shard_urls("stream:https://example.org/0.tar")


def test_nothing_in_the_environment_makes_a_command_of_an_address(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's own opener would: it rewrites addresses."""
    monkeypatch.setenv("GOPEN_REWRITE", f"{shards}=pipe:touch {tmp_path}/ran;")
    batches(stream(shards / "00000.tar"), last=1)
    assert not (tmp_path / "ran").exists()
