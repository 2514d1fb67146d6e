"""What a search has simulated: each choice once, priced, compared by one key, the best followed moment by moment.

Less is better: a step's seconds to DIGITS, bytes written, bytes read, memory. Step times are sums over a pass while the
search goes on; those of the last few are followed moment by moment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

from ssdtune.schedule.choices import Choice, Request, room_for
from ssdtune.schedule.counts import BlockKind, Counts, promising_counts
from ssdtune.schedule.plan import BLOCK_KINDS, Direction, Lane, Plan, PlanError, StepPlan
from ssdtune.schedule.planner import Layout, layout_of, plan_of
from ssdtune.schedule.simulate import Simulation, step_seconds
from ssdtune.schedule.stored import written_bytes
from ssdtune.schedule.validate import validate
from ssdtune.sizes import format_size

NUM_FOLLOWED = 3  # of the best in the end, moment by moment
NEAR = 1.1  # times the best sum: sums over a pass are off by about a tenth at most
NUM_WAYS = 2  # to share slots in which all arrangements are tried
AT_LIMIT = 0.005  # of its compute, beyond it: a step that has next to no time left to gain
WORTH_WRITING = 0.02  # of a step's time: less does not pay for wearing a drive
# Of step times: what agrees so far is a tie, then fewer bytes written, then read, then less memory count.
DIGITS = 4

Skeleton = tuple[tuple[tuple[int, ...], ...], int]  # classes that share slots, prefetch depth


class WritesError(PlanError):
    """All plans write more in a step than they may. num_bytes: the least that one of those tried does."""

    def __init__(self, num_bytes: int, most: int) -> None:
        super().__init__(
            f"a step writes {format_size(num_bytes)} to the drive at least, and may write {format_size(most)}: raise "
            "offload.max_writes"
        )
        self.num_bytes = num_bytes


class Priced(Protocol):
    """What `cost.Pricing` is: seconds of the ops of one kind of step, and of what lies between two steps."""

    @property
    def kind(self) -> str:
        """Of step."""
        ...

    @property
    def between_s(self) -> float:
        """From a step's last visit to the next one's first."""
        ...

    def steps(self, plan: Plan) -> StepPlan:
        """The plan's step with all that goes over its lanes."""
        ...

    def op_seconds(self, steps: StepPlan) -> Sequence[float]:
        """Of each op, by id."""
        ...

    def simulated(self, steps: StepPlan) -> Simulation:
        """A steady step, lanes that slow each other followed moment by moment."""
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The plan, the layout it follows, its predicted step, how many plans were simulated for it."""

    plan: Plan
    layout: Layout
    simulation: Simulation
    num_tries: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How far a search goes.

    Attributes:
        depths: how many fills may run ahead.
        num_tries: plans simulated at most; 100 blocks take 2-5 ms each.
        patience: moves in vain after which nothing more is expected; None: by the number of blocks.
    """

    depths: Sequence[int] = (1, 2, 3, 4)
    num_tries: int = 200
    patience: int | None = None

    @staticmethod
    def of(prefetch: int | None) -> Effort:
        """With this depth alone, where somebody said so; None: with all that may be best."""
        return Effort() if prefetch is None else Effort(depths=(prefetch,))


class Hunt:
    """What has been simulated of a search."""

    def __init__(self, request: Request, pricing: Priced, effort: Effort) -> None:
        self.pricing, self.effort = pricing, effort
        self.whole = request
        # While searching, only the steps that are to be fast.
        orders = {pricing.kind: request.orders[pricing.kind]}
        self.request = dataclasses.replace(request, orders=orders)
        self.seen: dict[tuple[object, ...], tuple[float, ...]] = {}  # choice -> key
        self.choices: dict[tuple[object, ...], Choice] = {}
        self.least_written: int | None = None  # by a step of those that write more than they may
        self._kinds: dict[tuple[int, ...], BlockKind] = {}
        self._counts: dict[tuple[object, ...], list[Counts]] = {}  # choice -> as `counts` has them

    @property
    def is_over(self) -> bool:
        """Whether all tries are used up."""
        return len(self.seen) >= self.effort.num_tries

    @property
    def is_at_the_limit(self) -> bool:
        """Whether the best step is all compute: no plan is faster."""
        best = min(self.seen.values(), default=None)
        return best is not None and best[0] <= (1 + AT_LIMIT) * best[-1]

    def evaluate(self, choice: Choice) -> tuple[float, ...] | None:
        """What to compare by, less is better; None where it does not fit, writes too much, or no try is left."""
        name = _name(choice)
        if name in self.seen:
            return self.seen[name]
        if self.is_over or room_for(self.request, choice) is None:
            return None
        plan = plan_of(self.request, layout_of(self.request, choice))
        steps, most = self.pricing.steps(plan), self.request.written_bytes
        written = written_bytes(steps)
        if most is not None and written > most:
            self.least_written = min(written, self.least_written or written)
            return None
        seconds, between_s = self.pricing.op_seconds(steps), self.pricing.between_s
        step_s = _rounded(step_seconds(steps, seconds, between_s=between_s))
        read = plan.sequences[self.pricing.kind].read_bytes
        memory = plan.slot_bytes + plan.ram_bytes + plan.activation_bytes
        compute_s = between_s + sum(
            s for op, s in zip(steps.ops, seconds, strict=True) if op.lane is Lane.COMPUTE
        )
        self.seen[name] = (step_s, written, read, memory, compute_s)
        self.choices[name] = choice
        return self.seen[name]

    def ranked(self) -> list[Choice]:
        """All that were simulated, the best first."""
        return [self.choices[name] for name in sorted(self.seen, key=lambda n: self.seen[n])]

    def skeletons(self) -> list[Skeleton]:
        """The ways to share slots of the best choices."""
        ways = dict.fromkeys(
            (tuple(map(tuple, choice.classes)), choice.prefetch) for choice in self.ranked()
        )
        return [*ways][:NUM_WAYS]

    def kinds(self, empty: Choice) -> dict[tuple[int, ...], BlockKind]:
        """Blocks that are alike, members -> what one of them takes. Made once: how slots are shared hardly matters
        for it. empty: a choice in which nothing stays."""
        if not self._kinds:
            self._kinds = _kinds(self.request, self.pricing, empty)
        return self._kinds

    def counts(self, empty: Choice) -> list[Counts]:
        """How many of each kind may stay, the best first; asked for twice of the best ways to share slots."""
        name = _name(empty)
        if name not in self._counts:
            room = room_for(self.request, empty)
            assert room is not None
            kinds, on_device = list(self.kinds(empty).values()), self.request.on_device
            self._counts[name] = list(promising_counts(kinds, room, on_device=on_device))
        return self._counts[name]

    @property
    def step_s(self) -> float:
        """Of the best."""
        return self.seen[self._worth_writing(self.seen)][0]

    def best(self) -> Found:
        """The best of all, with the plan of every kind of step, validated. Activations go to NVMe where that is worth
        it. Raises PlanError."""
        followed = {_name(choice): self._followed(choice) for choice in self._finalists()}
        keys = {
            name: (_rounded(simulation.step_s), *self.seen[name][1:])
            for name, (_, simulation) in followed.items()
        }
        layout, simulation = followed[self._worth_writing(keys)]
        plan = plan_of(self.whole, layout)
        validate(plan)
        return Found(plan=plan, layout=layout, simulation=simulation, num_tries=len(self.seen))

    def _finalists(self) -> list[Choice]:
        """The best few by their sums, and the best with each number of blocks whose activations go to NVMe, which is
        where sums are the farthest off."""
        ranked = self.ranked()
        most_s = NEAR * self.seen[_name(ranked[0])][0]
        by_num = {len(choice.stored): choice for choice in reversed(ranked)}
        wanted = [_name(choice) for choice in (*ranked[:NUM_FOLLOWED], *by_num.values())]
        return [c for c in ranked if _name(c) in wanted and self.seen[_name(c)][0] <= most_s]

    def _followed(self, choice: Choice) -> tuple[Layout, Simulation]:
        layout = layout_of(self.request, choice)
        steps = self.pricing.steps(plan_of(self.request, layout))
        return layout, self.pricing.simulated(steps)

    def _worth_writing(
        self, keys: Mapping[tuple[object, ...], tuple[float, ...]]
    ) -> tuple[object, ...]:
        """The name of the best by these keys; of one without activations on NVMe where they gain little."""
        ranked = sorted(keys, key=lambda name: keys[name])
        best = ranked[0]
        without = next((name for name in ranked if not self.choices[name].stored), best)
        limit = (1 - WORTH_WRITING) * keys[without][0]
        return best if keys[best][0] < limit else without


def _rounded(step_s: float) -> float:
    """To DIGITS."""
    return float(f"{step_s:.{DIGITS}g}")


def _name(choice: Choice) -> tuple[object, ...]:
    classes = tuple(tuple(members) for members in choice.classes)
    return (
        classes,
        choice.num_slots,
        choice.prefetch,
        choice.residents,
        choice.cached,
        choice.kept,
        choice.stored,
    )


def _kinds(request: Request, pricing: Priced, empty: Choice) -> dict[tuple[int, ...], BlockKind]:
    """Blocks that are alike, members -> what one of them takes; from the plan in which nothing stays."""
    plan = plan_of(request, layout_of(request, empty))
    steps = pricing.steps(plan)
    seconds = pricing.op_seconds(steps)
    loads: list[dict[tuple[Direction, Lane], float]] = [{} for _ in plan.blocks]
    for op in steps.ops:
        if op.kind not in BLOCK_KINDS:
            continue
        load, key = loads[steps.visits[op.visit].block], (op.direction, op.lane)
        load[key] = load.get(key, 0.0) + seconds[op.id]
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, (block, load) in enumerate(zip(plan.blocks, loads, strict=True)):
        on_compute = tuple(
            sorted((d, f"{s:.2g}") for (d, lane), s in load.items() if lane is Lane.COMPUTE)
        )
        groups.setdefault((block.slot_bytes, block.file_bytes, on_compute), []).append(i)
    return {tuple(members): _kind(plan, members, loads) for members in groups.values()}


def _kind(
    plan: Plan,
    members: Sequence[int],
    loads: Sequence[Mapping[tuple[Direction, Lane], float]],
) -> BlockKind:
    block, keys = plan.blocks[members[0]], {key for i in members for key in loads[i]}
    mean = {key: sum(loads[i].get(key, 0.0) for i in members) / len(members) for key in keys}
    return BlockKind(
        num=len(members),
        slot_bytes=block.slot_bytes,
        file_bytes=block.file_bytes,
        streamed=mean,
        cached={key: s for key, s in mean.items() if key[1] is not Lane.NVME_READ},
        resident={key: s for key, s in mean.items() if key[1] is Lane.COMPUTE},
    )
