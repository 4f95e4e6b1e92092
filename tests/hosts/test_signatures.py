"""Every hook that an adapter relies on, read from the installed host."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

from softclip_kernels import integrations
from softclip_kernels.integrations.hooks import Hook, UnknownHost, parameters

ADAPTERS = sorted(one.name for one in pkgutil.iter_modules(integrations.__path__) if one.name != "hooks")


@pytest.mark.parametrize("name", ADAPTERS)
def test_hosts_are_the_known_ones(name):
    pytest.importorskip(name)
    hooks = importlib.import_module(f"softclip_kernels.integrations.{name}").HOOKS
    assert hooks
    for hook in hooks:
        hook.find()


def test_a_drift_is_an_error():
    def taken(model, /, inputs, *others, flag=False, **rest):
        """Everything a signature can have."""

    assert parameters(taken) == ("model", "inputs", "*others", "*flag", "**rest")
    right = Hook("json", "json:JSONEncoder.encode", ("o",))
    assert right.find() is importlib.import_module("json").JSONEncoder.encode
    with pytest.raises(UnknownHost, match=r"json:JSONEncoder.encode takes \(o\)"):
        Hook("json 0", "json:JSONEncoder.encode", ("obj",)).find()
    with pytest.raises(UnknownHost, match=r"json:JSONEncoder.encoded is not there"):
        Hook("json 0", "json:JSONEncoder.encoded", ("o",)).find()
