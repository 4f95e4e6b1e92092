"""What the benchmarks' tests share."""

from __future__ import annotations

import pytest


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *how, **more: (figures.append(self), save(self, *how, **more)))
    return figures
