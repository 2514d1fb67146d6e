"""A run takes the plan that is predicted to be the fastest, keeps its bits through a change of plan, and changes it
where steps come out otherwise than predicted."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import support
import tiny_models
import torch

from ssdtune.config import load_config
from ssdtune.data import CausalCollator
from ssdtune.jobs import Jobs, Source
from ssdtune.profiles import own_profile_path, refit_path, save_profile
from ssdtune.schedule.choices import Choice, size_classes
from ssdtune.schedule.machine import Drive, Machine
from ssdtune.schedule.outcome import Choices, Outcome, outcome
from ssdtune.schedule.plan import Budgets, Lane, Tier
from ssdtune.schedule.planner import layout_of
from ssdtune.schedule.profile import OPERATORS, Profile
from ssdtune.schedule.saved_profile import profile_from
from ssdtune.trainer import SSDConfig, SSDTrainer, scheduling
from ssdtune.trainer import forecast as forecast_module
from ssdtune.trainer.forecast import Rehearsals, schedule_of
from ssdtune.trainer.scheduling import WATCHED_STEPS, WITNESSES, Schedule, Watch
from ssdtune.trainer.settling import Auto, settle, settle_inputs
from ssdtune.trainer.telemetry import StepRecord, Telemetry
from ssdtune.visit.memory import resident_set_bytes

ROWS, LENGTH, MICRO = 2, 12, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llama")
    tiny_models.save(tiny_models.build("llama", dtype=torch.float32), made)
    return made


def a_profile(read_rate: float = 1e9, write_rate: float | None = None) -> Profile:
    """A FLOP or a byte takes a nanosecond, but for reading: `read_rate` bytes a second. write_rate: None: not measured."""
    rate = [[1, 1e-9], [10**9, 1.0]]
    moves = {"nvme_read": read_rate} | ({"nvme_write": write_rate} if write_rate else {})
    transfers = {name: [[1, 1 / each], [10**9, 10**9 / each]] for name, each in moves.items()}
    content = {
        "name": "made up",
        "operators": {"float32": dict.fromkeys(OPERATORS, rate)},
        "transfers": {**transfers, "unpack": rate},
    }
    return profile_from(content, "here")


@pytest.fixture
def make(folder: Path, tmp_path: Path) -> Iterator[Any]:
    """A trainer of a streamed model with `factor` times the smallest RAM; closed after the test."""
    opened = []

    def trainer(factor: float = 3.0) -> SSDTrainer:
        model = support.streamed(folder, factor=factor)
        opened.append(model)
        args = SSDConfig(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=ROWS,
            gradient_accumulation_steps=MICRO,
            report_to="none",
            use_cpu=True,
        )
        row = {"input_ids": [3] * LENGTH, "labels": [3] * LENGTH}
        return SSDTrainer(
            support.with_lora(model), args, CausalCollator(0), train_dataset=[row] * ROWS * MICRO
        )

    yield trainer
    for model in opened:
        model.ssdtune.close()


def scheduled(trainer: SSDTrainer, profile: Profile, monkeypatch: pytest.MonkeyPatch) -> Schedule:
    monkeypatch.setattr(forecast_module, "own_profile", lambda: profile)
    found = schedule_of(Rehearsals(trainer), [LENGTH] * ROWS)
    assert found is not None
    return found


def larger(schedule: Schedule, num_layers: float) -> Any:
    """The request with room for so many layers more."""
    request = schedule.streamer.replanner.request
    room = max(b.slot_bytes for b in request.blocks if "layers" in b.name)
    ram = request.budgets.ram_bytes + int(num_layers * room)
    return dataclasses.replace(request, budgets=Budgets(ram_bytes=ram))


# ------------------------------------------------------------------ another plan between steps


def steps(model: Any, num: int, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    losses = []
    for step in range(num):
        torch.manual_seed(step)
        ids = torch.randint(3, 60, (4, LENGTH))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def trained(folder: Path, reopened: bool) -> tuple[list[torch.Tensor], list[torch.Tensor], Any]:
    base = support.streamed(folder, factor=1.2)
    model = support.with_lora(base)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = steps(model, 2, optimizer)
    streamer: Any = base.ssdtune
    if reopened:
        request = streamer.replanner.request
        ram = 5 * request.budgets.ram_bytes
        request = dataclasses.replace(request, budgets=Budgets(ram_bytes=ram))
        classes = size_classes(request.blocks)
        choice = Choice(
            classes=classes,
            num_slots=tuple(min(2, len(members)) for members in classes),
            prefetch=1,
            residents=frozenset({2, 4}),
        )
        streamer.replanner.adopt(streamer, request, layout_of(request, choice))
        assert streamer.engine.plan.tiers.count(Tier.RAM) == 2
    losses += steps(model, 2, optimizer)
    after = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    streamer.close()
    return losses, after, streamer


def test_another_plan_between_steps_keeps_every_bit(folder: Path) -> None:
    straight, changed = trained(folder, reopened=False), trained(folder, reopened=True)
    assert all(torch.equal(a, b) for a, b in zip(straight[0], changed[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(straight[1], changed[1], strict=True))


def test_trace_and_steps_go_on_after_a_change_of_plan(folder: Path) -> None:
    streamer = trained(folder, reopened=True)[2]
    numbers = [op.step for op in streamer.engine.trace]
    assert sorted(set(numbers)) == [0, 1, 2, 3, 4], (
        "what was filled before the first step has number 0"
    )
    last = [op for op in streamer.engine.trace if op.step == 4]
    assert not any(op.is_miss for op in last)
    assert sum(op.kind == "load" for op in last) < sum(
        op.kind == "load" for op in streamer.engine.trace if op.step == 2
    )


# ------------------------------------------------------------------ before the first step


def test_the_best_plan_is_carried_out_where_it_gains(make, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = scheduled(make(), a_profile(read_rate=1e7), monkeypatch)
    before = schedule.predicted()
    found = schedule.improve(larger(schedule, 4))
    assert found is not None
    assert schedule.streamer.engine.plan is not found.plan
    assert schedule.streamer.engine.plan == found.plan
    assert schedule.predicted().step_s < 0.98 * before.step_s


def test_a_plan_that_gains_nothing_is_left_alone(make, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = scheduled(make(), a_profile(read_rate=1e15), monkeypatch)
    engine = schedule.streamer.engine
    assert schedule.improve(larger(schedule, 4)) is None
    assert schedule.streamer.engine is engine


@pytest.mark.parametrize("free", [10**12, 10**6])
def test_an_automatic_budget_is_what_the_rest_of_the_peak_leaves(
    make, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    """Without a profile too: with RAM to spare all stays, without it the plan shrinks to what there is."""
    monkeypatch.setattr(forecast_module, "free_ram", lambda: free)
    trainer = make(factor=3.0)
    plan = trainer.streamer.engine.plan
    changed = settle(
        Rehearsals(trainer),
        None,
        longest_row=LENGTH,
        base_bytes=resident_set_bytes(),
        auto=Auto(ram=True),
    )
    now = trainer.streamer.engine.plan
    if free > 10**9:
        assert not changed
        assert now is plan
    else:
        assert changed
        assert now.ram_bytes < plan.ram_bytes


def test_a_run_takes_the_budget_that_was_planned(
    make, monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    """Of the same free memory, with the same process before the model."""
    free, profile = 4 * 10**9, a_profile(read_rate=1e6)
    monkeypatch.setattr(forecast_module, "free_ram", lambda: free - resident_set_bytes())
    monkeypatch.setenv("SSDTUNE_CACHE", str(tmp_path / "cache"))
    trainer = make()
    schedule = scheduled(trainer, profile, monkeypatch)
    auto, base = Auto(ram=True), resident_set_bytes()
    assert settle(Rehearsals(trainer), schedule, longest_row=LENGTH, base_bytes=base, auto=auto)
    path = tmp_path / "train.yaml"
    path.write_text(
        f"model_name_or_path: {folder}\ndataset: nowhere.jsonl\noutput_dir: {tmp_path}/run\n"
        f"max_length: {LENGTH}\nper_device_train_batch_size: {ROWS}\n"
        f"gradient_accumulation_steps: {MICRO}\n"
    )
    job = Jobs(Source.of(load_config(path).config, None, on_device=False))()
    job = dataclasses.replace(job, fixed=dataclasses.replace(job.fixed, base_bytes=base))
    machine = Machine(name="this one", ram_bytes=free, drive=Drive(name="/nvme"), profile=profile)
    planned = outcome(job, machine, Choices(micro_batches=MICRO))
    assert isinstance(planned, Outcome)
    ran = trainer.streamer.engine.plan.budgets.ram_bytes
    assert planned.plan.budgets.ram_bytes == pytest.approx(ran, rel=0.01)


def test_a_budget_of_the_users_is_kept(make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make()
    schedule = scheduled(trainer, a_profile(read_rate=1e6), monkeypatch)
    budget = trainer.streamer.engine.plan.budgets
    settle(
        Rehearsals(trainer), schedule, longest_row=LENGTH, base_bytes=10**8, auto=Auto(ram=False)
    )
    assert trainer.streamer.engine.plan.budgets == budget
    assert trainer.streamer.engine.plan.ram_bytes <= budget.ram_bytes


@pytest.mark.parametrize(("ram", "stay"), [(True, True), (False, False)])
def test_activations_share_what_is_free_where_nobody_set_a_budget(
    make, monkeypatch: pytest.MonkeyPatch, ram: bool, stay: bool
) -> None:
    monkeypatch.setattr(forecast_module, "free_ram", lambda: 10**9)
    trainer = make()
    schedule = scheduled(trainer, a_profile(read_rate=1e15), monkeypatch)
    auto = Auto(ram=ram, activations=True)
    settle(Rehearsals(trainer), schedule, longest_row=LENGTH, base_bytes=10**8, auto=auto)
    plan = trainer.streamer.engine.plan
    assert len(plan.kept_blocks) == (4 if stay else 0)
    trainer.train()
    activations = trainer.streamer.activations
    assert (activations.num_kept > 0) == stay
    assert activations.num_over == 0


@pytest.mark.parametrize(("write_rate", "stored"), [(1e15, True), (1e3, False), (None, False)])
def test_activations_go_to_the_drive_where_nobody_said_how_many_and_that_is_faster(
    make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write_rate: float | None, stored: bool
) -> None:
    trainer = make()
    profile = a_profile(read_rate=1e15, write_rate=write_rate)
    schedule = scheduled(trainer, profile, monkeypatch)
    auto = Auto(ram=False, drive=tmp_path / "not made yet")
    settle(Rehearsals(trainer), schedule, longest_row=LENGTH, base_bytes=10**8, auto=auto)
    streamer = trainer.streamer
    assert bool(streamer.engine.plan.stored_blocks) == stored
    assert (streamer.activations.store is not None) == stored
    assert bool(streamer.replanner.request.budgets.nvme_activation_bytes) == stored
    trainer.train()
    assert (streamer.activations.num_stored > 0) == stored
    assert streamer.activations.num_over == 0


# ------------------------------------------------------------------ where block inputs wait


def test_inputs_on_another_tier_between_steps_keep_every_bit(folder: Path, tmp_path: Path) -> None:
    straight = trained(folder, reopened=False)
    base = support.streamed(folder, factor=1.2)
    model = support.with_lora(base)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = steps(model, 2, optimizer)
    streamer: Any = base.ssdtune
    streamer.keep_inputs_in(Tier.NVME, tmp_path)
    request = dataclasses.replace(streamer.replanner.request, block_inputs=Tier.NVME)
    streamer.replanner.adopt(streamer, request, None)
    losses += steps(model, 2, optimizer)
    after = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    streamer.close()
    assert all(torch.equal(a, b) for a, b in zip(straight[0], losses, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(straight[1], after, strict=True))


TIERS = (Tier.DEVICE, Tier.NVME)


@pytest.mark.parametrize(("kept", "tier"), [(10**4, Tier.DEVICE), (10**9, Tier.NVME)])
@pytest.mark.parametrize("has_times", [True, False])
def test_inputs_wait_where_they_fit_and_it_is_said(
    make,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    kept: int,
    tier: Tier,
    has_times: bool,
) -> None:
    """A gigabyte of RAM is free: two micro-batches of a gigabyte of inputs have no room there."""
    monkeypatch.setattr(forecast_module, "free_ram", lambda: 10**9)
    trainer = make()
    schedule = scheduled(trainer, a_profile(), monkeypatch) if has_times else None
    rehearsals = Rehearsals(trainer)
    found = rehearsals(LENGTH)
    larger_inputs = dataclasses.replace(found.footprint, kept_bytes=kept)
    rehearsals._known[LENGTH] = dataclasses.replace(found, footprint=larger_inputs)
    choice = settle_inputs(
        rehearsals,
        schedule,
        longest_row=LENGTH,
        base_bytes=10**8,
        auto=Auto(ram=True, tiers=TIERS),
        folder=tmp_path,
    )
    assert choice is not None
    assert choice.tier is trainer.streamer.engine.plan.block_inputs is tier
    assert (trainer.streamer.input_store is None) == (tier is Tier.DEVICE)
    assert f"auto is {tier}" in choice.line()
    if schedule is not None:
        assert schedule.is_known == (tier is Tier.DEVICE), "the profile has no writes"
    if tier is Tier.NVME and has_times:
        assert "device does not fit, nvme " in choice.line()
    trainer.train()


def test_a_tier_of_the_users_is_not_moved(make, tmp_path: Path) -> None:
    trainer = make()
    auto = Auto(ram=True)
    choice = settle_inputs(
        Rehearsals(trainer), None, longest_row=LENGTH, base_bytes=0, auto=auto, folder=tmp_path
    )
    assert choice is None


# ------------------------------------------------------------------ during the run


def records(num: int, seconds: float, busy: dict[str, float]) -> list[StepRecord]:
    one = StepRecord(
        step=1,
        seconds=seconds,
        num_tokens=1,
        busy_s=busy,
        stall_s=0.0,
        num_bytes_read=0,
        num_misses=0,
    )
    return [one] * num


def watched(schedule: Schedule, read_factor: float, num: int) -> tuple[Watch, list[str]]:
    """A watch that has seen `num` steady steps whose reading took so many times what was predicted."""
    lines: list[str] = []
    telemetry = Telemetry(schedule.streamer)
    watch = Watch(schedule, telemetry, lines.append)
    first = schedule.predicted()
    busy = {str(lane): s for lane, s in first.busy_s.items()}
    busy[str(Lane.NVME_READ)] *= read_factor
    watch.on_train_begin(None, None, None)
    telemetry.records += records(1, 99.0, {})
    for _ in range(num):
        telemetry.records += records(1, read_factor * first.step_s, busy)
        watch.on_step_end(None, None, None)
    return watch, lines


def test_steps_as_predicted_change_nothing(make, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = scheduled(make(), a_profile(), monkeypatch)
    watch, lines = watched(schedule, 1.04, 3 * WATCHED_STEPS)
    assert (watch.num_changes, lines, schedule.factors) == (0, [], {})
    compared = watch.compared()
    assert compared["step"][1] == pytest.approx(1.04 * compared["step"][0])


def test_slow_reading_corrects_the_prediction_and_changes_the_plan(
    make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At first reading is hidden and nothing needs to stay; then it takes a hundred times as long."""
    schedule = scheduled(make(), a_profile(read_rate=1e12), monkeypatch)
    replanner = schedule.streamer.replanner
    replanner.request = larger(schedule, 4)
    watch, lines = watched(schedule, 1e5, WATCHED_STEPS)
    assert watch.num_changes == 1
    assert "replanned" in lines[0]
    assert schedule.factors[Lane.NVME_READ] == pytest.approx(1e5)
    assert schedule.factors[Lane.COMPUTE] == pytest.approx(1.0)
    assert schedule.streamer.engine.plan.ram_bytes <= replanner.request.budgets.ram_bytes


def test_a_miss_that_no_lane_explains_is_searched_for_less_and_less(
    make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that take twice as long though each lane is as busy as predicted: no plan is better, and a search takes its
    seconds each time."""
    schedule = scheduled(make(), a_profile(read_rate=1e15), monkeypatch)
    searches: list[Any] = []
    best = schedule.best
    monkeypatch.setattr(
        schedule, "best", lambda *given, **more: searches.append(given) or best(*given, **more)
    )
    lines: list[str] = []
    watch = Watch(schedule, Telemetry(schedule.streamer), lines.append)
    busy = {str(lane): s for lane, s in watch.first.busy_s.items()}
    watch.on_train_begin(None, None, None)
    watch.telemetry.records += records(1, 99.0, {})
    for _ in range(31 * WATCHED_STEPS):
        watch.telemetry.records += records(1, 2 * watch.first.step_s, busy)
        watch.on_step_end(None, None, None)
    assert (watch.num_changes, lines) == (0, [])
    assert len(searches) == 5, "after 4, 12, 28, 60 and 124 steps"


def test_it_is_seen_in_a_real_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make
) -> None:
    """A profile that is far off: the real steps correct it, and the run still ends with finite losses."""
    monkeypatch.setenv("SSDTUNE_CACHE", str(tmp_path / "cache"))
    save_profile(a_profile(), own_profile_path())
    trainer = make()
    trainer.args.max_steps = WATCHED_STEPS + 3
    schedule = schedule_of(Rehearsals(trainer), [LENGTH] * ROWS)
    assert schedule is not None
    telemetry = Telemetry(trainer.streamer)
    lines: list[str] = []
    watch = Watch(schedule, telemetry, lines.append)
    trainer.add_callback(telemetry)
    trainer.add_callback(watch)
    trainer.train()
    assert set(schedule.factors) >= {Lane.COMPUTE, Lane.NVME_READ}
    compared = watch.compared()
    assert set(compared) >= {"step", "compute", "nvme_read"}
    assert all(min(pair) > 0 for pair in compared.values())


def witness(schedule: Schedule, off: float, num: int, **busy: float) -> tuple[Watch, list[str]]:
    """A watch of a run that is over, whose steady steps took so many times what was predicted, and lanes that of `busy`
    besides."""
    lines: list[str] = []
    watch = Watch(schedule, Telemetry(schedule.streamer), lines.append)
    watch.on_train_begin(None, None, None)
    taken = {str(lane): busy.get(lane, 1.0) * off * s for lane, s in watch.first.busy_s.items()}
    watch.telemetry.records += records(1, 99.0, {})
    for _ in range(num):
        watch.telemetry.records += records(1, off * watch.first.step_s, taken)
        watch.on_step_end(None, None, None)
    watch.keep()
    return watch, lines


@pytest.fixture
def measured(make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a schedule by this machine's profile; nobody else uses the cores."""
    monkeypatch.setenv("SSDTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scheduling, "cpu_seconds", lambda: 0.0)
    save_profile(a_profile(read_rate=1e8), own_profile_path())

    def schedule() -> Schedule:
        found = schedule_of(Rehearsals(make()), [LENGTH] * ROWS)
        assert found is not None
        return found

    return schedule


def test_what_a_steady_run_was_off_by_is_in_the_next_prediction(measured) -> None:
    first = measured()
    _, lines = witness(first, 1.04, WITNESSES)
    assert len(lines) == 1
    assert re.match(r"refitted  for the next plan: NVMe read x 1\.02, compute x 1\.02", lines[0])
    again = measured()
    assert again.predicted().step_s == pytest.approx(1.04**0.5 * first.predicted().step_s, rel=0.01)
    assert re.search(r"refitted  by earlier runs: .*compute x 1\.02", "\n".join(again.lines()))
    _, lines = witness(again, 1.0, WITNESSES)
    assert lines == [], "as predicted: nothing is moved"


@pytest.mark.parametrize(
    ("off", "num", "busy", "others"),
    [
        (1.04, WITNESSES - 1, {}, 0.0),
        (1.4, WITNESSES, {}, 0.0),
        (1.04, WITNESSES, {"nvme_read": 3.0}, 0.0),
        (1.04, WITNESSES, {}, 0.5),
    ],
    ids=["few steps", "slowed", "a slowed drive", "others used the cores"],
)
def test_a_run_that_is_no_witness_refits_nothing(
    measured, monkeypatch: pytest.MonkeyPatch, off: float, num: int, busy: Any, others: float
) -> None:
    monkeypatch.setattr(scheduling, "cpu_seconds", lambda: others * time.perf_counter())
    schedule = measured()
    monkeypatch.setattr(schedule, "improve", lambda request: None)
    _, lines = witness(schedule, off, num, **busy)
    assert (lines, refit_path().exists()) == ([], False)


def test_steps_that_differ_or_miss_refit_nothing(measured) -> None:
    schedule = measured()
    watch, _ = witness(schedule, 1.04, 0)
    plain = records(
        1, 1.04 * watch.first.step_s, {"compute": 1.04 * watch.first.busy_s[Lane.COMPUTE]}
    )
    longer = [dataclasses.replace(plain[0], seconds=1.3 * plain[0].seconds)]
    watch.telemetry.records += WITNESSES * (plain + longer)
    watch.keep()
    watch.telemetry.records[1:] = WITNESSES * plain + [dataclasses.replace(plain[0], num_misses=1)]
    watch.keep()
    assert not refit_path().exists()
    watch.telemetry.records.pop()
    watch.keep()
    assert refit_path().exists(), "but for these"


def test_a_profile_that_was_measured_anew_meanwhile_is_not_refitted(measured) -> None:
    schedule = measured()
    save_profile(a_profile(read_rate=2e9), own_profile_path())
    assert witness(schedule, 1.04, WITNESSES)[1] == []
    assert not refit_path().exists()


def test_a_drive_that_several_processes_read_says_nothing_of_one_that_reads_alone(
    measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = measured()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert witness(schedule, 1.04, WITNESSES)[1] == []
    assert not refit_path().exists()


def test_what_experts_took_says_nothing_of_the_machine(measured) -> None:
    schedule = measured()
    replanner = schedule.streamer.replanner
    replanner.request = dataclasses.replace(replanner.request, visits_vary=True)
    assert witness(schedule, 1.04, WITNESSES)[1] == []
    assert not refit_path().exists()


def test_a_refit_that_cannot_be_kept_fails_no_run(measured) -> None:
    schedule = measured()
    refit_path().mkdir()
    (line,) = witness(schedule, 1.04, WITNESSES)[1]
    assert line.startswith("note: what the run says of the profile was not kept")
