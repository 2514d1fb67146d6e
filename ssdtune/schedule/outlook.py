"""What a step of equal blocks would take without being planned: time, memory, wear and energy, from a few constants.

`full_step.py` and `forward_step.py` say which ops there are. Here a machine of plain rates (a data sheet's or measured) gives their seconds and
what they demand of what lanes share; `fluid.py` or, where nothing is shared, `simulate.py` gives the step.

Bytes per parameter of a full step (16-bit weights, 32-bit Adam, all on NVMe): forward reads 2; backward reads 2 + 12,
writes 14, sends 2 of gradients down. LoHan (arXiv 2403.06504) and GreedySnake (arXiv 2512.17570) move the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from ssdtune.schedule.decisions import ForwardOnly, Full, Shape
from ssdtune.schedule.fluid import simulate_fluid
from ssdtune.schedule.forward_step import forward_step
from ssdtune.schedule.full_step import (
    GRADIENT_BYTES,
    NUM_GRADIENT_BUFFERS,
    NUM_INPUT_BUFFERS,
    full_step,
)
from ssdtune.schedule.plan import Direction, Kind, Lane, Op, StepPlan, Tier
from ssdtune.schedule.simulate import Simulation, simulate
from ssdtune.schedule.steps import NUM_STAGING_BUFFERS

# Of DRAM, per parameter: Adam reads three 32-bit states and a 16-bit gradient, writes the states and 16-bit weights.
ADAM_DRAM_BYTES = 3 * 4 + 2 + 3 * 4 + 2
FULL_BITS = 16  # of weights that are not packed
PROCESSOR = "processor"  # its time, where it computes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """A machine as plain rates; infinity where something is no limit.

    Attributes:
        flops: FLOP/s that blocks reach, not the peak.
        h2d, d2h: bytes/s between RAM and the device, each way by itself.
        link_overlap: seconds of either way alone that are done in a second of both; 2: neither slows the other.
        read, write: bytes/s of the drives together, alone.
        is_drive_shared: reads and writes take turns at the drives, as flash does; else both go at full rate.
        drive_overlap: of a shared drive: seconds of reads alone and of writes alone that it does in a second of both; 1:
            they take turns; 2: neither slows the other.
        io_cap: bytes/s, reads and writes together, that the host moves at most.
        update: parameters/s of the optimizer on the CPU.
        perturb: elements/s that move along a random direction. decode: bytes/s that packed weights decode to.
        dram: bytes/s.
        copy_overlap: of a processor that computes and updates: seconds of each alone that it does in a second of both; None:
            a device computes.
        latency_s: of each transfer, before its first byte.
    """

    flops: float
    h2d: float = math.inf
    d2h: float = math.inf
    link_overlap: float = 2.0
    read: float = math.inf
    write: float = math.inf
    is_drive_shared: bool = True
    drive_overlap: float = 1.0
    io_cap: float = math.inf
    update: float = math.inf
    perturb: float = math.inf
    decode: float = math.inf
    dram: float = math.inf
    copy_overlap: float | None = None
    latency_s: float = 0.0

    @property
    def rates(self) -> Mapping[Lane, float]:
        """Bytes/s of the lanes that move bytes, each alone."""
        return {
            Lane.NVME_READ: min(self.read, self.io_cap, self.dram),
            Lane.NVME_WRITE: min(self.write, self.io_cap, self.dram),
            Lane.H2D: min(self.h2d, self.dram),
            Lane.D2H: min(self.d2h, self.dram),
        }

    @property
    def update_rate(self) -> float:
        """Parameters/s of the optimizer alone."""
        return min(self.update, self.dram / ADAM_DRAM_BYTES)

    @property
    def capacities(self) -> Mapping[str, float]:
        """What lanes share: the time of drives, link and processor, bytes/s of the host's I/O and of its memory."""
        shared = {"io": self.io_cap, "dram": self.dram}
        overlaps = {
            "drive": self.drive_overlap if self.is_drive_shared else None,
            "link": self.link_overlap if self.link_overlap < 2 else None,
            PROCESSOR: self.copy_overlap,
        }
        times = {name: overlap for name, overlap in overlaps.items() if overlap is not None}
        return {**times, **{name: rate for name, rate in shared.items() if rate < math.inf}}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes a method holds at most, by tier; without the framework's own and a micro-batch's workspace."""

    device: float
    ram: float
    nvme: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """A step that would be. read_bytes, written_bytes: of NVMe."""

    simulation: Simulation
    memory: Memory
    num_tokens: int
    read_bytes: float
    written_bytes: float

    @property
    def step_s(self) -> float:
        """Seconds of a steady step."""
        return self.simulation.step_s

    @property
    def tokens_per_s(self) -> float:
        """Of the whole batch."""
        return self.num_tokens / self.step_s


def foresee_full(shape: Shape, decision: Full, rates: Rates) -> Outlook:
    """A step of full fine-tuning."""
    steps = full_step(shape, decision)
    recomputed = decision.recomputed(shape.num_blocks)
    flop = shape.flop_per_token * shape.micro_batch_tokens

    def flop_of(op: Op) -> float:
        if op.direction is Direction.FORWARD:
            return flop
        return flop * (3 if steps.visits[op.visit].block in recomputed else 2)

    compute_s = [flop_of(op) / rates.flops if op.kind is Kind.COMPUTE else 0.0 for op in steps.ops]
    update_s = shape.block_parameters / decision.num_chunks / rates.update_rate
    simulation = _simulated(steps, compute_s, update_s, rates)
    return _outlook(shape, steps, simulation, full_memory(shape, decision))


def foresee_forward(shape: Shape, decision: ForwardOnly, rates: Rates) -> Outlook:
    """A zeroth-order step. Every forward has its own variant of a block; packed blocks are decoded once a visit, where
    compute waits for it. Updates that blocks have missed are not counted."""
    steps = forward_step(shape, decision)
    flop = shape.flop_per_token * shape.micro_batch_tokens * decision.num_forwards
    block_s = decision.num_forwards * shape.block_parameters / rates.perturb
    if decision.weight_bits < FULL_BITS:
        block_s += shape.block_parameters * FULL_BITS / 8 / rates.decode
    one = flop / rates.flops + block_s / shape.num_micro_batches
    compute_s = [one if op.kind is Kind.COMPUTE else 0.0 for op in steps.ops]
    simulation = _simulated(steps, compute_s, 0.0, rates)
    return _outlook(shape, steps, simulation, forward_memory(shape, decision))


def _outlook(shape: Shape, steps: StepPlan, simulation: Simulation, memory: Memory) -> Outlook:
    return Outlook(
        simulation=simulation,
        memory=memory,
        num_tokens=shape.num_tokens,
        read_bytes=steps.read_bytes,
        written_bytes=sum(op.num_bytes for op in steps.ops if op.lane is Lane.NVME_WRITE),
    )


def _simulated(
    steps: StepPlan, compute_s: Sequence[float], update_s: float, rates: Rates
) -> Simulation:
    """The step on the machine. compute_s: of each op, 0 for others; update_s: of each UPDATE."""
    seconds: list[float] = []
    for op, computing_s in zip(steps.ops, compute_s, strict=True):
        if op.kind is Kind.COMPUTE:
            seconds.append(computing_s)
        elif op.kind is Kind.UPDATE:
            seconds.append(update_s)
        else:
            seconds.append(rates.latency_s + op.num_bytes / rates.rates[op.lane])
    if not rates.capacities:
        return simulate(steps, seconds)
    demands = [_demands(op, rates) for op in steps.ops]
    return simulate_fluid(steps, seconds, demands, rates.capacities)


def _demands(op: Op, rates: Rates) -> dict[str, float]:
    """What an op takes in a second at full speed of what lanes share."""
    if op.lane is Lane.COMPUTE:
        return {PROCESSOR: 1.0}
    if op.kind is Kind.UPDATE:
        return {PROCESSOR: 1.0, **_finite(dram=ADAM_DRAM_BYTES * rates.update_rate)}
    rate = rates.rates[op.lane]
    alone = {
        Lane.NVME_READ: rates.read,
        Lane.NVME_WRITE: rates.write,
        Lane.H2D: rates.h2d,
        Lane.D2H: rates.d2h,
    }[op.lane]
    share = rate / alone if alone < math.inf else 0.0
    if op.lane in (Lane.NVME_READ, Lane.NVME_WRITE):
        return _finite(drive=share, io=rate, dram=rate)
    return _finite(link=share, dram=rate)


def _finite(**demands: float) -> dict[str, float]:
    """Without those of ops that take no time."""
    return {name: demand for name, demand in demands.items() if demand < math.inf}


# ------------------------------------------------------------------ memory


def full_memory(shape: Shape, decision: Full) -> Memory:
    """Of full fine-tuning: slots, buffers, what is kept for backward, what has its home there."""
    block, total = shape.block_parameters, shape.num_parameters
    weights = decision.weight_bytes
    inner = shape.inner_bytes_per_token if decision.recompute_share < 1 else 0.0
    inputs = (shape.input_bytes_per_token + inner) * shape.micro_batch_tokens
    kept = _kept_bytes(shape, decision)
    slots = min(decision.num_slots, shape.num_blocks)
    device = (slots * weights + NUM_GRADIENT_BUFFERS * GRADIENT_BYTES) * block
    device += weights * shape.embedding_parameters
    if decision.activations is not Tier.DEVICE:
        device += NUM_INPUT_BUFFERS * inputs
    per_chunk = (decision.state_bytes + weights) * block / decision.num_chunks
    num_gradients = decision.gradient_buffers + len(decision.delayed(shape.num_blocks))
    ram = (GRADIENT_BYTES * num_gradients + weights * decision.fresh_blocks) * block
    ram += decision.chunk_buffers * per_chunk
    homes = {Tier.DEVICE: device, Tier.RAM: ram, Tier.NVME: 0.0}
    if decision.weights is Tier.NVME:
        homes[Tier.RAM] += decision.num_buffers * weights * block
    if decision.activations is Tier.NVME:
        homes[Tier.RAM] += NUM_STAGING_BUFFERS * inputs
    homes[decision.weights] += weights * total
    homes[decision.states] += decision.state_bytes * total
    homes[decision.activations] += kept
    return Memory(device=homes[Tier.DEVICE], ram=homes[Tier.RAM], nvme=homes[Tier.NVME])


def _kept_bytes(shape: Shape, decision: Full) -> float:
    num_inner = shape.num_blocks - len(decision.recomputed(shape.num_blocks))
    per_token = shape.num_blocks * shape.input_bytes_per_token
    return (per_token + num_inner * shape.inner_bytes_per_token) * shape.num_tokens


def forward_memory(shape: Shape, decision: ForwardOnly) -> Memory:
    """Of a zeroth-order step: slots and the embedding on the device."""
    weights, block = decision.weight_bytes, shape.block_parameters
    slots = min(decision.num_slots, shape.num_blocks)
    homes = {Tier.RAM: 0.0, Tier.NVME: 0.0}
    if decision.weights is Tier.NVME:
        staging = NUM_STAGING_BUFFERS if decision.writes_back else 0
        homes[Tier.RAM] = (decision.num_buffers + staging) * weights * block
    homes[decision.weights] += weights * shape.num_parameters
    return Memory(
        device=weights * (slots * block + shape.embedding_parameters),
        ram=homes[Tier.RAM],
        nvme=homes[Tier.NVME],
    )


# ------------------------------------------------------------------ wear


def endurance_share(written_bytes: float, num_steps: int, rated_bytes: float) -> float:
    """How much of what a drive is rated for (TBW) so many steps write: 1.0 is all of it.

    Bytes as the host writes them: ratings are in these, with the drive's own amplification allowed for.
    """
    return written_bytes * num_steps / rated_bytes
