"""Activations that stay from forward to backward, so that their block is not computed twice.

A kept visit's graph holds them, as in plain training. Weights among what autograd saves are views of a slot, which
other blocks fill meanwhile: of those only the place in the slot is kept (`saved_tensors_hooks`), and they are found
again in whatever slot the block comes back to. Where the plan says so, the rest waits on NVMe (`leaving.py`). Whether a
visit is kept, and where, never changes a bit, so the plan says which should be and budgets of bytes decide, visit by
visit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from ssdtune.schedule.plan import Budgets, Plan, Tier
from ssdtune.swap.kept import InputStore, Kept
from ssdtune.visit.leaving import InPiece, Leaving, Place


class Graph:
    """One micro-batch's forward through a block with what backward needs.

    leaves: the block's arguments as leaves of this graph, those that have a gradient; else None. edges: where backward
    begins, of each result that has a gradient, by position; not the results themselves, which need not stay for that.
    num_bytes: held in memory; leaving: what is on NVMe, None: nothing.
    """

    def __init__(
        self,
        owner: Activations,
        leaves: list[Any],
        results: list[Any],
        num_bytes: int,
        leaving: Leaving | None,
    ) -> None:
        self._owner, self._leaving, self.num_bytes = owner, leaving, num_bytes
        self.leaves = [
            x if isinstance(x, torch.Tensor) and x.requires_grad else None for x in leaves
        ]
        self.edges: dict[int, GradientEdge] = {
            i: get_gradient_edge(x)
            for i, x in enumerate(results)
            if isinstance(x, torch.Tensor) and x.requires_grad
        }

    def finish(self) -> None:
        """Backward went through it: lets go of everything, and of inputs that it had no use for."""
        if self._leaving is not None:
            self._leaving.pass_by()
        self.release()

    def release(self) -> None:
        """Lets go of everything. Takes no lock: garbage may be collected on any thread."""
        self._owner.held_bytes -= self.num_bytes
        self.num_bytes = 0
        self.edges, self.leaves = {}, []
        if self._leaving is not None:
            self._owner.stored_bytes -= self._leaving.num_bytes
            self._leaving.let_go()
            self._leaving = None

    def __del__(self) -> None:
        self.release()


class Activations:
    """What stays of the blocks that the plan keeps, up to its budgets.

    held_bytes: in memory. stored_bytes: in `store`, where those on NVMe wait; None: nowhere. num_kept, num_stored: of
    all steps, micro-batches' visits whose activations stayed in memory, and on NVMe. num_over: those that the plan
    would keep and the budgets had no room for.
    """

    def __init__(self) -> None:
        self.held_bytes = self.stored_bytes = 0
        self.num_kept = self.num_stored = self.num_over = 0
        self.store: InputStore | None = None
        self._plan: Plan | None = None
        self._kept: frozenset[int] = frozenset()
        self._stored: frozenset[int] = frozenset()
        self._budgets = Budgets(ram_bytes=0)
        self._is_full = False  # a visit of this step found no room in memory

    def follow(self, plan: Plan) -> None:
        """From now on what this plan keeps."""
        if plan is not self._plan:
            self._plan, self._budgets = plan, plan.budgets
            self._kept, self._stored = plan.kept_blocks, plan.stored_blocks

    def begin_step(self, step: int) -> None:
        """A step begins: what the last one has left in the store makes room."""
        self._is_full = False
        if self.store is not None:
            self.store.begin_step(step)

    def wait_in(self, store: InputStore | None) -> None:
        """From now on those on NVMe wait in this store; between steps."""
        if self.store is not None:
            self.store.close()
        self.store = store

    def place(self, block: int) -> Tier | None:
        """Where a visit of the block is to be kept, if at all and if nothing says yet that it does not fit. What memory
        has no room for goes to NVMe where that has."""
        if block not in self._kept and block not in self._stored:
            return None
        has_room = self.held_bytes < self._budgets.activation_bytes
        if block in self._kept and has_room and not (self._is_full and self.store is not None):
            return Tier.DEVICE
        if self.store is not None and self.stored_bytes < self._budgets.nvme_activation_bytes:
            return Tier.NVME
        self.num_over += 1
        return None

    def leaving(self, tier: Tier, inputs: Iterable[tuple[torch.Tensor, Kept]]) -> Leaving | None:
        """What takes a visit's activations out of memory; None where they stay. inputs: of the block, each with where it
        waits anyway."""
        if tier is not Tier.NVME:
            return None
        assert self.store is not None
        return Leaving(self.store, inputs)

    def keep(
        self,
        leaves: list[Any],
        results: list[Any],
        num_bytes: int,
        leaving: Leaving | None = None,
        label: str = "",
    ) -> Graph | None:
        """The graph between leaves and results, which holds so many bytes, from now on counted; None where it is over
        the budget: its block will be computed again.

        leaving: what leaves memory now. label: the block, for messages. Raises InputsError, ScratchError.
        """
        if leaving is None:
            fits = self.held_bytes + num_bytes <= self._budgets.activation_bytes
        else:
            room = self._budgets.nvme_activation_bytes - self.stored_bytes
            fits = leaving.num_bytes <= room
        if not fits:
            self._is_full = self._is_full or leaving is None
            self.num_over += 1
            return None
        if leaving is None:
            self.num_kept += 1
        else:
            leaving.leave(label)
            self.num_stored += 1
            self.stored_bytes += leaving.num_bytes
        self.held_bytes += num_bytes
        return Graph(self, leaves, results, num_bytes, leaving)

    def close(self) -> None:
        """Gives the store's space back."""
        self.wait_in(None)


@contextlib.contextmanager
def saving(
    elsewhere: Iterable[torch.Tensor],
    slot: Callable[[], torch.Tensor] | None = None,
    leaving: Leaving | None = None,
) -> Iterator[list[int]]:
    """Yields the bytes of each tensor that autograd saves in a `with` block and that stays in memory, to be read when it
    is over.

    elsewhere: tensors that others keep anyway. slot: the memory that holds the block's weights, now and in backward;
    None: they are nowhere. leaving: takes what is to leave memory.
    """
    memory = None if slot is None else slot()
    weights = None if memory is None else memory.untyped_storage()._cdata
    known = {x.untyped_storage()._cdata for x in elsewhere}
    sizes: list[int] = []

    # Autograd holds what these two refer to: nothing that holds the graph, which would hold itself.
    def pack(saved: torch.Tensor) -> torch.Tensor | Place | InPiece:
        storage = saved.untyped_storage()
        if memory is not None and storage._cdata == weights:
            return Place.of(saved, memory.data_ptr())
        if storage._cdata not in known:
            piece = None if leaving is None else leaving.view(saved)
            if piece is not None:
                return piece
            known.add(storage._cdata)
            sizes.append(storage.nbytes())
        # A result that its own operator saves has that operator as `grad_fn`: they would hold each other for good where
        # no backward comes, out of the sight of the collector of garbage. Autograd puts it back when it unpacks.
        return saved if saved.grad_fn is None else saved.detach()

    def unpack(saved: torch.Tensor | Place | InPiece) -> torch.Tensor:
        if isinstance(saved, InPiece):
            return saved.take()
        if not isinstance(saved, Place):
            return saved
        assert slot is not None
        return saved.within(slot())

    with saved_tensors_hooks(pack, unpack):
        yield sizes
