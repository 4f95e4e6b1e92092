"""Steps of training with a contrastive loss over ranks: right ones, and ones with a defect each, as people write them.

A loss is made by function(group) and called with (x, y, scale); a step is made by function(group) and called with the
wrapped model and a rank's batch. open_clip's losses are written from what its options do.
"""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
import torch.nn.functional as F

from softclip_kernels import TwoPass, softclip_loss
from softclip_kernels.testing import dense_loss

from .towers import split

PARTS = 3  # micro-batches


# Losses.


def fused(group, target=None):
    return lambda x, y, scale: softclip_loss(x, y, scale, target, group=group)


def times(factor, make=fused):
    def made(group):
        loss = make(group)
        return lambda *outputs: factor * loss(*outputs)

    return made


def multiplied(group, factor):
    return times(factor)(group)


def raises_on_the_last_rank(group):
    def loss(x, y, scale):
        if dist.get_rank(group) == dist.get_world_size(group) - 1:
            raise KeyError("caption")
        return softclip_loss(x, y, scale, group=group)

    return loss


def local(group):
    return dense_loss


class GatherWithGradient(torch.autograd.Function):
    """(ranks, n, d) of every rank's (n, d); the gradient of a rank's is the sum of what every rank has for it."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return torch.stack(gather(tensor, group))

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient[dist.get_rank(ctx.group)], None


def gather(tensor, group):
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.detach().contiguous(), group=group)
    return parts


def open_clips(local_loss, gather_with_grad, own_rows_back=None, shift=True):
    """`own_rows_back`: whether this rank's rows stand among what is gathered without gradient with theirs; None: as in
    open_clip, if the loss is the whole one. `shift`: whether labels begin at this rank's first column."""
    own_rows_back = not local_loss if own_rows_back is None else own_rows_back

    def made(group):
        rank = dist.get_rank(group)

        def everyones(own):
            if gather_with_grad:
                return GatherWithGradient.apply(own, group).flatten(0, 1)
            parts = gather(own, group)
            if own_rows_back:
                parts[rank] = own
            return torch.cat(parts)

        def loss(x, y, scale):
            all_x, all_y = everyones(x), everyones(y)
            if not local_loss:
                return dense_loss(all_x, all_y, scale)
            labels = torch.arange(len(x)) + len(x) * rank * shift
            sides = (scale * x @ all_y.T, scale * y @ all_x.T)
            return 0.5 * sum(F.cross_entropy(side, labels) for side in sides)

        return loss

    return made


def tail_dropped(group):
    def loss(x, y, scale):
        least = torch.tensor(len(x))
        dist.all_reduce(least, dist.ReduceOp.MIN, group=group)
        return softclip_loss(x[:least], y[:least], scale, group=group)

    return loss


def alike(group):
    """The mean of a rank's own rows and columns, whatever their number."""

    def loss(x, y, scale):
        losses = softclip_loss(x, y, scale, group=group, reduction="none")
        return 0.5 * (losses.rows.mean() + losses.columns.mean())

    return loss


def detached(group):
    """The texts are."""
    return lambda x, y, scale: softclip_loss(x, y.detach() + 0 * y, scale, group=group)


# Steps.


def _last(model, k, parts=PARTS):
    """DistributedDataParallel reduces in the last micro-batch only."""
    return model.no_sync() if hasattr(model, "no_sync") and k < parts - 1 else contextlib.nullcontext()


def two_pass(group):
    def step(model, batch):
        passes = TwoPass(model, split(batch, PARTS))
        loss = softclip_loss(*passes.outputs, group=group)
        passes.backward(loss)
        return loss

    return step


def cached(scale_times=1, factor=1.0):
    """Two passes as trainers write them: each micro-batch's embeddings in their place among the others', and the loss
    of all of them. The scale learns in the first `scale_times` micro-batches: open_clip's --accum-freq lets it learn in
    each."""

    def made(group):
        def step(model, batch):
            micro = split(batch, PARTS)
            with torch.no_grad():
                first = [model(*each) for each in micro]
            for k, each in enumerate(micro):
                with _last(model, k):
                    *own, scale = model(*each)
                    x, y = (
                        torch.cat([own[side] if j == k else outputs[side] for j, outputs in enumerate(first)])
                        for side in (0, 1)
                    )
                    loss = softclip_loss(x, y, scale if k < scale_times else scale.detach() + 0 * scale, group=group)
                    (factor * loss).backward()
            return loss

        return step

    return made


def repeated(group):
    """The whole batch, as often as there should have been micro-batches."""

    def step(model, batch):
        for k in range(PARTS):
            with _last(model, k):
                loss = softclip_loss(*model(*batch), group=group)
                loss.backward()
        return loss

    return step


def within(divide, make=fused):
    """Accumulation of a loss of each micro-batch."""

    def made(group):
        def step(model, batch):
            for k, each in enumerate(split(batch, PARTS)):
                with _last(model, k):
                    loss = make(group)(*model(*each)) / (PARTS if divide else 1)
                    loss.backward()

        return step

    return made


def leftover_dropped(group):
    """Micro-batches of one size."""

    def step(model, batch):
        size = len(batch[0]) // PARTS
        micro = [tuple(tensor[k * size : (k + 1) * size] for tensor in batch) for k in range(PARTS)]
        passes = TwoPass(model, micro)
        passes.backward(softclip_loss(*passes.outputs, group=group))

    return step


def past_the_wrapper(group):
    """As model.module.encode_image(...) is."""

    def step(model, batch):
        loss = softclip_loss(*model.module(*batch), group=group)
        loss.backward()
        return loss

    return step


def never_synchronised(group):
    def step(model, batch):
        with model.no_sync():
            softclip_loss(*model(*batch), group=group).backward()

    return step


def loss_scale_kept(group):
    def step(model, batch):
        (65536.0 * softclip_loss(*model(*batch), group=group)).backward()

    return step


def texts_on_the_first_rank(group):
    """Every other rank learns from its images only, and reduces by hand what it has."""

    def step(model, batch):
        x, y, scale = model(*batch)
        softclip_loss(x, y if dist.get_rank(group) == 0 else y.detach(), scale, group=group).backward()

    return step
