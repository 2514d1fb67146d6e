"""The fastest plan within budgets, by prediction: counts, arrangement, simulation, local moves. A pure function.

How many blocks stay is a small integer program for each way to share slots (`counts.py`), and greedy by kinds besides.
Which ones stay is an arrangement: spread evenly is good where the drive is the limit (grouped residents leave it idle
for a while, then overrun it), the ends of the step where slots already hold its turns. All ways to share slots are tried
with one arrangement, the best ways with the others. Candidates keep the activations of as many blocks as they may; the
best are then tried with fewer, which is as fast where the drive is the limit, and with those of other blocks on NVMe.
Every candidate is simulated, with what lanes lose to each other added up over a pass; the best is polished by moves of one
or two blocks, and of the last few the fastest moment by moment is taken. The seed is fixed: equal requests have
equal plans.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from random import Random

from ssdtune.schedule.arrange import (
    PATTERNS,
    arranged,
    elsewhere,
    keeping,
    moved,
    storing,
)
from ssdtune.schedule.choices import Choice, Request, able_to_keep, skeletons, static_choice
from ssdtune.schedule.hunt import Effort, Found, Hunt, Priced, Skeleton, WritesError
from ssdtune.schedule.plan import PlanError

NUM_POLISHED = 3  # of the best candidates
HOPELESS = 1.1  # times as slow as the best of another budget: no arrangement makes up for it
FEW_PLACES = 8  # blocks up to which every one is tried elsewhere
STEADY_DEPTH = 2  # fills ahead where visits vary: a slot computes, one is full, one is being filled


def search(request: Request, pricing: Priced, effort: Effort | None = None) -> Found:
    """The plan whose steps are predicted to be the fastest, validated.

    Args:
        request: blocks, orders, budgets; its `prefetch` is not looked at.
        pricing: what the kind of step to be fast in costs.
        effort: how far to go; None: as far as has always been enough.

    Raises PlanError where nothing fits, with the smallest budget that does.
    """
    return polished(explored(request, pricing, effort))


def explored(
    request: Request,
    pricing: Priced,
    effort: Effort | None = None,
    *,
    beside: Hunt | None = None,
) -> Hunt:
    """All candidates, simulated; where `search` begins. Raises PlanError as it does.

    beside: what was explored under a budget much like this one. Of the ways to share slots, those that were best there
    are tried, where they fit; a first round that is much slower than its best is the last.
    """
    hunt = Hunt(request, pricing, effort or Effort())
    _first_round(hunt, beside)
    if beside and hunt.step_s > HOPELESS * beside.step_s:
        return hunt
    for way in hunt.skeletons():
        for choice in _arrangements(hunt, way):
            hunt.evaluate(choice)
    for choice in hunt.ranked()[:NUM_POLISHED]:
        for other in keeping(hunt.request, choice):
            hunt.evaluate(other)
    if request.budgets.nvme_activation_bytes and request.activation_bytes:
        _try_the_drive(hunt)
    return hunt


def _first_round(hunt: Hunt, beside: Hunt | None) -> None:
    """All ways to share slots, with one arrangement. Raises PlanError where none fits."""
    ways, near = _skeletons_that_fit(hunt), beside.skeletons() if beside else []
    _try(hunt, [each for each in ways if each in near] or ways)
    if not hunt.seen:  # with one slot most room is left for blocks that stay, and are not written
        _try(hunt, _fitting(hunt, [0]))
    if not hunt.seen:
        assert hunt.least_written is not None
        raise WritesError(hunt.least_written, hunt.request.written_bytes or 0)


def _try(hunt: Hunt, ways: Sequence[Skeleton]) -> None:
    for way in ways:
        for choice in _candidates(hunt, way):
            hunt.evaluate(choice)


def polished(hunt: Hunt) -> Found:
    """The best of what was explored after local moves; where `search` ends. Raises PlanError as it does."""
    patience = hunt.effort.patience
    _polish(hunt, 10 + len(hunt.request.blocks) if patience is None else patience)
    return hunt.best()


# ------------------------------------------------------------------ candidates


def _skeletons_that_fit(hunt: Hunt) -> list[Skeleton]:
    """The ways to share slots that the budget has room for; those without any prefetch only where nothing else fits, or
    that was asked for. Where visits vary, those with three slots and more, if there are any: what is predicted knows
    the usual visit, and a slot more is ready when one is shorter. Raises PlanError where none does."""
    depths = hunt.effort.depths
    steady = [depth for depth in depths if depth >= STEADY_DEPTH]
    fit = _fitting(hunt, steady) if hunt.request.visits_vary and steady else []
    fit = [way for way in fit if way[1]] or _fitting(hunt, depths)
    if not fit:
        raise PlanError("no way to share slots fits the budget")
    return fit


def _fitting(hunt: Hunt, depths: Sequence[int]) -> list[Skeleton]:
    fit: list[Skeleton] = []
    for classes, depth in skeletons(dataclasses.replace(hunt.request, prefetch=max(depths))):
        if depth not in depths and (depth or fit):
            continue
        if static_choice(hunt.request, classes, depth) is not None:
            fit.append((tuple(map(tuple, classes)), depth))
    return fit


def _candidates(hunt: Hunt, skeleton: Skeleton) -> Iterator[Choice]:
    """For one way to share slots that fits: the static choice, and all counts in one arrangement."""
    static, empty = _filled_and_empty(hunt, skeleton)
    yield static
    for counts in hunt.counts(empty):
        yield arranged(hunt.request, empty, list(hunt.kinds(empty)), counts, PATTERNS[0])


def _arrangements(hunt: Hunt, skeleton: Skeleton) -> Iterator[Choice]:
    """The best counts in all other arrangements."""
    _, empty = _filled_and_empty(hunt, skeleton)
    counts = hunt.counts(empty)[0]
    for pattern in PATTERNS[1:]:
        yield arranged(hunt.request, empty, list(hunt.kinds(empty)), counts, pattern)


def _filled_and_empty(hunt: Hunt, skeleton: Skeleton) -> tuple[Choice, Choice]:
    """The static choice, and the one in which nothing stays."""
    static = static_choice(hunt.request, *skeleton)
    assert static is not None
    static = dataclasses.replace(static, stored=frozenset())
    return static, dataclasses.replace(static, residents=frozenset(), cached=frozenset())


# ------------------------------------------------------------------ local moves


def _try_the_drive(hunt: Hunt) -> None:
    """The best with activations of more and more blocks on NVMe. Of few blocks, whose patterns are coarse, then with
    those of one block or two elsewhere, while that helps."""
    for choice in hunt.ranked()[:NUM_POLISHED]:
        for other in storing(hunt.request, choice):
            hunt.evaluate(other)
    if len(able_to_keep(hunt.request)) > FEW_PLACES:
        return
    best = hunt.ranked()[0]
    while not hunt.is_over:
        for other in elsewhere(hunt.request, best):
            hunt.evaluate(other)
        if hunt.ranked()[0] is best:
            return
        best = hunt.ranked()[0]


def _polish(hunt: Hunt, patience: int) -> None:
    """Moves of one block or two from the best candidates, kept where they help, until the tries are used up."""
    chance = Random(0)
    leaders = hunt.ranked()[:NUM_POLISHED]
    keys = [hunt.evaluate(choice) for choice in leaders]
    misses = 0
    while leaders and not (hunt.is_over or hunt.is_at_the_limit) and misses < patience:
        misses += 1
        for k, leader in enumerate(leaders):
            other = moved(hunt.request, leader, chance)
            if other is None:
                continue
            key, best = hunt.evaluate(other), keys[k]
            if key is not None and best is not None and key < best:
                leaders[k], keys[k], misses = other, key, 0
