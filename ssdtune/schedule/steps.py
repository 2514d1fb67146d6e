"""Ops of a step as they are made, for a coarse look at machines and methods without a plan for the engine.

From a plain shape (equal blocks) and decisions (`decisions.py`) to a `StepPlan`; how long its ops take is `outlook.py`.
One rule orders the ops of a lane, since a transfer that waits holds up those behind it: an op enters its lane once the
op that frees its slot or buffer has entered another, what compute needs soonest first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ssdtune.schedule.decisions import ForwardOnly, Full, Shape
from ssdtune.schedule.plan import Kind, Lane, Op, StepPlan, Tier, Visit

NUM_STAGING_BUFFERS = 4  # of micro-batches in RAM, on their way from or to NVMe

Cell = tuple[str, int]  # a slot or a buffer, by kind and number


class StepOps:
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
            self._ops[op] = self._ops[op]._replace(after_previous=tuple(others))
        return StepPlan(visits=tuple(self.visits), ops=tuple(self._ops))
