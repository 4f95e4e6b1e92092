"""What became of a measurement, as its row says it: figures, or the reason why there are none."""

from __future__ import annotations

from . import Row

MEASURED = "measured"  # a row's outcome where there are figures
EXCEEDED, UNTRIED = "over ", "not tried: "  # how outcomes of limits begin


def hopeless(before: Row | None, n: int, seconds: float) -> str | None:
    """Why a larger size is not tried: every loss here computes N² products at least."""
    if before is None:
        return None
    if before["outcome"] != MEASURED:
        exceeded = before["outcome"].startswith((EXCEEDED, UNTRIED))
        return f"{UNTRIED}{before['outcome'].removeprefix(UNTRIED)}" if exceeded else None
    least = before["seconds"].median * (n / before["n"]) ** 2
    if least <= seconds:
        return None
    return f"{UNTRIED}{before['seconds'].median:.3g} s at N = {before['n']}, so {EXCEEDED}{seconds:g} s at N = {n}"
