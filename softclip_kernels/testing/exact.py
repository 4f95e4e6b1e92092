"""Whether training with a distributed contrastive loss follows the gradient of the whole batch, of any loss, model and
wrapper; see docs/exactness.md.

    report = check_exact(model, batch, loss)      # or assert_exact, which raises
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..distributed import whole
from ..distributed.accumulation import is_engine
from ..distributed.exchange import WORLD, Exchange, as_exchange
from ..targets.base import Target, check_target
from .defects import DenseReference, Features, OwnReference, Part, Reference, called, defects, norm, total
from .exact_report import Explanation, Found, Report, Truth, differences, judge, sizes
from .standard import InsensitiveError

if TYPE_CHECKING:
    from typing_extensions import Unpack

# What rounding may cost of a parameter's gradient, by the parameters' dtype. The tests' towers cost below 1e-5 in
# float32 and 1e-12 in float64; deeper ones round more. A model under autocast needs a tolerance of its own.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
SAME = 1e-9  # below it two float64 gradients are one


class Options(TypedDict, total=False):
    """Options of check_exact beside the model, the batch and the loss; see there."""

    step: Callable[[Any, Any], Any] | None
    group: Any
    target: Target | None
    reference: Callable[..., Tensor] | None
    micro_batches: int | None
    tolerance: float | None


def check_exact(
    model: nn.Module, batch: Any, loss: Callable[..., Tensor] | None = None, **options: Unpack[Options]
) -> Report:
    """Runs one step on this rank's batch, and compares the gradients it leaves on every rank with those of one process
    that has the whole batch, in float64. Every rank calls it, and gets the same report.

    model          as it is trained: bare, or in DistributedDataParallel, fully_shard, torch.compile, or a DeepSpeed
                   engine. Called as model(*batch) for a tuple, model(**batch) for a dict, else model(batch)
    batch          this rank's share: tensors of shape (samples, ...) in tuples, lists and dicts; the whole batch is
                   their concatenation in rank order. Shares may differ in size if the loss takes that
    loss           loss(*outputs), or loss(**outputs) of a dict: the scalar that this rank calls backward on
    step           in place of `loss`, step(model, batch): all that comes before the optimizer's step, forward and
                   backward; leaves gradients where the optimizer looks for them, and returns the loss or None
    group          the process group that trains; None: the default one where there is one, else this process alone
    target         the exact loss is softclip_loss's with this target of the whole batch; None: CLIP's
    reference      any other exact loss, reference(*outputs) or reference(**outputs), given the whole batch's outputs
    micro_batches  in how many the step cuts each rank's share: tells what accumulation does wrong by its name
    tolerance      up to which a gradient is exact, relative to its size; None: TOLERANCES of the coarsest parameter

    The truth takes a float64 copy of the model and the graph of the whole batch on every rank, on the model's device:
    take a small batch. Parameters are left as they are, gradients are cleared before and after; a DeepSpeed engine
    above ZeRO-0 keeps a share of them until its next step, so check one that is not trained further.

    Raises TypeError or ValueError, on all ranks, for what cannot be compared: dropout or BatchNorm in training mode, a
    model that draws random numbers, FullyShardedDataParallel, a step that changes parameters; InsensitiveError where
    the tolerance would let a known defect pass; and what the step itself raises, on the rank where it does.
    """
    return _Check(model, batch, loss, **options).run()


def assert_exact(
    model: nn.Module, batch: Any, loss: Callable[..., Tensor] | None = None, **options: Unpack[Options]
) -> Report:
    """check_exact, with AssertionError and the table on every rank where the gradient is not exact."""
    report = check_exact(model, batch, loss, **options)
    if not report.ok:
        raise AssertionError(str(report))
    return report


@dataclass(frozen=True)
class _Check:
    """One call of check_exact, with its arguments."""

    model: nn.Module
    batch: Any
    loss: Callable[..., Tensor] | None = None
    step: Callable[[Any, Any], Any] | None = None
    group: Any = None
    target: Target | None = None
    reference: Callable[..., Tensor] | None = None
    micro_batches: int | None = None
    tolerance: float | None = None

    def run(self) -> Report:
        exchange = as_exchange(WORLD if self.group is None else self.group)
        whole.together(exchange, "checks of arguments", self._check)
        module = whole.unwrapped(self.model)
        everybodys, samples = whole.gather_batch(self.batch, exchange)
        parameters = whole.full_parameters(module)
        digests = _digests(parameters)
        truth = whole.together(
            exchange, "the exact gradient", lambda: self._truth(module, parameters, everybodys, samples)
        )
        _clear_gradients(module)
        loss = self._step()  # not `together`: ranks communicate in it, and may wait for one another already
        gradients = whole.full_gradients(self.model, module, exchange)
        _clear_gradients(module)
        after = _digests(whole.full_parameters(module))
        found = _over_ranks([gradients[name] for name in truth.names], truth, digests, exchange)
        losses = whole.gather(loss, exchange)

        def verdict() -> Report:
            if after != digests:
                raise ValueError("the step changed parameters; leave the optimizer's step out of step=")
            return judge(truth, found, samples, self._tolerance(), self.micro_batches)

        report = whole.together(exchange, "the verdict", verdict)
        # One for all, whatever the last bit of a rank's arithmetic says.
        return whole.gather(replace(report, loss=sum(losses) / len(losses)), exchange)[0]

    def _check(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, not {type(self.model).__name__}")
        if (self.loss is None) == (self.step is None):
            given = "neither" if self.loss is None else "both"
            raise ValueError(f"give either loss or step=, not {given}")
        if self.target is not None and self.reference is not None:
            raise ValueError("give target= or reference=, not both; a reference is the whole loss")
        if self.target is not None:
            check_target("target", self.target)
        if self.micro_batches is not None and self.micro_batches < 1:
            raise ValueError(f"micro_batches={self.micro_batches}; at least 1 is needed, or None")
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance={self.tolerance} must lie in (0, 1); it is relative to a gradient's size")
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError("no parameter of the model requires a gradient; there is nothing to compare")
        _refuse_modules(self.model)
        engine: Any = self.model if is_engine(self.model) else None
        steps = 1 if engine is None else engine.gradient_accumulation_steps()
        if self.loss is not None and steps != 1:
            raise ValueError(
                f"the engine accumulates over gradient_accumulation_steps={steps}; give step=, which runs all of them"
            )

    def _tolerance(self) -> float:
        if self.tolerance is not None:
            return self.tolerance
        learning = (parameter.dtype for parameter in self.model.parameters() if parameter.requires_grad)
        return max(TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16]) for dtype in learning)

    def _step(self) -> float:
        """This rank's loss, NaN for a step that returns none."""
        if self.step is not None:
            value = self.step(self.model, self.batch)
            return float(value.detach()) if isinstance(value, Tensor) and value.numel() == 1 else math.nan
        assert self.loss is not None
        value = called(self.loss, called(self.model, self.batch))
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise TypeError(f"the loss must return a tensor of one element, not {type(value).__name__}; give step=")
        engine: Any = self.model if is_engine(self.model) else None
        (torch.Tensor.backward if engine is None else engine.backward)(value)
        return float(value.detach())

    def _truth(self, module: nn.Module, parameters: dict[str, Tensor], batch: Any, samples: list[int]) -> Truth:
        bare = whole.bare_double(module, parameters)
        batch = tree_map(lambda each: each.double() if _is_floating(each) else each, batch)
        try:
            outputs = called(bare, batch)
        except RuntimeError as error:
            raise RuntimeError(
                f"the model in float64 failed: {error}; in its forward pass, cast to the dtype of its parameters or "
                "inputs (as x.to(self.weight.dtype)), not to float32 or a 16-bit one"
            ) from error
        with torch.no_grad():
            again = called(bare, batch)
        for one, other in zip(tree_leaves(outputs), tree_leaves(again), strict=True):
            if isinstance(one, Tensor) and not torch.allclose(one, other, rtol=SAME, atol=SAME, equal_nan=True):
                raise ValueError(
                    "the model returns other outputs for the same batch when called again, so that no gradient is the "
                    "exact one: switch off what draws random numbers (model.eval(), or its probability 0)"
                )
        learning = {name: each for name, each in bare.named_parameters() if each.requires_grad}
        features = Features(outputs, list(learning.values()), samples)
        loss, parts = features.gradients(self._reference())
        truth = Truth(list(learning), loss, parts, lambda: self._explanations(features, parts))
        if not math.isfinite(truth.loss) or not math.isfinite(norm(total(truth.parts))):
            raise ValueError(f"the exact loss is {truth.loss}, or its gradient is not finite; take another batch")
        if norm(total(truth.parts)) == 0:
            raise InsensitiveError("the exact gradient is 0 everywhere; take a batch and weights that learn something")
        return truth

    def _explanations(self, features: Features, exact: Sequence[Part]) -> Iterator[Explanation]:
        """Of the defects that this loss and this batch can have, one by one: their gradients take memory."""
        right = total(exact)
        for defect in defects(self._reference(), features.counts, self.micro_batches):
            try:
                parts = features.gradients(defect.loss)[1]
            except Exception:  # anyone's reference may know the whole batch only, as labels and groups do
                continue
            off = max(differences(total(parts), right))
            if SAME < off <= self._tolerance():
                raise InsensitiveError(
                    f"with a tolerance of {self._tolerance():g} this would pass: {defect.what}; its gradient is only "
                    f"{off:.1e} away on this batch: take float32 or float64, or a batch whose pairs are contested"
                )
            if off > SAME:
                yield Explanation(f"{defect.what}. Way out: {defect.way_out}", parts)

    def _reference(self) -> Reference:
        return DenseReference(self.target) if self.reference is None else OwnReference(self.reference)


def _over_ranks(
    gradients: Sequence[Tensor | None], truth: Truth, digests: dict[str, str], exchange: Exchange | None
) -> Found:
    theirs = whole.gather(digests, exchange)
    found = Found([], [], [], [name for name in digests if len({each[name] for each in theirs}) > 1])
    exact = total(truth.parts)
    for gradient, right, size in zip(gradients, exact, sizes(exact), strict=True):
        everyones = whole.gather(gradient, exchange)
        full = [torch.zeros_like(right) if one is None else one for one in everyones]
        mean = torch.stack(full).mean(0)
        found.mean.append(mean)
        found.between.append(max((one - mean).norm().item() for one in full) / size)
        found.missing.append(tuple(rank for rank, one in enumerate(everyones) if one is None))
    return found


def _clear_gradients(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = None


def _digests(parameters: dict[str, Tensor]) -> dict[str, str]:
    return {
        name: hashlib.sha256(each.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, each in parameters.items()
    }


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _refuse_modules(model: nn.Module) -> None:
    """What draws random numbers or mixes samples, by name."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind == "FullyShardedDataParallel":
            raise ValueError(f"{name or 'model'} is a {kind}, which keeps parameters flat; use fully_shard")
        if not module.training:
            continue
        chances = {key: getattr(module, key, 0) for key in ("p", "prob", "drop_prob", "dropout")}
        drawn = {key: chance for key, chance in chances.items() if isinstance(chance, float) and chance > 0}
        if drawn and ("drop" in kind.lower() or "dropout" in drawn):
            key, chance = next(iter(drawn.items()))
            raise ValueError(
                f"{name} ({kind}) is in training mode with {key}={chance}, and draws other numbers in the reference: "
                f"call model.eval() before the check, or set {key} to 0"
            )
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            raise ValueError(
                f"{name} ({kind}) is in training mode: its statistics are each rank's or micro-batch's own, so that no "
                "step is that of the whole batch; call model.eval() before the check, or use SyncBatchNorm"
            )
