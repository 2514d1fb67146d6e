"""What tensors that wait off the device for backward have in common: which are kept, for how long, and what a tier must
do."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections import deque
from typing import Any

import torch

from ssdtune.errors import SSDTuneError
from ssdtune.schedule.plan import Kind
from ssdtune.swap.scratch import Space
from ssdtune.swap.storage import aligned_bytes

MIB = 1 << 20
MIN_BYTES = (
    64 * 1024
)  # smaller ones stay with autograd: they cost less memory than a request costs time
SEGMENT_BYTES = 64 * MIB  # by which a file or pinned memory grows
MOST_STRETCH = 2  # a view that spans more than so many times its own bytes is not kept


class InputsError(SSDTuneError):
    """A block input, or an activation, that could not be stored or brought back."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a store holds, for messages and the trace.

    one, many: of them in words. without: how to do without the store. store, fetch: the trace's ops.
    """

    one: str
    many: str
    without: str
    store: Kind
    fetch: Kind


INPUTS = Contents(
    one="the input",
    many="block inputs",
    without="set offload.block_inputs: device",
    store=Kind.STORE,
    fetch=Kind.FETCH,
)
ACTIVATIONS = Contents(
    one="an activation",
    many="activations",
    without="set offload.nvme_activations: none",
    store=Kind.STORE_ACTIVATIONS,
    fetch=Kind.FETCH_ACTIVATIONS,
)


class Kept:
    """A tensor in the store. When nothing refers to this any more, its space is free again."""

    __slots__ = ("__weakref__", "_record", "_store")

    def __init__(self, store: InputStore, record: Record) -> None:
        self._store, self._record = store, record

    def take(self) -> torch.Tensor:
        """The tensor in fresh memory: same bits, shape, strides, dtype and device. Raises InputsError.

        May be called again until the next step begins.
        """
        return self._store._take(self._record)

    def pass_by(self) -> None:
        """Backward went by without it: nobody brings it back ahead any more. It may still be taken, as above."""
        self._store._pass_by(self._record)

    def __del__(self) -> None:
        # Garbage may be collected anywhere, inside the store's own locks too: the store looks later.
        self._store._forgotten.append(self._record)


@dataclasses.dataclass(eq=False, slots=True)
class Record:
    """One tensor in the store: what it looks like and where it lies."""

    label: str
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    num_bytes: int
    place: tuple[int, int, int] = (0, 0, 0)  # segment, offset, bytes taken there
    times_kept: int = 1
    times_taken: int = 0
    num_gone: int = 0  # pieces, from the first, that its last taking has had already
    is_released: bool = False
    error: InputsError | None = None
    chunks: dict[int, Any] = dataclasses.field(default_factory=dict)  # piece -> where it is staged
    copied: torch.cuda.Event | None = None  # copy from the device -> copy back

    @property
    def is_done(self) -> bool:
        """Whether it was taken as often as it was kept."""
        return self.times_taken >= self.times_kept


class InputStore:
    """What both tiers have in common: which tensors are kept, and for how long.

    `used_bytes`: what waits in the store now. `reserved_bytes`: what it holds for that. `waited_s`: how long
    compute stood still for it in this step. One thread at a time may call (forward's, then autograd's).
    contents: what they are.
    """

    contents: Contents = INPUTS

    def __init__(
        self, *, device: torch.device, timeout_s: float, min_bytes: int = MIN_BYTES
    ) -> None:
        self.device, self.timeout_s, self.min_bytes = device, timeout_s, min_bytes
        self.step = 0
        self.waited_s = 0.0
        self._live: dict[Record, None] = {}  # in the order of keeping
        self._forgotten: deque[Record] = deque()
        self._calls = threading.RLock()
        self._out = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._back = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def used_bytes(self) -> int:
        """See the class."""
        with self._calls:
            self._release_forgotten()
            return sum(record.place[2] for record in self._live)

    @property
    def reserved_bytes(self) -> int:
        """See the class."""
        raise NotImplementedError

    def reserve(self, num_bytes: int) -> None:
        """Makes room for so many bytes now rather than in the step. Raises ScratchError or StorageError."""
        raise NotImplementedError

    def begin_step(self, step: int) -> None:
        """A step begins: what earlier ones took back, or forgot, makes room."""
        with self._calls:
            self.step, self.waited_s = step, 0.0
            self._release_forgotten()
            for record in [r for r in self._live if r.times_taken]:
                self._release(record)

    def keep(self, tensor: torch.Tensor, label: str = "") -> Kept | None:
        """Stores a tensor as it is now; None for one that is better left with autograd (small, whole numbers, a
        subclass, elsewhere). A tensor kept twice is stored once. label: for messages and the trace.

        Raises InputsError or ScratchError, also for an earlier tensor of this step that could not be written.
        """
        if not self._is_for_us(tensor):
            return None
        known = _already_kept(tensor)
        if known is not None and known._store is self and not known._record.is_released:
            known._record.times_kept += 1
            return known
        kept = self.store(tensor, label)
        tensor._ssdtune_kept = (tensor._version, weakref.ref(kept))  # type: ignore[attr-defined]
        return kept

    def store(self, tensor: torch.Tensor, label: str = "") -> Kept:
        """Stores a tensor of any size and kind as it is now. Raises as `keep` does."""
        detached, span = tensor.detach(), span_of(tensor)
        record = Record(label, tensor.shape, tensor.stride(), tensor.dtype, span * tensor.itemsize)
        with self._calls, torch.no_grad():
            self._release_forgotten()
            self._live[record] = None
            try:
                self._put(record, detached.as_strided((span,), (1,)).view(torch.uint8))
            except BaseException:
                self._release(record)
                raise
        return Kept(self, record)

    def close(self) -> None:
        """Gives everything back. What is kept can't be taken afterwards."""
        with self._calls:
            for record in list(self._live):
                self._release(record)

    def _is_for_us(self, tensor: torch.Tensor) -> bool:
        return (
            type(tensor) is torch.Tensor
            and tensor.is_floating_point()
            and tensor.layout is torch.strided
            and tensor.device == self.device
            and not tensor.is_inference()
            and tensor.nbytes >= max(self.min_bytes, 1)
            and span_of(tensor) <= MOST_STRETCH * tensor.numel()
        )

    def _take(self, record: Record) -> torch.Tensor:
        with self._calls, torch.no_grad():
            if record.is_released:
                raise InputsError(
                    f"{self.contents.one} of {record.label or 'a block'} was taken back by an earlier backward and its "
                    "space given to a later step.\nRun backward over a retained graph before the next forward, or "
                    f"{self.contents.without}."
                )
            count = record.num_bytes // record.dtype.itemsize
            if self._back is None:
                flat = torch.empty(count, dtype=record.dtype, device=self.device)
                self._get(record, flat.view(torch.uint8))
            else:
                # Allocated on the copying stream: there the copy needs to wait for nothing that computes.
                with torch.cuda.stream(self._back):
                    flat = torch.empty(count, dtype=record.dtype, device=self.device)
                    self._get(record, flat.view(torch.uint8))
                current = torch.cuda.current_stream(self.device)
                current.wait_event(self._back.record_event())
                flat.record_stream(current)
            record.times_taken += 1
            self._taken(record)
            return flat.as_strided(record.shape, record.stride)

    def _pass_by(self, record: Record) -> None:
        with self._calls:
            if not (record.is_released or record.is_done):
                record.times_taken += 1
                self._passed_by(record)

    def _release_forgotten(self) -> None:
        while self._forgotten:
            self._release(self._forgotten.popleft())

    def _release(self, record: Record) -> None:
        if not record.is_released:
            record.is_released = True
            del self._live[record]
            self._give_up(record)

    def _leave_device(self, content: torch.Tensor) -> None:
        """Before copies out of device memory: the copying stream waits for what makes it; it stays until copied."""
        if self._out is not None:
            self._out.wait_event(torch.cuda.current_stream(self.device).record_event())
            content.record_stream(self._out)

    # What a tier does. content, target: uint8 [record.num_bytes] on the device.

    def _put(self, record: Record, content: torch.Tensor) -> None:
        raise NotImplementedError

    def _get(self, record: Record, target: torch.Tensor) -> None:
        raise NotImplementedError

    def _taken(self, record: Record) -> None:
        """A tensor has just been taken; more may be brought nearer."""

    def _passed_by(self, record: Record) -> None:
        """Somebody has no need of it; more may be brought nearer where nobody has."""

    def _give_up(self, record: Record) -> None:
        raise NotImplementedError


def span_of(tensor: torch.Tensor) -> int:
    """Elements from a tensor's first to its last in memory."""
    return 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))


def _already_kept(tensor: torch.Tensor) -> Kept | None:
    """What an earlier `keep` of this very tensor gave, if it is still held and the tensor has not changed."""
    version, kept = getattr(tensor, "_ssdtune_kept", (None, None))
    return kept() if kept is not None and version == tensor._version else None


class RamInputs(InputStore):
    """Inputs in pinned RAM: exact pieces of a few large segments, copied on streams of their own."""

    def __init__(
        self, *, device: torch.device, timeout_s: float, min_bytes: int = MIN_BYTES
    ) -> None:
        super().__init__(device=device, timeout_s=timeout_s, min_bytes=min_bytes)
        self._segments: list[tuple[torch.Tensor, Space]] = []

    @property
    def reserved_bytes(self) -> int:
        """See InputStore."""
        return sum(memory.nbytes for memory, _ in self._segments)

    def reserve(self, num_bytes: int) -> None:
        """See InputStore."""
        missing = num_bytes - self.reserved_bytes
        if missing > 0:
            memory = aligned_bytes(missing, pin=self.device.type != "cpu")
            self._segments.append((memory, Space(missing)))

    def _put(self, record: Record, content: torch.Tensor) -> None:
        num_bytes = -(-record.num_bytes // 256) * 256
        record.place = self._room(num_bytes)
        self._leave_device(content)
        if self._out is None:
            self._bytes_of(record).copy_(content)
            return
        with torch.cuda.stream(self._out):
            self._bytes_of(record).copy_(content, non_blocking=True)
            record.copied = torch.cuda.Event()
            record.copied.record(self._out)

    def _room(self, num_bytes: int) -> tuple[int, int, int]:
        for i, (_, space) in enumerate(self._segments):
            start = space.take(num_bytes)
            if start is not None:
                return i, start, num_bytes
        self.reserve(self.reserved_bytes + max(num_bytes, SEGMENT_BYTES))
        start = self._segments[-1][1].take(num_bytes)
        assert start is not None
        return len(self._segments) - 1, start, num_bytes

    def _bytes_of(self, record: Record) -> torch.Tensor:
        segment, start, _ = record.place
        return self._segments[segment][0][start : start + record.num_bytes]

    def _get(self, record: Record, target: torch.Tensor) -> None:
        if self._back is not None and record.copied is not None:
            self._back.wait_event(record.copied)
        target.copy_(self._bytes_of(record), non_blocking=self._back is not None)
        if self._back is not None:
            # The space's next user copies on the other stream: it must not overtake this copy.
            assert self._out is not None
            self._out.wait_event(self._back.record_event())

    def _give_up(self, record: Record) -> None:
        segment, start, num_bytes = record.place
        if num_bytes:
            self._segments[segment][1].give(start, num_bytes)
            record.place = (0, 0, 0)
