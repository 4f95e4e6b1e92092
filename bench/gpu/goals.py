"""What the project asks for on an H100, and how long a step takes there."""

from __future__ import annotations

from collections.abc import Mapping

from .. import Row
from ..problems import FORWARD_PRODUCTS, PRODUCTS, Case

EAGER, COMPILED = "eager autocast", "compiled autocast"  # the rivals that goals name
GOAL_SIZE = (32768, 512)  # of the multiples of the rivals
STANDING_SIZE = (65536, 768)  # at which siglip-kernel publishes 48.8 ms and 1.4 GB on a Hopper, for the sigmoid loss
STANDING_SECONDS = 0.044  # of the hard loss there
GEMM_SHARE = {"hard": 0.80, "psd_teacher": 0.70}  # of the matrix multiplication rate, N >= 16384
PSD_OVER_HARD = 1.15
OVER_EAGER = {"hard": 5.0, "psd": 8.0, "psd_teacher": 8.0}
OVER_COMPILED = 2.5
# "Memory beyond inputs and gradients", both in their own dtype: bytes, and bytes a row. 16-bit gradients are summed in
# fp32 before they are rounded, and these sums are memory beyond.
MEMORY = (64 * 2**20, 64)
MIB = "SOFTCLIP_GPU_MIB"  # the variable that limits it
REST = 0.02  # of a pass: what is neither statistics, nor G, nor products
COMPILING = 6.0  # seconds that the kernels of a forward and a backward pass take to compile
TUNING = 3.0  # seconds that a problem's candidates take to be timed


def goals(loss: str, n: int, d: int, row: Row) -> dict[str, bool]:
    """Which of the project's goals apply to a row, and whether it reaches them."""
    reached = {}
    if n >= 16384:
        if loss in GEMM_SHARE:
            reached[f"share of gemm >= {GEMM_SHARE[loss]}"] = row["share of gemm"] >= GEMM_SHARE[loss]
        if loss == "psd" and "over hard" in row:
            reached[f"over hard <= {PSD_OVER_HARD}"] = row["over hard"] <= PSD_OVER_HARD
    if (n, d) == GOAL_SIZE:
        for rival, goal in ((EAGER, OVER_EAGER[loss]), (COMPILED, OVER_COMPILED)):
            if f"over {rival}" in row:
                reached[f"over {rival} >= {goal}"] = row[f"over {rival}"] >= goal
    if (n, d) == STANDING_SIZE and loss == "hard":
        reached[f"fused <= {1e3 * STANDING_SECONDS:g} ms"] = row["fused"].median <= STANDING_SECONDS
    return reached


def phase_goals(case: Case, rate: float) -> dict[str, float]:
    """Milliseconds of each phase with which a pass reaches its goal at this rate of matrix products (operations a
    second): in proportion to the phases' own products, of which the last are those of the gradients."""
    operations = case.n**2 * case.d
    whole = PRODUCTS["hard"] * operations / (GEMM_SHARE["hard"] * rate)
    if case.loss == "psd":
        whole *= PSD_OVER_HARD
    elif case.loss != "hard":
        whole = PRODUCTS[case.loss] * operations / (GEMM_SHARE[case.loss] * rate)
    logits = FORWARD_PRODUCTS[case.loss]  # computed once for the statistics, once for G
    products = {"statistics": logits, "G": logits, "products": PRODUCTS[case.loss] - 2 * logits}
    each = 1e3 * whole * (1 - REST) / PRODUCTS[case.loss]
    return {phase: each * count for phase, count in products.items()} | {"rest": 1e3 * whole * REST}


def phases_reached(phases: Mapping[str, float], allowed: Mapping[str, float]) -> dict[str, bool]:
    return {f"{phase} <= {ms:.3g} ms": phases.get(phase, 0.0) <= ms for phase, ms in allowed.items()}


def estimate(case: Case, rounds: int, compiled: bool) -> float:
    """Seconds that a step of speed takes on an H100, roughly: preparation, the check, the tuner, the rounds."""
    pairs = case.n**2
    fused = PRODUCTS[case.loss] * pairs * case.d / 5e14
    rivals = 3 * 75e-12 * pairs if case.n <= GOAL_SIZE[0] else 0.0
    if case.loss == "hard":  # linear_cross_entropy: six products, and an fp32 matrix read and written many times
        rivals += 12 * pairs * case.d / 5e14 + 40e-12 * pairs
    timed = max(1.0, (rounds + 3) * (2.5 * fused + rivals))
    return 2 + TUNING + 25 * compiled + 2e-10 * pairs + 2 * fused + timed


def estimate_graph(case: Case) -> float:
    """The same of a step of graphs, at a width whose kernels are compiled and whose tile shapes are chosen."""
    return 2 + 2e-10 * case.n**2
