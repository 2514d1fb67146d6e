"""Slots and buffers: all the memory that weights pass through, allocated once, exactly as planned."""

from __future__ import annotations

import torch

from ssdtune.schedule.plan import Plan
from ssdtune.swap.recipe import BlockRecipe
from ssdtune.swap.storage import aligned_bytes


class Slots:
    """The plan's slots and buffers on a device, and the tensors of a block inside a slot (made once, reused)."""

    def __init__(self, plan: Plan, recipes: tuple[BlockRecipe, ...], device: torch.device) -> None:
        pin = device.type != "cpu"
        self.device = device
        self.recipes = recipes
        self.memory = [self._slot(n) for n in plan.slots]
        self.buffers = [aligned_bytes(n, pin=pin) for n in plan.buffers]
        self._tensors: dict[tuple[int, int], list[torch.Tensor]] = {}

    def _slot(self, num_bytes: int) -> torch.Tensor:
        if self.device.type == "cpu":
            return aligned_bytes(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def tensors(self, block: int, slot: int) -> list[torch.Tensor]:
        """The block's tensors in that slot, in the recipe's order; the same objects every time."""
        key = (block, slot)
        if key not in self._tensors:
            memory = self.memory[slot]
            self._tensors[key] = [view.of(memory) for view in self.recipes[block].tensors]
        return self._tensors[key]

    def unpack(self, block: int, buffer: torch.Tensor, slot: int) -> None:
        """Copies a block from a filled buffer into a slot, on the current stream where there is one."""
        targets = self.tensors(block, slot)
        with torch.no_grad():
            for copy in self.recipes[block].copies:
                copy.run(buffer, targets)
