"""What a run shows a person: aligned tables, the loss curve, and one step as a timeline.

Pure: numbers go in, text or a PNG comes out. `summarize_trace` reads the engine's trace (any
objects with the attributes of `ssdtune.schedule.trace.TraceOp`) and says what bounded the steps.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ssdtune.durable import write_file_atomically
from ssdtune.errors import SSDTuneError
from ssdtune.sizes import format_size

LANES = ("nvme_read", "nvme_write", "h2d", "d2h", "cpu", "compute")  # top to bottom, as data flows
LANE_LABELS = {
    "nvme_read": "NVMe read",
    "nvme_write": "NVMe write",
    "h2d": "host to device",
    "d2h": "device to host",
    "cpu": "CPU (unpack)",
    "compute": "compute",
}
FORWARD, BACKWARD = "#3b7dd8", "#e08a2c"
WAIT, IDLE, MISS, INK, FAINT = "#c9c9c9", "#f3f3f1", "#c02b2b", "#22252a", "#8a8f98"


class OpRecord(Protocol):
    """One op as it ran; `wait_s` (what compute stood still for weights) counts as 0 if absent."""

    @property
    def op_id(self) -> int: ...
    @property
    def lane(self) -> str: ...
    @property
    def block(self) -> str: ...
    @property
    def direction(self) -> str: ...
    @property
    def step(self) -> int: ...
    @property
    def start_s(self) -> float: ...
    @property
    def end_s(self) -> float: ...
    @property
    def num_bytes(self) -> int: ...


class ReportError(SSDTuneError):
    """There is nothing to draw, or nothing to draw it with."""


def say(line: str = "") -> None:
    """Prints one line to the person at the terminal, at once."""
    print(line, flush=True)


# --- steps out of a trace ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StepWindow:
    """One training step on the trace's clock: from its first visit to the next step's first."""

    step: int
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """The step's length."""
        return self.end_s - self.start_s


@dataclass(frozen=True, kw_only=True)
class TraceSummary:
    """Medians over steady steps. `busy_s`: seconds of a step in which each lane worked.

    `bound_by` is the busiest lane; no schedule of the same work is faster than it alone. Steps are
    steady after the first, which starts with nothing prefetched (it counts if it is the only one).
    """

    num_steps: int
    step_s: float
    busy_s: Mapping[str, float]
    read_bytes: int
    stall_s: float
    num_misses: int

    @property
    def bound_by(self) -> str:
        """The lane that sets the limit."""
        return max(self.busy_s, key=lambda lane: self.busy_s[lane])

    @property
    def ratio_to_limit(self) -> float:
        """Step time over the busiest lane's working time: 1 is the best that this work allows."""
        return self.step_s / self.busy_s[self.bound_by]

    @property
    def shares(self) -> dict[str, float]:
        """Each lane's working time over step time, lanes in LANES' order."""
        return {lane: self.busy_s[lane] / self.step_s for lane in LANES if lane in self.busy_s}


def training_steps(trace: Iterable[OpRecord]) -> list[StepWindow]:
    """The windows of all steps with a backward half, in order.

    A step ends where the next begins (optimizer and data loading are part of it), or with its own
    last visit if an evaluation or nothing follows.
    """
    visits: dict[int, list[OpRecord]] = {}
    for op in trace:
        if op.lane == "compute":
            visits.setdefault(op.step, []).append(op)
    starts = {step: min(op.start_s for op in ops) for step, ops in visits.items()}
    trained = {step for step, ops in visits.items() if any(op.direction == "B" for op in ops)}
    windows = []
    for step in sorted(trained):
        own_end = max(op.end_s for op in visits[step])
        end = starts[step + 1] if step + 1 in trained else own_end
        windows.append(StepWindow(step=step, start_s=starts[step], end_s=end))
    return windows


def summarize_trace(trace: Sequence[OpRecord]) -> TraceSummary:
    """What the steady training steps spent their time on. Raises ReportError without such a step."""
    windows = training_steps(trace)
    if not windows:
        raise ReportError("the trace holds no training step: nothing to report")
    steady = windows[1:] or windows
    busy = [{lane: _busy_seconds(trace, lane, window) for lane in LANES} for window in steady]
    medians = {lane: statistics.median(b[lane] for b in busy) for lane in LANES}
    numbers = {window.step for window in steady}
    inside = [op for op in trace if op.step in numbers]
    reads = [op for op in inside if op.lane == "nvme_read"]
    return TraceSummary(
        num_steps=len(windows),
        step_s=statistics.median(window.seconds for window in steady),
        busy_s={lane: seconds for lane, seconds in medians.items() if seconds > 0},
        read_bytes=round(sum(op.num_bytes for op in reads) / len(steady)),
        stall_s=sum(_wait(op) for op in inside) / len(steady),
        num_misses=sum(op.op_id < 0 for op in reads),
    )


def _wait(op: OpRecord) -> float:
    return getattr(op, "wait_s", 0.0)


def _busy_seconds(trace: Iterable[OpRecord], lane: str, window: StepWindow) -> float:
    """Seconds of the window in which the lane worked, overlapping ops once, waits left out."""
    spans = sorted(
        (max(op.start_s + _wait(op), window.start_s), min(op.end_s, window.end_s))
        for op in trace
        if op.lane == lane
    )
    total, until = 0.0, window.start_s
    for start, end in spans:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


# --- text --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """The numbers of a finished run. What is None was not measured and is not printed.

    `weights_bytes`: the model's weights, what they take when all are in memory. `budget_bytes`:
    what they may take here. `own_peak_bytes`: peak less what the process held before the model.
    """

    loss_before: float
    loss_after: float
    tokens_per_s: float | None
    weights_bytes: int
    budget_bytes: int | None = None
    peak_bytes: int | None = None
    own_peak_bytes: int | None = None
    eval_loss_before: float | None = None
    eval_loss_after: float | None = None
    files_untouched: bool | None = None


def format_table(rows: Sequence[Sequence[object]], *, header: Sequence[str] = ()) -> str:
    """Columns aligned with two spaces between; numbers to the right, text to the left."""
    cells = [[str(cell) for cell in row] for row in ([header] if header else []) + [*rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(widths))]
    lines = []
    for row in cells:
        parts = zip(row, widths, right, strict=True)
        padded = [
            cell.rjust(width) if is_right else cell.ljust(width) for cell, width, is_right in parts
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def summary_table(run: RunSummary, trace: TraceSummary) -> str:
    """The table that ends a run: loss, speed, memory, lanes, the limit, what was read."""
    rows: list[tuple[str, str]] = [("loss", f"{run.loss_before:.3f} → {run.loss_after:.3f}")]
    if run.eval_loss_before is not None and run.eval_loss_after is not None:
        rows.append(("held-out loss", f"{run.eval_loss_before:.3f} → {run.eval_loss_after:.3f}"))
    speed = f"{trace.step_s:.2f} s a step"
    if run.tokens_per_s is not None:
        speed = f"{run.tokens_per_s:,.0f} tokens/s, {speed}"
    rows.append(("speed", speed))
    rows.extend(("memory", line) for line in _memory_lines(run))
    shares = [f"{LANE_LABELS[lane]} {share:.1%}" for lane, share in trace.shares.items()]
    rows.append(("lanes busy", " · ".join(shares)))
    limit = f"{trace.busy_s[trace.bound_by]:.2f} s of {LANE_LABELS[trace.bound_by]}"
    rows.append(("step / limit", f"{trace.ratio_to_limit:.2f} ({trace.step_s:.2f} s / {limit})"))
    rows.append(("read", f"{format_size(trace.read_bytes)} a step from the model's own files"))
    rows.append(("waited", f"{trace.stall_s:.2f} s a step for weights; {trace.num_misses} misses"))
    if run.files_untouched is not None:
        verdict = "untouched (SHA-256 before = after)" if run.files_untouched else "CHANGED"
        rows.append(("model files", verdict))
    labels = ["" if i and rows[i - 1][0] == label else label for i, (label, _) in enumerate(rows)]
    return format_table([(label, text) for label, (_, text) in zip(labels, rows, strict=True)])


def _memory_lines(run: RunSummary) -> list[str]:
    lines = [f"weights {format_size(run.weights_bytes)} when all are in memory"]
    if run.budget_bytes is not None:
        share = run.budget_bytes / run.weights_bytes
        lines[0] += f", {format_size(run.budget_bytes)} allowed here ({share:.0%})"
    if run.peak_bytes is not None:
        line = f"peak of the process {format_size(run.peak_bytes)}"
        if run.own_peak_bytes is not None:
            line += f", {format_size(run.own_peak_bytes)} of it after the libraries were loaded"
        lines.append(line)
    return lines


# --- pictures ------------------------------------------------------------------------------------


def draw_loss(log_history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The loss of each logged step, and the held-out loss where it was measured, as a PNG.

    log_history: as `transformers.TrainerState` keeps it. Raises ReportError if it holds no loss.
    """
    train = [(row["step"], float(row["loss"])) for row in log_history if "loss" in row]
    held_out = [(row["step"], float(row["eval_loss"])) for row in log_history if "eval_loss" in row]
    if not train:
        raise ReportError("the log holds no loss: nothing to draw (logging_steps too large?)")
    figure = _figure(8.0, 4.5)
    axes = figure.add_subplot()
    solid = {"color": FORWARD, "lw": 1.8, "marker": "o", "ms": 3}
    dashed = {"color": BACKWARD, "lw": 1.8, "ls": "--", "marker": "D", "ms": 6}
    for name, series, style in (("training", train, solid), ("held out", held_out, dashed)):
        if series:
            label = f"{name}  {series[0][1]:.2f} → {series[-1][1]:.2f}"
            axes.plot(*zip(*series, strict=True), label=label, **style)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per trained token)")
    axes.set_title("Training loss", loc="left", color=INK, fontsize=13, pad=12)
    axes.margins(y=0.15)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color="#e4e4e0", lw=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def draw_timeline(trace: Sequence[OpRecord], path: Path, *, step: int | None = None) -> None:
    """One training step as a PNG: a row for each lane, a bar for each op, idle time left pale.

    step: its number in the trace; the middle one of the run if None. Raises ReportError.
    """
    _save(timeline_figure(trace, step=step), path)


def timeline_figure(trace: Sequence[OpRecord], *, step: int | None = None) -> Any:
    """The matplotlib figure of `draw_timeline`, laid out."""
    windows = {window.step: window for window in training_steps(trace)}
    if not windows or (step is not None and step not in windows):
        raise ReportError(f"the trace holds no training step{'' if step is None else f' {step}'}")
    window = windows[step if step is not None else sorted(windows)[len(windows) // 2]]
    shown = [op for op in trace if op.end_s > window.start_s and op.start_s < window.end_s]
    lanes = [lane for lane in LANES if any(op.lane == lane for op in shown)]
    figure = _figure(13.0, 1.75 + 0.72 * len(lanes))
    axes = figure.add_subplot()
    canvas = _Timeline(axes, window)
    for row, lane in enumerate(lanes):
        canvas.draw_lane(row, [op for op in shown if op.lane == lane])
    canvas.finish(lanes, shown)
    figure.legend(
        handles=_legend_handles(shown), loc="outside lower center", ncols=5, frameon=False
    )
    figure.draw_without_rendering()  # lays out, so that a label's width can be compared with its bar's
    canvas.label_blocks([op for op in shown if op.lane == "compute"], row=len(lanes) - 1)
    return figure


class _Timeline:
    """The axes of one step: seconds from the step's start on x, lanes as rows on y."""

    BAR_HEIGHT = 0.62

    def __init__(self, axes: Any, window: StepWindow) -> None:
        self.axes, self.window = axes, window
        self.scale, self.unit = (1.0, "s") if window.seconds >= 1 else (1e3, "ms")
        self.length = window.seconds * self.scale

    def at(self, seconds: float) -> float:
        """The x of a moment on the trace's clock, cut to the step."""
        inside = min(max(seconds, self.window.start_s), self.window.end_s)
        return (inside - self.window.start_s) * self.scale

    def draw_lane(self, row: int, ops: Sequence[OpRecord]) -> None:
        """The lane's idle background, its ops, and to the right how busy it was."""
        self._bars(row, [(0.0, self.length)], IDLE)
        for direction, color in (("F", FORWARD), ("B", BACKWARD)):
            chosen = [op for op in ops if op.direction == direction]
            spans = [(self.at(op.start_s + _wait(op)), self.at(op.end_s)) for op in chosen]
            self._bars(row, spans, color, edge="white")
            misses = [op.op_id < 0 and op.lane == "nvme_read" for op in chosen]
            missed = [span for span, is_miss in zip(spans, misses, strict=True) if is_miss]
            self._bars(row, missed, color, edge=MISS)
        waits = [(self.at(op.start_s), self.at(op.start_s + _wait(op))) for op in ops if _wait(op)]
        self._bars(row, waits, WAIT)
        busy_s = _busy_seconds(ops, ops[0].lane, self.window)
        note = f"{busy_s / self.window.seconds:.0%} busy"
        if moved := sum(op.num_bytes for op in ops):
            whole = StepWindow(  # ops at the step's ends count in full, and so does their time
                step=self.window.step,
                start_s=min(op.start_s for op in ops),
                end_s=max(op.end_s for op in ops),
            )
            rate = moved / _busy_seconds(ops, ops[0].lane, whole)
            note += f"\n{format_size(moved)} at {format_size(round(rate))}/s"
        right = {"va": "center", "fontsize": 9, "color": INK, "linespacing": 1.3}
        self.axes.text(self.length * 1.012, row, note, **right)

    def _bars(
        self, row: int, spans: Sequence[tuple[float, float]], color: str, *, edge: str = "none"
    ) -> None:
        boxes = [(start, stop - start) for start, stop in spans if stop > start]
        bottom = row - self.BAR_HEIGHT / 2
        width = 1.4 if edge == MISS else 0.5
        self.axes.broken_barh(
            boxes, (bottom, self.BAR_HEIGHT), facecolor=color, edgecolor=edge, lw=width
        )

    def finish(self, lanes: Sequence[str], shown: Sequence[OpRecord]) -> None:
        """Title, axis, lane names, and the line where forward turns into backward."""
        axes, summary = self.axes, f"{self.length:.3g} {self.unit}"
        own = [op for op in shown if op.step == self.window.step and op.lane == "compute"]
        num_blocks = len({op.block for op in own})
        title = f"Step {self.window.step}: {num_blocks} blocks, forward and backward, in {summary}"
        axes.set_title(title, loc="left", color=INK, fontsize=13, pad=22)
        turn = self.at(min(op.start_s for op in own if op.direction == "B"))
        last = self.at(max(op.end_s for op in own))
        top = {"y": -0.56, "fontsize": 9, "color": FAINT}
        air = self.length * 0.005
        axes.text(turn - air, s="forward", ha="right", **top)
        axes.text(turn + air, s="backward", ha="left", **top)
        axes.axvline(turn, color=FAINT, lw=1, ls=(0, (3, 3)), zorder=0)
        if self.length - last > 0.1 * self.length:
            axes.text(self.length, s="optimizer, next batch", ha="right", **top)
            axes.axvline(last, color=FAINT, lw=1, ls=(0, (3, 3)), zorder=0)
        axes.set(xlim=(0, self.length), ylim=(len(lanes) - 0.5, -0.5))
        axes.set_yticks(range(len(lanes)), [LANE_LABELS[lane] for lane in lanes], fontsize=10)
        axes.set_xlabel(f"time since the step began ({self.unit})")
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)

    def label_blocks(self, ops: Sequence[OpRecord], *, row: int) -> None:
        """Names each visit's block: inside its bar where most names fit, else every 2nd, 5th …
        below the bars."""
        (left, _), (right, _) = self.axes.transData.transform([(0, 0), (1, 0)])
        per_character = 7 * 0.64 * self.axes.figure.dpi / 72 / (right - left)  # 7 pt, 0.64 em wide
        for direction in ("F", "B"):
            chosen = [op for op in ops if op.direction == direction]
            bars = [(self.at(op.start_s + _wait(op)), self.at(op.end_s)) for op in chosen]
            names = [short_block_name(op.block) for op in chosen]
            room = [
                stop - start - per_character * (len(name) + 0.5)
                for (start, stop), name in zip(bars, names, strict=True)
            ]
            if statistics.median(room) > 0:
                style = {"y": row, "color": "white", "va": "center"}
                shown = [has > 0 for has in room]
            else:
                style = {"y": row + self.BAR_HEIGHT / 2 + 0.04, "color": FAINT, "va": "top"}
                pitch = (bars[-1][1] - bars[0][0]) / len(bars)
                strides = (n for n in (2, 5, 10, 20, 50) if n * pitch > 3.5 * per_character)
                stride = next(strides, 100)
                shown = [name.isdigit() and int(name) % stride == 0 for name in names]
            for (start, stop), name, is_shown in zip(bars, names, shown, strict=True):
                if is_shown:
                    self.axes.text((start + stop) / 2, s=name, ha="center", fontsize=7, **style)


def short_block_name(block: str) -> str:
    """A name that fits a narrow bar: "model.layers.17" is "17", an embedding "E", a head "H"."""
    last = block.rsplit(".", 1)[-1]
    if last.isdigit():
        return last
    return "E" if "emb" in last or last in ("wte", "wpe") else "H" if "head" in last else last[:6]


def _legend_handles(shown: Sequence[OpRecord]) -> list[Any]:
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=FORWARD, label="forward"),
        Patch(facecolor=BACKWARD, label="backward"),
    ]
    handles.append(Patch(facecolor=IDLE, edgecolor=WAIT, label="idle"))
    if any(_wait(op) for op in shown):
        handles.append(Patch(facecolor=WAIT, label="compute waits for weights"))
    if any(op.op_id < 0 and op.lane == "nvme_read" for op in shown):
        handles.append(Patch(facecolor="white", edgecolor=MISS, label="fetched on demand (miss)"))
    return handles


def _figure(width: float, height: float) -> Any:
    """A figure without pyplot: no global state, no display, any thread."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ReportError("drawing needs matplotlib: pip install 'ssdtune[plot]'") from error
    return Figure(figsize=(width, height), dpi=120, layout="constrained", facecolor="white")


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_file_atomically(path, image.getvalue())
