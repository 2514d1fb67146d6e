"""What a run shows a person: aligned tables, the loss curve, and one step as a timeline.

Pure: numbers go in, text or a PNG comes out. A trace is any sequence of objects with the attributes
of `ssdtune.schedule.trace.TraceOp`.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ssdtune.durable import make_folder, write_file_atomically
from ssdtune.errors import SSDTuneError
from ssdtune.sizes import format_size

# Top to bottom, as data flows.
LANES = ("nvme_read", "nvme_write", "h2d", "d2h", "d2d", "cpu", "compute")
LANE_LABELS = {
    "nvme_read": "NVMe read",
    "nvme_write": "NVMe write",
    "h2d": "host to device",
    "d2h": "device to host",
    "d2d": "device (unpack)",
    "cpu": "CPU (unpack)",
    "compute": "compute",
}
FORWARD, BACKWARD = "#3b7dd8", "#e08a2c"
STRIP_INCHES = 1.5
WAIT, IDLE, MISS, INK, FAINT = "#c9c9c9", "#f3f3f1", "#c02b2b", "#22252a", "#8a8f98"


class OpRecord(Protocol):
    """One op as it ran. `wait_s` (how long compute stood still for weights) counts as 0 if absent,
    `is_miss` (fetched on demand) as false."""

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


def hush_libraries() -> None:
    """Libraries that call one another's old names: nothing that a user could change."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\b|peft\b")


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


def training_steps(trace: Iterable[OpRecord]) -> list[StepWindow]:
    """The windows of all steps with a backward half, in order; of all steps where none has one, as of a run of forward
    passes alone.

    A step ends where the next begins (optimizer and data loading are part of it), or with its own
    last visit if an evaluation or nothing follows.
    """
    visits: dict[int, list[OpRecord]] = {}
    for op in trace:
        if op.lane == "compute":
            visits.setdefault(op.step, []).append(op)
    starts = {step: min(op.start_s for op in ops) for step, ops in visits.items()}
    trained = {step for step, ops in visits.items() if any(op.direction == "B" for op in ops)}
    trained = trained or set(visits)
    windows = []
    for step in sorted(trained):
        own_end = max(op.end_s for op in visits[step])
        end = starts[step + 1] if step + 1 in trained else own_end
        windows.append(StepWindow(step=step, start_s=starts[step], end_s=end))
    return windows


def _wait(op: OpRecord) -> float:
    return getattr(op, "wait_s", 0.0)


def _is_miss(op: OpRecord) -> bool:
    return getattr(op, "is_miss", False)


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


def factor_words(factors: Mapping[str, float]) -> str:
    """Lanes and what they take beyond the profile: `compute x 1.08, NVMe read x 0.97`."""
    return ", ".join(f"{LANE_LABELS[lane]} x {factor:.3g}" for lane, factor in factors.items())


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


def duration(seconds: float) -> str:
    """34_560 -> "9 h 36 m", 75 -> "1 m 15 s", 3.25 -> "3.2 s"."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} m {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} m"


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes, for the table that ends a run. None: not known, not printed.

    weights: what the model's weights take when all are in memory, in the format that computes.
    files: what they take in the model's files. budget: what they may take in memory here.
    peak: the most that the process held; before: what it held before the model was opened.
    """

    weights: int
    files: int | None = None
    budget: int | None = None
    peak: int | None = None
    before: int | None = None


def summary_table(
    metrics: Mapping[str, Any], memory: Memory, *, files_untouched: bool | None = None
) -> str:
    """The table that ends a run: loss, speed, memory, lanes, the limit, what was read.

    metrics: as `trainer.TrainResult.metrics` names them; what is absent is left out.
    """
    rows: list[tuple[str, str]] = []
    for label, first, last in (
        ("loss", "loss_first", "loss_last"),
        ("held-out loss", "eval_loss_first", "eval_loss"),
    ):
        if first in metrics and last in metrics:
            rows.append((label, f"{metrics[first]:.3f} → {metrics[last]:.3f}"))
    if "step_seconds" in metrics:
        rows.append(("speed", _speed_line(metrics)))
    rows.extend(("memory", line) for line in _memory_lines(memory))
    if metrics.get("busy_share"):
        shares = [f"{LANE_LABELS[k]} {v:.1%}" for k, v in metrics["busy_share"].items()]
        rows.append(("lanes busy", " · ".join(shares)))
    if "ratio_to_limit" in metrics:
        ratio, lane = metrics["ratio_to_limit"], LANE_LABELS[metrics["bound_by"]]
        rows.append(("step / limit", f"{ratio:.2f} × the time that {lane} alone takes"))
    if "read_bytes_per_step" in metrics:
        read, stall = metrics["read_bytes_per_step"], metrics["stall_seconds_per_step"]
        line = f"{format_size(read)} a step from the model's own files, {stall:.2f} s waited for it"
        rows.append(("read", line))
    if files_untouched is not None:
        verdict = "untouched (SHA-256 before = after)" if files_untouched else "CHANGED"
        rows.append(("model files", verdict))
    labels = ["" if i and rows[i - 1][0] == label else label for i, (label, _) in enumerate(rows)]
    return format_table([(label, text) for label, (_, text) in zip(labels, rows, strict=True)])


def _speed_line(metrics: Mapping[str, Any]) -> str:
    line = f"{metrics['step_seconds']:.2f} s a step"
    tokens = metrics.get("train_tokens_per_second")
    return line if tokens is None else f"{tokens:,.0f} tokens/s, {line}"


def _memory_lines(memory: Memory) -> list[str]:
    lines = [f"weights {format_size(memory.weights)} when all are in memory"]
    if memory.files is not None and memory.files != memory.weights:
        lines[0] += f" as they compute ({format_size(memory.files)} in the files)"
    if memory.budget is not None:
        share = memory.budget / memory.weights
        lines[0] += f", {format_size(memory.budget)} allowed here ({share:.0%})"
    if memory.peak is not None:
        line = f"peak of the process {format_size(memory.peak)}"
        if memory.before is not None:
            own = format_size(memory.peak - memory.before)
            line += f", {own} of it since the libraries were loaded"
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
    figure = new_figure(8.0, 4.5)
    axes = figure.add_subplot()
    solid = {"color": FORWARD, "lw": 1.8, "marker": "o", "ms": 3}
    dashed = {"color": BACKWARD, "lw": 1.8, "ls": "--", "marker": "D", "ms": 6}
    for name, series, style in (("training", train, solid), ("held out", held_out, dashed)):
        if series:
            values = [f"{loss:.2f}" for _, loss in (series[0], series[-1])[-len(series) :]]
            label = f"{name}  {' → '.join(values)}"
            axes.plot(*zip(*series, strict=True), label=label, **style)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per trained token)")
    figure.suptitle("Training loss", x=0.02, ha="left", color=INK, fontsize=13)
    axes.margins(y=0.15)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color="#e4e4e0", lw=0.8)
    axes.set_axisbelow(True)
    figure.legend(frameon=False, loc="outside upper right", ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def draw_timeline(trace: Sequence[OpRecord], path: Path, *, step: int | None = None) -> None:
    """One training step as a PNG: a row for each lane, a bar for each op, idle time left pale.

    step: its number in the trace; the middle one of the run if None. Raises ReportError.
    """
    save_figure(timeline_figure(trace, step=step), path)


def timeline_figure(
    trace: Sequence[OpRecord], *, step: int | None = None, num_below: int = 0
) -> Any:
    """The matplotlib figure of `draw_timeline`, laid out. num_below: axes below the lanes, on the same seconds, for the
    caller to draw on: `figure.axes[1:]`."""
    windows = {window.step: window for window in training_steps(trace)}
    if not windows or (step is not None and step not in windows):
        raise ReportError(f"the trace holds no training step{'' if step is None else f' {step}'}")
    window = windows[step if step is not None else sorted(windows)[len(windows) // 2]]
    shown = [op for op in trace if op.end_s > window.start_s and op.start_s < window.end_s]
    lanes = [lane for lane in LANES if any(op.lane == lane for op in shown)]
    own = 0.72 * len(lanes)
    figure = new_figure(13.0, 1.75 + own + STRIP_INCHES * num_below)
    ratios = [own, *[STRIP_INCHES] * num_below]
    axes, *_ = figure.subplots(1 + num_below, 1, squeeze=False, height_ratios=ratios)[:, 0]
    canvas = _drawn(axes, window, lanes, shown)
    figure.legend(
        handles=_legend_handles(shown, window), loc="outside lower center", ncols=5, frameon=False
    )
    figure.draw_without_rendering()  # lays out, so that a label's width can be compared with its bar's
    canvas.label_blocks([op for op in shown if op.lane == "compute"], row=len(lanes) - 1)
    return figure


def draw_comparison(
    predicted: Sequence[OpRecord], measured: Sequence[OpRecord], path: Path, *, step: int
) -> None:
    """One step as it was predicted and, below on the same scale, as it ran. Both carry its number; the measured ops
    may be of more steps. Raises ReportError."""
    windows = [_window_of(predicted, step), _window_of(measured, step)]
    longest = max(window.seconds for window in windows)
    shown = [
        [op for op in ops if op.end_s > w.start_s and op.start_s < w.end_s]
        for ops, w in zip((predicted, measured), windows, strict=True)
    ]
    lanes = [lane for lane in LANES if any(op.lane == lane for ops in shown for op in ops)]
    figure = new_figure(13.0, 2 * (1.4 + 0.72 * len(lanes)))
    axes = figure.subplots(2, 1)
    for i, name in enumerate(("predicted", "measured")):
        canvas = _drawn(axes[i], windows[i], lanes, shown[i], name=name)
        axes[i].set_xlim(0, longest * canvas.scale)
    handles = _legend_handles(shown[1], windows[1])
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    save_figure(figure, path)


def _window_of(trace: Sequence[OpRecord], step: int) -> StepWindow:
    found = next((w for w in training_steps(trace) if w.step == step), None)
    if found is None:
        raise ReportError(f"the trace holds no training step {step}")
    return found


def _drawn(
    axes: Any,
    window: StepWindow,
    lanes: Sequence[str],
    shown: Sequence[OpRecord],
    *,
    name: str = "",
) -> _Timeline:
    """The lanes of one step on its axes."""
    canvas = _Timeline(axes, window)
    for row, lane in enumerate(lanes):
        if ops := [op for op in shown if op.lane == lane]:
            canvas.draw_lane(row, ops)
    canvas.finish(lanes, shown, name)
    return canvas


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
            misses = [_is_miss(op) for op in chosen]
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
        """Bars of one color. A white edge parts neighbours, but would hide a bar of a pixel or two:
        thin ones get an edge of their own color instead, which makes them visible."""
        thin = self.length / 400
        for is_thin in (False, True):
            boxes = [(a, b - a) for a, b in spans if b > a and (b - a < thin) == is_thin]
            line = color if is_thin and edge == "white" else edge
            self.axes.broken_barh(
                boxes,
                (row - self.BAR_HEIGHT / 2, self.BAR_HEIGHT),
                facecolor=color,
                edgecolor=line,
                lw=1.4 if edge == MISS else 0.5,
            )

    def finish(self, lanes: Sequence[str], shown: Sequence[OpRecord], name: str = "") -> None:
        """Title (with `name`: predicted, measured), axis, lane names, and the line where forward turns into backward."""
        axes, summary = self.axes, f"{self.length:.3g} {self.unit}"
        own = [op for op in shown if op.step == self.window.step and op.lane == "compute"]
        num_blocks = len({op.block for op in own})
        what = f"Step {self.window.step}{f', {name}' if name else ''}"
        backward = [op.start_s for op in own if op.direction == "B"]
        passes = "forward and backward" if backward else "forward"
        title = f"{what}: {num_blocks} blocks, {passes}, in {summary}"
        axes.set_title(title, loc="left", color=INK, fontsize=13, pad=22)
        last = self.at(max(op.end_s for op in own))
        top = {"y": -0.56, "fontsize": 9, "color": FAINT}
        if backward:
            turn, air = self.at(min(backward)), self.length * 0.005
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
        """Names each visit's block: inside its bar where nearly all fit, else every 2nd, 5th …
        below the bars."""
        (left, _), (right, _) = self.axes.transData.transform([(0, 0), (1, 0)])
        per_character = 7 * 0.64 * self.axes.figure.dpi / 72 / (right - left)  # 7 pt, 0.64 em wide
        taken = 0.0  # where the last name ends: bars of uneven length may leave no room
        for direction in ("F", "B"):
            chosen = [op for op in ops if op.direction == direction]
            bars = [(self.at(op.start_s + _wait(op)), self.at(op.end_s)) for op in chosen]
            names = [short_block_name(op.block) for op in chosen]
            room = [
                stop - start - per_character * (len(name) + 0.5)
                for (start, stop), name in zip(bars, names, strict=True)
            ]
            if sum(has > 0 for has in room) >= 0.9 * len(room):
                style = {"y": row, "color": "white", "va": "center"}
                shown = [has > 0 for has in room]
            else:
                style = {"y": row + self.BAR_HEIGHT / 2 + 0.04, "color": FAINT, "va": "top"}
                pitch = (bars[-1][1] - bars[0][0]) / len(bars)
                strides = (n for n in (2, 5, 10, 20, 50) if n * pitch > 3.5 * per_character)
                stride = next(strides, 100)
                shown = [name.isdigit() and int(name) % stride == 0 for name in names]
            for (start, stop), name, is_shown in zip(bars, names, shown, strict=True):
                middle, half = (start + stop) / 2, per_character * (len(name) + 0.5) / 2
                if is_shown and middle - half >= taken:
                    self.axes.text(middle, s=name, ha="center", fontsize=7, **style)
                    taken = middle + half


def short_block_name(block: str) -> str:
    """A name that fits a narrow bar: "model.layers.17" is "17", an embedding "E", a head "H"."""
    last = block.rsplit(".", 1)[-1]
    if last.isdigit():
        return last
    return "E" if "emb" in last or last in ("wte", "wpe") else "H" if "head" in last else last[:6]


def _legend_handles(shown: Sequence[OpRecord], window: StepWindow) -> list[Any]:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=FORWARD, label="forward")]
    if any(op.direction == "B" for op in shown):
        handles.append(Patch(facecolor=BACKWARD, label="backward"))
    handles.append(Patch(facecolor=IDLE, edgecolor=WAIT, label="idle"))
    if any(_wait(op) > 0.001 * window.seconds for op in shown):  # a pixel
        handles.append(Patch(facecolor=WAIT, label="compute waits for weights"))
    if any(_is_miss(op) for op in shown):
        handles.append(Patch(facecolor="white", edgecolor=MISS, label="fetched on demand (miss)"))
    return handles


def new_figure(width: float, height: float) -> Any:
    """A figure without pyplot: no global state, no display, any thread."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ReportError("drawing needs matplotlib: pip install 'ssdtune[plot]'") from error
    return Figure(figsize=(width, height), dpi=120, layout="constrained", facecolor="white")


def save_figure(figure: Any, path: Path) -> None:
    """As a PNG, whole or not at all."""
    make_folder(path.parent)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_file_atomically(path, image.getvalue())
