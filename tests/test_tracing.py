"""`ssdtune trace`: a step beside its prediction; made-up steps whose differences are known."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from ssdtune import cli
from ssdtune.run_files import PLAN_NAME, TRACE_NAME
from ssdtune.schedule.compare import Prediction, Span, compare
from ssdtune.schedule.plan import BlockShape, Budgets, Direction, Kind, Lane, Plan
from ssdtune.schedule.planner import Request, make_plan, plain_orders
from ssdtune.schedule.simulate import simulate
from ssdtune.schedule.stored import with_stored_inputs
from ssdtune.schedule.trace import TraceOp, covered_s, json_lines, trace_from
from ssdtune.tracing import lines_of

MB = 10**6
STEP = 7


@pytest.fixture
def plan() -> Plan:
    blocks = tuple(
        BlockShape(name=f"layers.{i}", slot_bytes=10 * MB, file_bytes=10 * MB) for i in range(6)
    )
    orders = plain_orders(6)
    return make_plan(Request(blocks=blocks, orders=orders, budgets=Budgets(ram_bytes=30 * MB)))


@pytest.fixture
def prediction(plan: Plan) -> Prediction:
    """A visit takes 1 s forward, 2 s backward; a read 0.5 s."""
    steps = plan.sequences["train"]
    seconds = [
        0.5 if op.kind is Kind.LOAD else 1.0 if op.direction is Direction.FORWARD else 2.0
        for op in steps.ops
    ]
    return Prediction.of(plan, simulate(steps, seconds))


def test_block_inputs_on_the_drive_are_no_ops_of_the_plan(plan: Plan) -> None:
    """A prediction has one span for each op of the plan, whatever else goes over its lanes."""
    steps = with_stored_inputs(plan.sequences["train"], 700)
    seconds = [0.5 if op.kind is Kind.LOAD else 1.0 for op in steps.ops]
    prediction = Prediction.of(plan, simulate(steps, seconds))
    assert Prediction.from_json(prediction.to_json()) == prediction
    for op, span in zip(prediction.ops, prediction.spans, strict=True):
        assert span.seconds == (0.5 if op.kind is Kind.LOAD else 1.0)


def ran(prediction: Prediction, **changes: dict[int, float]) -> list[TraceOp]:
    """The step as predicted, but for the seconds of some ops (`longer`: id -> seconds more), on a clock of its own."""
    longer = changes.get("longer", {})
    ops = [
        TraceOp(
            op_id=op.id,
            kind=op.kind,
            lane=op.lane,
            block=op.block,
            direction=op.direction,
            step=STEP,
            start_s=1000 + span.start_s,
            end_s=1000 + span.end_s + longer.get(op.id, 0.0),
            num_bytes=op.num_bytes,
        )
        for op, span in zip(prediction.ops, prediction.spans, strict=True)
    ]
    following = dataclasses.replace(
        next(op for op in ops if op.kind is Kind.COMPUTE),
        step=STEP + 1,
        start_s=1000 + prediction.step_s,
        end_s=1001 + prediction.step_s,
    )
    return [*ops, following]


def test_a_step_as_predicted_is_off_by_nothing(prediction: Prediction) -> None:
    found = compare(prediction, ran(prediction), STEP)
    assert found.measured_s == pytest.approx(prediction.step_s)
    assert all(abs(pair.off_s) < 1e-9 for pair in found.pairs)
    assert found.unplanned == ()
    for predicted, measured in found.lanes().values():
        assert measured == pytest.approx(predicted)


def test_the_op_that_misses_is_found_with_its_reason(prediction: Prediction) -> None:
    load = next(op for op in prediction.ops if op.kind is Kind.LOAD)
    found = compare(prediction, ran(prediction, longer={load.id: 4.5}), STEP)
    worst = found.worst(1)[0]
    assert worst.op == load
    assert worst.off_s == pytest.approx(4.5)
    assert worst.why == "2.00 MB/s, predicted 20.0 MB/s"


def visit(prediction: Prediction, overlapped: bool) -> int:
    """A visit of compute with, or without, a read beside it."""
    reads = [
        s for op, s in zip(prediction.ops, prediction.spans, strict=True) if op.kind is Kind.LOAD
    ]

    def share(span: Span) -> float:
        inside = [Span(max(r.start_s, span.start_s), min(r.end_s, span.end_s)) for r in reads]
        return covered_s((s.start_s, s.end_s) for s in inside if s.seconds > 0) / span.seconds

    spans = zip(prediction.ops, prediction.spans, strict=True)
    shares = {op.id: share(span) for op, span in spans if op.kind is Kind.COMPUTE}
    chosen = (
        max(shares, key=lambda i: shares[i]) if overlapped else min(shares, key=lambda i: shares[i])
    )
    assert (shares[chosen] >= 0.5) == overlapped
    return chosen


@pytest.mark.parametrize("overlapped", [True, False])
def test_slow_compute_is_told_apart_by_what_ran_beside_it(
    prediction: Prediction, overlapped: bool
) -> None:
    chosen = visit(prediction, overlapped)
    found = compare(prediction, ran(prediction, longer={chosen: 0.0001}), STEP)
    why = next(pair.why for pair in found.pairs if pair.op.id == chosen)
    assert why == (
        "computed while the drive was read" if overlapped else "slower than its operators' curves"
    )


def test_the_lane_that_bounds_a_pass_may_change(prediction: Prediction) -> None:
    """Forward was to be bound by compute; with reads of 9.5 s it is bound by the drive."""
    reads = [
        op for op in prediction.ops if op.kind is Kind.LOAD and op.direction is Direction.FORWARD
    ]
    longer = {op.id: 9.0 for op in reads}
    found = compare(prediction, ran(prediction, longer=longer), STEP)
    bounds = {direction: (p, m) for direction, p, m, _ in found.passes()}
    assert bounds[Direction.FORWARD][0] is Lane.COMPUTE
    text = "\n".join(lines_of(found, STEP))
    assert bounds[Direction.FORWARD][1] is Lane.NVME_READ
    assert "forward   bound by NVMe read" in text
    assert "backward  bound by compute" in text


def test_ops_that_no_plan_has_are_counted(prediction: Prediction) -> None:
    trace = ran(prediction)
    stranger = dataclasses.replace(trace[0], op_id=-1, block="stranger")
    found = compare(prediction, [*trace, stranger], STEP)
    assert [op.block for op in found.unplanned] == ["stranger"]
    assert any("1 ops that the plan does not have" in line for line in lines_of(found, STEP))


def test_a_step_that_is_not_there_is_refused(prediction: Prediction) -> None:
    with pytest.raises(ValueError, match="no visits of step 3"):
        compare(prediction, ran(prediction), 3)


def test_predictions_and_traces_are_what_they_were_after_json(prediction: Prediction) -> None:
    again = Prediction.from_json(prediction.to_json())
    assert again.plan == prediction.plan
    for span, before in zip(again.spans, prediction.spans, strict=True):
        assert dataclasses.astuple(span) == pytest.approx(dataclasses.astuple(before), abs=1e-5)
    trace = ran(prediction)
    assert trace_from("".join(f"{line}\n" for line in json_lines(trace))) == trace


# ------------------------------------------------------------------ the command


@pytest.fixture
def run(prediction: Prediction, tmp_path: Path) -> Path:
    (tmp_path / PLAN_NAME).write_text(prediction.to_json())
    trace = ran(prediction)
    later = [
        dataclasses.replace(op, step=op.step + 1, start_s=op.start_s + 50, end_s=op.end_s + 50)
        for op in trace[:-1]
    ]
    (tmp_path / TRACE_NAME).write_text(
        "".join(f"{line}\n" for line in json_lines([*trace[:-1], *later]))
    )
    return tmp_path


def test_the_command_prints_and_draws(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trace", str(run)]) == 0
    text = capsys.readouterr().out
    assert f"step {STEP}: predicted" in text
    assert "the ops that miss most" in text
    assert (run / "trace.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", [PLAN_NAME, TRACE_NAME])
def test_a_run_that_left_nothing_is_refused_by_the_files_name(
    run: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / name).unlink()
    assert cli.main(["trace", str(run)]) == 2
    assert name in capsys.readouterr().err


@pytest.mark.parametrize("name", [PLAN_NAME, TRACE_NAME])
def test_a_broken_file_is_one_error(
    run: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / name).write_text(json.dumps({"x": 1}))
    assert cli.main(["trace", str(run)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
