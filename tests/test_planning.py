"""`ssdtune plan` on real folders: what it says, what it leaves alone, and that the second time is quick."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import support
import test_grid
import tiny_models
import tiny_runs
import torch
from transformers import AutoTokenizer  # noqa: F401  (a tokenizer's own imports are slow; once)

from ssdtune import cli, planning
from ssdtune.config import load_config
from ssdtune.data import load_dataset_rows, tokenize_rows
from ssdtune.jobs import Jobs, Source, _key
from ssdtune.machines import machine_from, own_machine
from ssdtune.opened import rows as opened_rows
from ssdtune.packing.layout import PackError, groups_of
from ssdtune.packing.wanted import Wanted
from ssdtune.planning.lossless import Saving, saving
from ssdtune.planning.text import data_line, job_line, seconds, verdict
from ssdtune.profiles import own_profile_path, save_profile
from ssdtune.schedule.changes import smallest_change
from ssdtune.schedule.choices import smallest_budgets
from ssdtune.schedule.cost import Work
from ssdtune.schedule.curve import Curve
from ssdtune.schedule.job import Job, in_proportion, job_from
from ssdtune.schedule.machine import Device, Drive, Machine
from ssdtune.schedule.methods import foreseen, rates_of, shape_of
from ssdtune.schedule.outcome import HIDDEN, Choices, Outcome, Refusal, outcome
from ssdtune.schedule.plan import Lane, Tier
from ssdtune.schedule.profile import (
    DEVICE_DECODE,
    OPERATORS,
    PERTURB,
    PERTURB_SIGNS,
    Profile,
    ProfileError,
)
from ssdtune.schedule.saved_profile import profile_from
from ssdtune.trainer.rows import load_tokenizer
from ssdtune.visit.build import build_meta

MB = 10**6
LENGTH, ROWS, MICRO = 32, 2, 4


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSDTUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llama")
    tiny_models.save(tiny_models.build("llama", dtype=torch.float32), made)
    return made


def a_profile(flop_s: float = 1e-9, read_rate: float = 1e9, decode_rate: float = 1e9) -> Profile:
    content = {
        "name": "made up",
        "operators": {
            "float32": {kind: [[1, flop_s], [10**9, flop_s * 10**9]] for kind in OPERATORS}
        },
        "transfers": {
            "nvme_read": [[1, 1 / read_rate], [10**9, 10**9 / read_rate]],
            "nvme_write": [[1, 1 / read_rate], [10**9, 10**9 / read_rate]],
            "unpack": [[1, 1e-9], [10**9, 1]],
            "decode": [[1, 1 / decode_rate], [10**9, 10**9 / decode_rate]],
            "h2d": [[1, 1e-10], [10**9, 0.1]],
        },
    }
    return profile_from(content, "here")


@pytest.fixture
def config_path(folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "train.yaml"
    path.write_text(
        f"model_name_or_path: {folder}\ndataset: nowhere.jsonl\noutput_dir: {tmp_path}/run\n"
        f"max_length: {LENGTH}\nper_device_train_batch_size: {ROWS}\n"
        f"gradient_accumulation_steps: {MICRO}\nlora_r: 4\n"
    )
    return path


@pytest.fixture
def run(config_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs `ssdtune plan CONFIG WORDS…`; exit code and output."""

    def plan(*words: str) -> tuple[int, str]:
        code = cli.main(["plan", str(config_path), *words])
        return code, capsys.readouterr().out

    return plan


def a_job(config_path: Path, *flags: str, **more: Any) -> Job:
    """With a process of a fixed size: that of the tests grows."""
    config = load_config(config_path, flags).config
    job = Jobs(Source.of(config, None, **{"on_device": False, **more}))()
    return dataclasses.replace(job, fixed=dataclasses.replace(job.fixed, base_bytes=300 * MB))


def a_machine(ram: int = 10**9, **more: Any) -> Machine:
    values = {"profile": a_profile(), "drive": Drive(name="/nvme")} | more
    return Machine(name="made up", ram_bytes=ram, **values)


# ------------------------------------------------------------------ the command


def test_without_a_profile_it_says_what_fits_and_how_to_get_times(
    run, folder: Path, tmp_path: Path
) -> None:
    before = support.digests(folder)
    code, text = run("--offload.ram", "2MB")
    assert code == 0
    assert "every row is taken to be 32 tokens long" in text
    assert "measure this machine with `ssdtune probe`" in text
    assert "as configured" in text
    assert text.endswith(
        "train.yaml --offload.ram 2MB\n"
    )  # the command that trains what was planned
    assert support.digests(folder) == before
    assert not (tmp_path / "run").exists(), "a plan writes nothing"


def test_with_a_profile_it_tells_times_limits_and_alternatives(run) -> None:
    save_profile(a_profile(read_rate=1e6), own_profile_path())
    code, text = run("--offload.ram", "300KB")
    assert code == 0
    assert "NVMe read-bound: hidden from" in text
    assert "gradient_accumulation_steps:" in text
    assert "s/step" in text
    assert "tokens a step on" in text


def saving_of(job: Job, *, slower: float = 1.0, **rates: float) -> Saving | None:
    """Where the machine has these rates, in a budget with room for the buffers that bytes to be decoded pass. slower: how
    many times as long as narrow codes lossless ones take to decode."""
    staged = [dataclasses.replace(block, is_staged=True) for block in job.blocks]
    least = smallest_budgets(staged, on_device=False).ram_bytes
    profile = a_profile(flop_s=1e-12, **rates)
    profile = dataclasses.replace(profile, decoding={"decode": {"lossless": slower}})
    machine = a_machine(profile=profile)
    now = outcome(job, machine, Choices(micro_batches=MICRO, ram_bytes=least + 10_000))
    assert isinstance(now, Outcome)
    return saving(job, machine, now)


def test_packing_without_loss_is_named_where_it_pays(config_path: Path) -> None:
    """The same bits in fewer bytes, where the drive is the bound and decoding would not be."""
    job = dataclasses.replace(a_job(config_path), file_dtype="BF16", lossless_ratio=2.0)
    saved = saving_of(job, read_rate=1e6)
    assert saved is not None
    assert saved.after_s < 0.95 * saved.before_s
    assert "1/2.00 of the bytes (measured on a sample)" in saved.line()
    assert "1/1.35 of the bytes (assumed)" in Saving(1.35, False, 2.0, 1.5).line()
    assert saving_of(job, read_rate=1e12) is None, "something else is the bound"
    assert saving_of(job, read_rate=1e6, decode_rate=1e6) is None, "decoding would be the bound"
    assert saving_of(job, read_rate=1e6, decode_rate=4e6) is not None
    assert saving_of(job, read_rate=1e6, decode_rate=4e6, slower=4) is None, (
        "by its own kind's rate"
    )
    blocks = tuple(dataclasses.replace(b, is_staged=True, is_packed=True) for b in job.blocks)
    assert saving_of(dataclasses.replace(job, blocks=blocks), read_rate=1e6) is None


@pytest.mark.parametrize(("decode", "pays"), [(1e12, True), (2e7, False)])
def test_packing_without_loss_pays_on_a_link_too(decode: float, pays: bool) -> None:
    """All weights stay in RAM, and a device takes a quarter less of them in each visit; unless it decodes slowly."""
    profile = test_grid.a_profile(read=1e12, link=2e7)
    curve = Curve(((1.0, 1 / decode), (1e9, 1e9 / decode)))
    profile = dataclasses.replace(
        profile, transfers={**profile.transfers, DEVICE_DECODE: curve, "d2d": curve}
    )
    machine = test_grid.a_machine(600 * MB, device=90 * MB, profile=profile)
    job = dataclasses.replace(test_grid.a_job(1), file_dtype="BF16", lossless_ratio=4 / 3)
    now = outcome(job, machine, Choices(micro_batches=job.micro_batches))
    assert isinstance(now, Outcome)
    assert now.simulation is not None
    assert now.simulation.bound_by is Lane.H2D
    saved = saving(job, machine, now)
    assert (saved is not None) == pays
    if saved is not None:
        assert saved.after_s < 0.8 * saved.before_s


def test_what_can_be_packed_without_loss_goes_by_the_files(
    config_path: Path, folder: Path, tmp_path: Path
) -> None:
    """Not by what is computed in: bfloat16 files can be, whatever they are widened to; float32 files can't."""
    halves = tiny_models.save(tiny_models.build("llama", dtype=torch.bfloat16), tmp_path / "halves")
    flags = ("--model_name_or_path", str(halves), "--dtype", "float32")
    widened = a_job(config_path, *flags)
    assert (widened.file_dtype, widened.dtype) == ("BF16", "float32")
    assert saving_of(widened, read_rate=1e6) is not None
    narrowed = dataclasses.replace(a_job(config_path), dtype="bfloat16")
    assert narrowed.file_dtype == "F32"
    assert saving_of(narrowed, read_rate=1e6) is None
    with pytest.raises(PackError, match="no tensor that can be packed as lossless"):
        groups_of(build_meta(folder), Wanted("lossless").chosen())


def test_json_is_one_object_with_bytes_and_seconds(run) -> None:
    save_profile(a_profile(), own_profile_path())
    code, text = run("--json", "--offload.ram", "300KB")
    found = json.loads(text)
    assert code == 0
    first = found["ways"][0]
    assert first["fits"]
    assert first["step_s"] >= first["one_pass_s"] * 0.999
    assert first["busy_s"]["compute"] > 0
    assert first["read_bytes_per_step"] > 0
    assert found["machine"]["profile"] == "made up"


def test_a_timeline_is_a_picture_or_events(run, tmp_path: Path) -> None:
    save_profile(a_profile(), own_profile_path())
    run("--timeline", str(tmp_path / "lanes.json"), "--offload.ram", "300KB")
    events = json.loads((tmp_path / "lanes.json").read_text())["traceEvents"]
    lanes = [e for e in events if e["ph"] == "M"]
    ops = [e for e in events if e["ph"] == "X"]
    assert {e["args"]["name"] for e in lanes} >= {"compute", "NVMe read"}
    assert all(e["dur"] >= 0 for e in ops)
    assert all(e["ts"] >= 0 for e in ops)
    held = [e for e in events if e["ph"] == "C" and e["name"] == "RAM: all"]
    parts = [e for e in events if e["ph"] == "C" and e["name"] == "RAM: parts"]
    planned = json.loads(run("--json", "--offload.ram", "300KB")[1])["ways"][0]["ram_bytes"]
    assert max(e["args"]["bytes"] for e in held) == planned
    assert [sum(e["args"].values()) for e in parts] == [e["args"]["bytes"] for e in held]
    run("--timeline", str(tmp_path / "lanes.png"), "--offload.ram", "300KB")
    assert (tmp_path / "lanes.png").stat().st_size > 5_000


def test_a_zeroth_order_step_has_a_picture_too(
    run: Callable[..., tuple[int, str]], config_path: Path, tmp_path: Path
) -> None:
    words = "method: zo\nzo_trains: all\nmax_steps: 5\n"
    config_path.write_text(config_path.read_text().replace("lora_r: 4\n", words))
    save_profile(a_profile(), own_profile_path())
    assert run("--timeline", str(tmp_path / "lanes.png"), "--offload.ram", "300KB")[0] == 0
    assert (tmp_path / "lanes.png").stat().st_size > 5_000


def test_auto_is_decided_and_said_as_it_is_trained(run) -> None:
    save_profile(a_profile(), own_profile_path())
    text = run("--offload.micro_batch_size", "auto")[1]
    decided = [line for line in text.splitlines() if line.startswith("decided")]
    assert len(decided) == 2
    for size in (1, 2, 4, 8):
        assert f"{size} " in decided[0]
    assert "offload.block_inputs: auto is device (device " in decided[1]
    job = next(line for line in text.splitlines() if line.startswith("job"))
    rows = int(decided[0].partition(" is ")[2].split()[0])
    assert f"({8 // rows} micro-batches × {rows} rows)" in job


def test_a_price_tells_what_the_run_costs(run) -> None:
    save_profile(a_profile(), own_profile_path())
    plain = run()[1]
    assert "$" not in plain
    priced = run("--price_per_hour", "0.4", "--price_per_kwh", "0.3")[1]
    assert "A costs: $0.40 an hour" in priced
    assert "M tokens per $" in priced
    assert "its energy is not priced" in priced, "nobody knows this machine's watts"


def test_a_timeline_of_nothing_is_refused(
    run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = run("--timeline", str(tmp_path / "lanes.json"))
    assert code == 2
    assert not (tmp_path / "lanes.json").exists()


def test_a_budget_that_holds_nothing_is_answered_with_the_smallest_change(run) -> None:
    code, text = run("--offload.ram", "2KB")
    assert "does not fit" in text
    assert "smallest that works" in text
    assert "offload.ram: auto" in text
    assert "--offload.ram auto" in text.splitlines()[-1]
    assert code == 0, "there is a way"


def test_a_config_alone_is_planned(run, folder: Path) -> None:
    code, text = run("--model", str(folder / "config.json"))
    assert code == 0
    with_weights, alone = (t.splitlines()[1].split(" · ") for t in (run()[1], text))
    assert with_weights[1] == alone[1], "parameters"
    assert with_weights[3].split(",")[0] == alone[3].split(",")[0] == "6 blocks"


def test_a_timeline_of_another_kind_is_refused_before_anything_is_planned(
    config_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", str(config_path), "--timeline", "lanes.txt"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "lanes.txt: give a name that ends with .png or .json" in told.err


def test_an_unknown_model_type_is_named_with_its_file(
    folder: Path, config_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "no_such_model"}))
    for words in (
        ["--model", str(other / "config.json")],
        ["--model", str(other)],
        ["--model_name_or_path", str(other)],
    ):
        assert cli.main(["plan", str(config_path), *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert str(other / "config.json") in error
        assert "no_such_model" in error
        assert "Traceback" not in error


def test_two_machines_are_planned_and_stand_beside_each_other(run) -> None:
    both = ("--hardware", "rtx4090", "--hardware", "h100+2x990pro", "--max_steps", "100")
    code, text = run(*both)
    assert code == 0
    names = ["RTX 4090 + Samsung 990 Pro 2 TB", "H100 SXM + 2 × Samsung 990 Pro 2 TB"]
    for name in names:
        assert any(line.startswith(f"machine   {name}") for line in text.splitlines()), name
    beside = text[text.rindex("machine ") :].splitlines()
    assert beside[0].split()[:3] == ["machine", "s/step", "tok/s"]
    assert "$/hour" in beside[0]
    assert all(any(line.startswith(name) for line in beside[1:3]) for name in names)
    assert text.count("assumed: ") == text.count("perturbing weights at") == 2
    assert text.count("A the run: writes ") == text.count(" kWh at full load") == 2
    assert text.count("of the drive's rated") == 2
    told = json.loads(run(*both, "--json")[1])
    assert [each["machine"]["name"] for each in told] == names


def test_the_second_time_needs_no_torch(config_path: Path, run) -> None:
    save_profile(a_profile(), own_profile_path())
    first = run("--offload.ram", "300KB")[1]
    code = (
        "import sys; from ssdtune.cli import main; "
        f"main(['plan', {str(config_path)!r}, '--offload.ram', '300KB']); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=Path(planning.__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[4:6] == first.splitlines()[4:6]


# ------------------------------------------------------------------ jobs


def test_a_job_is_what_it_was_after_json(config_path: Path) -> None:
    job = a_job(config_path)
    assert job_from(job.to_json()) == job
    assert job.work is not None
    assert len(job.blocks) == 6


def test_other_files_keys_or_rows_make_another_job(
    config_path: Path, folder: Path, tmp_path: Path
) -> None:
    """The cache gives back equal jobs only for equal files and keys."""
    jobs = tmp_path / "cache" / "jobs"
    first = a_job(config_path)
    assert a_job(config_path) == first
    assert len(list(jobs.glob("*.json"))) == 1
    config_path.write_text(config_path.read_text().replace("lora_r: 4", "lora_r: 8"))
    assert a_job(config_path).num_trained == 2 * first.num_trained
    assert len(list(jobs.glob("*.json"))) == 2


def test_a_longer_horizon_makes_another_job(config_path: Path) -> None:
    """An update draws the directions of all its steps again."""
    keys = set()
    for horizon in (10, 20):
        flags = ["--method", "zo", "--zo_update", "adam", "--zo_horizon", str(horizon)]
        config = load_config(config_path, flags).config
        keys.add(_key(Source.of(config, None, on_device=False)))
    assert len(keys) == 2


def test_several_datasets_count_by_their_rows() -> None:
    """A million rows of 100 tokens and 2,000 of 2,000 are 104 on average, not 1,050; where all were looked at, they are
    all there once."""
    picked = in_proportion([[100] * 2000, [2000] * 2000], [1e6, 2000])
    assert sum(picked) / len(picked) == pytest.approx(103.8, rel=1e-3)
    assert sorted(in_proportion([[1, 2, 3], [4, 5]], [3, 2])) == [1, 2, 3, 4, 5]
    rare = in_proportion([[100] * 2000, [2000]], [1e9, 1])
    assert rare.count(2000) == 1, "however few, they are there"


@pytest.fixture
def two_sets(tmp_path: Path) -> Iterator[Path]:
    """A configuration of 60 short rows and 5 long ones, laid end to end."""
    tiny_runs.save(tiny_runs.llama(), tmp_path / "model")
    for name, num, times in (("many", 60, 1), ("few", 5, 4)):
        rows = [{"text": "the sky is blue and the grass is green " * times}] * num
        tiny_runs.write_rows(tmp_path / f"{name}.jsonl", rows)
    path = tmp_path / "rows.yaml"
    path.write_text(
        f"model_name_or_path: {tmp_path}/model\noutput_dir: {tmp_path}/run\nmax_length: 64\n"
        f"dataset: [{{path: {tmp_path}/many.jsonl}}, {{path: {tmp_path}/few.jsonl}}]\nlora_r: 4\n"
    )
    with tiny_runs.own_datasets_cache(tmp_path / "datasets"):
        yield path


def test_a_large_data_set_is_estimated_from_its_first_rows_and_marked(
    two_sets: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 2,000 of each data set, here 20; each counts by all of its rows."""
    assert opened_rows.SAMPLE_ROWS == 2000
    monkeypatch.setattr(opened_rows, "SAMPLE_ROWS", 20)
    config = load_config(two_sets, []).config
    tokenizer = load_tokenizer(config)
    entries = [load_dataset_rows(entry) for entry in config.dataset]
    whole = tokenize_rows(entries, tokenizer, max_length=config.max_length)
    lengths = whole.lengths(len(whole))
    assert whole.lengths(13) == lengths[::5], "each has its share of a few"
    job = Jobs(Source.of(config, None, on_device=False))()
    assert job.data.is_estimate
    assert job.data.num == 65
    assert job.data.mean_tokens == pytest.approx(sum(lengths) / 65, rel=1e-3)
    assert job.data.longest == max(lengths)
    assert cli.main(["plan", str(two_sets)]) == 0
    told = capsys.readouterr().out
    assert f"65 rows → ≈ {sum(lengths):,} tokens" in told
    assert " · ≈ " in next(line for line in told.splitlines() if line.startswith("job"))
    counted = dataclasses.replace(job, data=dataclasses.replace(job.data, is_estimate=False))
    assert "≈" not in data_line(counted) + job_line(counted)


def test_a_cached_job_that_was_cut_short_is_made_anew(config_path: Path, tmp_path: Path) -> None:
    job = a_job(config_path)
    (path,) = (tmp_path / "cache" / "jobs").glob("*.json")
    path.write_text(path.read_text()[:100])
    assert a_job(config_path) == dataclasses.replace(job, fixed=a_job(config_path).fixed)


def test_what_others_do_to_the_cache_fails_no_plan(config_path: Path, tmp_path: Path) -> None:
    """Another process clears it of what is old, too: listed, and gone at the next look, as what a link leads to is here."""
    jobs = tmp_path / "cache" / "jobs"
    jobs.mkdir(parents=True)
    (jobs / "gone.json").symlink_to(jobs / "nowhere")
    a_job(config_path)
    shutil.rmtree(jobs)
    jobs.write_text("no folder")
    a_job(config_path)


# ------------------------------------------------------------------ outcomes


def test_it_fits_from_the_memory_on_that_it_says(config_path: Path) -> None:
    job, choices = a_job(config_path), Choices(micro_batches=MICRO)
    ample = outcome(job, a_machine(), choices)
    assert isinstance(ample, Outcome)
    assert ample.plan.tiers.count(Tier.NVME) == 0, "all weights stay where there is room"
    low, high = 1, 2 * ample.peak.ram_bytes
    while high - low > 10_000:
        middle = (low + high) // 2
        fits = isinstance(outcome(job, a_machine(middle), choices), Outcome)
        low, high = (low, middle) if fits else (middle, high)
    tight = outcome(job, a_machine(high), choices)
    assert isinstance(tight, Outcome)
    assert tight.peak.ram_bytes <= high
    refused = outcome(job, a_machine(high - 20_000), choices)
    assert isinstance(refused, Refusal)
    assert "of RAM needed" in refused.why


def test_where_inputs_are_too_many_nvme_holds_them(config_path: Path) -> None:
    job = a_job(config_path)
    many = Choices(micro_batches=4096)
    peaks: list[int] = []
    for tier in (Tier.DEVICE, Tier.NVME):
        found = outcome(job, a_machine(), dataclasses.replace(many, block_inputs=tier))
        assert isinstance(found, Outcome)
        peaks.append(found.peak.ram_bytes)
    machine = a_machine(sum(peaks) // 2)
    assert isinstance(outcome(job, machine, many), Refusal)
    change = smallest_change(job, machine, many)
    assert change is not None
    assert change[0].startswith("offload.block_inputs: nvme")
    assert change[1].written_bytes > change[1].num_steps * 10 * MB


def test_nothing_helps_where_the_libraries_alone_do_not_fit(config_path: Path) -> None:
    job = a_job(config_path)
    assert smallest_change(job, a_machine(10 * MB), Choices(micro_batches=1)) is None


def test_micro_batches_that_hide_reading_do(config_path: Path) -> None:
    """With as many micro-batches as it says a step takes its compute, with half of them it does not."""
    job = a_job(config_path)
    machine = a_machine(profile=a_profile(read_rate=1e6))
    ram = 2 * max(block.slot_bytes for block in job.blocks)
    first = outcome(job, machine, Choices(micro_batches=1, ram_bytes=ram))
    assert isinstance(first, Outcome)
    assert first.hidden_at is not None
    assert first.hidden_at > 4
    assert not first.is_hidden
    for num, hidden in ((first.hidden_at, True), (first.hidden_at // 2, False)):
        found = outcome(job, machine, Choices(micro_batches=num, ram_bytes=ram))
        assert isinstance(found, Outcome)
        step = found.simulation
        assert step is not None
        compute_s = step.busy_s[Lane.COMPUTE] + step.one_pass_s - max(step.busy_s.values())
        assert (step.step_s <= HIDDEN * compute_s) == hidden == found.is_hidden
        assert found.hidden_at is not None
        assert (found.hidden_at <= num) == hidden


def test_through_one_slot_nothing_is_hidden_however_short_reading_is(config_path: Path) -> None:
    """Compute is the longest lane by far; but a block is read while nothing is computed."""
    job = a_job(config_path)
    machine = a_machine(profile=a_profile(read_rate=1e6))
    largest = max(block.slot_bytes for block in job.blocks)
    two = outcome(job, machine, Choices(micro_batches=1, ram_bytes=2 * largest))
    assert isinstance(two, Outcome)
    assert two.hidden_at is not None
    num = 2 * two.hidden_at
    found = outcome(job, machine, Choices(micro_batches=num, ram_bytes=largest))
    assert isinstance(found, Outcome)
    step = found.simulation
    assert step is not None
    assert len(found.plan.slots) == 1
    assert step.bound_by is Lane.COMPUTE
    assert step.step_s == pytest.approx(sum(step.busy_s.values()), rel=0.05), "one after the other"
    assert not found.is_hidden
    assert found.hidden_at is None or found.hidden_at > num
    share = 1 - step.busy_s[Lane.COMPUTE] / step.step_s
    assert f"compute waits {share:.0%} of a step for NVMe read through 1 slot" in verdict(found)


def test_a_device_has_its_own_budget(config_path: Path) -> None:
    job = a_job(config_path, on_device=True)
    machine = a_machine(device=Device(name="GPU", memory_bytes=10 * MB))
    found = outcome(job, machine, Choices(micro_batches=MICRO))
    assert isinstance(found, Outcome)
    assert found.plan.on_device
    assert 0 < found.peak.device_bytes <= 10 * MB
    small = dataclasses.replace(machine, device=Device(name="GPU", memory_bytes=10**5))
    refused = outcome(job, small, Choices(micro_batches=MICRO))
    assert isinstance(refused, Refusal)
    assert "VRAM" in refused.why


def test_this_machine_is_as_it_is(tmp_path: Path) -> None:
    machine = own_machine(tmp_path / "not" / "yet")
    assert machine.ram_bytes > 10**8
    assert machine.drive.name == str(tmp_path.resolve())
    assert machine.drive.free_bytes
    assert machine.profile is None


# ------------------------------------------------------------------ the drive's room


def on_a_drive(job: Job, free_bytes: int, **more: Any) -> Outcome | Refusal:
    """What comes of it where so much of the drive is free; with the smallest budget, if none is given."""
    least = 2 * smallest_budgets(job.blocks, on_device=False).ram_bytes
    choices = Choices(**{"micro_batches": MICRO, "ram_bytes": least, **more})
    return outcome(job, a_machine(drive=Drive(name="/nvme", free_bytes=free_bytes)), choices)


def test_a_working_copy_of_the_weights_must_have_room(config_path: Path) -> None:
    words = "method: zo\nzo_trains: all\nzo_fold_steps: 10\nmax_steps: 100\n"
    config_path.write_text(config_path.read_text().replace("lora_r: 4\n", words))
    job = a_job(config_path)
    copy = sum(block.slot_bytes for block in job.blocks)
    found = on_a_drive(job, copy)
    assert isinstance(found, Outcome)
    assert sum(found.peak.nvme.values()) == copy, "the table's drive column has it"
    refused = on_a_drive(job, copy - 1)
    assert isinstance(refused, Refusal)
    assert "of the drive needed (working copy of the weights)" in refused.why
    short = dataclasses.replace(job, num_steps=10)
    for other, ram in ((short, None), (dataclasses.replace(job, fold_steps=0), None), (job, 10**9)):
        budget = {} if ram is None else {"ram_bytes": ram}
        assert isinstance(on_a_drive(other, 0, **budget), Outcome), "no copy is made"


def test_a_model_that_is_packed_first_must_have_room(config_path: Path) -> None:
    config_path.write_text(f"{config_path.read_text()}method: qlora\nquantization: 4\n")
    job = a_job(config_path)
    assert 0 < job.packed_bytes < job.source_bytes
    found = on_a_drive(job, job.packed_bytes)
    assert isinstance(found, Outcome)
    assert found.written_bytes >= job.packed_bytes
    refused = on_a_drive(job, job.packed_bytes - 1)
    assert isinstance(refused, Refusal)
    assert "of the drive needed (the packed model, which is made first)" in refused.why
    assert job_from(job.to_json()) == job
    folder = Path(job.packed_folder)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert a_job(config_path).packed_bytes == 0, "it is there"


def test_a_machine_without_a_gpu_that_is_not_here_is_planned_for(run) -> None:
    code, text = run("--offload.ram", "2MB", "--hardware", "epyc-2core")
    assert code == 0
    assert "measured by ssdtune probe" in text.splitlines()[0]
    assert "RAM 23.0 GB free" in text
    assert re.search(r"^A a step: compute \S+ s", text, re.MULTILINE), "times are known"
    assert "profile:" not in text
    assert "not measured" not in text


# ------------------------------------------------------------------ methods that can't be run yet


def test_other_methods_stand_beside_it_and_say_that_they_cant_be_run(run) -> None:
    save_profile(a_profile(read_rate=1e6), own_profile_path())
    code, text = run("--offload.ram", "300KB", "--compare")
    assert code == 0
    rows = [line for line in text.splitlines() if line.startswith("·")]
    assert len(rows) == 4
    can_run = [row for row in rows if "not runnable in this version" not in row]
    assert len(can_run) == 1
    assert "zeroth-order, 16-bit" in can_run[0]
    assert "method: zo" in can_run[0]
    assert all("≈" in row for row in rows)
    found = json.loads(run("--offload.ram", "300KB", "--compare", "--json")[1])
    assert [each["runs_as"] is None for each in found["others"]].count(True) == 3
    assert len(json.loads(run("--offload.ram", "300KB", "--json")[1])["others"]) == 0


def test_full_fine_tuning_reads_and_writes_its_states(config_path: Path) -> None:
    """Per parameter of the layers: 2 + 2 + 12 read, 14 written, every step."""
    job = a_job(config_path)
    on_nvme, in_ram, forward, packed = foreseen(job, a_machine(10**12))
    layers = shape_of(job).num_parameters
    assert on_nvme.outlook.written_bytes == pytest.approx(14 * layers, rel=0.01)
    assert on_nvme.outlook.read_bytes == pytest.approx(16 * layers, rel=0.3)
    assert in_ram.outlook.written_bytes < on_nvme.outlook.written_bytes
    assert in_ram.memory.ram > on_nvme.memory.ram
    assert forward.outlook.written_bytes == 0
    assert packed.outlook.read_bytes == pytest.approx(
        4.5 / 16 * forward.outlook.read_bytes, rel=0.01
    )


def test_of_a_models_experts_those_compute_that_a_token_is_routed_to(
    config_path: Path, tmp_path: Path
) -> None:
    experts = tmp_path / "experts"
    tiny_models.save(tiny_models.build("qwen3_moe", dtype=torch.float32), experts)
    text = config_path.read_text().splitlines()
    config_path.write_text("\n".join([f"model_name_or_path: {experts}", *text[1:]]))
    job = a_job(config_path)
    assert job.visits_vary, "by what a step's tokens choose"
    shape = shape_of(job)
    sizes = tiny_models.SMALL["hidden_size"], tiny_models.EXPERTS["moe_intermediate_size"]
    left_out = 2 * 3 * math.prod(sizes)  # two of the four, each of three matrices
    routed = 2.0 * (shape.block_parameters - left_out)
    assert routed < shape.flop_per_token < 1.2 * routed, "attention and adapters are counted too"
    assert shape.flop_per_token < 1.8 * shape.block_parameters


def test_what_would_not_fit_is_said_with_the_numbers(config_path: Path) -> None:
    job = a_job(config_path)
    drive = Drive(name="/nvme", free_bytes=10**5)
    assert "GB of drive >" in str(foreseen(job, a_machine(10**12, drive=drive))[0].why_not)
    assert foreseen(job, a_machine(10**12))[0].why_not is None
    assert foreseen(job, a_machine(profile=None)) == []


def with_transfers(**seconds: float) -> Profile:
    """Every transfer of 1 GB takes so long."""
    profile = a_profile()
    more = {name: Curve(((1.0, s / 1e9), (1e9, s))) for name, s in seconds.items()}
    return dataclasses.replace(profile, transfers={**profile.transfers, **more})


@pytest.mark.parametrize(
    ("mixed_s", "overlap"),
    [(1.5, 1.0), (1.0, 2.0), (1.25, 1 / 0.75), (9.0, 1.0)],  # of 1 GB: half read, half written
)
def test_what_a_drive_does_of_both_at_once_is_what_was_measured(
    config_path: Path, mixed_s: float, overlap: float
) -> None:
    """Reads of 0.5 GB take 0.5 s alone, writes 1 s."""
    profile = with_transfers(nvme_read=1.0, nvme_write=2.0, nvme_mixed=mixed_s)
    rates = rates_of(a_job(config_path), a_machine(profile=profile))
    assert rates is not None
    assert rates.drive_overlap == pytest.approx(overlap)
    assert rates.is_drive_shared


def test_measured_optimizer_and_sustained_writes_go_before_guesses(config_path: Path) -> None:
    job, guessed = a_job(config_path), rates_of(a_job(config_path), a_machine())
    assert guessed is not None
    assert guessed.drive_overlap == 1.0
    assert guessed.perturb == math.inf
    assert guessed.dram == pytest.approx(3e9), (
        "a copy reads and writes, and reads what it will write"
    )
    assert guessed.copy_overlap is None
    profile = with_transfers(nvme_write_sustained=4.0)
    kinds = {**profile.operators["float32"], PERTURB: Curve(((1e6, 1e-2),))}
    profile = dataclasses.replace(
        profile,
        operators={"float32": kinds},
        copy_overlap=1.25,
        optimizer={"foreach": Curve(((1e6, 1e-2),)), "fused": Curve(((1e6, 4e-3),))},
    )
    rates = rates_of(job, a_machine(profile=profile))
    assert rates is not None
    assert rates.write == pytest.approx(0.25e9)
    assert rates.update == pytest.approx(2.5e8), "the faster way"
    assert rates.copy_overlap == 1.25
    assert rates.perturb == pytest.approx(1e8)
    full = foreseen(job, a_machine(10**12, profile=profile))[0].outlook.step_s
    assert full > foreseen(job, a_machine(10**12))[0].outlook.step_s
    there = rates_of(job, machine_from("rtx4090"))
    assert there is not None
    assert 1e9 < there.perturb < math.inf, "assumed, not free"


# ------------------------------------------------------------------ what a profile is worth


def test_an_older_or_disturbed_profile_is_said_with_the_remedy(run) -> None:
    save_profile(dataclasses.replace(a_profile(), busy_cores=1.2), own_profile_path())
    notes = [line for line in run("--offload.ram", "2MB")[1].splitlines() if "profile:" in line]
    assert len(notes) == 2
    assert "without products of few tokens with large matrices, perturbing weights" in notes[0]
    assert "other processes used 1.2 cores" in notes[1]
    assert all("`ssdtune probe`" in note for note in notes)
    assert "profile:" not in run("--offload.ram", "2MB", "--hardware", "rtx4090")[1]


@pytest.mark.slow  # models are opened; see the same of made-up jobs in test_grid and test_profile
def test_a_profile_without_writes_plans_all_that_writes_nothing(run) -> None:
    profile = a_profile()
    reads = {name: curve for name, curve in profile.transfers.items() if name != "nvme_write"}
    save_profile(dataclasses.replace(profile, transfers=reads), own_profile_path())
    code, text = run("--offload.ram", "300KB")
    assert code == 0
    assert "A a step: compute" in text
    assert "nvme was never measured" in text
    assert "without products of few tokens with large matrices, perturbing weights, writing" in text
    code, text = run("--offload.ram", "300KB", "--offload.block_inputs", "nvme")
    assert code == 0
    assert "times are not known: writing to the drive was never measured" in text


@pytest.mark.slow  # models are opened; see the same of made-up jobs in test_grid and test_profile
def test_under_autocast_products_go_by_its_format_and_all_else_by_the_weights(
    config_path: Path,
) -> None:
    plain = a_job(config_path)
    config_path.write_text(config_path.read_text() + "bf16: true\n")
    job = a_job(config_path)
    assert job_from(job.to_json()) == job
    assert plain.work is not None
    assert job.work is not None
    assert (plain.work.autocast, job.work.autocast) == (None, "bfloat16")
    assert "autocast to bfloat16" in job_line(job)

    def total(job: Job, of: Callable[[Work], float]) -> float:
        assert job.work is not None
        return sum(of(work) for works in job.work.passes["train"].values() for work in works)

    flop = total(plain, lambda work: work.flop)
    assert total(job, lambda work: work.flop) == flop
    casts = total(job, lambda work: work.num_calls) - total(plain, lambda work: work.num_calls)
    assert casts > 0, "they are operators too"
    choices = Choices(micro_batches=MICRO)
    with pytest.raises(ProfileError, match=r"operators\.bfloat16\.matmul"):
        outcome(job, a_machine(), choices)
    profile = a_profile()
    emulated = {kind: Curve(((1.0, 1e-6), (1e9, 1e3))) for kind in OPERATORS}
    both = {**profile.operators, "bfloat16": emulated}
    machine = a_machine(profile=dataclasses.replace(profile, operators=both))
    for each, least_s, most_s in ((plain, 0.0, 1e-7), (job, 1e-6, 1.2e-6)):
        found = outcome(each, machine, choices)
        assert isinstance(found, Outcome)
        assert found.simulation is not None
        assert least_s < found.simulation.step_s / (MICRO * flop) < most_s


def test_a_step_is_told_up_to_its_slow_end(config_path: Path) -> None:
    profile = a_profile()
    slow = dataclasses.replace(
        profile,
        operators={
            "float32": {
                kind: dataclasses.replace(curve, slow=tuple(1.5 * s for _, s in curve.points))
                for kind, curve in profile.operators["float32"].items()
            }
        },
        transfers={
            name: dataclasses.replace(curve, slow=tuple(1.5 * s for _, s in curve.points))
            for name, curve in profile.transfers.items()
        },
    )
    job, choices = a_job(config_path), Choices(micro_batches=MICRO)
    usual, found = (outcome(job, a_machine(profile=p), choices) for p in (profile, slow))
    assert isinstance(usual, Outcome)
    assert isinstance(found, Outcome)
    assert usual.simulation is not None
    assert found.simulation == usual.simulation, "planned with the middle"
    assert usual.slow_step_s is None
    assert found.slow_step_s == pytest.approx(1.5 * usual.simulation.step_s)
    assert seconds(2.0, 3.0) == "2-3"
    assert seconds(2.0, None) == seconds(2.0, 2.0001) == "2"


def test_a_zeroth_order_jobs_perturbing_is_counted_and_kept(config_path: Path) -> None:
    words = "method: zo\nzo_trains: all\nzo_estimator: fzoo\nzo_num_directions: 3\nmax_steps: 100\n"
    config_path.write_text(config_path.read_text().replace("lora_r: 4\n", words))
    job = a_job(config_path)
    assert job.work is not None
    assert job.work.moves is not None
    moved = sum(
        op.size * n for w in job.work.moves.shifts.values() for op, n in w.operators.items()
    )
    final_norm = 64  # lies outside of blocks
    assert moved == 3 * (job.num_parameters - final_norm)
    assert job.missed_steps(MICRO) == 5.5, "a block goes back every ten steps"
    assert job_from(job.to_json()) == job
    profile = a_profile()
    kinds = {**profile.operators["float32"], PERTURB_SIGNS: Curve(((1e3, 1e-3),))}
    moving = dataclasses.replace(profile, operators={"float32": kinds})
    choices = Choices(micro_batches=MICRO, ram_bytes=2 * MB)
    plain, slower = (outcome(job, a_machine(profile=p), choices) for p in (profile, moving))
    assert isinstance(plain, Outcome)
    assert isinstance(slower, Outcome)
    assert plain.simulation is not None
    assert slower.simulation is not None
    assert slower.simulation.step_s > plain.simulation.step_s + moved * 1e-6


def test_a_working_copy_wears_the_drive_by_the_blocks_that_come_from_it(config_path: Path) -> None:
    """All blocks when it is made; then, in each step, a tenth of those that do not stay in their slots."""
    words = "method: zo\nzo_trains: all\nmax_steps: 100\n"
    config_path.write_text(config_path.read_text().replace("lora_r: 4\n", words))
    job = a_job(config_path)
    sizes = [block.slot_bytes for block in job.blocks]
    for share in (1.2, 0.7):
        choices = Choices(micro_batches=MICRO, ram_bytes=int(share * sum(sizes)))
        found = outcome(job, a_machine(), choices)
        assert isinstance(found, Outcome)
        back = sum(n for n, t in zip(sizes, found.plan.tiers, strict=True) if t is Tier.NVME)
        assert (back > 0) == (share < 1)
        copied = sum(sizes) + 89 * back / 10 if back else 0  # from the twelfth step on
        assert back < sum(sizes)
        assert found.written_bytes == pytest.approx(copied)
        assert "staging of blocks written back" not in found.peak.ram, "straight from the slots"
    few = outcome(dataclasses.replace(job, num_steps=10), a_machine(), choices)
    assert isinstance(few, Outcome)
    assert few.written_bytes == 0, "ten steps need no copy"


def test_beside_a_device_a_block_on_its_way_back_takes_ram(config_path: Path) -> None:
    """As much as the largest, where some come from the drive."""
    words = "method: zo\nzo_trains: all\nmax_steps: 100\n"
    config_path.write_text(config_path.read_text().replace("lora_r: 4\n", words))
    machine = a_machine(device=Device(name="GPU", memory_bytes=10 * MB))
    job = a_job(config_path, on_device=True)
    least = smallest_budgets(job.blocks, on_device=True)
    for has_room in (False, True):
        choices = Choices(
            micro_batches=MICRO,
            ram_bytes=10 * MB if has_room else least.ram_bytes,
            device_bytes=least.device_bytes,
        )
        without, found = (
            outcome(dataclasses.replace(job, fold_steps=steps), machine, choices)
            for steps in (0, 10)
        )
        assert isinstance(without, Outcome)
        assert isinstance(found, Outcome)
        assert (Tier.NVME in found.plan.tiers) == (not has_room)
        staged = found.peak.ram_bytes - without.peak.ram_bytes
        assert staged == (0 if has_room else max(block.slot_bytes for block in job.blocks))
        assert found.peak.device == without.peak.device


def test_a_job_of_low_rank_counts_whole_windows_and_what_they_hold(config_path: Path) -> None:
    words = (
        "method: zo\nzo_trains: low_rank\nzo_estimator: lozo\nzo_window: 20\nzo_fold_steps: 25\n"
    )
    words += "max_steps: 100\n"
    config_path.write_text(config_path.read_text().replace("lora_r: 4\n", words))
    job = a_job(config_path)
    assert job.fold_steps == 40, "rounded up to whole windows"
    assert job.missed_steps(MICRO) == pytest.approx(0.5 + 1 / 20)
    assert 0 < job.fixed.more["held beside the weights"] < job.fixed.more["a variant of a block"]
    assert job_from(job.to_json()) == job


# ------------------------------------------------------------------ activations on the drive


def test_activations_on_the_drive_are_counted_where_they_wear_it(config_path: Path) -> None:
    job, machine = a_job(config_path), a_machine(profile=a_profile(read_rate=1e12))
    none, some = (
        outcome(job, machine, Choices(micro_batches=MICRO, nvme_activation_bytes=n))
        for n in (0, 10**9)
    )
    assert isinstance(none, Outcome)
    assert isinstance(some, Outcome)
    assert some.plan.stored_blocks
    written = some.num_steps * some.plan.nvme_activation_bytes
    assert some.written_bytes - none.written_bytes == written > 0
    assert some.simulation is not None
    assert none.simulation is not None
    assert some.simulation.step_s < none.simulation.step_s


def test_how_much_of_a_drive_is_left_open_only_where_it_is_known(config_path: Path) -> None:
    job, profile = a_job(config_path), a_profile(read_rate=1e12)
    choices = Choices(micro_batches=MICRO, nvme_activation_bytes=None)
    roomy = Drive(name="/nvme", free_bytes=10**9)
    for drive, timed, stored in (
        (roomy, profile, True),
        (roomy, None, False),
        (Drive(name="/nvme"), profile, False),
    ):
        found = outcome(job, a_machine(profile=timed, drive=drive), choices)
        assert isinstance(found, Outcome)
        assert bool(found.plan.stored_blocks) == stored
    assert found.plan.budgets.nvme_activation_bytes == 0
