"""What is known to go wrong in a distributed contrastive loss: the gradient that each defect gives, computed from the
features of the whole batch, so that a gradient can be told by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map, tree_structure, tree_unflatten

from ..targets.base import Target
from ..targets.hard import Hard
from .dense import dense_row_losses, dense_target

FEATURES = ("image_features", "text_features", "logit_scale")  # as open_clip's models name them in a dict
DEAD = 1e-6  # a factor below it is 0, rounded
TRIPLE = tree_structure((0, 0, 0))


def called(function: Callable[..., Any], given: Any) -> Any:
    """function(*given) for a tuple or list, function(**given) for a dict, else function(given)."""
    if isinstance(given, Mapping):
        return function(**given)
    return function(*given) if isinstance(given, (tuple, list)) else function(given)


class DenseReference:
    """The dense loss of softclip_loss's `target` (None: CLIP's) on outputs (x, y, scale), or a dict of FEATURES."""

    def __init__(self, target: Target | None) -> None:
        self.target = target

    def __call__(self, outputs: Any) -> Tensor:
        rows, columns = self.rows_and_columns(*self.operands(outputs))
        return 0.5 * (rows.mean() + columns.mean())

    def operands(self, outputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        if isinstance(outputs, Mapping) and all(name in outputs for name in FEATURES):
            outputs = [outputs[name] for name in FEATURES]
        tensors = isinstance(outputs, (tuple, list)) and all(isinstance(output, Tensor) for output in outputs)
        if not tensors or [output.dim() for output in outputs[:2]] != [2, 2] or len(outputs) != 3:
            raise TypeError(
                f"the model returned {_described(outputs)}; the dense loss takes (x, y, scale), with x and y of shape "
                f"(rows, width), or a dict of {', '.join(FEATURES)}: give reference=, the loss of the whole batch"
            )
        x, y, scale = outputs
        return x, y, scale.reshape(())

    def rows_and_columns(self, x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return dense_row_losses(x, y, scale, dense_target(self.target or Hard(), x, y, scale))


class OwnReference:
    """Anyone's loss of the whole batch, called as the model's outputs say."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, outputs: Any) -> Tensor:
        value = called(self.function, outputs)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise TypeError(f"reference must return a scalar, not {_described(value)}")
        return value.reshape(())


Reference = DenseReference | OwnReference


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}: {', '.join(_described(each) for each in value)}"
    return f"a dict of {', '.join(map(str, value))}" if isinstance(value, Mapping) else f"a {type(value).__name__}"


@dataclass(frozen=True)
class Features:
    """What the reference model returned for the whole batch, with its graph; the parameters that learn behind it; and
    how many samples each rank has."""

    outputs: Any
    parameters: Sequence[Tensor]
    counts: Sequence[int]

    def gradients(self, loss: Callable[[Any], Tensor]) -> tuple[float, list[Part]]:
        """The loss's value; and of each output that learns, every parameter's gradient through it alone."""
        paths, structure = tree_flatten_with_path(self.outputs)
        leaves = [leaf for _, leaf in paths]
        learning = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not learning:
            raise ValueError(
                f"no gradient reaches what the model returned, {_described(self.outputs)}; it must return tensors, "
                "in tuples, lists or dicts, of parameters that learn"
            )
        cut = [leaf.detach().requires_grad_() if k in learning else leaf for k, leaf in enumerate(leaves)]
        value = loss(tree_unflatten(cut, structure))
        into = torch.autograd.grad(value, [cut[k] for k in learning], allow_unused=True, materialize_grads=True)
        parts = []
        for k, gradient in zip(learning, into, strict=True):
            through = torch.autograd.grad(leaves[k], self.parameters, gradient, retain_graph=True, allow_unused=True)
            none = torch.zeros((), dtype=torch.float64)  # of no memory, whatever the shape: most are, of two towers
            gradients = [
                none.expand(parameter.shape) if each is None else each.cpu()
                for parameter, each in zip(self.parameters, through, strict=True)
            ]
            name = ("x", "y", "scale")[k] if structure == TRIPLE else f"output{keystr(paths[k][0])}"
            parts.append(Part(name, leaves[k].numel() == 1, gradients))
        return value.item(), parts


@dataclass(frozen=True)
class Part:
    """The gradient of every parameter through one output, which is a single number (the scale) or embeddings."""

    name: str
    number: bool
    gradients: list[Tensor]

    def norm(self) -> float:
        return norm(self.gradients)


def norm(tensors: Sequence[Tensor]) -> float:
    return sum(tensor.square().sum().item() for tensor in tensors) ** 0.5


@dataclass(frozen=True)
class Defect:
    """`loss`: a scalar function of the whole batch's outputs whose gradient is what ranks with this defect are left
    with once a wrapper has averaged it."""

    what: str
    way_out: str
    loss: Callable[[Any], Tensor]


GATHER = "gather the embeddings of every rank with their gradient, as softclip_loss(..., group=group) does"


def defects(reference: Reference, counts: Sequence[int], micro_batches: int | None) -> Iterator[Defect]:
    """Those that this number of ranks and of micro-batches can have. A loss may raise where its reference knows the
    whole batch only."""
    n, least = sum(counts), min(counts)
    begins = [sum(counts[:rank]) for rank in range(len(counts))]
    shares = [torch.arange(begin, begin + count) for begin, count in zip(begins, counts, strict=True)]

    def take(outputs: Any, index: Tensor) -> Any:
        def of(output: Any) -> Any:
            rows = isinstance(output, Tensor) and output.dim() > 0 and len(output) == n
            return output[index.to(output.device)] if rows else output

        return tree_map(of, outputs)

    def mean_over(parts: Sequence[Tensor]) -> Callable[[Any], Tensor]:
        return lambda outputs: torch.stack([reference(take(outputs, part)) for part in parts if len(part)]).mean()

    if len(counts) > 1:
        yield Defect("local negatives: each rank contrasts its own pairs only", GATHER, mean_over(shares))
        if isinstance(reference, DenseReference):
            yield from _of_gathering(reference, shares)
        if least < max(counts):
            yield Defect(
                f"the uneven tail is dropped: every rank keeps {least} of its {', '.join(map(str, counts))} samples",
                "use a loss that takes shares of different sizes, or samplers that make them equal",
                lambda outputs: reference(take(outputs, torch.cat([share[:least] for share in shares]))),
            )
    if micro_batches is not None and micro_batches > 1:
        cut = [share.tensor_split(micro_batches) for share in shares]
        way_out = "use two passes (softclip_kernels.TwoPass), so that all micro-batches are contrasted with one another"
        yield Defect(
            "each micro-batch is contrasted within itself: accumulation computes another loss",
            way_out,
            mean_over([torch.cat(parts) for parts in zip(*cut, strict=True)]),
        )
        if len(counts) > 1:
            yield Defect(
                "each micro-batch of each rank is contrasted within itself",
                way_out,
                mean_over([part for parts in cut for part in parts]),
            )
        whole = [share[: len(share) // micro_batches * micro_batches] for share in shares]
        if sum(map(len, whole)) < n:
            yield Defect(
                f"the tail is dropped that {micro_batches} equal micro-batches leave over",
                "let micro-batches differ in size: torch.tensor_split, or a last one that is smaller",
                lambda outputs: reference(take(outputs, torch.cat(whole))),
            )


def _of_gathering(reference: DenseReference, shares: Sequence[Tensor]) -> Iterator[Defect]:
    """Every rank takes the loss of its own rows and columns against all that is gathered."""

    def of_ranks(rows: Tensor, columns: Tensor) -> Tensor:
        return torch.stack([0.5 * (rows[own].mean() + columns[own].mean()) for own in shares if len(own)]).mean()

    def queries(outputs: Any) -> Tensor:
        x, y, scale = reference.operands(outputs)
        rows, _ = reference.rows_and_columns(x, y.detach(), scale)
        _, columns = reference.rows_and_columns(x.detach(), y, scale)
        return of_ranks(rows, columns)

    def own_rows(outputs: Any) -> Tensor:
        x, y, scale = reference.operands(outputs)
        losses = []
        for own in shares:
            mine = torch.zeros(len(x), 1, dtype=torch.bool, device=x.device)
            mine[own] = True
            a, b = (torch.where(mine, each, each.detach()) for each in (x, y))
            rows, columns = reference.rows_and_columns(a, b, scale)
            losses.append(0.5 * (rows[own].mean() + columns[own].mean()))
        return torch.stack(losses).mean()

    def unshifted(outputs: Any) -> Tensor:
        x, y, scale = reference.operands(outputs)
        z = scale * x @ y.T
        labels = torch.arange(len(x), device=x.device)
        losses = [F.cross_entropy(side[own], labels[: len(own)]) for side in (z, z.T) for own in shares]
        return torch.stack(losses).mean()

    yield Defect(
        "gathered without gradient: each rank's rows learn as queries, and nobody's learn as the columns that others "
        "see (open_clip's --local-loss without --gather-with-grad)",
        GATHER,
        queries,
    )
    yield Defect(
        "gathered without gradient: each rank takes the loss of its own rows, which learn from that loss alone and "
        "not as the columns that other ranks see",
        GATHER,
        own_rows,
    )
    target = reference.target or Hard()
    if isinstance(target, Hard) and target.labels is None and target.groups is None and not target.smoothing:
        yield Defect(
            "labels without the rank's offset: every rank takes the first columns for its own",
            "add the number of columns of the ranks before this one to its labels",
            unshifted,
        )
    if len({len(own) for own in shares}) > 1:
        yield Defect(
            "every rank's mean counts alike, whatever its share: samples of small shares weigh more",
            "weigh a rank's mean by ranks * its samples / all samples, as softclip_loss(..., group=group) does",
            lambda outputs: of_ranks(*reference.rows_and_columns(*reference.operands(outputs))),
        )


def fit(found: Sequence[Tensor], parts: Sequence[Part]) -> tuple[list[float], list[Tensor]]:
    """The factor of each part with which their sum comes nearest to what was found, and that sum. A part without a
    gradient has factor 1."""
    sizes = [part.norm() for part in parts]
    some = [k for k, size in enumerate(sizes) if size > 0]
    gram = torch.eye(len(some), dtype=torch.float64)
    right = torch.zeros(len(some), dtype=torch.float64)
    for i, k in enumerate(some):
        right[i] = _product(parts[k].gradients, found) / sizes[k]
        for j, other in enumerate(some):
            gram[i, j] = _product(parts[k].gradients, parts[other].gradients) / (sizes[k] * sizes[other])
    factors = [1.0] * len(parts)
    for k, factor in zip(some, (torch.linalg.pinv(gram, hermitian=True) @ right).tolist(), strict=True):
        factors[k] = factor / sizes[k]
    return factors, combined(parts, factors)


def total(parts: Sequence[Part]) -> list[Tensor]:
    return combined(parts, [1.0] * len(parts))


def combined(parts: Sequence[Part], factors: Sequence[float]) -> list[Tensor]:
    columns = zip(*(part.gradients for part in parts), strict=True)
    return [
        sum((f * gradient for f, gradient in zip(factors, column, strict=True)), torch.zeros_like(column[0]))
        for column in columns
    ]


def _product(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum((x * y).sum().item() for x, y in zip(a, b, strict=True))


def factor_words(parts: Sequence[Part], factors: Sequence[float], ranks: int, micro_batches: int | None) -> str:
    """What it means that the gradient is the right one but for a factor through each output; "" if all are 1."""
    if all(near(factor, 1) for factor in factors):
        return ""
    embeddings, numbers = (
        [f for part, f in zip(parts, factors, strict=True) if part.number == number and part.norm() > 0]
        for number in (False, True)
    )
    e, s = _common(embeddings), _common(numbers)
    listed = "the gradient is the exact one times " + ", ".join(
        f"{ratio_name(f, ranks, micro_batches)} through {part.name}" for part, f in zip(parts, factors, strict=True)
    )
    dead = [part.name for part, f in zip(parts, factors, strict=True) if abs(f) < DEAD]
    if dead:
        return f"nothing learns through {' and '.join(dead)} (detached, or computed without a graph): {listed}"
    if e is None or s is None:
        return listed
    if ranks > 1 and embeddings and numbers and near(e, 1 / ranks) and near(s, 1):
        return (
            "averaged once too often, but for the scale: features are gathered without gradient, every rank computes "
            "the whole loss and learns from its own rows, and the wrapper averages what should be added (open_clip "
            f"without --local-loss and --gather-with-grad): {listed}. Way out: {GATHER}"
        )
    said = [] if near(e, 1) and embeddings else [uniform_words(e if embeddings else s, ranks, micro_batches)]
    if embeddings and not near(s, e) and numbers:
        more = ratio_name(s / e, ranks, micro_batches)
        said.append(
            f"the scale is counted {more} times where the encoders are counted once: each micro-batch, or each rank, "
            "adds its whole gradient; let it learn in one of them only"
            if round(s / e) > 1 and near(s / e, round(s / e))
            else f"the scale gets {more} of its gradient where the encoders get theirs"
        )
    return f"{', and '.join(said)}: {listed}"


def near(a: float, b: float) -> bool:
    return abs(a - b) <= 2e-3 * max(abs(a), abs(b))


def _common(factors: Sequence[float]) -> float | None:
    """The one factor of all; 1 of none; None where they differ."""
    if not factors:
        return 1.0
    return factors[0] if all(near(f, factors[0]) for f in factors) else None


def uniform_words(ratio: float, ranks: int, micro_batches: int | None) -> str:
    """What it means that gradients are this ratio of the right ones."""
    inverse = 1 / ratio if ratio else 0.0
    said = []
    if abs(ratio) < DEAD:
        return "no gradient"
    if ranks > 1 and near(inverse, ranks):
        said.append("averaged once too often: the loss is divided by the ranks, and the wrapper divides once more")
    if ranks > 1 and near(ratio, ranks):
        said.append("summed over ranks, not averaged")
    if micro_batches and micro_batches > 1 and near(ratio, micro_batches):
        said.append(f"counted {micro_batches} times: accumulated over micro-batches, and not divided by them")
    if micro_batches and micro_batches > 1 and near(inverse, micro_batches):
        said.append(f"1/{micro_batches} of it: divided by micro-batches of which each has its share only")
    if not said and ratio >= 256 and near(ratio, 2.0 ** round(torch.tensor(ratio).log2().item())):
        said.append("still multiplied by a loss scale: unscale gradients at the end of the step")
    if not said and round(ratio) > 1 and near(ratio, round(ratio)):
        said.append(f"counted {round(ratio)} times: accumulated, or added up over ranks, and not divided")
    if not said and round(inverse) > 1 and near(inverse, round(inverse)):
        said.append(f"1/{round(inverse)} of it: divided once too often")
    return ", or ".join(said) or "wrong size"


def ratio_name(value: float, ranks: int, micro_batches: int | None) -> str:
    """The number as a reader knows it: an integer or one over it, where it is that."""
    if abs(value) < DEAD or value > 64:
        return f"{value:.0f}"
    for number in sorted({1, ranks, micro_batches or 1, *range(2, 65)}):
        if near(value, number):
            return str(number)
        if near(value, 1 / number):
            return f"1/{number}"
    return f"{value:.4f}"
