"""What one recipe names, read by itself: no slot, no plan, no walk ahead."""

from __future__ import annotations

import torch

from ssdtune.swap.readers import ReaderPool
from ssdtune.swap.recipe import BlockRecipe
from ssdtune.swap.storage import aligned_bytes


def read_tensors(
    recipe: BlockRecipe,
    pool: ReaderPool,
    *,
    timeout_s: float,
    buffer: torch.Tensor | None = None,
    slot: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """The recipe's tensors in its order; waits for them. Bytes that have a checksum are checked in RAM, before any is
    decoded.

    buffer: for the bytes of the files, uint8 in RAM, `recipe.file_bytes` at least, aligned as the pool's storage wants
    it; None: fresh memory. slot: for what is copied or decoded out of it, uint8, `recipe.slot_bytes` at least, on the
    device that wants it; None: fresh memory in RAM for each tensor. A recipe without copies has views of the buffer,
    where a memory-mapped load has them. Raises StorageError, or StorageTimeout after `timeout_s`.
    """
    memory = aligned_bytes(max(recipe.file_bytes, 1)) if buffer is None else buffer
    read = memory[: recipe.file_bytes]
    pool.submit(recipe.extents, read, label=recipe.name).wait(timeout_s)
    recipe.check(read)
    if not recipe.is_staged:
        return [view.of(read) for view in recipe.tensors]
    if slot is None:
        targets = [torch.empty(view.shape, dtype=view.dtype) for view in recipe.tensors]
    else:
        targets = [view.of(slot) for view in recipe.tensors]
        read = read.to(slot.device)
    for copy in recipe.copies:
        copy.run(read, targets)
    return targets
