"""Parameters read whole, one at a time, of a model that has no slots: what stays outside of blocks, and weights that
are only looked at."""

from __future__ import annotations

import torch

from ssdtune.swap.readers import ReaderPool
from ssdtune.swap.reading import read_tensors
from ssdtune.visit.build import MetaModel
from ssdtune.visit.placement import Placements
from ssdtune.visit.recipes import make_recipe


class WholeReader:
    """Of one model. alignment: of reads, as the pool's storage has it; timeout_s: for one parameter."""

    def __init__(
        self,
        meta: MetaModel,
        placements: Placements,
        pool: ReaderPool,
        *,
        alignment: int,
        timeout_s: float,
    ) -> None:
        self._meta, self._placements, self._pool = meta, placements, pool
        self._alignment, self._timeout_s = alignment, timeout_s
        first: dict[int, str] = {}
        state = meta.model.state_dict(keep_vars=True)
        self._targets = {name: first.setdefault(id(tensor), name) for name, tensor in state.items()}

    def read(self, name: str) -> torch.Tensor:
        """The parameter or buffer of that name, tied ones under any of theirs, in memory of its own on the CPU.

        Raises KeyError for a name that the model or its files do not have.
        """
        target = self._targets[name]
        recipe = make_recipe(
            target,
            [self._placements[target]],
            self._meta.checkpoint.tensors,
            alignment=self._alignment,
            on_device=False,
        )
        (found,) = read_tensors(recipe, self._pool, timeout_s=self._timeout_s)
        return found
