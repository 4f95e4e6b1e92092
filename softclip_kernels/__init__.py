"""softclip_kernels: contrastive losses with mixed hard and soft targets that never store the similarity matrix."""

from .backends import SlowerBackendWarning
from .distributed.exchange import Exchange
from .distributed.micro_batches import split_batch
from .distributed.two_pass import TwoPass
from .guard_rails import WiringWarning
from .losses.module import SoftClipLoss
from .losses.softmax import Losses, RetrievalRanks, softclip_loss, softclip_loss_with_ranks
from .targets import (
    Average,
    Blocks,
    Dense,
    EachStep,
    Hard,
    Mix,
    OptimizerSteps,
    Potentials,
    ProgressiveSelfDistillation,
    Ratio,
    SelfTeacher,
    Sinkhorn,
    Target,
    Teacher,
    Weighted,
    partition,
    schedules,
)
from .version import __version__

__all__ = [
    "Average",
    "Blocks",
    "Dense",
    "EachStep",
    "Exchange",
    "Hard",
    "Losses",
    "Mix",
    "OptimizerSteps",
    "Potentials",
    "ProgressiveSelfDistillation",
    "Ratio",
    "RetrievalRanks",
    "SelfTeacher",
    "Sinkhorn",
    "SlowerBackendWarning",
    "SoftClipLoss",
    "Target",
    "Teacher",
    "TwoPass",
    "Weighted",
    "WiringWarning",
    "__version__",
    "partition",
    "schedules",
    "softclip_loss",
    "softclip_loss_with_ranks",
    "split_batch",
]
