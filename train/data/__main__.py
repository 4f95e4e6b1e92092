"""`python -m train data`: prepare sets that are drawn on demand, say what they hold, and list what there is."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from .. import PROGRAM
from .drawn import Package, SetupError
from .drawn.manifest import Manifest, read_manifest
from .emoji.drawings import UNSEEN_VENDOR
from .emoji.sources import PACKAGES, RELATED, SHIFT_VENDORS, VENDOR_PACKAGES
from .icons import ICON_SETS
from .record import DataError
from .sources.drawn import prepare_drawn, read_spec

KNOWN = {
    package.name: package
    for package in (
        *PACKAGES,
        *SHIFT_VENDORS.values(),
        *(one for icons in ICON_SETS.values() for one in icons.packages),
    )
}


def summary(manifest: Manifest) -> str:
    """Counts by split and by vendor or set, what was dropped, and the packages with their licences."""
    columns = list(dict.fromkeys(name for counts in manifest.counts.values() for name in counts))
    width = 2 + max(map(len, ("openmoji", *columns, *manifest.counts)))
    rows = [("split", *columns, "total")]
    for split, counts in manifest.counts.items():
        rows.append((split, *(str(counts.get(name, 0)) for name in columns), str(sum(counts.values()))))
    lines = ["".join(f"{cell:>{width}}" for cell in row) for row in rows]
    lines += ["", "dropped:", *(f"  {count:>5}  {reason}" for reason, count in sorted(manifest.dropped.items()))]
    lines += ["", "packages:", *(_row(f"{name}@{KNOWN[name].version}", KNOWN[name], "") for name in manifest.packages)]
    return "\n".join(lines)


def listing() -> str:
    """Every vendor and icon set with its licence, author and role."""
    drawn = {name: "vendor" if name == UNSEEN_VENDOR else "train, heldout, concepts" for name in VENDOR_PACKAGES}
    more = {name: _test(RELATED.get(name)) for name in SHIFT_VENDORS}
    sets = {name: "train, heldout" if one.trained else _test(one.related) for name, one in ICON_SETS.items()}
    return "\n".join(
        [
            "emoji:SPLIT holds the drawings of",
            *(_row(name, VENDOR_PACKAGES[name], role) for name, role in drawn.items()),
            "emoji:VENDOR",
            *(_row(name, SHIFT_VENDORS[name], role) for name, role in more.items()),
            "icons:SET; icons:train and icons:heldout are all sets to train on",
            *(_row(name, ICON_SETS[name].package, role) for name, role in sets.items()),
        ]
    )


def _test(related: str | None) -> str:
    return "test" if related is None else f"test, related to {related}"


def _row(name: str, package: Package, role: str) -> str:
    return f"  {name:<44} {package.licence:<13} {package.author:<22} {role}".rstrip()


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} data", description="Prepare sets of pictures that are drawn on demand, each once."
    )
    parser.add_argument("sources", nargs="*", help="emoji:NAME or icons:NAME, with @SIZE (default: the emoji set)")
    parser.add_argument("--list", action="store_true", help="prepare nothing, and list what there is")
    parser.add_argument("--root", type=Path, default=None, help="cache folder (default: $SOFTCLIP_DATA/KIND)")
    parser.add_argument("--size", type=int, default=48, help="height and width in pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="fixes splits and captions (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.list:
        print(listing())
        return 0
    try:
        for source in options.sources or ["emoji:train"]:
            _prepare(source if "@" in source else f"{source}@{options.size}", options.seed, options.root)
    except (SetupError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not options.sources:
        print(f"\nMore, with `{PROGRAM} data NAME ...`:\n{listing()}")
    return 0


def _prepare(source: str, seed: int, root: Path | None) -> None:
    drawn = read_spec(source)
    if drawn is None:
        raise DataError(f"{source.partition('@')[0]!r} is not drawn on demand; allowed: emoji:NAME, icons:NAME")
    start = time.perf_counter()
    folders = prepare_drawn(drawn, seed, root)
    seconds = time.perf_counter() - start
    for folder, _ in folders:
        print(f"{folder} ready in {seconds:.1f} s")
        made = read_manifest(folder)
        if made is not None:  # nobody altered it in this moment
            print(f"\n{summary(made)}\n")


if __name__ == "__main__":
    sys.exit(main())
