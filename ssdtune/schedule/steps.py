"""Steps of methods that the engine does not run yet, as plans: full fine-tuning, and forwards only.

From a plain shape (equal blocks) and decisions (what lives where, how many buffers) to a `StepPlan`; how long its ops
take is `outlook.py`. One rule orders the ops of a lane, since a transfer that waits holds up those behind it: an op
enters its lane once the op that frees its slot or buffer has entered another, what compute needs soonest first.

Full: forward visits 0 … N-1, backward N-1 … 0. When a block's backward is done its gradient goes to RAM, and its
optimizer states pass through in chunks: read, updated on the CPU, written with the new weights. This runs beside the
backward of the blocks before it; nothing is stale (LoHan, arXiv 2403.06504, "active gradient offloading"). A share of
the blocks may be updated in the next forward, just before they are needed (GreedySnake, arXiv 2512.17570).

Zeroth-order: the blocks in a circle, several perturbed forwards each time one is there (MeZO, arXiv 2305.17333, has 2;
FZOO, ICLR 2026, N + 1). Weights that change go back down; those of a low-rank window (LOZO, arXiv 2410.07698)
do not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from ssdtune.schedule.plan import Direction, Kind, Lane, Op, PlanError, StepPlan, Tier, Visit
from ssdtune.schedule.planner import assign_slots, plain_orders, spread

# Per micro-batch on the device, one in use while the next one comes or the last one goes.
NUM_INPUT_BUFFERS = 2
NUM_GRADIENT_BUFFERS = 2
NUM_STAGING_BUFFERS = 4  # of micro-batches in RAM, on their way from or to NVMe

GRADIENT_BYTES = 2.0  # per parameter: 16 bits

Cell = tuple[str, int]  # a slot or a buffer, by kind and number


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model of equal blocks, and its batch.

    Attributes:
        num_blocks: decoder layers.
        block_parameters: of one.
        num_tokens: in a step.
        num_micro_batches: that the tokens are cut into.
        flop_per_token: of one block's forward; backward is twice that.
        input_bytes_per_token: a block's input, kept for backward.
        inner_bytes_per_token: what backward needs besides, where the block is not recomputed.
        embedding_parameters: stay on the device; only memory counts them.
    """

    num_blocks: int
    block_parameters: int
    num_tokens: int
    num_micro_batches: int = 1
    flop_per_token: float
    input_bytes_per_token: float = 0.0
    inner_bytes_per_token: float = 0.0
    embedding_parameters: int = 0

    def __post_init__(self) -> None:
        """Raises PlanError for what can't be."""
        _check_counts(
            num_blocks=self.num_blocks,
            num_tokens=self.num_tokens,
            num_micro_batches=self.num_micro_batches,
        )

    @property
    def num_parameters(self) -> int:
        """Of all blocks."""
        return self.num_blocks * self.block_parameters

    @property
    def micro_batch_tokens(self) -> float:
        """Tokens of one micro-batch."""
        return self.num_tokens / self.num_micro_batches


def gpt_shape(
    num_blocks: int,
    hidden: int,
    num_tokens: int,
    *,
    num_micro_batches: int = 1,
    vocabulary: int = 0,
) -> Shape:
    """A GPT's: 12 h² parameters a block, 2 FLOP each and token (attention's own products, s / 6h more, are left out).

    Kept in 16 bits: the input (h) or, besides, the outputs of the four linear layers (3h, h, 4h, h), from which the
    rest is recomputed without a product of matrices.
    """
    parameters = 12 * hidden**2
    return Shape(
        num_blocks=num_blocks,
        block_parameters=parameters,
        num_tokens=num_tokens,
        num_micro_batches=num_micro_batches,
        flop_per_token=2.0 * parameters,
        input_bytes_per_token=2.0 * hidden,
        inner_bytes_per_token=2.0 * 9 * hidden,
        embedding_parameters=vocabulary * hidden,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Full:
    """What is decided for a step of full fine-tuning.

    Attributes:
        weights: their tier between visits, NVMe or RAM.
        states: the optimizer's tier, NVMe or RAM.
        activations: tier of what is kept for backward; DEVICE: it stays.
        recompute_share: of the blocks keep only their input and run forward again, spread evenly.
        delayed_share: of the blocks are updated in the next forward, spread evenly.
        fresh_blocks: the first so many keep their new weights in RAM for the forward that follows.
        num_slots: for weights on the device.
        num_buffers: for weights between NVMe and the device, in RAM.
        num_chunks: that a block's optimizer states are cut into.
        chunk_buffers: that these pass through, in RAM.
        gradient_buffers: blocks' gradients in RAM that wait for their update; delayed blocks have their own besides.
        weight_bits: of the weights that compute uses.
        state_bytes: per parameter: 12 are Adam's two moments and the weights, in 32 bits; 6 with 16 and 8 bits.
    """

    weights: Tier = Tier.NVME
    states: Tier = Tier.NVME
    activations: Tier = Tier.RAM
    recompute_share: float = 1.0
    delayed_share: float = 0.0
    fresh_blocks: int = 0
    num_slots: int = 2
    num_buffers: int = 2
    num_chunks: int = 4
    chunk_buffers: int = 4
    gradient_buffers: int = 4
    weight_bits: float = 16.0
    state_bytes: float = 12.0

    def __post_init__(self) -> None:
        """Raises PlanError for what can't be."""
        _check_counts(
            num_slots=self.num_slots,
            num_buffers=self.num_buffers,
            num_chunks=self.num_chunks,
            chunk_buffers=self.chunk_buffers,
            gradient_buffers=self.gradient_buffers,
        )
        _check_home(weights=self.weights, states=self.states)
        for name, share in (
            ("recompute_share", self.recompute_share),
            ("delayed_share", self.delayed_share),
        ):
            if not 0 <= share <= 1:
                raise PlanError(f"{name} is {share}; a share lies between 0 and 1")

    @property
    def weight_bytes(self) -> float:
        """Per parameter."""
        return self.weight_bits / 8

    @property
    def written_bytes(self) -> float:
        """Per parameter and step, by the optimizer to NVMe."""
        states = self.state_bytes if self.states is Tier.NVME else 0.0
        return states + (self.weight_bytes if self.weights is Tier.NVME else 0.0)

    def recomputed(self, num_blocks: int) -> frozenset[int]:
        """The blocks that recompute."""
        return share_of(self.recompute_share, num_blocks)

    def delayed(self, num_blocks: int) -> frozenset[int]:
        """The blocks whose update waits for the next forward."""
        return share_of(self.delayed_share, num_blocks)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ForwardOnly:
    """What is decided for a zeroth-order step.

    Attributes:
        weights: their tier between visits, NVMe or RAM.
        num_forwards: each time a block is there.
        writes_back: whether weights change in place and go back down; a low-rank window's do not.
        num_slots: for weights on the device: one comes, one computes, one goes.
        num_buffers: for weights between NVMe and the device, in RAM.
        weight_bits: as stored and moved.
    """

    weights: Tier = Tier.NVME
    num_forwards: int = 2
    writes_back: bool = False
    num_slots: int = 3
    num_buffers: int = 2
    weight_bits: float = 16.0

    def __post_init__(self) -> None:
        """Raises PlanError for what can't be."""
        _check_counts(
            num_forwards=self.num_forwards, num_slots=self.num_slots, num_buffers=self.num_buffers
        )
        _check_home(weights=self.weights)

    @property
    def weight_bytes(self) -> float:
        """Per parameter."""
        return self.weight_bits / 8


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise PlanError(f"{name} is {count}; a step needs at least one")


def _check_home(**tiers: Tier) -> None:
    for name, tier in tiers.items():
        if tier is Tier.DEVICE:
            raise PlanError(f"{name} can't stay on the device here: choose ram or nvme")


def share_of(share: float, num: int) -> frozenset[int]:
    """So many of the numbers below `num`, as even as whole numbers can be."""
    return frozenset(spread(range(num), round(share * num)))


def full_step(shape: Shape, decision: Full) -> StepPlan:
    """The ops of a step of full fine-tuning."""
    return _FullStep(shape, decision).made()


def forward_step(shape: Shape, decision: ForwardOnly) -> StepPlan:
    """The ops of a zeroth-order step."""
    return _ForwardStep(shape, decision).made()


class _Step:
    """Ops as they are made, who read each slot and buffer last, and the fills that run ahead."""

    def __init__(self, shape: Shape, decision: Full | ForwardOnly, visits: Sequence[Visit]) -> None:
        self.shape, self.visits = shape, visits
        self.weight_bytes = round(decision.weight_bytes * shape.block_parameters)
        self._tier, self._num_buffers = decision.weights, decision.num_buffers
        self._ops: list[Op] = []
        self._readers: dict[Cell, int] = {}
        self._first_writers: list[tuple[int, Cell]] = []
        self._fills = [v for v, visit in enumerate(visits) if visit.is_filled_for]
        self._loaded: dict[int, list[int]] = {}  # visit -> its LOAD
        self._num_uploaded = 0
        self._slot_user = self._users()
        self.filled: dict[int, int] = {}  # visit -> its UPLOAD

    def _users(self) -> dict[int, int]:
        """For each visit that is filled for: the visit that had its slot before; -1: none in this step."""
        last: dict[int, int] = {}
        users: dict[int, int] = {}
        for v, visit in enumerate(self.visits):
            users[v] = last.get(visit.slot, -1)
            last[visit.slot] = v
        return users

    def add(
        self,
        kind: Kind,
        lane: Lane,
        v: int,
        *,
        num_bytes: float = 0.0,
        after: Iterable[int] = (),
        writes: Cell | None = None,
    ) -> int:
        """The id of a new op of visit `v`; it also waits for the last reader of the cell that it writes."""
        op_id, visit, waits = len(self._ops), self.visits[v], list(after)
        if writes in self._readers:
            waits.append(self._readers[writes])
        elif writes is not None:
            self._first_writers.append((op_id, writes))
        self._ops.append(
            Op(
                id=op_id,
                kind=kind,
                lane=lane,
                visit=v,
                block=f"layers.{visit.block}",
                direction=visit.direction,
                num_bytes=round(num_bytes),
                after=tuple(waits),
            )
        )
        return op_id

    def reads(self, cell: Cell, op_id: int) -> None:
        """The op is the cell's last reader so far."""
        self._readers[cell] = op_id

    def fill_ahead(self, done: int) -> None:
        """Adds the fills whose slots and buffers are given free by ops that were added, visit `done`'s the last."""
        moved = True
        while moved:
            moved = self._load_next(done) or self._upload_next(done)

    def _load_next(self, done: int) -> bool:
        at = len(self._loaded)
        if at == len(self._fills) or at - self._num_uploaded >= self._num_buffers:
            return False
        v = self._fills[at]
        self._loaded[v] = []
        if self.is_loaded(v):
            self._loaded[v] = [
                self.add(
                    Kind.LOAD,
                    Lane.NVME_READ,
                    v,
                    num_bytes=self.weight_bytes,
                    after=self.written_before(v),
                    writes=("buffer", at % self._num_buffers),
                )
            ]
        return True

    def _upload_next(self, done: int) -> bool:
        at = self._num_uploaded
        if at == len(self._loaded) or self._slot_user[self._fills[at]] > done:
            return False
        v = self._fills[at]
        after = self._loaded[v] or self.written_before(v)
        self.filled[v] = self.add(
            Kind.UPLOAD,
            Lane.H2D,
            v,
            num_bytes=self.weight_bytes,
            after=after,
            writes=("slot", self.visits[v].slot),
        )
        if self._loaded[v]:
            self.reads(("buffer", at % self._num_buffers), self.filled[v])
        self._num_uploaded += 1
        return True

    def is_loaded(self, v: int) -> bool:
        """Whether the fill reads NVMe."""
        return self._tier is Tier.NVME

    def written_before(self, v: int) -> list[int]:
        """Ops of this step that write the weights which visit `v` reads."""
        return []

    def linked(self, previous: dict[int, list[int]]) -> StepPlan:
        """The step, first writers of a cell waiting for its last reader in the step before.

        previous: op -> further ops of the step before that it waits for."""
        waits: dict[int, list[int]] = {op: list(others) for op, others in previous.items()}
        for op, cell in self._first_writers:
            if cell in self._readers:
                waits.setdefault(op, []).append(self._readers[cell])
        for op, others in waits.items():
            self._ops[op] = dataclasses.replace(self._ops[op], after_previous=tuple(others))
        return StepPlan(visits=tuple(self.visits), ops=tuple(self._ops))


class _FullStep(_Step):
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


class _ForwardStep(_Step):
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
