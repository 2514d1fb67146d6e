"""How long a plan's ops take on a machine: work, counted operator by operator, through the profile's curves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ssdtune.schedule.plan import Direction, Kind, Lane, Op, Plan
from ssdtune.schedule.profile import InModel, Profile
from ssdtune.schedule.simulate import Simulation, simulate

TRANSFER_OF = {
    Kind.LOAD: "nvme_read",
    Kind.FETCH: "nvme_read",
    Kind.STORE: "nvme_write",
    Kind.UNPACK: "unpack",
    Kind.UPLOAD: "h2d",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """Operators by (kind, size) -> how many. Kinds and sizes as in `profile.OPERATORS`.

    A matrix product is as long as the longer of its FLOP and its bytes: `matmul` entries have both, as
    (kind, FLOP, bytes); others have bytes 0.
    """

    operators: Mapping[tuple[str, float, float], int]

    @property
    def flop(self) -> float:
        """Of matrix products and attention."""
        return sum(
            size * n
            for (kind, size, _), n in self.operators.items()
            if kind == "matmul" or kind.startswith("attention")
        )

    @property
    def num_calls(self) -> int:
        """How many operators."""
        return sum(self.operators.values())

    def seconds(self, profile: Profile, dtype: str) -> float:
        """How long it takes inside a model, one operator after the other."""
        curves_s = self.curves_s(profile, dtype)
        return profile.in_model.get(dtype, InModel()).seconds(self.num_calls, curves_s)

    def curves_s(self, profile: Profile, dtype: str) -> float:
        """How long it takes by the curves alone."""
        total = 0.0
        pointwise = profile.operator(dtype, "pointwise")
        for (kind, size, num_bytes), count in self.operators.items():
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

    def between_s(self, profile: Profile) -> float:
        """Seconds between two steps; optimizers call operators on many tensors at once, so their curves are all."""
        return self.between.curves_s(profile, self.dtype)


def predict_step(
    plan: Plan, kind: str, work: StepWork, profile: Profile, *, num_micro_batches: int
) -> Simulation:
    """A steady step of the plan on this machine. Raises ProfileError for a curve that is missing."""
    seconds = op_seconds(plan, kind, work, profile, num_micro_batches=num_micro_batches)
    between_s = work.between_s(profile) if kind == "train" else 0.0
    return simulate(plan.sequences[kind], seconds, between_s=between_s)


def op_seconds(
    plan: Plan, kind: str, work: StepWork, profile: Profile, *, num_micro_batches: int
) -> list[float]:
    """Seconds of each op of a kind of step, by id. Raises ProfileError for a curve that is missing."""
    steps = plan.sequences[kind]
    turns: dict[tuple[int, Direction], int] = {}
    seconds: list[float] = []
    for op in steps.ops:
        if op.kind is Kind.COMPUTE:
            visit = steps.visits[op.visit]
            key = (visit.block, visit.direction)
            turn = turns[key] = turns.get(key, -1) + 1
            works = work.passes[kind].get(key, ())
            one = works[turn].seconds(profile, work.dtype) if turn < len(works) else 0.0
            seconds.append(num_micro_batches * one)
        else:
            seconds.append(profile.transfer(_transfer_of(op)).seconds(op.num_bytes))
    return _slowed(steps.ops, seconds, profile)


def _transfer_of(op: Op) -> str:
    """The profile's name for what the op moves."""
    return "d2d" if op.lane is Lane.DEVICE_COPY else TRANSFER_OF[op.kind]


def _slowed(ops: Sequence[Op], seconds: list[float], profile: Profile) -> list[float]:
    """Compute while a reader is at work takes longer; a reader works for its share of the step."""
    compute = sum(s for op, s in zip(ops, seconds, strict=True) if op.kind is Kind.COMPUTE)
    reading = sum(s for op, s in zip(ops, seconds, strict=True) if op.kind is Kind.LOAD)
    share = min(reading / compute, 1.0) if compute else 0.0
    factor = 1 + share * profile.reading_slows
    return [
        s * factor if op.kind is Kind.COMPUTE else s for op, s in zip(ops, seconds, strict=True)
    ]
