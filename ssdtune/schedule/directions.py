"""How many random directions a zeroth-order step takes: as many as fill the time in which its weights are read.

A block is read once a step, however many variants of it are computed with. FZOO (arXiv 2506.09034) takes n directions in
n + 1 forwards, and n is the user's: where reading is what a step waits for, more of them cost next to nothing.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping

from ssdtune.schedule.cost import Work
from ssdtune.schedule.job import Job
from ssdtune.schedule.machine import Machine
from ssdtune.schedule.outcome import Outcome, Refusal, outcome, step_of
from ssdtune.schedule.plan import Lane

FILLS = 1.15  # times its reading that a step may take
MOST_DIRECTIONS = 64  # an estimate's error falls with the square root of them, a step's hidden states grow with them


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """What was chosen: the job with so many directions, and what comes of it. first: with the `usual` number."""

    job: Job
    found: Outcome
    first: Outcome
    usual: int

    @property
    def num(self) -> int:
        """Of directions."""
        assert self.job.directions is not None
        return self.job.directions.num


def with_directions(job: Job, num: int) -> Job:
    """The same with so many directions."""
    directions = job.directions
    assert directions is not None
    more = num - directions.num
    memory = {name: n + more * directions.memory.get(name, 0) for name, n in job.fixed.more.items()}
    work = job.work
    if work is not None and work.moves is not None:
        moves = dataclasses.replace(
            work.moves,
            shifts=_with_more(work.moves.shifts, directions.shifts, more),
            updates=_with_more(work.moves.updates, directions.updates, more),
        )
        work = dataclasses.replace(work, moves=moves)
    return dataclasses.replace(
        job,
        variants=job.variants + more * directions.variants,
        fixed=dataclasses.replace(job.fixed, more=memory),
        work=work,
        directions=dataclasses.replace(directions, num=num),
    )


def _with_more(works: Mapping[int, Work], each: Mapping[int, Work], times: int) -> dict[int, Work]:
    """Every block's work and so many times what is more of it."""
    made: dict[int, Work] = {}
    for block, work in works.items():
        counts = Counter(work.operators)
        for op, n in each[block].operators.items() if block in each else ():
            counts[op] += times * n
        made[block] = dataclasses.replace(work, operators=dict(counts))
    return made


def fill_reading(job: Job, machine: Machine, first: Outcome) -> Filled:
    """The most directions, MOST_DIRECTIONS at most, with which a step fits and takes FILLS times the reading of the job as
    it is, at most; as many as it has where there are none. first: what comes of it."""
    assert job.directions is not None
    usual, limit_s = job.directions.num, FILLS * reading_s(first)
    if first.simulation is None or first.simulation.step_s > limit_s:
        return Filled(job=job, found=first, first=first, usual=usual)

    def found_with(more: int) -> Outcome | None:
        found = outcome(with_directions(job, more), machine, first.choices)
        if isinstance(found, Refusal) or found.simulation is None:
            return None
        return found if found.simulation.step_s <= limit_s else None

    def is_more(more: int) -> bool:
        """Whether it takes longer, by the plan that there is; whose memory may be too small for fewer."""
        step = step_of(with_directions(job, more), machine, first.choices, first.plan)
        return step is None or step.step_s > limit_s

    # With `low` directions it fits and takes no longer, with `high` it does not.
    low, best = usual, first
    high = _first_where(is_more, usual + 1, MOST_DIRECTIONS + 1)
    tried = high - 1
    while low < high - 1:
        found = found_with(tried)
        if found is None:
            high = tried
        else:
            low, best = tried, found
        tried = (low + high) // 2
    return Filled(job=with_directions(job, low), found=best, first=first, usual=usual)


def _first_where(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The least number from `low` on for which it holds; `high` where for none below it."""
    return low + bisect.bisect_left(range(low, high), True, key=holds)


def reading_s(found: Outcome) -> float:
    """Seconds that a step reads the drive for; 0: it does not, or times are not known."""
    return 0.0 if found.simulation is None else found.simulation.busy_s.get(Lane.NVME_READ, 0.0)
