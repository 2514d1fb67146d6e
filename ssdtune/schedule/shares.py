"""One budget of memory for weights that stay and activations that stay: which share of it each gets.

A byte of weights saves the drive two readings a step, a byte of activations saves compute a part of a forward. Which is
worth more depends on what the step waits for, so a few shares are searched and the fastest is taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ssdtune.schedule.choices import Request, able_to_keep, least_of
from ssdtune.schedule.hunt import Effort, Found, Priced
from ssdtune.schedule.plan import Budgets, Plan, PlanError
from ssdtune.schedule.search import HOPELESS, explored, polished, search

SHARES = (0.25, 0.5, 0.75)  # of the budget, for activations
WORTH = 0.01  # of a step's time: less does not pay for memory that fills and empties in every step


def search_within(
    request: Request, pricing: Priced, effort: Effort | None = None, *, shares: bool
) -> Found:
    """`search`, or `search_shares` where weights and activations share a budget. Raises PlanError as they do."""
    return (search_shares if shares else search)(request, pricing, effort)


def search_shares(request: Request, pricing: Priced, effort: Effort | None = None) -> Found:
    """The fastest plan whose weights and activations together stay within the memory where compute is.

    request: its budget there is for both; of its budget for activations nothing is asked. Raises PlanError where
    nothing fits.
    """
    hunt = explored(_with(request, 0), pricing, effort)
    for num_bytes in _tried(request):  # more and more
        try:
            other = explored(_with(request, num_bytes), pricing, effort, beside=hunt)
        except PlanError:
            break
        if other.step_s > HOPELESS * hunt.step_s:
            break
        if other.step_s < (1 - WORTH) * hunt.step_s:
            hunt = other
    best = polished(hunt)  # the best share alone
    return _with_what_is_left(request, best) if best.plan.kept_blocks else best


def _with_what_is_left(request: Request, found: Found) -> Found:
    """The budget for activations is all that the weights do not take: a step of longer rows needs more."""
    left = _here(request, request.budgets) - _here(request, found.plan)
    budgets = _with(request, left).budgets
    return dataclasses.replace(found, plan=dataclasses.replace(found.plan, budgets=budgets))


def _tried(request: Request) -> Iterator[int]:
    """Bytes for activations: all that can be used, where weights leave so much, and shares."""
    if not request.activation_bytes:
        return
    whole = _here(request, request.budgets)
    wanted = sum(request.activation_bytes[i] for i in able_to_keep(request))
    most = min(wanted, whole - _here(request, least_of(request)))
    tried = {most, *(int(share * whole) for share in SHARES)}
    yield from sorted(n for n in tried if 0 < n <= most)


def _here(request: Request, of: Budgets | Plan) -> int:
    """Bytes of the memory where compute is."""
    return of.device_bytes if request.on_device else of.ram_bytes


def _with(request: Request, num_bytes: int) -> Request:
    """So many bytes for activations, the rest for weights."""
    budgets, weights = request.budgets, _here(request, request.budgets) - num_bytes
    ram = budgets.ram_bytes if request.on_device else weights
    device = weights if request.on_device else budgets.device_bytes
    budgets = dataclasses.replace(
        budgets, ram_bytes=ram, device_bytes=device, activation_bytes=num_bytes
    )
    return dataclasses.replace(request, budgets=budgets)
