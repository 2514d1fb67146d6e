"""Where the inputs of blocks wait for backward when they are not to stay on the device: RAM, or a scratch file. And
where activations do: a scratch file.

    kept = store.keep(hidden)     # in forward; `hidden` may be freed afterwards
    hidden = kept.take()          # in backward: fresh memory, the same bits, shape and strides

Space is given back when its step is over, or when nothing refers to it any more (a loss that was dropped, an error in
forward). A second backward over the same graph (`retain_graph`) works until the next step begins.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ssdtune.schedule.memory import STAGING_BYTES
from ssdtune.schedule.plan import Tier
from ssdtune.schedule.trace import TraceOp
from ssdtune.swap.kept import ACTIVATIONS, INPUTS, Contents, InputsError, InputStore, RamInputs
from ssdtune.swap.ring import NvmeInputs
from ssdtune.swap.scratch import ScratchFile, lies_in_ram


def staging_bytes(tier: Tier) -> int:
    """Bytes of RAM that a store of this tier takes beside the inputs themselves, for the plan."""
    return STAGING_BYTES if tier is Tier.NVME else 0


def make_input_store(
    tier: Tier,
    *,
    device: torch.device,
    folder: Path | None = None,
    trace: Callable[[TraceOp], None] = lambda op: None,
    timeout_s: float = 600.0,
) -> InputStore | None:
    """The store for a plan's `block_inputs`; None where they stay with autograd.

    folder: for Tier.NVME, where the scratch file goes. Raises ScratchError, InputsError.
    """
    if tier is Tier.DEVICE or (tier is Tier.RAM and device.type == "cpu"):
        return None
    if tier is Tier.RAM:
        return RamInputs(device=device, timeout_s=timeout_s)
    if folder is None:
        raise InputsError(
            "block inputs are to wait on NVMe (offload.block_inputs: nvme), but no folder is given.\n"
            "Set offload.path to a folder on a fast drive; nothing is left in it afterwards."
        )
    file = _scratch(folder, INPUTS, "offload.block_inputs to device or ram")
    return NvmeInputs(file, device=device, trace=trace, timeout_s=timeout_s)


def make_activation_store(
    *,
    device: torch.device,
    folder: Path | None = None,
    trace: Callable[[TraceOp], None] = lambda op: None,
    timeout_s: float = 600.0,
) -> NvmeInputs:
    """The store for activations that a plan has on NVMe, in a scratch file in `folder`. Raises ScratchError,
    InputsError."""
    if folder is None:
        raise InputsError(
            "activations are to wait on NVMe (offload.nvme_activations), but no folder is given.\n"
            "Set offload.path to a folder on a fast drive; nothing is left in it afterwards."
        )
    file = _scratch(folder, ACTIVATIONS, "offload.nvme_activations to none")
    return NvmeInputs(file, device=device, contents=ACTIVATIONS, trace=trace, timeout_s=timeout_s)


def _scratch(folder: Path, contents: Contents, without: str) -> ScratchFile:
    """The file in which they wait. without: what to set to do without."""
    if lies_in_ram(folder):
        raise InputsError(
            f"{folder} lies in RAM (tmpfs): {contents.many} would take there what they are to free.\n"
            f"Set offload.path to a folder on a drive, or {without}."
        )
    return ScratchFile(folder, contents.many)
