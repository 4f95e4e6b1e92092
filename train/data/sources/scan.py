"""Where the members of tar shards lie, found by their headers alone. Many shards are scanned by several processes, each
of which runs this file: it needs the standard library only, starts in no time, and ends when its parent does.

The headers are read by tarfile rather than by the webdataset library, whose URL opener runs `pipe:` commands and whose
reader takes compressed archives and reads a member of any size whole. The files are those that the library reads.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import struct
import subprocess
import sys
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import BinaryIO, NamedTuple, cast

BLOCK = 512  # bytes; in a tar every member starts at a multiple of it, after a header of one block
MAX_MEMBER_BYTES = 32 << 20
MAX_HEADER_BYTES = 1 << 20  # of the long headers that a name or a comment may have, which tarfile reads whole
# shard, image (block, bytes), text (blocks from the image, bytes), JSON (likewise), class (blocks from the image);
# 0 blocks: there is none.
ENTRY = struct.Struct("<IIIiIiIi")
MAX_BLOCK = 2**32 - 1


class ScanError(Exception):
    """A shard could not be read at all."""


class Suffixes(NamedTuple):
    """Of pictures and of texts, the preferred one first."""

    images: tuple[str, ...]
    texts: tuple[str, ...]


class Scan(NamedTuple):
    """The records of a shard.

    entries   one ENTRY after another, whose shard is 0
    left_out  what is no record, counted by reason
    """

    entries: bytes
    left_out: dict[str, int]


def scan(shard: str, suffixes: Suffixes) -> Scan:
    """The records of a plain tar file, in order. Raises OSError where it cannot be read.

    Members that follow one another with one name up to the first dot are a record, as WebDataset has it; a suffix that
    comes twice begins another one. A shard that breaks off, or has no end mark, keeps the records before the last.
    """
    entries, left_out, keys = bytearray(), Counter[str](), set[str]()

    def end_record() -> None:
        entry = _entry(key, members, suffixes, keys)
        if isinstance(entry, str):
            left_out[entry] += 1
        else:
            entries.extend(entry)

    key, members = "", dict[str, tuple[int, int]]()
    wanted = {*suffixes.images, *suffixes.texts, "json", "cls"}
    try:
        with open(shard, "rb") as file:
            for name, suffix, block, size in _members(file, left_out):
                if suffix not in wanted:
                    continue
                if members and (name != key or suffix in members):
                    end_record()
                    members = {}
                key = name
                members[suffix] = block, size
        if members:
            end_record()
    except (tarfile.TarError, ValueError, OverflowError, RecursionError):
        # Besides its own errors tarfile lets through those of absurd offsets and of headers chained without end.
        left_out["truncated_tar"] += 1
    return Scan(bytes(entries), dict(left_out))


def _entry(key: str, members: dict[str, tuple[int, int]], suffixes: Suffixes, keys: set[str]) -> bytes | str:
    """An ENTRY, or why the members are no record."""
    image, text = (next((members[s] for s in wanted if s in members), None) for wanted in suffixes)
    table, label = members.get("json"), members.get("cls")
    if image is None or (text is None and table is None):
        return "missing_member"
    if key in keys:
        return "duplicate_key"
    keys.add(key)
    if any(size > MAX_MEMBER_BYTES for member in (image, text, table, label) if member for size in member[1:]):
        return "member_too_large"
    text_at, table_at, label_at = (member[0] - image[0] if member else 0 for member in (text, table, label))
    text_size, table_size = (member[1] if member else 0 for member in (text, table))
    return ENTRY.pack(0, image[0], image[1], text_at, text_size, table_at, table_size, label_at)


def _members(file: BinaryIO, left_out: Counter[str]) -> Iterator[tuple[str, str, int, int]]:
    """Key, suffix, first block and size of each plain file. Raises where the archive breaks off or is malformed."""
    length = os.fstat(file.fileno()).st_size
    # "r:" takes plain tar only: a compressed archive could expand without bound.
    bounded = cast("BinaryIO", _BoundedFile(file))
    with tarfile.open(fileobj=bounded, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        while (info := tar.next()) is not None:
            if info.size < 0 or tar.offset <= info.offset:
                # Older tarfile modules step backwards here and never end.
                raise tarfile.ReadError(f"a member of {info.size} bytes")
            tar.members = []  # type: ignore[attr-defined]  # or the list of headers grows with the archive
            if not _is_safe(info.name):
                left_out["unsafe_member"] += 1
                continue
            # Sparse members count as regular to tarfile but may claim any size.
            if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.issparse():
                continue
            if info.offset_data + info.size > length or info.offset_data > MAX_BLOCK * BLOCK:
                raise tarfile.ReadError("a member beyond the end")
            folder, slash, base = info.name.rpartition("/")
            stem, _, suffix = base.partition(".")
            if stem:  # a hidden file has none
                yield folder + slash + stem, suffix.lower(), info.offset_data // BLOCK, info.size
        file.seek(tar.offset)
        if file.read(BLOCK) != bytes(BLOCK):  # tarfile ends at what is no header, whatever it is
            raise tarfile.ReadError("no end mark")


def _is_safe(name: str) -> bool:
    """Not where a path could leave the archive, or no log could hold it."""
    if name.startswith("/") or "\\" in name or ".." in name.split("/"):
        return False
    return not any(unicodedata.category(char) in ("Cc", "Cs") for char in name)


class _BoundedFile:
    """A file that refuses to read much at once: tarfile reads the long headers of an archive whole."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.tell, self.seek = file.tell, file.seek

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


def scan_all(shards: Sequence[str], suffixes: Suffixes, processes: int) -> Iterator[Scan]:
    """That of each shard, in their order. Raises OSError or ScanError where one cannot be read."""
    if processes <= 1:
        yield from (scan(shard, suffixes) for shard in shards)
        return
    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(processes))
        idle = queue.SimpleQueue[_Child]()
        for _ in range(processes):
            idle.put(stack.enter_context(_Child()))

        def ask(shard: str) -> Scan:
            child = idle.get()
            try:
                return child.scan(shard, suffixes)
            finally:
                idle.put(child)

        yield from threads.map(ask, shards)


class _Child:
    """A process that scans one shard after another."""

    def __init__(self) -> None:
        command = [sys.executable, "-IS", __file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def scan(self, shard: str, suffixes: Suffixes) -> Scan:
        request, reply = cast("BinaryIO", self._process.stdin), cast("BinaryIO", self._process.stdout)
        try:
            request.write(json.dumps([shard, *suffixes]).encode() + b"\n")
            request.flush()
            size, left_out, error = json.loads(reply.readline())
            entries = reply.read(size)
        except (OSError, ValueError):
            size, entries, error = 1, b"", f"the process that scanned it ended ({self._process.poll()})"
        if error is not None or len(entries) < size:
            raise ScanError(f"{shard}: {error}")
        return Scan(entries, left_out)


def _serve() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for the parent, with which this process ends
    out = sys.stdout.buffer
    try:
        for line in sys.stdin.buffer:
            shard, images, texts = json.loads(line)
            try:
                found, error = scan(shard, Suffixes(tuple(images), tuple(texts))), None
            except OSError as problem:
                found, error = Scan(b"", {}), problem.strerror or str(problem)
            out.write(json.dumps([len(found.entries), found.left_out, error]).encode() + b"\n" + found.entries)
            out.flush()
    except BrokenPipeError:
        os._exit(1)  # without a word: the parent is gone


if __name__ == "__main__":
    _serve()
