"""What a model would be planned as, without reading a weight: its blocks' recipes, and the plan.

`assemble` does the same and then streams; this is for `ssdtune plan` and for the smallest budgets.
"""

from __future__ import annotations

import dataclasses

from ssdtune.schedule import planner
from ssdtune.schedule.plan import Budgets, Plan
from ssdtune.swap.recipe import BlockRecipe
from ssdtune.visit import assemble
from ssdtune.visit.blocks import Point, find_points
from ssdtune.visit.build import MetaModel
from ssdtune.visit.loss import find_head
from ssdtune.visit.placement import place
from ssdtune.visit.recipes import make_recipe


@dataclasses.dataclass(frozen=True)
class Draft:
    """A model's blocks as they would be read, and the plan to come."""

    recipes: list[BlockRecipe]
    planner: assemble.Replanner

    def plan(self) -> Plan:
        """The plan, validated. Raises PlanError where the budget is too small."""
        return self.planner.plan()


def draft(meta: MetaModel, options: assemble.Options) -> Draft:
    """The draft of a model that was built without weights."""
    points: list[Point] = find_points(meta.model)
    groups = assemble._group_weights(meta.model, points)
    placements = place(meta.model, meta.checkpoint.tensors)
    recipes = [
        make_recipe(
            group.label,
            [placements[assemble._first(placements, meta.model, n)] for n in group.parameters],
            meta.checkpoint.tensors,
            alignment=options.storage.alignment,
            on_device=options.device.type != "cpu",
        )
        for group in groups
    ]
    is_deferred = find_head(meta.model) is points[-1].module
    orders = assemble._likely_orders(points, groups, is_deferred=is_deferred)
    return Draft(recipes, assemble.Replanner(recipes, options, orders))


def smallest_budgets(meta: MetaModel, options: assemble.Options) -> Budgets:
    """The least bytes with which the model can be streamed."""
    shapes = [recipe.shape for recipe in draft(meta, options).recipes]
    return planner.smallest_budgets(shapes, on_device=options.device.type != "cpu")
