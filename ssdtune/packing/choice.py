"""Which of several widths each tensor gets, so that the sum of errors is least within a budget of bytes. Pure.

A multiple-choice knapsack. Of each tensor's options only those on the lower convex hull of (bytes, error) are looked at
first, and steps along the hulls are taken in the order of what a byte gains: up to the first step that finds no room
this is the optimum of the relaxed problem (Sinha & Zoltners, "The Multiple-Choice Knapsack Problem", 1979). Smaller
steps fill what is left. What is found is above the optimum by less than one step gains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One way to store a tensor. error: of any unit that adds up over tensors."""

    num_bytes: int
    error: float


def smallest(tensors: Sequence[Sequence[Option]]) -> int:
    """Bytes of the smallest option of every tensor."""
    return sum(min(option.num_bytes for option in options) for options in tensors)


def choose(tensors: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """The index of each tensor's option. budget: bytes of all together, at least `smallest(tensors)`."""
    hulls = [_hull(options) for options in tensors]
    chosen = [hull[0] for hull in hulls]
    left = budget - sum(o[i].num_bytes for o, i in zip(tensors, chosen, strict=True))
    assert left >= 0, (budget, smallest(tensors))
    steps = [(t, to) for t, hull in enumerate(hulls) for to in hull[1:]]
    # Slopes fall along a hull, so each tensor's steps come in their order.
    steps.sort(key=lambda step: _slope(tensors[step[0]], _before(hulls[step[0]], step[1]), step[1]))
    stuck: set[int] = set()
    for t, to in steps:
        more = tensors[t][to].num_bytes - tensors[t][chosen[t]].num_bytes
        if t not in stuck and more <= left:
            chosen[t] = to
            left -= more
        else:
            stuck.add(t)
    return _filled(tensors, chosen, left)


def _filled(tensors: Sequence[Sequence[Option]], chosen: list[int], left: int) -> list[int]:
    """What is left of the budget, used: single changes that gain most, on hulls or not, as long as one fits."""
    while True:
        changes = [
            change for t in range(len(tensors)) for change in _changes(tensors, chosen, t, left)
        ]
        if not changes:
            return chosen
        _, more, t, to = max(changes)
        chosen[t] = to
        left -= more


def _changes(
    tensors: Sequence[Sequence[Option]], chosen: Sequence[int], t: int, left: int
) -> Iterator[tuple[float, int, int, int]]:
    """Gain, bytes, tensor and option of each change of tensor t that gains and fits."""
    now = tensors[t][chosen[t]]
    for to, option in enumerate(tensors[t]):
        more = option.num_bytes - now.num_bytes
        if option.error < now.error and more <= left:
            yield now.error - option.error, more, t, to


def _hull(options: Sequence[Option]) -> list[int]:
    """Indices on the lower convex hull of (bytes, error), the fewest bytes first; errors fall, ever more slowly."""
    order = sorted(range(len(options)), key=lambda i: (options[i].num_bytes, options[i].error))
    hull: list[int] = []
    for i in order:
        if hull and options[i].error >= options[hull[-1]].error:
            continue
        while len(hull) > 1 and _slope(options, hull[-2], hull[-1]) >= _slope(options, hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _before(hull: Sequence[int], to: int) -> int:
    return hull[hull.index(to) - 1]


def _slope(options: Sequence[Option], one: int, other: int) -> float:
    """Error a byte: negative, the steeper the more is gained."""
    num_bytes = options[other].num_bytes - options[one].num_bytes
    return (options[other].error - options[one].error) / num_bytes
