"""A packed model beside its source: both pass block by block in one run, and what they differ by is measured there.

The source is streamed; of the packed model one block is in memory at a time, which stands in for the source's while the
rows of the second variant pass (`visit/streamer.py: Weights`). Hidden states of both wait side by side.
"""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ssdtune.fidelity.text import Text
from ssdtune.packing.layout import PackError
from ssdtune.packing.squares import Squares
from ssdtune.schedule.plan import Budgets
from ssdtune.swap.readers import ReaderPool
from ssdtune.swap.reading import read_tensors
from ssdtune.swap.storage import Storage, aligned_bytes
from ssdtune.visit.build import MetaModel
from ssdtune.visit.draft import Options, draft
from ssdtune.visit.streamer import Streamer

SOURCE, PACKED = 0, 1  # variants of the weights
READ_TIMEOUT_S = 600.0
_row: contextvars.ContextVar[tuple[int, int]] = contextvars.ContextVar("variant and row")


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """weights: of each block, by name. outputs: of each block that hands on hidden states. losses: of each variant, mean
    of each row."""

    weights: Mapping[str, Squares]
    outputs: Mapping[str, Squares]
    losses: tuple[Sequence[float], Sequence[float]]


def measure(model: Any, packed: MetaModel, text: Text, storage: Storage) -> Measured:
    """Runs all rows through both models in one pass over the blocks.

    model: the source, streamed. packed: the packed model, built without weights. storage: reads the packed files. Memory:
    the streamed model's, one block of the packed model and its bytes, and the hidden states of all rows, twice.
    Raises PackError where the two are no pair.
    """
    streamer: Streamer = model.ssdtune
    outputs = Outputs(streamer)
    rows = text.batches_for(model)
    with StandIn(streamer, packed, storage) as stand_in, outputs.watched(), torch.no_grad():
        model.eval()
        streamer.method = stand_in
        try:
            found = streamer.run(
                [
                    partial(_loss, model, v, i, row)
                    for v in (SOURCE, PACKED)
                    for i, row in enumerate(rows)
                ],
                variants=[v for v in (SOURCE, PACKED) for _ in rows],
            )
        finally:
            streamer.method = None
    return Measured(stand_in.errors, outputs.errors, (found[: len(rows)], found[len(rows) :]))


def _loss(model: Any, variant: int, number: int, row: Mapping[str, Any]) -> float:
    """Runs in a context of its own, which tells hooks whose hidden states they see."""
    _row.set((variant, number))
    return float(model(**row).loss)


class StandIn:
    """The packed model's weights, a block at a time, in memory of their own. Use as a context."""

    trains_blocks = False

    def __init__(self, streamer: Streamer, packed: MetaModel, storage: Storage) -> None:
        self._engine = streamer.engine
        device = self._engine.slots.device
        options = Options(device=device, budgets=Budgets(ram_bytes=0), storage=storage)
        self._recipes = draft(packed, options).recipes
        self._check_pair(streamer)
        self._names = streamer.blocks
        self._pool = ReaderPool(storage)
        self._bytes = aligned_bytes(max(recipe.file_bytes for recipe in self._recipes))
        staged = [recipe.slot_bytes for recipe in self._recipes if recipe.is_staged]
        self._memory = aligned_bytes(max(staged, default=1)).to(device)
        self.errors: dict[str, Squares] = {}

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.close()

    def refresh(self, block: int, slot: int) -> None:
        """The source stays as it is."""

    def read(self, block: int, index: int) -> torch.Tensor:
        """The source's."""
        return self._engine.read_stored(block, index)

    def outside(self, variant: int | None) -> None:
        """What lies outside of blocks is not packed: it is the same in both."""

    def stand_in(
        self, block: int, tensors: Sequence[torch.Tensor], variant: int | None
    ) -> Sequence[torch.Tensor]:
        """The packed block's tensors for PACKED, compared with the source's the first time."""
        if variant != PACKED:
            return tensors
        found = read_tensors(
            self._recipes[block],
            self._pool,
            timeout_s=READ_TIMEOUT_S,
            buffer=self._bytes,
            slot=self._memory,
        )
        if self._names[block] not in self.errors:
            squares = self.errors[self._names[block]] = Squares()
            for one, wanted in zip(found, tensors, strict=True):
                squares.add(one, wanted)
        return found

    def _check_pair(self, streamer: Streamer) -> None:
        """Raises PackError where blocks, names or shapes differ."""
        ours = [[(t.name, t.shape) for t in recipe.tensors] for recipe in self._recipes]
        theirs = [
            [(t.name, t.shape) for t in recipe.tensors] for recipe in streamer.open_engine.recipes
        ]
        if ours != theirs:
            raise PackError(
                "--check: the packed model's blocks are not those of the model it is to be compared with.\n"
                "Give the model that it was packed from."
            )


class Outputs:
    """What blocks hand on, the source's beside the packed model's."""

    def __init__(self, streamer: Streamer) -> None:
        self._streamer = streamer
        self.errors: dict[str, Squares] = {}
        self._waiting: dict[tuple[str, int], tuple[int, torch.Tensor]] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Compares what comes out of each block while the `with` block runs."""
        with ExitStack() as hooks:
            for meeting in self._streamer.meetings:
                name = self._streamer.blocks[meeting.block]
                hook = meeting.module.register_forward_hook(partial(self._compare, name))
                hooks.callback(hook.remove)
            yield

    def _compare(self, name: str, module: Any, args: Any, output: Any) -> None:
        hidden = next((x for x in pytree.tree_leaves(output) if type(x) is torch.Tensor), None)
        if hidden is None or not hidden.is_floating_point():
            return  # logits that are not computed
        variant, number = _row.get()
        other = self._waiting.pop((name, number), None)
        if other is None or other[0] == variant:
            self._waiting[name, number] = variant, hidden
            return
        pair = {variant: hidden, other[0]: other[1]}
        self.errors.setdefault(name, Squares()).add(pair[PACKED], pair[SOURCE])
