"""What a step holds in each tier over time, drawn below its lanes: one strip a tier, its parts stacked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ssdtune.report import FAINT, INK
from ssdtune.schedule.holding import Level
from ssdtune.schedule.plan import Tier
from ssdtune.sizes import format_size

TIER_LABELS = {Tier.DEVICE: "device", Tier.RAM: "RAM", Tier.NVME: "NVMe, beside the model"}
SMALL = 0.02  # of a strip's height: thinner parts are drawn as one
REST = "all else"
# From what stays all the time to what comes and goes; neighbours differ.
COLORS = ("#c9ced6", "#93b5d8", "#3f6fa3", "#b7d7b0", "#5a9e75", "#e3c36b", "#d9824a", "#a05c8c")


def draw_strip(axes: Any, tier: Tier, levels: Sequence[Level], seconds: float) -> None:
    """One tier on its axes, in GB over the step's `seconds`; the most that it holds is marked."""
    parts = _stacked(levels)
    scale = 1.0 if seconds >= 1 else 1e3
    times = [level.start_s * scale for level in levels] + [seconds * scale]
    below = [0.0] * len(times)
    for i, (name, values) in enumerate(parts.items()):
        steps = [*values, values[-1]]
        above = [a + b / 1e9 for a, b in zip(below, steps, strict=True)]
        color = COLORS[i % len(COLORS)]
        axes.fill_between(times, below, above, step="post", color=color, lw=0, label=name)
        below = above
    most = max(levels, key=lambda level: level.num_bytes)
    height = most.num_bytes / 1e9
    axes.axhline(height, color=FAINT, lw=0.8, ls=(0, (3, 3)))
    right = {"va": "center", "fontsize": 9, "color": INK}
    axes.text(times[-1] * 1.012, height, f"at most {format_size(most.num_bytes)}", **right)
    axes.set(xlim=(0, times[-1]), ylim=(0, 1.12 * height))
    axes.set_ylabel(f"{TIER_LABELS[tier]}\n(GB)", fontsize=9, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 0.86), "reverse": True}  # as stacked
    axes.legend(**beside, fontsize=7, frameon=False, labelspacing=0.2)


def _stacked(levels: Sequence[Level]) -> dict[str, list[int]]:
    """Bytes of each part in each level, those first that change the least; small ones as one."""
    names = dict.fromkeys(name for level in levels for name in level.parts)
    whole = max(level.num_bytes for level in levels)
    found: dict[str, list[int]] = {}
    rest = [0] * len(levels)
    for name in names:
        values = [level.parts.get(name, 0) for level in levels]
        if max(values) < SMALL * whole:
            rest = [a + b for a, b in zip(rest, values, strict=True)]
        else:
            found[name] = values
    if any(rest):
        found[REST] = rest
    return dict(sorted(found.items(), key=lambda part: max(part[1]) - min(part[1])))


def counters(levels: Mapping[Tier, Sequence[Level]]) -> list[dict[str, Any]]:
    """Counter events (the Chrome format): a track for each tier's whole, and one for each of its parts; bytes."""
    found: list[dict[str, Any]] = []
    for tier, each in levels.items():
        for level in each:
            at = {"ph": "C", "pid": 1, "ts": 1e6 * level.start_s}
            label = TIER_LABELS[tier]
            found.append({**at, "name": f"{label}: all", "args": {"bytes": level.num_bytes}})
            found.append({**at, "name": f"{label}: parts", "args": dict(level.parts)})
    return found
