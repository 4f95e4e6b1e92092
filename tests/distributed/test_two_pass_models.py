"""Models as they are: arguments and outputs in containers, integers beside embeddings, frozen towers."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass, fields
from unittest import mock

import pytest
import torch
from helpers.towers import data, make, split
from torch import Tensor, nn

from softclip_kernels import TwoPass, softclip_loss, split_batch
from softclip_kernels.distributed import replay

IMAGES, TEXTS = data(0, 0, torch.float64)


def gradients(model):
    return [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]


def assert_alike(model, other):
    for one, another in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, another.grad, rtol=1e-11, atol=1e-13)


def plain(dropout=0.0):
    """Of one pass, with the graph of all micro-batches."""
    model = make(dropout, torch.float64)
    torch.manual_seed(5)
    parts = [model(*part) for part in split((IMAGES, TEXTS), 3)]
    softclip_loss(*(torch.cat([part[k] for part in parts]) for k in (0, 1)), parts[0][2]).backward()
    return model


class ModelOutput(OrderedDict):
    """A mapping with attributes, as transformers has it: what is None is no item of it."""

    def __post_init__(self):
        for field in fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)


@dataclass
class Encoded(ModelOutput):
    loss: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    scale: Tensor | None = None


class Plain(OrderedDict):
    """A subclass that nobody has told of."""


@dataclass(frozen=True)
class Nested:
    pair: dict[str, Tensor]
    rest: list[Tensor]


Named = namedtuple("Named", ("image", "text", "scale"))

# How a model returns (x, y, scale); what TwoPass makes of it: the type, and where the three are.
CONTAINERS = {
    "tuple": (lambda *three: three, tuple, lambda found: found),
    "list": (lambda *three: list(three), list, lambda found: found),
    "named tuple": (Named, Named, lambda found: (found.image, found.text, found.scale)),
    "dict": (lambda x, y, scale: {"x": x, "scale": scale, "y": y}, dict, lambda f: (f["x"], f["y"], f["scale"])),
    "mapping": (lambda x, y, scale: Plain(x=x, y=y, scale=scale), dict, lambda f: (f["x"], f["y"], f["scale"])),
    "ModelOutput": (
        lambda *three: Encoded(None, *three),
        Encoded,
        lambda f: (f["image_embeds"], f.text_embeds, f.scale),
    ),
    "nested": (
        lambda x, y, scale: Nested({"x": x, "y": y}, [scale]),
        Nested,
        lambda f: (f.pair["x"], f.pair["y"], f.rest[0]),
    ),
}


class Returning(nn.Module):
    def __init__(self, container, dropout):
        super().__init__()
        self.towers, self.container = make(dropout, torch.float64), container

    def forward(self, images, texts):
        return self.container(*self.towers(images, texts))


@pytest.mark.parametrize("name", CONTAINERS)
def test_outputs_come_in_the_models_containers(name):
    container, kind, unpack = CONTAINERS[name]
    model = Returning(container, 0.3)
    torch.manual_seed(5)
    passes = TwoPass(model, split((IMAGES, TEXTS), 3))
    assert type(passes.outputs) is kind
    x, y, scale = unpack(passes.outputs)
    assert x.shape == y.shape == (13, 8) and x.is_leaf and x.requires_grad and scale.shape == ()
    passes.backward(softclip_loss(x, y, scale))
    assert_alike(model.towers, plain(0.3))


@pytest.mark.parametrize("mapping", (dict, UserDict))
def test_arguments_by_name(mapping):
    model = make(0.3, torch.float64)
    torch.manual_seed(5)
    passes = TwoPass(model, [mapping(texts=texts, images=images) for images, texts in split((IMAGES, TEXTS), 3)])
    passes.backward(softclip_loss(*passes.outputs))
    assert_alike(model, plain(0.3))


class Talkative(nn.Module):
    """With outputs beside its embeddings; of arguments in containers, some of them None."""

    def __init__(self):
        super().__init__()
        self.towers, self.head = make(0.0, torch.float64), nn.Linear(6, 2, dtype=torch.float64)

    def forward(self, inputs, options):
        images, (texts, mask) = inputs["images"], inputs["texts"]
        assert mask is None and options is None
        x, y, scale = self.towers(images, texts)
        return {
            "x": x,
            "y": y,
            "scale": scale,
            "labels": images.argmax(1),
            "kept": images > 0,
            "version": torch.tensor(3),
            "states": None,
            "aside": self.head(images),
        }


def test_integers_and_none_are_carried_along():
    batch = {"inputs": {"images": IMAGES, "texts": (TEXTS, None)}, "options": None}
    model = Talkative()
    passes = TwoPass(model, split_batch(batch, size=5))
    found = passes.outputs
    assert torch.equal(found["labels"], IMAGES.argmax(1)) and torch.equal(found["kept"], IMAGES > 0)
    assert found["version"] == 3 and found["states"] is None
    assert not (found["labels"].requires_grad or found["kept"].requires_grad)
    passes.backward(softclip_loss(found["x"], found["y"], found["scale"]))
    assert_alike(model.towers, plain())
    assert torch.equal(model.head.weight.grad, torch.zeros_like(model.head.weight))  # the loss does not see it


def test_a_single_row_is_no_number():
    """Integers of shape (1,) are a row's."""
    passes = TwoPass(lambda x: (x, torch.arange(len(x))), [(torch.ones(1, 2),), (torch.ones(2, 2),)])
    assert passes.outputs[1].tolist() == [0, 0, 1]


class Half(nn.Module):
    """Towers of which None leaves one out."""

    def __init__(self):
        super().__init__()
        self.towers = make(0.3, torch.float64)
        self.towers.image.requires_grad_(False).eval()
        self.encoded = 0

    def forward(self, pixels, texts):
        found = {"text_embeds": nn.functional.normalize(self.towers.text(texts), dim=1)}
        if pixels is not None:
            self.encoded += 1
            found["image_embeds"] = nn.functional.normalize(self.towers.image(pixels), dim=1)
        return {**found, "scale": self.towers.log_scale.exp().squeeze()}


def test_a_locked_output_by_the_name_of_its_argument():
    found = []
    for locked in ((), {"pixels": "image_embeds"}):
        model = Half()
        torch.manual_seed(5)
        passes = TwoPass(model, [{"pixels": x, "texts": y} for x, y in split((IMAGES, TEXTS), 3)], locked)
        outputs = passes.outputs
        assert outputs["image_embeds"].requires_grad == (not locked)
        passes.backward(softclip_loss(outputs["image_embeds"], outputs["text_embeds"], outputs["scale"]))
        assert model.encoded == (3 if locked else 6)
        found.append([each for each in gradients(model) if each is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("frozen", (("image",), ("text", "log_scale"), ("image", "text")))
def test_what_is_frozen_has_no_part_in_the_second_pass(frozen):
    """As in one pass: what is left gets the same gradient."""
    gradients_of = []
    for parts in (None, 3):
        model = make(0.0, torch.float64)
        for name in frozen:
            getattr(model, name).requires_grad_(False)
        if parts is None:
            softclip_loss(*model(IMAGES, TEXTS)).backward()
        else:
            passes = TwoPass(model, split((IMAGES, TEXTS), parts))
            passes.backward(softclip_loss(*passes.outputs))
        gradients_of.append(gradients(model))
    for one, other in zip(*gradients_of, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


def test_a_backward_pass_without_a_gradient_is_an_error():
    """As loss.backward() is, of a loss that asks for none."""
    model = make(0.0, torch.float64).requires_grad_(False)
    passes = TwoPass(model, split((IMAGES, TEXTS), 2))
    with pytest.raises(RuntimeError, match="no output of micro-batch 0 asks for a gradient in the second pass"):
        passes.backward(softclip_loss(*passes.outputs))
    passes = TwoPass(make(0.0, torch.float64), split((IMAGES, TEXTS), 2))
    with pytest.raises(RuntimeError, match="does not require grad"):
        passes.backward(softclip_loss(*(output.detach() for output in passes.outputs)))
    passes = TwoPass(lambda x: (x, x > 0, None), [(torch.ones(2, 2),)], locked=(0,))
    with pytest.raises(RuntimeError, match="no output can have a gradient: all are locked, None, integers or booleans"):
        passes.backward(torch.ones((), requires_grad=True))


ONES = torch.ones(2, 2)


@pytest.mark.parametrize(
    ("model", "micro_batches", "locked", "error", "message"),
    (
        (lambda x: (x,), [ONES], (), TypeError, "micro-batch 0 is a Tensor; allowed: a tuple"),
        (lambda x: (x,), [(ONES,), {"x": ONES}], (0,), ValueError, r"argument 0; micro-batch 1 has \['x'\]"),
        (lambda x: (x,), [(ONES,)], (1,), ValueError, r"locked names the argument 1; micro-batch 0 has \[0\]"),
        (lambda x: {"a": x}, [{"x": ONES}], ("x",), ValueError, r"output 'x'; the model returned \['a'\]. Where"),
        (lambda x: {"a": x, "b": 0.5}, [{"x": ONES}], (), TypeError, "output b is of type float; allowed"),
        (lambda x: ((x, x + 1j),), [(ONES,)], (), TypeError, "output 0.1 is of type torch.complex64"),
        (lambda x: {"a": [x[:, 0]]}, [(ONES,)], (), ValueError, r"output a.0: the model returned shape \(2,\)"),
        (
            lambda x: (x @ x.T,),
            [(ONES,), (ONES[:1],)],
            (),
            ValueError,
            r"output 0 cannot be joined.*\(2, 2\), \(1, 1\)",
        ),
        (lambda x: (x, x[1:] if len(x) > 1 else None), [(ONES,), (ONES[:1],)], (), ValueError, "output 1 cannot be"),
        (
            lambda x: (x,) * len(x),
            [(ONES,), (ONES[:1],)],
            (),
            ValueError,
            r"\['0', '1'\] for micro-batch 0, but \['0'\]",
        ),
    ),
)
def test_bad_values(model, micro_batches, locked, error, message):
    with pytest.raises(error, match=message):
        TwoPass(model, micro_batches, locked)


def test_an_output_that_is_missing_in_the_second_pass_is_named():
    weight, called = torch.ones(2, 2, requires_grad=True), []
    passes = TwoPass(lambda x: {"a": x, "b": None if called else x @ weight}, [(ONES,)])
    called.append(1)
    with pytest.raises(
        RuntimeError, match=r"output b had shape \(2, 2\) in the first pass and is a NoneType in the se"
    ):
        passes.backward(passes.outputs["b"].sum())


def test_random_numbers_are_those_of_every_device_that_the_process_computes_on():
    """Whatever the model is; a machine with two GPUs is imagined. Where nothing lies on them, nothing is made there."""
    cuda = torch.device("cuda")
    with (
        mock.patch.object(torch.accelerator, "current_accelerator", return_value=cuda),
        mock.patch.object(torch.accelerator, "device_count", return_value=2),
    ):
        assert replay.devices() == []
        with mock.patch.object(torch.cuda, "is_initialized", return_value=True):
            assert replay.devices() == [torch.device("cuda", 0), torch.device("cuda", 1)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ("function", "object"))
def test_dropout_on_a_gpu_that_nothing_outside_the_model_tells_of(kind):
    """Arguments on the CPU, parameters in a closure or in an object that is no module."""

    class Held:
        def __init__(self, towers):
            self.towers = towers

        def __call__(self, images, texts):
            return self.towers(images.cuda(), texts.cuda())

    model, other = (make(0.3, torch.float32).cuda() for _ in range(2))
    call = Held(model) if kind == "object" else lambda images, texts: model(images.cuda(), texts.cuda())
    batch = IMAGES.float(), TEXTS.float()
    torch.manual_seed(5)
    passes = TwoPass(call, split(batch, 3))
    passes.backward(softclip_loss(*passes.outputs))
    torch.manual_seed(5)
    parts = [other(*(tensor.cuda() for tensor in part)) for part in split(batch, 3)]
    softclip_loss(*(torch.cat([part[k] for part in parts]) for k in (0, 1)), parts[0][2]).backward()
    for one, another in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, another.grad)
