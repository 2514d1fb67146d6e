"""Before the first step: the best plan, the run's peak and the time of a step, said; RAM that is short, saved; disk,
reserved."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ssdtune.memory import free_ram
from ssdtune.profiles import own_profile
from ssdtune.schedule.grid import best_of, words_of
from ssdtune.schedule.job import mean_padded
from ssdtune.schedule.memory import ACTIVATIONS, INPUTS, MOST_STATES, NUM_STATES
from ssdtune.schedule.plan import Lane, Plan, Tier
from ssdtune.schedule.planner import least_of
from ssdtune.schedule.search import AT_LIMIT
from ssdtune.sizes import format_size
from ssdtune.trainer.scheduling import Schedule
from ssdtune.visit.memory import hold_to, predict, resident_set_bytes
from ssdtune.visit.rehearsal import Rehearsed, rehearse

if TYPE_CHECKING:
    from pathlib import Path

    from ssdtune.schedule.memory import Peak
    from ssdtune.schedule.planner import Request
    from ssdtune.trainer.trainer import SSDTrainer

AUTO_SHARE = 0.8  # of the RAM that nothing else is predicted to take
SHORT = 1.3  # RAM is short where less than so many times what is predicted is free
# The same where activations stay: what is freed between them leaves holes as large as themselves.
SHORT_OF_KEPT = 2.5


class Rehearsals:
    """Micro-batches of a trainer, rehearsed once for each length."""

    def __init__(self, trainer: SSDTrainer) -> None:
        self.trainer = trainer
        self._known: dict[int, Rehearsed] = {}

    def __call__(self, length: int) -> Rehearsed:
        """Of one micro-batch whose first row has so many tokens and the others one less, so that there is padding to
        mask."""
        if length not in self._known:
            args: Any = self.trainer.args
            row, shorter = (
                {name: [0] * n for name in ("input_ids", "labels")} for n in (length, length - 1)
            )
            collator: Any = self.trainer.data_collator
            num = args.per_device_train_batch_size * getattr(collator, "sequences_per_row", 1)
            rows = [row, *[shorter] * (num - 1)]
            self._known[length] = rehearse(self.trainer.model, collator(rows))
        return self._known[length]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Auto:
    """What nobody has set: budgets for weights (vram means nothing without a device) and for activations that stay;
    tiers: where block inputs may wait, the nearest first; empty: where they do now."""

    ram: bool
    vram: bool = False
    activations: bool = False
    tiers: tuple[Tier, ...] = ()


def schedule_of(
    rehearsals: Rehearsals, lengths: Sequence[int], *, depth: int | None = None
) -> Schedule | None:
    """What steps cost whose micro-batches are as long as these rows make them on average.

    None where this machine has no profile, or the model's work could not be counted. lengths: tokens of every row.
    depth: fills that may run ahead; None: as many as are best. Raises ProfileError for a profile that is broken.
    """
    profile, trainer = own_profile(), rehearsals.trainer
    if profile is None or trainer.streamer is None:
        return None
    args: Any = trainer.args
    rows = args.per_device_train_batch_size
    length = round(mean_padded(lengths, rows))
    rehearsed = rehearsals(length)
    if rehearsed.work is None:
        return None
    return Schedule(
        trainer.streamer,
        rehearsed,
        profile,
        trainer.passes(),
        num_tokens=rows * length * args.gradient_accumulation_steps,
        depth=depth,
    )


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
    must = bool(plan.kept_blocks)
    if schedule is not None:
        found = schedule.improve(request, shares=settling.shares, must=must)
        if found is not None:
            return True
    if plan.ram_bytes <= budgets.ram_bytes and (
        not plan.on_device or plan.device_bytes <= budgets.device_bytes
    ):
        return False
    streamer.replanner.adopt(streamer, request, None)
    return True


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InputsChoice:
    """Where block inputs wait: the tier, and what was compared for it. seconds: None where a tier does not fit; empty:
    times are not known."""

    tier: Tier
    seconds: Mapping[str, float | None]

    def line(self) -> str:
        """For a person."""
        line = f"decided   offload.block_inputs: auto is {self.tier}"
        return (
            f"{line} ({words_of(self.seconds)})"
            if self.seconds
            else f"{line}, the nearest that holds them"
        )


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

    As `ssdtune plan` decides it (`schedule/grid.py`); a farther tier is not looked at where a step is all compute.
    """
    settling = _Settling(rehearsals, schedule, longest_row, base_bytes, auto)
    if len(auto.tiers) < 2:
        return None
    tried: list[tuple[Tier, float | None]] = []
    seconds: dict[str, float | None] = {}
    for tier in auto.tiers:
        fits, step_s, is_done = settling.tried(tier)
        seconds[str(tier)] = step_s if fits else None
        if fits:
            tried.append((tier, step_s))
        if fits and (is_done or schedule is None):
            break
    best = best_of(tried, lambda each: each[1], lambda each: (auto.tiers.index(each[0]),))
    tier = (
        auto.tiers[-1] if best is None else best[0]
    )  # nothing fits: what takes the least, and a warning
    streamer = rehearsals.trainer.streamer
    assert streamer is not None
    if tier is not streamer.engine.plan.block_inputs:
        streamer.keep_inputs_in(tier, folder)
        request = dataclasses.replace(streamer.replanner.request, block_inputs=tier)
        streamer.replanner.adopt(streamer, request, streamer.replanner.layout)
    return InputsChoice(tier=tier, seconds={} if schedule is None else seconds)


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
        self._peak = partial(_predicted, rehearsals, longest_row=longest_row, base_bytes=base_bytes)

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
        if not (self.auto.ram or self.auto.vram):
            return request
        budgets, least = request.budgets, least_of(request)
        ram, device = self._room(plan)
        budgets = dataclasses.replace(
            budgets,
            ram_bytes=max(ram, least.ram_bytes) if self.auto.ram else budgets.ram_bytes,
            device_bytes=max(device, least.device_bytes)
            if self.auto.vram
            else budgets.device_bytes,
        )
        return dataclasses.replace(request, budgets=budgets)

    def tried(self, tier: Tier) -> tuple[bool, float | None, bool]:
        """With block inputs there: whether it fits, a step's seconds where they are known, whether it is all compute."""
        request, plan = self.request(tier), self._plan(tier)
        ram, device = self._room(plan)
        least, asked = least_of(request), request.budgets
        needs_ram = least.ram_bytes if self.auto.ram else min(asked.ram_bytes, plan.ram_bytes)
        fits = ram >= needs_ram
        if plan.on_device:
            needs = least.device_bytes if self.auto.vram else plan.device_bytes
            fits = fits and device >= needs
        if not fits or self.schedule is None:
            return fits, None, False
        found = self.schedule.best(request, shares=self.shares).simulation
        compute_s = found.busy_s.get(Lane.COMPUTE, 0.0) + self.schedule.pricing.between_s
        return True, found.step_s, found.step_s <= (1 + AT_LIMIT) * compute_s

    def _plan(self, tier: Tier | None) -> Plan:
        plan = self.streamer.engine.plan
        return plan if tier is None else dataclasses.replace(plan, block_inputs=tier)

    def _room(self, plan: Plan) -> tuple[int, int]:
        """Bytes that weights may take of RAM and of the device, all else as the plan has it."""
        peak = self._peak(plan=plan)
        ram = plan.ram_bytes + int(AUTO_SHARE * (_free_ram() - _to_come(peak)))
        device = plan.device_bytes if plan.on_device else 0
        if plan.on_device:
            spare = _spare_vram(peak, self.streamer.engine.slots.device)
            device += int(AUTO_SHARE * spare)
        return ram, device


def forecast(
    rehearsals: Rehearsals, *, longest_row: int, base_bytes: int, say: Callable[[str], None]
) -> Peak:
    """The peak of a step whose micro-batches are all of the longest row.

    Where free RAM is short of it, the heap is held to it from now on, and where it is not enough that is said. Room for
    block inputs on NVMe is reserved now. Raises ScratchError where the drive has no such room.

    longest_row: tokens. base_bytes: what the process held before the model was opened.
    """
    trainer = rehearsals.trainer
    peak = _predicted(rehearsals, longest_row, base_bytes)
    for line in peak.lines():
        say(line)
    _save_ram(trainer, peak, say)
    assert trainer.streamer is not None
    store = trainer.streamer.input_store
    if store is not None:
        store.reserve(_kept_bytes(peak))
    return peak


def _predicted(
    rehearsals: Rehearsals, longest_row: int, base_bytes: int, plan: Plan | None = None
) -> Peak:
    """The peak with a plan; None: with the one that is carried out now."""
    trainer = rehearsals.trainer
    args: Any = trainer.args
    return predict(
        trainer.model,
        rehearsals(longest_row).footprint,
        trainer.passes(),
        base_bytes=base_bytes,
        num_states=NUM_STATES.get(getattr(args.optim, "value", args.optim), MOST_STATES),
        plan=plan,
    )


def _save_ram(trainer: SSDTrainer, peak: Peak, say: Callable[[str], None]) -> None:
    """Holds the heap to the prediction where RAM is short of it, and says where it is not enough."""
    to_come, free = _to_come(peak), _free_ram()
    short = SHORT_OF_KEPT if ACTIVATIONS in peak.ram else SHORT
    if short * to_come > free:
        hold_to(trainer.model, peak)
    if to_come > free:
        say(
            f"warning: {format_size(to_come)} of RAM more are to be held and {format_size(free)} are free: "
            "lower offload.ram, offload.activations, per_device_train_batch_size or gradient_accumulation_steps, or set "
            "offload.block_inputs: nvme"
        )
    device = trainer.streamer.engine.slots.device if trainer.streamer is not None else None
    if device is not None and device.type == "cuda" and _spare_vram(peak, device) < 0:
        say(
            f"warning: {format_size(peak.device_bytes)} of the device are to be held, "
            f"{format_size(-_spare_vram(peak, device))} more than is free: lower offload.vram or "
            "per_device_train_batch_size, or set offload.block_inputs: ram"
        )


def _to_come(peak: Peak) -> int:
    """Bytes of RAM that are to be held beyond what is held now."""
    return max(0, peak.ram_bytes - resident_set_bytes())


def _free_ram() -> int:
    """This process's share."""
    return free_ram() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _spare_vram(peak: Peak, device: torch.device) -> int:
    """Bytes of the device that are free and not to be held: negative where it will be short."""
    free, _ = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    cached = torch.cuda.memory_reserved(device) - allocated
    return free + cached - max(0, peak.device_bytes - allocated)


def _kept_bytes(peak: Peak) -> int:
    parts: tuple[Mapping[str, int], ...] = (peak.nvme, peak.ram)
    return next((p[INPUTS] for p in parts if INPUTS in p), 0)
