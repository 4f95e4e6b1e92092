"""What the library uses of PyTorch beyond its public interface does what it says: a new PyTorch is tried here first."""

from __future__ import annotations

import ast

import pytest
import torch
import torch.distributed as dist
from helpers import ROOT
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from softclip_kernels.distributed import torch_private


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_group_tells_its_devices_and_its_backend(group):
    assert torch.device("cpu") in torch_private.device_types(group)
    assert torch_private.is_gloo(group, torch.device("cpu"))


def test_the_store_of_the_default_group_holds_what_is_set(group):
    store = torch_private.store()
    store.set("softclip_kernels/test", "here")
    assert store.get("softclip_kernels/test") == b"here"


def test_the_collectives_take_what_the_library_gives_them(group):
    ours, gathered = torch.arange(3.0), torch.empty(3)
    torch_private.all_gather_into(gathered, ours, group=group, async_op=True).wait()
    assert torch.equal(gathered, ours)
    reduced = torch.empty(3)
    torch_private.reduce_scatter_into(reduced, ours, group=group, async_op=True).wait()
    assert torch.equal(reduced, ours)


class Layer(nn.Linear):
    """With a hook of its own that is a method, and a group, which cannot be copied."""

    def __init__(self, group):
        super().__init__(3, 3)
        self.group, self.calls = group, 0
        self.register_forward_hook(self.count)

    def count(self, *_):
        self.calls += 1


def with_wrappers(kind, group):
    """Two layers of one weight, by themselves and as a wrapper leaves them."""
    model = nn.Sequential(Layer(group), nn.Tanh(), Layer(group))
    model[2].weight = model[0].weight
    plain = copy_of(model)
    if kind == "fully_shard":
        model[2].weight = nn.Parameter(model[0].weight.detach().clone())  # shared ones would need one group
        fully_shard(model[0], mesh=DeviceMesh.from_group(group, "cpu"))
        fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    return model, plain


def copy_of(model):
    parameters = {}
    for each in model.parameters():
        full = each.full_tensor() if hasattr(each, "full_tensor") else each
        parameters[id(each)] = nn.Parameter(full.detach().double())
    return torch_private.copy_bare(model, lambda module: module, parameters)


@pytest.mark.parametrize("kind", ("plain", "fully_shard"))
def test_a_bare_copy_computes_the_same_without_the_wrapper(group, kind):
    model, plain = with_wrappers(kind, group)
    bare, x = copy_of(model), torch.randn(2, 3)
    assert type(bare) is nn.Sequential and type(bare[0]) is Layer and bare[0].group is group
    torch.testing.assert_close(bare(x.double()), model(x).double(), rtol=1e-5, atol=1e-6)
    assert (bare[0].calls, model[0].calls) == (1, 1)  # its own hook, bound to the copy
    assert len(bare[0]._forward_hooks) == 1 and not bare._forward_hooks and not bare._forward_pre_hooks
    assert (bare[0].weight is bare[2].weight) == (kind == "plain") and bare[0].weight.dtype == torch.float64
    assert plain[0].weight is plain[2].weight


def test_a_group_is_found_by_its_name(group):
    assert torch_private.group_named(group.group_name) is group


@pytest.fixture
def noted():
    """An operator that says whether autograd recorded what its kernel did, usually and where it should; and how often
    it ran."""
    found = []

    @torch.library.custom_op("softclip_tests::noted", mutates_args=())
    def operator(x: torch.Tensor) -> torch.Tensor:
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            usual = (leaf * 2).requires_grad
            with torch_private.recording():
                doubled = (leaf * 2).sum()
                gradient = torch.autograd.grad(doubled, leaf)[0]
        found.append((usual, gradient.tolist()))
        return gradient

    @operator.register_fake
    def _(x):
        return torch.empty_like(x)

    yield operator, found
    operator._lib._destroy()


def test_autograd_records_inside_an_operator_and_not_after_it(noted):
    operator, found = noted
    operator(torch.ones(2))
    operator(torch.ones(1).requires_grad_().detach())
    assert found == [(False, [2.0, 2.0]), (False, [2.0])]


@pytest.mark.parametrize("kept", (False, True))
def test_an_operator_kept_in_order_runs_though_nobody_uses_its_result(noted, kept):
    operator, found = noted
    if kept:
        torch_private.keep_in_order(torch.ops.softclip_tests.noted.default)

    def unused(x):
        operator(x)
        return x + 1

    torch.compiler.reset()
    torch.compile(unused, backend="aot_eager", fullgraph=True)(torch.ones(2))
    assert len(found) == kept


def test_a_compiled_module_tells_what_it_was_made_of():
    model = nn.Linear(2, 2)
    assert torch_private.compiled_from(torch.compile(model, backend="eager")) is model
    assert torch_private.compiled_from(model) is None


def private_names(path):
    """Attributes with a leading underscore, of something other than the module's own objects."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if owner not in ("self", "cls") and node.attr != "_replace":
                yield node.attr


def test_no_other_module_of_the_room_touches_a_private_name():
    room = ROOT / "softclip_kernels" / "distributed"
    assert set(private_names(room / "torch_private.py")) == {
        "_device_types",
        "_get_backend",
        "_get_default_store",
        "_resolve_process_group",
        "_C",
        "_dispatch_tls_local_include_set",
        "_dispatch_tls_local_exclude_set",
        "_ForceDispatchKeyGuard",
    }
    for path in room.glob("*.py"):
        if path.name != "torch_private.py":
            assert list(private_names(path)) == [], path.name
