"""What waits off the device from forward to backward, on its way out and back, as ops beside those of the weights.

What the engine's plan leaves out, since the bytes depend on the batch and no slot waits for them; the simulator needs
it, because they share the drive and a device's link with the weights:

    block inputs to RAM beside a device    DOWNLOAD_INPUT after forward's visit, UPLOAD_INPUT before backward's
    block inputs to NVMe                   STORE and FETCH; on a device a download before the one, an upload after the
                                           other
    activations to NVMe                    STORE_ACTIVATIONS and FETCH_ACTIVATIONS, the same
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ssdtune.schedule.plan import Direction, Kind, Lane, Op, StepPlan, Tier, Visit

AHEAD = 1  # visits by which what waits is fetched before it is needed

Move = tuple[Kind, Lane]
Ways = tuple[Sequence[Move], Sequence[Move]]

INPUTS_ON_NVME = (Kind.STORE, Kind.FETCH)
ACTIVATIONS_ON_NVME = (Kind.STORE_ACTIVATIONS, Kind.FETCH_ACTIVATIONS)


def with_stored_inputs(
    steps: StepPlan, num_bytes: int, *, tier: Tier = Tier.NVME, on_device: bool = False
) -> StepPlan:
    """The step with the inputs of each visit that comes back moved to `tier` and back before they are needed.

    num_bytes: of all of them together, shared evenly. Without any, or where they stay in the memory that compute has,
    the step as it is.
    """
    pairs = pairs_of(steps.visits)
    ways = _ways(tier, INPUTS_ON_NVME, on_device=on_device)
    if not num_bytes or not pairs or not ways[0]:
        return steps
    return _Inserted(
        steps, pairs, dict.fromkeys(pairs.values(), num_bytes // len(pairs)), ways
    ).steps()


def with_stored_activations(
    steps: StepPlan, num_bytes: Sequence[int], *, on_device: bool = False
) -> StepPlan:
    """The step with the activations of the visits that keep them on NVMe moved there and back.

    num_bytes: of each block, those of all its visits. Without such visits, or where bytes are not known, the step as
    it is.
    """
    all_pairs = pairs_of(steps.visits)
    pairs = {
        back: ahead
        for back, ahead in all_pairs.items()
        if steps.visits[ahead].keeps is Tier.NVME and steps.visits[ahead].block < len(num_bytes)
    }
    if not pairs:
        return steps
    turns: dict[int, int] = {}
    for ahead in pairs.values():
        block = steps.visits[ahead].block
        turns[block] = turns.get(block, 0) + 1
    shares = {
        ahead: num_bytes[steps.visits[ahead].block] // turns[steps.visits[ahead].block]
        for ahead in pairs.values()
    }
    ways = _ways(Tier.NVME, ACTIVATIONS_ON_NVME, on_device=on_device)
    return _Inserted(steps, pairs, shares, ways).steps()


def written_bytes(steps: StepPlan) -> int:
    """Bytes that go to NVMe in a step."""
    return sum(op.num_bytes for op in steps.ops if op.lane is Lane.NVME_WRITE)


def _ways(tier: Tier, on_nvme: tuple[Kind, Kind], *, on_device: bool) -> Ways:
    """What happens after the forward visit, and before the backward visit, in order. on_nvme: what moves there and
    back."""
    out: list[Move] = []
    back: list[Move] = []
    if on_device and tier is not Tier.DEVICE:
        out, back = [(Kind.DOWNLOAD_INPUT, Lane.D2H)], [(Kind.UPLOAD_INPUT, Lane.H2D)]
    if tier is Tier.NVME:
        store, fetch = on_nvme
        out, back = [*out, (store, Lane.NVME_WRITE)], [(fetch, Lane.NVME_READ), *back]
    return out, back


def pairs_of(visits: Sequence[Visit]) -> dict[int, int]:
    """Backward visits, each with the forward visit whose inputs it needs."""
    waiting: dict[int, list[int]] = {}
    pairs: dict[int, int] = {}
    for v, visit in enumerate(visits):
        if visit.direction is Direction.FORWARD:
            waiting.setdefault(visit.block, []).append(v)
        elif waiting.get(visit.block):
            pairs[v] = waiting[visit.block].pop()
    return pairs


class _Inserted:
    """The ops as they are numbered anew. num_bytes: by forward visit. ways: out and back."""

    def __init__(
        self, steps: StepPlan, pairs: dict[int, int], num_bytes: Mapping[int, int], ways: Ways
    ) -> None:
        self._steps, self._pairs, self._num_bytes = steps, pairs, num_bytes
        self._out, self._back = ways
        self._names = {op.visit: op.block for op in steps.ops}
        self._ops: list[Op] = []
        self._new: list[int] = []  # an op's id -> its new one
        self._computed: dict[int, int] = {}  # visit -> new id of its COMPUTE
        # Forward visit -> id of the last op that moves out what it leaves.
        self._stored: dict[int, int] = {}

    def steps(self) -> StepPlan:
        """The step with all of them."""
        stored, new = set(self._pairs.values()), self._new
        for op in self._steps.ops:
            after = tuple([new[i] for i in op.after])
            if op.kind is Kind.COMPUTE and op.visit in self._pairs:
                # After the weights of this visit, before those of the next: with three slots they wait for the same.
                after = (*after, self._brought(op.visit))
            number = len(self._ops)
            new.append(number)
            self._ops.append(op.renumbered(number, after))
            if op.kind is Kind.COMPUTE:
                self._computed[op.visit] = number
                if op.visit in stored:
                    self._stored[op.visit] = self._moved(op.visit, self._out, (number,))
        for number in new:
            op = self._ops[number]
            if op.after_previous:
                previous = tuple([new[i] for i in op.after_previous])
                self._ops[number] = op._replace(after_previous=previous)
        return StepPlan(visits=self._steps.visits, ops=tuple(self._ops))

    def _brought(self, v: int) -> int:
        """What backward visit `v` needs, not before the visit AHEAD + 1 before it is over."""
        after = (self._stored[self._pairs[v]],)
        before = self._computed.get(v - AHEAD - 1)
        return self._moved(v, self._back, after if before is None else (*after, before))

    def _moved(self, v: int, way: Sequence[Move], after: tuple[int, ...]) -> int:
        """One op after the other; the id of the last."""
        num_bytes = self._num_bytes[self._pairs.get(v, v)]
        for kind, lane in way:
            number = len(self._ops)
            op = Op(
                id=number,
                kind=kind,
                lane=lane,
                visit=v,
                block=self._names[v],
                direction=self._steps.visits[v].direction,
                num_bytes=num_bytes,
                after=after,
            )
            self._ops.append(op)
            after = (number,)
        return after[0]
