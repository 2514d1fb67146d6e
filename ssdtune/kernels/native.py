"""Loads the C library: the one that came with the wheel, else one that is compiled once, at first use, into the cache.

It is called through ctypes; calls let go of the interpreter's lock. Where it cannot be had, `library()` is None and
torch does the work, several times slower: that is warned of once, and `ssdtune doctor` says it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import functools
import importlib.util
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from ssdtune.cache import cache_folder
from ssdtune.errors import reason_of
from ssdtune.kernels.compiling import (
    FOLDER,
    CompileError,
    compile_into,
    library_name,
    variants,
)

# What a processor must have to run the functions with these endings.
NEEDS = {
    "_avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "_avx2": {"avx2", "fma"},
}


class SlowKernelsWarning(UserWarning):
    """Torch does what the C library would do."""


class Library:
    """The loaded library. suffixes: endings of the functions that run on this processor, the best first."""

    def __init__(self, path: Path, suffixes: tuple[str, ...]) -> None:
        self.path, self.suffixes = path, suffixes
        self._loaded = ctypes.CDLL(str(path))

    def function(self, name: str, suffix: str | None = None) -> Callable[..., None]:
        """The function for the best instruction set, or for this one."""
        return getattr(self._loaded, name + (suffix or self.suffixes[0]))


@dataclasses.dataclass(frozen=True, slots=True)
class Live:
    """Who does the work. library: None where it is torch. reason: where the library is from, or why there is none.
    way_out: what to do about that."""

    library: Library | None
    reason: str
    way_out: str = ""


@functools.cache
def has_triton() -> bool:
    """Whether kernels for a GPU can be compiled."""
    return importlib.util.find_spec("triton") is not None


def library() -> Library | None:
    """The library; None where it cannot be had. The first call may take as long as compiling takes."""
    return live().library


_finding = threading.Lock()  # threads of one process need it at the same moment


def live() -> Live:
    """The same, with the reason."""
    with _finding:
        return _found()


@functools.cache
def _found() -> Live:
    try:
        return _from_wheel() or _from_cache()
    except CompileError as error:
        found = Live(None, str(error), error.way_out)
    except OSError as error:
        found = Live(
            None,
            f"no library can be made and loaded in {cache_folder()}: {reason_of(error)}",
            "Name another folder: SSDTUNE_CACHE.",
        )
    warnings.warn(
        f"ssdtune's C code is not in use: {found.reason}. Torch decodes packed weights and draws random directions "
        f"instead, with the same results, several times slower. {found.way_out}",
        SlowKernelsWarning,
        stacklevel=4,
    )
    return found


def _from_wheel() -> Live | None:
    """None where there is none for these sources and this machine, or it needs another C library than there is."""
    found = _loaded(FOLDER / library_name())
    return None if found is None else Live(found, "built into the package")


def _from_cache() -> Live:
    path = cache_folder() / library_name()
    found = _loaded(path)
    if found is None:
        with _alone(path):
            found = _loaded(path) or _load(compile_into(path.parent))
    return Live(found, "compiled here")


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """While no other process makes this file: each of them would take as many times longer as there are. Where files
    cannot be locked, nobody waits, and the last one stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _loaded(path: Path) -> Library | None:
    """None where there is no such file, or it is damaged."""
    try:
        return _load(path)
    except OSError:
        return None


def _load(path: Path) -> Library:
    has = _processor_flags()
    return Library(path, tuple(s for s in variants() if NEEDS.get(s, set()) <= has))


def _processor_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next(
        (set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set()
    )
