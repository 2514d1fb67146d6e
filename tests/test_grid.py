"""Rows at once and the tier of block inputs against brute force, and what a person is told of it. No clock is read."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from ssdtune.config import ConfigError, TrainConfig, load_config, to_yaml
from ssdtune.durable import commit_folder, new_temporary_folder
from ssdtune.planning import settle
from ssdtune.planning.settle import settled
from ssdtune.planning.text import assumed_lines
from ssdtune.planning.ways import alternatives, decide
from ssdtune.schedule.cost import Operator, StepWork, Work
from ssdtune.schedule.grid import (
    WORTH,
    Point,
    best_of,
    best_point,
    divisors,
    grid,
    tiers_for,
    words_of,
)
from ssdtune.schedule.job import Job, Rows
from ssdtune.schedule.machine import Device, Drive, Machine
from ssdtune.schedule.memory import Fixed, Footprint
from ssdtune.schedule.outcome import Choices, Outcome, outcome
from ssdtune.schedule.plan import BlockShape, Tier
from ssdtune.schedule.planner import plain_orders
from ssdtune.schedule.profile import OPERATORS, Profile
from ssdtune.schedule.saved_profile import profile_from

MB = 10**6
NUM, ROWS = 4, 4
CALL_S = 0.02  # before an operator: what makes few rows at once slow


def a_profile(*, call_s: float = CALL_S, read: float = 1e9, link: float = 1e9) -> Profile:
    """A FLOP takes a microsecond, a call `call_s` besides."""
    flop = [[1, call_s + 1e-6], [10**6, call_s + 1.0]]
    moves = {
        "nvme_read": read,
        "nvme_write": read,
        "h2d": link,
        "d2h": link,
        "unpack": 1e10,
    }
    content = {
        "name": "made up",
        "operators": {"float32": dict.fromkeys(OPERATORS, flop)},
        "transfers": {n: [[1, 1 / rate], [10**9, 10**9 / rate]] for n, rate in moves.items()},
    }
    return profile_from(content, "here")


def a_job(rows_at_once: int, *, kept: int = 12 * MB, workspace: int = 6 * MB) -> Job:
    """Work, inputs and workspace grow with the rows at once; a step has ROWS rows."""
    blocks = tuple(
        BlockShape(name=f"layers.{i}", slot_bytes=10 * MB, file_bytes=10 * MB) for i in range(NUM)
    )
    orders = plain_orders(NUM, first_trained=1)
    one = Work({Operator("matmul", 1000.0 * rows_at_once): 1})
    passes = {key: [one] for key in dict.fromkeys(orders["train"])}
    return Job(
        model="m",
        architecture="M",
        dtype="float32",
        num_parameters=1000,
        num_trained=10,
        blocks=blocks,
        orders=orders,
        work=StepWork(
            passes={"train": passes, "forward": passes}, between=Work({}), dtype="float32"
        ),
        footprint=Footprint(
            kept_bytes=kept * rows_at_once,
            hidden_bytes=0,
            held_bytes=0,
            workspace_bytes=workspace * rows_at_once,
            loss_bytes=0,
            forward_bytes=workspace * rows_at_once,
            how="made up",
        ),
        fixed=Fixed(
            base_bytes=0, resident_bytes=0, trained_bytes=0, gradient_bytes=0, optimizer_bytes=0
        ),
        rows_at_once=rows_at_once,
        micro_batches=ROWS // rows_at_once,
        num_steps=10,
        num_epochs=1,
        chunk_tokens=64,
        method="LoRA",
        data=Rows(
            num=0, mean_tokens=8, padded_tokens=8, longest=8, trained_share=1.0, is_estimate=True
        ),
    )


def a_machine(ram: int, *, device: int = 0, profile: Profile | None = None) -> Machine:
    return Machine(
        name="made up",
        ram_bytes=ram,
        drive=Drive(name="/nvme", free_bytes=10**12),
        device=Device(name="GPU", memory_bytes=device) if device else None,
        profile=profile,
    )


def points(machine: Machine, jobs: list[Job]) -> list[Point]:
    choices = Choices(micro_batches=0)
    return list(grid(jobs, machine, choices, tiers_for(machine)))


@pytest.mark.parametrize(
    ("ram", "device", "read", "link"),
    [
        (400, 0, 1e9, 1e9),
        (110, 0, 2e8, 1e9),
        (101, 0, 1e9, 1e9),
        (300, 100, 1e8, 1e8),
        (100, 45, 1e9, 3e7),
    ],
)
def test_small_grids_are_decided_as_brute_force_would(
    ram: int, device: int, read: float, link: float
) -> None:
    """Every cut with every tier, planned one by one: nothing that fits is faster by more than what is not worth it."""
    machine = a_machine(ram * MB, device=device * MB, profile=a_profile(read=read, link=link))
    jobs = [a_job(n) for n in divisors(ROWS)]
    fastest = []
    for job, tier in itertools.product(jobs, tiers_for(machine)):
        choices = Choices(micro_batches=job.micro_batches, block_inputs=tier)
        found = outcome(job, machine, choices)
        if isinstance(found, Outcome):
            assert found.simulation is not None
            fastest.append(found.simulation.step_s)
    best = best_point(points(machine, jobs))
    if not fastest:
        assert best is None
        return
    assert best is not None
    assert best.step_s is not None
    assert best.step_s <= min(fastest) / (1 - WORTH)
    assert isinstance(best.found, Outcome)
    assert best.found.peak.ram_bytes <= machine.ram_bytes
    assert best.found.peak.device_bytes <= machine.device_bytes


def test_more_rows_at_once_are_taken_where_they_are_faster_and_fit() -> None:
    """The same rows in fewer calls, as many at once as memory holds."""
    jobs = [a_job(n) for n in divisors(ROWS)]
    rows: list[int] = []
    for ram in (400, 110, 101):
        best = best_point(points(a_machine(ram * MB, profile=a_profile()), jobs))
        assert best is not None
        rows.append(best.job.rows_at_once)
    assert rows == [4, 2, 1]


def test_reading_is_the_same_however_rows_are_cut() -> None:
    machine = a_machine(35 * MB + 60 * MB, profile=a_profile())
    least = 25 * MB
    found = [
        outcome(
            a_job(n, kept=0, workspace=0),
            machine,
            Choices(micro_batches=ROWS // n, ram_bytes=least),
        )
        for n in divisors(ROWS)
    ]
    assert len({f.read_bytes for f in found if isinstance(f, Outcome)}) == 1


def test_inputs_leave_the_device_only_where_they_must_or_gain() -> None:
    """Over a link that is slow they stay, as long as the device holds them."""
    job = a_job(1, workspace=0)
    slow = a_profile(call_s=1e-4, link=1e7)
    for device, tier in ((82, Tier.DEVICE), (50, Tier.RAM)):
        best = best_point(points(a_machine(300 * MB, device=device * MB, profile=slow), [job]))
        assert best is not None
        assert best.tier is tier


def test_what_does_not_fit_is_never_chosen() -> None:
    """48 MB of inputs fit neither memory: the drive has them, unless it is full too."""
    job = a_job(1)
    small = a_machine(90 * MB, device=30 * MB, profile=a_profile())
    best = best_point(points(small, [job]))
    assert best is not None
    assert best.tier is Tier.NVME
    full = dataclasses.replace(small, drive=Drive(name="/nvme", free_bytes=MB))
    assert best_point(points(full, [job])) is None


def test_without_times_it_is_the_nearest_that_holds_them() -> None:
    tiers: list[Tier] = []
    for ram, device in ((300, 200), (300, 30), (90, 30)):
        best = best_point(points(a_machine(ram * MB, device=device * MB), [a_job(1)]))
        assert best is not None
        tiers.append(best.tier)
    assert tiers == [Tier.DEVICE, Tier.RAM, Tier.NVME]


def without_writes(profile: Profile) -> Profile:
    kept = {name: curve for name, curve in profile.transfers.items() if name != "nvme_write"}
    return dataclasses.replace(profile, transfers=kept)


def test_a_drive_whose_writing_was_never_measured_is_the_last_resort() -> None:
    """Its steps have no time to compare, so that it is taken where no other tier fits."""
    profile = without_writes(a_profile())
    roomy, tight = (points(a_machine(ram * MB, profile=profile), [a_job(1)]) for ram in (400, 101))
    best = best_point(roomy)
    assert best is not None
    assert (best.tier, best.step_s is None) == (Tier.DEVICE, False)
    assert [p.tier for p in roomy if p.step_s is None] == [Tier.NVME]
    last = best_point(tight)
    assert last is not None
    assert (last.tier, last.step_s) == (Tier.NVME, None)
    ways = list(alternatives(roomy[0].job, a_machine(400 * MB, profile=profile), roomy))
    assert [way.found.choices.block_inputs for way in ways][-1] is Tier.NVME
    assert all(isinstance(way.found, Outcome) for way in ways), "none is refused for want of a rate"
    chosen = Choices(micro_batches=ROWS, block_inputs=Tier.NVME, nvme_activation_bytes=None)
    found = outcome(a_job(1), a_machine(400 * MB, profile=profile), chosen)
    assert isinstance(found, Outcome)
    assert (found.simulation, found.slow_step_s, found.hidden_at) == (None, None, None)


def test_a_format_that_no_probe_measures_is_planned_and_said() -> None:
    job, machine = a_job(1), a_machine(400 * MB, profile=a_profile())
    assert job.work is not None
    half = dataclasses.replace(job, work=dataclasses.replace(job.work, dtype="float16"))
    found, same = (outcome(each, machine, Choices(micro_batches=ROWS)) for each in (job, half))
    assert isinstance(found, Outcome)
    assert isinstance(same, Outcome)
    assert same.simulation == found.simulation
    assert list(assumed_lines(job, machine)) == []
    said = "assumed: float16 as fast as float32, which was measured"
    assert list(assumed_lines(half, machine)) == [said]


def test_of_equals_the_cheapest() -> None:
    found = best_of(
        [("a", 10.0, 3), ("b", 10.1, 1), ("c", 12.0, 0)], lambda x: x[1], lambda x: (x[2],)
    )
    assert found is not None
    assert found[0] == "b"
    assert best_of([], lambda x: 1.0, lambda x: ()) is None


def test_what_was_compared_is_said() -> None:
    assert words_of({"device": None, "ram": 2.345}) == "device does not fit, ram 2.35 s"
    assert divisors(12) == [1, 2, 3, 4, 6, 12]


# ------------------------------------------------------------------ from a configuration


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "train.yaml"
    path.write_text(
        f"model_name_or_path: m\ndataset: d.jsonl\noutput_dir: {tmp_path / 'run'}\n"
        f"per_device_train_batch_size: 1\ngradient_accumulation_steps: {ROWS}\n"
        "offload: {micro_batch_size: auto}\n"
    )
    return path


def jobs_of() -> Callable[..., Job]:
    return lambda rows=None: a_job(1 if rows is None else rows)


def test_both_decisions_are_made_and_said(config_path: Path) -> None:
    config = load_config(config_path).config
    machine = a_machine(400 * MB, device=400 * MB, profile=a_profile())
    found = decide(jobs_of(), machine, config)  # type: ignore[arg-type]
    assert found.job.rows_at_once == ROWS
    assert found.lines[0].startswith("offload.micro_batch_size: auto is 4 rows at once (1 ")
    assert found.lines[1].startswith("offload.block_inputs: auto is device (device ")
    older = dataclasses.replace(machine, profile=without_writes(a_profile()))
    found = decide(jobs_of(), older, config)  # type: ignore[arg-type]
    assert found.job.rows_at_once == ROWS
    assert found.lines[1].endswith(", nvme was never measured)")


def test_a_run_gets_a_number_and_keeps_it_when_it_is_resumed(
    config_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = a_machine(400 * MB, profile=a_profile())
    monkeypatch.setattr(settle, "own_machine", lambda folder: machine)
    monkeypatch.setattr(settle, "Jobs", lambda source: jobs_of())
    loaded = load_config(config_path)
    config = settled(loaded).config
    assert config.offload.micro_batch_size == ROWS
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (ROWS, 1)
    assert "auto is 4 rows at once" in capsys.readouterr().out
    config.output_dir.mkdir()
    two = load_config(config_path, ["--offload.micro_batch_size", "2"]).config
    (config.output_dir / "ssdtune.yaml").write_text(to_yaml(two))
    assert settled(loaded).config.per_device_train_batch_size == ROWS, "nothing was saved yet"
    checkpoint = saved(config.output_dir / "checkpoint-1", two)
    (config.output_dir / "ssdtune.yaml").write_text(to_yaml(config))
    assert settled(loaded).config.per_device_train_batch_size == 2, "the checkpoint's own"
    anew = load_config(config_path, ["--resume_from_checkpoint", "false"])
    assert settled(anew).config.per_device_train_batch_size == ROWS
    elsewhere = ["--resume_from_checkpoint", str(checkpoint), "--output_dir", f"{config_path}.run"]
    named = load_config(config_path, elsewhere)
    assert settled(named).config.per_device_train_batch_size == 2


def saved(folder: Path, config: TrainConfig) -> Path:
    """A checkpoint with nothing in it but its configuration."""
    made = new_temporary_folder(folder)
    (made / "ssdtune.yaml").write_text(to_yaml(config))
    commit_folder(made, folder)
    return folder


def test_several_processes_do_not_decide_each_for_itself(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="several must cut their rows alike"):
        settled(load_config(config_path))
