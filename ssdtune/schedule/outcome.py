"""What a job would come to on a machine: the plan, its peak, its step, the whole run; or why not. A pure function."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping

from ssdtune.schedule.choices import Request, smallest_budgets
from ssdtune.schedule.cost import Pricing
from ssdtune.schedule.holding import Level, levels_of
from ssdtune.schedule.hunt import Effort, WritesError
from ssdtune.schedule.job import Job
from ssdtune.schedule.machine import Machine
from ssdtune.schedule.memory import (
    COPY,
    INPUTS,
    KEEP_FREE,
    PACKED,
    STAGING_BYTES,
    Passes,
    Peak,
    predict_peak_of,
    room_for_weights,
)
from ssdtune.schedule.plan import Budgets, Lane, Plan, PlanError, Tier
from ssdtune.schedule.planner import make_plan
from ssdtune.schedule.shares import search_within
from ssdtune.schedule.simulate import Simulation, step_seconds
from ssdtune.schedule.stores import mean_bytes
from ssdtune.schedule.writes import Writes
from ssdtune.sizes import format_size

HIDDEN = 1.05  # reading is hidden where a step takes at most so many times its compute
MOST_MICRO_BATCHES = 1024
AUTO_DRIVE_SHARE = 0.5  # of what is free of a drive: checkpoints, other runs


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What may differ between two ways to run a job.

    Attributes:
        micro_batches: of one optimizer step.
        block_inputs: tier of the inputs kept for backward.
        ram_bytes, device_bytes: for weights; None: what the rest of the peak leaves free.
        activation_bytes: for activations that stay until backward; None: a share of what is free for weights, where
            their budget is None too.
        nvme_activation_bytes: of the drive, for activations that wait there; None: what is free of it.
        prefetch: how many fills may run ahead; None: as many as are best.
        most_written: bytes that the run may write to the drive; None: any number.
    """

    micro_batches: int
    block_inputs: Tier = Tier.DEVICE
    ram_bytes: int | None = None
    device_bytes: int | None = None
    activation_bytes: int | None = 0
    nvme_activation_bytes: int | None = 0
    prefetch: int | None = None
    most_written: int | None = None

    def shares(self, *, on_device: bool) -> bool:
        """Whether weights and activations share what is free."""
        weights = self.device_bytes if on_device else self.ram_bytes
        return self.activation_bytes is None and weights is None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A way that fits.

    Attributes:
        plan, peak: of a step.
        simulation: None where the machine's rates or the model's work are not known.
        slow_step_s: of a step all of whose ops take as long as one in ten does; None: not known.
        tokens: of one step. num_steps: of the run.
        written: bytes that go to the drive in the whole run, by what they are for.
        read_bytes: of one step.
        hidden_at: micro-batches of a step from which on reading is hidden with this plan; None: it never is, or is not
            known.
    """

    choices: Choices
    plan: Plan
    peak: Peak
    simulation: Simulation | None
    slow_step_s: float | None
    tokens: float
    num_steps: int
    written: Mapping[str, float]
    hidden_at: int | None
    read_bytes: int

    @property
    def written_bytes(self) -> float:
        """All of it."""
        return sum(self.written.values())

    @property
    def total_s(self) -> float | None:
        """Of the run."""
        return None if self.simulation is None else self.num_steps * self.simulation.step_s

    @property
    def is_hidden(self) -> bool:
        """Whether compute is what a step waits for: it stands still for next to none of it."""
        step = self.simulation
        return step is not None and _hides(step.step_s, step.compute_s)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A way that does not fit: why, in one line with the numbers. needed_writes: with how many bytes of writes it would,
    where nothing else is too much; else 0."""

    choices: Choices
    why: str
    needed_writes: float = 0.0


def outcome(job: Job, machine: Machine, choices: Choices) -> Outcome | Refusal:
    """What comes of the job on the machine with these choices."""
    machine = _as_known(job, machine, choices)
    request = _request(job, machine, choices)
    if isinstance(request, Refusal):
        return request
    writes = writes_of(job, choices)
    least = writes.parts(_inputs_on_nvme(job, choices))
    if why := writes.excess(least):
        return Refusal(choices=choices, why=why, needed_writes=sum(least.values()))
    try:
        plan, simulation = _planned(job, machine, choices, request)
    except WritesError as error:
        parts = writes.parts({}, error.num_bytes)
        return Refusal(choices=choices, why=writes.excess(parts), needed_writes=sum(parts.values()))
    except PlanError as error:
        return Refusal(choices=choices, why=" ".join(str(error).split()))
    peak = _peak(job, plan, choices.micro_batches)
    if why := _over(peak, machine):
        return Refusal(choices=choices, why=why)
    steps = plan.sequences[job.kind]
    written = writes.parts(peak.nvme, mean_bytes(steps, plan, writes.every))
    if why := writes.excess(written):
        return Refusal(choices=choices, why=why, needed_writes=sum(written.values()))
    return Outcome(
        choices=choices,
        plan=plan,
        peak=peak,
        simulation=simulation,
        slow_step_s=_slow_step_s(job, machine, choices, plan),
        tokens=job.tokens(choices.micro_batches),
        num_steps=writes.num_steps,
        written=written,
        hidden_at=_hidden_at(job, machine, choices, plan, simulation),
        read_bytes=steps.read_bytes,
    )


def _planned(
    job: Job, machine: Machine, choices: Choices, request: Request
) -> tuple[Plan, Simulation | None]:
    """The fastest plan and its step; without times the static one. Raises PlanError."""
    pricing = _pricing(job, machine, choices.micro_batches)
    if pricing is None:
        return make_plan(request), None
    shares = choices.shares(on_device=request.on_device)
    found = search_within(request, pricing, Effort.of(choices.prefetch), shares=shares)
    return found.plan, found.simulation


def _request(job: Job, machine: Machine, choices: Choices) -> Request | Refusal:
    """With budgets that are what the machine has."""
    on_device = machine.device is not None
    least = smallest_budgets(job.blocks, on_device=on_device)
    room = _room(job, machine, choices)
    if room.ram_bytes < least.ram_bytes or room.device_bytes < least.device_bytes:
        return Refusal(choices=choices, why=_shortage(machine, room, least))
    ram = room.ram_bytes if choices.ram_bytes is None else choices.ram_bytes
    device = room.device_bytes if choices.device_bytes is None else choices.device_bytes
    budgets = Budgets(
        ram_bytes=max(ram, 0),
        device_bytes=max(device, 0) if on_device else 0,
        activation_bytes=choices.activation_bytes or 0,
        nvme_activation_bytes=_drive_room(job, machine, choices),
    )
    return _asked(job, choices, budgets, on_device=on_device)


def _asked(job: Job, choices: Choices, budgets: Budgets, *, on_device: bool) -> Request:
    return Request(
        blocks=job.blocks,
        orders=job.orders,
        budgets=budgets,
        on_device=on_device,
        block_inputs=choices.block_inputs,
        chunk_tokens=job.chunk_tokens,
        visits_vary=job.visits_vary,
        activation_bytes=job.footprint.activations_of(job.passes(choices.micro_batches)),
        written_bytes=writes_of(job, choices).step_bytes,
    )


def writes_of(job: Job, choices: Choices) -> Writes:
    """What the run puts on the drive, and may."""
    return Writes(
        num_steps=job.steps(choices.micro_batches),
        trained_bytes=job.fixed.trained_bytes,
        every=job.folded_every(choices.micro_batches),
        copy_bytes=sum(block.slot_bytes for block in job.blocks),
        packed_bytes=job.packed_bytes,
        most=choices.most_written,
    )


def _inputs_on_nvme(job: Job, choices: Choices) -> dict[str, int]:
    """Bytes of block inputs that each step puts there."""
    if choices.block_inputs is not Tier.NVME:
        return {}
    return {INPUTS: job.passes(choices.micro_batches) * job.kept_bytes}


# ------------------------------------------------------------------ memory


def _peak(job: Job, plan: Plan, micro_batches: int) -> Peak:
    fixed = job.fixed
    if plan.block_inputs is Tier.NVME:
        fixed = dataclasses.replace(fixed, staging_bytes=STAGING_BYTES)
    peak = predict_peak_of(plan, job.footprint, fixed, _passes(job, micro_batches))
    return dataclasses.replace(peak, nvme={**peak.nvme, **_files(job, plan, micro_batches)})


def _files(job: Job, plan: Plan, micro_batches: int) -> dict[str, int]:
    """What a run makes on the drive beside what waits for backward: the packed model that it reads, and, once blocks
    that are read have missed so many steps, all of them as slots hold them."""
    files = {PACKED: job.packed_bytes} if job.packed_bytes else {}
    if job.folded_every(micro_batches) and plan.sequences[job.kind].read_bytes:
        files[COPY] = sum(block.slot_bytes for block in job.blocks)
    return files


def _passes(job: Job, micro_batches: int) -> Passes:
    return Passes(
        kind=job.kind,
        num=job.passes(micro_batches),
        more=job.fixed.more,
        writes_back=job.fold_steps > 0,
    )


def held(job: Job, found: Outcome) -> dict[Tier, tuple[Level, ...]]:
    """What each tier holds in the course of the step; nothing where its times are not known."""
    if found.simulation is None:
        return {}
    passes = _passes(job, found.choices.micro_batches)
    return levels_of(found.plan, found.simulation, found.peak, job.footprint, passes)


def _room(job: Job, machine: Machine, choices: Choices) -> Budgets:
    """Bytes that all else leaves for weights: what a plan with the least weights does not take."""
    on_device = machine.device is not None
    least = dataclasses.replace(
        smallest_budgets(job.blocks, on_device=on_device),
        activation_bytes=choices.activation_bytes or 0,
        nvme_activation_bytes=_drive_room(job, machine, choices),
    )
    plan = make_plan(_asked(job, choices, least, on_device=on_device))
    peak = _peak(job, plan, choices.micro_batches)
    ram = room_for_weights(
        machine.ram_bytes,
        peak_bytes=peak.ram_bytes,
        weights_bytes=plan.ram_bytes,
        least_bytes=least.ram_bytes,
        is_heap=not on_device,
    )
    device = room_for_weights(
        machine.device_bytes,
        peak_bytes=peak.device_bytes,
        weights_bytes=plan.device_bytes,
        least_bytes=least.device_bytes,
        is_heap=False,
    )
    return Budgets(ram_bytes=ram, device_bytes=device if on_device else 0)


def _as_known(job: Job, machine: Machine, choices: Choices) -> Machine:
    """The machine, without its profile where the steps would write to a drive whose writing was never measured."""
    profile = machine.profile
    if profile is None or profile.knows_writes or job.kind != "train":
        return machine
    writes = choices.block_inputs is Tier.NVME or choices.nvme_activation_bytes
    return dataclasses.replace(machine, profile=None) if writes else machine


def _drive_room(job: Job, machine: Machine, choices: Choices) -> int:
    """Bytes of the drive for activations: what may be written in each step besides block inputs, at most."""
    room, most = _free_for_activations(job, machine, choices), writes_of(job, choices).step_bytes
    if most is None:
        return room
    return min(room, max(most - sum(_inputs_on_nvme(job, choices).values()), 0))


def _free_for_activations(job: Job, machine: Machine, choices: Choices) -> int:
    """Bytes of the drive for activations. None of a drive whose room is not known, or where no times tell what they are
    worth."""
    if choices.nvme_activation_bytes is not None:
        return choices.nvme_activation_bytes
    free = machine.drive.free_bytes
    if free is None or machine.profile is None or not machine.profile.knows_writes:
        return 0
    return int(AUTO_DRIVE_SHARE * max(free - job.packed_bytes, 0))


def _shortage(machine: Machine, room: Budgets, least: Budgets) -> str:
    told: list[str] = []
    for name, has, left, needed in (
        ("RAM", machine.ram_bytes, room.ram_bytes, least.ram_bytes),
        ("VRAM", machine.device_bytes, room.device_bytes, least.device_bytes),
    ):
        if left < needed:
            rest = (1 - KEEP_FREE) * has - left
            told.append(
                f"{format_size(round(rest + needed))} of {name} needed ({format_size(round(rest))} beside weights), {format_size(round(has))} free"
            )
    return "; ".join(told)


def _over(peak: Peak, machine: Machine) -> str:
    """What is short; empty where nothing is."""
    told: list[str] = []
    for name, parts, has in (
        ("RAM", peak.ram, machine.ram_bytes),
        ("VRAM", peak.device, machine.device_bytes),
        ("the drive", peak.nvme, machine.drive.free_bytes),
    ):
        needed = sum(parts.values())
        if has is not None and needed > has:
            what = f" ({' and '.join(parts)})" if parts is peak.nvme else ""
            told.append(
                f"{format_size(round(needed))} of {name} needed{what}, {format_size(round(has))} free: "
                f"{format_size(round(needed - has))} are missing"
            )
    return "; ".join(told)


# ------------------------------------------------------------------ time


def _slow_step_s(job: Job, machine: Machine, choices: Choices, plan: Plan) -> float | None:
    """Of the same plan."""
    profile = machine.profile
    if profile is None or not profile.has_p90:
        return None
    slow = step_of(job, dataclasses.replace(machine, profile=profile.at_p90), choices, plan)
    return None if slow is None else slow.step_s


def step_of(job: Job, machine: Machine, choices: Choices, plan: Plan) -> Simulation | None:
    """A step of this plan, whether there is room for it or not; None where times are not known."""
    pricing = _pricing(job, machine, choices.micro_batches)
    return None if pricing is None else pricing.simulation(plan)


def _pricing(job: Job, machine: Machine, micro_batches: int) -> Pricing | None:
    if job.work is None or machine.profile is None:
        return None
    work = job.work
    if work.moves is not None:
        moves = dataclasses.replace(
            work.moves,
            num_missed=job.missed_steps(micro_batches),
            fold_steps=job.folded_every(micro_batches),
        )
        work = dataclasses.replace(work, moves=moves)
    return Pricing(
        work,
        machine.profile,
        kind=job.kind,
        num_micro_batches=job.passes(micro_batches),
        stored_bytes=micro_batches * job.kept_bytes,
        activation_bytes=job.footprint.activations_of(job.passes(micro_batches)),
    )


def _hides(step_s: float, compute_s: float) -> bool:
    return step_s <= HIDDEN * compute_s


def _hidden_at(
    job: Job, machine: Machine, choices: Choices, plan: Plan, step: Simulation | None
) -> int | None:
    """The least micro-batches of a step with which the plan's reading is hidden; None: more than MOST_MICRO_BATCHES, or
    not known. step: with as many as chosen.

    By simulation: lanes alone don't know that a block is read only when there is a slot for it. Compute grows with
    micro-batches, reading weights does not.
    """
    if step is None:
        return None

    def hides(num: int) -> bool:
        pricing = _pricing(job, machine, num)
        assert pricing is not None
        steps, between_s = pricing.steps(plan), pricing.between_s
        seconds = pricing.op_seconds(steps)
        compute_s = sum(seconds[op.id] for op in steps.ops if op.lane is Lane.COMPUTE)
        return _hides(step_seconds(steps, seconds, between_s=between_s), between_s + compute_s)

    low, high = 0, choices.micro_batches  # with `low` it is not hidden, with `high` it is
    if not _hides(step.step_s, step.compute_s):
        low, high = high, 2 * high
        while not hides(high):
            low, high = high, 2 * high
            if low >= MOST_MICRO_BATCHES:
                return None
    return low + 1 + bisect.bisect_left(range(low + 1, high), True, key=hides)
