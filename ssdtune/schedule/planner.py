"""Makes a plan from a model's shape, budgets and the order of visits: a pure function.

The policy is static: blocks of like size share a class of slots; every class gets one slot, the classes with several
blocks as many more as the prefetch depth asks for, and what is left of the budget keeps blocks resident, spread
evenly (grouped residents leave the drive idle for a while and then overrun it). The last blocks of forward are the
first of backward, the first of backward's end are the first of the next forward: what a slot still holds is not
fetched again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ssdtune.schedule.plan import (
    BlockShape,
    Budgets,
    Direction,
    Plan,
    PlanError,
    StepPlan,
    Tier,
    Visit,
    make_ops,
    validate,
)
from ssdtune.sizes import format_size

SAME_CLASS = 0.8  # blocks whose sizes are within this ratio share slots: less is lost than a class of its own costs

Order = Sequence[tuple[int, Direction]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Slots by class: `classes[i]` is the slot indices that block i may use."""

    slots: tuple[int, ...]
    classes: tuple[tuple[int, ...], ...]
    buffers: tuple[int, ...]
    tiers: tuple[Tier, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a plan is asked for. `orders`: visits per kind of step. `prefetch`: fills that may run ahead.

    Args:
        blocks: shapes, in the order in which forward meets them.
        orders: for "train" and "forward", the (block, direction) pairs of one step.
        budgets: bytes to stay within.
        on_device: whether slots live on a device (every fill then passes a buffer in RAM).
        prefetch: how many fills may run ahead of compute in the class with the most blocks.
        block_inputs: tier of the inputs kept for backward.
        chunk_tokens: positions whose logits exist at once.
    """

    blocks: tuple[BlockShape, ...]
    orders: Mapping[str, Order]
    budgets: Budgets
    on_device: bool = False
    prefetch: int = 2
    block_inputs: Tier = Tier.DEVICE
    chunk_tokens: int = 4096


def plain_orders(num_blocks: int, first_trained: int = 0) -> dict[str, list[tuple[int, Direction]]]:
    """The order of a plain decoder: forward 0 … N-1, then backward down to the first block that trains."""
    forward = [(i, Direction.FORWARD) for i in range(num_blocks)]
    backward = [(i, Direction.BACKWARD) for i in reversed(range(first_trained, num_blocks))]
    return {"train": forward + backward, "forward": forward}


def make_plan(request: Request) -> Plan:
    """The plan for `request`, validated. Raises PlanError with the smallest budget that works."""
    layout = _layout(request)
    steps = {kind: _step(request, layout, order) for kind, order in request.orders.items()}
    plan = Plan(
        blocks=request.blocks,
        tiers=layout.tiers,
        slots=layout.slots,
        buffers=layout.buffers,
        on_device=request.on_device,
        budgets=request.budgets,
        sequences=steps,
        block_inputs=request.block_inputs,
        chunk_tokens=request.chunk_tokens,
    )
    validate(plan)
    return plan


def smallest_budgets(blocks: Sequence[BlockShape], *, on_device: bool) -> Budgets:
    """The least bytes with which any plan works: one slot of the largest block, one buffer where one is needed."""
    slot = max(b.slot_bytes for b in blocks)
    buffer = max((b.file_bytes for b in blocks if b.is_staged or on_device), default=0)
    if on_device:
        return Budgets(ram_bytes=buffer, device_bytes=slot)
    return Budgets(ram_bytes=slot + buffer)


def size_classes(blocks: Sequence[BlockShape]) -> list[list[int]]:
    """Blocks grouped so that all of a class are within SAME_CLASS of its largest; classes by falling size."""
    classes: list[list[int]] = []
    for i in sorted(range(len(blocks)), key=lambda i: -blocks[i].slot_bytes):
        if classes and blocks[i].slot_bytes >= SAME_CLASS * blocks[classes[-1][0]].slot_bytes:
            classes[-1].append(i)
        else:
            classes.append([i])
    return classes


def _layout(request: Request) -> Layout:
    """Chooses slots, buffers and residents: the richest of a few candidates that fits."""
    blocks, budgets = request.blocks, request.budgets
    least = smallest_budgets(blocks, on_device=request.on_device)
    if budgets.ram_bytes < least.ram_bytes or budgets.device_bytes < least.device_bytes:
        raise PlanError(_too_small(request, least))
    classes = size_classes(blocks)
    for prefetch in range(request.prefetch, -1, -1):
        layout = _fit(request, classes, prefetch)
        if layout is not None:
            return layout
    single = _fit(request, [[i for members in classes for i in members]], 0)  # largest first
    assert single is not None  # smallest_budgets is what this layout takes
    return single


def _too_small(request: Request, least: Budgets) -> str:
    largest = max(request.blocks, key=lambda b: b.slot_bytes)
    lines = [f"the budget holds no block: {largest.name} alone needs {format_size(largest.slot_bytes)}"]
    if request.budgets.ram_bytes < least.ram_bytes:
        lines.append(
            f"offload.ram is {format_size(request.budgets.ram_bytes)}; the smallest that works is "
            f"{_round_up(least.ram_bytes)}"
        )
    if request.budgets.device_bytes < least.device_bytes:
        lines.append(
            f"offload.vram is {format_size(request.budgets.device_bytes)}; the smallest that works is "
            f"{_round_up(least.device_bytes)}"
        )
    return "\n".join(lines)


def _round_up(num_bytes: int) -> str:
    """A size that may be typed in as it is: whole megabytes, never less than what is needed."""
    return f"{-(-num_bytes // 10**6)}MB"


def _fit(request: Request, classes: list[list[int]], prefetch: int) -> Layout | None:
    """The layout with this prefetch depth, or None where it is over budget."""
    blocks = request.blocks
    num_slots = [min(len(c), 1 + prefetch) for c in classes]
    buffers = _buffers(request, prefetch)
    slot_budget = request.budgets.device_bytes if request.on_device else request.budgets.ram_bytes - sum(buffers)
    spent = sum(n * blocks[c[0]].slot_bytes for n, c in zip(num_slots, classes, strict=True))
    if spent > slot_budget or sum(buffers) > request.budgets.ram_bytes:
        return None
    residents = _residents(blocks, classes, num_slots, slot_budget - spent)
    cached = _cached(request, residents, request.budgets.ram_bytes - sum(buffers)) if request.on_device else set()
    return _place(request, classes, num_slots, buffers=buffers, residents=residents, cached=cached)


def _buffers(request: Request, prefetch: int) -> tuple[int, ...]:
    """Buffers between file and slot: as many as may be in flight, each of the largest block that passes them."""
    sizes = [b.file_bytes for b in request.blocks if b.is_staged or request.on_device]
    return (max(sizes),) * max(1, min(prefetch, len(sizes))) if sizes else ()


def _residents(
    blocks: Sequence[BlockShape], classes: list[list[int]], num_slots: list[int], left: int
) -> set[int]:
    """Blocks that stay for good: whole classes that their slots hold anyway, then as many as fit, spread evenly."""
    residents: set[int] = set()
    for members, n in zip(classes, num_slots, strict=True):
        if n >= len(members):
            residents.update(members)
            continue
        size = blocks[members[0]].slot_bytes
        fit = min(left // size, len(members)) if size else len(members)
        if fit >= len(members) - n:  # the slots that the last few would share can hold them for good
            residents.update(members)
            left -= max(0, len(members) - n) * size
        elif fit:
            members_by_order = sorted(members)
            residents.update(members_by_order[(2 * k + 1) * len(members) // (2 * fit)] for k in range(fit))
            left -= fit * size
    return residents


def _cached(request: Request, residents: set[int], left: int) -> set[int]:
    """With a device: blocks whose file bytes stay in RAM, spread evenly over those that are not on the device."""
    streamed = [i for i in range(len(request.blocks)) if i not in residents]
    total = sum(request.blocks[i].file_bytes for i in streamed)
    if total <= left:
        return set(streamed)
    cached: set[int] = set()
    share, due = left / max(total, 1), 0.0
    for i in streamed:
        due += share
        size = request.blocks[i].file_bytes
        if due >= 1.0 and size <= left:
            cached.add(i)
            due -= 1.0
            left -= size
    return cached


def _place(  # noqa: PLR0913 - one call, from _fit, with what _fit decided
    request: Request,
    classes: list[list[int]],
    num_slots: list[int],
    *,
    buffers: tuple[int, ...],
    residents: set[int],
    cached: set[int],
) -> Layout:
    """Numbers the slots: shared ones of each class first, then one for each resident."""
    blocks = request.blocks
    slots: list[int] = []
    allowed: dict[int, tuple[int, ...]] = {}
    for members, n in zip(classes, num_slots, strict=True):
        streamed = [i for i in members if i not in residents]
        if streamed:
            shared = tuple(range(len(slots), len(slots) + n))
            slots += [blocks[members[0]].slot_bytes] * n
            allowed.update(dict.fromkeys(streamed, shared))
        for i in members:
            if i in residents:
                allowed[i] = (len(slots),)
                slots.append(blocks[i].slot_bytes)
    home = Tier.DEVICE if request.on_device else Tier.RAM
    tiers = tuple(
        home if i in residents else Tier.RAM if i in cached else Tier.NVME for i in range(len(blocks))
    )
    return Layout(
        slots=tuple(slots),
        classes=tuple(allowed[i] for i in range(len(blocks))),
        buffers=buffers,
        tiers=tiers,
    )


def _step(request: Request, layout: Layout, order: Order) -> StepPlan:
    assigned = assign_slots(order, layout.classes)
    num_buffers, filled = len(layout.buffers), 0
    visits: list[Visit] = []
    for (block, direction), (slot, is_filled_for) in zip(order, assigned, strict=True):
        is_staged = request.on_device or request.blocks[block].is_staged
        needs_buffer = is_filled_for and is_staged and not (request.on_device and layout.tiers[block] is Tier.RAM)
        visits.append(
            Visit(
                block=block,
                direction=direction,
                slot=slot,
                is_filled_for=is_filled_for,
                buffer=filled % num_buffers if needs_buffer else None,
            )
        )
        filled += needs_buffer
    ops = make_ops(visits, request.blocks, tiers=layout.tiers, on_device=request.on_device)
    return StepPlan(visits=tuple(visits), ops=ops)


def assign_slots(order: Order, classes: Sequence[tuple[int, ...]]) -> list[tuple[int, bool]]:
    """For each visit of a step that repeats: its slot, and whether the slot must be filled.

    The victim is the slot used longest ago: its last visit ended first, so its refill overlaps most. (Belady's rule
    would evict the newest block of a cyclic order, and the fill would wait for the visit that just ended.) Runs the
    order until what the slots hold at a step's end repeats, so that the step described is the steady one.
    """
    held: dict[int, int] = {}
    recency: list[int] = list(dict.fromkeys(s for slots in classes for s in slots))  # longest ago first
    seen: list[tuple[dict[int, int], list[int]]] = []
    assigned: list[tuple[int, bool]] = []
    while (held, recency) not in seen:
        seen.append((dict(held), list(recency)))
        assigned = []
        for block, _ in order:
            slots = classes[block]
            present = next((s for s in slots if held.get(s) == block), None)
            slot = next(s for s in recency if s in slots) if present is None else present
            assigned.append((slot, present is None))
            held[slot] = block
            recency.remove(slot)
            recency.append(slot)
    return assigned
