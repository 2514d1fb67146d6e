"""How long a plan's ops take on a machine: work, counted operator by operator, through the profile's curves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ssdtune.schedule.fluid import simulate_fluid
from ssdtune.schedule.plan import Decoding, Direction, Kind, Lane, Op, Plan, StepPlan, Visit
from ssdtune.schedule.profile import DECODE, DEVICE_DECODE, FRESH, MAY_LACK, Profile
from ssdtune.schedule.simulate import Simulation, simulate
from ssdtune.schedule.stored import (
    ACTIVATIONS_ON_NVME,
    with_stored_activations,
    with_stored_inputs,
)
from ssdtune.schedule.stores import with_stored_weights

TRANSFER_OF = {
    Kind.LOAD: "nvme_read",
    Kind.FETCH: "nvme_read",
    Kind.STORE: "nvme_write",
    Kind.FETCH_ACTIVATIONS: "nvme_read",
    Kind.STORE_ACTIVATIONS: "nvme_write",
    Kind.UNPACK: "unpack",
    Kind.DECODE: DECODE,
    Kind.UPLOAD: "h2d",
    Kind.DOWNLOAD_INPUT: "d2h",
    Kind.UPLOAD_INPUT: "h2d",
    Kind.DOWNLOAD: "d2h",
}


# Pairs of lanes that slow each other.
DRIVE, LINK = (Lane.NVME_READ, Lane.NVME_WRITE), (Lane.H2D, Lane.D2H)
PROCESSOR = (Lane.COMPUTE, Lane.CPU)
NO_LESS = 2.0  # seconds of either alone in a second of both: neither slows the other
DECODES = (DECODE, DEVICE_DECODE)  # of packed weights, by bytes that they decode to


class Operator(NamedTuple):
    """One call. kind, size: as in `profile.OPERATORS`, or of DECODES, behind a colon the kind of weights.

    A matrix product has its bytes too, since it takes as long as the longer of FLOP and bytes, and the rows that one
    matrix is multiplied by; both are 0 for others, rows also for products of many matrices.
    """

    kind: str
    size: float
    num_bytes: float = 0.0
    num_rows: int = 0

    def seconds(self, profile: Profile, dtype: str) -> float:
        """How long it takes alone. Raises ProfileError for a curve that is missing."""
        if self.kind.partition(":")[0] in DECODES:
            name, _, kind = self.kind.partition(":")
            return profile.decoding_s(name, self.size, ((kind, self.size),))
        if self.kind in MAY_LACK and self.kind not in profile.curves(dtype):
            return 0.0
        if self.num_rows:
            few = profile.few_rows_s(dtype, self.kind, self.size, self.num_rows)
            if few is not None:
                return few
        one = profile.operator(dtype, self.kind).seconds(self.size)
        if not self.num_bytes:
            return one
        return max(one, profile.operator(dtype, "pointwise").seconds(self.num_bytes))


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """Operators -> how many. num_autograd_calls: how many of them autograd calls, which takes less time between them
    than a model's own code."""

    operators: Mapping[Operator, int]
    num_autograd_calls: int = 0

    @property
    def name(self) -> object:
        """Equal works have equal ones; to look them up by."""
        return frozenset(self.operators.items()), self.num_autograd_calls

    @property
    def flop(self) -> float:
        """Of matrix products and attention."""
        return sum(
            op.size * n
            for op, n in self.operators.items()
            if op.kind.startswith(("matmul", "attention"))
        )

    @property
    def num_calls(self) -> int:
        """How many operators."""
        return sum(n for op, n in self.operators.items() if op.kind != FRESH)

    def seconds(self, profile: Profile, dtype: str, *, is_recorded: bool = True) -> float:
        """How long it takes inside a model, one operator after the other. is_recorded: for a backward pass."""
        return profile.inside(dtype).seconds(
            self.num_calls - self.num_autograd_calls,
            self.num_autograd_calls,
            self.curves_s(profile, dtype),
            is_recorded=is_recorded,
        )

    def curves_s(self, profile: Profile, dtype: str) -> float:
        """How long it takes by the curves alone."""
        return sum(n * op.seconds(profile, dtype) for op, n in self.operators.items())


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Moves:
    """What a zeroth-order step does to a block's weights in a visit, however many micro-batches pass.

    shifts: block -> making all variants of its weights. updates: block -> one change of what is stored of them. window:
    steps that make one such change together. num_missed: changes, on average over the run, that a block from the drive
    has missed; one that has stayed in its slot missed those of one step. anew: blocks that take all changes so far in
    each visit, wherever they lie; as many as `num_missed`, too. fold_steps: from one time that a block which is read goes
    back to a working copy to the next; 0: none does.
    """

    shifts: Mapping[int, Work]
    updates: Mapping[int, Work] = dataclasses.field(default_factory=dict[int, Work])
    num_missed: float = 1.0
    window: int = 1
    anew: frozenset[int] = frozenset()
    fold_steps: int = 0


def missed_steps(num_steps: int, fold_steps: int, window: int = 1) -> float:
    """Steps that a block from the drive has missed when it comes, on average over a run: half of the run, or half of
    the way from one working copy of it to the next. fold_steps: from one to the next; 0: there is none. window: steps
    that change what is stored together, and count as one; what `fold_steps` is a multiple of."""
    if 0 < fold_steps < num_steps:
        return (fold_steps / window - 1) / 2 + 1 / window
    whole, rest = divmod(num_steps, window)
    return whole * (window * (whole - 1) / 2 + rest) / num_steps


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """The work of one micro-batch's passes, by block and direction, and of what lies between steps.

    passes: kind of step -> (block's number, direction) -> work of one micro-batch, of each visit in turn: a tied
    embedding and head is visited twice. between: once a step, the optimizer.
    autocast: the number format that products and attention are computed in, where it is not `dtype`.
    behind: block -> a backward that does not compute its activations again. moves: of zeroth-order steps.
    """

    passes: Mapping[str, Mapping[tuple[int, Direction], Sequence[Work]]]
    between: Work
    dtype: str
    behind: Mapping[int, Sequence[Work]] = dataclasses.field(
        default_factory=dict[int, Sequence[Work]]
    )
    moves: Moves | None = None
    autocast: str | None = None

    def between_s(self, profile: Profile) -> float:
        """Seconds between two steps; optimizers call operators on many tensors at once, so their curves are all."""
        return self.between.curves_s(profile, self.dtype)


class Pricing:
    """What plans cost for one kind of step: seconds of every op, hence of the step.

    Args:
        work: of one micro-batch.
        profile: the machine's.
        kind: of step.
        num_micro_batches: that pass a block in one visit.
        stored_bytes: block inputs of one step, which are moved where they do not stay (`stored.py`).
        activation_bytes: of each block, what the visits of one step would keep, which is moved where the plan has it on
            NVMe; empty: not known.
        factors: lane -> what its ops take beyond the profile's curves and its refit, as measured since; 1 where it is missing.

    Raises ProfileError for a curve that is missing.
    """

    def __init__(  # noqa: PLR0913 - the first two are what is priced, the others say how often and how
        self,
        work: StepWork,
        profile: Profile,
        *,
        kind: str = "train",
        num_micro_batches: int,
        stored_bytes: int = 0,
        activation_bytes: Sequence[int] = (),
        factors: Mapping[Lane, float] | None = None,
    ) -> None:
        if work.autocast is not None:
            profile = profile.under_autocast(work.dtype, work.autocast)
        self.kind, self.profile = kind, profile
        refit = profile.refit_for(kind, work.dtype, work.autocast)
        since = factors or {}
        self.factors = {lane: refit.get(lane, 1.0) * since.get(lane, 1.0) for lane in Lane}
        self.stored_bytes, self.activation_bytes = stored_bytes, activation_bytes
        self.between_s = work.between_s(profile) if kind == "train" else 0.0
        known: dict[object, float] = {}  # most blocks are alike
        is_recorded = kind == "train"

        def seconds(works: Sequence[Work]) -> list[float]:
            for each in works:
                if each.name not in known:
                    one_s = each.seconds(profile, work.dtype, is_recorded=is_recorded)
                    known[each.name] = num_micro_batches * one_s
            return [known[each.name] for each in works]

        self._visits = {key: seconds(works) for key, works in work.passes[kind].items()}
        self._behind = {block: seconds(works) for block, works in work.behind.items()}
        moves = work.moves if kind == "forward" and work.moves else Moves(shifts={})
        # These are few calls: the curves are all.
        self._shift_s, self._update_s = (
            {block: each.curves_s(profile, work.dtype) for block, each in works.items()}
            for works in (moves.shifts, moves.updates)
        )
        self._num_missed, self._num_of_step = moves.num_missed, 1 / moves.window
        self._anew, self._fold_steps = moves.anew, moves.fold_steps
        self._transfers_s: dict[tuple[Kind, Lane, int, int, Decoding], float] = {}

    def simulation(self, plan: Plan) -> Simulation:
        """A steady step of the plan."""
        return self.simulated(self.steps(plan))

    def simulated(self, steps: StepPlan) -> Simulation:
        """A steady step, followed moment by moment (`fluid.py`) where lanes slow each other. `busy_s` is then what they
        took so."""
        shared = self._shared(steps)
        if not shared:
            return simulate(steps, self.op_seconds(steps), between_s=self.between_s)
        demands = {lane: {str(pair): 1.0 for pair in shared if lane in pair} for lane in Lane}
        found = simulate_fluid(
            steps,
            self._alone_s(steps),
            [demands[op.lane] for op in steps.ops],
            {str(pair): overlap for pair, overlap in shared.items()},
            between_s=self.between_s,
        )
        busy: dict[Lane, float] = {}
        for each in found.ops:
            busy[each.op.lane] = busy.get(each.op.lane, 0.0) + each.end_s - each.start_s
        return dataclasses.replace(found, busy_s=busy)

    def steps(self, plan: Plan) -> StepPlan:
        """The step of the plan with all that goes over its lanes."""
        steps = with_stored_inputs(
            plan.sequences[self.kind],
            self.stored_bytes,
            tier=plan.block_inputs,
            on_device=plan.on_device,
        )
        steps = with_stored_activations(steps, self.activation_bytes, on_device=plan.on_device)
        return with_stored_weights(steps, plan, self._fold_steps)

    def op_seconds(self, steps: StepPlan) -> list[float]:
        """Seconds of each op, by id, as long as they take beside the others of its pass."""
        seconds = self._alone_s(steps)
        for pair, overlap in self._shared(steps).items():
            seconds = _sharing(steps.ops, seconds, pair, overlap)
        return seconds

    def _shared(self, steps: StepPlan) -> dict[tuple[Lane, Lane], float]:
        """Pairs of lanes of the step that slow each other, and how much they do in a second of both."""
        lanes = {op.lane for op in steps.ops}
        overlaps = {
            DRIVE: self.profile.drive_overlap,
            LINK: self.profile.link_overlap,
            # Where there are copies by the CPU, compute is there too: beside a device all copies are its own.
            PROCESSOR: self.profile.copy_overlap,
        }
        return {
            pair: overlap
            for pair, overlap in overlaps.items()
            if overlap is not None and overlap < NO_LESS and lanes.issuperset(pair)
        }

    def _alone_s(self, steps: StepPlan) -> list[float]:
        """Seconds of each op, by id, that no other lane slows but by reading."""
        turns: dict[tuple[int, Direction], int] = {}
        seconds: list[float] = []
        copied = _copied_bytes(steps)
        for op in steps.ops:
            if op.kind is Kind.COMPUTE:
                visit = steps.visits[op.visit]
                key = (visit.block, visit.direction)
                turn = turns[key] = turns.get(key, -1) + 1
                times: Sequence[float] = self._visits.get(key, ())
                if visit.keeps and visit.direction is Direction.BACKWARD:
                    times = self._behind.get(visit.block, times)
                one = times[turn] if turn < len(times) else 0.0
                one += self._moving_weights_s(visit, is_first=not turn)
                if op.visit in copied:
                    one += self.profile.transfer("unpack").seconds(copied[op.visit])
            else:
                one = self._transfer_s(op)
            seconds.append(one * self.factors[op.lane])
        return _slowed(steps.ops, seconds, self.profile)

    def _moving_weights_s(self, visit: Visit, *, is_first: bool) -> float:
        """Seconds of making variants of a block, and of the steps that it has missed. is_first: of its visits in the
        step."""
        is_behind = visit.is_filled_for or visit.block in self._anew
        num = self._num_missed if is_behind else is_first * self._num_of_step
        return self._shift_s.get(visit.block, 0.0) + num * self._update_s.get(visit.block, 0.0)

    def _transfer_s(self, op: Op) -> float:
        """Seconds of an op that moves bytes; looked up, since a search asks for the same blocks' again and again."""
        key = (op.kind, op.lane, op.num_bytes, op.decoded_bytes, op.decoding)
        if key not in self._transfers_s:
            self._transfers_s[key] = self._computed_transfer_s(op)
        return self._transfers_s[key]

    def _computed_transfer_s(self, op: Op) -> float:
        if op.kind is Kind.STORE_WEIGHTS and not self.profile.knows_writes:
            return 0.0  # of an older profile, which is said: what else such a step takes is known
        name = self.profile.writes if op.lane is Lane.NVME_WRITE else _transfer_of(op)
        if name in DECODES:
            return self.profile.decoding_s(name, op.num_bytes, op.decoding)
        seconds = self.profile.transfer(name).seconds(op.num_bytes)
        if op.decoded_bytes:
            seconds += self.profile.decoding_s(DEVICE_DECODE, op.decoded_bytes, op.decoding)
        return seconds


def predict_step(
    plan: Plan, kind: str, work: StepWork, profile: Profile, *, num_micro_batches: int
) -> Simulation:
    """A steady step of the plan on this machine. Raises ProfileError for a curve that is missing."""
    pricing = Pricing(work, profile, kind=kind, num_micro_batches=num_micro_batches)
    return pricing.simulation(plan)


def _transfer_of(op: Op) -> str:
    """The profile's name for what the op moves."""
    if op.lane is Lane.DEVICE_COPY:
        return DEVICE_DECODE if op.kind is Kind.DECODE else "d2d"
    return TRANSFER_OF[op.kind]


def _copied_bytes(steps: StepPlan) -> dict[int, int]:
    """By visit, bytes of activations that compute copies to the buffers on their way to the drive, or from them; none on
    a device, where a stream of its own does."""
    if any(op.lane is Lane.D2H for op in steps.ops):
        return {}
    return {op.visit: op.num_bytes for op in steps.ops if op.kind in ACTIVATIONS_ON_NVME}


def _sharing(
    ops: Sequence[Op], seconds: Sequence[float], pair: tuple[Lane, Lane], overlap: float
) -> list[float]:
    """The work of two lanes in each pass, as long as it takes beside each other.

    overlap: of what they share, c (`Profile.drive_overlap`). While both are under way each runs at c/2. The shorter lane
    is so all the time, as if the other never paused: 2/c times as long; the longer one is for as long as that, and
    alone for the rest. So the longer lane is what both together need, and a pass that is bound by it takes that.
    """
    found = list(seconds)
    for direction in Direction:
        lanes = [
            [op.id for op in ops if op.lane is lane and op.direction is direction] for lane in pair
        ]
        alone = [sum(seconds[i] for i in lane) for lane in lanes]
        more = (2 / overlap - 1) * min(alone)
        for lane, lane_s in zip(lanes, alone, strict=True):
            for i in lane if more else ():
                found[i] *= 1 + more / lane_s
    return found


def _slowed(ops: Sequence[Op], seconds: list[float], profile: Profile) -> list[float]:
    """Compute loses some time for each byte that is read meanwhile, however long its reading takes: a drive that makes
    the reader wait leaves the cores to compute."""
    compute = sum(s for op, s in zip(ops, seconds, strict=True) if op.kind is Kind.COMPUTE)
    num_bytes = sum(op.num_bytes for op in ops if op.kind is Kind.LOAD)
    factor = 1 + num_bytes * profile.reading_takes / compute if compute else 1.0
    return [
        s * factor if op.kind is Kind.COMPUTE else s for op, s in zip(ops, seconds, strict=True)
    ]
