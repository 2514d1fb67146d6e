"""The plan: one frozen value that says what every lane does in a step, before a byte moves.

A step is a sequence of **visits**: (block, direction). Each visit finds its block's weights in a **slot**. Where the
block is not yet in that slot, the visit has *fill ops*: LOAD (file to buffer, or straight into the slot where the
file's bytes can be used in place) and, for staged blocks, UNPACK (buffer to slot on the CPU) or UPLOAD (buffer to a
device slot). COMPUTE is the visit itself. The simulator and the engine read the same value.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any

from ssdtune.errors import SSDTuneError
from ssdtune.sizes import format_size


class Lane(StrEnum):
    """What works side by side. Ops of one lane run one after the other, in the plan's order."""

    NVME_READ = "nvme_read"
    NVME_WRITE = "nvme_write"
    H2D = "h2d"
    D2H = "d2h"
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
    UPLOAD = "upload"
    COMPUTE = "compute"
    STORE = "store"  # a block input to NVMe, in forward
    FETCH = "fetch"  # and back, for backward


class Direction(StrEnum):
    """Which half of the step a visit belongs to."""

    FORWARD = "F"
    BACKWARD = "B"


class PlanError(SSDTuneError):
    """The budgets hold no plan, or a plan contradicts itself."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BlockShape:
    """One block's bytes. `slot_bytes`: laid out for compute. `file_bytes`: read to fill it, alignment included."""

    name: str
    slot_bytes: int
    file_bytes: int
    is_staged: bool = False  # its file bytes cannot be used in place: read into a buffer, then copied


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One passage of all micro-batches through a block: which slot, and whether the slot must be filled for it."""

    block: int
    direction: Direction
    slot: int
    is_filled_for: bool
    buffer: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One piece of work on one lane. `after`: ids of this step; `after_previous`: ids of the step before."""

    id: int
    kind: Kind
    lane: Lane
    visit: int
    block: str
    direction: Direction
    num_bytes: int = 0
    after: tuple[int, ...] = ()
    after_previous: tuple[int, ...] = ()


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
    """What the plan may fill, in bytes. On a machine without a device, slots live in RAM and `device_bytes` is 0."""

    ram_bytes: int
    device_bytes: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where every block lives, the slots and buffers, and the visits of each kind of step.

    `tiers[i]`: where block i's weights stay between visits. `block_inputs`: where the inputs kept for backward stay.
    `chunk_tokens`: positions whose logits exist at once in the head's loss.
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

    @property
    def slot_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(self.slots)

    @property
    def ram_bytes(self) -> int:
        """Bytes of RAM that slots (without a device), buffers and RAM-resident blocks take."""
        in_ram = sum(self.buffers)
        if self.on_device:
            kept = (b.file_bytes for b, t in zip(self.blocks, self.tiers, strict=True) if t is Tier.RAM)
            return in_ram + sum(kept)
        return in_ram + self.slot_bytes

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
            f"({format_size(sum(self.buffers))}) · RAM {format_size(self.ram_bytes)} "
            f"of {format_size(self.budgets.ram_bytes)}"
        )
        for kind, sequence in self.sequences.items():
            yield (
                f"{kind:9} {len(sequence.visits)} visits a step · reads {format_size(sequence.read_bytes)} from NVMe"
            )
        yield f"inputs    kept for backward in {self.block_inputs} · loss in chunks of {self.chunk_tokens} tokens"

    def to_json(self) -> str:
        """The whole plan as JSON; `from_json` gives an equal one."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Reads what `to_json` wrote, and validates it."""
        raw: dict[str, Any] = json.loads(text)
        plan = Plan(
            blocks=tuple(BlockShape(**b) for b in raw["blocks"]),
            tiers=tuple(Tier(t) for t in raw["tiers"]),
            slots=tuple(raw["slots"]),
            buffers=tuple(raw["buffers"]),
            on_device=raw["on_device"],
            budgets=Budgets(**raw["budgets"]),
            sequences={k: _sequence_from(v) for k, v in raw["sequences"].items()},
            block_inputs=Tier(raw["block_inputs"]),
            chunk_tokens=raw["chunk_tokens"],
        )
        validate(plan)
        return plan


def _sequence_from(raw: Mapping[str, Any]) -> StepPlan:
    visits = tuple(Visit(**{**v, "direction": Direction(v["direction"])}) for v in raw["visits"])
    ops = tuple(
        Op(
            **{
                **o,
                "kind": Kind(o["kind"]),
                "lane": Lane(o["lane"]),
                "direction": Direction(o["direction"]),
                "after": tuple(o["after"]),
                "after_previous": tuple(o["after_previous"]),
            }
        )
        for o in raw["ops"]
    )
    return StepPlan(visits=visits, ops=ops)


def make_ops(
    visits: Sequence[Visit], blocks: Sequence[BlockShape], *, tiers: Sequence[Tier], on_device: bool
) -> tuple[Op, ...]:
    """The ops of a step from its visits: each with the lane it needs and what must have happened before.

    A slot is refilled after the visit that used it last; a buffer after the copy that emptied it. The step before
    this one had the same visits, so the first user of a slot waits for the last user of the previous step.
    """
    ops: list[Op] = []
    last_use: dict[int, int] = {}  # slot -> id of the COMPUTE op that read it last
    last_copy: dict[int, int] = {}  # buffer -> id of the op that emptied it last
    first_waiting: list[tuple[int, str, int]] = []  # ops that wait for the previous step: (op id, "slot"|"buffer", index)

    def add(kind: Kind, lane: Lane, v: int, num_bytes: int, after: list[int]) -> int:
        visit = visits[v]
        op = Op(
            id=len(ops),
            kind=kind,
            lane=lane,
            visit=v,
            block=blocks[visit.block].name,
            direction=visit.direction,
            num_bytes=num_bytes,
            after=tuple(after),
        )
        ops.append(op)
        return op.id

    for v, visit in enumerate(visits):
        block, ready = blocks[visit.block], []
        if visit.is_filled_for:
            slot_free = _after(last_use, visit.slot)
            staged = visit.buffer is not None
            loaded: list[int] = []
            if not (on_device and tiers[visit.block] is Tier.RAM):
                after = _after(last_copy, visit.buffer) if visit.buffer is not None else slot_free
                loaded = [add(Kind.LOAD, Lane.NVME_READ, v, block.file_bytes, after)]
                if not after:
                    what, index = ("buffer", visit.buffer) if visit.buffer is not None else ("slot", visit.slot)
                    first_waiting.append((loaded[0], what, index))
            if staged or not loaded:
                kind, lane = (Kind.UPLOAD, Lane.H2D) if on_device else (Kind.UNPACK, Lane.CPU)
                copied = add(kind, lane, v, block.slot_bytes, [*loaded, *slot_free])
                if not slot_free:
                    first_waiting.append((copied, "slot", visit.slot))
                if visit.buffer is not None:
                    last_copy[visit.buffer] = copied
                loaded = [copied]
            ready = loaded
        last_use[visit.slot] = add(Kind.COMPUTE, Lane.COMPUTE, v, 0, ready)
    for op_id, what, index in first_waiting:
        previous = last_use.get(index) if what == "slot" else last_copy.get(index)
        if previous is not None:
            ops[op_id] = dataclasses.replace(ops[op_id], after_previous=(previous,))
    return tuple(ops)


def _after(last: Mapping[int, int], index: int) -> list[int]:
    return [last[index]] if index in last else []


def validate(plan: Plan) -> None:
    """Checks a whole plan, once, by replaying its slots; raises PlanError naming what contradicts what.

    Every visit's block fits its slot; a visit that is not filled for finds its block there, in the first step of a
    steady run as in any other; ops refer to earlier ops only; RAM stays inside the budget.
    """
    if len(plan.tiers) != len(plan.blocks):
        raise PlanError(f"the plan has {len(plan.blocks)} blocks but {len(plan.tiers)} tiers")
    if plan.ram_bytes > plan.budgets.ram_bytes:
        raise PlanError(
            f"the plan needs {format_size(plan.ram_bytes)} of RAM, over the budget of "
            f"{format_size(plan.budgets.ram_bytes)}: raise offload.ram"
        )
    if plan.on_device and plan.slot_bytes > plan.budgets.device_bytes:
        raise PlanError(
            f"the slots need {format_size(plan.slot_bytes)} on the device, over the budget of "
            f"{format_size(plan.budgets.device_bytes)}: raise offload.vram"
        )
    for kind, sequence in plan.sequences.items():
        _validate_slots(plan, kind, sequence)
        _validate_ops(kind, sequence)


def _validate_slots(plan: Plan, kind: str, sequence: StepPlan) -> None:
    held: dict[int, int] = {}
    for cycle in range(2):
        for v, visit in enumerate(sequence.visits):
            block = plan.blocks[visit.block]
            where = f"{kind} visit {v} ({block.name} {visit.direction})"
            if block.slot_bytes > plan.slots[visit.slot]:
                raise PlanError(f"{where} does not fit slot {visit.slot} of {plan.slots[visit.slot]} bytes")
            if visit.is_filled_for:
                held[visit.slot] = visit.block
            elif held.setdefault(visit.slot, visit.block) != visit.block or (
                cycle and held[visit.slot] != visit.block
            ):
                raise PlanError(f"{where} expects its weights in slot {visit.slot}, which holds another block")
            if visit.buffer is not None and plan.buffers[visit.buffer] < block.file_bytes:
                raise PlanError(f"{where} does not fit buffer {visit.buffer}")


def _validate_ops(kind: str, sequence: StepPlan) -> None:
    computes = [op.visit for op in sequence.ops if op.kind is Kind.COMPUTE]
    if computes != list(range(len(sequence.visits))):
        raise PlanError(f"the {kind} step must compute every visit once, in order")
    for op_id, op in enumerate(sequence.ops):
        if op.id != op_id or any(a >= op_id for a in op.after):
            raise PlanError(f"{kind} op {op_id} waits for an op that comes later")
