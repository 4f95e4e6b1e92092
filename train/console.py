"""The progress bar: where a run is, how long it still takes, and how it goes, on a line of 100 columns."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

from tqdm import tqdm

SECONDS = {True: 1.0, False: 30.0}  # between updates on a terminal, and in a file, where each is a line more
# By the name in a row: how the bar shows it. Where a terminal is too narrow, the end is cut.
SHOWN: dict[str, Callable[[float], str]] = {
    "samples_per_second": lambda value: f"{tqdm.format_sizeof(value)}/s",
    "step_seconds": lambda value: f"{value:.2f}s",
    "data_seconds": lambda value: f"data={value:.2f}s",
    "loss": lambda value: f"loss={value:.3f}",
    "alpha": lambda value: f"α={value:.2f}",
    "scale": lambda value: f"scale={value:.1f}",
    "r1_image_to_text": lambda value: f"R@1={100 * value:.0f}%",
    "skipped": lambda value: f"skip={value:.0f}" if value else "",
    "bad": lambda value: f"bad={value:.0f}" if value else "",
    "memory_bytes": lambda value: f"{tqdm.format_sizeof(value)}B",
}


class Bar:
    def __init__(self, start: int, steps: int) -> None:
        # tqdm's monitor redraws a bar that is older than maxinterval.
        seconds = SECONDS[sys.stderr.isatty()]
        self._bar = tqdm(
            total=steps,
            initial=start,
            dynamic_ncols=True,
            mininterval=seconds,
            maxinterval=seconds,
            bar_format="{n_fmt}/{total_fmt} ETA {remaining}{postfix}",
        )

    def step(self, values: Mapping[str, float]) -> None:
        """One step on."""
        self._bar.set_postfix_str(described(values), refresh=False)
        self._bar.update()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.write(text)

    def close(self) -> None:
        self._bar.close()


def described(values: Mapping[str, float]) -> str:
    """A row in a few words; what it lacks is left out."""
    return " ".join(filter(None, (show(values[name]) for name, show in SHOWN.items() if name in values)))
