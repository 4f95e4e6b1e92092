"""WebDataset shards: plain tar files with a `png`, a `txt` and a `json` member for each sample.

Reading uses tarfile rather than the webdataset library. The library's URL opener runs `pipe:` commands, its tar
reader takes compressed archives and reads a member of any size whole, and it unpickles members by their suffix; each
can be switched off, but only piece by piece, and a reader that has none of it is shorter than the switches. The files
stay readable by the library.
"""

from __future__ import annotations

import io
import json
import struct
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from PIL import Image

from ..files import sha256_of
from .captions import BadCaptionError, clean, is_writable
from .manifest import DataError, Shard

SUFFIXES = ("png", "txt", "json")
MAX_MEMBER_BYTES = 4 << 20
MAX_PIXELS = 1 << 20
MAX_CAPTIONS = 256
MAX_CONCEPT = 2**62
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"


@dataclass(frozen=True)
class Sample:
    """One decoded sample; `image` is (H, W, 4) uint8 RGBA, not premultiplied."""

    key: str
    image: np.ndarray
    captions: tuple[str, ...]
    concept: int
    group: str
    vendor: str


class BadSampleError(Exception):
    """A sample that must be skipped; `args[0]` is the reason it is counted under."""


class BadCount:
    """Counts skipped samples by reason and stops the load once they exceed their share of the expected samples."""

    def __init__(self, expected: int, max_fraction: float, where: str) -> None:
        self.reasons: Counter[str] = Counter()
        self._limit = max_fraction * expected
        self._message = f"of {expected} samples in {where}, at most the fraction {max_fraction} may be bad"

    def add(self, reason: str, count: int = 1) -> None:
        """Count `count` more bad samples. Raises DataError where that makes more than are allowed."""
        self.reasons[reason] += count
        total = self.reasons.total()
        if total > self._limit:
            raise DataError(
                f"{self._message}, and {total} are already: {dict(self.reasons)}; repair or leave out these samples, "
                "or raise max_bad_fraction"
            )


def write_shard(path: Path, samples: Iterable[tuple[str, bytes, dict[str, Any]]]) -> Shard:
    """Write (key, PNG bytes, JSON record) samples to a tar; `record["captions"][0]` becomes the txt member.

    It is written under another name, then renamed. The bytes depend on nothing but the samples (no times, no owners).
    """
    count = 0
    scratch = path.with_name(path.name + ".tmp")
    with tarfile.open(scratch, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, png, record in samples:
            text = record["captions"][0].encode()
            payloads = (png, text, json.dumps(record, sort_keys=True, ensure_ascii=False).encode())
            for suffix, payload in zip(SUFFIXES, payloads, strict=True):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
            count += 1
    scratch.replace(path)
    return Shard(path.name, count, sha256_of(path))


def decode_image(data: bytes, size: int) -> np.ndarray:
    """Decode PNG or JPEG bytes to (size, size, 4) uint8 RGBA; the header is judged before any pixel is decoded. Raises
    BadSampleError for another format, too many pixels, another size, or broken data."""
    if data.startswith(_PNG) and len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])
        if width * height > MAX_PIXELS:
            raise BadSampleError("image_too_large")
    elif not data.startswith(_JPEG):
        raise BadSampleError("not_an_image")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadSampleError("image_too_large")
            if image.size != (size, size):
                raise BadSampleError("wrong_image_size")
            return np.asarray(image if image.mode == "RGBA" else image.convert("RGBA"))
    except Image.DecompressionBombError as error:
        raise BadSampleError("image_too_large") from error
    except BadSampleError:
        raise
    except Exception as error:
        # Pillow's decoders raise SyntaxError, OSError, ValueError, struct.error and more on broken bytes.
        raise BadSampleError("broken_image") from error


def decode_sample(key: str, members: dict[str, bytes | None], size: int) -> Sample:
    """Decode the three members of a sample; None stands for a member that was too large to read. Raises BadSampleError
    where a member is missing, malformed, empty or too large."""
    if any(suffix not in members for suffix in SUFFIXES):
        raise BadSampleError("missing_member")
    png, text, table = (members[suffix] for suffix in SUFFIXES)
    if png is None or text is None or table is None:
        raise BadSampleError("member_too_large")
    try:
        canonical = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSampleError("broken_text") from error
    try:
        record = json.loads(table)
        captions, concept = record["captions"], record["concept"]
        group, vendor = record["group"], record["vendor"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise BadSampleError("broken_json") from error
    shaped = (
        isinstance(captions, list)
        and 0 < len(captions) <= MAX_CAPTIONS
        and all(isinstance(item, str) for item in (*captions, group, vendor))
        and is_writable(vendor)
        and type(concept) is int
        and 0 <= concept < MAX_CONCEPT
    )
    if not shaped:
        raise BadSampleError("broken_json")
    try:
        # dict.fromkeys puts the canonical caption first and keeps one of each.
        every = tuple(dict.fromkeys(map(clean, (canonical, *captions))))
    except BadCaptionError as error:
        raise BadSampleError(*error.args) from error
    return Sample(key, decode_image(png, size), every, concept, group, vendor)


def _safe_key(name: str) -> tuple[str, str] | None:
    """(key, suffix) of a member name, or None where a path could leave the archive or no log could hold it."""
    if name.startswith("/") or "\\" in name or ".." in name.split("/"):
        return None
    if not is_writable(name) or any(ord(char) < 32 for char in name):
        return None
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), suffix


class _BoundedFile:
    """A file that refuses reads beyond MAX_MEMBER_BYTES: tarfile reads the long headers of an archive whole."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.tell, self.seek = file.tell, file.seek

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_MEMBER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


def _headers(file: BinaryIO) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Each member's header with the archive to read it from. Raises where the archive breaks off or is malformed."""
    # "r:" takes plain tar only: a compressed archive could expand without bound.
    with tarfile.open(fileobj=cast("BinaryIO", _BoundedFile(file)), mode="r:") as tar:
        while True:
            info = tar.next()
            if info is None:
                return
            if info.size < 0 or tar.offset <= info.offset:
                # Older tarfile modules step backwards here and never end.
                raise tarfile.ReadError(f"a member of {info.size} bytes")
            tar.members = []  # type: ignore[attr-defined]  # or the list of headers grows with the archive
            yield info, tar


def _read_groups(file: BinaryIO, bad: BadCount) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """Consecutive members of one key, as WebDataset groups them; a suffix that comes twice starts a new group.

    Only regular png, txt and json members are read: into memory, up to MAX_MEMBER_BYTES, never to disk. A member
    too large is given as None. Raises where the archive breaks off or is malformed.
    """
    key, members = "", dict[str, bytes | None]()
    for info, tar in _headers(file):
        name = _safe_key(info.name)
        if name is None:
            bad.add("unsafe_member")
            continue
        # Sparse members count as regular to tarfile but may claim any size, so only the two plain types pass.
        if name[1] not in SUFFIXES or info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            continue
        if name[0] != key or name[1] in members:
            if members:
                yield key, members
            key, members = name[0], {}
        source = tar.extractfile(info) if info.size <= MAX_MEMBER_BYTES else None
        members[name[1]] = source.read() if source is not None else None
        if len(members) == len(SUFFIXES):
            yield key, members  # at once, since the archive may break off before the next member
            members = {}
    if members:
        yield key, members


def _check_file(path: Path, shard: Shard) -> None:
    """A shard is read wholly once before its samples are: what changed since its manifest was written is found then,
    and not as some samples that are odd. A manifest that gives no sum (an empty one) asks for no check."""
    if not path.exists():
        raise DataError(
            f"{path.parent} lacks the shard {shard.name!r} of its manifest; bring it back, or leave it out there"
        )
    if not path.is_file():  # opening a pipe would wait forever
        raise DataError(f"the shard {path} is no file; allowed: a plain tar file")
    found = sha256_of(path) if shard.sha256 else ""
    if found != shard.sha256:
        raise DataError(
            f"the shard {path} is not what its manifest describes (SHA-256 {found}, there {shard.sha256}): it was "
            "changed or damaged since; bring the old one back, or, if the change was meant, write the new sum there"
        )


def read_shard(folder: Path, shard: Shard, size: int, seen: set[str], bad: BadCount) -> Iterator[Sample]:
    """Stream the good samples of a shard; bad ones are counted in `bad`, and keys already in `seen` are bad. Samples
    that the manifest promises and the archive does not hold (it was cut short) are counted as `truncated_tar`.

    Raises DataError where the shard is missing, no file, or not the one that the manifest knows, and where more samples
    are bad than `bad` allows.
    """
    path = folder / shard.name
    _check_file(path, shard)
    read = 0
    try:
        with path.open("rb") as file:
            for key, members in _read_groups(file, bad):
                read += 1
                if read > shard.samples:
                    bad.add("not_in_manifest")
                    continue
                if key in seen:
                    bad.add("duplicate_key")
                    continue
                seen.add(key)
                try:
                    yield decode_sample(key, members, size)
                except BadSampleError as error:
                    bad.add(str(error.args[0]))
    except DataError:
        raise
    except (tarfile.TarError, ValueError, OverflowError, RecursionError):
        # Besides its own errors tarfile lets through those of absurd offsets and of headers chained without end.
        # A break in what follows the last promised sample still means that the file is not what was written.
        read = min(read, shard.samples - 1)
    if read < shard.samples:
        bad.add("truncated_tar", shard.samples - read)
