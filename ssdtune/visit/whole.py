"""Parameters read whole, one at a time, of a model that has no slots: what stays outside of blocks, and weights that
are only looked at."""

from __future__ import annotations

import torch

from ssdtune.swap.readers import ReaderPool
from ssdtune.swap.storage import aligned_bytes
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
        memory = aligned_bytes(max(recipe.file_bytes, 1))
        self._pool.submit(recipe.extents, memory, label=recipe.name).wait(self._timeout_s)
        view = recipe.tensors[0]
        if not recipe.is_staged:
            return view.of(memory)  # aligned as in the file, as a memory-mapped load has it
        out = torch.empty(view.shape, dtype=view.dtype)
        for copy in recipe.copies:
            copy.run(memory, [out])
        return out
