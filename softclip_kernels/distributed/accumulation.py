"""How each framework is told that more micro-batches follow, and who reduces the gradients where none does.

A model is known by what it can do, not by its type or version: a DeepSpeed engine sets an accumulation boundary,
DistributedDataParallel has no_sync, what fully_shard was applied to has set_requires_gradient_sync.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor, nn

from . import agreement
from .averaging import Averaging
from .exchange import WORLD, Exchange, as_exchange

UNREDUCED = "unreduced"


class Accumulation(Protocol):
    """`part` goes around what is done with a micro-batch, `run` around the whole second pass; `loss_scale` is what the
    framework multiplies a loss with before its backward pass."""

    def part(self, last: bool) -> AbstractContextManager[None]: ...

    def loss_scale(self) -> float: ...

    def backward(self, scalar: Tensor) -> None: ...

    def run(self, second_pass: Callable[[], None]) -> None: ...


def accumulation(model: Any, micro_batches: int, group: Any, check: Callable[[], None]) -> Accumulation:
    """`check` raises where this rank's arguments are wrong: on every rank alike, if ranks have anything to agree on."""
    if isinstance(group, str) and group not in (WORLD, UNREDUCED):
        raise ValueError(f"group={group!r}; allowed: a process group, {WORLD!r}, an Exchange, None, {UNREDUCED!r}")
    if is_engine(model):
        return _Engine(model, micro_batches, check)
    return _Module(model, micro_batches, group, check)


def is_engine(model: Any) -> bool:
    """Whether the model is a DeepSpeed engine."""
    return hasattr(model, "set_gradient_accumulation_boundary")


class _Module:
    """A model of PyTorch. Modules that reduce their own gradients (all of it, some in it, or none) do so in the last
    micro-batch; those of all other parameters are averaged over `group`, once, after it."""

    def __init__(self, model: Any, micro_batches: int, group: Any, check: Callable[[], None]) -> None:
        self.reducing = _reducing(model)
        self.averaging: Averaging | None = None
        _check_static(self.reducing, micro_batches)
        for members in _meshes(self.reducing):  # every forward pass gathers parameters
            _same_number(micro_batches, members, check)
        others = _others(model, self.reducing)
        exchange = None if others == {} or group == UNREDUCED else as_exchange(group)
        if exchange is None:
            check()
            if others != {} and group is None and dist.is_initialized() and dist.get_world_size() > 1:
                raise ValueError(
                    f"nobody reduces the model's gradients over the {dist.get_world_size()} ranks of this job; pass "
                    f"group= ({WORLD!r}, a process group, an Exchange) and TwoPass averages them, or wrap the model in "
                    f"DistributedDataParallel; group={UNREDUCED!r} says that they are reduced elsewhere, or not at all"
                )
            return
        if others is None:
            raise TypeError(
                f"group= averages the gradients of a module's parameters, but the model is a {type(model).__name__}; "
                f"pass a module, or say group={UNREDUCED!r} and reduce them yourself"
            )
        parameters = others

        def checked() -> None:
            check()
            _check_averageable(model, parameters)

        self.averaging = Averaging(parameters, exchange, checked)

    @contextmanager
    def part(self, last: bool) -> Iterator[None]:
        with ExitStack() as stack:
            for module in [] if last else self.reducing:
                stack.enter_context(_put_off(module))
            yield

    def loss_scale(self) -> float:
        return 1.0  # a GradScaler's is in the loss that it returns

    def backward(self, scalar: Tensor) -> None:
        scalar.backward()

    def run(self, second_pass: Callable[[], None]) -> None:
        if self.averaging is None:
            second_pass()
        else:
            self.averaging.run(second_pass)


def _reducing(model: Any) -> list[Any]:
    """The outermost objects that reduce gradients."""
    if hasattr(model, "no_sync") or hasattr(model, "set_requires_gradient_sync"):
        return [model]
    if isinstance(model, nn.Module):
        return [each for child in model.children() for each in _reducing(child)]
    held = _held(model)
    return [] if held is None else _reducing(held)


def _held(model: Any) -> Any:
    """Of what is no module: what a wrapper calls its module, or whose method it is."""
    return getattr(model, "module", getattr(model, "__self__", None))


def _others(model: Any, reducing: list[Any]) -> dict[str, nn.Parameter] | None:
    """The trained parameters that none of `reducing` has; None where they are not known."""
    if reducing == [model]:
        return {}
    if isinstance(model, nn.Module):
        known = {id(parameter) for module in reducing for parameter in module.parameters()}
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        return {name: parameter for name, parameter in trained if id(parameter) not in known}
    held = _held(model)
    return None if held is None else _others(held, reducing)


def _check_averageable(model: Any, parameters: dict[str, nn.Parameter]) -> None:
    while not isinstance(model, nn.Module):
        model = _held(model)
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) is True:
            raise ValueError(f"{name} makes sparse gradients, which group= cannot average; build it with sparse=False")
    for name, parameter in parameters.items():
        if hasattr(parameter, "device_mesh"):
            raise ValueError(
                f"{name} is a DTensor, whose gradient group= cannot average; apply fully_shard to the model, or say "
                f"group={UNREDUCED!r} and reduce gradients yourself"
            )


@contextmanager
def _put_off(module: Any) -> Iterator[None]:
    """Inside, `module` accumulates gradients and does not reduce them."""
    if hasattr(module, "no_sync"):
        with module.no_sync():
            yield
        return
    # set_is_last_backward, which is for several forward passes before a backward pass, stays True.
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)


def _check_static(reducing: list[Any], micro_batches: int) -> None:
    """After backward passes under no_sync, torch 2.1 to 2.13 reduce a static graph's gradients no more, and do not say
    so: their hooks are counted as if they were of the first reduction (PyTorch's pull request 187732)."""
    if micro_batches > 1 and any(getattr(module, "static_graph", False) is True for module in reducing):
        raise ValueError(
            "DistributedDataParallel with static_graph=True cannot accumulate gradients over micro-batches: after "
            "no_sync, PyTorch does not reduce them; allowed: static_graph=False, or one micro-batch"
        )


def _meshes(reducing: list[Any]) -> Iterator[Any]:
    """The process groups over which parameters are sharded."""
    parameters = (each for module in reducing if isinstance(module, nn.Module) for each in module.parameters())
    meshes = dict.fromkeys(each.device_mesh for each in parameters if hasattr(each, "device_mesh"))
    for mesh in meshes:
        for dimension in range(mesh.ndim):
            yield mesh.get_group(dimension)


def _same_number(micro_batches: int, group: Any, check: Callable[[], None]) -> None:
    """On every rank of the group, for models that communicate in every forward pass."""
    exchange = as_exchange(Exchange(group))
    if exchange is None:
        return check()
    _, counts = agreement.agree(exchange, "agreement on micro-batches", check, lambda _: [micro_batches])
    if len({count for (count,) in counts}) > 1:
        raise ValueError(f"every rank must bring as many micro-batches, but there are {[count for (count,) in counts]}")


class _Engine:
    """DeepSpeed. The boundary is set by hand around each micro-batch and gradients are never divided by the configured
    number of accumulation steps, so that number does not matter. (no_sync is refused under ZeRO 2 and 3; coalesced
    reduction holds whole gradients, and is wrong where that number is not 1.)"""

    def __init__(self, engine: Any, micro_batches: int, check: Callable[[], None]) -> None:
        if not getattr(engine, "managed_gradient_accumulation", lambda: True)():
            raise RuntimeError("the engine has managed_gradient_accumulation=false; set it to true for two passes")
        self.engine = engine
        # Every micro-batch communicates under ZeRO 2 and 3.
        _same_number(micro_batches, getattr(engine, "data_parallel_group", None), check)

    @contextmanager
    def part(self, last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def loss_scale(self) -> float:
        """Each kind of optimizer keeps it in another place, and those without float16 have none."""
        optimizer = self.engine.optimizer
        for owner in (self.engine, optimizer):
            for name in ("torch_autocast_z0_gradscaler", "torch_autocast_gradscaler"):
                if getattr(owner, name, None) is not None:
                    return float(getattr(owner, name).get_scale())
        config = getattr(optimizer, "loss_scale_config", optimizer)
        return float(getattr(config, "cur_scale", 1.0))

    def backward(self, scalar: Tensor) -> None:
        # The option is not in every version; with 1, nothing is divided.
        options = {} if self.engine.gradient_accumulation_steps() == 1 else {"scale_wrt_gas": False}
        self.engine.backward(scalar, **options)

    def run(self, second_pass: Callable[[], None]) -> None:
        second_pass()
