"""Makes a plan from a choice and the order of visits: a pure function.

The last blocks of forward are the first of backward, the first of backward's end are the first of
the next forward: what a slot still holds is not fetched again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from ssdtune.schedule.choices import (
    Choice,
    Order,
    Request,
    able_to_keep,
    buffers_of,
    first_choice,
    kept_bytes,
)
from ssdtune.schedule.ops import make_ops, passes_buffer
from ssdtune.schedule.plan import BlockShape, Direction, Plan, PlanError, StepPlan, Tier, Visit
from ssdtune.schedule.validate import validate


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Slots by class: `allowed[i]` is the slot indices that block i may use. `kept`: blocks whose
    activations stay from forward to backward where compute is; `stored`: those whose wait on NVMe."""

    slots: tuple[int, ...]
    allowed: tuple[tuple[int, ...], ...]
    buffers: tuple[int, ...]
    tiers: tuple[Tier, ...]
    kept: frozenset[int] = frozenset()
    stored: frozenset[int] = frozenset()


def plain_orders(num_blocks: int, first_trained: int = 0) -> dict[str, list[tuple[int, Direction]]]:
    """A plain decoder's order: forward 0 … N-1, then backward down to the first block that trains."""
    forward = [(i, Direction.FORWARD) for i in range(num_blocks)]
    backward = [(i, Direction.BACKWARD) for i in reversed(range(first_trained, num_blocks))]
    return {"train": forward + backward, "forward": forward}


def make_plan(request: Request) -> Plan:
    """The plan for `request`, validated. Raises PlanError with the smallest budget that works."""
    if not request.blocks:
        raise PlanError("there are no blocks to plan for")
    plan = plan_of(request, layout_of(request, first_choice(request)))
    validate(plan)
    return plan


def plan_of(request: Request, layout: Layout) -> Plan:
    """The plan with this layout, not validated."""
    able = set(able_to_keep(request))  # a step may have turned out to visit less
    keep = dict.fromkeys(layout.kept & able, Tier.DEVICE)
    keep |= dict.fromkeys(layout.stored & able, Tier.NVME)
    steps = {
        kind: _step(request, layout, order, keep if kind == "train" else {})
        for kind, order in request.orders.items()
    }
    return Plan(
        blocks=request.blocks,
        tiers=layout.tiers,
        slots=layout.slots,
        buffers=layout.buffers,
        on_device=request.on_device,
        budgets=request.budgets,
        sequences=steps,
        block_inputs=request.block_inputs,
        chunk_tokens=request.chunk_tokens,
        buffers_on_device=request.buffers_on_device,
        activation_bytes=kept_bytes(request, layout.kept & able),
        nvme_activation_bytes=kept_bytes(request, layout.stored & able),
    )


def layout_of(request: Request, choice: Choice) -> Layout:
    """Slots, buffers and tiers of a choice that fits."""
    pairs = list(zip(choice.num_slots, choice.classes, strict=True))
    slots, allowed = _number_slots(request.blocks, pairs, choice.residents)
    home = Tier.DEVICE if request.on_device else Tier.RAM
    tiers = [
        home if i in choice.residents else Tier.RAM if i in choice.cached else Tier.NVME
        for i in range(len(request.blocks))
    ]
    buffers = buffers_of(request, choice.prefetch)
    return Layout(
        slots=slots,
        allowed=allowed,
        buffers=buffers,
        tiers=tuple(tiers),
        kept=choice.kept,
        stored=choice.stored,
    )


def _number_slots(
    blocks: Sequence[BlockShape],
    classes: Sequence[tuple[int, Sequence[int]]],
    residents: AbstractSet[int],
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Bytes of all slots, and which of them each block may use: a resident its own, the others of
    its class the shared ones. classes: (number of shared slots, members)."""
    slots: list[int] = []
    allowed: dict[int, tuple[int, ...]] = {}
    for num_shared, members in classes:
        streamed = [i for i in members if i not in residents]
        if streamed:
            shared = tuple(range(len(slots), len(slots) + num_shared))
            slots += [blocks[members[0]].slot_bytes] * num_shared
            allowed.update(dict.fromkeys(streamed, shared))
        for i in members:
            if i in residents:
                allowed[i] = (len(slots),)
                slots.append(blocks[i].slot_bytes)
    return tuple(slots), tuple(allowed[i] for i in range(len(blocks)))


# ------------------------------------------------------------------ visits


def _step(request: Request, layout: Layout, order: Order, keep: Mapping[int, Tier]) -> StepPlan:
    """keep: of each block whose activations stay, where."""
    num_buffered = 0
    visits: list[Visit] = []
    assigned = assign_slots(order, layout.allowed)
    for (block, direction), (slot, is_filled_for) in zip(order, assigned, strict=True):
        buffer = None
        if is_filled_for and passes_buffer(
            request.blocks[block], layout.tiers[block], on_device=request.on_device
        ):
            buffer = num_buffered % len(layout.buffers)
            num_buffered += 1
        visits.append(
            Visit(
                block=block,
                direction=direction,
                slot=slot,
                is_filled_for=is_filled_for,
                buffer=buffer,
                keeps=keep.get(block),
            )
        )
    ops = make_ops(
        visits,
        request.blocks,
        on_device=request.on_device,
        buffers_on_device=request.buffers_on_device,
    )
    return StepPlan(visits=tuple(visits), ops=ops)


def assign_slots(order: Order, allowed: Sequence[Sequence[int]]) -> list[tuple[int, bool]]:
    """For each visit of a step that repeats: its slot, and whether the slot must be filled for it.

    The victim is the slot used longest ago: its last visit ended first, so its refill overlaps most.
    (Belady's rule would evict the newest block of a cyclic order, and the fill would wait for the
    visit that just ended.) Runs the order until what the slots hold at a step's end repeats. Where
    it repeats only after several steps (an odd number of visits through two slots), a plan of one
    step must fill again what another step left elsewhere.
    """
    # Slot -> the block in it, the slot used longest ago first.
    held: dict[int, int | None] = dict.fromkeys(s for slots in allowed for s in slots)
    seen: list[list[tuple[int, int | None]]] = []
    chosen: list[int] = []
    while (state := list(held.items())) not in seen:
        seen.append(state)
        chosen = []
        for block, _ in order:
            slots = allowed[block]
            slot = next((s for s in slots if held[s] == block), None)
            if slot is None:
                slot = slots[0] if len(slots) == 1 else next(s for s in held if s in slots)
            chosen.append(slot)
            del held[slot]  # and last again
            held[slot] = block
    last = {slot: block for slot, (block, _) in zip(chosen, order, strict=True)}
    assigned: list[tuple[int, bool]] = []
    for slot, (block, _) in zip(chosen, order, strict=True):
        assigned.append((slot, last[slot] != block))
        last[slot] = block
    return assigned
