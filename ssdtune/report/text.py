"""What a run says in words: lines, aligned tables, the table that ends it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ssdtune.report.steps import LANE_LABELS
from ssdtune.sizes import format_size


def hush_libraries() -> None:
    """Libraries that call one another's old names: nothing that a user could change."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\b|peft\b")


def say(line: str = "") -> None:
    """Prints one line to the person at the terminal, at once."""
    print(line, flush=True)


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
