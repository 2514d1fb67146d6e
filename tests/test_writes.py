"""`offload.max_writes`: what a run writes is counted by what it is for, nothing that writes more is chosen or run, and
where nothing else fits the nearest change is named."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_grid
import test_stored_activations
import tiny_runs
from test_grid import MB, NUM, ROWS, a_job, a_machine, a_profile
from test_stored_activations import WITHIN, all_places, request

from ssdtune import api, cli
from ssdtune.config import ConfigError, load_config
from ssdtune.planning import settle
from ssdtune.planning.settle import settled
from ssdtune.planning.ways import alternatives, decide
from ssdtune.profiles import own_profile_path, save_profile
from ssdtune.run_files import PLAN_NAME
from ssdtune.schedule.changes import smallest_change
from ssdtune.schedule.compare import Prediction
from ssdtune.schedule.cost import Moves
from ssdtune.schedule.hunt import WORTH_WRITING, WritesError
from ssdtune.schedule.job import Job
from ssdtune.schedule.memory import COPY, INPUTS, PACKED, STORED
from ssdtune.schedule.methods import foreseen
from ssdtune.schedule.outcome import Choices, Outcome, Refusal, outcome
from ssdtune.schedule.plan import Lane, Tier
from ssdtune.schedule.planner import layout_of, plan_of
from ssdtune.schedule.profile import Profile
from ssdtune.schedule.search import search
from ssdtune.schedule.stored import written_bytes
from ssdtune.schedule.writes import CHECKPOINTS, Writes, as_key
from ssdtune.sizes import format_size
from ssdtune.trainer import forecast, train_from_config
from ssdtune.trainer.errors import RunError

Known = Callable[[Profile | None], None]
KEPT = 48 * MB  # block inputs of a step of `test_grid.a_job`
STEPS = 10

# ------------------------------------------------------------------ the sum


def test_what_a_run_writes_is_told_by_what_it_is_for() -> None:
    writes = Writes(
        num_steps=100, trained_bytes=5, every=10, copy_bytes=1000, packed_bytes=70, most=10_000
    )
    parts = writes.parts({INPUTS: 3, STORED: 4, "another": 9}, back_bytes=20.0)
    assert parts == {
        INPUTS: 300,
        STORED: 400,
        COPY: 1000 + 89 * 20,
        CHECKPOINTS: 20 * 3 * 5,
        PACKED: 70,
    }
    assert writes.excess(parts) == ""
    less = dataclasses.replace(writes, most=3000)
    assert less.excess(parts).startswith(
        "3.85 KB of writes to the drive in 100 steps (block inputs"
    )
    assert COPY in less.excess(parts)
    assert writes.step_bytes == (10_000 - 300 - 70 - 1000) // 89
    assert dataclasses.replace(writes, most=None).step_bytes is None
    assert dataclasses.replace(writes, most=50).step_bytes == 0
    assert as_key(24_000_001) == "25MB"


@pytest.mark.parametrize("most", [2_000, 5_000, 20_000, 98_999])
def test_the_fewest_steps_between_are_allowed_and_one_less_is_not(most: int) -> None:
    """All blocks go back: that is the most there is."""
    writes = Writes(num_steps=100, trained_bytes=0, every=1, copy_bytes=1000, most=most)
    fewest = writes.fewest_between(1000)
    assert fewest is not None

    def total(every: int) -> float:
        changed = dataclasses.replace(writes, every=every)
        return sum(changed.parts({}, back_bytes=1000 / every).values())

    assert total(fewest) <= most
    assert fewest == 1 or total(fewest - 1) > most
    assert dataclasses.replace(writes, most=999).fewest_between(1000) is None
    half = dataclasses.replace(writes, every=10)
    assert half.going_back(sum(half.parts({}, back_bytes=50.0).values())) == pytest.approx(500)


# ------------------------------------------------------------------ the search


@pytest.mark.parametrize("seed", range(6))
def test_small_models_are_planned_as_brute_force_would_within_the_writes(seed: int) -> None:
    chance = random.Random(seed)
    sizes = (0, *[chance.randint(2, 12) * MB for _ in range(5)])
    most = int(chance.uniform(0.2, 0.8) * sum(sizes))
    asked = request(nvme=10**9, memory=sum(sizes) // 5, num=6, activation_bytes=sizes)
    asked = dataclasses.replace(asked, written_bytes=most)
    machine = test_stored_activations.Machine(
        read=100 * MB / chance.uniform(0.3, 2.0),
        write=max(sizes) / chance.uniform(0.2, 1.0),
        forward_s=(0.01, *[chance.uniform(0.2, 1.0) for _ in range(5)]),
        activation_bytes=sizes,
    )
    plans = [plan_of(asked, layout_of(asked, choice)) for choice in all_places(asked)]
    allowed = [plan for plan in plans if written_bytes(machine.steps(plan)) <= most]
    assert 0 < len(allowed) < len(plans)
    fastest = min(map(machine.step_s, allowed))
    without = min(machine.step_s(plan) for plan in allowed if not plan.stored_blocks)
    best = fastest if fastest < (1 - WORTH_WRITING) * without else without
    found = search(asked, machine)
    assert written_bytes(machine.steps(found.plan)) <= most
    assert found.simulation.step_s <= WITHIN * best


def test_where_all_plans_write_too_much_the_least_is_told() -> None:
    asked = request(nvme=0, num=4)

    class Writing(test_stored_activations.Machine):
        def steps(self, plan: Any) -> Any:
            steps = super().steps(plan)
            store = steps.ops[-1]._replace(lane=Lane.NVME_WRITE, num_bytes=7 * MB)
            return dataclasses.replace(steps, ops=(*steps.ops[:-1], store))

    writing = Writing(**dataclasses.asdict(test_stored_activations.a_machine(asked)))
    with pytest.raises(WritesError, match=r"raise offload\.max_writes") as caught:
        search(dataclasses.replace(asked, written_bytes=6 * MB), writing)
    assert caught.value.num_bytes == 7 * MB


# ------------------------------------------------------------------ a job on a machine


def at(ram: int, **more: Any) -> Choices:
    return Choices(**{"micro_batches": ROWS, "ram_bytes": ram * MB, **more})


def forwards(every: int = 2, num_steps: int = STEPS) -> Job:
    """Of all weights, whose blocks go back to a working copy."""
    job = a_job(1, workspace=0)
    assert job.work is not None
    work = dataclasses.replace(job.work, moves=Moves(shifts={}))
    return dataclasses.replace(
        job, work=work, kind="forward", variants=2, fold_steps=every, num_steps=num_steps
    )


def test_inputs_that_would_be_too_many_writes_do_not_wait_on_the_drive() -> None:
    """Over a slow link they would; the whole run may write what it likes, or what it says."""
    job = a_job(1, workspace=0)
    machine = a_machine(300 * MB, device=100 * MB, profile=a_profile(read=1e10, link=1e10))

    def tiers(most: int | None) -> dict[Tier, Outcome | Refusal]:
        choices = Choices(micro_batches=ROWS, most_written=most)
        tried = test_grid.grid([job], machine, choices, test_grid.tiers_for(machine))
        return {point.tier: point.found for point in tried}

    assert isinstance(tiers(None)[Tier.NVME], Outcome)
    few = tiers(STEPS * KEPT - 1)
    assert isinstance(few[Tier.RAM], Outcome)
    refused = few[Tier.NVME]
    assert isinstance(refused, Refusal)
    assert refused.needed_writes == STEPS * KEPT
    assert f"(block inputs kept for backward {480} MB), offload.max_writes is 480 MB" in refused.why
    assert isinstance(tiers(STEPS * KEPT)[Tier.NVME], Outcome)


def test_activations_go_to_the_drive_as_far_as_writes_allow() -> None:
    job = a_job(1, workspace=0)
    footprint = dataclasses.replace(job.footprint, activation_bytes=(0, MB, MB, MB))
    job = dataclasses.replace(job, footprint=footprint)
    assert job.work is not None
    quick = {block: job.work.passes["train"][block, "B"] for block in range(1, NUM)}  # type: ignore[index]
    halved = {
        b: [dataclasses.replace(w, operators={}) for w in works] for b, works in quick.items()
    }
    job = dataclasses.replace(job, work=dataclasses.replace(job.work, behind=halved))
    machine = a_machine(400 * MB, profile=a_profile(read=1e10))
    written: list[float] = []
    for allowed in (None, STEPS * 2 * ROWS * MB, STEPS * ROWS * MB - 1):
        choices = Choices(micro_batches=ROWS, nvme_activation_bytes=10**9, most_written=allowed)
        found = outcome(job, machine, choices)
        assert isinstance(found, Outcome)
        assert allowed is None or found.written_bytes <= allowed
        written.append(found.written.get(STORED, 0))
    assert written == [STEPS * 3 * ROWS * MB, STEPS * 2 * ROWS * MB, 0]


def test_inputs_on_the_drive_that_write_too_much_are_answered_with_a_nearer_place() -> None:
    job = a_job(1)
    choices = Choices(micro_batches=ROWS, block_inputs=Tier.NVME, most_written=STEPS * KEPT // 2)
    roomy = a_machine(300 * MB, device=40 * MB, profile=a_profile())
    change = smallest_change(job, roomy, choices)
    assert change is not None
    assert change[0] == "offload.block_inputs: ram"
    tight = a_machine(101 * MB, profile=a_profile())
    change = smallest_change(job, tight, choices)
    assert change is not None
    assert change[0] == "offload.max_writes: 480MB", "nothing else fits"
    assert change[1].written_bytes == STEPS * KEPT
    on_device = dataclasses.replace(choices, block_inputs=Tier.DEVICE)
    change = smallest_change(job, tight, on_device)
    assert change is not None
    assert change[0] == "offload.block_inputs: nvme, offload.max_writes: 480MB"


def test_a_working_copy_goes_back_as_often_as_writes_allow() -> None:
    """A copy of 40 MB, and in each of 7 steps half of all that is streamed: all 40 MB through two slots; 30 where one slot
    leaves room for a block that stays."""
    machine = a_machine(400 * MB, profile=a_profile())
    free, fewer = (outcome(forwards(), machine, at(25, most_written=n)) for n in (None, 179 * MB))
    assert isinstance(free, Outcome)
    assert isinstance(fewer, Outcome)
    assert free.written == {COPY: 180 * MB}
    assert fewer.written == {COPY: 145 * MB}
    assert free.simulation is not None
    assert fewer.simulation is not None
    assert free.simulation.step_s < fewer.simulation.step_s
    choices = at(25, most_written=140 * MB)
    refused = outcome(forwards(), machine, choices)
    assert isinstance(refused, Refusal)
    assert refused.needed_writes == 145 * MB
    assert f"({COPY} 145 MB), offload.max_writes is 140 MB" in refused.why
    change = smallest_change(forwards(), machine, choices)
    assert change is not None
    assert change[0] == "zo_fold_steps: 3"
    assert change[1].written_bytes <= 140 * MB
    never = smallest_change(forwards(), machine, at(25, most_written=MB))
    assert never is not None
    assert never[0] == "zo_fold_steps: never"
    assert never[1].written_bytes == 0


def test_where_all_blocks_stay_there_is_no_copy_to_forbid() -> None:
    found = outcome(forwards(), a_machine(400 * MB, profile=a_profile()), at(60, most_written=MB))
    assert isinstance(found, Outcome)
    assert found.written_bytes == 0


def test_without_times_the_limit_is_kept_too() -> None:
    found = outcome(forwards(), a_machine(400 * MB), at(25, most_written=MB))
    assert isinstance(found, Refusal)
    assert found.needed_writes > MB


def test_a_packed_model_that_is_made_first_counts() -> None:
    job = dataclasses.replace(a_job(1), packed_bytes=7 * MB)
    found = outcome(job, a_machine(400 * MB), Choices(micro_batches=ROWS, most_written=6 * MB))
    assert isinstance(found, Refusal)
    assert f"{PACKED} 7.00 MB" in found.why
    change = smallest_change(job, a_machine(400 * MB), found.choices)
    assert change is not None
    assert change[0] == "offload.max_writes: 7MB"


def test_simulated_full_fine_tuning_that_writes_more_would_not_fit() -> None:
    machine = a_machine(10**12, profile=a_profile())
    job = dataclasses.replace(a_job(1), num_parameters=10**7)
    free, few = foreseen(job, machine), foreseen(job, machine, MB)
    assert [each.why_not for each in free] == [None] * 4
    assert "writes > offload.max_writes" in str(few[0].why_not)
    assert few[2].why_not is None, "forwards alone write nothing"


# ------------------------------------------------------------------ from a configuration


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "train.yaml"
    path.write_text(
        f"model_name_or_path: m\ndataset: d.jsonl\noutput_dir: {tmp_path / 'run'}\n"
        f"per_device_train_batch_size: 1\ngradient_accumulation_steps: {ROWS}\n"
        f"max_steps: {STEPS}\noffload: {{max_writes: 100MB, block_inputs: nvme}}\n"
    )
    return path


def test_the_grid_and_the_table_say_what_would_write_too_much(config_path: Path) -> None:
    config = load_config(config_path, ["--offload.block_inputs", "auto"]).config
    machine = a_machine(400 * MB, profile=a_profile())
    found = decide(lambda: a_job(1), machine, config)  # type: ignore[arg-type]
    assert found.lines[0].endswith(", nvme would write 480 MB)")
    assert isinstance(found.points[0].found, Outcome)
    ways = list(alternatives(found.job, machine, found.points))
    assert isinstance(ways[-1].found, Refusal), "inputs on the drive stand there with the reason"


def test_a_run_that_would_write_too_much_is_refused_before_it_begins(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = a_machine(400 * MB, device=200 * MB, profile=a_profile())
    monkeypatch.setattr(settle, "own_machine", lambda folder: machine)
    monkeypatch.setattr(settle, "Jobs", lambda source: lambda: a_job(1))
    with pytest.raises(ConfigError) as caught:
        settled(load_config(config_path))
    assert str(caught.value).splitlines() == [
        "480 MB of writes to the drive in 10 steps (block inputs kept for backward 480 MB), "
        "offload.max_writes is 100 MB.",
        "The nearest change that fits: offload.block_inputs: ram.",
    ]
    enough = load_config(config_path, ["--offload.max_writes", "480MB"])
    assert settled(enough).config == enough.config


def test_a_model_alone_keeps_no_limit_of_a_run(config_path: Path) -> None:
    with pytest.raises(api.OffloadError, match=r"max_writes is of a whole run"):
        api.stream("nowhere", offload={"max_writes": "1GB"})
    config = load_config(config_path).config
    assert api.stream_arguments(config)["offload"].max_writes is None


# ------------------------------------------------------------------ real runs


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """A configuration of a small model."""
    sizes: Any = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3}
    tiny_runs.save(tiny_runs.llama(**sizes), tmp_path / "model")
    tiny_runs.write_rows(tmp_path / "rows.jsonl", tiny_runs.texts(16))
    path = tmp_path / "train.yaml"

    def loaded(*flags: str) -> Any:
        path.write_text(
            f"model_name_or_path: {tmp_path}/model\ndataset: {tmp_path}/rows.jsonl\n"
            f"output_dir: {tmp_path}/run\nmax_length: 24\nper_device_train_batch_size: 4\n"
            "gradient_accumulation_steps: 2\nlora_r: 2\nmax_steps: 4\nsave_strategy: 'no'\n"
            "resume_from_checkpoint: false\n"
        )
        return load_config(path, flags)

    with tiny_runs.own_datasets_cache(tmp_path / "rows-cache"):
        yield loaded


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Known:
    """Says what a run knows of the machine; None: nothing."""

    def known(profile: Profile | None) -> None:
        monkeypatch.setattr(forecast, "own_profile", lambda: profile)

    return known


def written_in(result: Any) -> int:
    return sum(op.num_bytes for op in result.trace if op.lane is Lane.NVME_WRITE)


def test_a_run_writes_no_more_than_it_may(load: Callable[..., Any], measured: Known) -> None:
    """Four steps of activations, half of what a fast drive would take."""
    measured(a_profile(call_s=1e-6, read=1e13))
    flags = ("--offload.nvme_activations", "1GB", "--offload.activations", "none")
    flags = (*flags, "--offload.block_inputs", "device")
    free = train_from_config(load(*flags))
    saved = 4 * 3 * sum(p.nbytes for p in _adapter(free))
    planned = Prediction.from_json((free.output_dir / PLAN_NAME).read_text()).moves
    step_bytes = sum(op.num_bytes for op, _ in planned if op.lane is Lane.NVME_WRITE)
    most = saved + 4 * (step_bytes // 2)
    found = train_from_config(load(*flags, "--offload.max_writes", f"{most}B"))
    assert 0 < written_in(found) <= most - saved
    assert written_in(found) < written_in(free)


def _adapter(result: Any) -> list[Any]:
    from safetensors.torch import load_file

    return [*load_file(result.output_dir / "adapter_model.safetensors").values()]


INPUTS_FLAGS = ("--offload.block_inputs", "nvme", "--offload.max_writes", "200KB")
COPY_FLAGS = (
    *("--method", "zo", "--zo_trains", "all", "--zo_fold_steps", "1", "--max_steps", "8"),
    *("--offload.ram", "400KB", "--offload.max_writes", "100KB"),
)


def test_a_run_whose_blocks_go_back_too_often_keeps_more_of_them(
    load: Callable[..., Any], measured: Known
) -> None:
    """Two of three layers pass one slot where all three would pass two: slower, and nothing else is allowed."""
    measured(a_profile(call_s=1e-6, read=1e5))
    flags = (
        "--method",
        "zo",
        "--zo_trains",
        "all",
        "--zo_fold_steps",
        "1",
        "--offload.ram",
        "900KB",
    )
    free = train_from_config(load(*flags))
    plan = Prediction.from_json((free.output_dir / PLAN_NAME).read_text()).plan
    most = plan.model_bytes + written_in(free) - 1
    found = train_from_config(load(*flags, "--offload.max_writes", f"{most}B"))
    assert 0 < written_in(found) <= most - plan.model_bytes


@pytest.mark.parametrize(
    ("flags", "what", "has_times"), [(INPUTS_FLAGS, INPUTS, False), (COPY_FLAGS, COPY, True)]
)
def test_a_run_that_can_do_with_no_less_is_refused_before_its_first_step(
    load: Callable[..., Any], measured: Known, flags: tuple[str, ...], what: str, has_times: bool
) -> None:
    """From Python too, where nobody planned it before."""
    measured(a_profile() if has_times else None)
    with pytest.raises(RunError, match=rf"(?s){what} .*\nSet offload\.max_writes: \d+MB"):
        train_from_config(load(*flags))


def test_the_plan_says_what_of_it_is_used(
    load: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SSDTUNE_CACHE", str(tmp_path / "cache"))
    save_profile(a_profile(), own_profile_path())
    load()
    words = ["plan", str(tmp_path / "train.yaml"), "--offload.block_inputs", "nvme"]
    assert cli.main([*words, "--offload.max_writes", "1GB"]) == 0
    told = capsys.readouterr().out
    assert " of the 1.00 GB that offload.max_writes allows" in told
    assert f"{INPUTS} " in next(x for x in told.splitlines() if "max_writes allows" in x)
    assert cli.main([*words, "--json"]) == 0
    written = json.loads(capsys.readouterr().out)["ways"][0]["written"]
    assert set(written) == {INPUTS, CHECKPOINTS}
    few = int(written[CHECKPOINTS] + written[INPUTS] // 2)
    assert cli.main([*words, "--offload.max_writes", f"{few}B"]) == 0
    told = capsys.readouterr().out
    assert "does not fit: " in told
    assert f"offload.max_writes is {format_size(few)}" in told
    assert told.splitlines()[-1].endswith("--offload.block_inputs device")
