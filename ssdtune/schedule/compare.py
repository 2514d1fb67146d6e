"""A step as it was predicted and as it ran, op by op. A pure function of a simulation and a trace."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ssdtune.schedule.plan import BLOCK_KINDS, Direction, Kind, Lane, Op, Plan
from ssdtune.schedule.simulate import Simulation
from ssdtune.schedule.trace import TraceOp, covered_s
from ssdtune.sizes import format_size

DURING = 0.5  # an op runs beside reading where reading covers at least so much of it


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """Seconds since the step's first visit began."""

    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """From start to end."""
        return self.end_s - self.start_s


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A plan, and when each op of a step of its kind was predicted to run. step_s: of the whole step."""

    plan: Plan
    spans: tuple[Span, ...]
    step_s: float
    kind: str = "train"

    @staticmethod
    def of(plan: Plan, simulation: Simulation, kind: str = "train") -> Prediction:
        """What a simulation of the plan says. Ops that move block inputs are not the plan's, and are left out."""
        first = min(each.start_s for each in simulation.ops if each.op.kind is Kind.COMPUTE)
        own = [each for each in simulation.ops if each.op.kind in BLOCK_KINDS]
        spans = tuple(Span(each.start_s - first, each.end_s - first) for each in own)
        return Prediction(plan=plan, spans=spans, step_s=simulation.step_s, kind=kind)

    @property
    def ops(self) -> tuple[Op, ...]:
        """Of the step."""
        return self.plan.sequences[self.kind].ops

    def to_json(self) -> str:
        """For the run's folder."""
        spans = [[round(span.start_s, 6), round(span.end_s, 6)] for span in self.spans]
        plan = json.loads(self.plan.to_json())
        return json.dumps({"plan": plan, "spans": spans, "step_s": self.step_s, "kind": self.kind})

    @staticmethod
    def from_json(text: str) -> Prediction:
        """Reads what `to_json` wrote. Raises PlanError, ValueError, KeyError or TypeError for anything else."""
        raw: dict[str, Any] = json.loads(text)
        plan = Plan.from_json(json.dumps(raw["plan"]))
        spans = tuple(Span(float(start), float(end)) for start, end in raw["spans"])
        kind = str(raw.get("kind", "train"))
        if len(spans) != len(plan.sequences[kind].ops):
            raise ValueError("there is not one span for each op")
        return Prediction(plan=plan, spans=spans, step_s=float(raw["step_s"]), kind=kind)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One op both ways. wait_s: of the measured one, how long compute stood still before it."""

    op: Op
    predicted: Span
    measured: Span
    wait_s: float
    why: str

    @property
    def off_s(self) -> float:
        """How much longer it took than predicted."""
        return self.measured.seconds - self.predicted.seconds


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """pairs: of the ops that ran as planned. unplanned: those that the plan does not have."""

    prediction: Prediction
    pairs: tuple[Pair, ...]
    unplanned: tuple[TraceOp, ...]
    measured_s: float

    def lanes(self) -> dict[Lane, tuple[float, float]]:
        """Predicted and measured seconds of work."""
        return {lane: self._busy(lane, tuple(Direction)) for lane in Lane if self._has(lane)}

    def passes(self) -> Iterator[tuple[Direction, Lane, Lane, Mapping[Lane, tuple[float, float]]]]:
        """Yields for each half of the step the lane that bounds it, predicted and measured, and all lanes' seconds."""
        for direction in Direction:
            lanes = {lane: self._busy(lane, (direction,)) for lane in Lane if self._has(lane)}
            predicted = max(lanes, key=lambda lane: lanes[lane][0])
            measured = max(lanes, key=lambda lane: lanes[lane][1])
            yield direction, predicted, measured, lanes

    def worst(self, num: int) -> list[Pair]:
        """The ops that miss by the most seconds."""
        return sorted(self.pairs, key=lambda pair: -abs(pair.off_s))[:num]

    def _has(self, lane: Lane) -> bool:
        return any(pair.op.lane is lane for pair in self.pairs)

    def _busy(self, lane: Lane, directions: Sequence[Direction]) -> tuple[float, float]:
        chosen = [p for p in self.pairs if p.op.lane is lane and p.op.direction in directions]
        predicted = sum(pair.predicted.seconds for pair in chosen)
        return predicted, covered_s((p.measured.start_s, p.measured.end_s) for p in chosen)


def compare(prediction: Prediction, trace: Sequence[TraceOp], step: int) -> Comparison:
    """One step of the trace beside its prediction. Raises ValueError where the trace does not hold it whole."""
    own = [op for op in trace if op.step == step]
    visits = [op for op in own if op.kind is Kind.COMPUTE]
    if not visits:
        raise ValueError(f"the trace holds no visits of step {step}")
    first = min(op.start_s + op.wait_s for op in visits)
    later = [op.start_s for op in trace if op.step == step + 1 and op.kind is Kind.COMPUTE]
    last = min(later, default=max(op.end_s for op in visits))
    ops = prediction.ops
    reads = [Span(o.start_s, o.end_s) for o in trace if o.lane is Lane.NVME_READ]
    pairs: list[Pair] = []
    unplanned: list[TraceOp] = []
    for op in own:
        if not 0 <= op.op_id < len(ops) or ops[op.op_id].block != op.block:
            unplanned.append(op)
            continue
        planned, expected = ops[op.op_id], prediction.spans[op.op_id]
        span = Span(op.start_s + op.wait_s - first, op.end_s - first)
        why = _why(op, planned, expected, reads)
        pairs.append(Pair(op=planned, predicted=expected, measured=span, wait_s=op.wait_s, why=why))
    return Comparison(
        prediction=prediction,
        pairs=tuple(pairs),
        unplanned=tuple(unplanned),
        measured_s=last - first,
    )


def _why(op: TraceOp, planned: Op, expected: Span, reads: Sequence[Span]) -> str:
    seconds = op.end_s - op.start_s - op.wait_s
    if op.is_miss:
        return "fetched on demand: the visit came in an order that the plan does not have"
    if planned.num_bytes and seconds > 0 and expected.seconds > 0:
        rates = [round(planned.num_bytes / s) for s in (seconds, expected.seconds)]
        return f"{format_size(rates[0])}/s, predicted {format_size(rates[1])}/s"
    if op.kind is not Kind.COMPUTE or seconds <= expected.seconds:
        return ""
    inside = [
        (max(r.start_s, op.start_s), min(r.end_s, op.end_s))
        for r in reads
        if r.end_s > op.start_s and r.start_s < op.end_s
    ]
    if covered_s(inside) > DURING * seconds:
        return "computed while the drive was read"
    return "slower than its operators' curves"
