"""Activations that stay from forward to backward, so that their block is not computed twice.

A kept visit's graph holds them, as in plain training. Weights among what autograd saves are views of a slot, which
other blocks fill meanwhile: of those only the place in the slot is kept (`saved_tensors_hooks`), and they are found
again in whatever slot the block comes back to. Whether a visit is kept never changes a bit, so the plan says which
should be and a budget of bytes decides, visit by visit.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from ssdtune.schedule.plan import Plan
from ssdtune.swap.recipe import view_of


@dataclasses.dataclass(frozen=True, slots=True)
class _InSlot:
    """A view of the slot in which a block's weights are: `offset` in bytes from its start."""

    offset: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]


class Graph:
    """One micro-batch's forward through a block with what backward needs.

    leaves: the block's arguments as leaves of this graph. edges: where backward begins, of each result that has a
    gradient, by position; not the results themselves, which need not stay for that.
    """

    def __init__(
        self, owner: Activations, leaves: list[Any], results: list[Any], num_bytes: int
    ) -> None:
        self._owner, self.leaves, self.num_bytes = owner, leaves, num_bytes
        self.edges: dict[int, GradientEdge] = {
            i: get_gradient_edge(x)
            for i, x in enumerate(results)
            if isinstance(x, torch.Tensor) and x.requires_grad
        }

    def release(self) -> None:
        """Lets go of everything."""
        self._owner.held_bytes -= self.num_bytes
        self.num_bytes = 0
        self.edges, self.leaves = {}, []

    def __del__(self) -> None:
        self.release()


class Activations:
    """What stays of the blocks that the plan keeps, up to its budget."""

    def __init__(self) -> None:
        self.held_bytes = 0
        self.num_kept = 0  # micro-batches' visits, of all steps
        self.num_over = 0  # those that the plan would keep and the budget had no room for
        self._plan: Plan | None = None
        self._blocks: frozenset[int] = frozenset()
        self._budget = 0

    def follow(self, plan: Plan) -> None:
        """From now on what this plan keeps."""
        if plan is not self._plan:
            self._plan, self._blocks = plan, plan.kept_blocks
            self._budget = plan.budgets.activation_bytes

    def wants(self, block: int) -> bool:
        """Whether a visit of the block is to be kept and nothing says yet that it does not fit."""
        if block not in self._blocks:
            return False
        has_room = self.held_bytes < self._budget
        self.num_over += not has_room
        return has_room

    def keep(self, leaves: list[Any], results: list[Any], num_bytes: int) -> Graph | None:
        """The graph between leaves and results, which holds so many bytes, from now on counted; None where it is over
        the budget: its block will be computed again."""
        if self.held_bytes + num_bytes > self._budget:
            self.num_over += 1
            return None
        self.num_kept += 1
        self.held_bytes += num_bytes
        return Graph(self, leaves, results, num_bytes)


@contextlib.contextmanager
def saving(
    elsewhere: Iterable[torch.Tensor], slot: Callable[[], torch.Tensor] | None = None
) -> Iterator[list[int]]:
    """Yields the bytes of each tensor that autograd saves in a `with` block, to be read when it is over.

    elsewhere: tensors that others keep anyway. slot: the memory that holds the block's weights, now and in backward;
    None: they are nowhere.
    """
    memory = None if slot is None else slot()
    weights = None if memory is None else memory.untyped_storage()._cdata
    known = {x.untyped_storage()._cdata for x in elsewhere}
    sizes: list[int] = []

    # Autograd holds what these two refer to: nothing that holds the graph, which would hold itself.
    def pack(saved: torch.Tensor) -> torch.Tensor | _InSlot:
        storage = saved.untyped_storage()
        if memory is not None and storage._cdata == weights:
            offset = saved.data_ptr() - memory.data_ptr()
            return _InSlot(offset, saved.dtype, saved.shape, saved.stride())
        if storage._cdata not in known:
            known.add(storage._cdata)
            sizes.append(storage.nbytes())
        return saved

    def unpack(saved: torch.Tensor | _InSlot) -> torch.Tensor:
        if not isinstance(saved, _InSlot):
            return saved
        assert slot is not None
        return view_of(slot(), saved.offset, saved.dtype, saved.shape, saved.stride)

    with saved_tensors_hooks(pack, unpack):
        yield sizes
