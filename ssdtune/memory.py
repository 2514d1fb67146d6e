"""How much RAM there is, by what the kernel says: /proc/meminfo (proc(5)) and the cgroups above us; where drives are.

A limit of a container or a batch system counts as well as the machine's own memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Limit:
    """A cgroup's memory limit and what counts against it now, bytes."""

    limit_bytes: int
    used_bytes: int

    @property
    def free_bytes(self) -> int:
        """What may still be taken; 0 where it is over the limit."""
        return max(0, self.limit_bytes - self.used_bytes)


def nearest_folder(folder: Path) -> Path:
    """The folder, or where it is not made yet the nearest above it that is there: on the same drive."""
    folder = folder.expanduser().resolve()
    return next(path for path in (folder, *folder.parents) if path.exists())


def processes_here() -> int:
    """How many processes of the run share this machine, as launchers tell each of them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def total_ram(proc: Path = PROC) -> int:
    """Bytes of RAM of the machine."""
    return _meminfo(proc)["MemTotal"]


def free_ram(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Bytes that could be had now without swapping, within the narrowest limit."""
    limits = [limit.free_bytes for limit in ram_limits(proc, cgroups)]
    return min([_meminfo(proc)["MemAvailable"], *limits])


def ram_limits(proc: Path = PROC, cgroups: Path = CGROUPS) -> list[Limit]:
    """The limits that bind this process: its own cgroup's and those above it, v1 and v2."""
    return list(_limits(proc, cgroups, _meminfo(proc)["MemTotal"]))


def _meminfo(proc: Path) -> dict[str, int]:
    lines = (proc / "meminfo").read_text().splitlines()
    fields = (line.split(":", 1) for line in lines if ":" in line)
    return {name: int(value.split()[0]) * 1024 for name, value in fields}  # in kB, which are KiB


def _limits(proc: Path, cgroups: Path, total: int) -> Iterator[Limit]:
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = cgroups / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            limit = _limit(folder, *names)
            if limit is not None and limit.limit_bytes < total:  # v1 writes a huge one for none
                yield limit
            if folder == root:
                break


def _limit(folder: Path, limit_name: str, used_name: str, cached_name: str) -> Limit | None:
    """What the kernel would drop from its cache first does not count as used."""
    try:
        limit = int((folder / limit_name).read_text())  # "max" is a ValueError: none
        used = int((folder / used_name).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return Limit(limit, max(0, used - int(stat.get(cached_name, 0))))
    except (OSError, ValueError):
        return None
