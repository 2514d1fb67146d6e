"""One micro-batch through one block: forward without a graph, backward recomputes it; or, where its activations stay
(`activations.py`), forward with a graph that backward goes through.

The block's trainable parameters are inputs of the autograd function, so that autograd sums their gradients over
micro-batches and `AccumulateGrad` fires once a step: DistributedDataParallel, hooks, clipping and any optimizer work
unchanged. What a block reads or leaves behind past its arguments and results (dicts shared by layers, records for
`output_router_logits`) travels as further inputs and outputs, for else its gradient would be lost in silence.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ssdtune.errors import SSDTuneError
from ssdtune.schedule.plan import Direction, Tier
from ssdtune.swap.kept import Kept
from ssdtune.visit import records
from ssdtune.visit.activations import Activations, Graph, saving
from ssdtune.visit.thread_state import ThreadState

Inner = Callable[..., Any]


class Host(Protocol):
    """What a visit needs of the streamer. `gradless`: by way of being called, a block's results without gradient.
    `activations`: those that stay. `blocks`: names. `inputs_leave`: whether block inputs are kept off the device."""

    blocks: list[str]
    gradless: dict[Any, tuple[int, ...]]
    activations: Activations

    @property
    def inputs_leave(self) -> bool: ...

    def present(self, block: int, direction: Direction) -> None:
        """Makes the block's weights present in its modules."""
        ...

    def slot_memory(self) -> torch.Tensor:
        """The slot whose block is present, uint8."""
        ...

    def variant(self, block: int) -> Any:
        """Which adapters of the block are in use: hashable."""
        ...

    def keep(self, tensor: torch.Tensor) -> Any:
        """Takes a block input out of memory until backward; None where it is to stay with autograd."""
        ...

    def intern(self, tensor: torch.Tensor) -> torch.Tensor:
        """An equal tensor that other visits keep already, or this one."""
        ...


@dataclasses.dataclass(slots=True)
class _Call:
    """How to call a block again: its arguments taken apart. Tensors and other values lie in a flat list."""

    host: Host
    block: int
    inner: Inner
    spec: Any
    mappings: list[
        tuple[type, list[Any], Any]
    ]  # of each mapping: its type, keys, spec of its values
    num_trainable: int
    state: ThreadState
    context: contextvars.Context
    rng: Any
    out: Any = None  # spec of the result, filled by forward
    gradless: tuple[int, ...] = ()  # positions of flat results that no gradient comes back through

    def forward(self, flat: list[Any]) -> list[Any]:
        """The flat results without a graph. The first time with one, thrown away: it tells which results hang on
        nothing that trains (T5's position bias). Marked as needing a gradient, those would make later blocks choose
        other kernels than the unmodified model does."""
        key = self._key(flat)
        is_known = key in self.host.gradless
        if not is_known:
            flat = _leaves(flat)
        with torch.set_grad_enabled(not is_known), _no_autocast_cache():
            outs, self.out = self.run(flat)
        self._note_gradless(key, outs)
        return outs if is_known else [_detached(o) for o in outs]

    def forward_kept(
        self, rest: list[Any], tier: Tier, left: dict[int, Kept]
    ) -> tuple[list[Any], Graph | None]:
        """The flat results and their graph; None where it takes more than may be kept.

        rest: trainable parameters and arguments, as they are held anyway. tier: where what autograd saves is to stay.
        left: by position, arguments that wait off the device.
        """
        host, n = self.host, self.num_trainable
        flat = rest[n:]
        key, leaves = self._key(flat), _leaves(flat)
        held = [x for i, x in enumerate(rest) if isinstance(x, torch.Tensor) and i not in left]
        if (
            host.inputs_leave and tier is Tier.DEVICE
        ):  # others' do, this block's stays for its graph
            held = [x for x in held if isinstance(x, nn.Parameter) or not x.requires_grad]
        leaving = host.activations.leaving(tier, [(rest[i], kept) for i, kept in left.items()])
        with (
            torch.enable_grad(),
            _no_autocast_cache(),
            saving(held, host.slot_memory, leaving) as sizes,
        ):
            outs, self.out = self.run(leaves)
        self._note_gradless(key, outs)
        results = [_detached(o) for o in outs]
        label = host.blocks[self.block]
        graph = host.activations.keep(leaves, outs, sum(sizes), leaving, label)
        for i in left:
            # What accumulates its gradient holds a leaf as long as the graph is there.
            leaves[i - n].data = leaves[i - n].new_empty(0)
        return results, graph

    def _key(self, flat: list[Any]) -> Any:
        """By way of being called, what tells which results have a gradient."""
        return (
            self.inner,
            self.host.variant(self.block),
            self.num_trainable,
            tuple(x.requires_grad if isinstance(x, torch.Tensor) else _plain(x) for x in flat),
        )

    def _note_gradless(self, key: Any, outs: list[Any]) -> None:
        if key not in self.host.gradless:
            self.host.gradless[key] = tuple(
                i for i, o in enumerate(outs) if isinstance(o, torch.Tensor) and not o.requires_grad
            )
        self.gradless = tuple(i for i in self.host.gradless[key] if i < len(outs))

    def check(self, outs: list[Any]) -> None:
        """Recomputed results hang on what trains as they did when it was noted."""
        wrong = [i for i in self.gradless if getattr(outs[i], "requires_grad", False)]
        if wrong:
            raise SSDTuneError(
                f"result {wrong[0]} of a {type(getattr(self.inner, '__self__', self.inner)).__name__} needed no "
                f"gradient when the block was first run and needs one now: it would be lost.\n"
                f"Was an adapter switched on meanwhile? Stream the model anew after such a change."
            )

    def run(self, flat: list[Any]) -> tuple[list[Any], Any]:
        """Calls the block. Returns the flat results (its own, then what it left behind) and their description."""
        args, kwargs, given = self._arguments(flat)
        with records.scratch() as recorded:
            result = self.inner(*args, **kwargs)
            left = [_changes(mapping, before) for mapping, before in given]
            return pytree.tree_flatten((result, left, recorded.new()))

    def _arguments(
        self, flat: list[Any]
    ) -> tuple[Any, Any, list[tuple[MutableMapping[Any, Any], dict[Any, Any]]]]:
        num_plain = self.spec.num_leaves
        leaves, rest = list(flat[:num_plain]), iter(flat[num_plain:])
        given: list[tuple[MutableMapping[Any, Any], dict[Any, Any]]] = []
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, _MappingAt):
                made, keys, spec = self.mappings[leaf.index]
                values = pytree.tree_unflatten([next(rest) for _ in range(spec.num_leaves)], spec)
                mapping = made()
                mapping.update(zip(keys, values, strict=True))
                given.append((mapping, dict(mapping)))
                leaves[i] = mapping
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs, given


@dataclasses.dataclass(frozen=True, slots=True)
class _MappingAt:
    """Stands for a mapping among the flat arguments."""

    index: int


def _leaves(flat: list[Any]) -> list[Any]:
    """The same values as leaves of a graph of their own."""
    return [
        x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
        for x in flat
    ]


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def _plain(value: Any) -> Any:
    """A switch among a block's arguments (`output_attentions=True`) as part of a key; else just its type."""
    return value if isinstance(value, (bool, int, str, type(None))) else type(value)


def _changes(mapping: MutableMapping[Any, Any], before: dict[Any, Any]) -> dict[Any, Any]:
    return {k: v for k, v in mapping.items() if k not in before or before[k] is not v}


def visit(
    host: Host, block: int, inner: Inner, trainable: list[nn.Parameter], args: Any, kwargs: Any
) -> Any:
    """`inner(*args, **kwargs)` as one visit under autograd: same result, recomputed in backward."""
    shared: list[MutableMapping[Any, Any]] = []
    mappings: list[tuple[type, list[Any], Any]] = []
    behind: list[Any] = []

    # `tree_flatten` leaves a cycle around `is_leaf`, which must not hold a block's tensors until garbage is looked for.
    outermost = id(kwargs)

    def is_mapping(x: Any) -> bool:
        return id(x) != outermost and isinstance(x, (dict, UserDict))

    leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=is_mapping)
    for i, leaf in enumerate(leaves):
        if is_mapping(leaf):
            values, values_spec = pytree.tree_flatten(list(leaf.values()))
            leaves[i] = _MappingAt(len(shared))
            shared.append(leaf)
            mappings.append((type(leaf), list(leaf.keys()), values_spec))
            behind += values
        elif is_cache(leaf):
            leaves[i] = None  # recompute would write it twice; training needs none
    call = _Call(
        host=host,
        block=block,
        inner=inner,
        spec=spec,
        mappings=mappings,
        num_trainable=len(trainable),
        state=ThreadState.capture(),
        context=contextvars.copy_context(),
        rng=random_state(),
    )
    flat_out = _Visit.apply(call, *trainable, *leaves, *behind)
    result, left, recorded = pytree.tree_unflatten(list(flat_out), call.out)
    for mapping, changes in zip(shared, left, strict=True):
        mapping.update(changes)
    records.add(recorded)
    return result


class _Visit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *rest: Any) -> tuple[Any, ...]:
        ctx.call = call
        ctx.graph = None
        ctx.set_materialize_grads(False)
        tier = call.host.activations.place(call.block)
        held = _save(ctx, call, rest, may_leave=tier is not Tier.DEVICE)
        if tier is None:
            outs = call.forward(list(rest[call.num_trainable :]))
        else:
            outs, ctx.graph = call.forward_kept(held, tier, _left(ctx))
            if ctx.graph is None and tier is Tier.DEVICE:
                _save(ctx, call, rest, may_leave=True)
        ctx.mark_non_differentiable(*[outs[i] for i in call.gradless])
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grad_outs: torch.Tensor | None) -> tuple[Any, ...]:
        call: _Call = ctx.call
        call.host.present(call.block, Direction.BACKWARD)
        n = call.num_trainable
        # A second backward through a retained graph finds its activations gone, and recomputes.
        graph, ctx.graph = ctx.graph, None
        rest = _restore(ctx, None if graph is None else n)
        trainable = rest[:n]
        if graph is None:
            flat, ends = _recomputed(call, rest[n:])
        else:
            flat, ends = graph.leaves, graph.edges
        pairs = [(ends[i], g) for i, g in enumerate(grad_outs) if g is not None and i in ends]
        wanted = [x for x in flat if isinstance(x, torch.Tensor) and x.requires_grad]
        inputs = [*trainable, *wanted]
        if not pairs or not inputs:
            return (None,) * (1 + len(ctx.places))
        found = torch.autograd.grad(
            [end for end, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True
        )
        for_flat = iter(found[n:])
        grads = [
            next(for_flat) if isinstance(x, torch.Tensor) and x.requires_grad else None
            for x in flat
        ]
        if graph is not None:
            graph.finish()
        return (None, *found[:n], *grads)


def _recomputed(call: _Call, flat: list[Any]) -> tuple[list[Any], dict[int, torch.Tensor]]:
    """The block's arguments as leaves, and its results that have a gradient, by position."""
    flat = _leaves(flat)
    with (
        call.state.entered(),
        torch.enable_grad(),
        _no_autocast_cache(),
        random_state_of(call.rng),
    ):
        outs, _ = call.context.copy().run(call.run, flat)
        call.check(outs)
    ends = {i: o for i, o in enumerate(outs) if isinstance(o, torch.Tensor) and o.requires_grad}
    return flat, ends


def _save(ctx: Any, call: _Call, rest: tuple[Any, ...], *, may_leave: bool) -> list[Any]:
    """Keeps the arguments for backward: through autograd, which frees them block by block even while the loss lives,
    or, where the plan puts block inputs elsewhere and they may leave, through the host. Returns them as they are kept."""
    saved: list[torch.Tensor] = []
    places: list[Any] = []
    held = list(rest)
    for i, x in enumerate(rest):
        if not isinstance(x, torch.Tensor):
            places.append(("as is", x))
            continue
        # Masks and tables are shared: equal ones are held once, by autograd. The first is the hidden state.
        is_shared = i > call.num_trainable and not x.requires_grad
        leaves = may_leave and i >= call.num_trainable and not is_shared
        kept = call.host.keep(x) if leaves else None
        if kept is not None:
            places.append(("kept", (kept, x.requires_grad)))
            continue
        places.append(("saved", len(saved)))
        held[i] = call.host.intern(x) if is_shared else x
        saved.append(held[i])
    ctx.places = places
    ctx.save_for_backward(*saved)
    return held


def _left(ctx: Any) -> dict[int, Kept]:
    """By position, the arguments that `_save` gave to the host."""
    return {i: value[0] for i, (how, value) in enumerate(ctx.places) if how == "kept"}


def _restore(ctx: Any, num: int | None) -> list[Any]:
    """The first so many of the trainable parameters and arguments; None: all."""
    saved, rest = ctx.saved_tensors, []
    for how, value in ctx.places[:num]:
        if how == "saved":
            rest.append(saved[value])
        elif how == "kept":
            kept, requires_grad = value
            rest.append(kept.take().requires_grad_(requires_grad))
        else:
            rest.append(value)
    return rest


def is_cache(value: Any) -> bool:
    """Whether this is a key-value cache, by its class: transformers is not imported for it."""
    return any(
        c.__name__ == "Cache" and c.__module__.startswith("transformers.")
        for c in type(value).__mro__
    )


@contextlib.contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """A cast made under `no_grad` must not be found again under grad: its gradient would be lost."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def random_state() -> tuple[torch.Tensor, torch.Tensor | None]:
    """The default generators' states, CPU and current device: recompute must draw what forward drew."""
    device = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), device


def set_random_state(state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    """What `random_state` returned, put back."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])


@contextlib.contextmanager
def random_state_of(state: tuple[torch.Tensor, torch.Tensor | None]) -> Iterator[None]:
    """The generators in `state` for a `with` block, then as they were."""
    before = random_state()
    set_random_state(state)
    try:
        yield
    finally:
        set_random_state(before)
