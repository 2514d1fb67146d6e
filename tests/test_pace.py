"""The quickstart's pace: as much as the processor does in time, in the faster number format."""

import itertools

import pytest

from ssdtune import pace
from ssdtune.config import load_config

NEEDED = ["--model_name_or_path", "m", "--dataset", "d.jsonl", "--output_dir", "o"]


def config_of(flags):
    return load_config(None, [*flags, *NEEDED]).config


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_the_rate_is_the_work_done_over_the_time_it_took(name, monkeypatch):
    clock = itertools.count(0.0, 0.11)  # a tick at every look: three rounds of two products
    monkeypatch.setattr(pace, "perf_counter", lambda: next(clock))
    flop = 6 * (2 * 256 * 576 * 1536)
    assert pace.measure_gflops(name) == pytest.approx(flop / 0.44 / 1e9)


def test_float32_is_for_processors_that_emulate_bfloat16():
    assert pace.choose_dtype({"bfloat16": 5.0, "float32": 40.0}) == "float32"
    assert pace.choose_dtype({"bfloat16": 700.0, "float32": 250.0}) == "bfloat16"
    assert pace.choose_dtype({"bfloat16": 40.0, "float32": 41.0}) == "bfloat16"


def test_each_rung_is_less_work_than_the_one_above():
    assert all(a.flop > b.flop for a, b in itertools.pairwise(pace.LADDER))


@pytest.mark.parametrize("gflops", [45, 90, 150, 300, 1000])
def test_the_largest_run_that_fits_the_time_is_chosen(gflops):
    chosen = pace.choose_rung(gflops)
    assert chosen.flop / (gflops * 1e9) <= pace.TRAIN_SECONDS
    larger = pace.LADDER[: pace.LADDER.index(chosen)]
    assert all(rung.flop / (gflops * 1e9) > pace.TRAIN_SECONDS for rung in larger)


def test_a_very_slow_processor_gets_the_smallest_run():
    assert pace.choose_rung(0.5) is pace.LADDER[-1]


@pytest.mark.parametrize("rung", pace.LADDER)
def test_a_rung_is_a_valid_configuration(rung):
    config = config_of([*pace.flags(rung, eval_path="/c/eval.jsonl"), "--eval_strategy", "steps"])
    assert config.max_steps == config.eval_steps == rung.steps
    assert config.gradient_accumulation_steps == rung.micro_batches
    assert config.learning_rate == rung.learning_rate
    assert config.eval_dataset[0].path == "/c/eval.jsonl"
    assert config.eval_dataset[0].split == f"train[:{rung.eval_rows}]"
    assert config_of(pace.flags(rung, eval_path=None)).eval_strategy == "no"


def test_the_big_models_rows_are_as_long_as_the_processor_can_bear():
    lengths = [config_of(pace.big_flags(gflops)).max_length for gflops in (5, 80, 150, 700)]
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (32, 256)


def test_the_users_own_flags_beat_the_pace():
    flags = [*pace.flags(pace.LADDER[0], eval_path=None), "--max_steps", "3"]
    assert config_of(flags).max_steps == 3
