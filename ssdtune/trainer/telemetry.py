"""What a run tells while it runs: one record a step, a progress line, metrics as JSON lines.

Times are of one clock (`perf_counter`). A step lasts from the end of the one before, what lies
between (evaluation, saving) left out, to its own end: loading of rows and the optimizer count.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from transformers import TrainerCallback

from ssdtune.durable import write_file_atomically
from ssdtune.report import LANE_LABELS, duration, say
from ssdtune.schedule.plan import Lane
from ssdtune.schedule.trace import TraceOp, lane_seconds, read_bytes, stall_seconds

TRACED_STEPS = 8  # steps of any kind whose ops are kept
ETA_STEPS = 20  # the last so many steps tell how long the rest takes
STALL_SHARE = 0.05  # a step that waited more than this for weights is bound by reading


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step. busy_s: lane -> seconds in which it had work; num_misses: blocks that
    came out of the plan's order; num_over: passes through blocks whose activations were to stay and
    found no room."""

    step: int
    seconds: float
    num_tokens: int
    busy_s: Mapping[str, float]
    stall_s: float = 0.0
    num_bytes_read: int = 0
    num_misses: int = 0
    num_over: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Tokens, padding left out, over seconds."""
        return self.num_tokens / self.seconds

    @property
    def bound_by(self) -> str:
        """What a faster step would need, in words: reading, or compute."""
        waits = self.stall_s > STALL_SHARE * self.seconds
        return LANE_LABELS[Lane.NVME_READ if waits else Lane.COMPUTE]


class Telemetry(TrainerCallback):
    """Makes a StepRecord of every step and keeps the engine's trace from growing.

    streamer: of the streamed model, None for a model in memory.
    """

    def __init__(self, streamer: Any) -> None:
        self.streamer = streamer
        self.records: list[StepRecord] = []
        # Of the trace, as the engine counts them, with steps of other kinds.
        self.engine_steps: deque[int] = deque(maxlen=TRACED_STEPS)
        self._mark = perf_counter()
        self._num_tokens = self._num_over = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._num_tokens = state.num_input_tokens_seen
        self._restart(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ops = self._ops_of_step()
        now, num_tokens = perf_counter(), state.num_input_tokens_seen
        num_over = 0 if self.streamer is None else self.streamer.activations.num_over
        self.records.append(
            StepRecord(
                step=state.global_step,
                seconds=now - self._mark,
                num_tokens=num_tokens - self._num_tokens,
                busy_s={str(lane): s for lane, s in lane_seconds(ops).items()},
                stall_s=stall_seconds(ops),
                num_bytes_read=read_bytes(ops),
                num_misses=sum(op.is_miss for op in ops),
                num_over=num_over - self._num_over,
            )
        )
        self._mark, self._num_tokens, self._num_over = now, num_tokens, num_over
        if self.streamer is not None:
            engine = self.streamer.engine
            self.engine_steps.append(engine.step)
            trim(engine.trace, first_step=engine.step - TRACED_STEPS + 1)

    def _restart(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The next step begins now: what just ended is no part of it."""
        self._mark = perf_counter()

    on_evaluate = on_save = on_log = _restart

    def _ops_of_step(self) -> list[TraceOp]:
        if self.streamer is None:
            return []
        engine = self.streamer.engine
        return [op for op in list(engine.trace) if op.step == engine.step]

    def seconds_left(self, num_steps: int) -> float | None:
        """How long so many more steps take, by the last ones; None before the first."""
        if not self.records:
            return None
        last = [record.seconds for record in self.records[-ETA_STEPS:]]
        return num_steps * statistics.median(last)


def trim(trace: list[TraceOp], *, first_step: int) -> None:
    """Deletes from the front what belongs to steps before `first_step`. Other threads may append:
    a slice at the front is deleted in one bytecode, under the interpreter's lock."""
    count = 0
    for op in list(trace):
        if op.step >= first_step:
            break
        count += 1
    del trace[:count]


# ------------------------------------------------------------------ one line a step


class Progress(TrainerCallback):
    """A bar where there is a terminal, a line for each log where there is none."""

    def __init__(self, telemetry: Telemetry) -> None:
        self.telemetry = telemetry
        self._bar: Any = None
        self._logs: dict[str, float] = {}
        self._eval = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and sys.stderr.isatty():
            from tqdm import tqdm

            layout = "{percentage:3.0f} % |{bar:12}| {desc}"
            total, done = state.max_steps, state.global_step
            self._bar = tqdm(total=total, initial=done, bar_format=layout, dynamic_ncols=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "train_loss" in logs:
            return
        if "eval_loss" in logs:
            right = f", {logs['eval_accuracy']:.1%} right" if "eval_accuracy" in logs else ""
            self._eval = f" (eval {logs['eval_loss']:.4g}{right} @{state.global_step})"
        elif "loss" in logs:
            self._logs = dict(logs)
        is_evaluated = "eval_loss" in logs
        self._show(state, is_new="loss" in logs or is_evaluated, is_evaluated=is_evaluated)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)
            self._show(state, is_new=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _show(self, state: Any, *, is_new: bool, is_evaluated: bool = False) -> None:
        if not self.telemetry.records:
            return
        left = self.telemetry.seconds_left(state.max_steps - state.global_step)
        line = progress_line(state, self._logs, self.telemetry.records[-1], self._eval, left)
        if self._bar is not None:
            self._bar.set_description_str(line)
            if is_evaluated:
                self._bar.write(line)  # stays above the bar
        elif is_new:
            say(line)


def progress_line(
    state: Any, logs: Mapping[str, float], record: StepRecord, evaluated: str, left_s: float | None
) -> str:
    """`312/1124  loss 1.184  gnorm 0.41  lr 8.6e-05  42.6 s  192 tok/s  compute-bound  ETA 9 h 36 m`"""
    width = len(str(state.max_steps))
    parts = [f"{state.global_step:>{width}}/{state.max_steps}"]
    if "loss" in logs:
        parts.append(f"loss {logs['loss']:.4g}{evaluated}")
    if "grad_norm" in logs:
        parts.append(f"gnorm {logs['grad_norm']:.3g}")
    if "learning_rate" in logs:
        parts.append(f"lr {logs['learning_rate']:.2g}")
    parts.append(f"{record.seconds:.3g} s")
    if record.num_tokens:
        parts.append(f"{record.tokens_per_s:,.0f} tok/s")
    reading = record.busy_s.get(Lane.NVME_READ, 0.0)
    if reading:
        rate = record.num_bytes_read / reading / 1e9
        parts.append(f"{LANE_LABELS[Lane.NVME_READ]} {rate:.2g} GB/s")
    if record.busy_s:
        parts.append(f"{record.bound_by}-bound, stall {record.stall_s:.2g} s")
    if record.num_misses:
        parts.append(f"{record.num_misses} misses")
    if record.num_over:
        parts.append(f"{record.num_over} passes over the budgets for activations")
    if left_s is not None and state.global_step < state.max_steps:
        parts.append(f"ETA {duration(left_s)}")
    return "  ".join(parts)


# ------------------------------------------------------------------ files of the run


class ConfigFile(TrainerCallback):
    """Writes the run's configuration when training begins: not over another run's, whose checkpoint was refused."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path, self.content = path, content

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_file_atomically(self.path, self.content)


class MetricsFile(TrainerCallback):
    """Appends every log to a file, one JSON object a line. A resumed run's file holds each once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:  # what a killed run logged past its checkpoint comes again
            lines = [json_line(row) for row in state.log_history]
            write_file_atomically(self.path, "".join(lines).encode())

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and state.log_history:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json_line(state.log_history[-1]))


def json_line(row: Mapping[str, Any]) -> str:
    """One object and a newline; a number that JSON lacks (NaN, infinity) is null."""
    safe = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    return json.dumps(safe) + "\n"
