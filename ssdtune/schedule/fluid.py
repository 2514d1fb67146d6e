"""The simulator for lanes that share something: a drive whose reads and writes take turns, memory, cores.

As in `simulate.py`, ops of a lane run in the plan's order, each when the ops it waits for have ended. Here an op also
has *demands*: what it takes of each shared resource in a second of running unhindered. Ops that run at the same time
and ask for more than there is run slower, so work flows at a rate that changes with every beginning and end.

Shares are max-min fair: the speeds of all that run rise together, from 0 to 1; where a resource is used up, those that
use it stay, the others rise on. Drives and memory controllers serve queues in turn, so nobody is starved, and what one
op cannot use (another resource holds it) goes to the others. (Proportional shares, each op slowed by its worst
resource alone, would leave that idle.)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

from ssdtune.schedule.plan import Direction, Lane, StepPlan
from ssdtune.schedule.simulate import NUM_STEPS, Simulation, StepTimes, summed_up

Demands = Mapping[str, float]  # resource -> what an op takes of it in a second at full speed

# One more than `simulate`, which takes the last: here what the next step does ahead slows this one.
_NUM_STEPS = NUM_STEPS + 1
_BETWEEN = -1  # stands for the op between two steps, on compute's lane


def simulate_fluid(
    steps: StepPlan,
    seconds: Sequence[float],
    demands: Sequence[Demands],
    capacities: Mapping[str, float],
    *,
    between_s: float = 0.0,
) -> Simulation:
    """A steady step of the plan, as `simulate` gives it, with shared resources.

    `busy_s` counts seconds at full speed. `one_pass_s` and `two_pass_s` are the longest of lanes *and* resources.

    Args:
        steps: its ops and visits.
        seconds: of each op at full speed, by id.
        demands: of each op, by id. A demand above its capacity slows the op even when it runs alone.
        capacities: resource -> how much there is in a second, above 0; a resource that is not named is not shared.
        between_s: as for `simulate`; it demands nothing.
    """
    assert len(seconds) == len(demands) == len(steps.ops), (len(seconds), len(steps.ops))
    flow = _Flow(steps, seconds, between_s)
    sharers = [_shared(each, capacities) for each in demands]
    while flow.begin_what_can():
        running = flow.running
        flow.set_speeds(_speeds([{} if r.op == _BETWEEN else sharers[r.op] for r in running]))
        flow.advance()
    found = summed_up(steps, seconds, flow.settled_step(), between_s)
    loads = [
        {resource: d * s for resource, d in each.items()}
        for each, s in zip(sharers, seconds, strict=True)
    ]
    return dataclasses.replace(
        found,
        one_pass_s=max(found.one_pass_s, between_s + _longest(loads)),
        two_pass_s=between_s + sum(_pass_s(steps, seconds, loads, d) for d in Direction),
    )


def _shared(demands: Demands, capacities: Mapping[str, float]) -> dict[str, float]:
    """The demands as shares of capacity; what nobody shares is left out."""
    return {r: d / capacities[r] for r, d in demands.items() if r in capacities and d > 0}


def _speeds(running: Sequence[Mapping[str, float]]) -> list[float]:
    """Max-min fair speeds, at most 1, of ops with these demands (shares of capacity); water rises, step by step."""
    if _fits(running):
        return [1.0] * len(running)
    speeds = [0.0] * len(running)
    rising = set(range(len(running)))
    left: dict[str, float] = {resource: 1.0 for each in running for resource in each}
    level = 0.0
    while rising:
        pull = {r: sum(running[i].get(r, 0.0) for i in rising) for r in left}
        rise = 1.0 - level
        for resource, p in pull.items():
            if p > 0:
                rise = min(rise, left[resource] / p)
        level += rise
        left = {r: left[r] - rise * p for r, p in pull.items()}
        used_up = {r for r, p in pull.items() if p > 0 and left[r] <= 1e-12}
        stopped = {i for i in rising if level >= 1.0 - 1e-12 or used_up & running[i].keys()}
        for i in stopped:
            speeds[i] = level
        assert stopped, (running, left)
        rising -= stopped
    return speeds


def _fits(running: Sequence[Mapping[str, float]]) -> bool:
    total: dict[str, float] = {}
    for each in running:
        for resource, demand in each.items():
            total[resource] = total.get(resource, 0.0) + demand
    return all(demand <= 1.0 for demand in total.values())


@dataclasses.dataclass(slots=True)
class _Running:
    """An op on its way: `left_s` at full speed were left at second `since_s`, since when it has had this speed."""

    op: int
    step: int
    since_s: float
    left_s: float
    speed: float = 1.0

    @property
    def end_s(self) -> float:
        return self.since_s + self.left_s / self.speed if self.left_s > 0 else self.since_s

    def set_speed(self, speed: float, now_s: float) -> None:
        """A speed that stays leaves the end where it was, to the last bit."""
        if speed != self.speed:
            self.left_s = max(self.left_s - (now_s - self.since_s) * self.speed, 0.0)
            self.since_s, self.speed = now_s, speed


class _Flow:
    """Ops of several steps as they begin and end."""

    def __init__(self, steps: StepPlan, seconds: Sequence[float], between_s: float) -> None:
        self._ops, self._seconds, self._between_s = steps.ops, seconds, between_s
        self._queues: dict[Lane, list[int]] = {lane: [] for lane in Lane}
        for op in steps.ops:
            self._queues[op.lane].append(op.id)
        self._queues[Lane.COMPUTE].append(_BETWEEN)
        self._at = dict.fromkeys(Lane, 0)  # position in the queue, over all steps
        self._free_s = dict.fromkeys(Lane, 0.0)
        self._on: dict[Lane, _Running] = {}
        num_ops = len(steps.ops)
        self._ends = [[math.nan] * num_ops for _ in range(_NUM_STEPS)]  # NaN: has not ended
        self._begins: list[tuple[float, int | None, bool]] = [(0.0, None, False)] * num_ops
        self._step_ends: list[float] = []
        self._now_s = 0.0

    @property
    def running(self) -> list[_Running]:
        """Of each lane that is at work."""
        return list(self._on.values())

    def begin_what_can(self) -> bool:
        """Begins the next op of every idle lane whose turn it is. False once all have ended."""
        for lane in self._queues:
            if lane not in self._on:
                self._begin(lane)
        if not self._on:
            left = [
                lane for lane, queue in self._queues.items() if self._at[lane] < self._all(queue)
            ]
            assert not left, f"ops wait for each other on {left}"
        return bool(self._on)

    def set_speeds(self, speeds: Sequence[float]) -> None:
        """Of `running`, in its order."""
        for running, speed in zip(self.running, speeds, strict=True):
            running.set_speed(speed, self._now_s)

    def advance(self) -> None:
        """To the next end."""
        self._now_s = min(running.end_s for running in self._on.values())
        ended = [lane for lane, running in self._on.items() if running.end_s <= self._now_s]
        for lane in ended:
            running = self._on.pop(lane)
            self._at[lane] += 1
            self._free_s[lane] = self._now_s
            if running.op == _BETWEEN:
                self._step_ends.append(self._now_s)
            else:
                self._ends[running.step][running.op] = self._now_s

    def settled_step(self) -> StepTimes:
        """The times of the last step that another one follows, once everything has ended."""
        return StepTimes(
            begins=self._begins,
            ends=self._ends[-2],
            began_s=self._step_ends[-3],
            ended_s=self._step_ends[-2],
        )

    def _all(self, queue: Sequence[int]) -> int:
        return len(queue) * _NUM_STEPS

    def _begin(self, lane: Lane) -> None:
        queue = self._queues[lane]
        if self._at[lane] >= self._all(queue):
            return
        step, position = divmod(self._at[lane], len(queue))
        op = queue[position]
        start_s = self._free_s[lane]
        if op == _BETWEEN:
            self._on[lane] = _Running(op, step, start_s, self._between_s)
            return
        cause: int | None = None
        is_previous = False
        for other, was_previous, end_s in self._waits(op, step):
            if math.isnan(end_s):
                return
            if end_s > start_s:
                start_s, cause, is_previous = end_s, other, was_previous
        if step == _NUM_STEPS - 2:
            self._begins[op] = (start_s, cause, is_previous)
        self._on[lane] = _Running(op, step, start_s, self._seconds[op])

    def _waits(self, op: int, step: int) -> Iterator[tuple[int, bool, float]]:
        for other in self._ops[op].after:
            yield other, False, self._ends[step][other]
        if step:
            for other in self._ops[op].after_previous:
                yield other, True, self._ends[step - 1][other]


def _longest(loads: Sequence[Mapping[str, float]]) -> float:
    """Seconds for which the busiest resource is used up."""
    total: dict[str, float] = {}
    for each in loads:
        for resource, load in each.items():
            total[resource] = total.get(resource, 0.0) + load
    return max(total.values(), default=0.0)


def _pass_s(
    steps: StepPlan,
    seconds: Sequence[float],
    loads: Sequence[Mapping[str, float]],
    direction: Direction,
) -> float:
    """The longest of lanes and resources in one pass: a lane is a resource that its ops use up."""
    ops = [op for op in steps.ops if op.direction is direction]
    return _longest([{f"lane {op.lane}": seconds[op.id], **loads[op.id]} for op in ops])
