"""What `group=` of the loss says, and how the global batch lies over ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .. import checks

PLANS = ("auto", "gather", "ring")
WORLD = "world"


@dataclass(frozen=True)
class Exchange:
    """What `group=` of the loss takes when a bare process group does not say enough. See docs/distributed.md.

    group    a torch.distributed process group; None: the default one; "world": the default one, and in a job of one
             process, which has none, no exchange
    plan     "gather": every rank holds all columns at once; "ring": two visiting blocks of columns at a time;
             "auto": gather while its buffers are small, otherwise ring; the choice is logged with its reason
    dtype    the dtype in which embeddings travel (torch.bfloat16, torch.float16), None: their own. The result is then
             that of the columns' embeddings rounded to it, and of their teacher's: under a paired swap those are x.
             Rows are not rounded, gradients and statistics always travel unrounded
    timeout  seconds after which a rank that does not answer is an error; None: the process group's own time-out
    step     the training step, for error messages; a loss that is kept over steps would go on naming this one
    """

    group: Any = None
    plan: str = "auto"
    dtype: torch.dtype | None = None
    timeout: float | None = None
    step: int | None = None

    def __post_init__(self) -> None:
        checks.one_of("plan", self.plan, PLANS)
        if self.dtype is not None and self.dtype not in checks.FLOATING:
            raise ValueError(f"dtype={self.dtype}; allowed: None, {', '.join(map(str, checks.FLOATING))}")
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"timeout={self.timeout} seconds must be above 0; None takes the process group's own")

    def __copy__(self) -> Exchange:
        return self

    def __deepcopy__(self, memo: Any) -> Exchange:
        """Itself: a group is a thing of the process, and whoever copies a model goes on with the same ranks."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle knows the default group by its name; another one means nothing to the process that loads it."""
        group = self.group
        if isinstance(group, dist.ProcessGroup):
            if group is not dist.group.WORLD:
                raise TypeError(
                    "a loss with a group of some of the ranks cannot be pickled: no other process knows this group; "
                    "pickle it with group=None, or keep the group outside and set it after loading"
                )
            group = WORLD
        return Exchange, (group, self.plan, self.dtype, self.timeout, self.step)

    @property
    def wait_limit(self) -> timedelta | None:
        return None if self.timeout is None else timedelta(seconds=self.timeout)


def as_exchange(group: Any) -> Exchange | None:
    """The `group=` of the loss as an Exchange; None where there is nobody to exchange with."""
    if group is None:
        return None
    exchange = group if isinstance(group, Exchange) else Exchange(group)
    if isinstance(exchange.group, str):
        checks.one_of("group", exchange.group, (WORLD,))
        if not (dist.is_available() and dist.is_initialized()):
            return None
        exchange = replace(exchange, group=None)
    if exchange.group is None:
        exchange = replace(exchange, group=dist.group.WORLD)
    members = exchange.group
    if isinstance(members, int) and members == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this rank is not a member of group=; call the loss on the group's ranks only")
    if not isinstance(members, dist.ProcessGroup):
        raise TypeError(
            f"group is a {type(members).__name__}; allowed: None, a torch.distributed group, {WORLD!r}, an Exchange"
        )
    return exchange if dist.get_world_size(exchange.group) > 1 else None


@dataclass(frozen=True)
class Layout:
    """n_local rows and m_local columns of this rank begin at row_start and column_start of a global (n, m) problem.
    Without an exchange, as on one rank, local and global are the same.

    dtype is the accumulation dtype of statistics and coefficients. The exchange's plan is "auto" until the target is
    known (agreement.decide_plan), and never in a lap.
    """

    n: int
    m: int
    n_local: int
    m_local: int
    row_start: int
    column_start: int
    dtype: torch.dtype
    device: torch.device
    exchange: Exchange | None = None
    row_counts: tuple[int, ...] = ()  # of every rank; empty without an exchange
    column_counts: tuple[int, ...] = ()
    columns_learn: bool = True  # whether any rank's y needs a gradient, so that every rank contributes to it

    @property
    def world_size(self) -> int:
        return max(len(self.row_counts), 1)

    @property
    def aligned(self) -> bool:
        """Whether row i and column i of the global batch are always of one rank."""
        return self.row_counts == self.column_counts

    @property
    def own_rows(self) -> slice:
        return slice(self.row_start, self.row_start + self.n_local)

    @property
    def own_columns(self) -> slice:
        return slice(self.column_start, self.column_start + self.m_local)
