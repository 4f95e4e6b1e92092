"""What holds of the towers of every library."""

from __future__ import annotations

import math
import multiprocessing
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.libraries import LENGTH, SIZE, Kind
from PIL import Image

from train import checkpoint
from train.config import Config
from train.fingerprint import Fingerprint
from train.options import ConfigError
from train.towers import Bundle, build

for library in ("open_clip", "timm", "transformers"):
    pytest.importorskip(library)

CAPTIONS = ["a red cat", "a photo of a blue dog of a red cat of a dog", "Dog"]


def made(kind: Kind, **changes: Any) -> Bundle:
    torch.manual_seed(0)
    return build(replace(kind.options, **changes), list)


def pictures() -> list[Image.Image]:
    """Of several sizes and modes, one of them half clear over a hidden color."""
    draw = np.random.default_rng(3)
    shapes = ((40, 50, 3), (64, 32, 3), (20, 20, 3), (48, 48, 4))
    images = [Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]
    images[3].paste((255, 0, 0, 0), (0, 0, 48, 24))
    return images


def batch(bundle: Bundle) -> tuple[torch.Tensor, torch.Tensor]:
    return bundle.prepare(pictures(), None), bundle.tokenize([*CAPTIONS, "cat"])


def test_rows_are_the_librarys_own_normalised(kind: Kind) -> None:
    bundle = made(kind)
    images, tokens = batch(bundle)
    assert (images.shape, images.dtype) == ((4, 3, SIZE, SIZE), torch.float32)
    assert (tokens.shape, tokens.dtype) == ((4, LENGTH), torch.int64)
    module = bundle.module.eval()
    with torch.no_grad():
        x, y, scale = module(images, tokens)
        expected = kind.rows(module, images, tokens)
        alone, nothing, _ = module(images, None)
    assert x.shape == y.shape == (4, bundle.width)
    assert scale.shape == module.log_scale.shape == (1,)
    torch.testing.assert_close(x.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(x, expected[0])
    torch.testing.assert_close(y, expected[1])
    torch.testing.assert_close(alone, x)
    assert len(nothing) == 0
    assert (y[:, None] - y).abs().amax(2).fill_diagonal_(1).min() > 1e-4, "captions must be told apart"
    assert bundle.tokens_per_pair == (SIZE // 8) ** 2 + LENGTH
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())
    assert "towers begin" not in str(bundle.notes)


def test_all_parameters_learn_and_are_grouped_once(kind: Kind) -> None:
    bundle = made(kind)
    x, y, scale = bundle.module(*batch(bundle))
    torch.nn.functional.cross_entropy(scale * x @ y.T, torch.arange(4)).backward()
    without = [name for name, parameter in bundle.module.named_parameters() if parameter.grad is None]
    assert without == []
    groups = bundle.parameter_groups(0.1, None)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in bundle.module.parameters())
    assert all(
        (parameter.dim() > 1) == (group["weight_decay"] == 0.1) for group in groups for parameter in group["params"]
    )


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("tower", ("image", "text"))
def test_a_locked_tower_has_no_gradient_and_no_dropout(kind: Kind, tower: str, checkpointing: bool) -> None:
    bundle = made(kind, lock=tower, gradient_checkpointing=checkpointing)
    module = bundle.module
    x, y, _ = module(*batch(bundle))
    projected = kind.options.towers.startswith("timm")
    position = ("image", "text").index(tower)
    assert module.locked == (() if projected else (position,))
    assert (x, y)[position].requires_grad == projected
    assert (y, x)[position].requires_grad
    (x @ y.T).sum().backward()
    named = dict(module.named_parameters())
    frozen = [name for name, parameter in named.items() if not parameter.requires_grad]
    assert len(frozen) > 10
    assert all(named[name].grad is None for name in frozen)
    grouped = {id(parameter) for group in bundle.parameter_groups(0.1, None) for parameter in group["params"]}
    assert grouped == {id(parameter) for parameter in named.values() if parameter.requires_grad}
    assert all(not part.training for part in module.modules() if has_only(part, frozen, module))
    assert module.training
    assert ("locks a part" in str(bundle.notes)) == projected


def has_only(part: torch.nn.Module, names: list[str], module: torch.nn.Module) -> bool:
    locked = {id(module.get_parameter(name)) for name in names}
    parameters = list(part.parameters())
    return bool(parameters) and all(id(parameter) in locked for parameter in parameters)


def test_gradient_checkpointing_computes_a_layer_again_and_changes_no_gradient(kind: Kind) -> None:
    gradients, calls = [], []
    for checkpointing in (False, True):
        bundle = made(kind, gradient_checkpointing=checkpointing)
        module = bundle.module
        for part in module.modules():  # BERT has dropout by default
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        count: list[int] = []
        kind.block(module).register_forward_pre_hook(lambda *_, count=count: count.append(1))
        x, y, scale = module(*batch(bundle))
        torch.nn.functional.cross_entropy(scale * x @ y.T, torch.arange(4)).backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
        calls.append(len(count))
    assert calls == [1, 2]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_picture_is_prepared_by_its_seed_alone(kind: Kind) -> None:
    prepare, images = made(kind).prepare, pictures()
    seeds = np.array([5, 6, 7, 2**62 + 1], dtype=np.int64)
    torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    whole = prepare(images, seeds)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])  # noqa: NPY002
    turned = prepare(images[::-1], seeds[::-1].copy()).flip(0)
    assert torch.equal(whole, turned)
    assert torch.equal(whole[2:3], prepare(images[2:3], seeds[2:3]))
    assert not torch.equal(whole[:1], prepare(images[:1], seeds[1:2]))
    assert not torch.equal(whole, prepare(images, None))
    assert torch.equal(prepare(images, None), prepare(images, None))


def test_what_is_clear_is_white(kind: Kind) -> None:
    prepare = made(kind).prepare
    clear, white = Image.new("RGBA", (40, 40), (255, 0, 0, 0)), Image.new("RGB", (40, 40), "white")
    torch.testing.assert_close(prepare([clear], None), prepare([white], None))


def test_forked_processes_prepare_and_tokenize_the_same(kind: Kind) -> None:
    bundle, seeds = made(kind), np.arange(4)
    expected = bundle.prepare(pictures(), seeds), bundle.tokenize(CAPTIONS)
    reader, writer = multiprocessing.get_context("fork").Pipe(duplex=False)

    def work() -> None:
        torch.set_num_threads(1)
        writer.send([tensor.numpy() for tensor in (bundle.prepare(pictures(), seeds), bundle.tokenize(CAPTIONS))])

    workers = [multiprocessing.get_context("fork").Process(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = []
    for _ in workers:
        assert reader.poll(60), "a worker hangs"
        found.append(reader.recv())
    for worker in workers:
        worker.join(60)
    for images, tokens in found:
        assert torch.equal(torch.from_numpy(images), expected[0])
        assert torch.equal(torch.from_numpy(tokens), expected[1])


def test_a_checkpoint_holds_all_that_the_towers_need(kind: Kind) -> None:
    """Also where the library's folder is gone."""
    bundle = made(kind)
    text = kind.options.towers
    gone = text if text.startswith("open_clip") else f"{text.partition('hf:')[0]}hf:/nowhere"
    torch.manual_seed(9)
    again = build(replace(kind.options, towers=gone), list, files=bundle.files)
    again.module.load_state_dict(bundle.module.state_dict())
    images, tokens = batch(bundle)
    for one, other in zip((images, tokens), batch(again), strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        for one, other in zip(bundle.module.eval()(images, tokens), again.module.eval()(images, tokens), strict=True):
            assert torch.equal(one, other)
    assert again.notes == ()
    assert again.files.keys() == bundle.files.keys()


def test_the_library_loads_the_weights_by_its_own_names(kind: Kind) -> None:
    module = made(kind, initial_scale=25.0).module
    state = module.library_state(module.state_dict())
    model = kind.load(state)
    if "logit_scale" in state:
        assert float(model.logit_scale.exp().detach()) == pytest.approx(25.0)
    assert float(module.log_scale.detach()) == pytest.approx(math.log(25.0))


def test_each_tower_is_compiled_where_that_is_asked_for(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def eager(function: Any) -> Any:
        compiled.append(function.__name__)
        return function

    monkeypatch.setattr(torch, "compile", eager)
    made(kind, compile=True)
    assert compiled == ["encode_images", "encode_texts"]


def test_bad_options_are_refused_by_name(kind: Kind) -> None:
    with pytest.raises(ConfigError, match=r"model\.towers=.* cannot be made .*nonsense"):
        made(kind, options={"nonsense": 1})


def test_a_checkpoint_holds_the_towers_and_its_own_files(kind: Kind, tmp_path: Path) -> None:
    """Some libraries have a config.json, too."""
    bundle, config = made(kind), Config(model=kind.options)
    scratch = checkpoint.begin(tmp_path, 3)
    state, now = checkpoint.State(3, 0, 1, 1), Fingerprint("data", "code")
    checkpoint.write_portable(scratch, bundle.module.state_dict(), config, bundle.files, state, now)
    folder = checkpoint.commit(tmp_path, scratch, 3, 2, 0)
    assert checkpoint.find(tmp_path) == folder
    assert checkpoint.read_config(folder) == config
    read = checkpoint.read_bundle(folder)
    weights = bundle.module.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in read.module.state_dict().items())
    assert torch.equal(read.tokenize(CAPTIONS), bundle.tokenize(CAPTIONS))
    assert torch.equal(read.prepare(pictures(), None), bundle.prepare(pictures(), None))
