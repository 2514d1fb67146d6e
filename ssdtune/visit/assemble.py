"""Puts a streamed model together: modules without weights, recipes for their blocks, a plan, an engine."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ssdtune.schedule.plan import Direction, Plan
from ssdtune.swap.engine import Engine
from ssdtune.swap.fills import Pools
from ssdtune.swap.inputs import make_activation_store, make_input_store
from ssdtune.swap.readers import ReaderPool
from ssdtune.swap.recipe import BlockRecipe
from ssdtune.visit.blocks import find_points
from ssdtune.visit.build import MetaModel
from ssdtune.visit.draft import Group, Options, draft
from ssdtune.visit.head import install, refresh
from ssdtune.visit.installed import Weight
from ssdtune.visit.loss import HeadLoss
from ssdtune.visit.model import stream_class
from ssdtune.visit.placeholder import Placeholder
from ssdtune.visit.placement import Placements
from ssdtune.visit.streamer import Meeting, Streamer
from ssdtune.visit.whole import WholeReader


def assemble(meta: MetaModel, options: Options) -> PreTrainedModel:
    """The model of `meta` with its blocks streamed and everything else resident on the device.

    Raises PlanError where the budget is too small, before any weight is read.
    """
    model = meta.model
    drafted = draft(meta, options)
    points, groups = drafted.points, drafted.groups
    plan = drafted.replanner.plan()
    streamer = Streamer([g.label for g in groups])
    streamer.micro_batch_size = options.micro_batch_size
    how: dict[str, Any] = {
        "device": options.device,
        "trace": lambda op: streamer.engine.trace.append(op),
        "timeout_s": options.timeout_s,
    }
    streamer.make_input_store = partial(make_input_store, **how)
    streamer.make_activation_store = partial(make_activation_store, **how)
    streamer.keep_inputs_in(options.block_inputs, options.scratch)
    if options.budgets.nvme_activation_bytes:
        streamer.keep_activations_in(options.scratch)
    with ReaderPool(options.storage, num_threads=options.reader_threads) as pool:
        _load_resident(model, drafted.placements, meta, pool, options)
    _install_placeholders(model, groups, streamer, options.device)
    streamer.checkpoint, streamer.origin = meta.checkpoint, meta.origin
    streamer.open_engine = _Opener(model, drafted.recipes, options)
    streamer.engine = streamer.open_engine(plan, None)
    replanner = streamer.replanner = drafted.replanner
    streamer.on_step = lambda kind, observed: replanner.after_step(streamer, kind, observed)
    block_of = {g_point.module: i for i, g in enumerate(groups) for g_point in g.points}
    for index, point in enumerate(points):
        meeting = Meeting(streamer, index, block_of[point.module], point.module)
        streamer.meetings.append(meeting)
        if not (drafted.is_deferred and point.module is drafted.head):
            point.module.forward = meeting  # type: ignore[method-assign]
    model.ssdtune = streamer  # type: ignore[assignment]
    stream_class(model)
    if drafted.head is not None and drafted.is_deferred:
        _defer_logits(model, drafted.head, options.chunk_tokens)
    return model


class _Opener:
    """Opens engines for a model's blocks, one at a time. A model that is dropped gives slots and threads back: the
    engine knows nothing of it."""

    def __init__(
        self, model: PreTrainedModel, recipes: Sequence[BlockRecipe], options: Options
    ) -> None:
        self._model, self._options = weakref.ref(model), options
        self.recipes, self.storage = recipes, options.storage
        self._finalizer: Any = None

    def __call__(self, plan: Plan, before: Engine | None) -> Engine:
        """The engine that carries out `plan`, after another that is closed now."""
        options = self._options
        if self._finalizer is not None:
            self._finalizer()
        pools = Pools(
            ReaderPool(self.storage, num_threads=options.reader_threads),
            None if options.open_device_pool is None else options.open_device_pool(),
        )
        engine = Engine(
            plan,
            self.recipes,
            pools,
            device=options.device,
            timeout_s=options.timeout_s,
            succeeds=before,
        )
        self._finalizer = weakref.finalize(self._model(), engine.close)
        return engine


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


def _install_placeholders(
    model: PreTrainedModel, groups: Sequence[Group], streamer: Streamer, device: torch.device
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
            weight.put_in(weight.placeholder)
        streamer.installed.blocks.append(weights)


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
    reader = WholeReader(
        meta,
        placements,
        pool,
        alignment=options.storage.alignment,
        timeout_s=options.timeout_s,
    )
    for name in placements:
        if id(state[name]) in streamed:
            continue
        value = reader.read(name).to(options.device)
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
