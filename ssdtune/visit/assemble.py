"""Puts a streamed model together: modules without weights, recipes for their blocks, a plan, an engine."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ssdtune.schedule.plan import Budgets, Direction, Plan, Tier
from ssdtune.schedule.planner import Request, make_plan
from ssdtune.swap.engine import Engine
from ssdtune.swap.inputs import make_input_store
from ssdtune.swap.readers import ReaderPool
from ssdtune.swap.recipe import BlockRecipe
from ssdtune.swap.storage import Storage
from ssdtune.visit.blocks import Point, find_points
from ssdtune.visit.build import MetaModel
from ssdtune.visit.loss import HeadLoss, find_head, install, refresh
from ssdtune.visit.model import stream_class
from ssdtune.visit.placeholder import Placeholder
from ssdtune.visit.placement import Placements, place
from ssdtune.visit.recipes import make_recipe
from ssdtune.visit.streamer import Meeting, Streamer, Weight

MAX_REPLANS = 4  # a model whose order of visits changes from step to step is not followed for ever


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to stream. Bytes are exact; `prefetch`: fills that run ahead; `timeout_s`: the longest wait for a block."""

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


def assemble(meta: MetaModel, options: Options) -> PreTrainedModel:
    """The model of `meta` with its blocks streamed and everything else resident on the device.

    Raises PlanError where the budget is too small, before any weight is read.
    """
    model = meta.model
    placements = place(model, meta.checkpoint.tensors)
    points = find_points(model)
    groups = _group_weights(model, points)
    recipes = [
        make_recipe(
            names.label,
            [placements[_first(placements, model, name)] for name in names.parameters],
            meta.checkpoint.tensors,
            alignment=options.storage.alignment,
            on_device=options.device.type != "cpu",
        )
        for names in groups
    ]
    head = find_head(model)
    is_deferred = head is not None and head is points[-1].module
    planner = Replanner(recipes, options, _likely_orders(points, groups, is_deferred=is_deferred))
    plan = planner.plan()
    streamer = Streamer([g.label for g in groups])
    streamer.micro_batch_size = options.micro_batch_size
    streamer.input_store = make_input_store(
        options.block_inputs,
        device=options.device,
        folder=options.scratch,
        trace=lambda op: streamer.engine.trace.append(op),
        timeout_s=options.timeout_s,
    )
    pool = ReaderPool(options.storage, num_threads=options.reader_threads)
    _load_resident(model, placements, meta, pool, options)
    _install_placeholders(model, groups, streamer, options.device)
    streamer.engine = Engine(
        plan, recipes, pool, device=options.device, timeout_s=options.timeout_s
    )
    streamer.on_step = lambda kind, observed: planner.after_step(streamer, kind, observed)
    block_of = {g_point.module: i for i, g in enumerate(groups) for g_point in g.points}
    for index, point in enumerate(points):
        meeting = Meeting(streamer, index, block_of[point.module], point.module)
        streamer.meetings.append(meeting)
        if not (is_deferred and point.module is head):
            point.module.forward = meeting  # type: ignore[method-assign]
    model.ssdtune = streamer  # type: ignore[assignment]
    stream_class(model)
    if head is not None and is_deferred:
        _defer_logits(model, head, options.chunk_tokens)
    # A model that is dropped gives its slots and threads back; the engine knows nothing of it.
    weakref.finalize(model, streamer.engine.close)
    return model


def _defer_logits(model: PreTrainedModel, head: nn.Module, chunk_tokens: int) -> None:
    """The head and its loss become one block whose logits exist for a chunk of tokens at a time."""
    streamer: Streamer = model.ssdtune  # type: ignore[assignment]
    meeting = streamer.meetings[-1]

    def ensure_present(direction: str) -> None:
        if direction == Direction.FORWARD:
            streamer.arrive(meeting.point, meeting.block)
        else:
            streamer.present(meeting.block, Direction.BACKWARD)

    owner = HeadLoss(head, chunk_tokens, ensure_present)
    install(model, owner)

    def follow_head() -> None:  # peft may have put adapters around it since
        nonlocal owner
        owner = refresh(model, owner)

    streamer.on_begin = follow_head


@dataclasses.dataclass(slots=True)
class _Group:
    """One block: its parameters' first names, and the meeting points that need them (two where tied)."""

    label: str
    parameters: list[str]
    points: list[Point]


def _group_weights(model: PreTrainedModel, points: Sequence[Point]) -> list[_Group]:
    """Points to blocks. Points that share a parameter share the block: it is stored and fetched once."""
    first_names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first_names.setdefault(id(parameter), name)
    groups: list[_Group] = []
    owner: dict[str, _Group] = {}
    for point in points:
        names = list(dict.fromkeys(first_names[id(p)] for p in point.module.parameters()))
        shared = next((owner[n] for n in names if n in owner), None)
        group = shared or _Group(point.name, [], [])
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
    points: Sequence[Point], groups: Sequence[_Group], *, is_deferred: bool
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


class Replanner:
    """Makes the plan, and makes it anew from the order of visits that a step really had."""

    def __init__(
        self,
        recipes: Sequence[BlockRecipe],
        options: Options,
        orders: dict[str, list[tuple[int, Direction]]],
    ) -> None:
        self.recipes, self.options, self.orders = recipes, options, orders
        self.num_replans = 0

    def plan(self) -> Plan:
        """The plan for the orders known now."""
        options = self.options
        return make_plan(
            Request(
                blocks=tuple(r.shape for r in self.recipes),
                orders=self.orders,
                budgets=options.budgets,
                on_device=options.device.type != "cpu",
                prefetch=options.prefetch,
                block_inputs=options.block_inputs,
                chunk_tokens=options.chunk_tokens,
            )
        )

    def after_step(
        self, streamer: Streamer, kind: str, observed: list[tuple[int, Direction]]
    ) -> None:
        """Follows an order that differs from the plan's: a tower that comes later, a head that needs no backward."""
        if observed == self.orders[kind] or not observed or self.num_replans >= MAX_REPLANS:
            return
        self.orders = {**self.orders, kind: list(observed)}
        self.num_replans += 1
        streamer.engine.follow(self.plan())


def _install_placeholders(
    model: PreTrainedModel, groups: Sequence[_Group], streamer: Streamer, device: torch.device
) -> None:
    """Every streamed parameter becomes a placeholder in every module that holds it."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, name))
    for block, group in enumerate(groups):
        weights = []
        for index, name in enumerate(group.parameters):
            meta = model.get_parameter(name)
            weight = Weight(name, block, index, owners[id(meta)], streamer)
            weight.placeholder = Placeholder(
                weight, meta.shape, stride=meta.stride(), dtype=meta.dtype, device=device
            )
            weights.append(weight)
        for weight in weights:
            for owner, name in weight.owners:
                owner._parameters[name] = weight.placeholder  # type: ignore[assignment]
        streamer.add_block(weights)


def _load_resident(
    model: PreTrainedModel,
    placements: Placements,
    meta: MetaModel,
    pool: ReaderPool,
    options: Options,
) -> None:
    """Reads what is not streamed: parameters outside blocks, persistent buffers; moves other buffers."""
    streamed = {id(p) for point in find_points(model) for p in point.module.parameters()}
    state = model.state_dict(keep_vars=True)
    for name in placements:
        if id(state[name]) in streamed:
            continue
        recipe = make_recipe(
            name,
            [placements[name]],
            meta.checkpoint.tensors,
            alignment=options.storage.alignment,
            on_device=False,
        )
        value = _read(recipe, pool, options.timeout_s).to(options.device)
        for owner, key in _holders(model, state[name]):
            if isinstance(state[name], nn.Parameter):
                owner._parameters[key] = nn.Parameter(value, requires_grad=False)
            else:
                owner._buffers[key] = value
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.device != options.device:
                module._buffers[key] = buffer.to(options.device)


def _holders(model: PreTrainedModel, tensor: torch.Tensor) -> Iterator[tuple[nn.Module, str]]:
    for module in model.modules():
        for key, value in [*module._parameters.items(), *module._buffers.items()]:
            if value is tensor:
                yield module, key


def _read(recipe: BlockRecipe, pool: ReaderPool, timeout_s: float) -> torch.Tensor:
    """The only tensor of a recipe, in memory of its own."""
    from ssdtune.swap.storage import aligned_bytes

    memory = aligned_bytes(max(recipe.file_bytes, 1))
    pool.submit(recipe.extents, memory, label=recipe.name).wait(timeout_s)
    view = recipe.tensors[0]
    if not recipe.is_staged:
        return view.of(memory)  # aligned as in the file, as a memory-mapped load has it
    out = torch.empty(view.shape, dtype=view.dtype)
    for copy in recipe.copies:
        copy.run(memory, [out])
    return out
