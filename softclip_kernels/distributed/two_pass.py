"""Large batches on little memory: encode twice, so that one micro-batch's activations are held at a time.

A contrastive loss couples all pairs of a batch, so accumulating gradients over micro-batches optimises another loss.
But it sees a pair only through its embeddings: encode every micro-batch without a graph, take the loss and its gradient
on the embeddings of the whole batch, then encode each micro-batch again, now with a graph, and send its part of that
gradient through it. After Gao, Zhang, Han and Callan, "Scaling Deep Contrastive Learning Batch Size under Memory
Limited Setup", 2021 (GradCache).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import nested, outputs, replay
from .accumulation import accumulation
from .nested import Path

MicroBatch = Sequence[Any] | Mapping[str, Any]


class TwoPass:
    """One optimizer step's forward and backward pass.

        passes = TwoPass(model, micro_batches)                  # encodes without a graph
        loss = softclip_loss(*passes.outputs, group=group)      # any loss of the outputs
        passes.backward(loss)                                   # encodes again, with a graph
        optimizer.step()                                        # or engine.step(), once

    model          a module, bare or in DistributedDataParallel (or whatever has its no_sync), one that fully_shard was
                   applied to, or a DeepSpeed engine of any ZeRO stage. It returns a tuple, a list, a mapping or a
                   dataclass, also nested, of
                   - floating tensors of two dimensions or more with a row for each sample: embeddings
                   - single floating numbers, of shape () or (1,), the same for every micro-batch: the logit scale
                   - integers and booleans, (rows, ...) or (), and None, which have no gradient
    micro_batches  tuples of arguments (model(*micro_batch)) or mappings (model(**micro_batch)), of any sizes, for
                   example zip(images.split(64), texts.split(64)); see also split_batch
    locked         arguments of which an output is made by nothing that is trained (a locked tower): k for argument k
                   and output k, a name for both of that name, or a mapping from argument to output. The output needs no
                   gradient, and the second pass gets None for the argument
    group          where nobody else reduces the gradients: the process group, "world", or the Exchange over whose ranks
                   `backward` averages what it adds to them. "unreduced": nobody shall. In a job of several ranks, a
                   model that does not reduce its own gradients needs one or the other; other models ignore it

    `outputs` are the model's, over the whole batch, as leaves, in the containers that the model returned (mappings as
    dicts). The gradient is that of one pass over the whole batch, the logit scale's included, with the second pass
    drawing the random numbers of the first, under the first one's autocast: dropout and dtypes are the same in both,
    and `backward` may be called after autocast's block. Gradients are reduced over ranks once, in the last micro-batch
    (under ZeRO 2 and 3, which hold no more than a share of them, after each). A module that changes state in its
    forward pass, such as BatchNorm, does so twice.

    ValueError and TypeError, before anything is computed: no micro-batches, or of another type; `locked` names no
    argument; nobody reduces the gradients; under fully_shard and DeepSpeed, ranks with different numbers of
    micro-batches. After the first micro-batch: outputs that cannot be joined.
    """

    def __init__(
        self,
        model: Any,
        micro_batches: Sequence[MicroBatch],
        locked: Collection[Any] | Mapping[Any, Any] = (),
        group: Any = None,
    ) -> None:
        self.model = model
        self.micro_batches = list(micro_batches)
        self._locked = dict(locked) if isinstance(locked, Mapping) else {name: name for name in locked}
        self._accumulation = accumulation(model, len(self.micro_batches), group, self._check)
        self._autocast = replay.Autocast()
        self._random_states: list[replay.RandomState] = []
        template: Any = None
        parts: list[dict[Path, Any]] = []
        with torch.no_grad(), self._accumulation.part(last=False):
            for index, batch in enumerate(self.micro_batches):
                self._random_states.append(replay.RandomState())
                returned = _call(model, batch)
                parts.append(outputs.checked(returned))
                template = template if index else returned
        # Autocast remembers casts of parameters. Before PyTorch's pull request 165068, the second pass would get those
        # of the first, which have no graph.
        torch.clear_autocast_cache()
        leaves = outputs.joined(parts)
        self._check_locked(leaves)
        self._trained = [
            path for path, leaf in leaves.items() if outputs.is_differentiable(leaf) and not self._is_locked(path)
        ]
        self._kinds = [{path: (part[path].shape, part[path].dtype) for path in self._trained} for part in parts]
        self._leaves = {path: leaves[path].requires_grad_() for path in self._trained}
        self.outputs = nested.rebuilt(template, leaves)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the parameters' gradients of `loss`, a scalar function of `outputs`; call it once. RuntimeError:
        it was called before; the loss, or the model in the second pass, asks for no gradient; the model does not do the
        same twice. With group=, one rank's error is every rank's."""
        if not self._random_states:
            raise RuntimeError("backward was called before; a TwoPass is good for one step")
        if not self._trained:
            raise RuntimeError("no output can have a gradient: all are locked, None, integers or booleans")
        # An output's gradient has the output's dtype. In float16 it would be rounded to nothing, unless it is scaled as
        # the framework will scale it in the second pass.
        scale = self._accumulation.loss_scale()
        scaled = torch.autograd.grad(loss * scale, list(self._leaves.values()), allow_unused=True)
        gradients = {
            path: None if each is None else each.to(torch.promote_types(each.dtype, loss.dtype)) / scale
            for path, each in zip(self._trained, scaled, strict=True)
        }
        self._accumulation.run(lambda: self._second_pass(gradients, loss.dtype))
        self._random_states = []

    def _second_pass(self, gradients: Mapping[Path, Tensor | None], dtype: torch.dtype) -> None:
        last = len(self.micro_batches) - 1
        begins = dict.fromkeys(self._trained, 0)
        for index, (batch, random_state) in enumerate(zip(self.micro_batches, self._random_states, strict=True)):
            random_state.restore()
            with self._accumulation.part(last=index == last):
                with self._autocast.again():
                    found = dict(nested.leaves(_call(self.model, batch, self._locked)))
                terms = []
                for path in self._trained:
                    output, gradient = self._same(path, found.get(path), index), gradients[path]
                    begin = begins[path]
                    begins[path] += 0 if outputs.is_number(output) else len(output)
                    if not output.requires_grad:  # made by nothing that is trained, which the first pass could not see
                        continue
                    # Parameters that get nothing here get zeros, so that none is ever unused.
                    if gradient is None:
                        terms.append(output.flatten()[:0].sum())
                    elif outputs.is_number(output):  # counted once
                        terms.append((output.to(gradient.dtype) * (gradient if index == last else 0.0)).sum())
                    else:
                        terms.append((output.to(gradient.dtype) * gradient[begin : begins[path]]).sum())
                if not terms:
                    raise RuntimeError(
                        f"no output of micro-batch {index} asks for a gradient in the second pass; allowed: a model "
                        f"with something trained in it, and backward with gradients enabled"
                    )
                self._accumulation.backward(torch.stack([term.to(dtype) for term in terms]).sum())

    def _check(self) -> None:
        if not self.micro_batches:
            raise ValueError("micro_batches is empty; at least one is needed")
        for index, batch in enumerate(self.micro_batches):
            if not isinstance(batch, (tuple, list, Mapping)):
                raise TypeError(
                    f"micro-batch {index} is a {type(batch).__name__}; allowed: a tuple of the model's arguments, for "
                    f"one argument (argument,), or a mapping from their names"
                )
            names = list(batch) if isinstance(batch, Mapping) else list(range(len(batch)))
            for name in self._locked:
                if name not in names:
                    raise ValueError(f"locked names the argument {name!r}; micro-batch {index} has {names}")

    def _check_locked(self, leaves: Collection[Path]) -> None:
        names = list(dict.fromkeys(path[0] for path in leaves))
        for name in self._locked.values():
            if name not in names:
                raise ValueError(
                    f"locked names the output {name!r}; the model returned {names}. Where an argument and its output "
                    f"have different names, pass a mapping from one to the other"
                )

    def _is_locked(self, path: Path) -> bool:
        return path[0] in self._locked.values()

    def _same(self, path: Path, output: Any, index: int) -> Tensor:
        """The output, which must be of the first pass's shape and dtype."""
        shape, dtype = self._kinds[index][path]
        if not isinstance(output, Tensor):
            raise RuntimeError(
                f"output {nested.spelled(path)} had shape {tuple(shape)} in the first pass and is a "
                f"{type(output).__name__} in the second; the model must do the same twice"
            )
        if (output.shape, output.dtype) != (shape, dtype):
            raise RuntimeError(
                f"output {nested.spelled(path)} had shape {tuple(shape)} and {dtype} in the first pass and has "
                f"{tuple(output.shape)} and {output.dtype} in the second; the model must do the same twice"
            )
        return output


def _call(model: Any, batch: MicroBatch, without: Collection[Any] = ()) -> Any:
    """`model` on a micro-batch, with None in the place of some arguments."""
    if isinstance(batch, Mapping):
        return model(**{name: None if name in without else argument for name, argument in batch.items()})
    return model(*(None if k in without else argument for k, argument in enumerate(batch)))
