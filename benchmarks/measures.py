"""The arithmetic of a benchmark row: spreads, ratios, floors, bars. Pure functions, no clock."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, interpolated linearly; values: at least one."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, p20, p80 and how many."""
    return {
        "p50": statistics.median(values),
        "p20": quantile(values, 0.2),
        "p80": quantile(values, 0.8),
        "n": len(values),
    }


def paired_ratio(values: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Spread of the ratios of each round: a load that comes and goes hits both sides of a round."""
    return spread([value / of for value, of in zip(values, base, strict=True)])


def floor(lanes: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """The least seconds a step can take: every lane's work / its measured rate, the largest of them.

    lanes: name -> (work, rate per second), for instance bytes and bytes/s. Lanes that overlap
    perfectly and never wait for each other would reach it.
    """
    seconds = {name: work / rate for name, (work, rate) in lanes.items()}
    limit = max(seconds, key=lambda name: seconds[name])
    return {"seconds": seconds[limit], "limit": limit, "lanes": seconds}


def step_flops(
    shape: Mapping[str, int], *, num_rows: int, length: int, trains_weights: bool
) -> float:
    """Floating-point operations of one step with every block recomputed; multiply and add are two.

    shape: `block_weights` and `head_weights` (elements of matrices in and outside blocks),
    `adapter_weights`, `num_blocks`, `attention_width` (heads x head size). Per token a matrix
    costs 2 forward, 2 recomputed (blocks only), 2 for its input's gradient, 2 for its own if it
    trains. Attention counts the causal half only and its backward twice its forward, so the
    figure stays a lower bound.
    """
    tokens = num_rows * length
    own = 2 * trains_weights
    block = (6 + own) * shape["block_weights"] + 8 * shape["adapter_weights"]
    head = (4 + own) * shape["head_weights"]
    attention_forward = 2 * length * shape["attention_width"] * shape["num_blocks"]
    return float(tokens * (block + head + 4 * attention_forward))


def predict_step(visits: Sequence[tuple[int, float, float]], bytes_per_s: float) -> float:
    """Seconds of a steady step of a plan: one drive, one computer, slots free after their visit.

    visits: (slot, bytes to read for it, seconds of compute), in order. A fill starts when the fill
    before it has ended and the slot's last visit is over. Unlike `floor` it knows that forward
    can't borrow the drive's idle time from backward: the last steps of a few are compared.
    """
    num_steps = 4
    drive = now = 0.0
    free_at: dict[int, float] = {}
    step_ends = []
    for _ in range(num_steps):
        for slot, num_bytes, compute_s in visits:
            if num_bytes:
                drive = max(drive, free_at.get(slot, 0.0)) + num_bytes / bytes_per_s
                now = max(now, drive)
            now += compute_s
            free_at[slot] = now
        step_ends.append(now)
    return step_ends[-1] - step_ends[-2]


def bound_of_passes(passes: Mapping[str, Sequence[float]], bytes_per_s: float) -> float:
    """The least seconds of a step that goes forward and back: each pass takes the longer of its compute and its reading.

    passes: name -> (seconds of compute, bytes to read). What the drive leaves idle in one pass can't be lent to the
    other: a block that is read earlier would need a slot more, and the plan has given all slots to blocks already. The
    visit at the turn is a pass of its own: the slots hold what backward needs first, any fill would evict something that
    is needed sooner than what it brings (Belady), so the drive rests.
    """
    return sum(max(compute_s, num_bytes / bytes_per_s) for compute_s, num_bytes in passes.values())


def compare_losses(expected: Sequence[float], got: Sequence[float]) -> dict[str, Any]:
    """How the losses of the first steps that both made differ. NaN counts as infinitely off."""
    pairs = list(zip(expected, got, strict=False))
    off = [abs(a - b) if math.isfinite(a) and math.isfinite(b) else math.inf for a, b in pairs]
    return {
        "steps": len(pairs),
        "first_expected": pairs[0][0],
        "last_expected": pairs[-1][0],
        "bit_equal": all(a == b for a, b in pairs),
        "max_difference": max(off),
        "first_step_difference": off[0],
    }


def bar(name: str, value: float, limit: float) -> dict[str, Any]:
    """A promise and what was measured: `value` must not pass `limit`."""
    return {"bar": name, "value": value, "limit": limit, "passed": value <= limit}


def busy_shares(lanes: Sequence[Mapping[str, float]], seconds: Sequence[float]) -> dict[str, float]:
    """Median share of each step in which each lane had work."""
    names = sorted({name for lane in lanes for name in lane})
    return {
        name: statistics.median(
            [lane.get(name, 0.0) / of for lane, of in zip(lanes, seconds, strict=True)]
        )
        for name in names
    }
