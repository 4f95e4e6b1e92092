"""What each row should match.

context    what a target may look at while it is lowered
terms      what a target is a sum of, each linear in the logits
lowered    what every target becomes: the sum of its terms, and the losses that follow from it
base       Target: one class with one method, `lower`
hard       Hard, Dense
soft       Teacher, SelfTeacher, their scale (Ratio), and how they are normalized: Sinkhorn, Potentials
combine    Mix, Average, Weighted, Blocks
psd        ProgressiveSelfDistillation, partition
schedules  the soft share alpha as a function of the step
steps      EachStep, OptimizerSteps: where the loop tells the loss of no step
"""

from . import schedules
from .base import Target
from .combine import Average, Blocks, ForBatch, Mix, Weighted
from .context import Context
from .hard import Dense, Hard
from .psd import ProgressiveSelfDistillation, partition
from .soft import Potentials, Ratio, SelfTeacher, Sinkhorn, SoftTarget, Teacher
from .steps import EachStep, OptimizerSteps

__all__ = [
    "Average",
    "Blocks",
    "Context",
    "Dense",
    "EachStep",
    "ForBatch",
    "Hard",
    "Mix",
    "OptimizerSteps",
    "Potentials",
    "ProgressiveSelfDistillation",
    "Ratio",
    "SelfTeacher",
    "Sinkhorn",
    "SoftTarget",
    "Target",
    "Teacher",
    "Weighted",
    "partition",
    "schedules",
]
