"""What autograd saves in one micro-batch's visit of a block, out of memory until backward wants it.

    leaving = Leaving(store, inputs)
    place = leaving.view(saved)      # while forward runs: instead of the tensor
    leaving.leave("layers.3")        # when the visit is over: nothing is in memory any more
    saved = place.take()             # in backward: the same bits, shape and strides

Storages leave, not tensors: what several of them share is stored once, and each finds its own place in it again. They
leave when the visit is over, as they are then, as backward would have found them; and in the order in which they were
saved last, since backward wants what was saved last first and the store reads ahead in reverse.

On a CPU kernels choose by alignment: storages come from torch's allocator, on 64 bytes, and come back to it. One from
elsewhere that begins in between stays in memory.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable

import torch

from ssdtune.swap.kept import InputStore, Kept, span_of
from ssdtune.swap.recipe import address_of, view_of

LINE_BYTES = 64  # torch's alignment on a CPU; on a device it is more


class _Piece:
    """One storage, or one block input: in memory until it leaves, then in a store.

    start: its first byte's address in forward. Views that autograd unpacks share what was brought back, until the last
    of them has been.
    """

    def __init__(self, memory: torch.Tensor | None, kept: Kept | None, num_bytes: int, start: int):
        self.num_bytes, self.start = num_bytes, start
        self.num_views = 0
        self.was_taken = False
        self.kept = kept
        self._memory = memory

    def leave(self, store: InputStore, label: str) -> None:
        """Into the store, out of memory."""
        assert self._memory is not None
        self.kept = store.store(self._memory, label)
        self._memory = None

    def let_go(self) -> None:
        """Out of the store, unless others hold it there."""
        self.kept = self._memory = None

    def take(self) -> torch.Tensor:
        """Its bytes, uint8, for one of the views."""
        if self._memory is None:
            assert self.kept is not None
            self.was_taken = True
            self._memory = _bytes_of(self.kept.take())
        memory = self._memory
        self.num_views -= 1
        if self.kept is not None and self.num_views <= 0:
            self._memory = None
        return memory


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """A saved tensor without its memory: `offset` in bytes from the start of the slot, or the piece, that it lies in."""

    offset: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    @staticmethod
    def of(saved: torch.Tensor, start: int) -> Place:
        """start: the address where that begins."""
        return Place(address_of(saved) - start, saved.dtype, saved.shape, saved.stride())

    def within(self, memory: torch.Tensor) -> torch.Tensor:
        """The tensor again. memory: what it lies in, uint8, wherever that is now."""
        return view_of(memory, self.offset, self.dtype, self.shape, self.stride)


@dataclasses.dataclass(frozen=True, slots=True)
class InPiece:
    """A saved tensor that leaves with its piece."""

    piece: _Piece
    place: Place

    def take(self) -> torch.Tensor:
        """The tensor. Raises InputsError."""
        return self.place.within(self.piece.take())


class Leaving:
    """The storages of one micro-batch's visit of a block.

    store: where to. inputs: of the block, each with its place in a store where it waits anyway; what autograd saves of
    them is found there. num_bytes: that leave.
    """

    def __init__(self, store: InputStore, inputs: Iterable[tuple[torch.Tensor, Kept]]) -> None:
        self._store = store
        # Storage -> piece, the one saved last at the end. What forward itself let go of again need not leave.
        self._pieces: weakref.WeakValueDictionary[int, _Piece] = weakref.WeakValueDictionary()
        self._inputs = {
            x.untyped_storage()._cdata: _Piece(None, kept, span_of(x) * x.itemsize, x.data_ptr())
            for x, kept in inputs
            if x.data_ptr() % LINE_BYTES == 0
        }
        self._left: list[_Piece] = []

    @property
    def num_bytes(self) -> int:
        """See the class."""
        return sum(piece.num_bytes for piece in (*self._left, *self._pieces.values()))

    def view(self, saved: torch.Tensor) -> InPiece | None:
        """What stands for the tensor; None where it is better left in memory: small, or not plain bytes on a line."""
        piece = self._piece_of(saved)
        if piece is None:
            return None
        piece.num_views += 1
        return InPiece(piece, Place.of(saved, piece.start))

    def _piece_of(self, saved: torch.Tensor) -> _Piece | None:
        if not _is_plain(saved, self._store.device):
            return None
        storage = saved.untyped_storage()
        waits = self._inputs.get(storage._cdata)
        if waits is not None and _lies_in(saved, waits):
            return waits
        if storage.nbytes() < max(self._store.min_bytes, 1) or storage.data_ptr() % LINE_BYTES:
            return None
        piece = self._pieces.pop(storage._cdata, None)
        if piece is None:
            piece = _Piece(_bytes_of(saved), None, storage.nbytes(), storage.data_ptr())
        self._pieces[storage._cdata] = piece
        return piece

    def leave(self, label: str) -> None:
        """All of them, now. label: the block, for messages and the trace. Raises InputsError, ScratchError."""
        pieces = list(self._pieces.values())
        self._pieces.clear()  # autograd has what it needs of them
        for piece in pieces:
            piece.leave(self._store, label)
            self._left.append(piece)

    def let_go(self) -> None:
        """Nobody comes back for them: their space is free. Takes no lock."""
        for piece in self._left:
            piece.let_go()
        self._left.clear()

    def pass_by(self) -> None:
        """Backward is over: inputs that it had no use for need not be brought back."""
        for piece in self._inputs.values():
            if not piece.was_taken and piece.kept is not None:
                piece.kept.pass_by()
        self._inputs.clear()


def _is_plain(tensor: torch.Tensor, device: torch.device) -> bool:
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.device == device
        and not (tensor.is_conj() or tensor.is_neg())
    )


def _lies_in(tensor: torch.Tensor, piece: _Piece) -> bool:
    offset = address_of(tensor) - piece.start
    return offset >= 0 and offset + span_of(tensor) * tensor.itemsize <= piece.num_bytes


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's whole storage, uint8, outside of any graph."""
    storage = tensor.untyped_storage()
    with torch.no_grad():
        empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        return empty.set_(storage, 0, (storage.nbytes(),), (1,))
