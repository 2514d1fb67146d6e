"""`ssdtune trace RUN`: a step of a run beside its prediction, op by op, and why they differ."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from ssdtune.errors import SSDTuneError
from ssdtune.report import LANE_LABELS, draw_comparison, format_table, say
from ssdtune.run_files import PLAN_NAME, TRACE_NAME
from ssdtune.schedule.compare import Comparison, Prediction, compare
from ssdtune.schedule.plan import Direction, Kind
from ssdtune.schedule.trace import TraceOp, trace_from

PICTURE_NAME = "trace.png"
NUM_WORST = 8
PASS_NAMES = {Direction.FORWARD: "forward", Direction.BACKWARD: "backward"}


class TracingError(SSDTuneError):
    """A run that left nothing to compare; the message names the file."""


def print_trace(run: Path, *, picture: Path | None = None) -> int:
    """Prints the comparison of the run's last whole step, draws it, returns 0.

    run: its output_dir. picture: where to, else trace.png in the run. Raises TracingError.
    """
    prediction, trace = _read(run)
    step = _last_whole_step(prediction, trace)
    try:
        found = compare(prediction, trace, step)
    except ValueError as error:
        raise TracingError(f"{run / TRACE_NAME}: {error}.") from error
    for line in lines_of(found, step):
        say(line)
    path = picture or run / PICTURE_NAME
    draw_comparison(_as_trace(found, step), trace, path, step=step)
    say(f"picture   {path}")
    return 0


def lines_of(found: Comparison, step: int) -> Iterator[str]:
    """Yields the comparison as a person reads it."""
    predicted_s, measured_s = found.prediction.step_s, found.measured_s
    yield f"step {step}: predicted {predicted_s:.3g} s, measured {measured_s:.3g} s ({_off(predicted_s, measured_s)})"
    rows = [
        [LANE_LABELS[lane], f"{p:.3g} s", f"{m:.3g} s", _off(p, m)]
        for lane, (p, m) in found.lanes().items()
    ]
    yield format_table(rows, header=("lane", "predicted", "measured", "off by"))
    for direction, predicted, measured, lanes in found.passes():
        same = "as predicted" if predicted is measured else f"predicted: {LANE_LABELS[predicted]}"
        yield f"{PASS_NAMES[direction]:9} bound by {LANE_LABELS[measured]}, {lanes[measured][1]:.3g} s ({same})"
    waits = sum(pair.wait_s for pair in found.pairs)
    yield f"compute waited {waits:.2g} s for weights"
    if found.unplanned:
        yield f"{len(found.unplanned)} ops that the plan does not have (first: {found.unplanned[0].block})"
    worst = [
        [
            f"{pair.op.kind} {pair.op.block} {pair.op.direction}",
            f"{pair.predicted_s:.3g} s",
            f"{pair.measured_s:.3g} s",
            f"{pair.off_s:+.2g} s",
            pair.why,
        ]
        for pair in found.worst(NUM_WORST)
    ]
    yield "the ops that miss most"
    yield format_table(worst, header=("op", "predicted", "measured", "off by", ""))


def _off(predicted: float, measured: float) -> str:
    return f"{predicted / measured - 1:+.0%}" if measured else "–"


def _read(run: Path) -> tuple[Prediction, Sequence[TraceOp]]:
    for name, what in ((TRACE_NAME, "no trace"), (PLAN_NAME, "no prediction")):
        if not (run / name).is_file():
            raise TracingError(
                f"{run}: the run left {what} ({name} is not there).\n"
                "Give the output_dir of a run that has ended; `ssdtune probe` first, so that it is predicted."
            )
    try:
        prediction = Prediction.from_json((run / PLAN_NAME).read_text(encoding="utf-8"))
        trace = trace_from((run / TRACE_NAME).read_text(encoding="utf-8"))
    except (SSDTuneError, ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise TracingError(f"{run}: can't read what the run left: {error}.") from error
    return prediction, trace


def _last_whole_step(prediction: Prediction, trace: Sequence[TraceOp]) -> int:
    """The last training step that another one follows at once, for how long the last took to its end is not in the
    trace; else the last."""
    has_backward = prediction.kind == "train"
    visits = (op for op in trace if op.kind is Kind.COMPUTE)
    found = {op.step for op in visits if not has_backward or op.direction is Direction.BACKWARD}
    if prediction.steps:  # forward passes alone don't tell training from evaluation
        found &= set(prediction.steps)
    if not found:
        raise TracingError("the trace holds no training step.")
    return max([step for step in found if step + 1 in found] or found)


def _as_trace(found: Comparison, step: int) -> list[TraceOp]:
    """The prediction as if it had run; the next step's first visits say when this one ends."""
    prediction = found.prediction
    planned = [*zip(prediction.ops, prediction.spans, strict=True), *prediction.moves]
    made = [
        TraceOp.of(op, step=step, start_s=span.start_s, end_s=span.end_s) for op, span in planned
    ]
    visits = [op for op in made if op.kind is Kind.COMPUTE]
    firsts = {op.direction: op for op in reversed(visits)}
    end = prediction.step_s
    return made + [
        dataclasses.replace(op, op_id=-1, step=step + 1, start_s=end, end_s=end)
        for op in firsts.values()
    ]
