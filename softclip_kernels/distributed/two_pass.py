"""Large batches on little memory: encode twice, so that one micro-batch's activations are held at a time.

A contrastive loss couples all pairs of a batch, so accumulating gradients over micro-batches optimises another loss.
But it sees a pair only through its embeddings: encode every micro-batch without a graph, take the loss and its gradient
on the embeddings of the whole batch, then encode each micro-batch again, now with a graph, and send its part of that
gradient through it. After Gao, Zhang, Han and Callan, "Scaling Deep Contrastive Learning Batch Size under Memory
Limited Setup", 2021 (GradCache).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from . import agreement
from .exchange import Exchange, as_exchange


class TwoPass:
    """One optimizer step's forward and backward pass.

        passes = TwoPass(model, micro_batches)                  # encodes without a graph
        loss = softclip_loss(*passes.outputs, group=group)      # any loss of the outputs
        passes.backward(loss)                                   # encodes again, with a graph
        optimizer.step()                                        # or engine.step(), once

    model          a module, DistributedDataParallel (or whatever has its no_sync), or a DeepSpeed engine of any ZeRO
                   stage. Called as model(*micro_batch), it returns a tuple of tensors: embeddings, of two dimensions
                   or more with a row for each sample, and single numbers (the logit scale), of shape () or (1,), which
                   are the same for every micro-batch
    micro_batches  tuples of arguments, of any sizes, for example zip(images.split(64), texts.split(64))
    locked         k for each argument k from which output k alone is made, by nothing that is trained (a locked tower).
                   That output needs no gradient, and the second pass gets None for that argument

    `outputs` are the model's, over the whole batch, as leaves. The gradient is that of one pass over the whole batch,
    the logit scale's included, with the second pass drawing the random numbers of the first, under the first one's
    autocast: dropout and dtypes are the same in both, and `backward` may be called after autocast's block. Gradients
    are reduced over ranks once, in the last micro-batch (under ZeRO 2 and 3, which hold no more than a share of them,
    after each). A module that changes state in its forward pass, such as BatchNorm, does so twice.
    """

    def __init__(self, model: Any, micro_batches: Sequence[tuple[Any, ...]], locked: Collection[int] = ()) -> None:
        self.model = model
        self.micro_batches = list(micro_batches)
        self._accumulation = _accumulation(model, len(self.micro_batches))
        if not self.micro_batches:
            raise ValueError("micro_batches is empty; at least one is needed")
        self._autocast = _Autocast()
        self._random_states: list[_RandomState] = []
        parts: list[tuple[Tensor, ...]] = []
        with torch.no_grad(), self._accumulation.part(last=False):
            for batch in self.micro_batches:
                self._random_states.append(_RandomState(_devices(model, batch)))
                parts.append(_checked(model(*batch)))
        # Autocast remembers casts of parameters. Before PyTorch's pull request 165068, the second pass would get those
        # of the first, which have no graph.
        torch.clear_autocast_cache()
        self._locked = frozenset(locked)
        self._trained = [k for k in range(len(parts[0])) if k not in self._locked]
        self._kinds = [[(part[k].shape, part[k].dtype) for k in self._trained] for part in parts]
        self.outputs = tuple(
            (same[0] if _is_number(same[0]) else torch.cat(same)).detach().requires_grad_(k in self._trained)
            for k, same in enumerate(zip(*parts, strict=True))
        )

    def backward(self, loss: Tensor) -> None:
        """Accumulate the parameters' gradients of `loss`, a scalar function of `outputs`; call it once."""
        if not self._random_states:
            raise RuntimeError("backward was called before; a TwoPass is good for one step")
        # An output's gradient has the output's dtype. In float16 it would be rounded to nothing, unless it is scaled as
        # the framework will scale it in the second pass.
        scale = self._accumulation.loss_scale()
        trained = [self.outputs[k] for k in self._trained]
        scaled = torch.autograd.grad(loss * scale, trained, allow_unused=True, materialize_grads=True)
        gradients = [gradient.to(torch.promote_types(gradient.dtype, loss.dtype)) / scale for gradient in scaled]
        last = len(self.micro_batches) - 1
        begins = [0] * len(trained)
        for index, (batch, random_state) in enumerate(zip(self.micro_batches, self._random_states, strict=True)):
            random_state.restore()
            with self._accumulation.part(last=index == last):
                arguments = (None if k in self._locked else argument for k, argument in enumerate(batch))
                with self._autocast.again():
                    outputs = _checked(self.model(*arguments), self._locked)
                terms = []
                for k, (output, (shape, dtype)) in enumerate(zip(outputs, self._kinds[index], strict=True)):
                    if (output.shape, output.dtype) != (shape, dtype):
                        raise RuntimeError(
                            f"output {self._trained[k]} had shape {tuple(shape)} and {dtype} in the first pass and has "
                            f"{tuple(output.shape)} and {output.dtype} in the second; the model must do the same twice"
                        )
                    output = output.to(gradients[k].dtype)
                    if _is_number(output):  # counted once; in the others as 0, so that no parameter is ever unused
                        terms.append((output * (gradients[k] if index == last else 0.0)).sum())
                        continue
                    part = gradients[k][begins[k] : begins[k] + len(output)]
                    begins[k] += len(output)
                    terms.append((output * part).sum())
                self._accumulation.backward(torch.stack([term.to(loss.dtype) for term in terms]).sum())
        self._random_states = []


def _checked(outputs: Any, left_out: Collection[int] = ()) -> tuple[Tensor, ...]:
    if not isinstance(outputs, (tuple, list)) or not all(isinstance(output, Tensor) for output in outputs):
        raise TypeError(f"the model must return a tuple of tensors, not {type(outputs).__name__}")
    kept = tuple(output for k, output in enumerate(outputs) if k not in left_out)
    for output in kept:
        if output.dim() < 2 and not _is_number(output):
            raise ValueError(
                f"the model returned shape {tuple(output.shape)}; allowed: (rows, width, ...) or one number, () or (1,)"
            )
    return kept


def _is_number(output: Tensor) -> bool:
    return output.dim() < 2 and output.numel() == 1


def _devices(model: Any, arguments: Sequence[Any]) -> set[torch.device]:
    """Where the model may draw random numbers, beside the CPU: its arguments may come as CPU tensors that it, or
    DistributedDataParallel, moves; its parameters may wait on the CPU and be moved (DeepSpeed's offloading)."""
    module = model if isinstance(model, torch.nn.Module) else torch.nn.Module()
    tensors = chain(module.parameters(), module.buffers(), tree_leaves(arguments))
    devices = {tensor.device for tensor in tensors if isinstance(tensor, Tensor)}
    own = getattr(model, "device", None)
    if isinstance(own, (torch.device, str)):
        devices.add(torch.device(own))
    return {device for device in devices if device.type not in ("cpu", "meta")}


class _RandomState:
    """The generators of the CPU and of some devices, as they stand."""

    def __init__(self, devices: set[torch.device]) -> None:
        self.cpu = torch.get_rng_state()
        self.others = {device: torch.get_device_module(device.type).get_rng_state(device) for device in devices}

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.others.items():
            torch.get_device_module(device.type).set_rng_state(state, device)


class _Autocast:
    """Autocast as it stands, of the CPU and of the accelerator."""

    def __init__(self) -> None:
        accelerator = torch.accelerator.current_accelerator()
        self.options: list[dict[str, Any]] = [
            {
                "device_type": kind,
                "enabled": torch.is_autocast_enabled(kind),
                "dtype": torch.get_autocast_dtype(kind),
                "cache_enabled": torch.is_autocast_cache_enabled(),
            }
            for kind in ("cpu", *([] if accelerator is None else [accelerator.type]))
        ]

    @contextmanager
    def again(self) -> Iterator[None]:
        with ExitStack() as stack:
            for options in self.options:
                stack.enter_context(torch.autocast(**options))
            yield


class _Accumulation(Protocol):
    """How a framework is told that more micro-batches will follow."""

    def part(self, last: bool) -> AbstractContextManager[None]: ...

    def loss_scale(self) -> float: ...

    def backward(self, scalar: Tensor) -> None: ...


def _accumulation(model: Any, micro_batches: int) -> _Accumulation:
    """By what the model can do, not by its type or version."""
    if hasattr(model, "set_gradient_accumulation_boundary"):
        return _Engine(model, micro_batches)
    return _Module(model)


class _Module:
    def __init__(self, model: Any) -> None:
        self.model = model

    def part(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last or not hasattr(self.model, "no_sync") else self.model.no_sync()

    def loss_scale(self) -> float:
        return 1.0  # a GradScaler's is in the loss that it returns

    def backward(self, scalar: Tensor) -> None:
        scalar.backward()


class _Engine:
    """DeepSpeed. The boundary is set by hand around each micro-batch and gradients are never divided by the configured
    number of accumulation steps, so that number does not matter. (no_sync is refused under ZeRO 2 and 3; coalesced
    reduction holds whole gradients, and is wrong where that number is not 1.)"""

    def __init__(self, engine: Any, micro_batches: int) -> None:
        if not getattr(engine, "managed_gradient_accumulation", lambda: True)():
            raise RuntimeError("the engine has managed_gradient_accumulation=false; set it to true for two passes")
        self.engine = engine
        exchange = as_exchange(Exchange(getattr(engine, "data_parallel_group", None)))
        if exchange is not None:  # every micro-batch communicates under ZeRO 2 and 3
            _, counts = agreement.agree(exchange, "agreement on micro-batches", lambda: None, lambda _: [micro_batches])
            if len({count for (count,) in counts}) > 1:
                raise ValueError(
                    f"every rank must bring as many micro-batches, but there are {[count for (count,) in counts]}"
                )

    @contextmanager
    def part(self, last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def loss_scale(self) -> float:
        """What the engine multiplies a loss with before its backward pass; each kind of optimizer keeps it in another
        place, and those without float16 have none."""
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
