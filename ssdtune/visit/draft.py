"""What a model would be streamed as, before a weight is read: its blocks, their recipes, the plan.

`assemble` goes on from here; `ssdtune plan` and the smallest budgets need no more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ssdtune.schedule.choices import Request, least_of
from ssdtune.schedule.plan import Budgets, Direction, Tier
from ssdtune.swap.gds import GdsPool
from ssdtune.swap.recipe import BlockRecipe
from ssdtune.swap.storage import Storage
from ssdtune.visit.blocks import Point, find_points
from ssdtune.visit.build import MetaModel
from ssdtune.visit.head import find_head
from ssdtune.visit.placement import Placements, place
from ssdtune.visit.recipes import make_recipe
from ssdtune.visit.replanner import Replanner

EXPERTS = ".experts."  # in names of parameters that tokens are routed to; "shared_experts" take all tokens


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to stream. Bytes are exact; `prefetch`: fills that run ahead; `timeout_s`: the longest wait for a block.

    `open_device_pool`: opens what reads files straight into buffers on the device; None: buffers are in RAM. `storage`
    reads what goes to RAM in any case.
    """

    device: torch.device
    budgets: Budgets
    storage: Storage
    prefetch: int = 2
    reader_threads: int = 2
    micro_batch_size: int | None = None
    chunk_tokens: int = 4096
    block_inputs: Tier = Tier.DEVICE
    scratch: Path | None = None
    timeout_s: float = 600.0
    open_device_pool: Callable[[], GdsPool] | None = None


@dataclasses.dataclass(frozen=True)
class Draft:
    """A model's blocks as they would be read, and who makes their plan.

    `groups` and `recipes` are the blocks, one for one. `head`: the module that makes logits, if any; `is_deferred`:
    whether it is the last to be met, so that its loss can be computed chunk by chunk.
    """

    placements: Placements
    points: list[Point]
    groups: list[Group]
    recipes: list[BlockRecipe]
    head: nn.Module | None
    is_deferred: bool
    replanner: Replanner


def draft(meta: MetaModel, options: Options) -> Draft:
    """The draft of a model that was built without weights."""
    placements = place(meta.model, meta.checkpoint.tensors)
    points = find_points(meta.model)
    groups = group_weights(meta.model, points)
    on_device = options.device.type != "cpu"
    recipes = [
        make_recipe(
            group.label,
            [placements[_first(placements, meta.model, n)] for n in group.parameters],
            meta.checkpoint.tensors,
            alignment=options.storage.alignment,
            on_device=on_device,
        )
        for group in groups
    ]
    head = find_head(meta.model)
    is_deferred = head is not None and head is points[-1].module
    orders = _likely_orders(points, groups, is_deferred=is_deferred)
    return Draft(
        placements=placements,
        points=points,
        groups=groups,
        recipes=recipes,
        head=head,
        is_deferred=is_deferred,
        replanner=Replanner(
            Request(
                blocks=tuple(r.shape for r in recipes),
                orders=orders,
                budgets=options.budgets,
                on_device=on_device,
                prefetch=options.prefetch,
                block_inputs=options.block_inputs,
                chunk_tokens=options.chunk_tokens,
                buffers_on_device=options.open_device_pool is not None,
                visits_vary=any(EXPERTS in name for group in groups for name in group.parameters),
            )
        ),
    )


def smallest_budgets(meta: MetaModel, options: Options) -> Budgets:
    """The least bytes with which the model can be streamed."""
    return least_of(draft(meta, options).replanner.request)


@dataclasses.dataclass(slots=True)
class Group:
    """One block: its parameters' first names, and the meeting points that need them (two where tied)."""

    label: str
    parameters: list[str]
    points: list[Point]


def group_weights(model: PreTrainedModel, points: Sequence[Point]) -> list[Group]:
    """Points to blocks. Points that share a parameter share the block: it is stored and fetched once."""
    first_names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first_names.setdefault(id(parameter), name)
    groups: list[Group] = []
    owner: dict[str, Group] = {}
    for point in points:
        names = list(dict.fromkeys(first_names[id(p)] for p in point.module.parameters()))
        shared = next((owner[n] for n in names if n in owner), None)
        group = shared or Group(point.name, [], [])
        if shared is None:
            groups.append(group)
        group.points.append(point)
        for name in names:
            if name not in owner:
                owner[name] = group
                group.parameters.append(name)
    return groups


def _first(placements: Placements, model: PreTrainedModel, name: str) -> str:
    """The name under which a tied parameter is placed."""
    if name in placements:
        return name
    wanted = model.get_parameter(name)
    return next(
        n
        for n, p in model.named_parameters(remove_duplicate=False)
        if p is wanted and n in placements
    )


def _likely_orders(
    points: Sequence[Point], groups: Sequence[Group], *, is_deferred: bool
) -> dict[str, list[tuple[int, Direction]]]:
    """Forward in the points' order; backward through the layers, not the embedding, which needs no gradient.

    A head whose loss is computed in chunks makes its gradient in forward and is not visited again.
    """
    block_of = {id(p): i for i, g in enumerate(groups) for p in g.points}
    forward = [(block_of[id(p)], Direction.FORWARD) for p in points]
    backward = [
        (block, Direction.BACKWARD)
        for block, _ in reversed(forward[1 : len(forward) - is_deferred])
    ]
    return {"train": [*forward, *backward], "forward": forward}
