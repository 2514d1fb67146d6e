"""How long a plan's ops take on a machine: work, counted operator by operator, through the profile's curves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ssdtune.schedule.plan import Direction, Kind, Lane, Op, Plan, StepPlan
from ssdtune.schedule.profile import FRESH, InModel, Profile
from ssdtune.schedule.simulate import Simulation, simulate
from ssdtune.schedule.stored import with_stored_inputs

TRANSFER_OF = {
    Kind.LOAD: "nvme_read",
    Kind.FETCH: "nvme_read",
    Kind.STORE: "nvme_write",
    Kind.UNPACK: "unpack",
    Kind.DECODE: "decode",
    Kind.UPLOAD: "h2d",
    Kind.DOWNLOAD_INPUT: "d2h",
    Kind.UPLOAD_INPUT: "h2d",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """Operators by (kind, size) -> how many. Kinds and sizes as in `profile.OPERATORS`.

    A matrix product is as long as the longer of its FLOP and its bytes: `matmul` entries have both, as
    (kind, FLOP, bytes); others have bytes 0. num_autograd_calls: how many of the operators autograd calls, which takes
    less time between them than a model's own code.
    """

    operators: Mapping[tuple[str, float, float], int]
    num_autograd_calls: int = 0

    @property
    def flop(self) -> float:
        """Of matrix products and attention."""
        return sum(
            size * n
            for (kind, size, _), n in self.operators.items()
            if kind.startswith(("matmul", "attention"))
        )

    @property
    def num_calls(self) -> int:
        """How many operators."""
        return sum(n for (kind, *_), n in self.operators.items() if kind != FRESH)

    def seconds(self, profile: Profile, dtype: str) -> float:
        """How long it takes inside a model, one operator after the other."""
        curves_s = self.curves_s(profile, dtype)
        return profile.in_model.get(dtype, InModel()).seconds(
            self.num_calls - self.num_autograd_calls, self.num_autograd_calls, curves_s
        )

    def curves_s(self, profile: Profile, dtype: str) -> float:
        """How long it takes by the curves alone."""
        total = 0.0
        if not self.operators:
            return total
        pointwise = profile.operator(dtype, "pointwise")
        for (kind, size, num_bytes), count in self.operators.items():
            if kind == FRESH and kind not in profile.operators.get(dtype, ()):
                continue  # a device's memory is its allocator's, and older profiles don't have it
            each = profile.operator(dtype, kind).seconds(size)
            if num_bytes:
                each = max(each, pointwise.seconds(num_bytes))
            total += count * each
        return total


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """The work of one micro-batch's passes, by block and direction, and of what lies between steps.

    passes: kind of step -> (block's number, direction) -> work of one micro-batch, of each visit in turn: a tied
    embedding and head is visited twice. between: once a step, the optimizer.
    """

    passes: Mapping[str, Mapping[tuple[int, Direction], Sequence[Work]]]
    between: Work
    dtype: str
    behind: Mapping[int, Sequence[Work]] = dataclasses.field(
        default_factory=dict[int, Sequence[Work]]
    )

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
        factors: lane -> what its ops take beyond the profile's curves, as measured since; 1 where it is missing.

    Raises ProfileError for a curve that is missing.
    """

    def __init__(
        self,
        work: StepWork,
        profile: Profile,
        *,
        kind: str = "train",
        num_micro_batches: int,
        stored_bytes: int = 0,
        factors: Mapping[Lane, float] | None = None,
    ) -> None:
        self.kind, self.profile, self.factors = kind, profile, dict(factors or {})
        self.stored_bytes = stored_bytes
        self.between_s = work.between_s(profile) if kind == "train" else 0.0
        self._visits = {
            key: [num_micro_batches * each.seconds(profile, work.dtype) for each in works]
            for key, works in work.passes[kind].items()
        }
        self._behind = {
            block: [num_micro_batches * each.seconds(profile, work.dtype) for each in works]
            for block, works in work.behind.items()
        }

    def simulation(self, plan: Plan) -> Simulation:
        """A steady step of the plan."""
        steps = self.steps(plan)
        return simulate(steps, self.op_seconds(steps), between_s=self.between_s)

    def steps(self, plan: Plan) -> StepPlan:
        """The step of the plan with all that goes over its lanes."""
        return with_stored_inputs(
            plan.sequences[self.kind],
            self.stored_bytes,
            tier=plan.block_inputs,
            on_device=plan.on_device,
        )

    def op_seconds(self, steps: StepPlan) -> list[float]:
        """Seconds of each op, by id."""
        turns: dict[tuple[int, Direction], int] = {}
        seconds: list[float] = []
        for op in steps.ops:
            if op.kind is Kind.COMPUTE:
                visit = steps.visits[op.visit]
                key = (visit.block, visit.direction)
                turn = turns[key] = turns.get(key, -1) + 1
                times: Sequence[float] = self._visits.get(key, ())
                if visit.keeps and visit.direction is Direction.BACKWARD:
                    times = self._behind.get(visit.block, times)
                one = times[turn] if turn < len(times) else 0.0
            else:
                one = self.profile.transfer(_transfer_of(op)).seconds(op.num_bytes)
            seconds.append(one * self.factors.get(op.lane, 1.0))
        return _slowed(steps.ops, seconds, self.profile)


def predict_step(
    plan: Plan, kind: str, work: StepWork, profile: Profile, *, num_micro_batches: int
) -> Simulation:
    """A steady step of the plan on this machine. Raises ProfileError for a curve that is missing."""
    pricing = Pricing(work, profile, kind=kind, num_micro_batches=num_micro_batches)
    return pricing.simulation(plan)


def _transfer_of(op: Op) -> str:
    """The profile's name for what the op moves."""
    return "d2d" if op.lane is Lane.DEVICE_COPY else TRANSFER_OF[op.kind]


def _slowed(ops: Sequence[Op], seconds: list[float], profile: Profile) -> list[float]:
    """Compute loses some time for each byte that is read meanwhile, however long its reading takes: a drive that makes
    the reader wait leaves the cores to compute."""
    compute = sum(s for op, s in zip(ops, seconds, strict=True) if op.kind is Kind.COMPUTE)
    num_bytes = sum(op.num_bytes for op in ops if op.kind is Kind.LOAD)
    factor = 1 + num_bytes * profile.reading_takes / compute if compute else 1.0
    return [
        s * factor if op.kind is Kind.COMPUTE else s for op, s in zip(ops, seconds, strict=True)
    ]
