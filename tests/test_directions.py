"""Random directions that are left open: as many as reading hides, by the costs that real ones have, and kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_grid
import tiny_models
import torch
from test_grid import MB, NUM, a_machine, a_profile, saved

from ssdtune.config import load_config
from ssdtune.jobs import Jobs, Source
from ssdtune.planning import settle
from ssdtune.planning.settle import settled
from ssdtune.planning.ways import DIRECTIONS, decide
from ssdtune.schedule.cost import Moves, Operator, Work
from ssdtune.schedule.directions import (
    FILLS,
    MOST_DIRECTIONS,
    fill_reading,
    reading_s,
    with_directions,
)
from ssdtune.schedule.job import Directions, Job, job_from
from ssdtune.schedule.machine import Machine
from ssdtune.schedule.outcome import Choices, Outcome, outcome
from ssdtune.schedule.profile import PERTURB_SIGNS, Profile

USUAL = 8
CALL_S = 1e-5
LEAST = 25  # MB for weights: two slots of the four blocks, so that all of them are read


def a_job(*, flop: float = 1000.0, outside: int = 0, hidden: int = 0) -> Job:
    """Forwards of as many variants as there are directions and one more; each direction is made and taken at a cost.

    flop: of a block's forward. outside: bytes of what lies outside of blocks. hidden: bytes of a hidden state."""
    job = test_grid.a_job(4, kept=0, workspace=0)
    assert job.work is not None
    one = [Work({Operator("matmul", flop): 1})]
    each = {block: Work({Operator(PERTURB_SIGNS, 100.0): 1}) for block in range(NUM)}
    usual = {block: Work({Operator(PERTURB_SIGNS, 100.0): USUAL}) for block in range(NUM)}
    moves = Moves(shifts=usual, updates=usual)
    passes = dict.fromkeys(job.work.passes["forward"], one)
    return dataclasses.replace(
        job,
        kind="forward",
        variants=USUAL + 1,
        work=dataclasses.replace(job.work, passes={"forward": passes}, moves=moves),
        footprint=dataclasses.replace(job.footprint, hidden_bytes=hidden),
        fixed=dataclasses.replace(
            job.fixed, more={"a variant of a block": 0, "variants outside blocks": USUAL * outside}
        ),
        directions=Directions(
            num=USUAL,
            variants=1,
            memory={"variants outside blocks": outside},
            shifts=each,
            updates=each,
        ),
    )


def with_signs(profile: Profile) -> Profile:
    """That knows what moving weights takes: as a FLOP does."""
    kinds = profile.operators["float32"]
    return dataclasses.replace(
        profile, operators={"float32": {**kinds, PERTURB_SIGNS: kinds["matmul"]}}
    )


def on(read: float, ram: int = 400) -> Machine:
    return a_machine(ram * MB, profile=with_signs(a_profile(call_s=CALL_S, read=read)))


CHOICES = Choices(micro_batches=1, ram_bytes=LEAST * MB)


def first(job: Job, machine: Machine, choices: Choices = CHOICES) -> Outcome:
    found = outcome(job, machine, choices)
    assert isinstance(found, Outcome)
    return found


def most_by_brute_force(job: Job, machine: Machine, choices: Choices = CHOICES) -> int:
    """The most of all numbers up to the bound with which a step fits and takes FILLS of the usual one's reading."""
    limit_s = FILLS * reading_s(first(job, machine, choices))
    fits = [USUAL]
    for num in range(USUAL + 1, MOST_DIRECTIONS + 1):
        found = outcome(with_directions(job, num), machine, choices)
        if isinstance(found, Outcome) and found.simulation is not None:
            fits += [num] if found.simulation.step_s <= limit_s else []
    return max(fits)


@pytest.mark.parametrize("read", [2e8, 3e8, 5e8, 7e8])
def test_where_reading_dominates_as_many_are_taken_as_it_hides(read: float) -> None:
    job, machine = a_job(), on(read)
    before = first(job, machine)
    filled = fill_reading(job, machine, before)
    assert filled.num == most_by_brute_force(job, machine)
    assert USUAL < filled.num <= MOST_DIRECTIONS
    assert filled.found.simulation is not None
    assert filled.found.simulation.step_s <= FILLS * reading_s(before)
    assert filled.found == first(filled.job, machine)
    assert filled.job.variants == filled.num + 1


def test_where_there_is_time_for_any_number_the_bound_is_taken() -> None:
    job, machine = a_job(flop=1.0), on(1e7)
    filled = fill_reading(job, machine, first(job, machine))
    assert filled.num == MOST_DIRECTIONS


@pytest.mark.parametrize(("read", "ram"), [(1e10, LEAST), (1e7, 60)], ids=["compute", "no reading"])
def test_where_reading_is_not_the_floor_the_usual_number_stays(read: float, ram: int) -> None:
    job, machine = a_job(), on(read)
    before = first(job, machine, dataclasses.replace(CHOICES, ram_bytes=ram * MB))
    filled = fill_reading(job, machine, before)
    assert filled.job is job
    assert filled.found is before


def test_without_times_the_usual_number_stays() -> None:
    job, machine = a_job(), a_machine(400 * MB)
    assert fill_reading(job, machine, first(job, machine)).num == USUAL


def test_memory_bounds_them_too() -> None:
    """A variant of what lies outside of blocks, and hidden states, for each of them."""
    job, choices = a_job(flop=1.0, outside=2 * MB, hidden=MB), CHOICES
    roomy, tight = on(1e7), on(1e7, ram=150)
    assert fill_reading(job, roomy, first(job, roomy)).num == MOST_DIRECTIONS
    filled = fill_reading(job, tight, first(job, tight))
    assert filled.num == most_by_brute_force(job, tight, choices)
    assert USUAL < filled.num < MOST_DIRECTIONS
    assert filled.found.peak.ram_bytes <= tight.ram_bytes


def test_more_directions_are_more_of_each_cost_and_come_back_from_json() -> None:
    job = a_job(outside=3)
    more = with_directions(job, USUAL + 5)
    assert more.fixed.more["variants outside blocks"] == (USUAL + 5) * 3
    assert more.work is not None
    assert more.work.moves is not None
    assert more.work.moves.shifts[1].operators == {Operator(PERTURB_SIGNS, 100.0): USUAL + 5}
    assert with_directions(more, USUAL) == job
    assert job_from(more.to_json()) == more


# ------------------------------------------------------------------ from a configuration


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "train.yaml"
    path.write_text(
        f"model_name_or_path: m\ndataset: d.jsonl\noutput_dir: {tmp_path / 'run'}\n"
        "per_device_train_batch_size: 4\ngradient_accumulation_steps: 1\n"
        f"method: zo\nzo_estimator: fzoo\noffload: {{ram: {LEAST}MB}}\n"
    )
    return path


def jobs_of(job: Job) -> Callable[..., Job]:
    return lambda rows=None: job


def test_the_decision_is_said_with_what_it_is_for(config_path: Path) -> None:
    config = load_config(config_path).config
    found = decide(jobs_of(a_job()), on(3e8), config)
    num = found.job.directions.num  # type: ignore[union-attr]
    assert found.said[DIRECTIONS].startswith(f"{DIRECTIONS}: auto is {num}, which reading hides: ")
    assert "with the usual 8 " in found.said[DIRECTIONS]
    assert found.points[0].job is found.job
    slow = decide(jobs_of(a_job()), on(1e10), config)
    assert slow.said[DIRECTIONS].startswith(f"{DIRECTIONS}: auto is 8, as always: a step of ")
    untimed = decide(jobs_of(a_job()), a_machine(400 * MB), config)
    assert untimed.said[DIRECTIONS].endswith("auto is 8, as always: times are not known")
    fixed = dataclasses.replace(a_job(), directions=None)
    assert decide(jobs_of(fixed), on(3e8), config).said == {}


def test_a_run_gets_a_number_and_keeps_it_when_it_is_resumed(
    config_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machines = [on(3e8)]
    monkeypatch.setattr(settle, "own_machine", lambda folder: machines[0])
    monkeypatch.setattr(settle, "Jobs", lambda source: jobs_of(a_job()))
    loaded = load_config(config_path)
    config = settled(loaded).config
    num = config.zo_num_directions
    assert num is not None
    assert num > USUAL
    assert f"decided   {DIRECTIONS}: auto is {num}, which" in capsys.readouterr().out
    config.output_dir.mkdir()
    saved(config.output_dir / "checkpoint-1", config)
    machines[0] = on(1e10)
    assert settled(loaded).config.zo_num_directions == num
    assert f"auto is {num}, as when the run began" in capsys.readouterr().out
    anew = load_config(config_path, ["--resume_from_checkpoint", "false"])
    assert settled(anew).config.zo_num_directions == USUAL
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert settled(loaded).config.zo_num_directions == num, "whoever goes on"
    assert settled(anew).config.zo_num_directions is None, "several processes have the usual one"


def test_a_run_that_had_nothing_to_decide_by_keeps_the_usual_number(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines = [a_machine(400 * MB)]
    monkeypatch.setattr(settle, "own_machine", lambda folder: machines[0])
    monkeypatch.setattr(settle, "Jobs", lambda source: jobs_of(a_job()))
    config = settled(load_config(config_path)).config
    assert config.zo_num_directions is None
    config.output_dir.mkdir()
    saved(config.output_dir / "checkpoint-1", config)
    machines[0] = on(3e8)
    assert settled(load_config(config_path)).config.zo_num_directions == USUAL


@pytest.mark.parametrize("estimator", ["mezo", "lozo"])
def test_other_estimators_keep_their_one_direction(
    config_path: Path, estimator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settle, "own_machine", lambda folder: on(3e8))
    loaded = load_config(config_path, ["--zo_estimator", estimator])
    assert settled(loaded).config == loaded.config


@pytest.mark.parametrize(
    "flags",
    [("--zo_trains", "adapters"), ("--zo_trains", "all", "--zo_update", "adam")],
    ids=["adapters", "all"],
)
def test_real_jobs_of_any_number_are_those_that_are_made_for_it(
    flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory, variants and all work of a job whose number is 13 from the start."""
    monkeypatch.setenv("SSDTUNE_CACHE", str(tmp_path / "cache"))
    tiny_models.save(tiny_models.build("llama", dtype=torch.float32), tmp_path / "model")
    path = tmp_path / "train.yaml"
    path.write_text(
        f"model_name_or_path: {tmp_path}/model\ndataset: nowhere.jsonl\noutput_dir: {tmp_path}/run\n"
        "max_length: 16\nlora_r: 4\nmethod: zo\nzo_estimator: fzoo\n"
    )

    def made(*more: str) -> Any:
        config = load_config(path, [*flags, *more]).config
        return Jobs(Source.of(config, None, on_device=False))()

    left, fixed = made(), made("--zo_num_directions", "13")
    assert job_from(left.to_json()) == left
    assert left.directions.num == USUAL
    assert fixed.directions is None
    grown = with_directions(left, 13)
    as_fixed = dataclasses.replace(grown, directions=None, fixed=fixed.fixed)
    assert as_fixed == fixed
    assert grown.fixed.more == fixed.fixed.more
