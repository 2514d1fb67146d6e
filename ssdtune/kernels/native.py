"""Compiles the C sources beside this file once, for every instruction set that this processor may have, and loads them.

A plain C library behind ctypes: no torch headers, seconds to build, and calls let go of the interpreter's lock. Where
there is no compiler, `library()` is None and torch does the work, several times slower.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ssdtune.cache import cache_folder

SOURCES = (
    "checksum.c",
    "ggml.c",
    "integers.c",
    "lossless.c",
    "noise.c",
    "requantize.c",
    "unpack.c",
    "unpack_add.c",
)
HEADERS = ("native.h", "pieces.h", "rotate.h")
# No value may depend on who compiled it: nothing fused, nothing reordered.
FLAGS = ("-std=c11", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-Wall")
# ending of the functions' names -> flags; the best first. The last one runs everywhere.
VARIANTS = {
    "x86_64": {
        "_avx512": (
            "-mavx512f",
            "-mavx512bw",
            "-mavx512vl",
            "-mavx512dq",
            "-mprefer-vector-width=512",
        ),
        "_avx2": ("-mavx2",),
        "_plain": (),
    }
}
NEEDS = {"_avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"}, "_avx2": {"avx2"}}
BUILD_S = 120.0


class Library:
    """The loaded library. suffixes: endings of the functions that run on this processor, the best first."""

    def __init__(self, path: Path, suffixes: tuple[str, ...]) -> None:
        self.path, self.suffixes = path, suffixes
        self._loaded = ctypes.CDLL(str(path))

    def function(self, name: str, suffix: str | None = None) -> Callable[..., None]:
        """The function for the best instruction set, or for this one."""
        return getattr(self._loaded, name + (suffix or self.suffixes[0]))


@functools.cache
def has_triton() -> bool:
    """Whether kernels for a GPU can be compiled."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def library() -> Library | None:
    """The library, built at first use into the cache; None where nothing here can build it."""
    folder = Path(__file__).parent
    compiler = next((c for c in ("gcc", "cc", "g++", "clang") if shutil.which(c)), None)
    variants = VARIANTS.get(platform.machine(), {"_plain": ()})
    sources = [(folder / name).read_bytes() for name in (*SOURCES, *HEADERS)]
    key = hashlib.sha256(repr((FLAGS, variants, compiler, sources)).encode()).hexdigest()[:16]
    path = cache_folder() / f"kernels-{key}.so"
    if not path.exists():
        if compiler is None:
            return None
        try:
            _build(compiler, folder, variants, path)
        except (OSError, subprocess.SubprocessError):
            return None
    has = _processor_flags()
    return Library(path, tuple(s for s in variants if NEEDS.get(s, set()) <= has))


def _build(compiler: str, folder: Path, variants: dict[str, tuple[str, ...]], path: Path) -> None:
    """Writes the library beside its place and moves it there: another process may do the same at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        commands: dict[str, list[str]] = {}
        for suffix, flags in variants.items():
            for name in SOURCES:
                made = str(Path(scratch) / f"{name}{suffix}.o")
                language = ("-x", "c") if compiler == "g++" else ()
                commands[made] = [
                    compiler,
                    *language,
                    *FLAGS,
                    *flags,
                    f"-DSUFFIX={suffix}",
                    "-c",
                    str(folder / name),
                    "-o",
                    made,
                ]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(_run, commands.values()))
        built = Path(scratch) / path.name
        _run([compiler, "-shared", "-o", str(built), *commands])
        os.replace(built, path)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=BUILD_S)


def _processor_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next(
        (set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set()
    )
