"""What each tier holds in the course of a step, part by part: a planned peak, laid out over time. A pure function.

Memory that is allocated once is there all the time: slots, buffers, adapters, states. The rest comes and goes with the
visits:

    block inputs          from the forward visit that needs them to the end of the backward visit that takes them
                          (on NVMe from when they are written)
    activations           the same, of the blocks that keep them, here or on NVMe
    masks, tables, what is in flight    from the first visit to the end of the last
    workspace             during each visit: of a forward, of the loss, or of recompute and backward
    gradients             from the last forward visit on, in which the loss makes the first, to the step's end; whole,
                          though adapters' gradients come block by block

So the most that a tier holds is what `memory.predict_peak` says: at the turn from forward to backward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from ssdtune.schedule.memory import (
    ACTIVATIONS,
    GRADIENTS,
    HELD,
    IN_FLIGHT,
    INPUTS,
    STORED,
    WORKSPACE,
    Footprint,
    Passes,
    Peak,
)
from ssdtune.schedule.plan import Direction, Kind, Plan, Tier, Visit
from ssdtune.schedule.simulate import SimulatedOp, Simulation
from ssdtune.schedule.stored import pairs_of

COME_AND_GO = frozenset({INPUTS, ACTIVATIONS, STORED, HELD, IN_FLIGHT, WORKSPACE, GRADIENTS})


@dataclasses.dataclass(frozen=True, slots=True)
class Level:
    """Bytes by what they are for, from `start_s` of the step until the next level or the step's end."""

    start_s: float
    parts: Mapping[str, int]

    @property
    def num_bytes(self) -> int:
        """All parts."""
        return sum(self.parts.values())


@dataclasses.dataclass(frozen=True, slots=True)
class _Span:
    """Bytes of a part from one second to another."""

    part: str
    start_s: float
    end_s: float
    num_bytes: int


def levels_of(
    plan: Plan, step: Simulation, peak: Peak, footprint: Footprint, passes: Passes
) -> dict[Tier, tuple[Level, ...]]:
    """For each tier that holds something, what it holds: levels in order, the first at the step's begin.

    step: of the plan, of the kind that `passes` names. peak: what was predicted for the same plan and footprint.
    """
    visits = plan.sequences[passes.kind].visits
    spans = [*_Visits(plan, step, visits, footprint, passes).spans(peak)]
    tiers = {Tier.DEVICE: peak.device, Tier.RAM: peak.ram, Tier.NVME: peak.nvme}
    return {
        tier: tuple(_levels(parts, spans)) for tier, parts in tiers.items() if any(parts.values())
    }


def _levels(parts: Mapping[str, int], spans: Sequence[_Span]) -> Iterator[Level]:
    """Of one tier, whose parts at the peak these are."""
    now = {name: 0 if name in COME_AND_GO else n for name, n in parts.items() if n}
    changes: dict[float, dict[str, int]] = {0.0: {}}
    for span in spans:
        if span.part not in now:
            continue
        for second, change in ((span.start_s, span.num_bytes), (span.end_s, -span.num_bytes)):
            at = changes.setdefault(max(second, 0.0), {})
            at[span.part] = at.get(span.part, 0) + change
    for second in sorted(changes):
        for name, change in changes[second].items():
            now[name] += change
        yield Level(second, dict(now))


class _Visits:
    """When the visits of a step compute, and what they hold."""

    def __init__(
        self,
        plan: Plan,
        step: Simulation,
        visits: Sequence[Visit],
        footprint: Footprint,
        passes: Passes,
    ) -> None:
        self._plan, self._step, self._visits = plan, step, visits
        self._footprint, self._passes = footprint, passes
        self._computed = {e.op.visit: e for e in step.ops if e.op.kind is Kind.COMPUTE}
        self._stored, self._left = (
            {e.op.visit: e for e in step.ops if e.op.kind is kind}
            for kind in (Kind.STORE, Kind.STORE_ACTIVATIONS)
        )
        self._pairs = pairs_of(visits)  # backward visit -> forward visit

    def spans(self, peak: Peak) -> Iterator[_Span]:
        """Of all parts that come and go."""
        parts = {**peak.ram, **peak.device, **peak.nvme}
        ops = list(self._computed.values())
        first_s, last_s = min(e.start_s for e in ops), max(e.end_s for e in ops)
        for name in (HELD, IN_FLIGHT):
            yield _Span(name, first_s, last_s, parts.get(name, 0))
        yield _Span(GRADIENTS, self._loss.start_s, self._step.step_s, parts.get(GRADIENTS, 0))
        yield from self._inputs(parts.get(INPUTS, 0))
        for name, tier in ((ACTIVATIONS, Tier.DEVICE), (STORED, Tier.NVME)):
            yield from self._activations(name, tier, parts.get(name, 0))
        yield from self._workspaces(parts.get(WORKSPACE, 0))

    @property
    def _loss(self) -> SimulatedOp:
        """The last forward visit."""
        forward = [
            v for v, visit in enumerate(self._visits) if visit.direction is Direction.FORWARD
        ]
        return self._computed[forward[-1]]

    def _inputs(self, total: int) -> Iterator[_Span]:
        """Shared evenly by the visits that come back; the last has what does not divide."""
        if not self._pairs:
            yield _Span(INPUTS, 0.0, self._step.step_s, total)
            return
        share, rest = divmod(total, len(self._pairs))
        for i, (back, ahead) in enumerate(self._pairs.items()):
            kept = self._stored.get(ahead, self._computed[ahead])
            yield _Span(INPUTS, kept.start_s, self._computed[back].end_s, share + (i == 0) * rest)

    def _activations(self, name: str, tier: Tier, total: int) -> Iterator[_Span]:
        """Of the blocks that keep them there, as far as the budget reaches."""
        known, left = self._footprint.activations_of(self._passes.num), total
        for back, ahead in self._pairs.items():
            block = self._visits[ahead].block
            if self._visits[ahead].keeps is tier and block < len(known):
                num_bytes, left = min(known[block], left), max(left - known[block], 0)
                begun = self._left.get(ahead, self._computed[ahead])
                yield _Span(name, begun.start_s, self._computed[back].end_s, num_bytes)

    def _workspaces(self, most: int) -> Iterator[_Span]:
        footprint, loss = self._footprint, self._loss.op.visit
        for v, each in self._computed.items():
            forward = footprint.forward_bytes
            if self._passes.kind == "train" and self._visits[v].direction is Direction.BACKWARD:
                num_bytes = footprint.workspace_bytes
            elif self._passes.kind == "train" and v == loss:
                num_bytes = max(footprint.loss_bytes, forward)
            else:
                num_bytes = forward
            yield _Span(WORKSPACE, each.start_s, each.end_s, min(num_bytes, most))
