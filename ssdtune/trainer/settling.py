"""What a run leaves open, settled before its first step: budgets, and where block inputs wait."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from ssdtune.memory import nearest_folder, processes_here
from ssdtune.schedule.choices import least_of
from ssdtune.schedule.grid import UNMEASURED, best_of, words_of
from ssdtune.schedule.hunt import AT_LIMIT
from ssdtune.schedule.memory import INPUTS, room_for_weights
from ssdtune.schedule.outcome import AUTO_DRIVE_SHARE
from ssdtune.schedule.plan import Budgets, Lane, Plan, Tier
from ssdtune.schedule.profile import ProfileError
from ssdtune.trainer.forecast import free_ram_share, free_vram, predicted, spare_vram
from ssdtune.visit.memory import resident_set_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from ssdtune.schedule.choices import Request
    from ssdtune.trainer.forecast import Rehearsals
    from ssdtune.trainer.scheduling import Schedule
    from ssdtune.visit.streamer import Streamer


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Auto:
    """What nobody has set: budgets for weights (vram means nothing without a device) and for activations that stay;
    drive: a folder whose free space activations may take, None: what the plan says; tiers: where block inputs may wait,
    the nearest first; empty: where they do now."""

    ram: bool
    vram: bool = False
    activations: bool = False
    drive: Path | None = None
    tiers: tuple[Tier, ...] = ()


def settle(
    rehearsals: Rehearsals,
    schedule: Schedule | None,
    *,
    longest_row: int,
    base_bytes: int,
    auto: Auto,
) -> bool:
    """Carries out the best plan for what memory there is; whether it is another than before.

    auto: which budgets are what is free beside the rest of the predicted peak, no figures of the user's.
    """
    streamer = rehearsals.trainer.streamer
    assert streamer is not None
    settling = _Settling(rehearsals, schedule, longest_row, base_bytes, auto)
    request, plan = settling.request(), streamer.engine.plan
    budgets = request.budgets
    # Before anything was known of activations, the plan let all blocks keep them.
    must = bool(plan.kept_blocks or plan.stored_blocks)
    if schedule is not None:
        found = schedule.improve(request, shares=settling.shares, must=must)
        if found is not None:
            _open_store(streamer, auto.drive)
            return True
    if (
        plan.ram_bytes <= budgets.ram_bytes
        and (not plan.on_device or plan.device_bytes <= budgets.device_bytes)
        and plan.budgets.nvme_activation_bytes <= budgets.nvme_activation_bytes
    ):
        return False
    streamer.replanner.adopt(streamer, request, None)
    return True


def _open_store(streamer: Streamer, drive: Path | None) -> None:
    """Opens the store for activations where the plan has some on a drive that nobody named; where it has none, later
    plans have none either."""
    if drive is None:
        return
    if streamer.engine.plan.stored_blocks:
        streamer.keep_activations_in(drive)
        return
    replanner = streamer.replanner
    budgets = dataclasses.replace(replanner.request.budgets, nvme_activation_bytes=0)
    replanner.request = dataclasses.replace(replanner.request, budgets=budgets)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InputsChoice:
    """Where block inputs wait: the tier, whether they fit there, and what was compared for it. seconds: None where a
    tier does not fit; empty: times are not known."""

    tier: Tier
    fits: bool
    seconds: Mapping[str, float | str | None]

    def line(self) -> str:
        """For a person."""
        line = f"decided   offload.block_inputs: auto is {self.tier}"
        if not self.fits:
            return f"{line}, which takes the least: nothing fits what is free"
        if self.seconds:
            return f"{line} ({words_of(self.seconds)})"
        return f"{line}, the nearest that holds them"


def settle_inputs(
    rehearsals: Rehearsals,
    schedule: Schedule | None,
    *,
    longest_row: int,
    base_bytes: int,
    auto: Auto,
    folder: Path,
) -> InputsChoice | None:
    """Block inputs wait from now on where they fit and steps are predicted to be the fastest; None where there is no
    choice. folder: for those on NVMe.

    As `ssdtune plan` decides it (`schedule/grid.py`), for rows as they are cut; a farther tier is not looked at where a
    step is all compute.
    """
    if len(auto.tiers) < 2:
        return None
    settling = _Settling(rehearsals, schedule, longest_row, base_bytes, auto)
    tried: list[tuple[Tier, float | None]] = []
    seconds: dict[str, float | str | None] = {}
    for tier in auto.tiers:
        fits, step_s, is_done = settling.tried(tier)
        seconds[str(tier)] = (UNMEASURED if step_s is None else step_s) if fits else None
        if fits:
            tried.append((tier, step_s))
        if fits and (is_done or schedule is None):
            break
    best = best_of(tried, lambda each: each[1], lambda each: (auto.tiers.index(each[0]),))
    # Where nothing fits it is what takes the least; the forecast's warning comes besides.
    tier = min(auto.tiers, key=settling.peak_bytes) if best is None else best[0]
    streamer = rehearsals.trainer.streamer
    assert streamer is not None
    if tier is not streamer.engine.plan.block_inputs:
        streamer.keep_inputs_in(tier, folder)
        request = dataclasses.replace(streamer.replanner.request, block_inputs=tier)
        streamer.replanner.adopt(streamer, request, streamer.replanner.layout)
    return InputsChoice(
        tier=tier, fits=best is not None, seconds={} if schedule is None else seconds
    )


class _Settling:
    """What a run's memory leaves for weights, block inputs here or there."""

    def __init__(
        self,
        rehearsals: Rehearsals,
        schedule: Schedule | None,
        longest_row: int,
        base_bytes: int,
        auto: Auto,
    ) -> None:
        streamer = rehearsals.trainer.streamer
        assert streamer is not None
        self.streamer, self.schedule, self.auto = streamer, schedule, auto
        self._peak = partial(predicted, rehearsals, longest_row=longest_row, base_bytes=base_bytes)

    @property
    def shares(self) -> bool:
        """Whether weights and activations share what is free."""
        on_device = self.streamer.engine.plan.on_device
        return self.auto.activations and (self.auto.vram if on_device else self.auto.ram)

    def request(self, tier: Tier | None = None) -> Request:
        """With budgets that are what is free. tier: of block inputs, None: where they are."""
        plan, request = self._plan(tier), self.streamer.replanner.request
        request = dataclasses.replace(request, block_inputs=plan.block_inputs)
        if self.schedule is not None:
            request = dataclasses.replace(request, activation_bytes=self.schedule.activation_bytes)
            if self.auto.drive is not None and self.schedule.profile.knows_writes:
                request = _with_drive(request, self.auto.drive)
        request = self._with_fewer_writes(request, plan)
        if not (self.auto.ram or self.auto.vram):
            return request
        budgets, least = request.budgets, least_of(request)
        ram, device = self._room(plan, least)
        budgets = dataclasses.replace(
            budgets,
            ram_bytes=max(ram, least.ram_bytes) if self.auto.ram else budgets.ram_bytes,
            device_bytes=max(device, least.device_bytes)
            if self.auto.vram
            else budgets.device_bytes,
        )
        return dataclasses.replace(request, budgets=budgets)

    def _with_fewer_writes(self, request: Request, plan: Plan) -> Request:
        """Activations on the drive only as far as a step may write them besides its block inputs. plan: where these are."""
        if request.written_bytes is None:
            return request
        left = max(request.written_bytes - self._inputs_bytes(plan), 0)
        budgets = request.budgets
        fewer = min(budgets.nvme_activation_bytes, left)
        budgets = dataclasses.replace(budgets, nvme_activation_bytes=fewer)
        return dataclasses.replace(request, budgets=budgets)

    def _inputs_bytes(self, plan: Plan) -> int:
        """Of the drive, of block inputs."""
        return self._peak(plan=plan).nvme.get(INPUTS, 0)

    def tried(self, tier: Tier) -> tuple[bool, float | None, bool]:
        """With block inputs there: whether it fits, a step's seconds where they are known, whether it is all compute."""
        request, plan = self.request(tier), self._plan(tier)
        least, asked = least_of(request), request.budgets
        needs = Budgets(
            ram_bytes=least.ram_bytes if self.auto.ram else min(asked.ram_bytes, plan.ram_bytes),
            device_bytes=least.device_bytes if self.auto.vram else plan.device_bytes,
        )
        ram, device = self._room(plan, needs)
        fits = ram >= needs.ram_bytes and (not plan.on_device or device >= needs.device_bytes)
        most = request.written_bytes
        fits = fits and (most is None or self._inputs_bytes(plan) <= most)
        if not fits or self.schedule is None:
            return fits, None, False
        try:
            found = self.schedule.best(request, shares=self.shares).simulation
        except ProfileError:  # an older profile lacks what this tier needs: writing, above all
            return True, None, False
        compute_s = found.busy_s.get(Lane.COMPUTE, 0.0) + self.schedule.pricing.between_s
        return True, found.step_s, found.step_s <= (1 + AT_LIMIT) * compute_s

    def peak_bytes(self, tier: Tier) -> int:
        """Of RAM and the device together, with block inputs there."""
        peak = self._peak(plan=self._plan(tier))
        return peak.ram_bytes + peak.device_bytes

    def _plan(self, tier: Tier | None) -> Plan:
        plan = self.streamer.engine.plan
        return plan if tier is None else dataclasses.replace(plan, block_inputs=tier)

    def _room(self, plan: Plan, least: Budgets) -> tuple[int, int]:
        """Bytes that weights may take of RAM and of the device, all else as the plan has it. least: what they need."""
        peak, held = self._peak(plan=plan), resident_set_bytes()
        ram = room_for_weights(
            free_ram_share() + held,
            peak_bytes=max(peak.ram_bytes, held),
            weights_bytes=plan.ram_bytes,
            least_bytes=least.ram_bytes,
            is_heap=not plan.on_device,
        )
        if not plan.on_device:
            return ram, 0
        free = free_vram(self.streamer.engine.slots.device)
        device = room_for_weights(
            free,
            peak_bytes=free - spare_vram(peak, self.streamer.engine.slots.device),
            weights_bytes=plan.device_bytes,
            least_bytes=least.device_bytes,
            is_heap=False,
        )
        return ram, device


def _with_drive(request: Request, folder: Path) -> Request:
    """Activations may take a share of what is free there, those of all processes here together."""
    free = shutil.disk_usage(nearest_folder(folder)).free // processes_here()
    num_bytes = int(AUTO_DRIVE_SHARE * free)
    budgets = dataclasses.replace(request.budgets, nvme_activation_bytes=num_bytes)
    return dataclasses.replace(request, budgets=budgets)
