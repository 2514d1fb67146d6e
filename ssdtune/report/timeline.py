"""One step as a timeline: a row for each lane, a bar for each op; alone, or as predicted above as measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssdtune.report.pictures import (
    BACKWARD,
    FAINT,
    FORWARD,
    INK,
    ReportError,
    new_figure,
    save_figure,
)
from ssdtune.report.steps import (
    LANE_LABELS,
    LANES,
    OpRecord,
    StepWindow,
    busy_seconds,
    is_miss,
    training_steps,
    wait_of,
)
from ssdtune.sizes import format_size

STRIP_INCHES = 1.5
WAIT, IDLE, MISS = "#c9c9c9", "#f3f3f1", "#c02b2b"


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
            spans = [(self.at(op.start_s + wait_of(op)), self.at(op.end_s)) for op in chosen]
            self._bars(row, spans, color, edge="white")
            misses = [is_miss(op) for op in chosen]
            missed = [span for span, is_miss in zip(spans, misses, strict=True) if is_miss]
            self._bars(row, missed, color, edge=MISS)
        waits = [
            (self.at(op.start_s), self.at(op.start_s + wait_of(op))) for op in ops if wait_of(op)
        ]
        self._bars(row, waits, WAIT)
        busy_s = busy_seconds(ops, ops[0].lane, self.window)
        note = f"{busy_s / self.window.seconds:.0%} busy"
        if moved := sum(op.num_bytes for op in ops):
            whole = StepWindow(  # ops at the step's ends count in full, and so does their time
                step=self.window.step,
                start_s=min(op.start_s for op in ops),
                end_s=max(op.end_s for op in ops),
            )
            rate = moved / busy_seconds(ops, ops[0].lane, whole)
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
            bars = [(self.at(op.start_s + wait_of(op)), self.at(op.end_s)) for op in chosen]
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
    if any(wait_of(op) > 0.001 * window.seconds for op in shown):  # a pixel
        handles.append(Patch(facecolor=WAIT, label="compute waits for weights"))
    if any(is_miss(op) for op in shown):
        handles.append(Patch(facecolor="white", edgecolor=MISS, label="fetched on demand (miss)"))
    return handles
