"""How much memory a training run will hold at its peak, part by part: a pure function of a plan and a few sizes.

The peak of a step is at the turn-around, when every block input is kept and the last blocks recompute. What is held
then is a sum of named parts; the sizes that depend on the architecture (`Footprint`) come from a rehearsal of one
micro-batch on tensors without memory (`visit/rehearsal.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from ssdtune.schedule.plan import Plan, Tier
from ssdtune.sizes import format_size

# What is not there yet when `base_bytes` is taken: packing buffers of the math libraries (MKL and oneDNN on two CPUs:
# 15-25 MB), and code that comes with opening the model and with the first steps (10-20 MB). Measured after malloc_trim.
LIBRARY_BYTES = 34 * 2**20
# Without a device activations come from the C library's heap, which keeps holes between them: 8-15 % of all else after
# four steps of three models. `HeapKeeper` (visit/memory.py) gives them back when they pass half of this share. Forwards
# alone keep nothing that lies between what they free: 0-3 %.
HOLES_SHARE, FORWARD_HOLES_SHARE = 0.10, 0.03
# Of the optimizers that a configuration may name: states as large as the parameter. Adafactor's are its factors.
NUM_STATES = {"adafactor": 0, "sgd": 0, "adagrad": 1, "rmsprop": 1}
MOST_STATES = 2  # of all others
# Of RAM, through which block inputs go to NVMe and back, and as much for activations (swap/ring.py).
STAGING_BYTES = 32 * 2**20
SMALL_SHARE = 0.02  # of a total: smaller parts are not told
KEEP_FREE = 0.05  # of RAM and device memory: drivers, allocators, the desktop
SPARE_SHARE = 0.8  # of what is free beyond that and beyond the least plan: for weights and activations that stay


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes that one micro-batch takes.

    kept_bytes: inputs of blocks that are kept for backward, all blocks together.
    hidden_bytes: the largest hidden state that goes from block to block.
    held_bytes: what else is alive from forward to backward: masks, position tables, what lies between blocks.
    workspace_bytes: recompute and backward of the greediest block, beyond its input.
    loss_bytes: the logits of one chunk, with their gradients.
    forward_bytes: what a forward alone takes at most beyond a block's input, logits of a chunk included; 0: unknown.
    forward_held_bytes: what else than a block's input is alive where a forward alone waits for a block; None: unknown,
        at most `held_bytes`.
    activation_bytes: of each block, what it keeps beyond its input where it is not computed again; empty: unknown.
    how: "rehearsed" or "by formula", and from what.
    """

    kept_bytes: int
    hidden_bytes: int
    held_bytes: int
    workspace_bytes: int
    loss_bytes: int
    forward_bytes: int = 0
    forward_held_bytes: int | None = None
    activation_bytes: tuple[int, ...] = ()
    how: str

    def activations_of(self, num_micro_batches: int) -> tuple[int, ...]:
        """Of each block, what so many micro-batches keep; empty: unknown."""
        return tuple(num_micro_batches * n for n in self.activation_bytes)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """What passes a block in one visit.

    kind: of step, "train" or "forward". num: micro-batches, one for each variant of the weights where there are
    variants. more: bytes where blocks are computed that a method takes besides, by what they are for.
    writes_back: whether blocks go back to a working copy of the weights. lengths_vary: whether micro-batches come in many
    lengths.
    """

    kind: str = "train"
    num: int
    more: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])
    writes_back: bool = False
    lengths_vary: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """Bytes that do not depend on the batch.

    base_bytes: the process before the model was opened (its resident set), measured.
    resident_bytes: weights and buffers outside of blocks, and streamed ones that were made trainable.
    trained_bytes: parameters that train.
    gradient_bytes: their gradients.
    optimizer_bytes: the optimizer's states.
    staging_bytes: what the store of block inputs takes beside them.
    library_bytes: what the math libraries come to hold where products are computed on the CPU.
    more: what a method takes besides where blocks are computed, by what it is for.
    """

    base_bytes: int
    resident_bytes: int
    trained_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    staging_bytes: int = 0
    library_bytes: int = LIBRARY_BYTES
    more: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The parts of the peak, in bytes, by what they are for. Without a device all of it is RAM, but for what a
    scratch file on NVMe holds."""

    ram: Mapping[str, int]
    device: Mapping[str, int]
    nvme: Mapping[str, int]
    how: str

    @property
    def ram_bytes(self) -> int:
        """Bytes of RAM at the peak."""
        return sum(self.ram.values())

    @property
    def device_bytes(self) -> int:
        """Bytes on the device at the peak; 0 without one."""
        return sum(self.device.values())

    @property
    def natural_bytes(self) -> int:
        """What grows with depth and tokens by nature, wherever it is: adapters and their states, kept inputs, masks."""
        parts = (*self.ram.items(), *self.device.items())
        return sum(n for name, n in parts if name in NATURAL)

    def lines(self) -> Iterator[str]:
        """Yields the prediction as a person reads it: totals, then the parts that matter, the largest first."""
        totals = [("RAM", self.ram), ("device", self.device), ("NVMe", self.nvme)]
        told = [f"{format_size(sum(p.values()))} of {where}" for where, p in totals if p]
        yield f"peak      {' and '.join(told)} predicted ({self.how})"
        for where, parts in totals[:2]:
            least = SMALL_SHARE * sum(parts.values())
            ordered = sorted(parts.items(), key=lambda part: -part[1])
            large = [f"{name} {format_size(n)}" for name, n in ordered if n > least]
            if large:
                yield f"          {where}: {' · '.join(large)}"


ADAPTERS, GRADIENTS, STATES = "adapters", "gradients", "optimizer states"
INPUTS, HELD = "block inputs kept for backward", "masks, tables and what lies between blocks"
# The gradient that each micro-batch hands from block to block, or its hidden state on the way forward.
IN_FLIGHT = "hidden states and gradients in flight"
HOLES = "holes in the heap, at most"
ACTIVATIONS = "activations that stay until backward"
STORED = "activations that wait for backward"  # on NVMe
COPY, PACKED = "working copy of the weights", "the packed model, which is made first"  # on NVMe
WORKSPACE = "workspace of one block or loss chunk"
NATURAL = frozenset({ADAPTERS, GRADIENTS, STATES, INPUTS, HELD, ACTIVATIONS})


def predict_peak_of(plan: Plan, footprint: Footprint, fixed: Fixed, passes: Passes) -> Peak:
    """The peak of a step of either kind. Of forwards alone nothing is kept for a backward, nothing is updated."""
    fixed = dataclasses.replace(fixed, more=passes.more)
    is_forward = passes.kind == "forward"
    if is_forward:
        held = footprint.forward_held_bytes
        footprint = dataclasses.replace(
            footprint,
            kept_bytes=0,
            held_bytes=footprint.held_bytes if held is None else held,
            workspace_bytes=footprint.forward_bytes,
            loss_bytes=0,
            activation_bytes=(),
        )
        fixed = dataclasses.replace(fixed, gradient_bytes=0, optimizer_bytes=0, staging_bytes=0)
    holes_share = FORWARD_HOLES_SHARE if is_forward else HOLES_SHARE
    peak = predict_peak(
        plan, footprint, fixed, num_micro_batches=passes.num, holes_share=holes_share
    )
    if not (passes.writes_back and plan.on_device and Tier.NVME in plan.tiers):
        return peak
    # From a device one block at a time passes pinned memory on its way to the drive (swap/stores.py).
    largest = max(block.slot_bytes for block in plan.blocks)
    return dataclasses.replace(peak, ram={**peak.ram, "staging of blocks written back": largest})


def predict_peak(
    plan: Plan,
    footprint: Footprint,
    fixed: Fixed,
    *,
    num_micro_batches: int,
    holes_share: float = HOLES_SHARE,
) -> Peak:
    """The peak of a training step with so many micro-batches of the size that `footprint` describes.

    Exact for what torch allocates, up to the temporaries inside single operators. The holes of the C library's heap
    are an allowance: without a `HeapKeeper` there may be more.
    """
    compute = {
        "weights outside blocks": fixed.resident_bytes,
        ADAPTERS: fixed.trained_bytes,
        GRADIENTS: fixed.gradient_bytes,
        STATES: fixed.optimizer_bytes,
        HELD: num_micro_batches * footprint.held_bytes,
        IN_FLIGHT: num_micro_batches * footprint.hidden_bytes,
        WORKSPACE: max(footprint.workspace_bytes, footprint.loss_bytes),
        **fixed.more,
    }
    if plan.kept_blocks:
        known = footprint.activations_of(num_micro_batches)
        stays = sum(known[i] for i in plan.kept_blocks if i < len(known))
        compute[ACTIVATIONS] = min(stays, plan.budgets.activation_bytes)
    kept = num_micro_batches * footprint.kept_bytes
    library_bytes = LIBRARY_BYTES if plan.on_device else fixed.library_bytes
    ram = {"process before the model": fixed.base_bytes, "math libraries": library_bytes}
    buffers = {"buffers": plan.buffer_bytes}
    if plan.on_device:
        ram |= {"weights that stay in RAM": plan.kept_in_ram_bytes}
        device = {"slots": plan.slot_bytes, **compute}
        if plan.staging_bytes:
            device["packed weights to be decoded"] = plan.staging_bytes
        (device if plan.buffers_on_device else ram).update(buffers)
    else:
        ram |= {"slots": plan.slot_bytes, **buffers, **compute}
        device = ram
    nvme = _stored(plan, footprint.activations_of(num_micro_batches))
    if nvme:
        ram["staging of activations"] = STAGING_BYTES
    {Tier.DEVICE: device, Tier.RAM: ram, Tier.NVME: nvme}[plan.block_inputs][INPUTS] = kept
    ram["staging of block inputs"] = fixed.staging_bytes
    if not plan.on_device:
        ram[HOLES] = int(holes_share * sum(ram.values()))
        device = {}
    return Peak(ram=ram, device=device, nvme=nvme, how=footprint.how)


def _stored(plan: Plan, known: Sequence[int]) -> dict[str, int]:
    """What of activations waits on NVMe. known: bytes of each block; empty: unknown."""
    stored = sum(known[i] for i in plan.stored_blocks if i < len(known))
    budget = plan.budgets.nvme_activation_bytes
    return {STORED: min(stored, budget)} if plan.stored_blocks else {}


def room_for_weights(
    free_bytes: float, *, peak_bytes: float, weights_bytes: int, least_bytes: int, is_heap: bool
) -> int:
    """Bytes of a memory that weights may take where nobody has set a budget, for `ssdtune plan` as for a run.

    free_bytes: what the process holds counted as free. peak_bytes, weights_bytes: predicted of some plan, and what of
    it are its weights. least_bytes: with which any plan works; less than that is returned only where there is less.
    is_heap: whether weights make the heap's allowance for holes larger: in RAM, where there is no device.
    """
    holes = 1 + HOLES_SHARE if is_heap else 1.0
    most = weights_bytes + ((1 - KEEP_FREE) * free_bytes - peak_bytes) / holes
    spare = most - least_bytes
    return int(least_bytes + (SPARE_SHARE * spare if spare > 0 else spare))
