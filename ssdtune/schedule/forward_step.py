"""A zeroth-order step as a plan: the blocks in a circle, several perturbed forwards each time one is there.

MeZO (arXiv 2305.17333) has 2, FZOO (ICLR 2026) N + 1. Weights that change go back down; those of a low-rank window
(LOZO, arXiv 2410.07698) do not.
"""

from __future__ import annotations

from ssdtune.schedule.decisions import ForwardOnly, Shape
from ssdtune.schedule.plan import Kind, Lane, StepPlan, Tier, Visit
from ssdtune.schedule.planner import assign_slots, plain_orders
from ssdtune.schedule.steps import NUM_STAGING_BUFFERS, StepOps


def forward_step(shape: Shape, decision: ForwardOnly) -> StepPlan:
    """The ops of a zeroth-order step."""
    return _ForwardStep(shape, decision).made()


class _ForwardStep(StepOps):
    """The blocks in a circle, forwards only."""

    def __init__(self, shape: Shape, decision: ForwardOnly) -> None:
        num, slots = shape.num_blocks, min(decision.num_slots, shape.num_blocks)
        order = plain_orders(num)["forward"]
        assigned = assign_slots(order, [tuple(range(slots))] * num)
        visits = [
            Visit(block=block, direction=direction, slot=slot, is_filled_for=is_filled_for)
            for (block, direction), (slot, is_filled_for) in zip(order, assigned, strict=True)
        ]
        super().__init__(shape, decision, visits)
        self.decision = decision

    def made(self) -> StepPlan:
        """The whole step."""
        stored: dict[int, int] = {}
        self.fill_ahead(-1)
        for v, visit in enumerate(self.visits):
            done = -1
            filled = [self.filled[v]] if v in self.filled else []
            for _ in range(self.shape.num_micro_batches):
                done = self.add(Kind.COMPUTE, Lane.COMPUTE, v, after=filled)
                self.reads(("slot", visit.slot), done)
            if self.decision.writes_back and visit.is_filled_for:
                stored[v] = self._write_back(v, done)
            self.fill_ahead(v)
        first = {v: (self._loaded[v] or [upload])[0] for v, upload in self.filled.items()}
        return self.linked({first[v]: [store] for v, store in stored.items()})

    def _write_back(self, v: int, computed: int) -> int:
        staging = ("staging", v % NUM_STAGING_BUFFERS)
        is_stored = self.decision.weights is Tier.NVME
        down = self.add(
            Kind.DOWNLOAD,
            Lane.D2H,
            v,
            num_bytes=self.weight_bytes,
            after=[computed],
            writes=staging if is_stored else None,
        )
        self.reads(("slot", self.visits[v].slot), down)
        if not is_stored:
            return down
        store = self.add(
            Kind.STORE_WEIGHTS, Lane.NVME_WRITE, v, num_bytes=self.weight_bytes, after=[down]
        )
        self.reads(staging, store)
        return store
