"""What the library uses of PyTorch beyond its public interface does what it says: a new PyTorch is tried here first."""

from __future__ import annotations

import ast

import pytest
import torch
import torch.distributed as dist
from helpers import ROOT

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


def private_names(path):
    """Attributes with a leading underscore, of something other than the module's own objects."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if owner not in ("self", "cls") and node.attr != "_replace":
                yield node.attr


def test_no_other_module_of_the_room_touches_a_private_name():
    room = ROOT / "softclip_kernels" / "distributed"
    assert set(private_names(room / "torch_private.py")) == {"_device_types", "_get_backend", "_get_default_store"}
    for path in room.glob("*.py"):
        if path.name != "torch_private.py":
            assert list(private_names(path)) == [], path.name
