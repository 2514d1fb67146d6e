"""Tensors without storage that know where each of their elements comes from.

transformers describes how a checkpoint becomes a model by operations on tensors (stack the experts,
concatenate gate and up, split, transpose, permute for rotary halves …). Run on a `Traced` tensor,
that same code moves no data: the result says which box of which file tensor goes where. Data
movement only: anything that would compute a value raises `NotAMove`.

How a part is kept. Each part of a traced tensor is a region (start, stop) per dimension, and a list
of `loops` over one source tensor, outermost first, whose enumeration is the region's row-major
order. So a reshape of a whole part changes nothing but its region, a transpose reorders loops, and
a slice shortens one:

    w [6, 4] -> view [3, 2, 4] -> transpose(0, 1) -> view [6, 4]     (rows 0 2 4 1 3 5)
    loops: (axis 0, 2 steps of 1) (axis 0, 3 steps of 2) (axis 1, 4 steps of 1)
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

Ranges = tuple[tuple[int, int], ...]  # (start, stop) per dimension


class NotAMove(Exception):
    """An operation that is no movement of data, or one that no box of a source describes."""


@dataclasses.dataclass(frozen=True, slots=True)
class Loop:
    """`size` places along `axis` of the source, `step` apart."""

    axis: int
    size: int
    step: int


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """Elements of one source tensor (`shape`: as stored), and the region that they fill."""

    source: str
    shape: tuple[int, ...]
    starts: tuple[int, ...]  # first index along each axis of the source
    loops: tuple[Loop, ...]
    region: Ranges

    @property
    def sizes(self) -> list[int]:
        """The region's extents."""
        return [stop - start for start, stop in self.region]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """What a `Part` is for whoever copies: source[slices].reshape(view).permute(order) -> region."""

    source: str
    slices: Ranges
    view: tuple[int, ...] | None
    order: tuple[int, ...] | None
    region: Ranges


class Traced(torch.Tensor):
    """A tensor with a shape, a dtype and `parts`, and no values."""

    parts: tuple[Part, ...]

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, parts: tuple[Part, ...]) -> Traced:
        """Contiguous as far as anyone can see: layouts that no memory has need no keeping."""
        made = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=torch.device("meta")
        )
        made.parts = parts
        return made

    @staticmethod
    def of(name: str, shape: Sequence[int], dtype: torch.dtype) -> Traced:
        """The file tensor `name`, whole."""
        region = tuple((0, n) for n in shape)
        loops = tuple(Loop(axis, n, 1) for axis, n in enumerate(shape) if n != 1)
        part = Part(name, tuple(shape), (0,) * len(shape), loops, region)
        return Traced(shape, dtype, (part,) if math.prod(shape) else ())

    @property
    def sources(self) -> list[str]:
        """Names of the file tensors in it."""
        return list(dict.fromkeys(part.source for part in self.parts))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As for a plain tensor: only operators below the Python API are looked at."""
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"Traced({list(self.shape)}, {len(self.parts)} parts)"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = rules().get(func)
        if rule is None:
            raise NotAMove(f"{func} computes values")
        return rule(*args, **(kwargs or {}))


# Regions and loops


def _grouped(part: Part) -> list[list[Loop]]:
    """The loops of each dimension of the region; splits a loop where a dimension ends inside it."""
    left = list(part.loops)
    groups: list[list[Loop]] = []
    for extent in reversed(part.sizes):
        group: list[Loop] = []
        open_places = extent
        while open_places > 1:
            loop = left.pop()
            if open_places % loop.size == 0:
                group.insert(0, loop)
                open_places //= loop.size
            elif loop.size % open_places == 0:
                outer_step = loop.step * open_places
                left.append(Loop(loop.axis, loop.size // open_places, outer_step))
                group.insert(0, Loop(loop.axis, open_places, loop.step))
                open_places = 1
            else:
                raise NotAMove(f"a reshape of {part.source} cuts its dimensions unevenly")
        groups.insert(0, _joined(group))
    return groups


def _joined(loops: Sequence[Loop]) -> list[Loop]:
    """Neighbours that are one walk along an axis, as one loop."""
    made: list[Loop] = []
    for loop in loops:
        outer = made[-1] if made else None
        if outer and outer.axis == loop.axis and outer.step == loop.size * loop.step:
            made[-1] = Loop(loop.axis, outer.size * loop.size, loop.step)
        else:
            made.append(loop)
    return made


def _flat(groups: Sequence[Sequence[Loop]]) -> tuple[Loop, ...]:
    return tuple(loop for group in groups for loop in group)


def _with(ranges: Ranges, dim: int, start: int, stop: int) -> Ranges:
    return (*ranges[:dim], (start, stop), *ranges[dim + 1 :])


def _narrowed(part: Part, dim: int, start: int, stop: int) -> Iterator[Part]:
    """The part within [start, stop) of a dimension, in places of the region; may be several."""
    if (start, stop) == part.region[dim]:
        yield part
        return
    first = part.region[dim][0]
    groups = _grouped(part)
    for begin, starts, group in _cut(part.starts, groups[dim], start - first, stop - first):
        count = math.prod(loop.size for loop in group)
        yield dataclasses.replace(
            part,
            starts=starts,
            loops=_flat([*groups[:dim], group, *groups[dim + 1 :]]),
            region=_with(part.region, dim, first + begin, first + begin + count),
        )


def _cut(
    starts: tuple[int, ...], group: Sequence[Loop], begin: int, end: int
) -> Iterator[tuple[int, tuple[int, ...], list[Loop]]]:
    """Places [begin, end) of one dimension's walk, as (first place, source starts, loops) each."""
    if begin >= end:
        return
    if not group:
        yield begin, starts, []
        return
    outer, inner = group[0], list(group[1:])
    width = math.prod(loop.size for loop in inner)

    def moved(index: int) -> tuple[int, ...]:
        place = starts[outer.axis] + index * outer.step
        return (*starts[: outer.axis], place, *starts[outer.axis + 1 :])

    def inside(index: int, a: int, b: int) -> Iterator[tuple[int, tuple[int, ...], list[Loop]]]:
        for place, at, loops in _cut(moved(index), inner, a, b):
            yield index * width + place, at, loops

    low, high = -(-begin // width), end // width  # whole turns of the outer loop
    if low > high:
        yield from inside(high, begin - high * width, end - high * width)
        return
    if begin < low * width:
        yield from inside(low - 1, begin - (low - 1) * width, width)
    if low < high:
        turns = [Loop(outer.axis, high - low, outer.step)] if high - low > 1 else []
        yield low * width, moved(low), [*turns, *inner]
    if high * width < end:
        yield from inside(high, 0, end - high * width)


# What the operators of torch do to parts


def _view(x: Traced, shape: Sequence[int], **_: Any) -> Traced:
    shape = list(shape)
    if -1 in shape:
        known = -math.prod(shape)
        shape[shape.index(-1)] = x.numel() // known if known else 0
    if tuple(shape) == tuple(x.shape):
        return x
    if len(x.parts) <= 1:
        region = tuple((0, n) for n in shape)
        parts = tuple(dataclasses.replace(part, region=region) for part in x.parts)
        return Traced(shape, x.dtype, parts)
    if [n for n in shape if n != 1] != [n for n in x.shape if n != 1]:
        raise NotAMove("a joined tensor is reshaped")
    parts = tuple(_with_ones(part, x.shape, shape) for part in x.parts)
    return Traced(shape, x.dtype, parts)


def _with_ones(part: Part, old: Sequence[int], new: Sequence[int]) -> Part:
    """The part after dimensions of extent 1 came or went."""
    kept = iter([span for span, n in zip(part.region, old, strict=True) if n != 1])
    region = tuple((0, 1) if n == 1 else next(kept) for n in new)
    return dataclasses.replace(part, region=region)


def _permute(x: Traced, dims: Sequence[int]) -> Traced:
    order = [d % x.dim() for d in dims]
    parts = []
    for part in x.parts:
        groups = _grouped(part)
        loops = _flat([groups[d] for d in order])
        region = tuple(part.region[d] for d in order)
        parts.append(dataclasses.replace(part, loops=loops, region=region))
    return Traced([x.shape[d] for d in order], x.dtype, tuple(parts))


def _transpose(x: Traced, dim0: int = 0, dim1: int = 1) -> Traced:
    order = list(range(x.dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(x, order)


def _slice(
    x: Traced, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Traced:
    dim %= x.dim()
    start, end, step = slice(start, end, step).indices(x.shape[dim])
    if step != 1:
        raise NotAMove("every other element is taken")
    end = max(start, end)
    parts = []
    for part in x.parts:
        low, high = part.region[dim]
        if max(low, start) < min(high, end):
            for cut in _narrowed(part, dim, max(low, start), min(high, end)):
                a, b = cut.region[dim]
                region = _with(cut.region, dim, a - start, b - start)
                parts.append(dataclasses.replace(cut, region=region))
    shape = [*x.shape[:dim], end - start, *x.shape[dim + 1 :]]
    return Traced(shape, x.dtype, tuple(parts))


def _select(x: Traced, dim: int, index: int) -> Traced:
    dim, index = dim % x.dim(), index % x.shape[dim]
    return _squeeze(_slice(x, dim, index, index + 1), dim)


def _squeeze(x: Traced, dim: int | Sequence[int] | None = None) -> Traced:
    dims = range(x.dim()) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {d % x.dim() for d in dims if x.shape[d] == 1}
    return _view(x, [n for d, n in enumerate(x.shape) if d not in gone])


def _unsqueeze(x: Traced, dim: int) -> Traced:
    dim %= x.dim() + 1
    return _view(x, [*x.shape[:dim], 1, *x.shape[dim:]])


def _cat(tensors: Sequence[Traced], dim: int = 0) -> Traced:
    dim %= tensors[0].dim()
    shapes = {(*x.shape[:dim], *x.shape[dim + 1 :]) for x in tensors}
    if len(shapes) > 1:
        raise NotAMove(f"tensors of unlike shapes are joined: {[list(x.shape) for x in tensors]}")
    parts, filled = [], 0
    for x in tensors:
        for part in x.parts:
            low, high = part.region[dim]
            region = _with(part.region, dim, low + filled, high + filled)
            parts.append(dataclasses.replace(part, region=region))
        filled += x.shape[dim]
    shape = [*tensors[0].shape[:dim], filled, *tensors[0].shape[dim + 1 :]]
    return Traced(shape, tensors[0].dtype, tuple(parts))


def _stack(tensors: Sequence[Traced], dim: int = 0) -> Traced:
    dim %= tensors[0].dim() + 1
    return _cat([_unsqueeze(x, dim) for x in tensors], dim)


def _split_sizes(x: Traced, sizes: Sequence[int], dim: int = 0) -> list[Traced]:
    ends = list(itertools.accumulate(sizes))
    return [_slice(x, dim, end - n, end) for end, n in zip(ends, sizes, strict=True)]


def _split(x: Traced, size: int, dim: int = 0) -> list[Traced]:
    total = x.shape[dim]
    return [_slice(x, dim, at, min(at + size, total)) for at in range(0, total, size)]


def _unbind(x: Traced, dim: int = 0) -> list[Traced]:
    return [_select(x, dim, index) for index in range(x.shape[dim])]


def _same(x: Traced, **_: Any) -> Traced:
    return Traced(x.shape, x.dtype, x.parts)


def _to(x: Traced, *, dtype: torch.dtype | None = None, **_: Any) -> Traced:
    return Traced(x.shape, dtype or x.dtype, x.parts)


@functools.cache
def rules() -> dict[Any, Callable[..., Any]]:
    """What each operator does to a traced tensor; those that are not here are no moves."""
    aten = torch.ops.aten
    return {
        aten.view.default: _view,
        aten._unsafe_view.default: _view,
        aten._reshape_alias.default: lambda x, shape, stride: _view(x, shape),
        aten.permute.default: _permute,
        aten.transpose.int: _transpose,
        aten.t.default: _transpose,
        aten.slice.Tensor: _slice,
        aten.select.int: _select,
        aten.squeeze.default: _squeeze,
        aten.squeeze.dim: _squeeze,
        aten.squeeze.dims: _squeeze,
        aten.unsqueeze.default: _unsqueeze,
        aten.cat.default: _cat,
        aten.stack.default: _stack,
        aten.split.Tensor: _split,
        aten.split_with_sizes.default: _split_sizes,
        aten.unbind.int: _unbind,
        aten.clone.default: _same,
        aten.detach.default: _same,
        aten.alias.default: _same,
        aten._to_copy.default: _to,
    }


# From parts to boxes


def boxes(x: Traced) -> Iterator[Box]:
    """The copies that make `x`: every element of it is in exactly one region."""
    todo = list(reversed(x.parts))
    while todo:
        part = todo.pop()
        groups = _grouped(part)
        loops = _joined(_flat(groups))
        gap = _gap(loops)
        if gap is None:
            yield _box(part, loops)
            continue
        # Every n-th row of the source: no box, so the dimension is taken turn by turn.
        dim = next(d for d, g in enumerate(groups) if any(_covers(loop, gap) for loop in g))
        low, high = part.region[dim]
        width = (high - low) // groups[dim][0].size
        cuts = [_narrowed(part, dim, at, at + width) for at in range(low, high, width)]
        todo += reversed([cut for one in cuts for cut in one])


def _covers(loop: Loop, gap: Loop) -> bool:
    """Whether `loop` walks where `gap`, perhaps joined from several loops, does."""
    return loop.axis == gap.axis and gap.step <= loop.step <= gap.size * gap.step


def _by_axis(loops: Sequence[Loop]) -> list[Loop]:
    return sorted(loops, key=lambda loop: (loop.axis, -loop.step))


def _gap(loops: Sequence[Loop]) -> Loop | None:
    """A loop that skips elements: its step is more than what the finer loops of its axis fill."""
    filled: dict[int, int] = {}
    for loop in reversed(_by_axis(loops)):
        if loop.step != filled.get(loop.axis, 1):
            return loop
        filled[loop.axis] = loop.step * loop.size
    return None


def _box(part: Part, loops: Sequence[Loop]) -> Box:
    """A part whose loops fill a box of the source."""
    extents = [1] * len(part.shape)
    for loop in loops:
        extents[loop.axis] *= loop.size
    slices = tuple((at, at + n) for at, n in zip(part.starts, extents, strict=True))
    nested = _by_axis(loops)
    order = tuple(nested.index(loop) for loop in loops)
    view = tuple(loop.size for loop in nested)
    if order == tuple(sorted(order)):
        return Box(source=part.source, slices=slices, view=None, order=None, region=part.region)
    if len({loop.axis for loop in loops}) == len(loops):
        view = None  # one loop per axis: the source's own axes can be permuted
        moved = [loop.axis for loop in loops]
        order = (*(axis for axis in range(len(extents)) if axis not in moved), *moved)
    return Box(source=part.source, slices=slices, view=view, order=order, region=part.region)
