"""`python -m train data`: prepare the emoji set and print what it holds."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from .. import PROGRAM
from .emoji import SetupError, prepare_emoji
from .emoji.manifest import Manifest, read_manifest
from .emoji.sources import PACKAGES, VENDOR_PACKAGES


def summary(manifest: Manifest) -> str:
    """Counts by split and vendor, what was dropped, and the licenses."""
    vendors = list(VENDOR_PACKAGES)
    lines = ["".join(f"{cell:>19}" for cell in ("split", *vendors, "total"))]
    for split, counts in manifest.counts.items():
        cells = (split, *(counts.get(vendor, 0) for vendor in vendors), sum(counts.values()))
        lines.append("".join(f"{cell:>19}" for cell in cells))
    lines += ["", "dropped:", *(f"  {count:>5}  {reason}" for reason, count in sorted(manifest.dropped.items()))]
    lines += ["", "packages:"]
    lines += [f"  {p.name + '@' + p.version:<34} {p.licence:<13} {p.author}" for p in PACKAGES]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog=f"{PROGRAM} data", description="Prepare the emoji data set once.")
    parser.add_argument("--root", type=Path, default=None, help="cache folder (default: $SOFTCLIP_DATA/emoji)")
    parser.add_argument("--size", type=int, default=48, help="height and width in pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="fixes splits and captions (default: %(default)s)")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        folder = prepare_emoji(options.root, size=options.size, seed=options.seed)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{folder} ready in {time.perf_counter() - start:.1f} s")
    made = read_manifest(folder)
    if made is not None:  # nobody altered it in this moment
        print(f"\n{summary(made)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
