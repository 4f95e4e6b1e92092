"""Teachers of other libraries: what they give, and that none begins with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import engines
from helpers.libraries import LENGTH, SIZE, WORDS, write_bert, write_hugging_face, write_open_clip
from helpers.ranks import Pool
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from train.config import Config

RANKS = 1
PAIRS = 5


@pytest.fixture(scope="module")
def needed() -> None:
    """Not at the top, for the ranks import this file, too."""
    for name in ("open_clip", "transformers", "timm"):
        pytest.importorskip(name)


def config(teachers: list[str]) -> Config:
    return Config.from_dict({**engines.config("1").to_dict(), "loss": {"teachers": teachers}})


def view() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, len(WORDS), (PAIRS, LENGTH), generator=generator)
    tokens[:, 0], tokens[:, -1] = 1, 3
    return torch.randn(PAIRS, 3, SIZE, SIZE, generator=generator), tokens


def _taught(group: Any, teachers: list[str]) -> dict[str, Any]:
    """In parts of 3 and 2 pairs."""
    seen = engines.Share(*view(), {}, *2 * [torch.zeros(PAIRS)], (view(),) * len(teachers))
    return engines.teachers_of(group, config(teachers), engines.bundle()).teach(seen, 2)


@pytest.mark.usefixtures("needed")
def test_a_librarys_towers_teach_what_the_library_computes(pool: Pool, tmp_path: Path) -> None:
    import open_clip
    from transformers import CLIPModel

    clip = write_hugging_face(tmp_path / "clip", "clip")
    name = write_open_clip(tmp_path / "open_clip")
    made = open_clip.create_model(name.removeprefix("open_clip:"))
    save_file(made.state_dict(), tmp_path / "open_clip" / "open_clip_model.safetensors")
    (found,) = pool.run(_taught, [f"hf:{clip}", name])

    model, (images, tokens) = CLIPModel.from_pretrained(clip).eval(), view()
    with torch.no_grad():
        x, y = model.get_image_features(images).pooler_output, model.get_text_features(tokens).pooler_output
        torch.testing.assert_close(found[f"hf:{clip}"].images, normalize(x, dim=-1))
        torch.testing.assert_close(found[f"hf:{clip}"].texts, normalize(y, dim=-1))
        torch.testing.assert_close(found[name].images, made.eval().encode_image(images, normalize=True))
        torch.testing.assert_close(found[name].texts, made.encode_text(tokens, normalize=True))
        assert found[f"hf:{clip}"].scale == pytest.approx(float(model.logit_scale.exp()))
        assert found[name].scale == pytest.approx(float(made.logit_scale.exp()))


def _refused(group: Any, teachers: list[str]) -> list[str]:
    words = []
    for name in teachers:
        try:
            engines.teachers_of(group, config([name]), engines.bundle())
        except Exception as error:
            words.append(f"{type(error).__name__}: {error}")
    return words


@pytest.mark.usefixtures("needed")
def test_no_teacher_of_a_library_begins_with_random_weights(pool: Pool, tmp_path: Path) -> None:
    clip, bert = write_hugging_face(tmp_path / "clip", "clip"), write_bert(tmp_path / "bert")
    (clip / "model.safetensors").unlink()
    names = [f"hf:{clip}", write_open_clip(tmp_path / "open_clip"), f"timm:test_vit+hf:{bert}"]
    (said,) = pool.run(_refused, names)
    assert [words.partition(";")[0] for words in said] == [
        f"ConfigError: loss.teachers: {name!r} begins with random weights, in one tower at least" for name in names
    ]
