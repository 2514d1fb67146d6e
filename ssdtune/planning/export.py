"""The answer of `ssdtune plan` for other programs: plain values, and the lanes of a step as a picture or as events."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssdtune.errors import SSDTuneError
from ssdtune.planning.ways import Way, knows_steps
from ssdtune.report import LANE_LABELS
from ssdtune.schedule.methods import Foreseen
from ssdtune.schedule.outcome import Outcome, Refusal
from ssdtune.schedule.trace import TraceOp

if TYPE_CHECKING:
    from ssdtune.schedule.job import Job
    from ssdtune.schedule.machine import Machine
    from ssdtune.schedule.simulate import Simulation


class PlanningError(SSDTuneError):
    """Nothing that could be planned; the message names the argument."""


def as_mapping(
    job: Job, machine: Machine, ways: Sequence[Way], others: Sequence[Foreseen]
) -> dict[str, Any]:
    """The answer as plain values; bytes and seconds."""
    return {
        "machine": {
            "name": machine.name,
            "ram_bytes": machine.ram_bytes,
            "device": None if machine.device is None else machine.device.name,
            "device_bytes": machine.device_bytes,
            "profile": None if machine.profile is None else machine.profile.name,
        },
        "model": job.model,
        "num_parameters": job.num_parameters,
        "num_trained": job.num_trained,
        "data": dataclasses.asdict(job.data),
        "ways": [_way(job, way) for way in ways],
        "others": [_other(each) for each in others],
    }


def _way(job: Job, way: Way) -> dict[str, Any]:
    found = way.found
    told: dict[str, Any] = {"words": way.words, "flags": way.flags}
    if isinstance(found, Refusal):
        return {**told, "fits": False, "why": found.why}
    step = found.simulation
    told |= {
        "fits": True,
        "tokens_per_step": found.tokens,
        "num_steps": found.num_steps if knows_steps(job) else None,
        "ram_bytes": found.peak.ram_bytes,
        "device_bytes": found.peak.device_bytes,
        "written_bytes": found.written_bytes,
        "hidden_at_micro_batches": found.hidden_at,
        "read_bytes_per_step": found.read_bytes,
    }
    if step is not None:
        told |= {
            "step_s": step.step_s,
            "bound_by": str(step.bound_by),
            "busy_s": {str(lane): s for lane, s in step.busy_s.items()},
            "stall_s": {str(kind): s for kind, s in step.stall_s.items()},
            "one_pass_s": step.one_pass_s,
            "two_pass_s": step.two_pass_s,
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
    }


def draw(ways: Sequence[Way], path: Path, say: Any) -> None:
    """The lanes of the first way's step as a picture, or as trace events for Perfetto. Raises PlanningError."""
    found = next((way.found for way in ways if isinstance(way.found, Outcome)), None)
    if found is None or found.simulation is None:
        raise PlanningError(
            "--timeline: there is no step to draw: nothing fits, or no times are known."
        )
    if path.suffix == ".json":
        from ssdtune.durable import write_file_atomically

        write_file_atomically(path, json.dumps({"traceEvents": events(found.simulation)}).encode())
    elif path.suffix == ".png":
        from ssdtune.report import draw_timeline

        draw_timeline(traced(found.simulation), path, step=1)
    else:
        raise PlanningError(f"--timeline {path}: give a name that ends with .png or .json.")
    if say is not None:
        say(f"lanes     {path}")


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
