"""A machine to plan for: what it can do (`profile`) and what it has; and one put together from published parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ssdtune.schedule.curve import Curve
from ssdtune.schedule.profile import (
    MIXED,
    OPERATORS,
    PERTURB,
    PERTURB_SIGNS,
    InModel,
    Profile,
)

# A model's products reach this share of what one large product reaches: smaller shapes, what lies between them.
# 0.85-0.9 is usual; to be corrected by a run.
MODEL_SHARE = 0.87
ATTENTION_SHARE = (
    0.6  # of the products' rate: fused attention at lengths of a few thousand; assumed
)
PASS_SHARE = 0.85  # of a device's memory bandwidth, by operators that pass over values; assumed
FLOAT32_SHARE = 0.25  # of the bf16 rate, without tensor cores' shortcuts; assumed
UNPACK_SHARE = 1 / 3  # of RAM bandwidth: read, written, and the read that a write causes
KERNEL_S, TRANSFER_S = 5e-6, 20e-6  # before the first byte; assumed
LAUNCH_S = 8e-6  # of the host for each call, hidden while the device computes; assumed
DTYPES = {"bfloat16": 1.0, "float16": 1.0, "float32": FLOAT32_SHARE}  # of the bf16 rate
VALUE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# What of these stands behind every time of a machine that is put together, in words.
ASSUMED_RATES = (
    f"products at {MODEL_SHARE:.0%} of the published rate",
    f"attention at {ATTENTION_SHARE:.0%} of that",
    f"passes over values and perturbing weights at {PASS_SHARE:.0%} of the memory bandwidth",
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A GPU.

    Attributes:
        memory_bytes: free for us.
        bandwidth: bytes/s of its memory. flops: FLOP/s of large bf16 products. pcie: bytes/s each way. watts: of the
            board at full load. All None for this machine's own, which is measured instead.
        price_per_hour: dollars for a rented machine with one; None: none was found. price_source: who asks it, and when.
        assumed: names of those that nobody has published.
    """

    name: str
    memory_bytes: int
    bandwidth: float | None = None
    flops: float | None = None
    pcie: float | None = None
    watts: float | None = None
    price_per_hour: float | None = None
    price_source: str = ""
    assumed: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Drive:
    """Where the model lies; several drives alike, striped, are one.

    Attributes:
        free_bytes: None: not known.
        read, write, sustained_write: bytes/s; the last one after the cache is full.
        endurance_bytes: rated to be written in its life.
        assumed: names of those that nobody has published.
    """

    name: str
    free_bytes: int | None = None
    read: float | None = None
    write: float | None = None
    sustained_write: float | None = None
    endurance_bytes: float | None = None
    assumed: tuple[str, ...] = ()

    def times(self, num: int) -> Drive:
        """So many of them, striped."""

        def scaled(value: float | None) -> float | None:
            return None if value is None else num * value

        return dataclasses.replace(
            self,
            name=self.name if num == 1 else f"{num} × {self.name}",
            free_bytes=None if self.free_bytes is None else num * self.free_bytes,
            read=scaled(self.read),
            write=scaled(self.write),
            sustained_write=scaled(self.sustained_write),
            endurance_bytes=scaled(self.endurance_bytes),
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What they sit in. ram_bytes: of it, `reserved_bytes` for the system. bandwidth: bytes/s of RAM. watts: without
    the device."""

    name: str
    ram_bytes: int
    reserved_bytes: int
    bandwidth: float
    watts: float
    assumed: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Attributes:
    ram_bytes: free for us.
    profile: None where nothing was measured: plans then tell no times.
    watts: of all of it at full load; None: not known.
    price_per_hour: dollars, as somebody has published it for a machine with its device, or as its profile has it; None:
        not known. price_source: who, and when.
    assumed: what its figures assume, in words.
    """

    name: str
    ram_bytes: int
    drive: Drive
    device: Device | None = None
    profile: Profile | None = None
    watts: float | None = None
    price_per_hour: float | None = None
    price_source: str = ""
    assumed: tuple[str, ...] = ()

    @property
    def is_measured(self) -> bool:
        """Whether its profile is a probe's, not put together."""
        return self.profile is not None and self.drive.read is None

    @property
    def device_bytes(self) -> int:
        """Free on the device; 0 without one."""
        return 0 if self.device is None else self.device.memory_bytes


def put_together(device: Device, drive: Drive, host: Host) -> Machine:
    """A machine that nobody has measured, from published rates. What is assumed is named."""
    parts = ((device.name, device), (drive.name, drive), (host.name, host))
    assumed = [f"{field} of {name}" for name, part in parts for field in part.assumed]
    return Machine(
        name=f"{device.name} + {drive.name}",
        ram_bytes=host.ram_bytes - host.reserved_bytes,
        drive=drive,
        device=device,
        profile=profile_of(device, drive, host),
        watts=None if device.watts is None else device.watts + host.watts,
        price_per_hour=device.price_per_hour,
        price_source=device.price_source,
        assumed=(*assumed, *ASSUMED_RATES),
    )


def profile_of(device: Device, drive: Drive, host: Host) -> Profile:
    """Curves of a latency and a rate. The drive's writes are those after its cache is full."""
    rates = {
        "device's flops": device.flops,
        "device's bandwidth": device.bandwidth,
        "device's pcie": device.pcie,
        "drive's read": drive.read,
        "drive's sustained_write": drive.sustained_write,
    }
    missing = [name for name, rate in rates.items() if not rate]
    assert not missing, missing
    assert device.flops and device.bandwidth and device.pcie  # noqa: PT018 (for the type checker)
    assert drive.read and drive.sustained_write  # noqa: PT018
    pcie = min(device.pcie, host.bandwidth)
    transfers = {
        "nvme_read": drive.read,
        "nvme_write": drive.sustained_write,
        MIXED: 2 / (1 / drive.read + 1 / drive.sustained_write),  # in turns, as flash does; assumed
        "unpack": UNPACK_SHARE * host.bandwidth,
        "h2d": pcie,
        "d2h": pcie,
        "d2d": device.bandwidth / 2,
    }
    return Profile(
        name=f"{device.name}, published rates",
        operators={
            dtype: _operators(share * device.flops, device.bandwidth, VALUE_BYTES[dtype])
            for dtype, share in DTYPES.items()
        },
        transfers={name: curve(rate, TRANSFER_S) for name, rate in transfers.items()},
        in_model={
            dtype: InModel(overhead_s=LAUNCH_S, autograd_overhead_s=LAUNCH_S, is_hidden=True)
            for dtype in DTYPES
        },
    )


def _operators(flops: float, bandwidth: float, value_bytes: int) -> Mapping[str, Curve]:
    """value_bytes: of one number. Perturbing reads and writes each weight; its noise is made in registers meanwhile."""
    passes = PASS_SHARE * bandwidth
    rates = {
        "matmul": MODEL_SHARE * flops,
        "matmul_transposed": MODEL_SHARE * flops,
        "attention": ATTENTION_SHARE * MODEL_SHARE * flops,
        "attention_backward": ATTENTION_SHARE * MODEL_SHARE * flops,
        "pointwise": passes,
        "special": passes,
        PERTURB: passes / (2 * value_bytes),
        PERTURB_SIGNS: passes / (2 * value_bytes),
    }
    assert set(rates) == {*OPERATORS, PERTURB, PERTURB_SIGNS}
    return {kind: curve(rate, KERNEL_S) for kind, rate in rates.items()}


def curve(rate: float, latency_s: float) -> Curve:
    """latency + size / rate, up to a size whose latency no longer matters."""
    sizes = [10.0**power * rate * latency_s for power in range(-2, 5)]
    return Curve(tuple((size, latency_s + size / rate) for size in sizes))
