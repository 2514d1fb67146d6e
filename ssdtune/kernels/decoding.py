"""What all native decoders of packed tensors share: threads, checks, how outputs are stored."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache

import torch

from ssdtune.kernels import store_mode
from ssdtune.kernels.formats import Format
from ssdtune.kernels.native import library

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # of outputs
ALIGNMENT = 64  # bytes, of streamed outputs
# Outputs of so many bytes may be stored past the caches (store_mode.py). Measured with 8 MB of last-level cache: larger
# ones cost half as much again if they go through it, smaller ones a fifth more, to whoever reads them next, if they
# don't; at 4 MB it makes no difference.
STREAM_BYTES = 4 << 20
# Two threads that take parts of 64 KB in turn write 1.3 times as much as one, of 512 KB 1.75 to 1.87, of 2 MB 1.92 to 1.94
# (Zen 4): where a part ends, what was asked for ahead is another thread's.
LARGEST_PART = 1 << 20  # elements
LEAST_TURNS = 8  # of each thread, so that none waits long for the last one


class Threads:
    """Threads that decode one tensor together: whoever calls, and a pool of the others. num_threads: all of them."""

    def __init__(self, num_threads: int) -> None:
        assert num_threads > 0, num_threads
        self.num_threads = num_threads
        self._others = ThreadPoolExecutor(num_threads, thread_name_prefix="ssdtune-unpack")

    def run(self, function: Callable[..., None], job: ctypes.Structure, num_parts: int) -> None:
        """function(&job) on as many threads as there are parts; back when all are."""
        address = ctypes.c_void_p(ctypes.addressof(job))
        num_others = min(self.num_threads, num_parts) - 1
        others = [self._others.submit(function, address) for _ in range(num_others)]
        function(address)
        for other in others:
            other.result()


# Decoding goes on beside computing, on the same cores.
_threads = Threads(max(1, len(os.sched_getaffinity(0)) // 4))


def set_threads(num_threads: int) -> None:
    """How many threads decode a tensor from now on, the caller's among them. By default a quarter of the cores."""
    global _threads
    if num_threads != _threads.num_threads:
        _threads = Threads(num_threads)


def run(name: str, suffix: str, job: ctypes.Structure, kernel: str) -> None:
    """The native function of that name and instruction set on as many threads as there are parts of the job.

    job: with n, part, next and is_streamed. kernel: as `store_mode.are_past_caches` has it."""
    function = settled(name, suffix, job, kernel)
    job.part = larger(job.part, job.n, _threads.num_threads)
    _threads.run(function, job, -(-job.n // job.part))


def larger(part: int, n: int, num_threads: int) -> int:
    """As many parts as a thread shall take of n elements at a time, in elements."""
    return part * max(1, min(LARGEST_PART // part, n // (part * num_threads * LEAST_TURNS)))


def settled(name: str, suffix: str, job: ctypes.Structure, kernel: str) -> Callable[..., None]:
    """The function, as for `run`; the job then says how its output is stored."""
    native = library()
    assert native is not None
    function = native.function(name, suffix)
    if job.is_streamed:
        job.is_streamed = store_mode.are_past_caches(kernel, suffix, function, job)
    return function


def check(format: Format, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """Native code reads what it is told to: the parts must be there, whole."""
    assert out.is_contiguous()
    needed = _part_sizes(format, tuple(out.shape))
    assert tuple(part.numel() for part in parts) == needed, (format.label, needed)
    assert all(part.is_contiguous() for part in parts), format.label


@lru_cache(maxsize=1024)  # a model has fewer; they take as long as decoding 10,000 elements
def _part_sizes(format: Format, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Elements of each part."""
    return tuple(math.prod(part.shape) for part in format.parts(shape))


def can_stream(out: torch.Tensor) -> bool:
    """Whether the output may be stored past the caches."""
    return out.nbytes >= STREAM_BYTES and out.data_ptr() % ALIGNMENT == 0


@cache
def nan_bits() -> int:
    """What torch on this processor makes of a NaN in bfloat16: 0xFFFF with AVX2, 0x7FC0 without."""
    return int(torch.full((1,), math.nan).bfloat16().view(torch.int16).item()) & 0xFFFF
