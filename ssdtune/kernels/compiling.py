"""Makes one shared library of the C sources beside this file: each of them for every instruction set that a processor
of this kind may have, one file of its own for each, chosen from when it is loaded (`native.py`).

A plain C library: no torch headers and no interpreter's, so that it fits any of them, and seconds to build. Nothing but
the standard library is imported here, for a wheel is built by this code too (`setup.py`).
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
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
HEADERS = (
    "lookup.h",
    "lookup_avx2.h",
    "lookup_avx512.h",
    "lookup_plain.h",
    "native.h",
    "pieces.h",
    "rotate.h",
    "streams.h",
)
# How Python calls the library. One more where a ctypes structure or a call changes and no source does: then a library
# that was built before is not taken any more.
ABI = 1
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
        "_avx2": ("-mavx2", "-mfma"),
        "_plain": (),
    },
    "aarch64": {"_neon": ()},  # which all of them have; by the compiler's own vectors
}
COMPILERS = ("gcc", "cc", "g++", "clang")
BUILD_S = 600.0  # for one file; alone on a slow core the longest takes some 10 s
PROGRESS_S = 10.0  # from one line that says how far it is to the next


class CompileError(Exception):
    """What failed, and in `way_out` what to do about it."""

    def __init__(self, problem: str, way_out: str) -> None:
        super().__init__(problem)
        self.way_out = way_out


def variants() -> Mapping[str, tuple[str, ...]]:
    """Flags by ending for this kind of machine, the best first."""
    return VARIANTS.get(platform.machine(), {"_plain": ()})


def library_name() -> str:
    """The file name of the library for this kind of machine, which says what it is made of: ABI, flags, sources. Any
    file of that name will do, whoever compiled it."""
    contents = [(FOLDER / name).read_bytes() for name in (*SOURCES, *HEADERS)]
    made_of = (ABI, platform.machine(), FLAGS, dict(variants()), contents)
    return f"kernels-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}.so"


def compile_into(folder: Path) -> Path:
    """The library, compiled into `folder` under its name: wholly there or not at all.

    It may be made by several processes at once. Says on standard error how far it is where it takes longer than a
    moment. Raises CompileError, and OSError where the folder cannot be written.
    """
    compiler = next((c for c in COMPILERS if shutil.which(c)), None)
    if compiler is None:
        raise CompileError("no C compiler was found", "Install gcc.")
    path = folder / library_name()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        commands = dict(_commands(compiler, Path(scratch)))
        _run_all(list(commands.values()))
        built = Path(scratch) / path.name
        # Nothing but the C library, though g++ would add its own.
        _run([compiler, "-shared", "-Wl,--as-needed", "-o", str(built), *commands])
        os.replace(built, path)
    return path


def _commands(compiler: str, scratch: Path) -> Iterator[tuple[str, list[str]]]:
    """Each object file, and what makes it."""
    language = ("-x", "c") if compiler == "g++" else ()
    for suffix, flags in variants().items():
        for name in SOURCES:
            made = str(scratch / f"{name}{suffix}.o")
            options = [*language, *FLAGS, *flags, f"-DSUFFIX={suffix}"]
            yield made, [compiler, *options, "-c", str(FOLDER / name), "-o", made]


def _run_all(commands: Sequence[Sequence[str]]) -> None:
    """All of them, as many at a time as there are cores."""
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        waiting = {pool.submit(_run, command) for command in commands}
        try:
            while waiting:
                done, waiting = concurrent.futures.wait(
                    waiting, PROGRESS_S, concurrent.futures.FIRST_EXCEPTION
                )
                for one in done:
                    one.result()
                if waiting:
                    num_done = len(commands) - len(waiting)
                    sys.stderr.write(
                        f"ssdtune compiles its C code, once: {num_done} of {len(commands)} files\n"
                    )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _run(command: Sequence[str]) -> None:
    compiler, what = command[0], Path(command[-3]).name if "-c" in command else "the library"
    # In a group of its own: what a compiler starts must end with it.
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, process_group=0
    ) as process:
        try:
            _, said = process.communicate(timeout=BUILD_S)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise CompileError(
                f"{compiler} was not done with {what} after {BUILD_S:g} s",
                "Run `ssdtune doctor` when the machine is less busy: what is compiled stays.",
            ) from error
    if process.returncode:
        reason = (said.strip() or f"it ended with {process.returncode}").splitlines()[0]
        raise CompileError(
            f"{compiler} failed on {what}: {reason}", f"Mend or replace {shutil.which(compiler)}."
        )
