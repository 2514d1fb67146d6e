"""The quickstart's pace: as much as the processor does in time, in the faster number format."""

import itertools
import os
from pathlib import Path

import pytest

from ssdtune import pace, quickstart
from ssdtune.config import load_config
from ssdtune.visit.libraries import CACHE_KEYS

CONFIG = Path(__file__).parent.parent / quickstart.CONFIG
NEEDED = ["--model_name_or_path", "m", "--dataset", "d.jsonl", "--output_dir", "o"]


def config_of(flags):
    return load_config(None, [*flags, *NEEDED]).config


def test_a_run_is_timed_on_average_after_a_first_one(monkeypatch):
    clock = itertools.count(
        0.0, 0.11
    )  # a tick at every look: five runs until half a second is over
    monkeypatch.setattr(pace, "perf_counter", lambda: next(clock))
    runs = []
    assert pace.seconds_of(lambda: runs.append(1)) == pytest.approx(0.66 / 5)
    assert len(runs) == 6


def test_the_rate_is_a_steps_work_over_the_time_of_its_passes(monkeypatch):
    for key in CACHE_KEYS:
        monkeypatch.delenv(key, raising=False)
    seconds = iter([0.1, 0.05])  # a block's, a slice's
    monkeypatch.setattr(pace, "seconds_of", lambda run: next(seconds))
    flop = 2 * 165 * 6 * 134_515_008
    assert pace.measure_gflops("float32") == pytest.approx(flop / (30 * 0.1 + 12 * 0.05) / 1e9)
    assert all(key in os.environ for key in CACHE_KEYS), "libraries look at the first product"


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_passes_run_in_the_number_format(name, monkeypatch):
    monkeypatch.setattr(pace, "MEASURE_SECONDS", 0.0)
    assert 0 < pace.measure_gflops(name) < 1e5


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
    for flags in (pace.flags(rung, eval_path=None), pace.big_flags(100.0)):
        unevaluated = load_config(CONFIG, [*flags, *NEEDED]).config
        assert (unevaluated.eval_strategy, unevaluated.eval_on_start) == ("no", False)


def test_the_big_models_rows_are_as_long_as_the_processor_can_bear():
    lengths = [config_of(pace.big_flags(gflops)).max_length for gflops in (5, 80, 150, 700)]
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (32, 256)


def test_the_users_own_flags_beat_the_pace():
    flags = [*pace.flags(pace.LADDER[0], eval_path=None), "--max_steps", "3"]
    assert config_of(flags).max_steps == 3
