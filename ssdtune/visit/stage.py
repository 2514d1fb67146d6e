"""The stage of a rehearsal: what stands for every block's forward, and what is counted while it does."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ssdtune.schedule.cost import Work
from ssdtune.schedule.plan import Direction
from ssdtune.visit.activations import saving
from ssdtune.visit.counting import WorkCounter
from ssdtune.visit.live_bytes import LiveBytes
from ssdtune.visit.valueless import without_memory

PLAIN = (int, float, str, bool, type(None), torch.dtype)  # that arguments are compared by


@dataclasses.dataclass(frozen=True)
class Point:
    """A meeting point: its module, its block's number, the forward that computes."""

    module: nn.Module
    block: int
    inner: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Cast:
    """What is rehearsed. front: the model's forward for one micro-batch. head: the point whose logits are never made
    whole, if any. device: where the weights would be."""

    base: Any
    front: Callable[..., Any]
    points: list[Point]
    head: Point | None
    chunk_tokens: int
    device: torch.device


class Stage:
    """Stands for every block's forward: runs it without a graph, holds its inputs as a visit does, counts."""

    def __init__(self, cast: Cast) -> None:
        self.cast = cast
        self.live = LiveBytes()
        self.kept: dict[int, int] = {}  # storage -> bytes of an input kept for backward
        self.hidden: list[int] = []
        self.workspaces: dict[Any, int] = {}  # kind of block -> bytes
        self.works: dict[tuple[Any, Direction], Work] = {}  # kind of block, direction -> work
        self.passes: dict[tuple[int, Direction], list[Work]] = {}
        self.behind: dict[int, list[Work]] = {}  # backward without computing again
        self.saved: Counter[int] = Counter()  # block -> bytes that it would keep instead
        self._saved_by: dict[Any, tuple[int, Work]] = {}  # kind of block -> those two of one visit
        self.forward_bytes = 0  # the most that a forward without a graph holds beyond its input
        # The most that a forward without a graph holds where it waits for a block, its input included.
        self.waiting_bytes = 0
        self._waits_from: int | None = None  # live bytes before such a one, while it is under way
        self._alive: list[torch.Tensor] = []
        self._before: dict[nn.Module, dict[str, Any]] = {}  # what it was that has been furnished
        self._outputs: dict[Any, Any] = {}  # kind of block and its arguments -> what it makes

    @contextlib.contextmanager
    def on_stage(self) -> Iterator[None]:
        """Blocks are ours and parameters without memory, for a `with` block: at once those that a forward may come
        across outside of blocks, and the first block's of each kind; the others' when they are computed."""
        forwards: list[tuple[nn.Module, Any]] = []
        stages: list[tuple[nn.Module, Callable[..., Any]]] = [
            (point.module, _StandIn(self, point)) for point in self.cast.points
        ]
        if self.cast.head is not None:
            stages.append((self.cast.head.module, _NoLogits(self.cast.head.module, self)))
        seen: set[Any] = set()
        later: set[nn.Module] = set()
        for point in self.cast.points:
            kind = _kind_of(point.module)
            if kind in seen:
                later.update(point.module.modules())
            seen.add(kind)
        try:
            self._furnish(module for module in self.cast.base.modules() if module not in later)
            for module, stage in stages:
                forwards.append((module, module.__dict__.get("forward")))
                module.forward = stage  # type: ignore[method-assign]
            yield
        finally:
            for module, forward in forwards:
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward
            for module, parameters in self._before.items():
                module._parameters.update(parameters)
            self._before.clear()
            self._alive.clear()

    def _furnish(self, modules: Iterable[nn.Module]) -> None:
        """Gives each its parameters without memory, once."""
        for module in modules:
            if module in self._before:
                continue
            self._before[module] = dict(module._parameters)
            with self.live.uncounted():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[name] = without_memory(parameter, self.cast.device)

    def play(self, point: Point, args: Any, kwargs: Any) -> Any:
        """One block's forward."""
        if self._waits_from is not None:
            self._note_wait()
            return self._output(_kind_of(point.module), point, args, kwargs)
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        kind = _kind_of(point.module)
        is_new = kind not in self.workspaces
        if is_new:
            self.workspaces[kind] = self._workspace(kind, point, args, kwargs)
        for i, x in enumerate(tensors):
            self._alive.append(x)
            if x.is_floating_point() and (i == 0 or x.requires_grad):
                self.kept[x.untyped_storage()._cdata] = x.nbytes
                self.hidden.append(x.nbytes)
        out = self._output(kind, point, args, kwargs)
        for direction in Direction:
            self.add(point, direction, self.works[kind, direction])
        num_bytes, behind = self._saved_by[kind]
        self.saved[point.block] += num_bytes
        self.behind.setdefault(point.block, []).append(behind)
        return pytree.tree_map_only(
            torch.Tensor, lambda x: x.requires_grad_() if x.is_floating_point() else x, out
        )

    def play_head(self, hidden: torch.Tensor) -> None:
        """What logits would be made of stays alive, as it does until the head's visit."""
        self._alive.append(hidden)
        if self._waits_from is not None:
            self._note_wait()

    @contextlib.contextmanager
    def without_graph(self) -> Iterator[None]:
        """For a forward, after one with a graph: notes what it holds where it waits for the other micro-batches."""
        self._waits_from = self.live.now
        with torch.no_grad():
            yield
        self._waits_from = None

    def _note_wait(self) -> None:
        assert self._waits_from is not None
        self.waiting_bytes = max(self.waiting_bytes, self.live.now - self._waits_from)

    def _output(self, kind: Any, point: Point, args: Any, kwargs: Any) -> Any:
        """What the block makes of its arguments; of equal ones, what a block of its kind made before."""
        call = _call_of(args, kwargs)
        if call is not None and (kind, call) in self._outputs:
            made = self._outputs[kind, call]
            return pytree.tree_map_only(_Like, lambda like: like.tensor(), made)
        self._furnish(point.module.modules())
        is_new = (kind, Direction.FORWARD) not in self.works
        counter = WorkCounter()
        with (
            torch.no_grad(),
            self.forward_alone(),
            counter if is_new else contextlib.nullcontext(),
        ):
            out = point.inner(*args, **kwargs)
        if is_new:
            self.works[kind, Direction.FORWARD] = Work(dict(counter.counts))
        if call is not None and _call_of(out, None) is not None:
            self._outputs[kind, call] = pytree.tree_map_only(torch.Tensor, _Like.of, out)
        return out

    @contextlib.contextmanager
    def forward_alone(self) -> Iterator[None]:
        """Notes what a forward without a graph takes, for a `with` block."""
        before = self.live.peak = self.live.now
        yield
        self.forward_bytes = max(self.forward_bytes, self.live.peak - before)

    def add(self, point: Point, direction: Direction, work: Work) -> None:
        """One more visit of the meeting point's block."""
        self.passes.setdefault((point.block, direction), []).append(work)

    def _workspace(self, kind: Any, point: Point, args: Any, kwargs: Any) -> int:
        """Bytes beyond the inputs that recompute and backward hold at once."""
        self._furnish(point.module.modules())
        before = self.live.peak = self.live.now
        leaves: list[torch.Tensor] = []

        def leaf(x: torch.Tensor) -> torch.Tensor:
            made = x.detach()
            # Tables such as a rotary embedding's have no gradient; the first float is the hidden state.
            if made.is_floating_point() and (x.requires_grad or not leaves):
                leaves.append(made.requires_grad_())
            return made

        args, kwargs = pytree.tree_map_only(torch.Tensor, leaf, (args, kwargs))
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        with WorkCounter() as counter:
            with saving([*given, *point.module.parameters()]) as saved:
                found = pytree.tree_leaves(point.inner(*args, **kwargs))
            outs = [x for x in found if isinstance(x, torch.Tensor) and x.requires_grad]
            inputs = [*leaves[:1], *(p for p in point.module.parameters() if p.requires_grad)]
            in_forward, before_backward = counter.num_calls, Counter(counter.counts)
            if outs and inputs:
                grads = [torch.empty_like(x) for x in outs]
                torch.autograd.grad(outs, inputs, grads, allow_unused=True)
        by_autograd = counter.num_calls - in_forward
        self.works[kind, Direction.BACKWARD] = Work(dict(counter.counts), by_autograd)
        behind = Counter(counter.counts) - before_backward
        self._saved_by[kind] = sum(saved), Work(dict(behind), by_autograd)
        return self.live.peak - before


@dataclasses.dataclass(frozen=True, slots=True)
class _Like:
    """What a tensor is without its values."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(x: torch.Tensor) -> _Like:
        return _Like(x.shape, x.dtype, x.device)

    def tensor(self) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


def _kind_of(module: nn.Module) -> Any:
    """Equal for blocks that compute alike: of one class, with parameters of the same shapes."""
    return (type(module), *(tuple(p.shape) for p in module.parameters()))


def _call_of(args: Any, kwargs: Any) -> tuple[Any, ...] | None:
    """Arguments as a key; None where some can be written to (dicts that layers share, caches) or compared in no way."""
    leaves, tree = pytree.tree_flatten(
        (args, kwargs), is_leaf=lambda x: x is not kwargs and isinstance(x, dict | list)
    )
    told: list[Any] = [tree]
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            told.append((_Like.of(leaf), leaf.requires_grad))
        elif isinstance(leaf, PLAIN):
            told.append(leaf)
        else:
            return None
    return tuple(told)


class _StandIn:
    """A block's forward in a rehearsal."""

    def __init__(self, stage: Stage, point: Point) -> None:
        self.stage, self.point = stage, point

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See `Stage.play`."""
        return self.stage.play(self.point, args, kwargs)


class _NoLogits:
    """The forward of a head whose logits are counted chunk by chunk: as wide as they are, for a bias that is added to
    them, and without their memory."""

    def __init__(self, head: nn.Module, stage: Stage) -> None:
        weight = getattr(head, "weight", None)
        self._width = None if weight is None else weight.shape[0]
        self._stage = stage

    def __call__(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See above."""
        self._stage.play_head(hidden)
        if self._width is None:
            return hidden[..., :0]
        return hidden[..., :1].expand(*hidden.shape[:-1], self._width)
