"""`ssdtune doctor`: what this machine can do, measured where it can be in a moment.

Every line is one fact and, where something is slow or missing, the remedy. Nothing is left behind:
the file that is written to measure a drive is removed.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssdtune.errors import SSDTuneError
from ssdtune.memory import free_ram, ram_limits, total_ram
from ssdtune.probe import files
from ssdtune.probe.copies import decoding
from ssdtune.probe.timing import best_of
from ssdtune.report import say
from ssdtune.sizes import format_size

if TYPE_CHECKING:
    import torch

NEEDED = {"torch": (2, 11), "transformers": (5, 17), "peft": (0, 18), "accelerate": (1, 10)}
NEEDED |= {"safetensors": (0, 5), "greenlet": (3, 1), "datasets": (4, 0)}
OPTIONAL = {"kvikio": ("kvikio-cu13", "kvikio-cu12"), "deepspeed": ("deepspeed",)}
LARGE_ENOUGH = 64 * 2**20  # a smaller file tells little of a drive
MATMUL_S = 0.2  # for each dtype
DECODED, DECODE_S = 1 << 22, 0.2  # weights at a time, for how long
STORED_ROWS = 2048  # of a square matrix that each kernel decodes: 8 MB
READ_S = 0.5  # for each way of reading
CPU_WIDTH, DEVICE_WIDTH = 384, 4096
MUCH_SLOWER = 2.0


class DoctorError(SSDTuneError):
    """The path given is not there."""


def print_doctor(path: Path | None = None) -> int:
    """Prints what this machine has. Returns 1 where ssdtune cannot run on it, else 0.

    path: a model's folder, a file, or a folder on the drive to measure; the current one by default.
    Raises DoctorError for a path that does not exist.
    """
    place = Path.cwd() if path is None else path
    if not place.exists():
        raise DoctorError(f"there is no {place}.\nGive a model's folder, or any folder of a drive.")
    problems = list(_packages())
    if not problems:
        for line in [*_device(), *_matmul(), *_kernels(), *_ram()]:
            say(line)
    for line in _drive(place):
        say(line)
    for problem in problems:
        say(f"problem   {problem}")
    return 1 if problems else 0


def _row(label: str, text: str) -> str:
    return f"{label:10}{text}"


# ------------------------------------------------------------------ software


def _packages() -> Iterator[str]:
    """Prints versions; yields what is missing or too old."""
    from ssdtune import __version__

    say(
        _row(
            "ssdtune",
            f"{__version__} · Python {platform.python_version()} · "
            f"{platform.system()} {platform.release()} {platform.machine()}",
        )
    )
    found = {name: version_of(name) for name in NEEDED}
    say(_row("packages", " · ".join(f"{name} {v or 'missing'}" for name, v in found.items())))
    extras = {k: next(filter(None, map(version_of, names)), None) for k, names in OPTIONAL.items()}
    say(_row("", " · ".join(f"{name} {v or 'not installed'}" for name, v in extras.items())))
    for name, version in found.items():
        least = ".".join(map(str, NEEDED[name]))
        if version is None:
            yield f"{name} is missing: pip install '{name}>={least}'"
        elif _parsed(version) < NEEDED[name]:
            yield f"{name} {version} is too old: pip install '{name}>={least}'"


def version_of(distribution: str) -> str | None:
    """The installed version; None where it is not installed. Nothing is imported."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _parsed(version: str) -> tuple[int, ...]:
    digits = version.split("+")[0].split(".")[:2]
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in digits)


# ------------------------------------------------------------------ compute


def _device() -> Iterator[str]:
    import torch

    threads = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    if not torch.cuda.is_available():
        why = "torch is a CPU build" if torch.version.cuda is None else "no CUDA device is visible"
        yield _row("device", f"CPU, {threads} ({why})")
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield _row("device", f"{name}, {format_size(total)}, {format_size(free)} free")
    yield _row("", f"CUDA {torch.version.cuda}; CPU with {threads}")


def _matmul() -> Iterator[str]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    width = DEVICE_WIDTH if device == "cuda" else CPU_WIDTH
    fp32 = matmul_rate(torch.float32, width=width, device=device, seconds=MATMUL_S)
    bf16 = matmul_rate(torch.bfloat16, width=width, device=device, seconds=MATMUL_S)
    yield _row("matmul", f"float32 {_tera(fp32)} · bfloat16 {_tera(bf16)} ({width} × {width})")
    if bf16 * MUCH_SLOWER < fp32:
        yield _row("", f"bfloat16 is {fp32 / bf16:.0f} times slower than float32 here: set")
        yield _row("", "dtype: float32 (weights in memory take twice the bytes, files stay as is)")


def _kernels() -> Iterator[str]:
    """Who decodes packed weights and draws random directions, and how fast the former is."""
    import torch

    from ssdtune.kernels.native import SlowKernelsWarning, live

    with warnings.catch_warnings():  # what it would say stands in these lines
        warnings.simplefilter("ignore", SlowKernelsWarning)
        native = live()
    out = torch.empty(DECODED, dtype=torch.bfloat16)
    best = best_of(decoding(out), DECODE_S)
    who = f"torch ({native.reason})"
    if native.library is not None:
        who = f"C for {native.library.suffixes[0].removeprefix('_')}, {native.reason}"
    yield _row(
        "kernels", f"{who} · 4-bit weights at {out.nbytes / best / 1e9:.1f} GB/s of bfloat16"
    )
    if native.library is None:
        yield _row("", f"C is several times as fast. {native.way_out}")
    else:
        yield from _store_modes(native.library.suffixes[0])
    if torch.cuda.is_available():
        has_triton = version_of("triton") is not None
        yield _row(
            "",
            "on the device by Triton"
            if has_triton
            else "on the device by torch: pip install triton",
        )


def _store_modes(suffix: str) -> Iterator[str]:
    """How the kernels of this instruction set store large outputs of bfloat16."""
    import torch

    from ssdtune.kernels import store_mode
    from ssdtune.kernels.decoding import DTYPES

    if asked := os.environ.get(store_mode.VARIABLE):
        yield _row("", f"large outputs are stored {asked}, as {store_mode.VARIABLE} says")
        return
    _decode_by_each_kernel(torch.zeros(STORED_ROWS, STORED_ROWS, dtype=torch.bfloat16))
    measured = store_mode.found(suffix, DTYPES[torch.bfloat16])
    for is_past, way in ((True, "past"), (False, "through")):
        kernels = [kernel for kernel, found in measured.items() if found == is_past]
        if kernels:
            yield _row("", f"large outputs {way} the caches, faster here: {' · '.join(kernels)}")


def _decode_by_each_kernel(out: torch.Tensor) -> None:
    """So that each has found out how it stores. out: a matrix, large enough for that."""
    from ssdtune.kernels.affine import ORDERS, Affine
    from ssdtune.kernels.float8 import ScaledBytes
    from ssdtune.kernels.ggml import Ggml
    from ssdtune.kernels.lossless import Lossless
    from ssdtune.kernels.nibbles import NF4, Nibbles

    affine = (Affine(bits, ORDERS[bits]) for bits in (4, 5, 6, 8))
    others = (Nibbles(NF4, 64, is_high_first=True), ScaledBytes((128, 128)), Ggml("Q4_K"))
    for format in (*affine, *others, Lossless(bits=4, num_escapes=0)):
        decoding(out, format)()


def matmul_rate(dtype: Any, *, width: int, device: str, seconds: float) -> float:
    """FLOP/s of [width, width] @ [width, width], the best of a few within `seconds`."""
    import torch

    left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    # Looking at a value waits for the device.
    return 2 * width**3 / best_of(lambda: (left @ right)[0, 0].item(), seconds)


def _tera(flops: float) -> str:
    return f"{flops / 1e12:.3g} TFLOP/s"


# ------------------------------------------------------------------ memory and drive


def _ram() -> Iterator[str]:
    yield _row("RAM", f"{format_size(total_ram())}, {format_size(free_ram())} free")
    for limit in ram_limits():
        text = f"a cgroup allows {format_size(limit.limit_bytes)}, {format_size(limit.free_bytes)}"
        yield _row("", f"{text} of it free")


def _drive(place: Path) -> Iterator[str]:
    usage = shutil.disk_usage(place)
    free = f"{format_size(usage.free)} free of {format_size(usage.total)}"
    yield _row("drive", f"{place.resolve()}: {free}")
    try:
        with _probe_file(place) as (file, what):
            yield from _reading(file, what)
    except (OSError, SSDTuneError) as error:
        yield _row("reading", f"not measured: {' '.join(str(error).split())}")


def _reading(file: Path, what: str) -> Iterator[str]:
    from ssdtune.swap.gds import choose_gds
    from ssdtune.swap.readers import measure_read_rate
    from ssdtune.swap.storage import BufferedStorage, choose_storage

    choice = choose_storage(file)
    name = "direct I/O" if choice.is_direct else "through the page cache"
    rate = measure_read_rate(choice.storage, file, READ_S)
    yield _row("reading", f"{name} at {rate:.2f} GB/s, {what}")
    yield _row("", f"because {choice.reason}")
    if choice.is_direct:
        buffered = measure_read_rate(BufferedStorage(choice.storage.alignment), file, READ_S)
        yield _row("", f"through the page cache it would be {buffered:.2f} GB/s")
    gds = choose_gds(file)
    works = "used" if gds.open_pool is not None else "no"
    yield _row("gds", f"{works}: {gds.reason}")


@contextlib.contextmanager
def _probe_file(place: Path) -> Iterator[tuple[Path, str]]:
    """A large file of that place and what it is; one is written for the while if there is none."""
    found = _large_file(place)
    if found is not None:
        yield found, f"measured on {found.name}"
        return
    with files.random_file(place if place.is_dir() else place.parent) as file:
        yield file, f"measured on a file of {format_size(files.PROBE_BYTES)} made for it"


def _large_file(place: Path) -> Path | None:
    """The file itself; a folder's largest weights; else its largest file, if that is large."""
    if place.is_file():
        return place
    files = [entry for entry in place.iterdir() if entry.is_file()]
    sizes = {file: file.stat().st_size for file in files}
    weights = [file for file in files if file.suffix == ".safetensors" and sizes[file]]
    large = [file for file in files if sizes[file] >= LARGE_ENOUGH]
    return max(weights or large, key=lambda file: sizes[file], default=None)
