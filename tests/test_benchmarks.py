"""The step benchmark: its arithmetic, and a whole run on a tiny random model."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from ssdtune.kernels.ggml import KINDS
from ssdtune.kernels.native import library
from ssdtune.packing.wanted import FORMATS

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import (  # noqa: E402
    contest,
    encoders,
    inputs,
    machine,
    measures,
    peers,
    table,
    unpack,
    unpack_device,
)

LENGTH, ROUNDS = 32, 2


# ------------------------------------------------------------------------------ arithmetic


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([3.0], 0.2, 3.0), ([1.0, 2.0], 0.5, 1.5), ([5, 1, 3, 2, 4], 0.8, 4.2), ([2, 1, 3], 1.0, 3)],
)
def test_a_quantile_is_interpolated_between_ordered_values(
    values: list[float], share: float, expected: float
) -> None:
    assert measures.quantile(values, share) == pytest.approx(expected)


def test_a_spread_has_the_median_both_sides_and_the_count() -> None:
    assert measures.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {
        "p50": 3.0,
        "p20": pytest.approx(1.8),
        "p80": pytest.approx(4.2),
        "n": 5,
    }


def test_a_load_that_slows_whole_rounds_leaves_the_paired_ratio_alone() -> None:
    base = [1.0, 10.0, 1.0, 4.0]
    assert measures.paired_ratio([1.1 * b for b in base], base)["p50"] == pytest.approx(1.1)


def test_a_paired_ratio_needs_as_many_rounds_on_both_sides() -> None:
    with pytest.raises(ValueError, match="longer"):
        measures.paired_ratio([1.0], [1.0, 2.0])


def test_the_floor_is_the_slowest_lane() -> None:
    found = measures.floor({"compute": (100.0, 50.0), "nvme_read": (9.0, 3.0)})
    assert found == {
        "seconds": 3.0,
        "limit": "nvme_read",
        "lanes": {"compute": 2.0, "nvme_read": 3.0},
    }


def test_flops_count_each_matrix_as_often_as_a_checkpointed_step_multiplies_by_it() -> None:
    blank = {"block_weights": 0, "head_weights": 0, "adapter_weights": 0, "num_blocks": 0}
    shape = {**blank, "attention_width": 0}

    def flops(**more: int) -> float:
        known = {**shape, **more}
        return measures.step_flops(known, num_rows=2, length=3, trains_weights=False) / 6

    assert flops(block_weights=1) == 6  # forward, recomputed forward, gradient of the input
    assert flops(head_weights=1) == 4  # not recomputed
    assert flops(adapter_weights=1) == 8  # and the gradient of its own
    assert flops(num_blocks=1, attention_width=1) == 4 * 2 * 3  # 2 products, half of 3 x 3 a row
    full = measures.step_flops(
        {**shape, "block_weights": 1}, num_rows=2, length=3, trains_weights=True
    )
    assert full / 6 == 8


@pytest.mark.parametrize(
    ("visits", "expected"),
    [
        ([(0, 0, 2.0), (1, 0, 3.0)], 5.0),  # all resident
        ([(0, 10, 4.0), (1, 10, 4.0)], 8.0),  # a read of 1 s hides behind each visit
        ([(0, 10, 0.5), (1, 10, 0.5)], 2.0),  # the drive never rests
        ([(0, 10, 1.0), (0, 10, 1.0)], 4.0),  # one slot: nothing overlaps
        ([(0, 20, 1.0), (1, 20, 1.0), (0, 0, 4.0), (1, 0, 4.0)], 11.0),  # forward waits, see below
    ],
)
def test_a_plan_s_step_is_predicted_from_its_slots(
    visits: list[tuple[int, float, float]], expected: float
) -> None:
    # the last: the first slot falls free 4 s before the step ends, in which the drive reads both
    # halves of what it can: 2 s into slot 0; slot 1 only when the step is over, 2 s, 1 s hidden
    assert measures.predict_step(visits, bytes_per_s=10.0) == pytest.approx(expected)


def test_each_pass_takes_the_longer_of_its_compute_and_its_reading() -> None:
    passes = {"forward": (1.0, 20), "backward": (3.0, 20)}
    assert measures.bound_of_passes(passes, bytes_per_s=10.0) == 2.0 + 3.0
    assert measures.bound_of_passes(passes, bytes_per_s=5.0) == 4.0 + 4.0


def test_losses_are_compared_over_the_steps_that_both_made() -> None:
    found = measures.compare_losses([2.0, 1.5, 1.0], [2.0, 1.25])
    assert found["steps"] == 2
    assert found["max_difference"] == 0.25
    assert not found["bit_equal"]
    assert measures.compare_losses([2.0], [2.0, 7.0])["bit_equal"]


def test_a_loss_that_is_no_number_is_infinitely_off() -> None:
    found = measures.compare_losses([2.0, 1.0], [2.0, math.nan])
    assert found["max_difference"] == math.inf
    assert not found["bit_equal"]


def test_a_bar_is_met_up_to_its_limit() -> None:
    assert measures.bar("x", 1.05, 1.05)["passed"]
    assert not measures.bar("x", 1.06, 1.05)["passed"]
    assert not measures.bar("x", math.nan, 1.05)["passed"]


def test_the_dtype_taken_is_the_faster_one_and_says_so() -> None:
    dtype, why = machine.choose_dtype("auto", {"float32": 5e10, "bfloat16": 1e9})
    assert dtype == "float32"
    assert "50.0" in why
    assert "1.0" in why
    assert machine.choose_dtype("bfloat16", {"float32": 5e10, "bfloat16": 1e9})[0] == "bfloat16"


# --------------------------------------------------------------------------------- inputs


def test_a_copy_in_another_dtype_is_made_once_and_holds_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    monkeypatch.setenv("SSDTUNE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tiny"
    tiny_models.save(tiny_models.build("llama", dtype=torch.bfloat16), folder)
    said: list[str] = []
    copy = inputs.in_dtype(folder, "float32", said.append)
    assert inputs.in_dtype(folder, "float32", said.append) == copy
    assert len(said) == 1
    assert inputs.in_dtype(copy, "float32", said.append) == copy
    assert json.loads((copy / "config.json").read_text())["dtype"] == "float32"
    for file in folder.glob("*.safetensors"):
        wanted, found = load_file(file), load_file(copy / file.name)
        assert wanted.keys() == found.keys()
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor.float())


def test_a_batch_is_full_rows_and_the_same_each_time(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 11}')
    batch, told = inputs.token_batch(tmp_path, 3, 5)
    assert told == "random ids"
    assert [len(row) for row in batch] == [5, 5, 5]
    assert all(0 <= token < 11 for row in batch for token in row)
    assert inputs.token_batch(tmp_path, 3, 5)[0] == batch


# ------------------------------------------------------------------------------ a whole run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The JSON written and what was printed, of 2 rounds on a tiny Llama; no peer is installed."""
    folder = tmp_path_factory.mktemp("benchmark")
    tiny_models.save(tiny_models.build("llama", dtype=torch.float32), folder / "tiny")
    command = [sys.executable, str(ROOT / "benchmarks" / "step.py"), "--model", folder / "tiny"]
    command += ["--rows", 2, "--length", LENGTH, "--rounds", ROUNDS, "--reading", 1, "--threads", 1]
    command += ["--dtype", "float32", "--micro-rows", 1, "--peers", "airllm"]
    command += ["--json", folder / "out.json"]
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "SSDTUNE_CACHE": str(folder / "cache")},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "out.json").read_text()), done.stdout


def rows_by_name(run: tuple[dict[str, Any], str]) -> dict[str, dict[str, Any]]:
    return {row["contestant"]: row for row in run[0]["rows"]}


def test_the_last_line_printed_is_the_json_that_was_written(
    run: tuple[dict[str, Any], str],
) -> None:
    assert json.loads(run[1].splitlines()[-1]) == run[0]


def test_each_row_says_what_it_trains_and_where_it_was_measured(
    run: tuple[dict[str, Any], str],
) -> None:
    needed = ("processor", "cores", "drive", "filesystem", "storage", "commit", "date")
    for row in run[0]["rows"]:
        assert all(name in row for name in needed)
        if "not_measured" not in row:
            assert row["trains"] == "lora"
            assert row["dtype"] == "float32"
            assert row["seconds"]["n"] == ROUNDS


def test_all_train_to_the_same_losses_bit_for_bit(run: tuple[dict[str, Any], str]) -> None:
    rows = rows_by_name(run)
    assert set(rows) >= {"in memory", "in memory, whole batch", "ours", "ours, reading at 1"}
    for name in ("ours", "ours, reading at 1"):
        losses = rows[name]["losses"]
        assert losses["steps"] == ROUNDS + 1
        assert losses["bit_equal"]
        assert losses["first_expected"] > losses["last_expected"]  # it trains


def test_ours_reads_what_its_plan_says_and_keeps_no_layer(run: tuple[dict[str, Any], str]) -> None:
    row = rows_by_name(run)["ours"]
    assert row["about"]["resident_layers"] == 0
    assert row["about"]["slot_bytes"] <= row["about"]["ram_budget_bytes"]
    assert row["streamed_bytes"] > 0
    assert row["streamed_bytes"] == pytest.approx(
        row["floor"]["lanes"]["nvme_read"] * 1.0 * row["drive_bytes_per_s"]
    )
    assert row["misses"] == 0


def test_ratios_are_of_the_run_s_own_medians(run: tuple[dict[str, Any], str]) -> None:
    rows = rows_by_name(run)
    ours = rows["ours"]
    base = rows[ours["base"]]
    assert ours["ratio"]["p50"] == pytest.approx(ours["seconds"]["p50"] / base["seconds"]["p50"])
    assert ours["floor"]["seconds"] == max(ours["floor"]["lanes"].values())
    slow = rows["ours, reading at 1"]
    limit = max(slow["reading_s"], base["seconds"]["p50"])
    assert slow["ratio_to_limit"] == pytest.approx(slow["seconds"]["p50"] / limit)
    assert slow["reading_s"] == pytest.approx(
        slow["streamed_bytes"] / slow["throttled_to_bytes_per_s"]
    )
    assert slow["ratio_to_passes"] == pytest.approx(slow["seconds"]["p50"] / slow["passes_s"])
    assert slow["passes_s"] >= slow["reading_s"]
    told = {bar["bar"]: bar for bar in run[0]["bars"]}
    free = told[f"2 x {LENGTH}: ours / in memory"]
    assert free["passed"] == (ours["ratio"]["p50"] <= free["limit"] == 1.05)


def test_a_throttled_step_takes_no_less_than_its_reading(run: tuple[dict[str, Any], str]) -> None:
    row = rows_by_name(run)["ours, reading at 1"]
    assert row["seconds"]["p50"] >= 0.95 * row["reading_s"]


def test_a_peer_that_is_not_there_gets_a_row_that_says_how_to_install_it(
    run: tuple[dict[str, Any], str],
) -> None:
    if peers.is_installed("airllm") and not peers.packages_folder("airllm").is_dir():
        pytest.skip("airllm is in this environment")
    row = rows_by_name(run)["airllm"]
    assert "pip install" in row["not_measured"]
    assert peers.REQUIREMENTS["airllm"] in row["not_measured"]
    assert "seconds" not in row


def test_the_table_has_a_line_for_each_row_and_each_bar(run: tuple[dict[str, Any], str]) -> None:
    printed = list(table.lines(run[0]))
    for row in run[0]["rows"]:
        line = next(line for line in printed if line.startswith(f"| {row['contestant']} |"))
        assert line.count("|") == len(table.COLUMNS) + 1
    assert sum("(bar " in line for line in printed) == len(run[0]["bars"])
    assert f"**2 x {LENGTH} tokens**" in "\n".join(printed)


def test_a_contestant_that_fails_is_named_with_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('this torch is broken')")
    spec = {"kind": "memory", "threads": 1}
    entrant = contest.Entrant("lost", spec, scratch=tmp_path, packages=tmp_path)
    try:
        with pytest.raises(contest.ContestantError, match=r"lost ended.*this torch is broken"):
            entrant.wait_ready()
    finally:
        entrant.kill()


# ------------------------------------------------------------------ on a device, and by forward passes alone


def run_script(name: str, *flags: object) -> str:
    """What a benchmark prints."""
    code, printed = code_and_text(name, *flags)
    assert code == 0
    return printed


def code_and_text(name: str, *flags: object) -> tuple[int, str]:
    """The exit code of a benchmark that ends by itself, 1 where a bar is not met, and what it prints."""
    command = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert not done.stderr.startswith("Traceback"), done.stderr[-3000:]
    return done.returncode, done.stdout


def test_each_width_has_its_bar() -> None:
    bars = {
        name: [unpack.bar_of(suffix, kind) for suffix in ("_avx512", "_avx2")]
        for name, _, kind in unpack.formats()
    }
    assert bars["4 bits (4,)"] == bars["NF4"] == bars["MXFP4"] == [1.4, 1.25]
    assert bars["5 bits (4, 1)"] == [1.35, 0.5]
    assert bars["6 bits (4, 1, 1)"] == [1.15, 0.5]
    assert bars["7 bits (4, 1, 2)"] == bars["8 bits (4, 1, 1, 2)"] == [1.1, 0.5]
    assert bars["FP8, blocks of 128"] == [0.55, 0.45]
    assert bars["3 bits, rotated groups of 64"] == [None, None]


@pytest.mark.slow
def test_decoders_are_checked_and_measured_beside_memcpy_and_by_two_threads() -> None:
    printed = run_script("unpack.py", "--megabytes", 1, "--rounds", 1).splitlines()
    memcpy, *rows = json.loads(printed[-1])["times"]
    assert memcpy["contestant"] == "memcpy"
    assert all(row["bytes_per_s"] > 0 for row in rows)
    if library() is None:
        return
    by_name = {row["contestant"]: row for row in rows}
    assert by_name["FP8, blocks of 128"]["of_memcpy"]["n"] == 1
    threaded = [row for row in rows if "of_usual" in row]
    bars = [None, None, 1.7, 1.7]  # memcpy and memset have none
    assert [row["bar"] for row in threaded] == bars * (len(os.sched_getaffinity(0)) > 1)


def test_kernels_of_a_device_are_checked_and_measured_without_one() -> None:
    """And what is slower than its bar can't pass."""
    flags = ("--device", "cpu", "--megabytes", 1, "--rounds", 1)
    code, printed = code_and_text("unpack_device.py", *flags, "--json")
    *table, last = printed.splitlines()
    rows = json.loads(last)
    assert {row["bar"] for row in rows} == {0.7, 0.6, None}
    assert all(row["of_copy"]["n"] == 1 and row["bytes_per_s"] > 0 for row in rows)
    missed = [row for row in rows if row["bar"] and row["of_copy"]["p50"] < row["bar"]]
    assert code == bool(missed)
    assert sum("**not met**" in line for line in table) == len(missed)
    assert len(unpack_device.unmet(rows)) == len(missed)
    named = {row["contestant"].split(",")[0] for row in rows}
    kinds = {f"GGUF {kind}" for kind, found in KINDS.items() if found.block > 1}
    others = {"lossless", "NVFP4", "INT8", "codes of 4 bits take a step", "activations to bytes"}
    assert {"GPTQ", "AWQ", "FP8", "NF4", "FP4", *kinds, *others} <= named


def test_the_benchmark_of_a_device_runs_without_one(tmp_path: Path) -> None:
    flags = ("--layers", 3, "--width", 128, "--length", 16, "--rounds", 1, "--scratch", tmp_path)
    code, printed = code_and_text("gpu.py", "--device", "cpu", *flags, "--json")
    result = json.loads(printed.splitlines()[-1])
    missed = [row for row in result["rows"] if row["ours_s"] > 1.1 * row["floor_s"]]
    assert len(result["unmet"]) == len(missed)
    assert code == bool(missed)
    assert [row["tokens"] for row in result["rows"]] == [16, 8 * 16]
    for row in result["rows"]:
        assert row["losses_off_by"] == 0
        assert row["misses"] == 0
        assert row["floor_s"] > 0
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_encoders_are_timed_in_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    try:
        assert encoders.main(["--millions", "1", "--rounds", "1", "--threads", "2"]) == 0
    finally:
        torch.set_num_threads(before)
    told = capsys.readouterr().out.splitlines()
    rows = json.loads(told[-1])["rows"]
    assert {"2", "4", "4/8", *FORMATS[1:]} < {row["format"] for row in rows}
    assert all(row["weights_per_s"]["2"] > 0 for row in rows)
    assert sum(line.startswith("| ") for line in told) == len(rows) + 2


def test_the_readme_tells_the_newest_losses_of_widths_by_tensor() -> None:
    told = re.search(
        r"loss was ([\d.]+) with a text and ([\d.]+) without \(([\d.]+) with all bits",
        " ".join((ROOT / "README.md").read_text().split()),
    )
    measured = re.search(
        r"mixed\.py`, with all bits ([\d.]+)\).*?3\.5 by\s+errors of weights ([\d.]+), weighed by gradients \*\*([\d.]+)",
        (ROOT / "benchmarks" / "README.md").read_text(),
        re.DOTALL,
    )
    assert told is not None
    assert measured is not None
    assert [*told.groups()] == [f"{float(loss):.2f}" for loss in reversed(measured.groups())]
