"""What a plan is asked for, and the choices that its budgets have room for: who shares slots, how many, who stays.

The choice made here is static. Blocks of like size share a class of slots; every class gets one slot, the classes with
several blocks as many more as the prefetch depth asks for, and what is left of the budget keeps blocks resident, spread
evenly (grouped residents leave the drive idle for a while and then overrun it). `search.py` makes others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from ssdtune.schedule.plan import BlockShape, Budgets, Direction, PlanError, Tier, staging_bytes
from ssdtune.sizes import format_size

SAME_CLASS = 0.8  # sizes within this ratio share slots: less is lost than a class of its own costs

Order = Sequence[tuple[int, Direction]]
Classes = Sequence[Sequence[int]]  # blocks that share slots, the largest first


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a layout is made from: who shares slots, how many, and who stays.

    Attributes:
        classes: blocks that share slots, the largest first.
        num_slots: for each class, the slots shared by those of it that are streamed.
        prefetch: fills that run ahead; as many buffers, where fills pass buffers.
        residents: blocks with a slot of their own.
        cached: with a device, blocks whose file bytes stay in RAM.
        kept: blocks whose activations stay from forward to backward where compute is.
        stored: those whose activations wait on NVMe meanwhile.
    """

    classes: Classes
    num_slots: tuple[int, ...]
    prefetch: int
    residents: frozenset[int] = frozenset()
    cached: frozenset[int] = frozenset()
    kept: frozenset[int] = frozenset()
    stored: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a plan is asked for.

    Attributes:
        blocks: shapes, in the order in which forward meets them.
        orders: for each kind of step ("train", "forward"), its (block, direction) pairs.
        budgets: bytes to stay within.
        on_device: whether slots live on a device (every fill then passes a buffer).
        buffers_on_device: whether the buffers are there too, since files are read straight into them.
        prefetch: how many fills may run ahead of compute in the classes with several blocks.
        block_inputs: tier of the inputs kept for backward.
        chunk_tokens: positions whose logits exist at once.
        activation_bytes: of each block, what all micro-batches of a step would keep from forward to
            backward instead of computing it again; empty: not known. Where it is not, every block
            may keep, and the budgets decide when the bytes are there.
        visits_vary: whether a block's visits take longer one time than another: a token chooses among experts.
        written_bytes: that one step may write to the drive, by what its simulation writes; None: any number.
    """

    blocks: tuple[BlockShape, ...]
    orders: Mapping[str, Order]
    budgets: Budgets
    on_device: bool = False
    prefetch: int = 2
    block_inputs: Tier = Tier.DEVICE
    chunk_tokens: int = 4096
    buffers_on_device: bool = False
    activation_bytes: tuple[int, ...] = ()
    visits_vary: bool = False
    written_bytes: int | None = None


# ------------------------------------------------------------------ budgets, classes


def smallest_budgets(
    blocks: Sequence[BlockShape], *, on_device: bool, buffers_on_device: bool = False
) -> Budgets:
    """The least bytes with which any plan works: a slot for the largest block, a buffer if needed."""
    slot = max(b.slot_bytes for b in blocks)
    buffer = max((b.file_bytes for b in blocks if b.is_staged or on_device), default=0)
    if buffers_on_device:
        return Budgets(ram_bytes=0, device_bytes=slot + buffer)
    if on_device:
        return Budgets(ram_bytes=buffer, device_bytes=slot + staging_bytes(blocks))
    return Budgets(ram_bytes=slot + buffer)


def least_of(request: Request) -> Budgets:
    """The same for what a plan is asked for."""
    return smallest_budgets(
        request.blocks,
        on_device=request.on_device,
        buffers_on_device=request.buffers_on_device,
    )


def size_classes(blocks: Sequence[BlockShape]) -> list[list[int]]:
    """Blocks in classes, all within SAME_CLASS of the class's largest; classes by falling size."""
    classes: list[list[int]] = []
    for i in sorted(range(len(blocks)), key=lambda i: -blocks[i].slot_bytes):
        if classes and blocks[i].slot_bytes >= SAME_CLASS * blocks[classes[-1][0]].slot_bytes:
            classes[-1].append(i)
        else:
            classes.append([i])
    return classes


# ------------------------------------------------------------------ choices


def first_choice(request: Request) -> Choice:
    """The first of a few skeletons that fits, filled statically. Raises PlanError."""
    for classes, prefetch in skeletons(request):
        choice = static_choice(request, classes, prefetch)
        if choice is not None:
            return choice
    raise AssertionError("smallest_budgets is what the last skeleton takes")


def skeletons(request: Request) -> list[tuple[Classes, int]]:
    """Ways to share slots, with a prefetch depth, the best first. Raises PlanError for a budget too
    small for the last of them.

    Fills that run ahead are worth most, so slots that all blocks share come before classes whose
    blocks have one slot each, where every fill would wait for the visit before it to end.
    """
    least, budgets = least_of(request), request.budgets
    if budgets.ram_bytes < least.ram_bytes or budgets.device_bytes < least.device_bytes:
        raise PlanError(_too_small(request, least))
    classes = size_classes(request.blocks)
    shared = [[i for members in classes for i in members]]  # largest first
    depths = range(max(request.prefetch, 0), 0, -1)
    ahead = [*[(classes, d) for d in depths], *[(shared, d) for d in depths]]
    return [*ahead, (classes, 0), (shared, 0)]


def _too_small(request: Request, least: Budgets) -> str:
    largest = max(request.blocks, key=lambda b: b.slot_bytes)
    size = format_size(largest.slot_bytes)
    beside = " and its file's bytes beside it" if request.buffers_on_device else ""
    lines = [f"the budget holds no block: {largest.name} alone needs {size}{beside}"]
    for key, given, needed in (
        ("offload.ram", request.budgets.ram_bytes, least.ram_bytes),
        ("offload.vram", request.budgets.device_bytes, least.device_bytes),
    ):
        if given < needed:
            smallest = f"{-(-needed // 10**6)}MB"  # may be typed in as it is; never too small
            lines.append(f"{key} is {format_size(given)}; the smallest that works is {smallest}")
    return "\n".join(lines)


def static_choice(request: Request, classes: Classes, prefetch: int) -> Choice | None:
    """With this prefetch depth, what is left of the budget filled class by class, the largest
    first; None where the slots alone are over budget."""
    blocks = request.blocks
    num_slots = tuple(min(len(members), 1 + prefetch) for members in classes)
    empty = Choice(classes=classes, num_slots=num_slots, prefetch=prefetch)
    room = room_for(request, empty)
    if room is None:
        return None
    slot_left, ram_left = room
    residents: set[int] = set()
    for n, members in zip(num_slots, classes, strict=True):
        chosen = _residents(blocks, members, n, slot_left)
        residents |= chosen
        slot_left -= sum(blocks[i].slot_bytes for i in chosen)
        if len(chosen) == len(members):  # nobody is left to share slots
            slot_left += n * blocks[members[0]].slot_bytes
    cached = _cached(blocks, residents, ram_left) if request.on_device else frozenset[int]()
    kept = most_kept(request)
    return dataclasses.replace(
        empty,
        residents=frozenset(residents),
        cached=cached,
        kept=kept,
        stored=most_stored(request, kept),
    )


def most_kept(request: Request) -> frozenset[int]:
    """As many blocks as the budget lets keep their activations, spread evenly."""
    return _most(request, able_to_keep(request), request.budgets.activation_bytes)


def most_stored(request: Request, kept: AbstractSet[int]) -> frozenset[int]:
    """As many of the blocks that are not kept as the budget lets wait on NVMe, spread evenly."""
    able = [i for i in able_to_keep(request) if i not in kept]
    return _most(request, able, request.budgets.nvme_activation_bytes)


def _most(request: Request, able: Sequence[int], budget: int) -> frozenset[int]:
    """As many of these as it holds the activations of, each taken for the largest; all where their bytes are not known."""
    if not budget or not able:
        return frozenset()
    if not request.activation_bytes:
        return frozenset(able)
    largest = max(request.activation_bytes[i] for i in able)
    return frozenset(spread(able, min(budget // max(largest, 1), len(able))))


def able_to_keep(request: Request) -> list[int]:
    """Blocks that both directions of a training step visit, in the order in which forward meets them."""
    order = request.orders.get("train", ())
    behind = {block for block, direction in order if direction is Direction.BACKWARD}
    known = request.activation_bytes
    ahead = [block for block, direction in order if direction is Direction.FORWARD]
    return [i for i in dict.fromkeys(ahead) if i in behind and (not known or known[i])]


def kept_bytes(request: Request, kept: AbstractSet[int]) -> int:
    """Of the activations of these blocks; 0 where that is not known."""
    return sum(request.activation_bytes[i] for i in kept) if request.activation_bytes else 0


def room_for(request: Request, choice: Choice) -> tuple[int, int] | None:
    """Bytes that a choice leaves: where slots live, and in RAM (the same without a device). None
    where it is over budget."""
    blocks, budgets = request.blocks, request.budgets
    if kept_bytes(request, choice.kept) > budgets.activation_bytes:
        return None
    if kept_bytes(request, choice.stored) > budgets.nvme_activation_bytes:
        return None
    slots = sum(blocks[i].slot_bytes for i in choice.residents)
    for n, members in zip(choice.num_slots, choice.classes, strict=True):
        if any(i not in choice.residents for i in members):
            slots += n * blocks[members[0]].slot_bytes
    ram, buffers = budgets.ram_bytes, sum(buffers_of(request, choice.prefetch))
    if request.buffers_on_device:
        slots += buffers
    else:
        ram -= buffers
        slots += staging_bytes(blocks) if request.on_device else 0
    if request.on_device:
        ram -= sum(blocks[i].file_bytes for i in choice.cached)
        slot_left = budgets.device_bytes - slots
    else:
        slot_left = ram = ram - slots
    return (slot_left, ram) if slot_left >= 0 and ram >= 0 else None


def buffers_of(request: Request, prefetch: int) -> tuple[int, ...]:
    """Buffers between file and slot: as many as fills run ahead, each for the largest block."""
    sizes = [b.file_bytes for b in request.blocks if b.is_staged or request.on_device]
    return (max(sizes),) * max(1, min(prefetch, len(sizes))) if sizes else ()


def _residents(
    blocks: Sequence[BlockShape], members: Sequence[int], num_slots: int, left: int
) -> set[int]:
    """Those of a class that stay for good: all, if its slots and what is left hold them; else as
    many as what is left holds beside the shared slots, spread evenly."""
    num, size = len(members), blocks[members[0]].slot_bytes
    fit = min(left // size, num) if size else num
    if fit >= num - num_slots:
        return set(members)
    return spread(sorted(members), fit)


def spread(members: Sequence[int], num: int) -> set[int]:
    """So many of them, evenly, half a gap from the ends."""
    return {members[(2 * k + 1) * len(members) // (2 * num)] for k in range(num)}


def _cached(blocks: Sequence[BlockShape], residents: AbstractSet[int], left: int) -> frozenset[int]:
    """With a device: blocks whose file bytes stay in RAM, spread evenly over the streamed ones."""
    streamed = [i for i in range(len(blocks)) if i not in residents]
    share = left / max(sum(blocks[i].file_bytes for i in streamed), 1)
    cached: set[int] = set()
    due = 0.0
    for i in streamed:
        due += share
        if due >= 1.0 and blocks[i].file_bytes <= left:
            cached.add(i)
            due -= 1.0
            left -= blocks[i].file_bytes
    for i in streamed:  # what rounding and large blocks left over
        if i not in cached and blocks[i].file_bytes <= left:
            cached.add(i)
            left -= blocks[i].file_bytes
    return frozenset(cached)
