"""The answer of `ssdtune plan` as a person reads it."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ssdtune.planning.lossless import saving
from ssdtune.planning.prices import Prices, cost_line, cost_of
from ssdtune.planning.ways import Way, knows_steps
from ssdtune.report import LANE_LABELS, duration, factor_words, format_table
from ssdtune.schedule.methods import Foreseen
from ssdtune.schedule.outcome import HIDDEN, Outcome, Refusal
from ssdtune.schedule.plan import Lane, Tier
from ssdtune.schedule.profile import BUSY_CORES
from ssdtune.schedule.writes import SAVED_COPIES
from ssdtune.sizes import format_size

if TYPE_CHECKING:
    from ssdtune.config import Loaded
    from ssdtune.schedule.bits import Chosen
    from ssdtune.schedule.job import Job
    from ssdtune.schedule.machine import Machine
    from ssdtune.schedule.simulate import Simulation

LETTERS = "ABCDEFGHIJ"
BAR_CELLS = 10  # of the longest lane
COLUMNS = ("", "", "VRAM", "RAM", "drive", "writes", "s/step", "tok/s", "total", "")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What comes of a job on a machine.

    decisions: what was `auto`, in words. chosen: the bits, where they were. ways: the configured one first. others: methods that are foreseen coarsely.
    """

    job: Job
    machine: Machine
    decisions: Sequence[str] = ()
    ways: Sequence[Way]
    others: Sequence[Foreseen] = ()
    prices: Prices = Prices()  # noqa: RUF009 - frozen
    chosen: Chosen | None = None

    @property
    def best(self) -> tuple[int, Outcome] | None:
        """The first way that fits, and its place."""
        return next(
            ((i, w.found) for i, w in enumerate(self.ways) if isinstance(w.found, Outcome)), None
        )


def lines_of(answer: Answer, loaded: Loaded) -> Iterator[str]:
    """Yields the whole answer as a person reads it."""
    job, machine, ways = answer.job, answer.machine, answer.ways
    yield f"machine   {machine_line(machine)}"
    yield f"model     {model_line(job)}"
    yield f"job       {job_line(job)}"
    yield f"data      {data_line(job)}"
    for line in answer.decisions:
        yield f"decided   {line}"
    rows = [row(job, way, LETTERS[i]) for i, way in enumerate(ways)]
    rows += [other_row(job, machine, each) for each in answer.others]
    yield format_table(rows, header=COLUMNS)
    if answer.best is None:
        refused = ways[0].found
        assert isinstance(refused, Refusal)
        yield f"does not fit: {refused.why}"
        return
    place, found = answer.best
    yield from _of_one(answer, LETTERS[place], found)
    yield from profile_notes(machine)
    yield from assumed_lines(job, machine)
    given = [*([] if loaded.path is None else [str(loaded.path)]), *loaded.flags]
    # Of a flag that stands twice the last one counts: what is proposed.
    yield f"next: ssdtune train {shlex.join(given)} {ways[place].flags}".rstrip()


def _of_one(answer: Answer, letter: str, found: Outcome) -> Iterator[str]:
    """Yields what is told of the way that is proposed."""
    job, machine = answer.job, answer.machine
    if found.simulation is not None:
        yield f"{letter} a step: {lanes_line(found.simulation)}"
        yield f"{letter}         {limit_line(found)}"
        if (saved := saving(job, machine, found)) is not None:
            yield f"{letter}         {saved.line()}"
    elif machine.profile is None:
        yield "times are not known: measure this machine with `ssdtune probe`"
    else:
        yield f"times are not known: {_why_untimed(job)}"
    for where, parts in (("RAM", found.peak.ram), ("VRAM", found.peak.device)):
        if parts:
            yield f"{letter} {where}: {parts_line(found, parts)}"
    if (found.total_s is not None or found.choices.most_written) and knows_steps(job):
        yield f"{letter} the run: {wear_line(machine, found)}"
    cost = cost_line(cost_of(job, machine, found, answer.prices), _price_source(answer))
    if cost:
        yield f"{letter} costs: {cost}"
    if answer.prices.per_kwh is not None and machine.watts is None:
        yield "what it takes in watts is not known: its energy is not priced"


def _why_untimed(job: Job) -> str:
    """Why a measured machine's steps have no times."""
    if job.work is None:
        return f"the model's work can't be counted ({job.footprint.how})"
    return "writing to the drive was never measured, measure anew with `ssdtune probe`"


def _price_source(answer: Answer) -> str:
    return "" if answer.prices.per_hour is not None else answer.machine.price_source


def profile_notes(machine: Machine) -> Iterator[str]:
    """Yields what a measured machine's profile is not to be trusted in, with the remedy."""
    profile = machine.profile
    if profile is None or not machine.is_measured:
        return
    if profile.lacks:
        yield (
            f"profile: an older one, without {', '.join(profile.lacks)}: times leave out or guess these. Measure anew "
            "with `ssdtune probe`"
        )
    if profile.busy_cores > BUSY_CORES:
        yield (
            f"profile: measured while other processes used {profile.busy_cores:.2g} cores: times are too long. Measure "
            "anew with `ssdtune probe` when the machine is idle"
        )


def assumed_lines(job: Job, machine: Machine) -> Iterator[str]:
    """Yields what the times and sizes assume, and what runs have corrected."""
    if machine.assumed:
        yield f"assumed: {', '.join(machine.assumed)}; rates are published ones, not measured"
    if machine.profile is not None and job.work is not None:
        work, profile = job.work, machine.profile
        refit = profile.refit_for(job.kind, work.dtype, work.autocast)
        if refit:
            yield f"profile: refitted by earlier runs: {factor_words(refit)} (`ssdtune probe` measures anew)"
        for words in profile.assumed_of(work.dtype, work.autocast):
            yield f"assumed: {words}"


def machine_line(machine: Machine) -> str:
    """What it has."""
    parts = [machine.name]
    if machine.device is not None:
        parts.append(f"device {_gb(machine.device.memory_bytes)} GB free")
    parts.append(f"RAM {_gb(machine.ram_bytes)} GB free")
    drive = machine.drive
    told = [] if drive.free_bytes is None else [f"{_gb(drive.free_bytes)} GB free"]
    if machine.profile is not None and "nvme_read" in machine.profile.transfers:
        told.append(f"{machine.profile.transfers['nvme_read'].rate / 1e9:.1f} GB/s read")
    if drive.endurance_bytes:
        told.append(f"{drive.endurance_bytes / 1e12:,.0f} TBW")
    return " · ".join([*parts, f"{drive.name} {', '.join(told)}"])


def model_line(job: Job) -> str:
    """Its size and how it is cut."""
    sizes: dict[int, int] = {}
    for block in job.blocks:
        sizes[block.slot_bytes] = sizes.get(block.slot_bytes, 0) + 1
    size, count = max(sizes.items(), key=lambda item: item[1])
    total = sum(block.slot_bytes for block in job.blocks)
    return (
        f"{job.model} · {job.num_parameters / 1e9:.4g} B · {job.dtype} {format_size(total)} · "
        f"{len(job.blocks)} blocks, {count} of {format_size(size)}"
    )


def job_line(job: Job) -> str:
    """Method, tokens, steps."""
    about = "≈ " if job.data.is_estimate else ""
    parts = [f"{job.method}, {job.num_trained / 1e6:,.1f} M trainable"]
    if job.work is not None and job.work.autocast is not None:
        parts.append(f"autocast to {job.work.autocast}")
    parts.append(
        f"{about}{job.tokens(job.micro_batches):,.0f} tokens/step "
        f"({job.micro_batches} micro-batches × {job.rows_at_once} rows)"
    )
    if job.num_steps is not None:
        parts.append(f"{job.num_steps:,} steps")
    elif job.data.num:
        parts.append(f"{job.num_epochs:g} epochs = {about}{job.steps(job.micro_batches):,} steps")
    return " · ".join(parts)


def data_line(job: Job) -> str:
    """Rows, tokens, padding."""
    if not job.data.num:
        return f"not here: every row is taken to be {job.data.longest:,} tokens long"
    data, about = job.data, "≈ " if job.data.is_estimate else ""
    return (
        f"{data.num:,} rows → {about}{data.num * data.mean_tokens:,.0f} tokens · longest {data.longest:,} · "
        f"trained on {data.trained_share:.0%} · padding {1 - data.mean_tokens / data.padded_tokens:.0%}"
    )


def row(job: Job, way: Way, letter: str) -> list[str]:
    """One line of the table."""
    found = way.found
    if isinstance(found, Refusal):
        return ["–", way.words, *[""] * 7, f"does not fit: {found.why}"]
    peak, step = found.peak, found.simulation
    return [
        letter,
        way.words,
        f"{_gb(peak.device_bytes)} GB" if peak.device else "",
        f"{_gb(peak.ram_bytes)} GB",
        f"{_gb(_on_drive(job, found))} GB",
        format_size(round(found.written_bytes)),
        "" if step is None else seconds(step.step_s, found.slow_step_s),
        "" if step is None else f"{found.tokens / step.step_s:,.0f}",
        "" if found.total_s is None or not knows_steps(job) else duration(found.total_s),
        "" if step is None else verdict(found),
    ]


def seconds(step_s: float, slow_step_s: float | None) -> str:
    """Of a step; where it is known, up to what it takes when all is as slow as one time in ten."""
    usual, slow = f"{step_s:.3g}", "" if slow_step_s is None else f"{slow_step_s:.3g}"
    return usual if slow in ("", usual) else f"{usual}-{slow}"


def other_row(job: Job, machine: Machine, each: Foreseen) -> list[str]:
    """Another method, as a line of the table."""
    step_s, steps = each.outlook.step_s, job.steps(job.micro_batches)
    words = "not runnable in this version"
    if each.runs_as is not None:
        words = f"by plain rates; planned as it runs with {each.runs_as}"
    if each.why_not is not None:
        words += f"; would not fit: {each.why_not}"
    endurance = machine.drive.endurance_bytes
    if endurance and each.written_bytes > 0.01 * endurance:
        words += f"; {each.written_bytes / endurance:.0%} of the drive's rated writes"
    return [
        "·",
        each.words,
        f"{_gb(each.memory.device)} GB" if each.memory.device else "",
        f"{_gb(each.memory.ram)} GB",
        f"{_gb(each.memory.nvme)} GB",
        format_size(round(each.written_bytes)),
        f"≈ {step_s:.3g}",
        f"≈ {job.tokens(job.micro_batches) / step_s:,.0f}",
        f"≈ {duration(steps * step_s)}" if knows_steps(job) else "",
        words,
    ]


def _on_drive(job: Job, found: Outcome) -> float:
    """The model's own files, those that a packed one is made from too, what a run makes beside them, two
    checkpoints."""
    model = job.source_bytes if job.packed_bytes else sum(b.file_bytes for b in job.blocks)
    return model + sum(found.peak.nvme.values()) + 2 * SAVED_COPIES * job.fixed.trained_bytes


def verdict(found: Outcome) -> str:
    """What limits it: compute, where it stands still for next to none of the step; else what it waits for."""
    step = found.simulation
    assert step is not None
    if found.is_hidden:
        return (
            "compute-bound, reading hidden"
            if found.read_bytes
            else "all weights stay: compute-bound"
        )
    more = f": hidden from {found.hidden_at} micro-batches on" if found.hidden_at else ""
    if step.bound_by is Lane.COMPUTE:
        return f"{_waits(found, step)}{more}"
    return f"{LANE_LABELS[step.bound_by]}-bound{more}"


def _waits(found: Outcome, step: Simulation) -> str:
    """Of a step whose longest lane is compute, which waits all the same; for want of slots, where lanes could overlap
    more."""
    others = {lane: s for lane, s in step.busy_s.items() if lane is not Lane.COMPUTE}
    longest = max(others, key=lambda lane: others[lane])
    told = (
        f"compute waits {1 - step.compute_s / step.step_s:.0%} of a step for {LANE_LABELS[longest]}"
    )
    if step.step_s <= HIDDEN * step.two_pass_s:
        return told
    visits = [visit for steps in found.plan.sequences.values() for visit in steps.visits]
    num = len({visit.slot for visit in visits if visit.is_filled_for})
    return f"{told} through {num} slot{'s' if num > 1 else ''}"


def lanes_line(step: Simulation) -> str:
    """The lanes, the longest drawn as BAR_CELLS."""
    longest = max(step.busy_s.values())
    told: list[str] = []
    for lane, seconds in sorted(step.busy_s.items(), key=lambda item: -item[1]):
        if seconds > 0:
            read = sum(e.op.num_bytes for e in step.ops if e.op.lane is lane)
            size = f"{format_size(read)} " if lane is not Lane.COMPUTE and read else ""
            bar = "▇" * max(1, round(BAR_CELLS * seconds / longest))
            told.append(f"{LANE_LABELS[lane]} {size}{seconds:.3g} s {bar}")
    return "  ".join(told)


def limit_line(found: Outcome) -> str:
    """Step against its bounds, and the tokens that hide reading."""
    step = found.simulation
    assert step is not None
    stalls = sum(step.stall_s.values())
    parts = [
        f"waits {stalls:.2g} s",
        f"step / longest lane {step.step_s / step.one_pass_s:.2f}",
        f"step / longest lane of each pass {step.step_s / step.two_pass_s:.2f}",
    ]
    if found.hidden_at is not None:
        tokens = found.tokens / found.choices.micro_batches * found.hidden_at
        parts.append(f"with this plan reading is hidden from {tokens:,.0f} tokens a step on")
    return " · ".join(parts)


def wear_line(machine: Machine, found: Outcome) -> str:
    """What it writes, of what the drive is rated for, and the energy at full load."""
    parts, most = [f"writes {format_size(round(found.written_bytes))}"], found.choices.most_written
    if most is not None:
        parts[0] += f" of the {format_size(most)} that offload.max_writes allows"
    if machine.drive.endurance_bytes:
        share = found.written_bytes / machine.drive.endurance_bytes
        parts[0] += (
            f" ({100 * share:.2g} % of the drive's rated {format_size(round(machine.drive.endurance_bytes))})"
        )
    if most is not None:
        largest = sorted(found.written.items(), key=lambda part: -part[1])
        parts += [f"{name} {format_size(round(num_bytes))}" for name, num_bytes in largest]
    if machine.watts is not None and found.total_s is not None:
        parts.append(f"{machine.watts * found.total_s / 3.6e6:.3g} kWh at full load")
    return " · ".join(parts)


def parts_line(found: Outcome, parts: Any) -> str:
    """The parts of a peak, the largest first."""
    resident = sum(tier is not Tier.NVME for tier in found.plan.tiers)
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    told = [f"{name} {format_size(n)}" for name, n in ordered if n > 0.02 * sum(parts.values())]
    return " · ".join([*told, f"{resident} of {len(found.plan.blocks)} blocks stay"])


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f}" if num_bytes >= 1e8 else f"{num_bytes / 1e9:,.3f}"
