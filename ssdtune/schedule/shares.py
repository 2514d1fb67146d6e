"""One budget of memory for weights that stay and activations that stay: which share of it each gets.

A byte of weights saves the drive two readings a step, a byte of activations saves compute a part of a forward. Which is
worth more depends on what the step waits for, so a few shares are searched and the fastest is taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ssdtune.schedule.plan import Budgets, PlanError
from ssdtune.schedule.planner import Request, able_to_keep, smallest_budgets
from ssdtune.schedule.search import Effort, Found, Priced, search

SHARES = (0.25, 0.5, 0.75)  # of the budget, for activations
WORTH = 0.01  # of a step's time: less does not pay for memory that fills and empties in every step


def search_shares(request: Request, pricing: Priced, effort: Effort | None = None) -> Found:
    """The fastest plan whose weights and activations together stay within the memory where compute is.

    request: its budget there is for both; of its budget for activations nothing is asked. Raises PlanError where
    nothing fits.
    """
    best = search(_with(request, 0), pricing, effort)
    for num_bytes in _tried(request):
        try:
            found = search(_with(request, num_bytes), pricing, effort)
        except PlanError:
            continue
        if found.simulation.step_s < (1 - WORTH) * best.simulation.step_s:
            best = found
    return _with_what_is_left(request, best) if best.plan.kept_blocks else best


def _with_what_is_left(request: Request, found: Found) -> Found:
    """The budget for activations is all that the weights do not take: a step of longer rows needs more."""
    plan = found.plan
    taken = plan.device_bytes if request.on_device else plan.ram_bytes
    budgets = _with(request, _whole(request) - taken).budgets
    return dataclasses.replace(found, plan=dataclasses.replace(plan, budgets=budgets))


def _tried(request: Request) -> Iterator[int]:
    """Bytes for activations: all that can be used, where weights leave so much, and shares."""
    if not request.activation_bytes:
        return
    wanted = sum(request.activation_bytes[i] for i in able_to_keep(request))
    room = _whole(request) - _least(request)
    tried = {min(wanted, room), *(int(share * _whole(request)) for share in SHARES)}
    yield from sorted(n for n in tried if 0 < n <= min(wanted, room))


def _whole(request: Request) -> int:
    budgets = request.budgets
    return budgets.device_bytes if request.on_device else budgets.ram_bytes


def _least(request: Request) -> int:
    least = smallest_budgets(
        request.blocks, on_device=request.on_device, buffers_on_device=request.buffers_on_device
    )
    return least.device_bytes if request.on_device else least.ram_bytes


def _with(request: Request, num_bytes: int) -> Request:
    """So many bytes for activations, the rest for weights."""
    weights = _whole(request) - num_bytes
    old = request.budgets
    budgets = (
        Budgets(ram_bytes=old.ram_bytes, device_bytes=weights, activation_bytes=num_bytes)
        if request.on_device
        else Budgets(ram_bytes=weights, activation_bytes=num_bytes)
    )
    return dataclasses.replace(request, budgets=budgets)
