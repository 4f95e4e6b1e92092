"""The towers that need no other library, and what `build` refuses. tests/optional has those of libraries."""

from __future__ import annotations

import math
import sys
import types
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy

from train.options import ConfigError, ModelOptions
from train.towers import FORMS, Bundle, Contrastive, build, groups
from train.towers.small.tokenizer import END, PAD, PAD_ID, START, Tokenize, train_tokenizer

CAPTIONS = ["red cat", "a dog", "red dog", "a cat on a mat", "red cat"]
SMALL = ModelOptions(image_widths=(8, 16, 16), text_width=12, text_layers=2, embed_dim=16, vocab_size=300)


def made(**changes: Any) -> Bundle:
    torch.manual_seed(0)
    return build(replace(SMALL, **changes), lambda: CAPTIONS)


def pictures(size: int = 48) -> list[Image.Image]:
    draw = np.random.default_rng(3)
    return [Image.fromarray(draw.integers(0, 256, (size, size, 4), dtype=np.uint8)) for _ in range(4)]


def batch(bundle: Bundle) -> tuple[torch.Tensor, torch.Tensor]:
    return bundle.prepare(pictures(), None), bundle.tokenize(CAPTIONS[:4])


# small.


def test_small_towers_are_those_of_every_run_before() -> None:
    """Names of parameters, the order in which they draw their first values, and defaults."""
    bundle = made()
    names = [name for name, _ in bundle.module.named_parameters()]
    assert {"image.stages.0.weight", "text.blocks.1.qkv.weight", "text.positions"} < set(names)
    assert {name.partition(".")[0] for name in names} == {"image", "text", "log_scale"}
    torch.manual_seed(0)
    first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    assert torch.equal(first.weight, bundle.module.get_parameter("image.stages.0.weight"))
    images, tokens = batch(bundle)
    assert (images.shape, tokens.shape) == ((4, 3, 48, 48), (4, 12))
    x, y, scale = bundle.module(images, tokens)
    assert x.shape == y.shape == (4, 16) == (4, bundle.width)
    torch.testing.assert_close(x.norm(dim=1), torch.ones(4))
    assert float(scale.detach()) == pytest.approx(14.3)
    assert float(made(initial_scale=30.0).module.log_scale.detach()) == pytest.approx(math.log(30.0))
    assert made(context_length=7).tokenize(["a cat"]).shape == (1, 7)
    assert bundle.module(images, None)[1].shape == (0,)
    assert bundle.notes == ()


def test_the_tokenizer_does_not_depend_on_the_order_of_the_captions() -> None:
    one, other = (build(SMALL, lambda captions=captions: captions) for captions in (CAPTIONS, CAPTIONS[::-1] * 2))
    assert one.files == other.files
    assert one.files != build(SMALL, lambda: ["something else"] * 2 + ["something new"]).files


def test_captions_that_spell_special_tokens_are_text() -> None:
    tokenize = Tokenize(train_tokenizer(CAPTIONS, 300), 40)
    plain, spelled, empty = tokenize(["a cat", f"a {PAD} {START} {END} cat", ""])
    assert (spelled != PAD_ID).sum() > (plain != PAD_ID).sum() + 3
    start, end = plain[0], plain[plain != PAD_ID][-1]
    assert ((spelled == start).sum(), (spelled == end).sum()) == (1, 1)
    assert empty.tolist() == [start, end] + 38 * [PAD_ID]


def test_a_checkpoint_holds_all_that_the_towers_need() -> None:
    bundle = made()

    def never() -> list[str]:
        raise AssertionError("captions were asked for")

    again = build(SMALL, never, files=bundle.files)
    again.module.load_state_dict(bundle.module.state_dict())
    assert torch.equal(again.tokenize(["a dog on a cat"]), bundle.tokenize(["a dog on a cat"]))
    assert again.files == bundle.files
    images, tokens = batch(bundle)
    assert torch.equal(again.module(images, tokens)[1], bundle.module(images, tokens)[1])
    assert bundle.module.library_state(bundle.module.state_dict()).keys() == bundle.module.state_dict().keys()


def test_a_picture_is_prepared_by_its_seed_alone() -> None:
    prepare, images, seeds = made().prepare, pictures(), np.array([5, 6, 7, -1])
    whole = prepare(images, seeds)
    assert torch.equal(whole, prepare(images[::-1], seeds[::-1].copy()).flip(0))
    assert torch.equal(whole[2:3], prepare(images[2:3], seeds[2:3]))
    assert not torch.equal(whole[:1], prepare(images[:1], seeds[1:2]))
    assert not torch.equal(whole, prepare(images, None))


def test_pictures_of_any_size_and_mode_keep_their_shape() -> None:
    prepare = made().prepare
    exact = Image.new("RGBA", (48, 48), (0, 0, 255, 128))
    torch.testing.assert_close(prepare([exact], None)[0, :, 5, 5], torch.tensor([127.0, 127.0, 255.0]) / 127.5 - 1)
    wide = prepare([Image.new("RGB", (96, 48), (0, 0, 255))], None)[0]
    assert wide.shape == (3, 48, 48)
    assert wide[:, 24, 24].tolist() == [-1, -1, 1]
    assert wide[:, 3, 24].tolist() == [1, 1, 1], "white above"
    hidden = Image.new("RGBA", (96, 96), (255, 0, 0, 0))
    hidden.paste((0, 0, 255, 255), (48, 0, 96, 96))
    edge = prepare([hidden], None)[0, :, 24]
    assert (edge[0] <= edge[1] + 0.02).all(), "the red under what is clear must not shine through at the edge"
    gray = prepare([Image.new("L", (30, 30), 0)], None)
    assert (gray == -1).all()


def test_gradient_checkpointing_computes_a_layer_again_and_changes_no_gradient() -> None:
    gradients, calls = [], []
    for checkpointing in (False, True):
        bundle = made(gradient_checkpointing=checkpointing)
        module: Any = bundle.module
        count: list[int] = []
        for part in (module.text.blocks[0], module.image.stages[2]):
            part.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        x, y, scale = module(*batch(bundle))
        cross_entropy(scale * x @ y.T, torch.arange(4)).backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
        calls.append(len(count))
    assert calls == [2, 4]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("tower", ("image", "text"))
def test_a_locked_tower_has_no_gradient(tower: str) -> None:
    bundle = made(lock=tower)
    position = ("image", "text").index(tower)
    assert bundle.module.locked == (position,)
    rows = bundle.module(*batch(bundle))[:2]
    assert [row.requires_grad for row in rows] == [position != 0, position != 1]
    grouped = {id(parameter) for group in bundle.parameter_groups(0.1, None) for parameter in group["params"]}
    named = bundle.module.named_parameters()
    assert grouped == {id(parameter) for name, parameter in named if not name.startswith(tower)}
    assert bundle.module.training
    assert not getattr(bundle.module, tower).training
    assert not bundle.module.eval().training


def test_weights_decay_where_they_are_matrices() -> None:
    bundle = made()
    decayed, plain = bundle.parameter_groups(0.2, None)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.2, 0.0)
    assert all(parameter.dim() > 1 for parameter in decayed["params"])
    assert all(parameter.dim() <= 1 for parameter in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(bundle.module.parameters()))
    with pytest.raises(ConfigError, match=r"optimizer.layer_decay=0.7 with model.towers=small; allowed: null, or"):
        bundle.parameter_groups(0.1, 0.7)


def test_towers_are_cast_and_the_norms_are_not() -> None:
    torch.manual_seed(0)
    exact, cast = (build(SMALL, lambda: CAPTIONS, precision).module for precision in ("fp32", "bf16"))
    cast.load_state_dict(exact.state_dict())
    images, tokens = batch(made())
    seen = []
    part: Any = cast
    part.image.project.register_forward_hook(lambda module, arguments, output: seen.append(output.dtype))
    x, _, _ = cast(images, tokens)
    assert seen == [torch.bfloat16]
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, exact(images, tokens)[0], rtol=0, atol=0.05)
    assert not torch.equal(x, exact(images, tokens)[0])


def test_compiled_towers_give_the_same_rows_under_the_same_names(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compiler(function, backend=backend))
    plain, compiled = made(), made(compile=True)
    assert compiled.module.state_dict().keys() == plain.module.state_dict().keys()
    images, tokens = batch(plain)
    for one, other in zip(plain.module(images, tokens), compiled.module(images, tokens), strict=True):
        torch.testing.assert_close(one, other)
    assert len(graphs) >= 2


# python:


class Dots(Contrastive):
    """Linear towers; the text tower sees the numbers of the tokens."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(12, 5), *([nn.BatchNorm1d(5)] if norm else []))
        self.text = nn.Linear(3, 5)
        self.log_scale = nn.Parameter(torch.zeros(1))

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        return self.image(images.flatten(1))

    def encode_texts(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.text(tokens.float())


def dots(options: ModelOptions) -> Bundle:
    module = Dots(bool(options.options.get("norm")))

    def prepare(images: Any, seeds: Any) -> torch.Tensor:
        return torch.zeros(len(images), 3, 2, 2)

    def tokenize(captions: Any) -> torch.Tensor:
        return torch.tensor([[len(text), 1, 0] for text in captions])

    def parameter_groups(weight_decay: float, layer_decay: float | None) -> list[dict[str, Any]]:
        return groups.without_layers(module, weight_decay, layer_decay, options.towers)

    return Bundle(module, prepare, tokenize, 5, 7, parameter_groups)


@pytest.fixture
def factory(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with factories in it."""
    module = types.ModuleType("somebody")
    vars(module).update(dots=dots, wrong=lambda options: options)
    monkeypatch.setitem(sys.modules, "somebody", module)
    return "python:somebody"


def test_a_factory_makes_towers(factory: str) -> None:
    bundle = build(ModelOptions(f"{factory}:dots"), list, "bf16")
    assert bundle.module.precision == "bf16"
    assert bundle.notes == ()
    x, y, _ = bundle.module(torch.ones(2, 3, 2, 2), bundle.tokenize(["a", "bc"]))
    assert x.shape == y.shape == (2, bundle.width)
    noted = build(ModelOptions(f"{factory}:dots", options={"norm": True}), list)
    assert noted.notes == ("batch norm: the loss depends on how a batch is cut into processes and micro-batches",)


@pytest.mark.parametrize(
    ("name", "message"),
    (
        (":nobody", "there is no 'nobody' to be imported from 'somebody'"),
        ("_else:dots", "No module named 'somebody_else'"),
        (":wrong", "the factory returned ModelOptions; allowed: a towers.Bundle"),
        ("", r"allowed: small, open_clip:NAME"),
    ),
)
def test_what_is_no_factory_is_refused(factory: str, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(ModelOptions(f"{factory}{name}"), list)


# What cannot be.


@pytest.mark.parametrize("towers", ("large", "small:er", "open_clip", "hf:", "timm:", ""))
def test_an_unknown_form_is_refused_with_the_list_of_all(towers: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(ModelOptions(towers), list)
    assert f"model.towers={towers!r}; allowed: {', '.join(FORMS)}" in str(caught.value)


@pytest.mark.parametrize(
    ("towers", "library", "extra"),
    (
        ("open_clip:ViT-B-32", "open_clip", "open_clip"),
        ("hf:folder", "transformers", "hf"),
        ("timm:vit+hf:folder", "timm", "timm"),
    ),
)
def test_a_missing_library_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, towers: str, library: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    message = rf"needs the library {library}, .*pip install 'softclip-kernels\[{extra}\]'"
    with pytest.raises(ConfigError, match=message):
        build(ModelOptions(towers), list)
