"""`ssdtune probe`: measures this machine for the planner, in under a minute, and writes a profile.

Each operator and transfer is timed at several sizes, the sizes in turn, a few rounds of each; a point of a curve is the
median of its rounds. What is measured is what training does: matrix products of blocks' shapes in the number formats
that models come in, fused attention and its backward, passes over values, reads of a model's files by the engine's own
readers, writes past the page cache, copies.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from time import perf_counter

from ssdtune.probe.copies import measure_copies
from ssdtune.probe.drive import measure_reads, measure_writes
from ssdtune.probe.files import random_file
from ssdtune.probe.in_model import measure_in_model
from ssdtune.probe.machine import cpu_seconds, machine_name
from ssdtune.probe.operators import measure_operators
from ssdtune.probe.slowing import measure_slowing
from ssdtune.probe.text import profile_lines
from ssdtune.profiles import save_profile
from ssdtune.report import say
from ssdtune.schedule.profile import Profile

DTYPES = ("float32", "bfloat16")
BUSY_CORES = 0.15  # of others, from which on a measurement is not to be trusted


def measure(folder: Path, file: Path | None = None) -> Profile:
    """The profile of this machine. folder: on the drive that will stream. file: a large one there to read; without it
    one is written for the purpose and removed. Raises StorageError where the drive fails."""
    import torch

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    operators = {name: measure_operators(device, getattr(torch, name)) for name in DTYPES}
    in_model = {
        name: measure_in_model(device, getattr(torch, name), curves)
        for name, curves in operators.items()
    }
    with random_file(folder) if file is None else contextlib.nullcontext(file) as read_from:
        transfers = {
            "nvme_read": measure_reads(read_from),
            "nvme_write": measure_writes(folder),
            **measure_copies(device),
        }
        slowing = measure_slowing(read_from, device)
    return Profile(
        name=machine_name(device),
        operators=operators,
        transfers=transfers,
        in_model=in_model,
        reading_takes=slowing,
    )


def print_probe(folder: Path, out: Path, file: Path | None = None) -> int:
    """Measures, prints, writes; returns 0."""
    start, before = perf_counter(), cpu_seconds()
    profile = measure(folder, file)
    save_profile(profile, out)
    for line in profile_lines(profile):
        say(line)
    others = (cpu_seconds() - before) / (perf_counter() - start)
    if others > BUSY_CORES:
        say(
            f"warning: other processes used {others:.2g} cores meanwhile, so that rates are too low and times "
            "predicted from them too long: measure again when the machine is idle"
        )
    say(f"written   {out} in {perf_counter() - start:.0f} s")
    return 0
