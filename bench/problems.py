"""What is measured: operands, targets, the dense baselines, and the check that comes before every timing.

A benchmark makes `operands`, names its contenders (functions of x, y, scale that return the loss), calls `check`, times
them `interleaved` (timing.py), and adds rows, plain dictionaries, to a `Record` (records.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import softclip_kernels
from softclip_kernels import Hard, Mix, SelfTeacher, Target, Teacher, partition
from softclip_kernels.testing import (
    FIELDS,
    Result,
    Standard,
    bounds,
    check_sensitive,
    contested_cosine,
    sizes,
    tolerances,
)

SCALE = 14.3  # of the logits, where a benchmark names no other
SOFT_SHARE = 0.5  # of the pairs, in the PSD cases
TEACHER_SCALE = 14.3
LOSSES = ("hard", "psd", "psd_teacher")
FORWARD_PRODUCTS = {"hard": 2, "psd": 2, "psd_teacher": 4}  # multiples of N² D floating-point operations
PRODUCTS = {"hard": 8, "psd": 8, "psd_teacher": 12}  # the same, forward + backward
BUILT_IN = "linear_cross_entropy"  # of torch.nn.functional, from torch 2.13 on: no matrix of logits either
# It sums gradients and loss over pieces of the rows in the operands' dtype. Left alone it takes N / D of them on a CPU
# and twice as many on a GPU, 128 at N = 32768 and D = 512. So many leave bfloat16's loss off by up to 5 % and its
# gradients by 1 %; 16 leave them off by 0.9 % and 0.5 % (the same sums on a CPU, N = 1000 to 8192).
PIECES = 16

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, y, scale) -> 0-d loss


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def operands(
    n: int, d: int, dtype: torch.dtype, device: str = "cpu", scale: float = SCALE
) -> tuple[Tensor, Tensor, Tensor]:
    """x (n, d) and y (n, d) of unit norm, paired row by row, and the fp32 scale; leaves that want gradients. The pairs
    are as alike as in the middle of training at this scale, so that gradients are well above rounding."""
    x, y = _pairs(n, d, dtype, device, seed=0, cosine=contested_cosine(n, d, scale))
    return x.requires_grad_(), y.requires_grad_(), torch.tensor(scale, device=device).requires_grad_()


def _pairs(n: int, d: int, dtype: torch.dtype, device: str, seed: int, cosine: float) -> tuple[Tensor, Tensor]:
    """Two (n, d) of unit norm, row by row of about this cosine. Drawn on the device: a million rows take a CPU a
    minute."""
    generator = torch.Generator(device).manual_seed(seed)

    def unit_rows() -> Tensor:
        return F.normalize(torch.randn(n, d, device=device, generator=generator), dim=1)

    x = unit_rows()
    y = F.normalize(cosine * x + (1 - cosine**2) ** 0.5 * unit_rows(), dim=1)
    return x.to(dtype), y.to(dtype)


def target(loss: str, n: int, d: int, dtype: torch.dtype, device: str = "cpu") -> Target:
    """hard: CLIP. psd: half of the pairs are taught by the paired swap of the model's own distribution, tied scale.
    psd_teacher: half of the pairs are taught by another model's embeddings of width d."""
    if loss == "hard":
        return Hard()
    soft = soft_rows(n).to(device=device, dtype=torch.float32)
    if loss == "psd":
        return Mix(Hard(), SelfTeacher(swap="paired"), soft)
    if loss == "psd_teacher":
        a, b = teacher_embeddings(n, d, dtype, device)
        return Mix(Hard(), Teacher(a, b, TEACHER_SCALE), soft)
    raise ValueError(f"loss={loss!r} is not known; allowed: {', '.join(LOSSES)}")


def soft_rows(n: int) -> Tensor:
    """(n,) bool: the pairs that are taught, in the PSD cases."""
    return partition(n, round(SOFT_SHARE * n), seed=0, step=0)


def teacher_embeddings(n: int, d: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    return _pairs(n, d, dtype, device, seed=2, cosine=contested_cosine(n, d, TEACHER_SCALE))


def fused(loss_target: Target, backend: str = "auto") -> Loss:
    return lambda x, y, scale: softclip_kernels.softclip_loss(x, y, scale, loss_target, backend=backend)


def dense(
    loss: str, n: int, d: int, dtype: torch.dtype, device: str = "cpu", rounded: torch.dtype | None = None
) -> Loss:
    """The same loss as one writes it with stored matrices, in the operands' dtype; made once, timed often. `rounded`:
    the teacher's embeddings have this dtype's values, as those of a result in 16 bits that is compared with it."""
    labels = torch.arange(n, device=device)

    def logits(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return scale.to(x.dtype) * x @ y.T

    def hard(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        z = logits(x, y, scale)
        return 0.5 * (F.cross_entropy(z, labels) + F.cross_entropy(z.T, labels))

    if loss == "hard":
        return hard
    soft = soft_rows(n).to(device)
    embeddings = None if loss == "psd" else teacher_embeddings(n, d, rounded or dtype, device)

    def mixed(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        z = logits(x, y, scale)
        with torch.no_grad():
            t = z.T if embeddings is None else TEACHER_SCALE * embeddings[0].to(dtype) @ embeddings[1].to(dtype).T
            row_target, column_target = t.softmax(1), t.T.softmax(1)
            for one in (row_target, column_target):
                one.masked_fill_(~soft[:, None], 0.0)
                one.diagonal().masked_fill_(~soft, 1.0)
        return 0.5 * (F.cross_entropy(z, row_target) + F.cross_entropy(z.T, column_target))

    return mixed


@dataclass(frozen=True)
class Case:
    """One loss at one size."""

    loss: str
    dtype: torch.dtype
    n: int
    d: int
    device: str = "cpu"

    def labels(self) -> dict[str, str | int]:
        return {"loss": self.loss, "dtype": dtype_name(self.dtype), "n": self.n, "d": self.d}

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        return operands(self.n, self.d, self.dtype, self.device)

    def target(self) -> Target:
        return target(self.loss, self.n, self.d, self.dtype, self.device)

    def fused(self, backend: str = "auto") -> Loss:
        return fused(self.target(), backend)

    def dense(self) -> Loss:
        return dense(self.loss, self.n, self.d, self.dtype, self.device)

    def in_float32(self) -> Loss:
        """The dense loss in float32, of a teacher whose embeddings are rounded to this dtype."""
        return dense(self.loss, self.n, self.d, torch.float32, self.device, rounded=self.dtype)


def under_autocast(loss: Loss, device: str) -> Loss:
    """As training loops evaluate it: products in bfloat16, softmaxes and cross-entropy in float32."""
    kind = torch.device(device).type

    def evaluate(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        with torch.autocast(kind, torch.bfloat16):
            return loss(x, y, scale)

    return evaluate


def open_clip(case: Case) -> Loss:
    """open_clip's ClipLoss (hard); for the other losses its DistillClipLoss: both similarity matrices of student and of
    teacher, and the cross-entropy of the hard pairing added."""
    labels = torch.arange(case.n, device=case.device)
    taught = case.loss != "hard"
    embeddings = teacher_embeddings(case.n, case.d, case.dtype, case.device) if taught else None

    def cross_entropy(teacher: Tensor, student: Tensor) -> Tensor:
        return -(teacher.softmax(1) * student.log_softmax(1)).sum(1).mean()

    def evaluate(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        per_image, per_text = scale.to(x.dtype) * x @ y.T, scale.to(x.dtype) * y @ x.T
        hard = (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2
        if embeddings is None:
            return hard
        a, b = embeddings
        teacher_per_image, teacher_per_text = TEACHER_SCALE * a @ b.T, TEACHER_SCALE * b @ a.T
        return hard + (cross_entropy(teacher_per_image, per_image) + cross_entropy(teacher_per_text, per_text)) / 2

    return evaluate


def why_no_built_in() -> str | None:
    """None where this torch has BUILT_IN."""
    return None if hasattr(F, BUILT_IN) else f"torch {torch.__version__} has none"


def built_in(x: Tensor, y: Tensor, scale: Tensor, pieces: int | None = None) -> Tensor:
    """The hard loss by BUILT_IN, whose rows are the images and then, with x and y exchanged, the texts; in so many
    pieces (None: PIECES)."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=-(-len(x) // (pieces or PIECES)))
    labels, scaled = torch.arange(len(x), device=x.device), scale.to(x.dtype) * x
    image = F.linear_cross_entropy(scaled, y, labels, options=options)
    return 0.5 * (image + F.linear_cross_entropy(y, scaled, labels, options=options))


def fewest_pieces(n: int, d: int) -> int:
    """Of BUILT_IN: those that it takes left alone on a CPU, and no more than PIECES. At N = 32 a piece is 32 rows, and
    16 pieces take four times as long."""
    return min(PIECES, -(-n // d))


def relative_errors(found: Result, exact: Result, x: Tensor, scale: Tensor) -> dict[str, float]:
    """The largest error of each field, relative to the field's size (testing.sizes)."""
    size = sizes(exact, x, scale)
    return {
        name: (getattr(found, name).double() - getattr(exact, name).double()).abs().max().item() / size[name]
        for name in FIELDS
    }


def check(loss: str, d: int, dtype: torch.dtype, device: str = "cpu", backend: str = "auto", n: int = 1000) -> None:
    """The library's standard (error at most twice dense PyTorch's, against float64) on a ragged size, and the timed
    baselines in float32 against the same definition. Raises AssertionError."""
    x, y, scale = (leaf.detach() for leaf in operands(n, d, dtype, device))
    loss_target = target(loss, n, d, dtype, device)
    standard = Standard.of(x, y, scale, loss_target)
    standard.check(Result.of(fused(loss_target, backend), x, y, scale))
    if dtype == torch.float32:
        standard.check(Result.of(dense(loss, n, d, dtype, device), x, y, scale))
        if loss == "hard" and not why_no_built_in():
            standard.check(Result.of(built_in, x, y, scale))


def check_equal(results: Mapping[str, Result], x: Tensor, y: Tensor, scale: Tensor) -> None:
    """At the timed size, where float64 does not fit: every contender's loss and gradients agree with the first one's
    within twice the library's own bounds (testing.bounds), since both may be off. Raises AssertionError."""
    (first_name, first), *others = results.items()
    allowed = {field: 2 * bound for field, bound in bounds(first, tolerances(first, x, y, scale), x, scale).items()}
    check_sensitive(allowed, first, x, scale)
    for name, result in others:
        try:
            Standard(first, allowed).check(result)
        except AssertionError as error:
            raise AssertionError(f"{name} against {first_name}: {error}") from None


def check_at_size(case: Case, results: Mapping[str, Result], x: Tensor, y: Tensor, scale: Tensor) -> None:
    """The same, against the dense loss in float32 of the operands (detached) as rounded."""
    check_equal({"dense": Result.of(case.in_float32(), x.float(), y.float(), scale), **results}, x, y, scale)
