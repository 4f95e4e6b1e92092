"""Towers of other libraries for all tests here; each is skipped where its library is missing."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers.libraries import Kind, hugging_face_kind, open_clip_kind, timm_kind

if find_spec("torchvision") is not None and torch.version.cuda is None:
    # torchvision's wheels for CUDA describe two operators at import that they then lack beside a torch for CPUs.
    _TORCHVISION = torch.library.Library("torchvision", "DEF")
    for _operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, _operator):
            _TORCHVISION.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


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
