"""The simulator: when every op of a plan begins and ends, given how long each takes. A pure function.

Ops of a lane run in the plan's order, each when the ops it waits for have ended (`Op.after`, and `after_previous` in
the step before). With lanes in order and slots assigned, the earliest schedule is one pass of maxima and sums over the
ops, no event queue. Steps follow one another until they repeat; times are of the last one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from ssdtune.schedule.plan import Direction, Kind, Lane, Op, StepPlan

NUM_STEPS = 4  # what the first ones leave behind for the next has settled by then


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedOp:
    """One op of a steady step. Seconds since the step before it ended; what is done ahead for it begins before 0.

    `waited_for`: the id of the op that let it begin last; None where only its lane held it up, or nothing.
    `is_previous`: whether that op belongs to the step before.
    """

    op: Op
    start_s: float
    end_s: float
    waited_for: int | None = None
    is_previous: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """A steady step.

    Attributes:
        step_s: from the end of the step before to its end, `between_s` included.
        ops: in the plan's order.
        busy_s: lane -> seconds of work.
        stall_s: kind of op that compute waited for -> seconds in which it stood still.
        one_pass_s: the longest lane's work: no order of this work is faster.
        two_pass_s: the same of forward and backward apart. A lane's idle time in one can be lent to the other only as
            far as slots hold blocks ahead; a step may come in below it by that much.
    """

    step_s: float
    ops: tuple[SimulatedOp, ...]
    busy_s: Mapping[Lane, float]
    stall_s: Mapping[Kind, float]
    one_pass_s: float
    two_pass_s: float

    @property
    def bound_by(self) -> Lane:
        """The lane with the most work."""
        return max(self.busy_s, key=lambda lane: self.busy_s[lane])

    @property
    def compute_s(self) -> float:
        """Of a step that waits for nothing: compute's work, and what lies between two steps."""
        return self.step_s - sum(self.stall_s.values())

    def lines(self, num_tokens: int, labels: Mapping[str, str]) -> Iterator[str]:
        """Yields the step as a person reads it. labels: of lanes."""
        lanes = [f"{labels[lane]} {s:.3g} s" for lane, s in self.busy_s.items() if s > 0]
        yield (
            f"predicted {self.step_s:.3g} s a step of {num_tokens:,} tokens · "
            f"{num_tokens / self.step_s:,.0f} tokens/s · {labels[self.bound_by]}-bound · "
            f"waits {sum(self.stall_s.values()):.2g} s for weights"
        )
        yield (
            f"          {' · '.join(lanes)} · step / longest lane {self.step_s / self.one_pass_s:.2f} · "
            f"step / longest lane of each pass {self.step_s / self.two_pass_s:.2f}"
        )

    def critical_path(self) -> list[SimulatedOp]:
        """The chain of ops that ends with the step, each begun when the one before it ended; earliest first."""
        path: list[SimulatedOp] = []
        on_lane: dict[int, int | None] = {}
        last: dict[Lane, int] = {}
        for each in self.ops:
            on_lane[each.op.id] = last.get(each.op.lane)
            last[each.op.lane] = each.op.id
        current: SimulatedOp | None = max(self.ops, key=lambda each: each.end_s, default=None)
        while current is not None:
            path.append(current)
            if current.is_previous:
                break
            before = current.waited_for
            if before is None:
                before = on_lane[current.op.id]
            current = None if before is None else self.ops[before]
        return path[::-1]


def simulate(steps: StepPlan, seconds: Sequence[float], *, between_s: float = 0.0) -> Simulation:
    """A steady step of the plan.

    Args:
        steps: its ops and visits.
        seconds: of each op, by id.
        between_s: from a step's last visit to the next one's first: the optimizer, loading rows. Lanes other than
            compute go on meanwhile.
    """
    clock = _settled(steps, seconds, between_s)
    began_s, free, previous = clock.ended_s, [*clock.free], clock.ends
    clock.step()
    begins = _begins(clock.rows, free, previous, clock.ends)
    times = StepTimes(begins=begins, ends=clock.ends, began_s=began_s, ended_s=clock.ended_s)
    return summed_up(steps, seconds, times, between_s)


def step_seconds(steps: StepPlan, seconds: Sequence[float], *, between_s: float = 0.0) -> float:
    """How long a steady step takes, as `simulate` has it and in half of the time: for those who compare many plans."""
    clock = _settled(steps, seconds, between_s)
    began_s = clock.ended_s
    clock.step()
    return clock.ended_s - began_s


def _settled(steps: StepPlan, seconds: Sequence[float], between_s: float) -> _Clock:
    """All steps but the last: the one that is looked at."""
    clock = _Clock(steps.ops, seconds, between_s)
    for _ in range(NUM_STEPS - 1):
        clock.step()
    return clock


_Row = tuple[int, tuple[int, ...], tuple[int, ...], float]  # lane, after, after_previous, seconds


class _Clock:
    """Step after step. free: lane -> when it has done all so far. ends: of the last step's ops, by id."""

    def __init__(self, ops: Sequence[Op], seconds: Sequence[float], between_s: float) -> None:
        assert len(seconds) == len(ops), (len(seconds), len(ops))
        lanes = {lane: i for i, lane in enumerate(Lane)}
        self.rows: list[_Row] = [
            (lanes[op.lane], op.after, op.after_previous, took)
            for op, took in zip(ops, seconds, strict=True)
        ]
        self.free = [0.0] * len(lanes)
        self.ends: list[float] = []
        self.ended_s = 0.0
        self._compute, self._between_s = lanes[Lane.COMPUTE], between_s

    def step(self) -> None:
        """One more; the search's time is spent here."""
        free, previous, ends = self.free, self.ends, list[float]()
        for lane, after, after_previous, took in self.rows:
            end = free[lane]
            for other in after:
                if ends[other] > end:
                    end = ends[other]
            if previous:
                for other in after_previous:
                    if previous[other] > end:
                        end = previous[other]
            end += took
            free[lane] = end
            ends.append(end)
        self.ends = ends
        free[self._compute] += self._between_s
        self.ended_s = free[self._compute]


def _begins(
    rows: Sequence[_Row], free: list[float], previous: Sequence[float], ends: Sequence[float]
) -> list[tuple[float, int | None, bool]]:
    """When each op of a step began and what it waited for, as `StepTimes` has it. free: of the lanes before the step."""
    begins: list[tuple[float, int | None, bool]] = []
    for number, (lane, after, after_previous, _) in enumerate(rows):
        start, cause, is_previous = free[lane], None, False
        for other in after:
            if ends[other] > start:
                start, cause, is_previous = ends[other], other, False
        for other in after_previous:
            if previous and previous[other] > start:
                start, cause, is_previous = previous[other], other, True
        begins.append((start, cause, is_previous))
        free[lane] = ends[number]
    return begins


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """When a step's ops ran: `begins` holds (second, the op waited for, whether that is of the step before), by id.

    began_s, ended_s: of the step; it begins when the one before it ends. All on one clock.
    """

    begins: Sequence[tuple[float, int | None, bool]]
    ends: Sequence[float]
    began_s: float
    ended_s: float


def summed_up(
    steps: StepPlan, seconds: Sequence[float], times: StepTimes, between_s: float
) -> Simulation:
    """The value of a step whose times are known. seconds: of each op where nothing slows it."""
    simulated = tuple(
        SimulatedOp(
            op=op,
            start_s=start - times.began_s,
            end_s=end - times.began_s,
            waited_for=cause,
            is_previous=is_previous,
        )
        for op, end, (start, cause, is_previous) in zip(
            steps.ops, times.ends, times.begins, strict=True
        )
    )
    busy = _busy(steps.ops, seconds)
    return Simulation(
        step_s=times.ended_s - times.began_s,
        ops=simulated,
        busy_s=busy,
        stall_s=_stalls(simulated),
        one_pass_s=max(busy.values(), default=0.0) + between_s,
        two_pass_s=between_s + sum(_pass_s(steps.ops, seconds, d) for d in Direction),
    )


def _busy(ops: Sequence[Op], seconds: Sequence[float]) -> dict[Lane, float]:
    busy: dict[Lane, float] = {}
    for op in ops:
        busy[op.lane] = busy.get(op.lane, 0.0) + seconds[op.id]
    return busy


def _pass_s(ops: Sequence[Op], seconds: Sequence[float], direction: Direction) -> float:
    busy = _busy([op for op in ops if op.direction is direction], seconds)
    return max(busy.values(), default=0.0)


def _stalls(ops: Sequence[SimulatedOp]) -> dict[Kind, float]:
    """How long compute stood still, by the kind of op it waited for."""
    stalls: dict[Kind, float] = {}
    until = 0.0
    for each in ops:
        if each.op.lane is not Lane.COMPUTE:
            continue
        if each.waited_for is not None and each.start_s > until:
            kind = ops[each.waited_for].op.kind
            stalls[kind] = stalls.get(kind, 0.0) + each.start_s - until
        until = each.end_s
    return stalls
