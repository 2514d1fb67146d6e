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


@dataclasses.dataclass(frozen=True, slots=True)
class _InSlot:
    """A view of the slot in which a block's weights are: `offset` in bytes from its start."""

    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def of(self, memory: torch.Tensor) -> torch.Tensor:
        """The same view of the slot that holds the block now."""
        first = (memory.storage_offset() + self.offset) // self.dtype.itemsize
        view = torch.empty(0, dtype=self.dtype, device=memory.device)
        with torch.no_grad():
            return view.set_(memory.untyped_storage(), first, self.shape, self.stride)


class Graph:
    """One micro-batch's forward through a block with what backward needs.

    leaves: the block's arguments as leaves of this graph. edges: of each result that has a gradient, by position.
    """

    def __init__(self, owner: Activations, leaves: list[Any]) -> None:
        self._owner, self.leaves = owner, leaves
        self.edges: dict[int, GradientEdge] = {}
        self.num_bytes = 0

    def remember(self, results: list[Any]) -> None:
        """Where backward begins: not the results themselves, which need not stay for that."""
        self.edges = {
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

    @contextlib.contextmanager
    def saving(
        self, graph: Graph, slot: Callable[[], torch.Tensor], elsewhere: Iterable[torch.Tensor]
    ) -> Iterator[None]:
        """What autograd saves in a `with` block is counted into `graph`.

        slot: the memory that holds the block's weights, now and in backward. elsewhere: tensors that others keep anyway.
        """
        memory = slot()
        weights = memory.untyped_storage()._cdata
        known = {x.untyped_storage()._cdata for x in elsewhere}
        # Autograd holds what the functions below refer to: not the graph, which would hold itself.
        sizes: list[int] = []

        def pack(saved: torch.Tensor) -> torch.Tensor | _InSlot:
            storage = saved.untyped_storage()
            if storage._cdata == weights:
                offset = saved.data_ptr() - memory.data_ptr()
                return _InSlot(saved.dtype, saved.shape, saved.stride(), offset)
            if storage._cdata not in known:
                known.add(storage._cdata)
                sizes.append(storage.nbytes())
            return saved

        def unpack(saved: torch.Tensor | _InSlot) -> torch.Tensor:
            return saved.of(slot()) if isinstance(saved, _InSlot) else saved

        try:
            with saved_tensors_hooks(pack, unpack):
                yield
        finally:
            graph.num_bytes += sum(sizes)
            self.held_bytes += sum(sizes)

    def fits(self, graph: Graph) -> bool:
        """Whether the graph stays; one that is over the budget is let go: its block will be computed again."""
        if self.held_bytes > self._budget:
            graph.release()
            self.num_over += 1
            return False
        self.num_kept += 1
        return True


@contextlib.contextmanager
def counting_saved(elsewhere: Iterable[torch.Tensor]) -> Iterator[Graph]:
    """Counts the bytes of what autograd saves in a `with` block beside tensors that are elsewhere."""
    owner = Activations()
    graph = Graph(owner, [])
    nothing = torch.empty(0)
    with owner.saving(graph, lambda: nothing, elsewhere):
        yield graph
