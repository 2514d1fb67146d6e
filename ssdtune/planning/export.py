"""The answer of `ssdtune plan` for other programs: plain values, and the lanes of a step as a picture or as events."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssdtune.errors import SSDTuneError
from ssdtune.planning.prices import cost_of
from ssdtune.planning.strips import counters, draw_strip
from ssdtune.planning.ways import Way, knows_steps
from ssdtune.report import LANE_LABELS
from ssdtune.schedule.holding import Level
from ssdtune.schedule.methods import Foreseen
from ssdtune.schedule.outcome import Refusal, held
from ssdtune.schedule.plan import Kind, Tier
from ssdtune.schedule.trace import TraceOp

if TYPE_CHECKING:
    from ssdtune.planning.text import Answer
    from ssdtune.schedule.bits import Chosen
    from ssdtune.schedule.simulate import Simulation


class PlanningError(SSDTuneError):
    """Nothing that could be planned; the message names the argument."""


def as_mapping(answer: Answer) -> dict[str, Any]:
    """The answer as plain values; bytes, seconds and dollars."""
    job, machine = answer.job, answer.machine
    return {
        "machine": {
            "name": machine.name,
            "ram_bytes": machine.ram_bytes,
            "device": None if machine.device is None else machine.device.name,
            "device_bytes": machine.device_bytes,
            "profile": None if machine.profile is None else machine.profile.name,
            "price_source": machine.price_source if machine.price_per_hour is not None else None,
        },
        "model": job.model,
        "num_parameters": job.num_parameters,
        "num_trained": job.num_trained,
        "data": dataclasses.asdict(job.data),
        "rows_at_once": job.rows_at_once,
        "decisions": list(answer.decisions),
        **({} if answer.chosen is None else _bits(answer.chosen)),
        "ways": [_way(answer, way) for way in answer.ways],
        "others": [_other(each) for each in answer.others],
    }


def _bits(chosen: Chosen) -> dict[str, Any]:
    """What `quantization: auto` comes to, as plain values."""
    return {
        "quantization": chosen.reading.quantization,
        "bits": chosen.reading.bits,
        "error": chosen.reading.error,
        "why": chosen.why,
        "tried": [
            {
                "quantization": each.reading.quantization,
                "error": each.reading.error,
                "fits": each.found is not None,
                "step_s": each.step_s,
                "compute_s": each.compute_s,
            }
            for each in chosen.tried
        ],
    }


def _way(answer: Answer, way: Way) -> dict[str, Any]:
    found, job = way.found, answer.job
    told: dict[str, Any] = {"words": way.words, "flags": way.flags}
    if isinstance(found, Refusal):
        return {**told, "fits": False, "why": found.why}
    step = found.simulation
    told |= {
        "fits": True,
        "tokens_per_step": found.tokens,
        "micro_batches": found.choices.micro_batches,
        "block_inputs": str(found.choices.block_inputs),
        "num_steps": found.num_steps if knows_steps(job) else None,
        "ram_bytes": found.peak.ram_bytes,
        "device_bytes": found.peak.device_bytes,
        "written_bytes": found.written_bytes,
        "written": dict(found.written),
        "hidden_at_micro_batches": found.hidden_at,
        "read_bytes_per_step": found.read_bytes,
    }
    if step is not None:
        told |= {
            "step_s": step.step_s,
            "slow_step_s": found.slow_step_s,
            "bound_by": str(step.bound_by),
            "busy_s": {str(lane): s for lane, s in step.busy_s.items()},
            "stall_s": {str(kind): s for kind, s in step.stall_s.items()},
            "one_pass_s": step.one_pass_s,
            "two_pass_s": step.two_pass_s,
            "dollars": dataclasses.asdict(cost_of(job, answer.machine, found, answer.prices)),
        }
    return told


def _other(each: Foreseen) -> dict[str, Any]:
    return {
        "words": each.words,
        "fits": each.why_not is None,
        "why": each.why_not,
        "runs_as": each.runs_as,
        "step_s": each.outlook.step_s,
        "ram_bytes": each.memory.ram,
        "device_bytes": each.memory.device,
        "nvme_bytes": each.memory.nvme,
        "written_bytes": each.written_bytes,
        "delayed_share": each.delayed_share,
    }


def check_name(path: Path) -> None:
    """Raises PlanningError for a name that says neither a picture nor trace events."""
    if path.suffix not in (".png", ".json"):
        raise PlanningError(f"--timeline {path}: give a name that ends with .png or .json.")


def draw(answer: Answer, path: Path, say: Any) -> None:
    """The lanes of the proposed way's step, and what each tier holds meanwhile, as a picture, or as trace events for
    Perfetto. path: as `check_name` has it. Raises PlanningError."""
    best = answer.best
    step = None if best is None else best[1].simulation
    if best is None or step is None:
        raise PlanningError(
            "--timeline: there is no step to draw: nothing fits, or no times are known."
        )
    levels = held(answer.job, best[1])
    if path.suffix == ".json":
        from ssdtune.durable import write_file_atomically

        told = [*events(step), *counters(_shifted(levels, step))]
        write_file_atomically(path, json.dumps({"traceEvents": told}).encode())
    else:
        _draw_picture(step, levels, path)
    if say is not None:
        say(f"lanes     {path}")


def _draw_picture(step: Simulation, levels: Mapping[Tier, Sequence[Level]], path: Path) -> None:
    from ssdtune.report import save_figure, timeline_figure

    figure = timeline_figure(traced(step), step=1, num_below=len(levels))
    _, *below = figure.axes
    first = min(each.start_s for each in step.ops if each.op.kind is Kind.COMPUTE)
    for axes, (tier, each) in zip(below, levels.items(), strict=True):
        last = max(op.end_s for op in step.ops if op.op.kind is Kind.COMPUTE)
        draw_strip(axes, tier, _from(each, first), last - first)
    save_figure(figure, path)


def _from(levels: Sequence[Level], second: float) -> list[Level]:
    """On a clock that begins at that second."""
    return [Level(max(level.start_s - second, 0.0), level.parts) for level in levels]


def _shifted(levels: Mapping[Tier, Sequence[Level]], step: Simulation) -> dict[Tier, list[Level]]:
    """On the clock of `events`, which begins with the first op."""
    first = min(each.start_s for each in step.ops)
    return {tier: _from(each, first) for tier, each in levels.items()}


def traced(step: Simulation) -> list[TraceOp]:
    """The step as if it had run."""
    first = min(each.start_s for each in step.ops)
    return [
        TraceOp.of(each.op, step=1, start_s=each.start_s - first, end_s=each.end_s - first)
        for each in step.ops
    ]


def events(step: Simulation) -> list[dict[str, Any]]:
    """Trace events (the Chrome format, which Perfetto opens): one row per lane, microseconds."""
    lanes = list(step.busy_s)
    first = min(each.start_s for each in step.ops)
    named = [
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": i, "args": {"name": LANE_LABELS[lane]}}
        for i, lane in enumerate(lanes)
    ]
    return named + [
        {
            "name": f"{each.op.kind} {each.op.block} {each.op.direction}",
            "ph": "X",
            "pid": 1,
            "tid": lanes.index(each.op.lane),
            "ts": 1e6 * (each.start_s - first),
            "dur": 1e6 * (each.end_s - each.start_s),
            "args": {"bytes": each.op.num_bytes, "op": each.op.id},
        }
        for each in step.ops
    ]
