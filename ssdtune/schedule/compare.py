"""A step as it was predicted and as it ran, op by op. A pure function of a simulation and a trace.

What waits for backward on NVMe (`stored.py`) is no op of the plan: it moves beside them in pieces, as it comes. All
pieces that a block moves one way are one pair.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ssdtune.schedule.plan import BLOCK_KINDS, Direction, Kind, Lane, Op, Plan
from ssdtune.schedule.saved_plan import op_from, plan_from
from ssdtune.schedule.simulate import SimulatedOp, Simulation
from ssdtune.schedule.stored import ACTIVATIONS_ON_NVME, INPUTS_ON_NVME
from ssdtune.schedule.trace import UNPLANNED, TraceOp, covered_s
from ssdtune.sizes import format_size

DURING = 0.5  # an op runs beside reading where reading covers at least so much of it
# What the drive takes and gives beside the plan's ops. Copies over a device's link leave no trace.
MOVES = (*INPUTS_ON_NVME, *ACTIVATIONS_ON_NVME, Kind.STORE_WEIGHTS)
BACK = "blocks"  # that go back to a working copy of the weights


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
    """A plan, and when each op of a step of its kind was predicted to run.

    moves: ops beside the plan's, of MOVES, and when. step_s: of the whole step. steps: of the trace beside it, the
    numbers of those that trained; empty: not known.
    """

    plan: Plan
    spans: tuple[Span, ...]
    step_s: float
    kind: str = "train"
    moves: tuple[tuple[Op, Span], ...] = ()
    steps: tuple[int, ...] = ()

    @staticmethod
    def of(
        plan: Plan, simulation: Simulation, kind: str = "train", steps: Sequence[int] = ()
    ) -> Prediction:
        """What a simulation of the plan says."""
        first = min(each.start_s for each in simulation.ops if each.op.kind is Kind.COMPUTE)

        def span(each: SimulatedOp) -> Span:
            return Span(each.start_s - first, each.end_s - first)

        return Prediction(
            plan=plan,
            spans=tuple(span(each) for each in simulation.ops if each.op.kind in BLOCK_KINDS),
            step_s=simulation.step_s,
            kind=kind,
            moves=tuple(
                (each.op._replace(id=UNPLANNED, after=(), after_previous=()), span(each))
                for each in simulation.ops
                if each.op.kind in MOVES
            ),
            steps=tuple(steps),
        )

    @property
    def ops(self) -> tuple[Op, ...]:
        """Of the step."""
        return self.plan.sequences[self.kind].ops

    def to_json(self) -> str:
        """For the run's folder."""
        return json.dumps(
            {
                "plan": json.loads(self.plan.to_json()),
                "spans": [_listed(span) for span in self.spans],
                "step_s": self.step_s,
                "kind": self.kind,
                "moves": [[op._asdict(), _listed(span)] for op, span in self.moves],
                "steps": self.steps,
            }
        )

    @staticmethod
    def from_json(text: str) -> Prediction:
        """Reads what `to_json` wrote. Raises PlanError, ValueError, KeyError or TypeError for anything else."""
        raw: dict[str, Any] = json.loads(text)
        plan = plan_from(json.dumps(raw["plan"]))
        spans = tuple(map(_span_from, raw["spans"]))
        kind = str(raw.get("kind", "train"))
        if len(spans) != len(plan.sequences[kind].ops):
            raise ValueError("there is not one span for each op")
        return Prediction(
            plan=plan,
            spans=spans,
            step_s=float(raw["step_s"]),
            kind=kind,
            moves=tuple((op_from(op), _span_from(span)) for op, span in raw.get("moves", ())),
            steps=tuple(map(int, raw.get("steps", ()))),
        )


def _listed(span: Span) -> list[float]:
    return [round(span.start_s, 6), round(span.end_s, 6)]


def _span_from(listed: Sequence[Any]) -> Span:
    start, end = listed
    return Span(float(start), float(end))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One op both ways. pieces: in which it ran; none: it did not. wait_s: how long compute stood still before it."""

    op: Op
    predicted_s: float
    pieces: tuple[Span, ...]
    wait_s: float = 0.0
    why: str

    @property
    def measured_s(self) -> float:
        """Of all pieces."""
        return _covered(self.pieces)

    @property
    def off_s(self) -> float:
        """How much longer it took than predicted."""
        return self.measured_s - self.predicted_s


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """pairs: of the ops that ran as planned, and of what moved beside them. unplanned: those that neither has."""

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
            if not any(pair.op.direction is direction for pair in self.pairs):
                continue  # forward passes alone
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
        pieces = [piece for pair in chosen for piece in pair.pieces]
        return sum(pair.predicted_s for pair in chosen), _covered(pieces)


def _covered(spans: Sequence[Span]) -> float:
    return covered_s((span.start_s, span.end_s) for span in spans)


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
    moved: list[TraceOp] = []
    unplanned: list[TraceOp] = []
    for op in own:
        if op.op_id == UNPLANNED and op.kind in MOVES:
            moved.append(op)
            continue
        if not 0 <= op.op_id < len(ops) or ops[op.op_id].block != op.block:
            unplanned.append(op)
            continue
        planned, expected = ops[op.op_id], prediction.spans[op.op_id].seconds
        pairs.append(
            Pair(
                op=planned,
                predicted_s=expected,
                pieces=(_span_of(op, first),),
                wait_s=op.wait_s,
                why=_why(op, planned, expected, reads),
            )
        )
    return Comparison(
        prediction=prediction,
        pairs=(*pairs, *_moves(prediction, moved, first)),
        unplanned=tuple(unplanned),
        measured_s=last - first,
    )


def _span_of(op: TraceOp, first: float) -> Span:
    """Without its wait, on a clock that begins at `first`."""
    return Span(op.start_s + op.wait_s - first, op.end_s - first)


def _moves(prediction: Prediction, ran: Sequence[TraceOp], first: float) -> Iterator[Pair]:
    """Yields what moved beside the plan's ops, and what was to. ran: its pieces."""
    planned: dict[object, list[tuple[Op, Span]]] = {}
    pieces: dict[object, list[TraceOp]] = {}
    for op, span in prediction.moves:
        planned.setdefault((op.kind, _place(op), op.direction), []).append((op, span))
    for op in ran:
        pieces.setdefault((op.kind, _place(op), op.direction), []).append(op)
    for name in dict.fromkeys([*planned, *pieces]):
        expected, found = planned.get(name, []), pieces.get(name, [])
        like = expected[0][0] if expected else _op_of(found[0])
        op = like._replace(
            block=_place(like), num_bytes=sum(each.num_bytes for each, _ in expected)
        )
        predicted_s = sum(span.seconds for _, span in expected)
        spans = tuple(_span_of(piece, first) for piece in found)
        moved = sum(piece.num_bytes for piece in found)
        why = _rates(moved, _covered(spans), op.num_bytes, predicted_s)
        if not found:
            why = "stayed in memory" if op.kind is not Kind.STORE_WEIGHTS else "was not due"
        yield Pair(op=op, predicted_s=predicted_s, pieces=spans, why=why)


def _place(op: Op | TraceOp) -> str:
    """The block; of those that go back to a working copy all together, since in each step others are due."""
    return BACK if op.kind is Kind.STORE_WEIGHTS else op.block


def _op_of(op: TraceOp) -> Op:
    """What no prediction has, as an op."""
    return Op(UNPLANNED, op.kind, op.lane, UNPLANNED, op.block, op.direction)


def _why(op: TraceOp, planned: Op, expected_s: float, reads: Sequence[Span]) -> str:
    seconds = op.end_s - op.start_s - op.wait_s
    if op.is_miss:
        return "fetched on demand: the visit came in an order that the plan does not have"
    if rates := _rates(planned.num_bytes, seconds, planned.num_bytes, expected_s):
        return rates
    if op.kind is not Kind.COMPUTE or seconds <= expected_s:
        return ""
    inside = [
        (max(r.start_s, op.start_s), min(r.end_s, op.end_s))
        for r in reads
        if r.end_s > op.start_s and r.start_s < op.end_s
    ]
    if covered_s(inside) > DURING * seconds:
        return "computed while the drive was read"
    return "slower than its operators' curves"


def _rates(num_bytes: int, seconds: float, expected_bytes: int, expected_s: float) -> str:
    """Bytes a second as they were and as they were to be; empty where either is not known."""
    if not (num_bytes and expected_bytes and seconds > 0 and expected_s > 0):
        return ""
    rate, expected = round(num_bytes / seconds), round(expected_bytes / expected_s)
    return f"{format_size(rate)}/s, predicted {format_size(expected)}/s"
