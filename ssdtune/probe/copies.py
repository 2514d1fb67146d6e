"""Bytes from buffer to slot: copies in RAM and over a device's link, and decoding of packed weights."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from ssdtune.probe import timing
from ssdtune.probe.machine import waiter
from ssdtune.probe.timing import Run, time_all, timed
from ssdtune.schedule.curve import Curve
from ssdtune.schedule.profile import DECODE, DEVICE_DECODE, LINK_MIXED

if TYPE_CHECKING:
    import torch

    from ssdtune.kernels.formats import Format

COPY_BYTES = (2**16, 2**20, 2**23, 2**25, 2**27)
DECODED_COLUMNS = 1024  # of matrices that are decoded

Pair = tuple["torch.Tensor", "torch.Tensor"]  # where to, where from


def measure_copies(device: torch.device) -> dict[str, Curve]:
    """Bytes from buffer to slot: a copy in RAM, and to, from and within a device where there is one, and to and from it at
    once."""
    import torch

    from ssdtune.swap.storage import aligned_bytes

    has_device = device.type == "cuda"
    source = aligned_bytes(max(COPY_BYTES), pin=has_device)
    target = aligned_bytes(max(COPY_BYTES))
    cpu = torch.device("cpu")
    pieces = {float(n): partial(target[:n].copy_, source[:n]) for n in COPY_BYTES}
    found = {"unpack": time_all(pieces, cpu), DECODE: measure_decoding(target)}
    if has_device:
        there = torch.empty(max(COPY_BYTES), dtype=torch.uint8, device=device)
        beside = torch.empty_like(there)
        pairs = (("h2d", there, source), ("d2h", source, there), ("d2d", there, beside))
        for name, to, of in pairs:
            pieces = {float(n): partial(to[:n].copy_, of[:n], True) for n in COPY_BYTES}
            found[name] = time_all(pieces, device)
        found[DEVICE_DECODE] = measure_decoding(there)
        back = aligned_bytes(max(COPY_BYTES), pin=True)
        found[LINK_MIXED] = measure_both_ways(device, up=(there, source), down=(back, beside))
    return found


def measure_both_ways(device: torch.device, *, up: Pair, down: Pair) -> Curve:
    """Bytes of which half go to the device while the others come from it, either way on a stream of its own as in a step.
    up, down: pinned memory and the device's, no two the same, enough for the largest."""
    import torch

    streams = [torch.cuda.Stream(device) for _ in range(2)]

    def both(num_bytes: int) -> None:
        current = torch.cuda.current_stream(device)
        for stream in streams:  # first: a stream must not wait for the other's copy
            stream.wait_stream(current)  # the copies before, of the same memory -> these
        for stream, (to, of) in zip(streams, (up, down), strict=True):
            with torch.cuda.stream(stream):
                to[:num_bytes].copy_(of[:num_bytes], True)
        for stream in streams:
            current.wait_stream(stream)  # both copies -> whoever waits for the device

    return time_all({2.0 * n: partial(both, n) for n in COPY_BYTES}, device)


def measure_decoding(target: torch.Tensor) -> Curve:
    """Bytes of bfloat16 weights that come from narrow codes: the usual packing. target: uint8, enough for the largest."""
    pieces = {float(n): decoding(_matrix(target, n)) for n in COPY_BYTES}
    return time_all(pieces, target.device)


def measure_kinds(device: torch.device) -> dict[str, dict[str, float]]:
    """How many times as long as narrow codes each other kind of packed weights takes, on the CPU and on a device where
    there is one: the fastest of a few rounds, in which they take turns, over the fastest of narrow codes."""
    import torch

    places = {DECODE: torch.device("cpu")}
    if device.type == "cuda":
        places[DEVICE_DECODE] = device
    return {name: _factors(place) for name, place in places.items()}


def _factors(device: torch.device) -> dict[str, float]:
    import torch

    from ssdtune.kernels.kinds import EXAMPLES, NARROW

    num_bytes = COPY_BYTES[-2]
    out = _matrix(torch.zeros(num_bytes, dtype=torch.uint8, device=device), num_bytes)
    runs = {kind: decoding(out, format) for kind, format in EXAMPLES.items()}
    wait, least = waiter(device), dict.fromkeys(runs, math.inf)
    for run in runs.values():
        run()  # compiles, finds out how to store
    wait()
    for _ in range(timing.ROUNDS):
        for kind, run in runs.items():
            least[kind] = min(least[kind], timed(run, wait))
    narrow = least.pop(NARROW)
    return {kind: float(f"{seconds / narrow:.3g}") for kind, seconds in least.items()}


def _matrix(memory: torch.Tensor, num_bytes: int) -> torch.Tensor:
    """bfloat16 weights in the first bytes. memory: uint8."""
    import torch

    return memory[:num_bytes].view(torch.bfloat16).view(-1, DECODED_COLUMNS)


def decoding(out: torch.Tensor, format: Format | None = None) -> Run:
    """What decodes made-up weights into `out`, on its device. out: a matrix; of narrow codes any shape. format: None: of
    these."""
    import torch

    from ssdtune.kernels.kinds import EXAMPLES, NARROW
    from ssdtune.kernels.nibbles import TurnedMxfp4
    from ssdtune.kernels.unpack import unpack
    from ssdtune.visit.placement import FILE_DTYPES

    format = format or EXAMPLES[NARROW]
    out = out[None] if isinstance(format, TurnedMxfp4) else out  # a stack of one expert
    parts: list[torch.Tensor] = []
    for part in format.parts(tuple(out.shape)):
        dtype = FILE_DTYPES[part.dtype]
        memory = torch.empty(math.prod(part.shape) * dtype.itemsize, dtype=torch.uint8)
        # Written to: pages of memory that nobody wrote to are all one, and never leave the caches.
        parts.append(memory.fill_(0).to(out.device).view(dtype).view(part.shape))
    return partial(unpack, format, parts, out)
