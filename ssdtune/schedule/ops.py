"""The ops of a step, made from its visits: which lane each needs, and what must be over before it."""

from __future__ import annotations

from collections.abc import Sequence

from ssdtune.schedule.plan import BlockShape, Kind, Lane, Op, Tier, Visit


def passes_buffer(block: BlockShape, tier: Tier, *, on_device: bool) -> bool:
    """Whether a fill of the block goes through a staging buffer. On a device all do, except those
    whose file bytes stay in RAM for good."""
    return tier is not Tier.RAM if on_device else block.is_staged


def copy_of(block: BlockShape, *, on_device: bool, from_device: bool) -> tuple[Kind, Lane]:
    """What brings a block from a buffer to its slot, and on which lane. from_device: the buffer is there too."""
    if on_device and not from_device:
        return Kind.UPLOAD, Lane.H2D
    lane = Lane.DEVICE_COPY if from_device else Lane.CPU
    return (Kind.DECODE if block.is_packed else Kind.UNPACK), lane


def make_ops(
    visits: Sequence[Visit],
    blocks: Sequence[BlockShape],
    *,
    on_device: bool,
    buffers_on_device: bool = False,
) -> tuple[Op, ...]:
    """The ops of a step from its visits: each with the lane it needs and what must be over before.

    A slot is refilled after the visit that used it last; a buffer after the copy that emptied it. The
    step before this one had the same visits, so the first user of a slot waits for the last user of
    the previous step.
    """
    ops = _Ops(visits, blocks)
    for v, visit in enumerate(visits):
        written: list[int] = []
        if visit.is_filled_for:
            loaded: list[int] = []
            if visit.buffer is not None:
                loaded = [ops.add(Kind.LOAD, Lane.NVME_READ, v, writes=("buffer", visit.buffer))]
            if not on_device and visit.buffer is None:
                op_id = ops.add(Kind.LOAD, Lane.NVME_READ, v, writes=("slot", visit.slot))
            else:
                kind, lane = copy_of(
                    blocks[visit.block],
                    on_device=on_device,
                    from_device=buffers_on_device and visit.buffer is not None,
                )
                op_id = ops.add(kind, lane, v, after=loaded, writes=("slot", visit.slot))
                ops.reads("buffer", visit.buffer, op_id)
            written = [op_id]
        computed = ops.add(Kind.COMPUTE, Lane.COMPUTE, v, after=written)
        ops.reads("slot", visit.slot, computed)
    return ops.linked()


def _moved_bytes(kind: Kind, block: BlockShape) -> int:
    if kind is Kind.COMPUTE:
        return 0
    if kind is Kind.LOAD:
        return block.file_bytes
    return block.uploaded_bytes if kind is Kind.UPLOAD else block.slot_bytes


class _Ops:
    """The ops of a step as they are made, and who read each slot and each buffer last."""

    def __init__(self, visits: Sequence[Visit], blocks: Sequence[BlockShape]) -> None:
        self._visits, self._blocks = visits, blocks
        self._ops: list[Op] = []
        self._last_reader: dict[tuple[str, int], int] = {}
        self._first_writers: dict[int, tuple[str, int]] = {}  # ops with no reader before them

    def add(
        self,
        kind: Kind,
        lane: Lane,
        v: int,
        *,
        after: Sequence[int] = (),
        writes: tuple[str, int] | None = None,
    ) -> int:
        """The id of a new op of visit `v`, after the last reader of the slot or buffer it writes."""
        block, op_id = self._blocks[self._visits[v].block], len(self._ops)
        if writes in self._last_reader:
            after = [*after, self._last_reader[writes]]
        elif writes is not None:
            self._first_writers[op_id] = writes
        is_decoded = kind is Kind.UPLOAD and block.is_packed
        decodes = is_decoded or kind is Kind.DECODE
        self._ops.append(
            Op(
                id=op_id,
                kind=kind,
                lane=lane,
                visit=v,
                block=block.name,
                direction=self._visits[v].direction,
                num_bytes=_moved_bytes(kind, block),
                decoded_bytes=block.slot_bytes if is_decoded else 0,
                decoding=block.decoding if decodes else (),
                after=tuple(after),
            )
        )
        return op_id

    def reads(self, what: str, index: int | None, op_id: int) -> None:
        """The op is the last reader of that slot or buffer so far; None: of none."""
        if index is not None:
            self._last_reader[what, index] = op_id

    def linked(self) -> tuple[Op, ...]:
        """The ops, those that write first waiting for who read last in the step before."""
        for op_id, written in self._first_writers.items():
            if written in self._last_reader:
                previous = (self._last_reader[written],)
                self._ops[op_id] = self._ops[op_id]._replace(after_previous=previous)
        return tuple(self._ops)
