"""The prediction of a run's peak memory, and the means to hold a process to it.

What torch frees does not all go back to the kernel: the C library's heap keeps holes. With the default settings of
glibc 2.36 they came to 25 % of the whole process (width 512, 4 x 512 tokens), growing over the first steps. A low
M_MMAP_THRESHOLD (`mallopt`) leaves none, but pages every activation in anew: 35 % more CPU time there. So `HeapKeeper`
gives holes back, by `malloc_trim`, only when the process holds more than was predicted: 2-6 % more CPU time where that
is so all the time, none where there is room. This is the one place where ssdtune touches the allocator.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
from collections.abc import Callable
from typing import Any

from torch import nn

from ssdtune.schedule.memory import (
    HOLES,
    Fixed,
    Footprint,
    Passes,
    Peak,
    predict_peak_of,
)
from ssdtune.schedule.plan import Plan
from ssdtune.swap.inputs import staging_bytes
from ssdtune.visit.base import base_of
from ssdtune.visit.libraries import library_bytes
from ssdtune.visit.streamer import Streamer

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def predict(
    model: Any,
    footprint: Footprint,
    passes: Passes,
    *,
    base_bytes: int,
    num_states: int = 2,
    plan: Plan | None = None,
) -> Peak:
    """The peak of a run's steps, under the autocast of the moment.

    Args:
        model: a streamed model, adapters and all.
        footprint: what one micro-batch of the longest shape that will come takes (`rehearsal.rehearse`).
        passes: of each block.
        base_bytes: what the process held before the model was opened (`settled_bytes`).
        num_states: the optimizer's states per parameter, in its dtype; 2 for Adam.
        plan: another than the one that is carried out now.
    """
    streamer: Streamer = base_of(model).ssdtune
    plan = streamer.engine.plan if plan is None else plan
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    fixed = Fixed(
        base_bytes=base_bytes,
        resident_bytes=_resident_bytes(model, streamer),
        trained_bytes=trained,
        gradient_bytes=trained,
        optimizer_bytes=num_states * trained,
        staging_bytes=staging_bytes(plan.block_inputs),
        library_bytes=library_bytes(
            {w.placeholder.dtype for w in streamer.weights if w.placeholder is not None},
            lengths_vary=passes.lengths_vary,
        ),
    )
    return predict_peak_of(plan, footprint, fixed, passes)


def resident_set_bytes() -> int:
    """Bytes of RAM that this process holds now."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * PAGE_BYTES


def settled_bytes() -> int:
    """The same once what is free is given back: unreachable objects, and holes that the C library's heap keeps.

    What a run begins with: its own tensors will fill such holes, so that a base with holes in it counts them twice.
    Under another C library than glibc the heap stays as it is.
    """
    gc.collect()
    gc.collect()  # what the first pass finalizes (a streamed model's greenlets) lets go of its slots in a second
    trim = _trimmer()
    if trim is not None:
        trim()
    return resident_set_bytes()


def _resident_bytes(model: nn.Module, streamer: Streamer) -> int:
    """Frozen parameters and buffers that are no placeholders."""
    streamed = {id(w.placeholder) for w in streamer.weights}
    tensors = itertools.chain(model.parameters(), model.buffers())
    return sum(t.nbytes for t in tensors if id(t) not in streamed and not t.requires_grad)


# ---- holding the process to it -------------------------------------------------------------------------------------


class HeapKeeper:
    """Gives holes in the C library's heap back to the kernel when the process holds more than `limit_bytes`.

    Called before each micro-batch's pass through a block. Costs one read of /proc/self/statm, and where the limit is
    passed one `malloc_trim`, after which the next pass pages its workspace in anew.
    """

    def __init__(
        self,
        limit_bytes: int,
        *,
        held: Callable[[], int] = resident_set_bytes,
        trim: Callable[[], None] | None = None,
    ) -> None:
        self.limit_bytes, self.num_trims = limit_bytes, 0
        self._held, self._trim = held, trim or _trimmer()

    def __call__(self) -> None:
        """Trims if need be."""
        if self._trim is not None and self._held() > self.limit_bytes:
            self._trim()
            self.num_trims += 1


def hold_to(model: Any, peak: Peak) -> HeapKeeper:
    """From now on the streamed model's passes keep the heap to the predicted peak; for runs whose RAM is short."""
    keeper = HeapKeeper(peak.ram_bytes - peak.ram.get(HOLES, 0) // 2)
    base_of(model).ssdtune.before_pass = keeper
    return keeper


def _trimmer() -> Callable[[], None] | None:
    """glibc's `malloc_trim(0)`; None under another C library."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return None if trim is None else lambda: trim(0)
