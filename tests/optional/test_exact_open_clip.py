"""What check_exact says of open_clip's own ClipLoss, with each of its options, under DistributedDataParallel."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from helpers import libraries  # noqa: F401  (before open_clip, for torchvision's sake)
from helpers.towers import data, make
from torch.nn.parallel import DistributedDataParallel

from softclip_kernels.testing import check_exact

pytest.importorskip("open_clip")

RANKS = 2  # of the fixture `pool`
ENCODERS_HALVED = "averaged once too often, but for the scale: "
NO_GRADIENT = "gathered without gradient: each rank's rows learn as queries"


def check(group, local_loss, gather_with_grad):
    from open_clip import ClipLoss

    rank = dist.get_rank(group)
    loss = ClipLoss(local_loss, gather_with_grad, rank=rank, world_size=dist.get_world_size(group))
    batch = tuple(tensor[:8] for tensor in data(0, rank, torch.float32))
    model = DistributedDataParallel(make(0.0, torch.float32), process_group=group)
    return check_exact(model, batch, loss, group=group)


@pytest.mark.parametrize(
    ("local_loss", "gather_with_grad", "begin"),
    ((False, True, ""), (True, True, ""), (False, False, ENCODERS_HALVED), (True, False, NO_GRADIENT)),
)
def test_open_clips_loss(pool, local_loss, gather_with_grad, begin):
    for report in pool.run(check, local_loss, gather_with_grad):
        assert report.ok == (begin == ""), report
        assert all(finding.startswith(begin) for finding in report.findings), report
