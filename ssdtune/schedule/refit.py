"""What runs found a profile to be off by: factors on the seconds of its lanes, kept for the plans to come. Pure.

Kept for each kind of step and number format, whose rates are their own. A run is believed only so far: a lane that is off
by more than MOST was slowed, by another drive, a hot processor, somebody else, and says nothing of this machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssdtune.schedule.curve import ProfileError, is_positive, mapping
from ssdtune.schedule.plan import Lane

MOST = 1.25  # a lane's factor at most; at least 1 over it
WEIGHT = 0.5  # of the newest run: factors are moving averages, of logarithms
MATTERS = 0.05  # of a step: lanes with less work are left alone


def work_name(kind: str, dtype: str, autocast: str | None) -> str:
    """What factors are kept for. kind: of step."""
    return f"{kind} {dtype}" if autocast is None else f"{kind} {dtype} as {autocast}"


def refitted(
    kept: Mapping[str, float], compared: Mapping[str, tuple[float, float]]
) -> dict[str, float] | None:
    """Lane -> factor after one more run, to four digits; None where a lane is off by more than is believed.

    kept: the factors that the run was predicted with. compared: "step" and lanes -> seconds predicted and measured.
    """
    least_s = MATTERS * max(compared["step"])
    found = dict(kept)
    for lane in Lane:
        predicted_s, measured_s = compared.get(lane, (0.0, 0.0))
        if min(predicted_s, measured_s) <= 0 or max(predicted_s, measured_s) < least_s:
            continue
        before = kept.get(lane, 1.0)
        now = before * measured_s / predicted_s
        if not 1 / MOST <= now <= MOST:
            return None
        found[str(lane)] = float(f"{before ** (1 - WEIGHT) * now**WEIGHT:.4g}")
    return found


def refit_from(content: Any, where: str) -> dict[str, dict[str, float]]:
    """What was kept: the work -> lane -> factor. `where`: its file. Raises ProfileError naming the entry."""
    found: dict[str, dict[str, float]] = {}
    for work, factors in mapping(content, where).items():
        kept = found[str(work)] = {}
        for lane, factor in mapping(factors, f"{where}: {work}").items():
            if lane not in [*Lane] or not is_positive(factor) or not 1 / MOST <= factor <= MOST:
                raise ProfileError(
                    f"{where}: {work}: {lane!r} is {factor!r}; it is a lane's factor, from {1 / MOST:g} to {MOST:g}.\n"
                    "Delete the file: runs make it again."
                )
            kept[str(lane)] = float(factor)
    return found
