"""The machine that a job is planned for: this one as it is now, or one that one does not have.

`rtx4090+2x990pro+128GB`: a device, drives, RAM, in any order. The parts are in `ssdtune/hardware/*.yaml`, each figure
with its source. A whole machine, as it was measured, is a file that `ssdtune probe` wrote, or the name of one without a
GPU (`boxes.yaml`).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.resources
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ssdtune.errors import SSDTuneError
from ssdtune.memory import free_ram, nearest_folder
from ssdtune.profiles import load_profile, own_profile
from ssdtune.schedule.machine import Device, Drive, Host, Machine, put_together
from ssdtune.schedule.profile import Profile
from ssdtune.sizes import SizeError, parse_size

NVIDIA = Path("/proc/driver/nvidia/version")  # importing torch to find no device takes a second
DEFAULT_DRIVE, DEFAULT_HOST = "990pro", "desktop"
DEVICE_SHARE = 0.95  # of a device's memory: what a driver and a desktop leave
TIMES = re.compile(r"(\d{1,2})x(.+)", re.IGNORECASE)


class MachineError(SSDTuneError):
    """A machine that can't be put together; the message names the part."""


def own_machine(folder: Path) -> Machine:
    """This machine with what is free now. folder: where runs write. Raises ProfileError for a profile that is broken."""
    folder = nearest_folder(folder)
    device, profile = _own_device(), own_profile()
    cores = os.cpu_count() or 1
    return Machine(
        name=f"this machine, {cores} cores",
        ram_bytes=free_ram(),
        drive=Drive(name=str(folder), free_bytes=shutil.disk_usage(folder).free),
        device=device,
        profile=profile,
        price_per_hour=None if profile is None else profile.price_per_hour,
        price_source="its profile",
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


# ------------------------------------------------------------------ one that one does not have


def machine_from(spec: str) -> Machine:
    """The machine of a spec such as "rtx4090+2x990pro+128GB"; drives and RAM may be left out.

    Raises MachineError for a part that is not known, with the nearest names, for two devices, and for parts beside a whole
    machine.
    """
    found: dict[str, Any] = {"drive": None, "ram": None}
    devices: list[Device] = []
    for part in filter(None, (word.strip() for word in spec.split("+"))):
        if (whole := _whole(part, spec)) is not None:
            return whole
        size = _ram(part)
        if size is not None:
            found["ram"] = size
        elif (device := _look_up(part, devices_known())) is not None:
            devices.append(device)
        else:
            found["drive"] = _drives(part, spec)
    if len(devices) != 1:
        raise MachineError(
            f"--hardware {spec}: {len(devices)} devices; name one: {', '.join(devices_known())}."
        )
    host = hosts_known()[DEFAULT_HOST]
    if found["ram"] is not None:
        host = dataclasses.replace(host, ram_bytes=max(found["ram"], 2 * host.reserved_bytes))
    return put_together(devices[0], found["drive"] or drives_known()[DEFAULT_DRIVE], host)


def _whole(part: str, spec: str) -> Machine | None:
    """The measured machine that a part stands for; None for a part of one that is put together."""
    is_file = Path(part).suffix in (".yaml", ".yml")
    key = None if is_file else _look_up(part, {key: key for key in entries("boxes")})
    if not is_file and key is None:
        return None
    if "+" in spec:
        raise MachineError(f"--hardware {spec}: a measured machine, {part}, takes no other parts.")
    return _measured(Path(part)) if key is None else _box(key)


def _box(key: str) -> Machine:
    """A machine of `boxes.yaml`."""
    entry = entries("boxes")[key]
    return Machine(
        name=f"{entry['name']}, {entry['source']}",
        ram_bytes=_size(entry["ram"]) - _size(entry["reserved"]),
        drive=Drive(name="its drive"),
        profile=box_profile(key),
    )


@functools.cache
def box_profile(key: str) -> Profile:
    """What was measured on a machine of `boxes.yaml`."""
    file = importlib.resources.files("ssdtune.hardware") / entries("boxes")[key]["profile"]
    with importlib.resources.as_file(file) as path:
        return load_profile(path)


def _measured(path: Path) -> Machine:
    """A machine whose profile is in a file, with a device where one was measured. Its RAM is not in it: that of this
    machine is taken. Raises MachineError for a device whose memory is not known."""
    profile = load_profile(path)
    device = None
    if "h2d" in profile.transfers:
        if profile.device_bytes is None:
            raise MachineError(
                f"--hardware {path}: it was measured on a device and does not say how much memory that has free.\n"
                f"Write it into {path}, for instance device_bytes: 22GB, or measure anew with `ssdtune probe`."
            )
        device = Device(name=profile.name, memory_bytes=profile.device_bytes)
    return Machine(
        name=f"{profile.name} ({path}), RAM of this machine",
        ram_bytes=free_ram(),
        drive=Drive(name="its drive"),
        device=device,
        profile=profile,
        price_per_hour=profile.price_per_hour,
        price_source="its profile",
    )


def _ram(part: str) -> int | None:
    try:
        return parse_size(part) if part[0].isdigit() and part[-1] in "bB" else None
    except SizeError:
        return None


def _drives(part: str, spec: str) -> Drive:
    match = TIMES.fullmatch(part)
    num, name = (int(match[1]), match[2]) if match else (1, part)
    drive = _look_up(name, drives_known())
    if drive is None or num < 1:
        known = [*devices_known(), *drives_known(), *entries("boxes")]
        near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise MachineError(
            f"--hardware {spec}: {part!r} is no part that is known.\n"
            f"{hint}`ssdtune hardware` lists all; RAM is written like 128GB."
        )
    return drive.times(num)


def _look_up(name: str, known: Mapping[str, Any]) -> Any:
    """A part by its name or another that it goes by, whatever the case."""
    wanted = re.sub(r"[\s_-]", "", name.lower())
    for key, part in known.items():
        if wanted in {re.sub(r"[\s_-]", "", each) for each in (key, *_aliases()[key])}:
            return part
    return None


@functools.cache
def devices_known() -> Mapping[str, Device]:
    """GPUs by name, with what is free of their memory."""
    return {
        key: Device(
            name=entry["name"],
            memory_bytes=int(DEVICE_SHARE * _size(entry["memory"])),
            bandwidth=float(entry["bandwidth"]),
            flops=float(entry["tflops"]) * 1e12,
            pcie=float(entry["pcie"]),
            watts=float(entry["watts"]),
            price_per_hour=entry.get("price"),
            price_source=entry.get("price_source", ""),
            assumed=tuple(entry["assumed"]),
        )
        for key, entry in entries("devices").items()
    }


@functools.cache
def drives_known() -> Mapping[str, Drive]:
    """NVMe drives by name, empty."""
    return {
        key: Drive(
            name=entry["name"],
            free_bytes=_size(entry["capacity"]),
            read=float(entry["read"]),
            write=float(entry["write"]),
            sustained_write=float(entry["sustained_write"]),
            endurance_bytes=float(_size(entry["endurance"])),
            assumed=tuple(entry["assumed"]),
        )
        for key, entry in entries("drives").items()
    }


@functools.cache
def hosts_known() -> Mapping[str, Host]:
    """What they sit in, by name."""
    return {
        key: Host(
            name=entry["name"],
            ram_bytes=_size(entry["ram"]),
            reserved_bytes=_size(entry["reserved"]),
            bandwidth=float(entry["bandwidth"]),
            watts=float(entry["watts"]),
            assumed=tuple(entry["assumed"]),
        )
        for key, entry in entries("hosts").items()
    }


@functools.cache
def entries(kind: str) -> Mapping[str, Mapping[str, Any]]:
    """What a file of `ssdtune/hardware` holds. kind: "devices", "drives", "hosts" or "boxes"."""
    import yaml

    text = (importlib.resources.files("ssdtune.hardware") / f"{kind}.yaml").read_text("utf-8")
    return yaml.safe_load(text)


@functools.cache
def _aliases() -> Mapping[str, tuple[str, ...]]:
    return {
        key: tuple(map(str, entry["aliases"]))
        for kind in ("devices", "drives", "hosts", "boxes")
        for key, entry in entries(kind).items()
    }


def _size(text: str) -> int:
    size = parse_size(text)
    assert size is not None, text
    return size


def hardware_lines() -> Iterator[str]:
    """Yields all known parts as tables, with their sources; * marks what is assumed."""
    yield _devices_table()
    yield from _price_sources()
    yield ""
    yield _drives_table()
    yield ""
    yield _boxes_table()
    yield ""
    yield "* assumed, not published. Write `--hardware rtx4090+2x990pro+128GB`, or a whole machine alone."


def _devices_table() -> str:
    from ssdtune.report import format_table

    rows = [
        [
            key,
            entry["name"],
            entry["memory"],
            _marked(entry, "tflops", f"{float(entry['tflops']):g} TFLOP/s"),
            f"{float(entry['bandwidth']) / 1e9:,.0f} GB/s",
            _marked(entry, "pcie", f"{float(entry['pcie']) / 1e9:g} GB/s"),
            f"{entry['watts']} W",
            f"${entry['price']:.2f}/h" if "price" in entry else "",
            entry["source"],
        ]
        for key, entry in entries("devices").items()
    ]
    header = ("device", "", "memory", "bf16", "bandwidth", "PCIe", "", "rented", "source")
    return format_table(rows, header=header)


def _drives_table() -> str:
    from ssdtune.report import format_table

    rows = [
        [
            key,
            entry["name"],
            entry["capacity"],
            f"{float(entry['read']) / 1e9:g} GB/s",
            _marked(entry, "write", f"{float(entry['write']) / 1e9:g} GB/s"),
            _marked(entry, "sustained_write", f"{float(entry['sustained_write']) / 1e9:g} GB/s"),
            _marked(entry, "endurance", entry["endurance"]),
            entry["source"],
        ]
        for key, entry in entries("drives").items()
    ]
    header = ("drive", "", "", "read", "write", "sustained", "endurance", "source")
    return format_table(rows, header=header)


def _boxes_table() -> str:
    from ssdtune.report import format_table

    rows = [
        [
            key,
            entry["name"],
            entry["ram"],
            f"{box_profile(key).operator('bfloat16', 'matmul').rate / 1e12:.2g} TFLOP/s",
            f"{box_profile(key).transfer('nvme_read').rate / 1e9:.2g} GB/s",
            entry["source"],
        ]
        for key, entry in entries("boxes").items()
    ]
    return format_table(rows, header=("whole machine", "", "RAM", "bf16", "read", "source"))


def _marked(entry: Mapping[str, Any], field: str, text: str) -> str:
    return f"{text}*" if field in entry["assumed"] else text


def _price_sources() -> Iterator[str]:
    """Yields who asks the prices, and when."""
    priced = [entry for entry in entries("devices").values() if "price" in entry]
    for source in dict.fromkeys(entry["price_source"] for entry in priced):
        names = ", ".join(e["name"] for e in priced if e["price_source"] == source)
        yield f"rented: {names}: {source}"
