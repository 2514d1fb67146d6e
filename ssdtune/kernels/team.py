"""Runs native functions on the threads that torch computes with.

After each operator torch's OpenMP threads spin for a while, ready for the next one: other threads would have to share
the cores with them (on two cores, a visit's perturbation took 1.6 times as long). So a native function is called by the
same team, through the entry point that every OpenMP runtime offers to compiled code. Where there is none, by threads of
our own.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

RUNTIMES = ("libgomp", "libiomp", "libomp")


def run_by_all(function: Callable[..., None], job: ctypes.Structure, num_parts: int) -> None:
    """function(&job), called by as many threads as there are parts to take, at most one a core; back when all are.

    function: of a library loaded by ctypes, `void f(void *job)`; callers take parts from the job until none is left.
    """
    num_threads = min(torch.get_num_threads(), num_parts)
    address = ctypes.c_void_p(ctypes.addressof(job))
    if num_threads < 2:
        function(address)
        return
    parallel = _parallel()
    if parallel is not None:
        entry = ctypes.cast(function, ctypes.c_void_p)  # type: ignore[arg-type]
        parallel(entry, address, ctypes.c_uint(num_threads), ctypes.c_uint(0))
    else:
        list(_threads().map(lambda _: function(address), range(num_threads)))


def compute_alone() -> bool:
    """Makes torch's operations on the calling thread take that thread and no other; whether that is so now.

    `torch.set_num_threads` would say so to all threads to come, and change how the math library shares its work."""
    torch.get_num_threads()  # a thread takes over the usual number when it first looks
    runtime = _runtime()
    if runtime is not None:
        runtime.omp_set_num_threads(ctypes.c_int(1))
    return torch.get_num_threads() == 1


@cache
def _parallel() -> Any:
    """`GOMP_parallel(f, data, num_threads, flags)` of torch's runtime; None where it is not to be had."""
    parallel = getattr(_runtime(), "GOMP_parallel", None)
    if parallel is not None:
        parallel.restype = None
    return parallel


@cache
def _runtime() -> ctypes.CDLL | None:
    """The OpenMP runtime that torch has loaded; None where nobody knows which it is."""
    if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    found = _runtimes()
    own = [path for path in found if "torch" in path.parts]
    if len(found) > 1:
        found = own
    return ctypes.CDLL(str(found[0])) if len(found) == 1 else None


def _runtimes() -> list[Path]:
    """OpenMP runtimes that this process has loaded."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = dict.fromkeys(Path(line.split(maxsplit=5)[5]) for line in lines if "/" in line)
    return [path for path in paths if path.name.startswith(RUNTIMES)]


@cache
def _threads() -> ThreadPoolExecutor:
    """One for each core that this process may use; calls into a library let go of the interpreter's lock."""
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="ssdtune-kernel")
