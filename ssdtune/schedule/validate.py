"""Whether a plan holds: its budgets, its visits, and the ops that these need."""

from __future__ import annotations

from collections.abc import Sequence

from ssdtune.schedule.ops import make_ops, passes_buffer
from ssdtune.schedule.plan import (
    BLOCK_KINDS,
    Direction,
    Op,
    Plan,
    PlanError,
    StepPlan,
    Tier,
    Visit,
    reuse_distances,
)
from ssdtune.sizes import format_size


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
