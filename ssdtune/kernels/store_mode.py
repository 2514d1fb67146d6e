"""Whether large outputs of native code are stored past the caches, as memcpy does it, or through them: measured.

Past the caches, what is overwritten need not be read first, and what others have there stays; but a kernel that computes
long for each line may be slower so. It depends on kernel and processor. So each kernel's first large output decides for
as long as the process lives: its first parts are decoded by turns in either way, in a few milliseconds. The bits are the
same. $SSDTUNE_STORE_MODE, `streamed` or `plain`, decides for all kernels instead.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import threading
from collections.abc import Callable
from time import thread_time

from ssdtune.errors import SSDTuneError

VARIABLE = "SSDTUNE_STORE_MODE"
WAYS = {"streamed": True, "plain": False}  # and whether they go past the caches
MOST_PARTS = 16  # of a job, that are timed: 8 MB of bfloat16
LEAST_PARTS = 4
# What goes through the caches is still in them when a part's time is over, and goes to memory at the expense of others: of
# 4 bits, parts took the same time either way, but 256 MB 1.35 times as long through the caches (Zen 4, 32 MB of them).
LATE = 1.2


class StoreModeError(SSDTuneError):
    """SSDTUNE_STORE_MODE says nothing that is known."""


_found: dict[tuple[str, str, int], bool] = {}  # by kernel, instruction set, dtype of the output
_finding = threading.Lock()  # threads that time at once would time each other


def found(suffix: str, dtype: int) -> dict[str, bool]:
    """By kernel, what was found so far for an instruction set and a dtype of outputs, as jobs have it: whether past the
    caches is faster."""
    return {kernel: is_past for (kernel, *of), is_past in _found.items() if of == [suffix, dtype]}


def are_past_caches(
    kernel: str, suffix: str, function: Callable[..., None], job: ctypes.Structure
) -> bool:
    """For this job, whose output may be stored either way. Its first parts may be decoded already when it returns.

    kernel: a name for the code that runs, one for each that may behave differently. function: the native one. job: as
    all jobs of decoders, with n, part, next and is_streamed. Raises StoreModeError."""
    asked = os.environ.get(VARIABLE, "")
    if asked:
        if asked not in WAYS:
            raise StoreModeError(
                f"{VARIABLE} is {asked!r}: give {' or '.join(WAYS)}, or nothing to have it measured."
            )
        return WAYS[asked]
    num_parts = min(job.n // job.part, MOST_PARTS)
    if num_parts < LEAST_PARTS:
        return True
    key = (kernel, suffix, job.dtype)
    with _finding:
        if key not in _found:
            _found[key] = _is_faster(function, job, num_parts)
    return _found[key]


def _is_faster(function: Callable[..., None], job: ctypes.Structure, num_parts: int) -> bool:
    """Whether parts past the caches take less of this thread's time than parts through them. The job is then as it was.

    All are decoded once before: their pages are there then, and their lines in no cache."""
    n, address = job.n, ctypes.c_void_p(ctypes.addressof(job))
    took: dict[bool, list[float]] = {True: [], False: []}
    job.n, job.is_streamed = num_parts * job.part, True
    function(address)
    for number in range(num_parts):
        is_streamed = number % 2 == 0
        job.next, job.n = number * job.part, (number + 1) * job.part
        job.is_streamed = is_streamed
        start = thread_time()
        function(address)
        took[is_streamed].append(thread_time() - start)
    job.next, job.n, job.is_streamed = 0, n, True
    return statistics.median(took[True]) <= LATE * statistics.median(took[False])
