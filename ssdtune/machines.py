"""The machine that a job is planned for: this one, as it is now."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ssdtune.memory import free_ram
from ssdtune.profiles import own_profile
from ssdtune.schedule.machine import Device, Drive, Machine

NVIDIA = Path("/proc/driver/nvidia/version")  # importing torch to find no device takes a second


def own_machine(folder: Path) -> Machine:
    """This machine with what is free now. folder: where runs write. Raises ProfileError for a profile that is broken."""
    folder = folder.expanduser().resolve()
    while not folder.exists():
        folder = folder.parent
    device = _own_device()
    cores = os.cpu_count() or 1
    return Machine(
        name=f"this machine, {cores} cores",
        ram_bytes=free_ram(),
        drive=Drive(name=str(folder), free_bytes=shutil.disk_usage(folder).free),
        device=device,
        profile=own_profile(),
    )


def _own_device() -> Device | None:
    if not NVIDIA.exists():
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device()
    free, _ = torch.cuda.mem_get_info(index)
    return Device(name=torch.cuda.get_device_name(index), memory_bytes=free)
