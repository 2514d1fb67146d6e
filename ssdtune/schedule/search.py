"""The fastest plan within budgets, by prediction: counts, arrangement, simulation, local moves. A pure function.

How many blocks stay is a small integer program for each way to share slots (`counts.py`), and greedy by kinds besides.
Which ones stay is an arrangement: spread evenly is good where the drive is the limit (grouped residents leave it idle
for a while, then overrun it), the ends of the step where slots already hold its turns. All ways to share slots are tried
with one arrangement, the best ways with the others. Candidates keep the activations of as many blocks as they may; the
best are then tried with fewer, which is as fast where the drive is the limit, and with those of other blocks on NVMe.
Every candidate is simulated, with what lanes lose to each other added up over a pass; the best is polished by moves of one
or two blocks, and of the last few the fastest moment by moment is taken. The seed is fixed: equal requests have
equal plans.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Protocol

from ssdtune.schedule.arrange import (
    PATTERNS,
    arranged,
    elsewhere,
    keeping,
    moved,
    storing,
)
from ssdtune.schedule.counts import BlockKind, Counts, best_counts
from ssdtune.schedule.plan import BLOCK_KINDS, Direction, Lane, Plan, PlanError, StepPlan
from ssdtune.schedule.planner import (
    Choice,
    Layout,
    Request,
    able_to_keep,
    layout_of,
    plan_of,
    room_for,
    skeletons,
    static_choice,
)
from ssdtune.schedule.simulate import Simulation, step_seconds
from ssdtune.schedule.stored import written_bytes
from ssdtune.schedule.validate import validate
from ssdtune.sizes import format_size

NUM_POLISHED = 3  # of the best candidates
NUM_FOLLOWED = 3  # of the best in the end, moment by moment
NEAR = 1.1  # times the best sum: sums over a pass are off by about a tenth at most
NUM_WAYS = 2  # to share slots in which all arrangements are tried
HOPELESS = 1.1  # times as slow as the best of another budget: no arrangement makes up for it
AT_LIMIT = 0.005  # of its compute, beyond it: a step that has next to no time left to gain
WORTH_WRITING = 0.02  # of a step's time: less does not pay for wearing a drive
FEW_PLACES = 8  # blocks up to which every one is tried elsewhere
STEADY_DEPTH = 2  # fills ahead where visits vary: a slot computes, one is full, one is being filled
DIGITS = (
    4  # step times that agree so far are a tie: fewer bytes written, then read, then less memory
)


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


def search(request: Request, pricing: Priced, effort: Effort | None = None) -> Found:
    """The plan whose steps are predicted to be the fastest, validated.

    Args:
        request: blocks, orders, budgets; its `prefetch` is not looked at.
        pricing: what the kind of step to be fast in costs.
        effort: how far to go; None: as far as has always been enough.

    Raises PlanError where nothing fits, with the smallest budget that does.
    """
    return polished(explored(request, pricing, effort))


def explored(
    request: Request,
    pricing: Priced,
    effort: Effort | None = None,
    *,
    beside: Hunt | None = None,
) -> Hunt:
    """All candidates, simulated; where `search` begins. Raises PlanError as it does.

    beside: what was explored under a budget much like this one. Of the ways to share slots, those that were best there
    are tried, where they fit; a first round that is much slower than its best is the last.
    """
    hunt = Hunt(request, pricing, effort or Effort())
    _first_round(hunt, beside)
    if beside and hunt.step_s > HOPELESS * beside.step_s:
        return hunt
    for way in hunt.skeletons():
        for choice in _arrangements(hunt, way):
            hunt.evaluate(choice)
    for choice in hunt.ranked()[:NUM_POLISHED]:
        for other in keeping(hunt.request, choice):
            hunt.evaluate(other)
    if request.budgets.nvme_activation_bytes and request.activation_bytes:
        _try_the_drive(hunt)
    return hunt


def _first_round(hunt: Hunt, beside: Hunt | None) -> None:
    """All ways to share slots, with one arrangement. Raises PlanError where none fits."""
    ways, near = _skeletons_that_fit(hunt), beside.skeletons() if beside else []
    _try(hunt, [each for each in ways if each in near] or ways)
    if not hunt.seen:  # with one slot most room is left for blocks that stay, and are not written
        _try(hunt, _fitting(hunt, [0]))
    if not hunt.seen:
        assert hunt.least_written is not None
        raise WritesError(hunt.least_written, hunt.request.written_bytes or 0)


def _try(hunt: Hunt, ways: Sequence[Skeleton]) -> None:
    for way in ways:
        for choice in _candidates(hunt, way):
            hunt.evaluate(choice)


def polished(hunt: Hunt) -> Found:
    """The best of what was explored after local moves; where `search` ends. Raises PlanError as it does."""
    patience = hunt.effort.patience
    _polish(hunt, 10 + len(hunt.request.blocks) if patience is None else patience)
    return hunt.best()


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
            self._kinds = _kinds(self, empty)
        return self._kinds

    def counts(self, empty: Choice) -> list[Counts]:
        """How many of each kind may stay, the best first; asked for twice of the best ways to share slots."""
        name = _name(empty)
        if name not in self._counts:
            self._counts[name] = list(_counts(self, empty))
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

    @property
    def is_at_the_limit(self) -> bool:
        """Whether the best step is all compute: no plan is faster."""
        best = min(self.seen.values(), default=None)
        return best is not None and best[0] <= (1 + AT_LIMIT) * best[-1]


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


# ------------------------------------------------------------------ candidates


def _skeletons_that_fit(hunt: Hunt) -> list[Skeleton]:
    """The ways to share slots that the budget has room for; those without any prefetch only where nothing else fits, or
    that was asked for. Where visits vary, those with three slots and more, if there are any: what is predicted knows
    the usual visit, and a slot more is ready when one is shorter. Raises PlanError where none does."""
    depths = hunt.effort.depths
    steady = [depth for depth in depths if depth >= STEADY_DEPTH]
    fit = _fitting(hunt, steady) if hunt.request.visits_vary and steady else []
    fit = [way for way in fit if way[1]] or _fitting(hunt, depths)
    if not fit:
        raise PlanError("no way to share slots fits the budget")
    return fit


def _fitting(hunt: Hunt, depths: Sequence[int]) -> list[Skeleton]:
    fit: list[Skeleton] = []
    for classes, depth in skeletons(dataclasses.replace(hunt.request, prefetch=max(depths))):
        if depth not in depths and (depth or fit):
            continue
        if static_choice(hunt.request, classes, depth) is not None:
            fit.append((tuple(map(tuple, classes)), depth))
    return fit


def _candidates(hunt: Hunt, skeleton: Skeleton) -> Iterator[Choice]:
    """For one way to share slots that fits: the static choice, and all counts in one arrangement."""
    static, empty = _filled_and_empty(hunt, skeleton)
    yield static
    for counts in hunt.counts(empty):
        yield arranged(hunt.request, empty, list(hunt.kinds(empty)), counts, PATTERNS[0])


def _arrangements(hunt: Hunt, skeleton: Skeleton) -> Iterator[Choice]:
    """The best counts in all other arrangements."""
    _, empty = _filled_and_empty(hunt, skeleton)
    counts = hunt.counts(empty)[0]
    for pattern in PATTERNS[1:]:
        yield arranged(hunt.request, empty, list(hunt.kinds(empty)), counts, pattern)


def _filled_and_empty(hunt: Hunt, skeleton: Skeleton) -> tuple[Choice, Choice]:
    """The static choice, and the one in which nothing stays."""
    static = static_choice(hunt.request, *skeleton)
    assert static is not None
    static = dataclasses.replace(static, stored=frozenset())
    return static, dataclasses.replace(static, residents=frozenset(), cached=frozenset())


def _counts(hunt: Hunt, empty: Choice) -> Iterator[Counts]:
    """How many of each kind stay, as the solver has it, where there is one, and greedily from both ends."""
    kinds, on_device = list(hunt.kinds(empty).values()), hunt.request.on_device
    room = room_for(hunt.request, empty)
    assert room is not None
    solved = best_counts(kinds, slot_room=room[0], ram_room=room[1], on_device=on_device)
    if solved is not None:
        yield solved
    by_worth = sorted(range(len(kinds)), key=lambda k: -_worth(kinds[k]))
    yield _greedy(kinds, by_worth, room, on_device=on_device)
    yield _greedy(kinds, by_worth[::-1], room, on_device=on_device)


def _kinds(hunt: Hunt, empty: Choice) -> dict[tuple[int, ...], BlockKind]:
    """Blocks that are alike, members -> what one of them takes; from the plan in which nothing stays."""
    plan = plan_of(hunt.request, layout_of(hunt.request, empty))
    steps = hunt.pricing.steps(plan)
    seconds = hunt.pricing.op_seconds(steps)
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


def _greedy(
    kinds: Sequence[BlockKind], order: Sequence[int], room: tuple[int, int], *, on_device: bool
) -> Counts:
    """As many as there is room for, kind after kind."""
    slot_left, ram_left = room
    resident, cached = [0] * len(kinds), [0] * len(kinds)
    for k in order:
        kind = kinds[k]
        resident[k] = min(kind.num, slot_left // max(kind.slot_bytes, 1))
        slot_left -= resident[k] * kind.slot_bytes
        if on_device:
            cached[k] = min(kind.num - resident[k], ram_left // max(kind.file_bytes, 1))
            ram_left -= cached[k] * kind.file_bytes
    return Counts(tuple(resident), tuple(cached))


def _worth(kind: BlockKind) -> float:
    """Seconds of reading that a byte saves."""
    return kind.reading_s / max(kind.slot_bytes, 1)


# ------------------------------------------------------------------ local moves


def _try_the_drive(hunt: Hunt) -> None:
    """The best with activations of more and more blocks on NVMe. Of few blocks, whose patterns are coarse, then with
    those of one block or two elsewhere, while that helps."""
    for choice in hunt.ranked()[:NUM_POLISHED]:
        for other in storing(hunt.request, choice):
            hunt.evaluate(other)
    if len(able_to_keep(hunt.request)) > FEW_PLACES:
        return
    best = hunt.ranked()[0]
    while not hunt.is_over:
        for other in elsewhere(hunt.request, best):
            hunt.evaluate(other)
        if hunt.ranked()[0] is best:
            return
        best = hunt.ranked()[0]


def _polish(hunt: Hunt, patience: int) -> None:
    """Moves of one block or two from the best candidates, kept where they help, until the tries are used up."""
    chance = Random(0)
    leaders = hunt.ranked()[:NUM_POLISHED]
    keys = [hunt.evaluate(choice) for choice in leaders]
    misses = 0
    while leaders and not (hunt.is_over or hunt.is_at_the_limit) and misses < patience:
        misses += 1
        for k, leader in enumerate(leaders):
            other = moved(hunt.request, leader, chance)
            if other is None:
                continue
            key, best = hunt.evaluate(other), keys[k]
            if key is not None and best is not None and key < best:
                leaders[k], keys[k], misses = other, key, 0
