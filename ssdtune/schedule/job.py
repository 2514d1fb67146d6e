"""A training job as the planner sees it: blocks, their order, their work, bytes. Plain values, kept as JSON.

Whoever has read a model's config and headers once (`ssdtune/jobs.py`) need not do so again to plan for another budget
or another machine.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ssdtune.schedule.cost import Moves, Operator, StepWork, Work, missed_steps
from ssdtune.schedule.memory import Fixed, Footprint
from ssdtune.schedule.plan import BlockShape, Direction
from ssdtune.schedule.saved_plan import blocks_from


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A data set in numbers.

    num: rows. mean_tokens: of a row, padding left out. padded_tokens: of a row as its micro-batch pads it, on average.
    longest: tokens. trained_share: of the tokens, those in the loss. is_estimate: from the first rows, not all; or
    there is no data at all and every row is `longest`.
    """

    num: int
    mean_tokens: float
    padded_tokens: float
    longest: int
    trained_share: float
    is_estimate: bool


def mean_padded(lengths: Sequence[int], rows_at_once: int) -> float:
    """Tokens of a row as its micro-batch pads it, on average over micro-batches. lengths: tokens, of one row or more."""
    padded = [max(lengths[i : i + rows_at_once]) for i in range(0, len(lengths), rows_at_once)]
    return sum(padded) / len(padded)


# That stand for all rows of several data sets: of one row in so many there is still one.
MIXED_ROWS = 10_000


def in_proportion(lengths: Sequence[Sequence[int]], nums: Sequence[float]) -> list[int]:
    """Lengths of rows of several data sets, of each as many as is its share of all rows, one data set after the other.

    lengths: tokens of the rows that were looked at, of each data set. nums: rows that each has.
    """
    share = min(1.0, MIXED_ROWS / sum(nums))
    picked: list[int] = []
    for own, num in zip(lengths, nums, strict=True):
        picks = max(1, round(share * num))
        stride = max(1, len(own) // picks)
        picked += [own[i * stride % len(own)] for i in range(picks)]
    return picked


# What errors of readings are to: the source's weights, or, where there is a packed file alone, what all of it says.
WEIGHTS, ALL_BITS = "the weights", "all bits of the file"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A way to read the model's weights.

    Attributes:
        quantization: the key's value that stands for it. bits: of a weight, scales left out; an average where it
            `is_mixed`: where blocks are read in widths of their own.
        blocks: as they are read then.
        packed_bytes: of the file that is packed for it; 0: none. folder: where that is, or would be. is_there: whether it
            is, for whoever has looked.
        is_exact: whether what is packed has all the weights' bits. label: what a check of it is recorded as, where that is
            not its bits.
        error: relative squared error, by a sample, to WEIGHTS, or ALL_BITS where nothing is packed for it; None: none, or
            not known.
    """

    quantization: str
    bits: float
    blocks: tuple[BlockShape, ...]
    packed_bytes: int = 0
    folder: str = ""
    is_there: bool = False
    is_mixed: bool = False
    is_exact: bool = False
    label: str = ""
    error: float | None = None

    @property
    def missing_bytes(self) -> int:
        """Of the file, where it is not there yet."""
        return 0 if self.is_there else self.packed_bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Directions:
    """Random directions of a zeroth-order step, where their number may be chosen.

    num: how many there are. For each one more: `variants` of the weights, `memory` where computing is, by what it is for,
    and block -> work of its variants (`shifts`) and of each update (`updates`).
    """

    num: int
    variants: int
    memory: Mapping[str, int]
    shifts: Mapping[int, Work]
    updates: Mapping[int, Work]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is trained on what.

    Attributes:
        model: its name. architecture: its class. dtype: of most weights. num_parameters, num_trained: counts.
        blocks, orders: as a `choices.Request` has them.
        work: of one micro-batch of rows of `data.padded_tokens`; None where it can't be counted.
        footprint: of one micro-batch of the longest rows.
        fixed: bytes that do not depend on the batch; its `base_bytes` is an assumption.
        rows_at_once: of one micro-batch. micro_batches: of one optimizer step.
        num_steps: of the run; None: as many as the data have.
        num_epochs: over the data.
        chunk_tokens: positions whose logits exist at once.
        method: in words. data: the rows.
        kind: of step, "train" or "forward". variants: of the weights that each micro-batch passes.
        fold_steps: steps from one working copy of the weights to the next; 0: there is none.
        readings: in how many bits the weights may be read, the most first, where that is to be chosen.
        packed_bytes: of the packed file that a run makes first; 0: of none. packed_folder: where. source_bytes: of the
            files that it is made from.
        visits_vary: as `choices.Request` has it.
        file_dtype: of most bytes of the weights in the files, as safetensors names it; compute may go by another, `dtype`.
        lossless_ratio: bytes of the weights over those of a lossless packing, measured; None: it was not.
        directions: of a zeroth-order step; None: their number is no choice.
    """

    model: str
    architecture: str
    dtype: str
    num_parameters: int
    num_trained: int
    blocks: tuple[BlockShape, ...]
    orders: Mapping[str, Sequence[tuple[int, Direction]]]
    work: StepWork | None
    footprint: Footprint
    fixed: Fixed
    rows_at_once: int
    micro_batches: int
    num_steps: int | None
    num_epochs: float
    chunk_tokens: int
    method: str
    data: Rows
    kind: str = "train"
    variants: int = 1
    fold_steps: int = 0
    readings: tuple[Reading, ...] = ()
    packed_bytes: int = 0
    packed_folder: str = ""
    source_bytes: int = 0
    visits_vary: bool = False
    file_dtype: str = ""
    lossless_ratio: float | None = None
    directions: Directions | None = None

    def passes(self, micro_batches: int) -> int:
        """Micro-batches that pass a block in one visit."""
        return micro_batches * self.variants

    @property
    def kept_bytes(self) -> int:
        """Inputs of blocks that a micro-batch keeps for a backward."""
        return self.footprint.kept_bytes if self.kind == "train" else 0

    def tokens(self, micro_batches: int) -> float:
        """Of one step of so many micro-batches, padding left out."""
        return micro_batches * self.rows_at_once * self.data.mean_tokens

    def steps(self, micro_batches: int) -> int:
        """Of the run with so many micro-batches a step; a limit in steps is for the job's own number of them."""
        if self.num_steps is not None:
            return max(1, round(self.num_steps * self.micro_batches / micro_batches))
        return max(
            1, -(-round(self.num_epochs * self.data.num) // (micro_batches * self.rows_at_once))
        )

    def missed_steps(self, micro_batches: int) -> float:
        """Of a block when it comes from the drive, on average over the run; of low rank, whole windows."""
        moves = None if self.work is None else self.work.moves
        window = 1 if moves is None else moves.window
        return missed_steps(self.steps(micro_batches), self.fold_steps, window)

    def folded_every(self, micro_batches: int) -> int:
        """Steps from one time that a block goes back to the working copy to the next; 0: the run is too short for one, or
        makes none."""
        return self.fold_steps if self.fold_steps < self.steps(micro_batches) else 0

    def to_json(self) -> str:
        """All of it; `job_from` gives an equal one."""
        works = _Numbered()
        passes: dict[str, list[Any]] = {}
        if self.work is not None:
            for kind, visits in self.work.passes.items():
                passes[kind] = [
                    [block, direction, [works.place(each) for each in each_turn]]
                    for (block, direction), each_turn in visits.items()
                ]
            work = {
                "passes": passes,
                "between": works.place(self.work.between),
                "behind": [
                    [block, [works.place(each) for each in each_turn]]
                    for block, each_turn in self.work.behind.items()
                ],
                "dtype": self.work.dtype,
                "autocast": self.work.autocast,
                "moves": works.moves(self.work.moves),
            }
        else:
            work = None
        plain = dataclasses.asdict(dataclasses.replace(self, work=None, directions=None))
        directions = works.directions(self.directions)
        return json.dumps({**plain, "work": work, "directions": directions, "works": works.listed})


class _Numbered:
    """Works once each: the layers of a model do the same."""

    def __init__(self) -> None:
        self.listed: list[list[Any]] = []
        self._places: dict[Any, int] = {}

    def place(self, work: Work) -> int:
        """Of an equal work in the list, at its end if it is new."""
        calls = work.num_autograd_calls
        key = (frozenset(work.operators.items()), calls)
        place = self._places.setdefault(key, len(self.listed))
        if place == len(self.listed):
            self.listed.append([[[*key, n] for key, n in work.operators.items()], calls])
        return place

    def moves(self, moves: Moves | None) -> dict[str, Any] | None:
        """Of zeroth-order steps, by places."""
        if moves is None:
            return None
        return {
            "shifts": self._by_block(moves.shifts),
            "updates": self._by_block(moves.updates),
            "num_missed": moves.num_missed,
            "window": moves.window,
            "anew": sorted(moves.anew),
            "fold_steps": moves.fold_steps,
        }

    def directions(self, directions: Directions | None) -> dict[str, Any] | None:
        """By places."""
        if directions is None:
            return None
        return {
            "num": directions.num,
            "variants": directions.variants,
            "memory": dict(directions.memory),
            "shifts": self._by_block(directions.shifts),
            "updates": self._by_block(directions.updates),
        }

    def _by_block(self, works: Mapping[int, Work]) -> list[list[int]]:
        return [[block, self.place(work)] for block, work in works.items()]


def job_from(text: str) -> Job:
    """Reads what `Job.to_json` wrote. Raises ValueError, KeyError or TypeError for anything else."""
    raw: dict[str, Any] = json.loads(text)
    listed = [_work_from(*each) for each in raw.pop("works")]
    work: dict[str, Any] | None = raw.pop("work")
    made: dict[str, Any] = {
        **raw,
        "blocks": blocks_from(raw["blocks"]),
        "readings": tuple(map(_reading_from, raw["readings"])),
        "orders": {
            kind: [(block, Direction(direction)) for block, direction in order]
            for kind, order in raw["orders"].items()
        },
        "footprint": _footprint_from(raw["footprint"]),
        "fixed": Fixed(**raw["fixed"]),
        "data": Rows(**raw["data"]),
        "work": None if work is None else _step_work_from(work, listed),
        "directions": _directions_from(raw["directions"], listed),
    }
    return Job(**made)


def _work_from(operators: list[Any], calls: Any) -> Work:
    counted = {
        Operator(str(kind), float(size), float(num_bytes), int(num_rows)): int(n)
        for kind, size, num_bytes, num_rows, n in operators
    }
    return Work(counted, int(calls))


def _step_work_from(raw: dict[str, Any], listed: list[Work]) -> StepWork:
    """listed: all works of the job, which others name by their place."""
    return StepWork(
        passes={
            str(kind): {
                (int(block), Direction(direction)): [listed[int(i)] for i in each_turn]
                for block, direction, each_turn in visits
            }
            for kind, visits in raw["passes"].items()
        },
        between=listed[int(raw["between"])],
        behind={
            int(block): [listed[int(i)] for i in each_turn] for block, each_turn in raw["behind"]
        },
        dtype=str(raw["dtype"]),
        autocast=raw["autocast"],
        moves=_moves_from(raw["moves"], listed),
    )


def _reading_from(raw: dict[str, Any]) -> Reading:
    typed: dict[str, Any] = {**raw, "blocks": blocks_from(raw["blocks"])}
    return Reading(**typed)


def _moves_from(raw: dict[str, Any] | None, listed: Sequence[Work]) -> Moves | None:
    if raw is None:
        return None
    return Moves(
        shifts=_by_block_from(raw["shifts"], listed),
        updates=_by_block_from(raw["updates"], listed),
        num_missed=float(raw["num_missed"]),
        window=int(raw["window"]),
        anew=frozenset(map(int, raw["anew"])),
        fold_steps=int(raw["fold_steps"]),
    )


def _directions_from(raw: dict[str, Any] | None, listed: Sequence[Work]) -> Directions | None:
    if raw is None:
        return None
    return Directions(
        num=int(raw["num"]),
        variants=int(raw["variants"]),
        memory={str(name): int(n) for name, n in raw["memory"].items()},
        shifts=_by_block_from(raw["shifts"], listed),
        updates=_by_block_from(raw["updates"], listed),
    )


def _by_block_from(raw: Sequence[Any], listed: Sequence[Work]) -> dict[int, Work]:
    return {int(block): listed[int(i)] for block, i in raw}


def _footprint_from(raw: dict[str, Any]) -> Footprint:
    typed: dict[str, Any] = {**raw, "activation_bytes": tuple(raw["activation_bytes"])}
    return Footprint(**typed)
