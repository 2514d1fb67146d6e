"""The plan: one frozen value that says what every lane does in a step, before a byte moves.

A step is a sequence of **visits**: (block, direction). Each visit finds its block's weights in a
**slot**. Where the block is not yet in that slot, the visit has *fill ops*: LOAD (file to buffer, or
straight into the slot where the file's bytes can be used in place) and, for staged blocks, UNPACK
(buffer to slot where both are: on the CPU, or by a device's own copy; DECODE where the block is packed)
or UPLOAD (RAM to a device slot). COMPUTE is the visit itself. The simulator and the engine read the same value.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

from ssdtune.errors import SSDTuneError
from ssdtune.sizes import format_size


class Lane(StrEnum):
    """What works side by side. Ops of one lane run one after the other, in the plan's order."""

    NVME_READ = "nvme_read"
    NVME_WRITE = "nvme_write"
    H2D = "h2d"
    D2H = "d2h"
    DEVICE_COPY = "d2d"  # within a device's memory: no link is in use
    COMPUTE = "compute"
    CPU = "cpu"


class Tier(StrEnum):
    """Where bytes live between visits."""

    DEVICE = "device"
    RAM = "ram"
    NVME = "nvme"


class Kind(StrEnum):
    """What an op does (see `docs/design.md` for the verbs)."""

    LOAD = "load"
    UNPACK = "unpack"
    DECODE = "decode"
    UPLOAD = "upload"
    COMPUTE = "compute"
    STORE = "store"  # a block input to NVMe, in forward
    FETCH = "fetch"  # and back, for backward
    STORE_ACTIVATIONS = "store_activations"  # what autograd saved in a visit to NVMe, in forward
    FETCH_ACTIVATIONS = "fetch_activations"  # and back, for backward
    DOWNLOAD_INPUT = "download_input"  # a block input from a device to RAM, in forward
    UPLOAD_INPUT = "upload_input"  # and back
    DOWNLOAD = "download"  # weights that changed on the device, to RAM
    STORE_WEIGHTS = "store_weights"  # and on to NVMe
    # Of full fine-tuning, which is modelled (`full_step.py`) and which the engine does not run:
    DOWNLOAD_GRADIENT = "download_gradient"
    LOAD_STATE = "load_state"  # optimizer states, NVMe to RAM, a chunk
    UPDATE = "update"  # the optimizer, on the CPU, a chunk
    STORE_STATE = "store_state"  # states and updated weights, RAM to NVMe, a chunk


# Of packed weights that decode at another rate than the profile's curve: (kind, bytes that they decode to).
Decoding = tuple[tuple[str, int], ...]
# What moves and uses weights; a step's other ops are of its block inputs and activations.
BLOCK_KINDS = (Kind.LOAD, Kind.UNPACK, Kind.DECODE, Kind.UPLOAD, Kind.COMPUTE)


class Direction(StrEnum):
    """Which half of the step a visit belongs to."""

    FORWARD = "F"
    BACKWARD = "B"


class PlanError(SSDTuneError):
    """The budgets hold no plan, or a plan contradicts itself."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BlockShape:
    """One block's bytes.

    `slot_bytes`: laid out for compute. `file_bytes`: read to fill it, alignment included.
    `is_staged`: its file bytes cannot be used in place: they are read into a buffer, then copied.
    `is_packed`: some are decoded on the way, on a device by the device, which needs them beside the slot.
    `decoding`: of these, what is not of the usual kind.
    """

    name: str
    slot_bytes: int
    file_bytes: int
    is_staged: bool = False
    is_packed: bool = False
    decoding: Decoding = ()

    @property
    def uploaded_bytes(self) -> int:
        """Bytes that go to a device to fill a slot there."""
        return self.file_bytes if self.is_packed else self.slot_bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One passage of all micro-batches through a block: in which slot, and whether that must be
    filled for it. `buffer`: the staging buffer that the fill passes, where it passes one. `keeps`: where
    the block's activations stay from forward to backward, which does not compute it again: where
    compute is (`Tier.DEVICE`), or on NVMe; None: they don't."""

    block: int
    direction: Direction
    slot: int
    is_filled_for: bool
    buffer: int | None = None
    keeps: Tier | None = None


class Op(NamedTuple):
    """One piece of work on one lane, which begins when others have ended. A tuple, since a search makes hundreds of
    thousands, which takes frozen dataclasses three times as long.

    `after`: their ids in this step; `after_previous`: their ids in the step before. `decoded_bytes`: what a device
    makes of the packed weights that an UPLOAD brings, behind it on the same stream. `decoding`: as `BlockShape` has it,
    of an op that decodes.
    """

    id: int
    kind: Kind
    lane: Lane
    visit: int
    block: str
    direction: Direction
    num_bytes: int = 0
    decoded_bytes: int = 0
    decoding: Decoding = ()
    after: tuple[int, ...] = ()
    after_previous: tuple[int, ...] = ()

    def renumbered(self, number: int, after: tuple[int, ...]) -> Op:
        """As part of another step. Not by `_replace`, which takes three times as long: a search does it for every plan."""
        return Op(
            number,
            self.kind,
            self.lane,
            self.visit,
            self.block,
            self.direction,
            self.num_bytes,
            self.decoded_bytes,
            self.decoding,
            after,
            self.after_previous,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """The visits of one kind of step ("train", "forward"), and the ops that carry them out."""

    visits: tuple[Visit, ...]
    ops: tuple[Op, ...]

    @property
    def read_bytes(self) -> int:
        """Bytes read from NVMe in one steady step."""
        return sum(op.num_bytes for op in self.ops if op.lane is Lane.NVME_READ)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """What the plan may fill, in bytes. Without a device, slots live in RAM; `device_bytes` is 0.

    `activation_bytes`: beside the others, of activations that stay where compute is;
    `nvme_activation_bytes`: of a drive, of those that wait there.
    """

    ram_bytes: int
    device_bytes: int = 0
    activation_bytes: int = 0
    nvme_activation_bytes: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where every block lives, the slots and buffers, and the visits of each kind of step.

    `tiers[i]`: where block i's weights stay between visits. `on_device`: slots live on a device;
    `buffers_on_device`: buffers too, files are read straight into them. `block_inputs`: where the
    inputs kept for backward stay. `chunk_tokens`: positions whose logits exist at once in the head's
    loss. `activation_bytes`, `nvme_activation_bytes`: of the visits that keep them where compute is, and
    on NVMe, where that was known.
    """

    blocks: tuple[BlockShape, ...]
    tiers: tuple[Tier, ...]
    slots: tuple[int, ...]
    buffers: tuple[int, ...]
    on_device: bool
    budgets: Budgets
    sequences: Mapping[str, StepPlan]
    block_inputs: Tier = Tier.DEVICE
    chunk_tokens: int = 4096
    buffers_on_device: bool = False
    activation_bytes: int = 0
    nvme_activation_bytes: int = 0

    @property
    def kept_blocks(self) -> frozenset[int]:
        """Those whose activations stay from forward to backward where compute is."""
        return self._keeping_in(Tier.DEVICE)

    @property
    def stored_blocks(self) -> frozenset[int]:
        """Those whose activations wait on NVMe from forward to backward."""
        return self._keeping_in(Tier.NVME)

    def _keeping_in(self, tier: Tier) -> frozenset[int]:
        visits = (v for steps in self.sequences.values() for v in steps.visits)
        return frozenset(v.block for v in visits if v.keeps is tier)

    @property
    def slot_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(self.slots)

    @property
    def ram_bytes(self) -> int:
        """Bytes of RAM that slots (without a device), buffers (unless they are on it) and RAM-resident
        blocks take."""
        if not self.on_device:
            return self.buffer_bytes + self.slot_bytes
        return self.kept_in_ram_bytes + (0 if self.buffers_on_device else self.buffer_bytes)

    @property
    def device_bytes(self) -> int:
        """Bytes that slots, buffers where they are there, and staging take of a device; 0 without one."""
        if not self.on_device:
            return 0
        beside = self.buffer_bytes if self.buffers_on_device else self.staging_bytes
        return self.slot_bytes + beside

    @property
    def staging_bytes(self) -> int:
        """Bytes of a device where packed blocks are decoded from; 0 where buffers are there already."""
        if not self.on_device or self.buffers_on_device:
            return 0
        return staging_bytes(self.blocks)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of all buffers, wherever they are."""
        return sum(self.buffers)

    @property
    def kept_in_ram_bytes(self) -> int:
        """With a device: file bytes of the blocks that stay in RAM; 0 without one, where slots do."""
        pairs = zip(self.blocks, self.tiers, strict=True)
        return sum(b.file_bytes for b, t in pairs if t is Tier.RAM) if self.on_device else 0

    @property
    def model_bytes(self) -> int:
        """Bytes of all blocks' weights."""
        return sum(b.slot_bytes for b in self.blocks)

    def lines(self) -> Iterator[str]:
        """Yields the plan as a person reads it."""
        resident = [b for b, t in zip(self.blocks, self.tiers, strict=True) if t is not Tier.NVME]
        yield (
            f"weights   {format_size(self.model_bytes)} in {len(self.blocks)} blocks · "
            f"{len(resident)} resident ({format_size(sum(b.slot_bytes for b in resident))})"
        )
        yield (
            f"slots     {len(self.slots)} ({format_size(self.slot_bytes)})"
            f"{' on the device' if self.on_device else ''} · buffers {len(self.buffers)} "
            f"({format_size(self.buffer_bytes)}){' there too' if self.buffers_on_device else ''}"
            f" · RAM {format_size(self.ram_bytes)} of {format_size(self.budgets.ram_bytes)}"
        )
        for kind, sequence in self.sequences.items():
            reads = format_size(sequence.read_bytes)
            yield f"{kind:9} {len(sequence.visits)} visits a step · reads {reads} from NVMe"
        if self.kept_blocks:
            size = f" ({format_size(self.activation_bytes)})" if self.activation_bytes else ""
            yield (
                f"activations of {len(self.kept_blocks)} blocks stay for backward{size}, within "
                f"{format_size(self.budgets.activation_bytes)}"
            )
        if self.stored_blocks:
            size = (
                f" ({format_size(self.nvme_activation_bytes)})"
                if self.nvme_activation_bytes
                else ""
            )
            yield (
                f"activations of {len(self.stored_blocks)} blocks wait on NVMe for backward{size}, within "
                f"{format_size(self.budgets.nvme_activation_bytes)}"
            )
        yield (
            f"inputs    kept for backward in {self.block_inputs} · "
            f"loss in chunks of {self.chunk_tokens} tokens"
        )

    def to_json(self) -> str:
        """The whole plan as JSON; `from_json` gives an equal one."""
        raw = dataclasses.asdict(self)
        for steps in raw["sequences"].values():
            steps["ops"] = [op._asdict() for op in steps["ops"]]
        return json.dumps(raw, indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Reads what `to_json` wrote, and validates it. Raises PlanError."""
        try:
            plan = _plan_from(json.loads(text))
            validate(plan)
        except PlanError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"this is no plan: {type(error).__name__}: {error}") from error
        return plan


def _plan_from(raw: Mapping[str, Any]) -> Plan:
    return Plan(
        blocks=blocks_from(raw["blocks"]),
        tiers=tuple(Tier(t) for t in raw["tiers"]),
        slots=tuple(raw["slots"]),
        buffers=tuple(raw["buffers"]),
        on_device=raw["on_device"],
        budgets=Budgets(**raw["budgets"]),
        sequences={kind: _sequence_from(steps) for kind, steps in raw["sequences"].items()},
        block_inputs=Tier(raw["block_inputs"]),
        chunk_tokens=raw["chunk_tokens"],
        buffers_on_device=raw["buffers_on_device"],
        activation_bytes=raw["activation_bytes"],
        nvme_activation_bytes=raw["nvme_activation_bytes"],
    )


def blocks_from(raw: Sequence[Mapping[str, Any]]) -> tuple[BlockShape, ...]:
    """Of blocks as mappings. Raises TypeError, KeyError or ValueError for anything else."""
    return tuple(map(_block_from, raw))


def _block_from(raw: Mapping[str, Any]) -> BlockShape:
    typed: dict[str, Any] = {"decoding": _decoding_from(raw["decoding"])}
    return BlockShape(**{**raw, **typed})


def _decoding_from(raw: Sequence[Sequence[Any]]) -> Decoding:
    return tuple((str(kind), int(num_bytes)) for kind, num_bytes in raw)


def _sequence_from(raw: Mapping[str, Any]) -> StepPlan:
    visits = tuple(_visit_from(visit) for visit in raw["visits"])
    return StepPlan(visits=visits, ops=tuple(op_from(op) for op in raw["ops"]))


def _visit_from(raw: Mapping[str, Any]) -> Visit:
    keeps = raw["keeps"]
    typed: dict[str, Any] = {
        "direction": Direction(raw["direction"]),
        "keeps": None if keeps is None else Tier(keeps),
    }
    return Visit(**{**raw, **typed})


def op_from(raw: Mapping[str, Any]) -> Op:
    """Of an op as a mapping, enums by their values. Raises ValueError, KeyError or TypeError for anything else."""
    typed: dict[str, Any] = {
        "kind": Kind(raw["kind"]),
        "lane": Lane(raw["lane"]),
        "direction": Direction(raw["direction"]),
        "decoding": _decoding_from(raw["decoding"]),
        "after": tuple(raw["after"]),
        "after_previous": tuple(raw["after_previous"]),
    }
    return Op(**{**raw, **typed})


def staging_bytes(blocks: Sequence[BlockShape]) -> int:
    """What a device needs beside its slots, to decode the largest packed block from."""
    return max((block.file_bytes for block in blocks if block.is_packed), default=0)


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


def reuse_distances(visits: Sequence[Visit]) -> list[int]:
    """For each visit of a step that repeats: how many visits back its slot was read last."""
    last = {visit.slot: v - len(visits) for v, visit in enumerate(visits)}
    distances: list[int] = []
    for v, visit in enumerate(visits):
        distances.append(v - last[visit.slot])
        last[visit.slot] = v
    return distances


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


def validate(plan: Plan) -> None:
    """Checks a whole plan, once; raises PlanError naming what contradicts what.

    Bytes stay inside the budgets; every visit's block fits its slot and its buffer; a visit that is
    not filled for finds its block there, in the steady step as in any other; every visit has the ops
    that it needs, and none of them writes what another still reads.
    """
    if len(plan.tiers) != len(plan.blocks):
        raise PlanError(f"the plan has {len(plan.blocks)} blocks but {len(plan.tiers)} tiers")
    if plan.chunk_tokens < 1:
        raise PlanError(f"chunk_tokens is {plan.chunk_tokens}: a loss needs at least one token")
    if plan.ram_bytes > plan.budgets.ram_bytes:
        raise PlanError(
            f"the plan needs {format_size(plan.ram_bytes)} of RAM, over the budget of "
            f"{format_size(plan.budgets.ram_bytes)}: raise offload.ram"
        )
    if plan.buffers_on_device and not plan.on_device:
        raise PlanError("the plan has its buffers on a device, but its slots in RAM")
    if plan.on_device and plan.device_bytes > plan.budgets.device_bytes:
        what = "slots and buffers" if plan.buffers_on_device else "slots"
        raise PlanError(
            f"the {what} need {format_size(plan.device_bytes)} on the device, over the budget of "
            f"{format_size(plan.budgets.device_bytes)}: raise offload.vram"
        )
    if plan.activation_bytes > plan.budgets.activation_bytes:
        raise PlanError(
            f"the activations that stay need {format_size(plan.activation_bytes)}, over the budget of "
            f"{format_size(plan.budgets.activation_bytes)}: raise offload.activations"
        )
    if plan.nvme_activation_bytes > plan.budgets.nvme_activation_bytes:
        raise PlanError(
            f"the activations that wait on NVMe need {format_size(plan.nvme_activation_bytes)}, over the budget of "
            f"{format_size(plan.budgets.nvme_activation_bytes)}: raise offload.nvme_activations"
        )
    for kind, steps in plan.sequences.items():
        for v, visit in enumerate(steps.visits):
            _validate_visit(plan, visit, f"{kind} visit {v}")
        _validate_kept(plan, steps.visits, kind)
        _validate_presence(plan, steps.visits, kind)
        _validate_ops(plan, steps, kind)


def _validate_visit(plan: Plan, visit: Visit, where: str) -> None:
    for what, index, items in (
        ("block", visit.block, plan.blocks),
        ("slot", visit.slot, plan.slots),
        ("buffer", visit.buffer, plan.buffers),
    ):
        if index is not None and not 0 <= index < len(items):
            raise PlanError(f"{where} names {what} {index}, the plan has {len(items)}")
    block = plan.blocks[visit.block]
    where += f" ({block.name} {visit.direction})"
    if block.slot_bytes > plan.slots[visit.slot]:
        room = plan.slots[visit.slot]
        raise PlanError(f"{where}: {block.slot_bytes} bytes do not fit slot {visit.slot} of {room}")
    tier = plan.tiers[visit.block]
    wants_buffer = visit.is_filled_for and passes_buffer(block, tier, on_device=plan.on_device)
    if wants_buffer != (visit.buffer is not None):
        raise PlanError(
            f"{where} {'needs a buffer' if wants_buffer else 'has no use for a buffer'}"
        )
    if visit.buffer is not None and plan.buffers[visit.buffer] < block.file_bytes:
        room = plan.buffers[visit.buffer]
        raise PlanError(
            f"{where}: {block.file_bytes} bytes do not fit buffer {visit.buffer} of {room}"
        )


def _validate_kept(plan: Plan, visits: Sequence[Visit], kind: str) -> None:
    """What one direction keeps, the other has, in the same place: of a block either all visits keep or none."""
    for block in {v.block for v in visits if v.keeps}:
        name, its = plan.blocks[block].name, [v for v in visits if v.block == block]
        places = {v.keeps for v in its}
        if {v.direction for v in its} != set(Direction) or None in places:
            raise PlanError(f"{kind}: the activations of {name} stay in some visits only")
        if len(places) > 1:
            raise PlanError(f"{kind}: the activations of {name} stay in several places")
        if Tier.RAM in places:
            raise PlanError(
                f"{kind}: the activations of {name} are to stay in RAM; they stay where compute is "
                f'("{Tier.DEVICE}") or on NVMe'
            )


def _validate_presence(plan: Plan, visits: Sequence[Visit], kind: str) -> None:
    """A visit that is not filled for finds its block in its slot, where the visit before left it."""
    for v, back in enumerate(reuse_distances(visits)):
        visit, before = visits[v], visits[v - back]
        if not visit.is_filled_for and before.block != visit.block:
            block, found = plan.blocks[visit.block].name, plan.blocks[before.block].name
            raise PlanError(
                f"{kind} visit {v} ({block} {visit.direction}) expects its weights in slot "
                f"{visit.slot}, which holds {found}"
            )


def _validate_ops(plan: Plan, steps: StepPlan, kind: str) -> None:
    """Ids and references hold, and what `make_ops` finds necessary is there, waits included."""
    for position, op in enumerate(steps.ops):
        if op.id != position or not all(0 <= a < position for a in op.after):
            raise PlanError(f"{kind} op {position} waits for an op that does not come before it")
        if not all(0 <= a < len(steps.ops) for a in op.after_previous):
            raise PlanError(f"{kind} op {position} waits for an op that no step has")
    wanted = make_ops(
        steps.visits,
        plan.blocks,
        on_device=plan.on_device,
        buffers_on_device=plan.buffers_on_device,
    )
    found = [op for op in steps.ops if op.kind in BLOCK_KINDS]
    for i in range(max(len(wanted), len(found))):
        is_there = _describe(found[i]) if i < len(found) else "missing"
        needed = _describe(wanted[i]) if i < len(wanted) else "no op"
        if is_there != needed:
            raise PlanError(f"{kind} op {i} of its visits must be {needed}, but is {is_there}")
    ids = [op.id for op in found]
    for op, mine in zip(wanted, found, strict=True):
        where = f"{kind} op {mine.id} ({_describe(mine)}) does not wait for op"
        for missing in {ids[a] for a in op.after} - set(mine.after):
            raise PlanError(f"{where} {missing}")
        for missing in {ids[a] for a in op.after_previous} - set(mine.after_previous):
            raise PlanError(f"{where} {missing} of the step before")


def _describe(op: Op) -> str:
    what = f"{op.kind} {op.block} {op.direction} for visit {op.visit} on {op.lane}"
    return f"{what}, {op.num_bytes} bytes" if op.num_bytes else what
