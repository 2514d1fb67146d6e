"""`ssdtune trace`: a step beside its prediction; made-up steps whose differences are known."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from ssdtune import cli
from ssdtune.report import LANE_LABELS
from ssdtune.run_files import PLAN_NAME, TRACE_NAME
from ssdtune.schedule.choices import Request
from ssdtune.schedule.compare import Prediction, Span, compare
from ssdtune.schedule.plan import BlockShape, Budgets, Direction, Kind, Lane, Op, Plan
from ssdtune.schedule.planner import make_plan, plain_orders
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


# ------------------------------------------------------------------ what waits on the drive


STORE_S, FETCH_S = 1.5, 0.25


@pytest.fixture
def stored(plan: Plan) -> Prediction:
    """Forward's visits take 1 s and each leaves its input on NVMe in 1.5 s: the drive bounds it. Backward's take 2
    s."""
    steps = with_stored_inputs(plan.sequences["train"], 600)
    of = {Kind.LOAD: 0.125, Kind.STORE: STORE_S, Kind.FETCH: FETCH_S}
    seconds = [
        of.get(op.kind, 1.0 if op.direction is Direction.FORWARD else 2.0) for op in steps.ops
    ]
    return Prediction.of(plan, simulate(steps, seconds))


def in_pieces(op: Op, span: Span, num: int = 2, times: float = 1.0) -> list[TraceOp]:
    """What a move looks like in a trace: several pieces, one after the other, whose numbers no plan has."""
    ran = TraceOp.of(op, step=STEP, start_s=0, end_s=0)
    each = times * span.seconds / num
    return [
        dataclasses.replace(
            ran,
            start_s=1000 + span.start_s + i * each,
            end_s=1000 + span.start_s + (i + 1) * each,
            num_bytes=op.num_bytes // num,
        )
        for i in range(num)
    ]


def test_what_waits_on_the_drive_is_compared_block_by_block(stored: Prediction) -> None:
    """Nothing of it is foreign to the plan, its lane stands in the table, and the pass that it bounds is said."""
    moved = [piece for op, span in stored.moves for piece in in_pieces(op, span)]
    found = compare(stored, [*ran(stored), *moved], STEP)
    assert found.unplanned == ()
    assert len([pair for pair in found.pairs if pair.op.kind is Kind.STORE]) == 6
    predicted, measured = found.lanes()[Lane.NVME_WRITE]
    assert predicted == pytest.approx(measured) == pytest.approx(6 * STORE_S)
    forward, backward = found.passes()
    assert forward[:3] == (Direction.FORWARD, Lane.NVME_WRITE, Lane.NVME_WRITE)
    assert backward[:3] == (Direction.BACKWARD, Lane.COMPUTE, Lane.COMPUTE)
    assert all(abs(pair.off_s) < 1e-9 for pair in found.pairs)


def test_a_move_that_misses_is_told_with_its_rates(stored: Prediction) -> None:
    slow = stored.moves[0][0]
    moved = [
        piece
        for op, span in stored.moves
        for piece in in_pieces(op, span, times=5.0 if op is slow else 1.0)
    ]
    worst = compare(stored, [*ran(stored), *moved], STEP).worst(1)[0]
    assert (worst.op.kind, worst.op.block) == (slow.kind, slow.block)
    assert worst.off_s == pytest.approx(4 * STORE_S)
    assert worst.why == "13 B/s, predicted 67 B/s"


def test_what_was_still_in_memory_and_what_nobody_predicted_stand_there_too(
    stored: Prediction,
) -> None:
    """The last inputs that were written are not read back; a working copy that nobody predicted is written to."""
    moves = [(op, span) for op, span in stored.moves if op.kind is Kind.STORE]
    moved = [piece for op, span in moves for piece in in_pieces(op, span)]
    copied = dataclasses.replace(moved[0], kind=Kind.STORE_WEIGHTS)
    found = compare(stored, [*ran(stored), *moved, copied], STEP)
    fetches = [pair for pair in found.pairs if pair.op.kind is Kind.FETCH]
    assert {pair.why for pair in fetches} == {"stayed in memory"}
    assert sum(pair.off_s for pair in fetches) == pytest.approx(-6 * FETCH_S)
    (copy,) = [pair for pair in found.pairs if pair.op.kind is Kind.STORE_WEIGHTS]
    assert copy.predicted_s == 0
    assert copy.measured_s == pytest.approx(STORE_S / 2)
    assert found.unplanned == ()


def test_moves_are_what_they_were_after_json(stored: Prediction) -> None:
    marked = dataclasses.replace(stored, steps=(3, 5))
    assert Prediction.from_json(marked.to_json()) == marked
    assert len(stored.moves) == 12


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


def test_steps_of_forward_passes_alone_are_compared(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An evaluation looks the same: which steps trained stands beside the prediction."""
    steps = plan.sequences["forward"]
    seconds = [0.5 if op.kind is Kind.LOAD else 1.0 for op in steps.ops]
    found = Prediction.of(plan, simulate(steps, seconds), "forward", steps=(STEP - 1, STEP))
    (tmp_path / PLAN_NAME).write_text(found.to_json())
    own, evaluation = ran(found)[:-1], ran(found)[:-1]
    trace = [
        dataclasses.replace(op, step=STEP + k, start_s=op.start_s + at, end_s=op.end_s + at)
        for ops, k, at in ((own, -1, 0), (own, 0, 50), (evaluation, 1, 100), (evaluation, 2, 150))
        for op in ops
    ]
    (tmp_path / TRACE_NAME).write_text("".join(f"{line}\n" for line in json_lines(trace)))
    assert cli.main(["trace", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert f"step {STEP - 1}: predicted" in text
    assert "forward   bound by compute" in text
    assert "backward" not in text
    assert (tmp_path / "trace.png").read_bytes()[:4] == b"\x89PNG"


# ------------------------------------------------------------------ runs


YAML = """
model_name_or_path: {folder}/model
dataset: {folder}/rows.jsonl
eval_dataset: [{{path: {folder}/rows.jsonl, split: "train[:4]"}}]
output_dir: {folder}/run
max_length: 24
per_device_train_batch_size: 8
gradient_accumulation_steps: 1
max_steps: 6
eval_strategy: steps
eval_steps: 3
save_strategy: "no"
offload: {{ram: 2500KB}}
"""
ZO = "method: zo\nzo_trains: all\nzo_fold_steps: 2\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "flags"),
    [(ZO, []), ("lora_r: 4\n", ["--offload.block_inputs", "nvme"])],
    ids=["zo", "inputs on NVMe"],
)
def test_a_run_is_traced(
    words: str,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What a run leaves is read, told and drawn: its training steps, whatever it writes to the drive."""
    import tiny_runs

    from ssdtune.config import load_config
    from ssdtune.schedule.profile import OPERATORS, TRANSFERS
    from ssdtune.schedule.saved_profile import profile_from
    from ssdtune.trainer import forecast, train_from_config

    rate = [[1, 1e-9], [10**9, 1.0]]
    content: Any = {"operators": {"float32": dict.fromkeys(OPERATORS, rate)}}
    content["transfers"] = dict.fromkeys(TRANSFERS, rate)
    profile = profile_from(content, "made up")
    monkeypatch.setattr(forecast, "own_profile", lambda: profile)
    sizes: Any = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3}
    tiny_runs.save(tiny_runs.llama(**sizes), tmp_path / "model")
    tiny_runs.write_rows(tmp_path / "rows.jsonl", tiny_runs.texts(16))
    (tmp_path / "train.yaml").write_text(YAML.format(folder=tmp_path) + words)
    with tiny_runs.own_datasets_cache(tmp_path / "rows-cache"):
        result = train_from_config(load_config(tmp_path / "train.yaml", flags))
    capsys.readouterr()
    assert cli.main(["trace", str(result.output_dir)]) == 0
    text = capsys.readouterr().out
    step = int(text.split()[1].rstrip(":"))
    assert step in result.steps
    assert step + 1 in result.steps, "another training step follows"
    assert "ops that the plan does not have" not in text
    assert LANE_LABELS[Lane.NVME_WRITE] in text
    assert (result.output_dir / "trace.png").is_file()
