"""A folder as transformers' save_pretrained writes it, with the tokenizer and the image processor."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from torch import Tensor
from torch.nn.functional import normalize

from ..files import write_new
from ..towers import Bundle
from ..towers.huggingface import HuggingFace, Tokenize, pooled
from ..towers.libraries import library


def write(folder: Path, bundle: Bundle, out: Path) -> None:
    """See Form.write."""
    for name, content in bundle.files.items():
        write_new(out / name, content)
    tokenize, module = cast(Tokenize, bundle.tokenize), cast(HuggingFace, bundle.module)
    tokenize.tokenizer.model_max_length = tokenize.length  # to which padding="max_length" pads, as in training
    tokenize.tokenizer.save_pretrained(out)
    module.model.save_pretrained(out, state_dict=module.library_state(module.state_dict()))


def rows(out: Path, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """See Form.rows."""
    model = library("transformers", "hf").AutoModel.from_pretrained(out, local_files_only=True)
    x, y = model.get_image_features(pixel_values=images), model.get_text_features(input_ids=tokens)
    return normalize(pooled(x), dim=-1), normalize(pooled(y), dim=-1)
