"""What a job would come to by other methods and widths, most of which the engine does not run yet.

Times are of equal blocks and plain rates (`outlook.py`): coarser than a plan's own simulation, and marked so.
"""

from __future__ import annotations

import dataclasses
import math

from ssdtune.schedule.decisions import ForwardOnly, Full, Shape
from ssdtune.schedule.delayed import best_delayed
from ssdtune.schedule.job import Job
from ssdtune.schedule.machine import UNPACK_SHARE, Machine
from ssdtune.schedule.outlook import (
    ADAM_DRAM_BYTES,
    Memory,
    Outlook,
    Rates,
    foresee_forward,
)
from ssdtune.schedule.plan import Direction, Tier
from ssdtune.schedule.profile import DEVICE_DECODE, PERTURB, Profile
from ssdtune.sizes import format_size

NF4_BITS = 4.5  # 4 bits a weight, a 16-bit scale for every 32


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Foreseen:
    """One method. memory: with the job's own fixed bytes. why_not: what is short; None where it would fit. runs_as: the
    key with which it runs and is planned op by op; None: the engine does not run it yet. delayed_share: of the blocks,
    those that are updated in the next forward."""

    words: str
    outlook: Outlook
    memory: Memory
    written_bytes: float
    why_not: str | None
    runs_as: str | None = None
    delayed_share: float = 0.0


def foreseen(job: Job, machine: Machine, most_written: int | None = None) -> list[Foreseen]:
    """Full fine-tuning with its states on NVMe or in RAM, and forwards only, 16 bits wide and 4. most_written: bytes that
    the run may write to the drive; None: any number."""
    rates = rates_of(job, machine)
    if rates is None:
        return []
    shape = shape_of(job)
    full = [_full(job, machine, shape, rates, tier) for tier in (Tier.NVME, Tier.RAM)]
    forward = [
        (
            f"zeroth-order, {words} weights",
            foresee_forward(shape, ForwardOnly(weight_bits=bits), rates),
        )
        for words, bits in (("16-bit", 16.0), ("nf4", NF4_BITS))
    ]
    found = [*full, *(_foreseen(job, machine, words, outlook) for words, outlook in forward)]
    found[len(full)] = dataclasses.replace(found[len(full)], runs_as="method: zo")
    if most_written is None:
        return found
    return [_within(each, most_written) for each in found]


def _full(job: Job, machine: Machine, shape: Shape, rates: Rates, tier: Tier) -> Foreseen:
    """Full fine-tuning with its states there, as many of its updates in the next forward as are best."""
    words = f"full AdamW, states on {tier}"

    def fits(outlook: Outlook) -> bool:
        return _foreseen(job, machine, words, outlook).why_not is None

    decision, outlook = best_delayed(shape, Full(states=tier), rates, fits)
    if decision.delayed_share:
        words = f"{words}, {decision.delayed_share:.0%} of updates in the next forward"
    found = _foreseen(job, machine, words, outlook)
    return dataclasses.replace(found, delayed_share=decision.delayed_share)


def _foreseen(job: Job, machine: Machine, words: str, outlook: Outlook) -> Foreseen:
    """With what the job takes beside the weights: libraries, a block's workspace or the loss."""
    workspace = max(job.footprint.workspace_bytes, job.footprint.loss_bytes)
    ram, device = outlook.memory.ram + job.fixed.base_bytes, outlook.memory.device + workspace
    if machine.device is None:  # one memory for all
        ram, device = ram + device, 0.0
    memory = Memory(device=device, ram=ram, nvme=outlook.memory.nvme)
    short: list[str] = []
    for name, needed, has in (
        ("RAM", ram, machine.ram_bytes),
        ("VRAM", device, machine.device_bytes if machine.device is not None else None),
        ("drive", outlook.memory.nvme, machine.drive.free_bytes),
    ):
        if has is not None and needed > has:
            short.append(f"{needed / 1e9:,.0f} GB of {name} > {has / 1e9:,.0f} free")
    return Foreseen(
        words=words,
        outlook=outlook,
        memory=memory,
        written_bytes=outlook.written_bytes * job.steps(job.micro_batches),
        why_not="; ".join(short) or None,
    )


def _within(each: Foreseen, most_written: int) -> Foreseen:
    """The same, refused where it would write more than a run may."""
    if each.written_bytes <= most_written:
        return each
    written = f"{format_size(round(each.written_bytes))} of writes > offload.max_writes"
    return dataclasses.replace(each, why_not="; ".join(filter(None, (each.why_not, written))))


def shape_of(job: Job) -> Shape:
    """The job's model as equal blocks: those of which there are most; the others are the embedding."""
    sizes: dict[int, int] = {}
    for block in job.blocks:
        sizes[block.slot_bytes] = sizes.get(block.slot_bytes, 0) + 1
    num_blocks = max(sizes.values())
    largest = max(size for size, count in sizes.items() if count == num_blocks)
    total = sum(block.slot_bytes for block in job.blocks)
    parameters = round(job.num_parameters * largest / total)
    longest = job.rows_at_once * job.data.longest
    tokens = max(1, round(job.rows_at_once * job.data.padded_tokens))
    return Shape(
        num_blocks=num_blocks,
        block_parameters=parameters,
        num_tokens=tokens * job.micro_batches,
        num_micro_batches=job.micro_batches,
        flop_per_token=_flop_of(job, largest, tokens) or 2.0 * parameters,
        input_bytes_per_token=job.footprint.kept_bytes / max(num_blocks * longest, 1),
        embedding_parameters=max(0, job.num_parameters - num_blocks * parameters),
    )


def _flop_of(job: Job, slot_bytes: int, num_tokens: int) -> float:
    """Of a token's forward through a block of this size, on average, as counted: of experts, those that it is routed
    to; 0: not known. num_tokens: of a micro-batch."""
    if job.work is None:
        return 0.0
    flop = [
        sum(work.flop for work in works)
        for (block, direction), works in job.work.passes["forward"].items()
        if direction is Direction.FORWARD and job.blocks[block].slot_bytes == slot_bytes
    ]
    return sum(flop) / max(len(flop), 1) / num_tokens


def rates_of(job: Job, machine: Machine) -> Rates | None:
    """The profile as plain rates; None without one. RAM gives and takes what a copy in it moves. Where the optimizer on the
    CPU was not measured it runs as fast as that. Where two ways at once were not, a drive's take turns and a link's don't
    slow each other. Writes are those beyond the drive's cache, where these were measured."""
    profile = machine.profile
    if profile is None or not profile.curves(job.dtype):
        return None
    dram = _rate(profile, "unpack") / UNPACK_SHARE
    on_device = machine.device is not None
    operators = profile.curves(job.dtype)
    products = job.dtype if job.work is None else job.work.autocast or job.dtype
    return Rates(
        flops=profile.operator(products, "matmul").rate,
        h2d=_rate(profile, "h2d") if on_device else math.inf,
        d2h=_rate(profile, "d2h") if on_device else math.inf,
        read=_rate(profile, "nvme_read"),
        write=_rate(profile, profile.writes),
        drive_overlap=profile.drive_overlap or 1.0,
        link_overlap=profile.link_overlap or 2.0,
        copy_overlap=None if on_device else profile.copy_overlap,
        update=max(
            (curve.rate for curve in profile.optimizer.values()), default=dram / ADAM_DRAM_BYTES
        ),
        perturb=operators[PERTURB].rate if PERTURB in operators else math.inf,
        decode=_rate(profile, DEVICE_DECODE if on_device else "decode"),
        dram=dram,
    )


def _rate(profile: Profile, name: str) -> float:
    """Of the line through its curve; infinity where it was not measured."""
    return profile.transfers[name].line.rate if name in profile.transfers else math.inf
