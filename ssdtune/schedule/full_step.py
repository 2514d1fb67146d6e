"""A step of full fine-tuning as a plan: forward visits 0 … N-1, backward N-1 … 0.

When a block's backward is done its gradient goes to RAM, and its optimizer states pass through in chunks: read, updated
on the CPU, written with the new weights. This runs beside the backward of the blocks before it; nothing is stale (LoHan,
arXiv 2403.06504, "active gradient offloading"). A share of the blocks may be updated in the next forward, just before
they are needed (GreedySnake, arXiv 2512.17570).
"""

from __future__ import annotations

from collections.abc import Sequence

from ssdtune.schedule.decisions import Full, Shape
from ssdtune.schedule.plan import Direction, Kind, Lane, StepPlan, Tier, Visit
from ssdtune.schedule.planner import assign_slots, plain_orders
from ssdtune.schedule.steps import NUM_STAGING_BUFFERS, Cell, StepOps

# Per micro-batch on the device, one in use while the next one comes or the last one goes.
NUM_INPUT_BUFFERS = 2
NUM_GRADIENT_BUFFERS = 2

GRADIENT_BYTES = 2.0  # per parameter: 16 bits


def full_step(shape: Shape, decision: Full) -> StepPlan:
    """The ops of a step of full fine-tuning."""
    return _FullStep(shape, decision).made()


class _FullStep(StepOps):
    """Forward and backward of a full step, block by block."""

    def __init__(self, shape: Shape, decision: Full) -> None:
        num = shape.num_blocks
        order = plain_orders(num)["train"]
        assigned = assign_slots(order, [tuple(range(min(decision.num_slots, num)))] * num)
        visits = [
            # What a slot still holds when forward begins is what the optimizer has changed since.
            Visit(
                block=block,
                direction=direction,
                slot=slot,
                is_filled_for=is_filled_for or direction is Direction.FORWARD,
            )
            for (block, direction), (slot, is_filled_for) in zip(order, assigned, strict=True)
        ]
        super().__init__(shape, decision, visits)
        self.decision = decision
        self._delayed, self._recomputed = decision.delayed(num), decision.recomputed(num)
        self._ahead = decision.num_slots + decision.num_buffers  # visits that fills run ahead
        self._kept: dict[
            tuple[int, int], int
        ] = {}  # (block, micro-batch) -> op that kept its input
        self._gradients: dict[int, int] = {}  # block -> op
        self._updates: dict[int, list[int]] = {}  # block -> its UPDATEs
        self._stores: dict[int, list[int]] = {}
        self._num_chunks_passed = self._num_passed = self._num_staged = self._num_updated = 0

    def made(self) -> StepPlan:
        """The whole step."""
        self._update_delayed(self._ahead)
        self.fill_ahead(-1)
        for v, visit in enumerate(self.visits):
            if visit.direction is Direction.FORWARD:
                self._forward(v)
                self._update_delayed(v + self._ahead + 1)
            else:
                self._backward(v)
        return self.linked(self._previous())

    def is_loaded(self, v: int) -> bool:
        """New weights of the first blocks are still in RAM."""
        visit, fresh = self.visits[v], self.decision.fresh_blocks
        is_fresh = visit.direction is Direction.FORWARD and visit.block < fresh
        return super().is_loaded(v) and not is_fresh

    def written_before(self, v: int) -> list[int]:
        """A delayed update is over before the block's forward reads what it wrote."""
        visit = self.visits[v]
        if visit.direction is Direction.BACKWARD or visit.block not in self._delayed:
            return []
        return (self._stores if self.is_loaded(v) else self._updates)[visit.block]

    def _previous(self) -> dict[int, list[int]]:
        """What crosses steps: forward reads what the last step's optimizer wrote, a delayed one takes its gradient."""
        waits: dict[int, list[int]] = {}
        for v, upload in self.filled.items():
            visit = self.visits[v]
            if visit.direction is Direction.FORWARD and visit.block not in self._delayed:
                wrote = self._stores if self._loaded[v] else self._updates
                waits[(self._loaded[v] or [upload])[0]] = wrote[visit.block]
        for block in self._delayed:
            for update in self._updates[block]:
                waits[update] = [self._gradients[block]]
        return waits

    def _forward(self, v: int) -> None:
        block = self.visits[v].block
        self.fill_ahead(v - 1)
        for m in range(self.shape.num_micro_batches):
            cell = ("input", self._num_passed % NUM_INPUT_BUFFERS)
            self._num_passed += 1
            is_kept_here = self.decision.activations is Tier.DEVICE
            computed = self._compute(v, writes=None if is_kept_here else cell)
            if is_kept_here:
                continue
            kept = self._to_ram(v, block, computed)
            self.reads(cell, kept)
            self._kept[block, m] = kept
            if self.decision.activations is Tier.NVME:
                self._kept[block, m] = self._store(v, block, kept)

    def _compute(self, v: int, *, writes: Cell | None = None, after: Sequence[int] = ()) -> int:
        filled = [self.filled[v]] if v in self.filled else []
        op = self.add(Kind.COMPUTE, Lane.COMPUTE, v, after=[*filled, *after], writes=writes)
        self.reads(("slot", self.visits[v].slot), op)
        return op

    def _input_bytes(self, block: int) -> float:
        inner = 0.0 if block in self._recomputed else self.shape.inner_bytes_per_token
        return (self.shape.input_bytes_per_token + inner) * self.shape.micro_batch_tokens

    def _staging(self) -> Cell | None:
        """The next buffer between RAM and NVMe for activations; None where they stay in RAM."""
        if self.decision.activations is not Tier.NVME:
            return None
        self._num_staged += 1
        return ("staging", self._num_staged % NUM_STAGING_BUFFERS)

    def _to_ram(self, v: int, block: int, computed: int) -> int:
        return self.add(
            Kind.DOWNLOAD_INPUT,
            Lane.D2H,
            v,
            num_bytes=self._input_bytes(block),
            after=[computed],
            writes=self._staging(),
        )

    def _store(self, v: int, block: int, kept: int) -> int:
        num_bytes = self._input_bytes(block)
        op = self.add(Kind.STORE, Lane.NVME_WRITE, v, num_bytes=num_bytes, after=[kept])
        self.reads(("staging", self._num_staged % NUM_STAGING_BUFFERS), op)
        return op

    def _backward(self, v: int) -> None:
        block, num = self.visits[v].block, self.shape.num_micro_batches
        computed = -1
        for m in reversed(range(num)):
            brought = self._bring(v, block, m)
            if m == num // 2:  # behind half of the inputs: neither waits long for the other
                self.fill_ahead(v - 1)
            # The first micro-batch begins a gradient, which waits for the one that was there to be gone.
            gradient = ("gradient", v % NUM_GRADIENT_BUFFERS) if m == num - 1 else None
            computed = self._compute(v, writes=gradient, after=brought)
            if brought:
                self.reads(("input", self._num_passed % NUM_INPUT_BUFFERS), computed)
        is_delayed = block in self._delayed
        waiting = ("waiting", len(self._gradients) % self.decision.gradient_buffers)
        down = self.add(
            Kind.DOWNLOAD_GRADIENT,
            Lane.D2H,
            v,
            num_bytes=GRADIENT_BYTES * self.shape.block_parameters,
            after=[computed],
            writes=None if is_delayed else waiting,
        )
        self.reads(("gradient", v % NUM_GRADIENT_BUFFERS), down)
        self._gradients[block] = down
        if not is_delayed:
            self._update(v, block, after=[down])
            self.reads(waiting, self._updates[block][-1])

    def _bring(self, v: int, block: int, m: int) -> list[int]:
        """What forward kept of a micro-batch, back on the device."""
        if self.decision.activations is Tier.DEVICE:
            return []
        self._num_passed += 1
        num_bytes, after = self._input_bytes(block), [self._kept[block, m]]
        staging = self._staging()
        if staging is not None:
            after = [
                self.add(
                    Kind.FETCH, Lane.NVME_READ, v, num_bytes=num_bytes, after=after, writes=staging
                )
            ]
        cell = ("input", self._num_passed % NUM_INPUT_BUFFERS)
        op = self.add(Kind.UPLOAD_INPUT, Lane.H2D, v, num_bytes=num_bytes, after=after, writes=cell)
        if staging is not None:
            self.reads(staging, op)
        return [op]

    def _update_delayed(self, below: int) -> None:
        """Those of the delayed blocks below that number, and of one more: its states must not wait in the lane behind
        weights that wait for the update before it."""
        due = sorted(self._delayed)
        while self._num_updated < len(due):
            if self._num_updated and due[self._num_updated - 1] >= below:
                return
            block = due[self._num_updated]
            self._num_updated += 1
            self._update(block, block, after=[])  # forward visits are numbered as blocks are

    def _update(self, v: int, block: int, *, after: Sequence[int]) -> None:
        """A block's optimizer, chunk by chunk."""
        parameters = self.shape.block_parameters / self.decision.num_chunks
        for _ in range(self.decision.num_chunks):
            cell = ("chunk", self._num_chunks_passed % self.decision.chunk_buffers)
            self._num_chunks_passed += 1
            update = self._update_chunk(v, parameters, cell, after)
            self._updates.setdefault(block, []).append(update)
            self._stores.setdefault(block, []).append(
                self._store_chunk(v, parameters, cell, update)
            )

    def _update_chunk(self, v: int, parameters: float, cell: Cell, after: Sequence[int]) -> int:
        num_bytes = self.decision.state_bytes * parameters
        if self.decision.states is not Tier.NVME:
            return self.add(Kind.UPDATE, Lane.CPU, v, num_bytes=num_bytes, after=after, writes=cell)
        loaded = self.add(Kind.LOAD_STATE, Lane.NVME_READ, v, num_bytes=num_bytes, writes=cell)
        return self.add(Kind.UPDATE, Lane.CPU, v, num_bytes=num_bytes, after=[*after, loaded])

    def _store_chunk(self, v: int, parameters: float, cell: Cell, update: int) -> int:
        num_bytes, stored = self.decision.written_bytes * parameters, update
        if num_bytes:
            stored = self.add(
                Kind.STORE_STATE, Lane.NVME_WRITE, v, num_bytes=num_bytes, after=[update]
            )
        self.reads(cell, stored)
        return stored
