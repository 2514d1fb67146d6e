"""What a run came to: numbers over its steps, its losses, and the lines that say so at the end."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ssdtune.report import LANE_LABELS, LANES
from ssdtune.sizes import format_size
from ssdtune.trainer.telemetry import StepRecord


def steady(records: Sequence[StepRecord]) -> Sequence[StepRecord]:
    """All but the first, which reads what stays; the only one where there is no other."""
    return records[1:] or records


def summary(records: Sequence[StepRecord]) -> dict[str, Any]:
    """Medians over the steady steps, which are all but the first (the only one counts).

    ratio_to_limit: step time over the busiest lane's working time; no order of the same work beats 1.
    """
    counted = steady(records)
    if not counted:
        return {}
    seconds = statistics.median(r.seconds for r in counted)
    lanes = [lane for lane in LANES if any(lane in r.busy_s for r in counted)]
    busy = {lane: statistics.median(r.busy_s.get(lane, 0.0) for r in counted) for lane in lanes}
    found: dict[str, Any] = {
        "step_seconds": seconds,
        "train_tokens_per_second": sum(r.num_tokens for r in counted)
        / sum(r.seconds for r in counted),
        "stall_seconds_per_step": statistics.median(r.stall_s for r in counted),
        "read_bytes_per_step": round(statistics.median(r.num_bytes_read for r in counted)),
        "num_misses": sum(r.num_misses for r in counted),
        "num_over_activations": sum(r.num_over for r in counted),
        "busy_share": {lane: busy[lane] / seconds for lane in lanes},
    }
    if busy and max(busy.values()) > 0:
        found["bound_by"] = max(busy, key=lambda lane: busy[lane])
        found["ratio_to_limit"] = seconds / max(busy.values())
    return found


def summary_lines(metrics: Mapping[str, Any]) -> list[str]:
    """The last lines of a run. What was not measured is not printed."""
    lines = []
    if "loss_first" in metrics:
        losses = [f"loss {metrics['loss_first']:.4g} → {metrics['loss_last']:.4g}"]
        if "eval_loss_first" in metrics:
            losses.append(f"eval {metrics['eval_loss_first']:.4g} → {metrics['eval_loss']:.4g}")
        if "eval_accuracy" in metrics:
            first = metrics.get("eval_accuracy_first")
            before = "" if first is None else f"{first:.1%} → "
            losses.append(f"accuracy {before}{metrics['eval_accuracy']:.1%}")
        predicted = metrics.get("predicted_peak_bytes")
        told = f" ({format_size(predicted)} predicted)" if predicted else ""
        losses.append(f"peak RSS {format_size(metrics['peak_rss_bytes'])}{told}")
        lines.append("   ".join(losses))
    if "step_seconds" in metrics:
        lines.append(
            f"step {metrics['step_seconds']:.3g} s · "
            f"{metrics['train_tokens_per_second']:,.0f} tokens/s · "
            f"reads {format_size(metrics['read_bytes_per_step'])} a step · "
            f"waits {metrics['stall_seconds_per_step']:.2g} s for weights"
        )
    if metrics.get("busy_share"):
        shares = [f"{LANE_LABELS[k]} {v:.1%}" for k, v in metrics["busy_share"].items()]
        if "ratio_to_limit" in metrics:
            label = LANE_LABELS[metrics["bound_by"]]
            shares.append(f"step / {label} alone {metrics['ratio_to_limit']:.2f}")
        lines.append("busy " + " · ".join(shares))
    if metrics.get("predicted_and_measured"):
        told = [
            f"{LANE_LABELS.get(name, name)} {predicted:.3g}, {measured:.3g} s ({predicted / measured - 1:+.0%})"
            for name, (predicted, measured) in metrics["predicted_and_measured"].items()
        ]
        lines.append(f"predicted, measured: {' · '.join(told)}")
    return lines


def losses_of(log_history: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """First and last training loss, first and last evaluation with its accuracy, as far as they were logged."""
    rows = list(log_history)
    trained = [row["loss"] for row in rows if "loss" in row]
    found: dict[str, float] = {}
    if trained:
        found |= {"loss_first": trained[0], "loss_last": trained[-1]}
    for name in ("eval_loss", "eval_accuracy"):
        evaluated = [row[name] for row in rows if name in row]
        if evaluated:
            found[name] = evaluated[-1]
        if len(evaluated) > 1:
            found[f"{name}_first"] = evaluated[0]
    return found
