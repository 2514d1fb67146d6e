"""A machine to plan for: what it can do (`profile`) and what it has."""

from __future__ import annotations

import dataclasses

from ssdtune.schedule.profile import Profile


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A GPU. memory_bytes: free for us. watts: at full load. price: and its currency, in words; None: not known."""

    name: str
    memory_bytes: int
    watts: float | None = None
    price: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Drive:
    """Where the model lies. free_bytes: None: not known. endurance_bytes: rated to be written in its life."""

    name: str
    free_bytes: int | None = None
    endurance_bytes: float | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """ram_bytes: free for us. profile: None where nothing was measured: plans then tell no times."""

    name: str
    ram_bytes: int
    drive: Drive
    device: Device | None = None
    profile: Profile | None = None

    @property
    def device_bytes(self) -> int:
        """Free on the device; 0 without one."""
        return 0 if self.device is None else self.device.memory_bytes
