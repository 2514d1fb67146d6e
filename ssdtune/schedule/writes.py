"""What a run writes to the drive, by what it is for, and how much of that it may.

A drive is rated for so many bytes in its life. What a run writes: block inputs and activations that wait for backward, in
every step; a working copy of the weights that blocks go back to; checkpoints; a packed model that is made first.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from ssdtune.schedule.memory import COPY, INPUTS, PACKED, STORED
from ssdtune.sizes import format_size

SAVES = 20  # checkpoints of a run, where nobody says how many
SAVED_COPIES = 3  # adapters, and the optimizer's two states
CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Writes:
    """Of one run.

    Attributes:
        num_steps: of the run.
        trained_bytes: parameters that a checkpoint holds.
        every: steps from one time that a block goes back to the working copy to the next; 0: there is none.
        copy_bytes: of the working copy.
        packed_bytes: of the packed model that is made first; 0: of none.
        most: bytes that all of it may write (`offload.max_writes`); None: any number.
    """

    num_steps: int
    trained_bytes: int
    every: int = 0
    copy_bytes: int = 0
    packed_bytes: int = 0
    most: int | None = None

    def parts(self, waiting: Mapping[str, int], back_bytes: float = 0.0) -> dict[str, float]:
        """Bytes of the whole run, by what they are for.

        waiting: what each step puts on the drive until its backward, as `Peak.nvme` has it. back_bytes: to the working
        copy in each step from the one on that follows its making.
        """
        parts = {name: float(self.num_steps * waiting.get(name, 0)) for name in (INPUTS, STORED)}
        if self.every and back_bytes:
            parts[COPY] = self.copy_bytes + self._num_back * back_bytes
        parts |= self._once
        return {name: num_bytes for name, num_bytes in parts.items() if num_bytes}

    @property
    def step_bytes(self) -> int | None:
        """Bytes that one step may write; None: any number."""
        if self.most is None:
            return None
        left, num_steps = self.most - sum(self._once.values()), self.num_steps
        if self.every:
            left, num_steps = left - self.copy_bytes, self._num_back
        return max(int(left // num_steps), 0)

    def excess(self, parts: Mapping[str, float]) -> str:
        """What is wrong with a run that writes these; empty where nothing is."""
        total = sum(parts.values())
        if self.most is None or total <= self.most:
            return ""
        told = ", ".join(f"{name} {format_size(round(n))}" for name, n in parts.items())
        return (
            f"{format_size(round(total))} of writes to the drive in {self.num_steps:,} steps ({told}), "
            f"offload.max_writes is {format_size(self.most)}"
        )

    def fewest_between(self, num_bytes: float) -> int | None:
        """The least `every` that is allowed where so many bytes of blocks go back; None: not even the copy is.

        Made after n of S steps, and from then on a share 1/n of them in each: copy + (S - 1 - n) / n * bytes.
        """
        assert self.most is not None
        left, num_steps = self.most - sum(self._once.values()) - self.copy_bytes, self.num_steps - 1
        if left < 0:
            return None
        fewest = math.ceil(num_steps * num_bytes / (left + num_bytes))
        return fewest if fewest < num_steps else None

    def going_back(self, total: float) -> float:
        """Bytes of the blocks that go back in a run that writes so many bytes in all, nothing of them in each step besides."""
        back = total - sum(self._once.values()) - self.copy_bytes
        return back / self._num_back * self.every

    @property
    def _num_back(self) -> int:
        """Steps in which blocks go back: those after the one that makes the copy."""
        return max(self.num_steps - 1 - self.every, 1)

    @property
    def _once(self) -> dict[str, float]:
        saved = min(SAVES, self.num_steps) * SAVED_COPIES * self.trained_bytes
        return {CHECKPOINTS: float(saved), PACKED: float(self.packed_bytes)}


def as_key(num_bytes: float) -> str:
    """So many bytes as a key may say them, never fewer."""
    return f"{-(-round(num_bytes) // 10**6)}MB"
