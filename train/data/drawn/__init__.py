"""Sets that are drawn from pinned npm packages: what emoji and icons share.

packages  fetched with npm, checked, kept
svg       iconify's SVG drawings, and their rendering
keywords  captions of what several things share
near      pictures that are nearly equal
folder    shards and a manifest, written once, under a lock
manifest  what a finished set-up says about itself
"""

from .folder import Contents, Sample, check_request, prepare
from .keywords import keyword_captions
from .packages import Package, SetupError, cache_root, fetch, pins, read_json
from .svg import Picture, rasterize, svg_of

__all__ = [
    "Contents",
    "Package",
    "Picture",
    "Sample",
    "SetupError",
    "cache_root",
    "check_request",
    "fetch",
    "keyword_captions",
    "pins",
    "prepare",
    "rasterize",
    "read_json",
    "svg_of",
]
