"""How one block gets from the user's files into a slot.

A block's tensors are read as a few aligned extents. Where every tensor can be used as the file has
it, the extents go straight into the slot and the tensors are views of it (`copies` is empty).
Otherwise the bytes land in a buffer and `copies` says which piece of which file tensor goes where in
the slot: merged experts, concatenations, transposes and casts are strided copies, packed tensors are
decoded on the way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch

from ssdtune.kernels.checksum import checksum
from ssdtune.kernels.formats import Format
from ssdtune.kernels.kinds import NARROW, kind_of
from ssdtune.kernels.unpack import unpack
from ssdtune.schedule.plan import BlockShape
from ssdtune.swap.storage import Extent, StorageError

Slices = tuple[tuple[int, int], ...]
SLOT_ALIGNMENT = 256  # what CUDA kernels expect of a tensor's start
HALVES = (torch.bfloat16, torch.float16)


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

    def values(self, memory: torch.Tensor) -> torch.Tensor:
        """The tensor, to read from: the view, or a copy where a file's header has it lie unaligned."""
        if self.offset % self.dtype.itemsize == 0:
            return self.of(memory)
        found = memory[self.offset : self.offset + self.num_bytes].clone()
        return found.view(self.dtype).view(self.shape)

    def put(self, memory: torch.Tensor, values: torch.Tensor) -> None:
        """Back to where they lie what `values` gave, changed."""
        if self.offset % self.dtype.itemsize:
            there = memory[self.offset : self.offset + self.num_bytes]
            there.copy_(values.reshape(-1).view(torch.uint8))


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


def address_of(tensor: torch.Tensor) -> int:
    """Where a tensor's first element lies, or would lie: `data_ptr()` of one without elements is 0."""
    start = tensor.untyped_storage().data_ptr()
    return start + int(tensor.storage_offset()) * tensor.itemsize


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Summed:
    """A file's tensor inside a buffer, `offset` in bytes from its start, whose checksum its header has. path: of the
    file."""

    name: str
    path: Path
    offset: int
    num_bytes: int
    checksum: int

    def check(self, memory: torch.Tensor) -> None:
        """Raises StorageError where the bytes, in RAM, are not those that were written."""
        if checksum(memory[self.offset : self.offset + self.num_bytes]) != self.checksum:
            raise StorageError(
                f"{self.name} in {self.path} is damaged: its checksum is not the one that was written.\n"
                f"Remove {self.path.parent} and pack the model again (a run with `quantization` does so by itself), or "
                "restore the file; if it happens again, the drive or the memory fails."
            )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PackedView:
    """A packed tensor inside a buffer."""

    name: str
    shape: tuple[int, ...]
    format: Format
    parts: tuple[TensorView, ...]

    def decode(self, memory: torch.Tensor, out: torch.Tensor) -> None:
        """out = the tensor, rounded to its dtype. memory: uint8, on the device of `out`. out: contiguous, with the tensor's
        elements in any shape: one of a stack of experts has a dimension more than its file tensor, whose rows and columns
        formats go by."""
        unpack(self.format, self.values(memory), out.view(self.shape))

    def values(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """The parts, to read from; those of bytes are views and may be written to."""
        return [part.values(memory) for part in self.parts]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """One piece of a file tensor (in a buffer) to a region of a slot tensor; casts if dtypes differ."""

    source: TensorView | PackedView
    target: int  # index in BlockRecipe.tensors
    source_slices: Slices | None = None
    view: tuple[int, ...] | None = None
    permute: tuple[int, ...] | None = None
    target_slices: Slices | None = None

    def run(self, buffer: torch.Tensor, targets: list[torch.Tensor]) -> None:
        """Copies the piece. buffer: uint8, filled; on the device of the slot where the source is packed. targets: the
        slot's tensors.

        On a device it is asynchronous, on the current stream, where the piece is contiguous and the
        buffer pinned; else the host gathers the piece in pageable memory first.
        """
        region = sliced(targets[self.target], self.target_slices)
        if isinstance(self.source, PackedView):
            if self.is_whole and region.is_contiguous():
                self.source.decode(buffer, region)
                return
            source = torch.empty(self.source.shape, dtype=region.dtype, device=region.device)
            self.source.decode(buffer, source)
        else:
            source = self.source.values(buffer)
        piece = sliced(source, self.source_slices)
        if self.view is not None:
            piece = piece.reshape(self.view)
        if self.permute is not None:
            piece = piece.permute(self.permute)
        if region.is_contiguous():
            # The region takes the piece's shape: a permuted piece could take the region's only as a copy.
            region = region.view(piece.shape)
        region.copy_(piece.reshape(region.shape), non_blocking=True)

    @property
    def is_whole(self) -> bool:
        """Whether the piece is the file tensor as it lies, whatever shape its region has."""
        return self.source_slices is None and self.view is None and self.permute is None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Unpacking:
    """How a slot that holds a block as its files have it becomes the block's tensors, in other memory of `num_bytes`.
    copies: from the slot to `tensors`, as `BlockRecipe` has them from a buffer."""

    tensors: tuple[TensorView, ...]
    copies: tuple[Copy, ...]
    num_bytes: int

    def of(self, index: int) -> tuple[Copy, ...]:
        """What fills one of the tensors."""
        return tuple(copy for copy in self.copies if copy.target == index)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BlockRecipe:
    """Everything needed to fill a slot with one block. is_ours: the file is our own, laid out like the slot, and
    may be written to. unpacking: where the slot holds the block packed, as one tensor of bytes; None: it holds tensors
    as compute reads them. summed: what of the bytes read has a checksum."""

    name: str
    extents: tuple[Extent, ...]
    file_bytes: int
    tensors: tuple[TensorView, ...]
    copies: tuple[Copy, ...]
    slot_bytes: int
    is_ours: bool = False
    unpacking: Unpacking | None = None
    summed: tuple[Summed, ...] = ()

    def check(self, memory: torch.Tensor) -> None:
        """Raises StorageError where bytes that were read are not those that were written. memory: uint8, filled, in
        RAM."""
        for each in self.summed:
            each.check(memory)

    @property
    def is_staged(self) -> bool:
        """Whether the bytes pass a buffer on their way to the slot."""
        return bool(self.copies)

    @property
    def packed(self) -> tuple[PackedView, ...]:
        """The packed tensors among what is read."""
        found = (copy.source for copy in self.copies)
        return tuple(dict.fromkeys(s for s in found if isinstance(s, PackedView)))

    @property
    def shape(self) -> BlockShape:
        """What the planner needs to know."""
        return BlockShape(
            name=self.name,
            slot_bytes=self.slot_bytes,
            file_bytes=self.file_bytes,
            is_staged=self.is_staged,
            is_packed=bool(self.packed),
            decoding=tuple(self._decoding().items()),
        )

    def _decoding(self) -> dict[str, int]:
        """Kind of packed weights -> bytes of the slot that come from such; without narrow ones."""
        found: dict[str, int] = {}
        for copy in self.copies:
            if isinstance(copy.source, PackedView):
                kind = kind_of(copy.source.format)
                dtype = self.tensors[copy.target].dtype
                num_bytes = torch.Size(copy.source.shape).numel() * dtype.itemsize
                found[kind] = found.get(kind, 0) + num_bytes
        found.pop(NARROW, None)
        return found


def kept_packed(recipe: BlockRecipe, *, on_device: bool) -> BlockRecipe:
    """The same block, left in its slot as the files have it: what is packed is decoded by whoever wants it."""
    raw = TensorView(name=recipe.name, dtype=torch.uint8, shape=(recipe.file_bytes,), offset=0)
    return dataclasses.replace(
        recipe,
        tensors=(raw,),
        copies=(Copy(source=raw, target=0),) if on_device else (),
        slot_bytes=recipe.file_bytes,
        unpacking=Unpacking(
            tensors=recipe.tensors, copies=recipe.copies, num_bytes=recipe.slot_bytes
        ),
    )


def widened(recipe: BlockRecipe) -> BlockRecipe:
    """The same block, whose tensors of 16-bit floats lie in its slot in float32."""
    tensors: list[TensorView] = []
    end = 0
    for view in recipe.tensors:
        dtype = torch.float32 if view.dtype in HALVES else view.dtype
        tensors.append(dataclasses.replace(view, dtype=dtype, offset=end))
        end += -(-tensors[-1].num_bytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
    in_place = (Copy(source=view, target=index) for index, view in enumerate(recipe.tensors))
    return dataclasses.replace(
        recipe, tensors=tuple(tensors), copies=recipe.copies or tuple(in_place), slot_bytes=end
    )


def alone(recipe: BlockRecipe, index: int, alignment: int) -> BlockRecipe:
    """How to read one of the block's tensors without the others.

    alignment: of offsets and lengths, as the recipe's extents have it. The tensor keeps its place in
    the slot's layout if it is staged; else it lies at an offset in the bytes read.
    """
    copies = [copy for copy in recipe.copies if copy.target == index]
    sources = [copy.source for copy in copies] if copies else [recipe.tensors[index]]
    views = [v for s in sources for v in (s.parts if isinstance(s, PackedView) else (s,))]
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
    return BlockRecipe(
        name=recipe.tensors[index].name,
        extents=tuple(extents),
        file_bytes=end,
        tensors=(recipe.tensors[index] if copies else moved[recipe.tensors[index]],),
        copies=tuple(
            dataclasses.replace(copy, source=_moved(copy.source, moved), target=0)
            for copy in copies
        ),
        slot_bytes=recipe.tensors[index].num_bytes if copies else end,
        summed=tuple(_summed(recipe, moved)),
    )


def _summed(recipe: BlockRecipe, moved: dict[TensorView, TensorView]) -> Iterator[Summed]:
    """Those of the checksums whose bytes are read still, where they are read to now."""
    known = {(each.offset, each.num_bytes): each for each in recipe.summed}
    for view, to in moved.items():
        found = known.get((view.offset, view.num_bytes))
        if found is not None:
            yield dataclasses.replace(found, offset=to.offset)


def _moved(
    source: TensorView | PackedView, moved: dict[TensorView, TensorView]
) -> TensorView | PackedView:
    """The source, its bytes where they are read to now."""
    if isinstance(source, PackedView):
        return dataclasses.replace(source, parts=tuple(moved[part] for part in source.parts))
    return moved[source]


def sliced(tensor: torch.Tensor, slices: Slices | None) -> torch.Tensor:
    """`tensor[a:b, c:d, …]` for ((a, b), (c, d), …); the whole tensor for None."""
    return tensor if slices is None else tensor[tuple(slice(a, b) for a, b in slices)]
