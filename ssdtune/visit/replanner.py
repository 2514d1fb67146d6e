"""Makes a model's plan, and makes it anew: from the order of visits that a step really had, or with a better layout."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ssdtune.schedule.choices import Request
from ssdtune.schedule.plan import Direction, Plan
from ssdtune.schedule.planner import Layout, make_plan, plan_of
from ssdtune.schedule.validate import validate

if TYPE_CHECKING:
    from ssdtune.visit.streamer import Streamer

MAX_REPLANS = 4  # a model whose order of visits changes from step to step is not followed for ever


class Replanner:
    """request: what is asked for, with the orders and budgets known now. layout: what was chosen for it; None: what
    the static policy chooses."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.layout: Layout | None = None
        self.num_replans = 0

    def plan(self) -> Plan:
        """The plan for what is known now, validated."""
        return _plan(self.request, self.layout)

    def limit_writes(self, num_bytes: int | None) -> None:
        """Of what a step of plans to come may write to the drive; None: any number of bytes."""
        self.request = dataclasses.replace(self.request, written_bytes=num_bytes)

    def adopt(self, streamer: Streamer, request: Request, layout: Layout | None) -> None:
        """From now on other budgets and another layout: the engine is opened anew. Between steps only.

        Raises PlanError for a layout that does not fit, SwapError as `Streamer.reopen` does; all as it was.
        """
        streamer.reopen(_plan(request, layout))
        self.request, self.layout = request, layout

    def after_step(
        self, streamer: Streamer, kind: str, observed: list[tuple[int, Direction]]
    ) -> None:
        """Follows an order that differs from the plan's: a tower that comes later, a head that needs no backward."""
        orders = self.request.orders
        if observed == orders[kind] or not observed or self.num_replans >= MAX_REPLANS:
            return
        self.request = dataclasses.replace(self.request, orders={**orders, kind: list(observed)})
        self.num_replans += 1
        streamer.engine.follow(self.plan())


def _plan(request: Request, layout: Layout | None) -> Plan:
    if layout is None:
        return make_plan(request)
    plan = plan_of(request, layout)
    validate(plan)
    return plan
