"""softclip_kernels: contrastive losses with mixed hard and soft targets that never store the similarity matrix."""

from . import schedules
from .backends import SlowerBackendWarning
from .functional import Losses, RetrievalRanks, softclip_loss, softclip_loss_with_ranks
from .layout import Exchange
from .module import SoftClipLoss
from .psd import ProgressiveSelfDistillation, partition
from .targets import Average, Blocks, Dense, Hard, Mix, Target, Weighted
from .teachers import Potentials, SelfTeacher, Sinkhorn, Teacher
from .two_pass import TwoPass
from .version import __version__

__all__ = [
    "Average",
    "Blocks",
    "Dense",
    "Exchange",
    "Hard",
    "Losses",
    "Mix",
    "Potentials",
    "ProgressiveSelfDistillation",
    "RetrievalRanks",
    "SelfTeacher",
    "Sinkhorn",
    "SlowerBackendWarning",
    "SoftClipLoss",
    "Target",
    "Teacher",
    "TwoPass",
    "Weighted",
    "__version__",
    "partition",
    "schedules",
    "softclip_loss",
    "softclip_loss_with_ranks",
]
