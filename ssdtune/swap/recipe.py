"""How one block gets from the user's files into a slot.

A block's tensors are read as a few aligned extents. Where every tensor can be used as the file has
it, the extents go straight into the slot and the tensors are views of it (`copies` is empty).
Otherwise the bytes land in a buffer and `copies` says which piece of which file tensor goes where in
the slot: merged experts, concatenations, transposes and casts are strided copies.
"""

from __future__ import annotations

import dataclasses

import torch

from ssdtune.schedule.plan import BlockShape
from ssdtune.swap.storage import Extent

Slices = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TensorView:
    """A tensor inside a slot or a buffer: `offset` in bytes from its start, contiguous."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Bytes from the first to the last element."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def of(self, memory: torch.Tensor) -> torch.Tensor:
        """The view. memory: uint8 [num_bytes], aligned so that offset is a multiple of the item size."""
        stride = torch.empty(self.shape, device="meta").stride()
        return view_of(memory, self.offset, self.dtype, self.shape, stride)


def view_of(
    memory: torch.Tensor,
    offset: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
) -> torch.Tensor:
    """A tensor that lies `offset` bytes from the start of `memory`, uint8.

    Made by `set_`, so that it has a version counter of its own: views of one base share the base's
    counter, and autograd would take the filling of one block for a change of another.
    """
    view = torch.empty(0, dtype=dtype, device=memory.device)
    with torch.no_grad():
        first = (memory.storage_offset() + offset) // dtype.itemsize
        return view.set_(memory.untyped_storage(), first, shape, stride)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """One piece of a file tensor (in a buffer) to a region of a slot tensor; casts if dtypes differ."""

    source: TensorView
    target: int  # index in BlockRecipe.tensors
    source_slices: Slices | None = None
    view: tuple[int, ...] | None = None
    permute: tuple[int, ...] | None = None
    target_slices: Slices | None = None

    def run(self, buffer: torch.Tensor, targets: list[torch.Tensor]) -> None:
        """Copies the piece. buffer: uint8, filled. targets: the slot's tensors.

        On a device it is asynchronous, on the current stream, where the piece is contiguous and the
        buffer pinned; else the host gathers the piece in pageable memory first.
        """
        piece = sliced(self.source.of(buffer), self.source_slices)
        if self.view is not None:
            piece = piece.reshape(self.view)
        if self.permute is not None:
            piece = piece.permute(self.permute)
        region = sliced(targets[self.target], self.target_slices)
        region.copy_(piece.reshape(region.shape), non_blocking=True)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BlockRecipe:
    """Everything needed to fill a slot with one block. is_ours: the file is our own, laid out like the slot, and
    may be written to."""

    name: str
    extents: tuple[Extent, ...]
    file_bytes: int
    tensors: tuple[TensorView, ...]
    copies: tuple[Copy, ...]
    slot_bytes: int
    is_ours: bool = False

    @property
    def is_staged(self) -> bool:
        """Whether the bytes pass a buffer on their way to the slot."""
        return bool(self.copies)

    @property
    def shape(self) -> BlockShape:
        """What the planner needs to know."""
        return BlockShape(
            name=self.name,
            slot_bytes=self.slot_bytes,
            file_bytes=self.file_bytes,
            is_staged=self.is_staged,
        )


def alone(recipe: BlockRecipe, index: int, alignment: int) -> BlockRecipe:
    """How to read one of the block's tensors without the others.

    alignment: of offsets and lengths, as the recipe's extents have it. The tensor keeps its place in
    the slot's layout if it is staged; else it lies at an offset in the bytes read.
    """
    copies = [copy for copy in recipe.copies if copy.target == index]
    views = [copy.source for copy in copies] if copies else [recipe.tensors[index]]
    extents: list[Extent] = []
    moved: dict[TensorView, TensorView] = {}
    end = 0
    for view in views:
        if view in moved:
            continue
        if not view.num_bytes:
            moved[view] = dataclasses.replace(view, offset=0)
            continue
        extent, start = next(
            (e, view.offset - e.buffer_offset)
            for e in recipe.extents
            if e.buffer_offset <= view.offset < e.buffer_offset + e.num_bytes
        )
        first = start // alignment * alignment
        needed = start + view.num_bytes - first
        num_bytes = -(-needed // alignment) * alignment
        extents.append(Extent(extent.path, extent.file_offset + first, num_bytes, end, needed))
        moved[view] = dataclasses.replace(view, offset=end + start - first)
        end += num_bytes
    views = [moved.get(view, view) for view in views]
    return BlockRecipe(
        name=recipe.tensors[index].name,
        extents=tuple(extents),
        file_bytes=end,
        tensors=(recipe.tensors[index] if copies else views[0],),
        copies=tuple(
            dataclasses.replace(copy, source=view, target=0)
            for copy, view in zip(copies, views, strict=False)
        ),
        slot_bytes=recipe.tensors[index].num_bytes if copies else end,
    )


def sliced(tensor: torch.Tensor, slices: Slices | None) -> torch.Tensor:
    """`tensor[a:b, c:d, …]` for ((a, b), (c, d), …); the whole tensor for None."""
    return tensor if slices is None else tensor[tuple(slice(a, b) for a, b in slices)]
