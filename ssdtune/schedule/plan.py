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
from typing import NamedTuple

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
        """The whole plan as JSON; `saved_plan.plan_from` gives an equal one."""
        raw = dataclasses.asdict(self)
        for steps in raw["sequences"].values():
            steps["ops"] = [op._asdict() for op in steps["ops"]]
        return json.dumps(raw, indent=1)


def staging_bytes(blocks: Sequence[BlockShape]) -> int:
    """What a device needs beside its slots, to decode the largest packed block from."""
    return max((block.file_bytes for block in blocks if block.is_packed), default=0)


def reuse_distances(visits: Sequence[Visit]) -> list[int]:
    """For each visit of a step that repeats: how many visits back its slot was read last."""
    last = {visit.slot: v - len(visits) for v, visit in enumerate(visits)}
    distances: list[int] = []
    for v, visit in enumerate(visits):
        distances.append(v - last[visit.slot])
        last[visit.slot] = v
    return distances
