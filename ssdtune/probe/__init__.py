"""`ssdtune probe`: measures this machine for the planner, and writes a profile.

Each operator and transfer is timed at several sizes, the sizes in turn, a few rounds of each; a point of a curve is the
median of its rounds, and the time that nine tenths of them stay below is kept beside it. What is measured is what
training does: matrix products of blocks' shapes in the number formats that models come in, fused attention and its
backward, passes over values, reads of a model's files by the engine's own readers, writes past the page cache, copies,
the optimizer, perturbing weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from ssdtune.cores import cpu_seconds
from ssdtune.durable import make_folder
from ssdtune.probe.copies import measure_copies, measure_kinds
from ssdtune.probe.drive import measure_both, measure_reads, measure_sustained, measure_writes
from ssdtune.probe.few_rows import measure_few_rows
from ssdtune.probe.files import random_file
from ssdtune.probe.in_model import Point, fit_in_model, measure_visits
from ssdtune.probe.machine import free_device_bytes, machine_name
from ssdtune.probe.operators import measure_fresh, measure_operators
from ssdtune.probe.optimizer import measure_optimizer
from ssdtune.probe.perturbing import measure_perturbing
from ssdtune.probe.slowing import measure_copy_overlap, measure_slowing
from ssdtune.probe.steady import usual_pace, watching
from ssdtune.probe.text import profile_lines
from ssdtune.profiles import save_profile
from ssdtune.report import say
from ssdtune.schedule.curve import Curve
from ssdtune.schedule.profile import BUSY_CORES, FRESH, MIXED, SUSTAINED, Profile

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16")


def measure(folder: Path, file: Path | None = None) -> Profile:
    """The profile of this machine. folder: on the drive that will stream. file: a large one there to read; without it
    one is written for the purpose and removed. Raises StorageError where the drive fails."""
    import torch

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    with watching(device):
        return _measure(device, folder, file)


def _measure(device: torch.device, folder: Path, file: Path | None) -> Profile:
    import torch

    start, before = perf_counter(), cpu_seconds()
    free_bytes = free_device_bytes(device)  # before anything lies there
    dtypes = {name: getattr(torch, name) for name in DTYPES}
    fresh = {FRESH: measure_fresh()} if device.type == "cpu" else {}
    operators = {
        name: measure_operators(device, dtype) | measure_perturbing(device, dtype) | fresh
        for name, dtype in dtypes.items()
    }

    def visits() -> dict[str, list[Point]]:
        return {
            name: measure_visits(device, dtypes[name], curves) for name, curves in operators.items()
        }

    early = visits()
    products = {name: measure_few_rows(device, dtype) for name, dtype in dtypes.items()}
    with random_file(folder) if file is None else contextlib.nullcontext(file) as read_from:
        transfers = {
            "nvme_read": measure_reads(read_from),
            "nvme_write": measure_writes(folder),
            MIXED: measure_both(folder, read_from),
            **measure_copies(device),
        }
        slowing = measure_slowing(read_from, device)
    # Again: what threads and caches leave them changes from one part of a minute to another.
    late = visits()
    slower, is_hidden = usual_pace(), device.type != "cpu"
    return Profile(
        name=machine_name(device),
        operators={
            name: {kind: curve.times(slower) for kind, curve in curves.items()}
            for name, curves in operators.items()
        },
        transfers=transfers,
        decoding=measure_kinds(device),
        in_model={
            name: fit_in_model([*early[name], *late[name]], is_hidden=is_hidden).times(slower)
            for name in dtypes
        },
        reading_takes=slowing,
        copy_overlap=measure_copy_overlap(device),
        products={name: grids for name, grids in products.items() if grids},
        optimizer=measure_optimizer(),
        busy_cores=round(max(0.0, cpu_seconds() - before) / (perf_counter() - start), 2),
        device_bytes=free_bytes,
    )


def print_probe(
    folder: Path, out: Path, file: Path | None = None, sustained_bytes: int | None = None
) -> int:
    """Measures, prints, writes; returns 0.

    sustained_bytes: to write one after the other, to see what the drive does when its cache is full; None: none.
    Raises DriveError, before anything is measured, where there is no room for them; DurableError where `out` has no
    folder and none can be made.
    """
    start = perf_counter()
    make_folder(out.parent)
    sustained: dict[str, Curve] = {}
    if sustained_bytes is not None:
        sustained[SUSTAINED] = measure_sustained(folder, sustained_bytes, say)
    profile = measure(folder, file)
    profile = dataclasses.replace(profile, transfers={**profile.transfers, **sustained})
    save_profile(profile, out)
    for line in profile_lines(profile):
        say(line)
    if profile.busy_cores > BUSY_CORES:
        say(
            f"warning: other processes used {profile.busy_cores:.2g} cores meanwhile, so that rates are too low and "
            "times predicted from them too long: measure again when the machine is idle"
        )
    say(f"written   {out} in {perf_counter() - start:.0f} s")
    return 0
