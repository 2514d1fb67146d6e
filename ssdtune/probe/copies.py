"""Bytes from buffer to slot: copies in RAM and over a device's link, and decoding of packed weights."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ssdtune.probe.timing import Run, time_all
from ssdtune.schedule.curve import Curve
from ssdtune.schedule.profile import DEVICE_DECODE, LINK_MIXED

if TYPE_CHECKING:
    import torch

COPY_BYTES = (2**16, 2**20, 2**23, 2**25, 2**27)

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
    found = {"unpack": time_all(pieces, cpu), "decode": measure_decoding(target)}
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
    """Bytes of bfloat16 weights that come from 4-bit codes: the usual packing. target: uint8, enough for the largest."""
    import torch

    pieces = {float(n): decoding(target[:n].view(torch.bfloat16)) for n in COPY_BYTES}
    return time_all(pieces, target.device)


def decoding(out: torch.Tensor) -> Run:
    """What decodes made-up 4-bit weights into `out`, flat, on its device."""
    import torch

    from ssdtune.kernels.affine import Affine
    from ssdtune.kernels.unpack import unpack

    format = Affine(bits=4, order=(4,))
    codes, scales, zeros = format.parts(tuple(out.shape))
    made = {"dtype": torch.uint8, "device": out.device}
    parts = [
        torch.randint(256, codes.shape, **made),
        torch.full(scales.shape, 0.01, dtype=torch.bfloat16, device=out.device),
        torch.randint(256, zeros.shape, **made),
    ]
    return partial(unpack, format, parts, out)
