"""Towers of other libraries, for the tests here; a file of tests is skipped where a library is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.libraries import Kind, hugging_face_kind, open_clip_kind, timm_kind


@pytest.fixture(scope="session")
def library_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("libraries")


@pytest.fixture(scope="session", params=("open_clip", "clip", "siglip", "timm"))
def kind(request: pytest.FixtureRequest, library_folders: Path) -> Kind:
    if request.param == "open_clip":
        return open_clip_kind(library_folders / "open_clip")
    if request.param == "timm":
        return timm_kind(library_folders)
    return hugging_face_kind(library_folders, request.param)
