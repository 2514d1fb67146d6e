"""Which blocks stay, once it is known how many: patterns over blocks that are alike, filling up, moves. And which keep
their activations, here or on NVMe."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from random import Random

from ssdtune.schedule.choices import Choice, Request, able_to_keep, room_for, spread
from ssdtune.schedule.counts import Counts

NEAR = 3  # half of the moves look no further
NUM_STAGES = 6  # how many numbers of blocks with activations that stay are tried

Pattern = Callable[[Sequence[int], int], set[int]]  # blocks that are alike, how many -> which


def arranged(
    request: Request,
    empty: Choice,
    groups: Sequence[Sequence[int]],
    counts: Counts,
    pattern: Pattern,
) -> Choice:
    """Which blocks of each kind stay; what room is left over is used. groups: the blocks of each kind."""
    stay: set[int] = set()
    keep: set[int] = set()
    for members, num_resident, num_cached in zip(
        groups, counts.resident, counts.cached, strict=True
    ):
        chosen = pattern(members, num_resident)
        stay |= chosen
        keep |= pattern([i for i in members if i not in chosen], num_cached)
    choice = dataclasses.replace(empty, residents=frozenset(stay), cached=frozenset(keep))
    return filled_up(request, choice)


def first(members: Sequence[int], num: int) -> set[int]:
    """Those that forward meets first."""
    return set(members[:num])


def last(members: Sequence[int], num: int) -> set[int]:
    """Those that forward meets last."""
    return set(members[len(members) - num :])


def ends(members: Sequence[int], num: int) -> set[int]:
    """Half of them first, half last."""
    return first(members, num // 2) | last(members, num - num // 2)


def spread_inside(members: Sequence[int], num: int) -> set[int]:
    """Evenly over all but those that the slots hold at the step's turns anyway."""
    inside = members[2:-2]
    return spread(inside, num) if 0 < num <= len(inside) else spread(members, num)


PATTERNS = (spread, spread_inside, first, last, ends)


def filled_up(request: Request, choice: Choice) -> Choice:
    """What room is left taken by more blocks, the largest that fits first, from the middle outwards."""
    room = room_for(request, choice)
    if room is None:
        return choice
    blocks, middle = request.blocks, len(request.blocks) / 2
    slot_left, ram_left = room
    residents, cached = set(choice.residents), set(choice.cached)
    streamed = [i for i in range(len(blocks)) if i not in residents]
    for i in sorted(streamed, key=lambda i: (-blocks[i].slot_bytes, abs(i - middle))):
        if blocks[i].slot_bytes <= slot_left:
            slot_left -= blocks[i].slot_bytes
            residents.add(i)
            if i in cached:
                cached.discard(i)
                ram_left += blocks[i].file_bytes
        elif request.on_device and i not in cached and blocks[i].file_bytes <= ram_left:
            ram_left -= blocks[i].file_bytes
            cached.add(i)
    return dataclasses.replace(choice, residents=frozenset(residents), cached=frozenset(cached))


def keeping(request: Request, choice: Choice) -> Iterator[Choice]:
    """The same with the activations of fewer blocks, or of other ones: evenly, those met first, those met last."""
    able, most = able_to_keep(request), len(choice.kept)
    for stage in range(NUM_STAGES + 1 if most else 0):
        num = round(most * stage / NUM_STAGES)
        for pattern in (spread, first, last):
            yield dataclasses.replace(choice, kept=frozenset(pattern(able, num)))


def storing(request: Request, choice: Choice) -> Iterator[Choice]:
    """The same with the activations of more and more blocks that are not kept on NVMe: evenly, those met first, those met
    last."""
    able = [i for i in able_to_keep(request) if i not in choice.kept]
    for stage in range(1, NUM_STAGES + 1 if able else 1):
        num = round(len(able) * stage / NUM_STAGES)
        for pattern in (spread, first, last):
            yield dataclasses.replace(choice, stored=frozenset(pattern(able, num)))


def elsewhere(request: Request, choice: Choice) -> Iterator[Choice]:
    """The same with one block's activations elsewhere, or those of two blocks in each other's place."""
    able = able_to_keep(request)
    for i in able:
        kept, stored = choice.kept - {i}, choice.stored - {i}
        yield dataclasses.replace(choice, kept=kept, stored=stored)
        yield dataclasses.replace(choice, kept=kept | {i}, stored=stored)
        yield dataclasses.replace(choice, kept=kept, stored=stored | {i})
    for one, other in itertools.combinations(able, 2):
        yield dataclasses.replace(
            choice,
            kept=_exchanged(choice.kept, one, other),
            stored=_exchanged(choice.stored, one, other),
        )


def moved(request: Request, choice: Choice, chance: Random) -> Choice | None:
    """One that stays changes places with one that does not, in slots or in RAM; None where nobody does or it does not
    fit."""
    in_ram = bool(choice.cached) and (not choice.residents or chance.random() < 0.5)
    held = choice.cached if in_ram else choice.residents
    others = [i for i in range(len(request.blocks)) if i not in held]
    if not held or not others:
        return None
    out = chance.choice(sorted(held))
    near = [i for i in others if abs(i - out) <= NEAR]
    into = chance.choice(near if near and chance.random() < 0.5 else others)
    swapped = dataclasses.replace(
        choice,
        residents=_exchanged(choice.residents, out, into),
        cached=_exchanged(choice.cached, out, into),
    )
    return filled_up(request, swapped) if room_for(request, swapped) is not None else None


def _exchanged(held: frozenset[int], one: int, other: int) -> frozenset[int]:
    """With the two blocks in each other's place."""
    places = {one: other, other: one}
    return frozenset(places.get(i, i) for i in held)
