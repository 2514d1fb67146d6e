"""Where compute, and the fills ahead of it, stand in a step that repeats: bookkeeping, no clock.

Positions count the visits of the step under way from 0, and go on into the next step: fills run
ahead across its beginning.
"""

from __future__ import annotations

from ssdtune.schedule.plan import Direction, Kind, StepPlan, Visit, reuse_distances
from ssdtune.schedule.trace import UNPLANNED


class Walk:
    """One kind of step. `done`: visits before it are over. `ahead`: the slots of visits before it
    hold their block, or have it on the way, as far as the plan's order was kept."""

    def __init__(self, steps: StepPlan) -> None:
        self.steps = steps
        self.num_visits = len(steps.visits)
        self.done = 0
        self.ahead = 0
        self._entered: int | None = None
        self._reuse = reuse_distances(steps.visits)
        self._first_op = {op.visit: op.id for op in reversed(steps.ops)}
        self._compute_op = {op.visit: op.id for op in steps.ops if op.kind is Kind.COMPUTE}

    def visit(self, position: int) -> Visit:
        """The visit at a position of this step or the next."""
        return self.steps.visits[position % self.num_visits]

    def compute_op_id(self, position: int) -> int:
        """The plan's id of the visit's COMPUTE op."""
        return self._compute_op[position % self.num_visits]

    def fill_op_id(self, position: int) -> int:
        """The plan's id of the visit's first fill op; UNPLANNED if a steady step has none."""
        visit = position % self.num_visits
        return self._first_op[visit] if self.steps.visits[visit].is_filled_for else UNPLANNED

    def is_in_next_step(self, position: int) -> bool:
        """Whether the position lies past the end of the step under way."""
        return position >= self.num_visits

    def begin_next(self) -> None:
        """A new step: what the last one left out is over, what was filled ahead for it stays."""
        self.ahead = max(0, self.ahead - self.num_visits)
        self.done = 0
        self._entered = None

    def find(self, block: int, direction: Direction) -> int | None:
        """The first visit of this step, not yet done, to that block in that direction."""
        for position in range(self.done, self.num_visits):
            visit = self.steps.visits[position]
            if visit.block == block and visit.direction is direction:
                return position
        return None

    def enter(self, position: int) -> None:
        """Compute is at `position`: what lies before it is over, even if it never came."""
        self.done = position
        self.ahead = max(self.ahead, position)
        self._entered = position

    def leave(self) -> None:
        """The visit that was entered is over."""
        if self._entered is not None:
            self.done = self._entered + 1
            self._entered = None

    def give_up(self) -> None:
        """The visit that was entered did not take place; it may be tried again."""
        self._entered = None

    def next_to_fill(self) -> int | None:
        """The next position whose slot has not been looked at; None at the end of the next step."""
        return self.ahead if self.ahead < 2 * self.num_visits else None

    def may_fill(self, position: int) -> bool:
        """Whether the last planned reader of the position's slot is done. A slot that holds the block already needs
        no fill, and waits for nobody: what comes behind it must not wait either."""
        return position - self._reuse[position % self.num_visits] < self.done

    def filled(self, position: int) -> None:
        """The slot of `position` holds its block, or will."""
        self.ahead = position + 1

    def look_again(self) -> None:
        """Slots may not hold what they were filled with: the fills ahead are gone through again.

        Safe at any time: what is filled for a position has its slot's earlier readers behind it.
        """
        self.ahead = self.done
