"""The SST-2 benchmark: its arithmetic, and all of it on a tiny random model."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import sst2, sst2_table  # noqa: E402
from benchmarks.sst2_contenders import CONTENDERS, step_bytes  # noqa: E402
from benchmarks.sst2_table import Record, RecordError  # noqa: E402
from benchmarks.zeroth_order import Streamed  # noqa: E402
from ssdtune.schedule import trace  # noqa: E402
from ssdtune.schedule.plan import Lane  # noqa: E402
from ssdtune.zeroth_order import Fold  # noqa: E402

FORWARDS, NAMES, SEEDS = 18, ("mezo", "fzoo-adapters", "lora"), (0, 1)
PLACE = {"processor": "p", "threads": 2}
SETTINGS = {"model": "m", "dtype": "float32", "per_class": 512, "rows": 16, "dev_rows": 100}


# ------------------------------------------------------------------ the table


def row(name: str, seed: int, forwards: int, loss: float | None, accuracy: float) -> dict[str, Any]:
    """A look at a run of 100 forwards: a tenth of a second and a byte for each, four of them a step."""
    told = {"contender": name, "how": "", "rate": 1.0, "seed": seed, "is_grid": False, **PLACE}
    counts = {"forwards": forwards, "steps": forwards // 4, "seconds": forwards / 10}
    seen = {"loss": loss, "eval_loss": loss, "accuracy": accuracy}
    is_last = forwards == 100 or loss is None
    return {**told, **counts, "bytes": forwards * 1e9, **seen, "is_last": is_last}


def record_of(folder: Path, *rows: dict[str, Any]) -> Record:
    record = Record(folder / "rows.jsonl", SETTINGS)
    for each in ({"contender": "untuned", "eval_loss": 1.0, "accuracy": 0.5, **PLACE}, *rows):
        record.add(each)
    return record


def test_a_curve_is_straight_between_looks_and_begins_untuned(tmp_path: Path) -> None:
    record = record_of(tmp_path, row("mezo", 0, 40, 0.8, 0.6), row("mezo", 0, 100, 0.5, 0.9))
    curve = sst2_table.curves(record)["mezo"][0]
    assert curve.at("forwards", 20, "eval_loss") == pytest.approx(0.9)
    assert curve.at("seconds", 7, "accuracy") == pytest.approx(0.75)
    assert curve.forwards_to(0.65) == pytest.approx(70)
    assert curve.forwards_to(1.0) == 0
    assert curve.forwards_to(0.4) == float("inf")


def test_runs_that_are_not_over_and_those_of_the_grid_are_left_out(tmp_path: Path) -> None:
    grid = {**row("mezo", 0, 100, 0.1, 1.0), "is_grid": True}
    record = record_of(tmp_path, grid, row("lora", 0, 40, 0.8, 0.6))
    assert sst2_table.curves(record) == {}


def test_of_a_run_with_another_rate_the_later_rows_count(tmp_path: Path) -> None:
    later = [{**row("mezo", 0, n, 0.5, 0.5), "rate": 2.0} for n in (60, 100)]
    record = record_of(
        tmp_path, row("mezo", 0, 40, 0.8, 0.6), row("mezo", 0, 100, 0.9, 0.9), *later
    )
    assert sst2_table.curves(record)["mezo"][0].rows[1:] == tuple(later)


def test_the_best_is_held_against_the_baseline_and_the_untuned_model(tmp_path: Path) -> None:
    """Untuned .5 with a standard error of .05; the best is where MeZO ends after 25 and 31 of 100 forwards."""
    ends = [
        *(row("mezo", seed, 100, 0.8, 0.6) for seed in SEEDS),
        *(
            row("fzoo", seed, 100, loss, 0.66)
            for seed, loss in zip(SEEDS, (0.2, 0.36), strict=True)
        ),
        row("lora", 0, 100, 0.1, 0.9),
    ]
    *table, accuracy, forwards = sst2_table.lines(record_of(tmp_path, *ends))
    assert accuracy.endswith("(bar 3 in each of 2 seeds): met")
    assert "fzoo" in accuracy
    assert "+3.2, +3.2" in accuracy
    assert "0.28, median of 2 seeds (bar 0.5): met" in forwards
    cells = {line.split(" | ")[0][2:]: line for line in table if line.startswith("| ")}
    assert cells["fzoo"].endswith("| 28 |")
    assert cells["mezo"].endswith("| 100 |")
    assert "60.0% (60.0% to 60.0%), 0.8000" in cells["mezo"]


def test_bars_that_are_not_met_are_said(tmp_path: Path) -> None:
    ends = [row("mezo", 0, 100, 0.8, 0.6), row("fzoo", 0, 100, None, 0.0)]
    *table, accuracy, forwards = sst2_table.lines(record_of(tmp_path, *ends))
    assert "diverged (seed 0)" in "".join(table)
    assert accuracy.endswith("**not met**")
    assert forwards.endswith("**not met**")


# ------------------------------------------------------------------ a whole run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer, and both files."""
    made = tmp_path_factory.mktemp("sst2")
    tiny_runs.save(tiny_runs.llama(), made / "model")
    lines = [
        f"{('the sky is blue', 'grass is green')[k % 2]} {'so ' * k}\t{k % 2}" for k in range(16)
    ]
    for name in ("sst2_train.tsv", "sst2_dev.tsv"):
        (made / name).write_text("\n".join(lines) + "\n")
    return made


def flags(folder: Path, path: Path, *more: str) -> list[str]:
    """Of a run of seconds; the last of each flag counts."""
    given = {"--data": folder, "--model": folder / "model", "--json": path, "--dtype": "float32"}
    given |= {"--forwards": FORWARDS, "--every": 9, "--grid-forwards": FORWARDS}
    words = [str(word) for pair in given.items() for word in pair]
    words += ["--per-class", "4", "--rows", "4", "--grid", "1"]
    return [*words, "--contenders", *NAMES, "--seeds", *map(str, SEEDS), *more]


@pytest.fixture(scope="module")
def path(folder: Path) -> Path:
    """The rows of a whole run."""
    path = folder / "rows.jsonl"
    assert sst2.main(flags(folder, path, "--draw", str(folder / "curve.png"))) == 0
    return path


def without_seconds(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in each.items() if k != "seconds"} for each in Record(path).rows]


def test_each_run_takes_as_many_steps_as_its_forwards_hold(path: Path) -> None:
    ends = [each for each in Record(path).rows[1:] if each["is_last"] and not each["is_grid"]]
    assert [(each["seed"], each["contender"]) for each in ends] == [
        (seed, name) for seed in SEEDS for name in NAMES
    ]
    for each in ends:
        passes = {"mezo": 2, "fzoo-adapters": 9, "lora": 3}[each["contender"]]
        assert each["steps"] == FORWARDS // passes
        assert each["forwards"] == each["steps"] * passes
        assert each["bytes"] > 0
        assert each["seconds"] > 0


def test_the_rate_of_the_grid_with_the_lowest_loss_is_taken(folder: Path, tmp_path: Path) -> None:
    """One whose steps are too large for float32 is never it."""
    path = tmp_path / "rows.jsonl"
    grid = ("--grid", "1e45", "1", "1e3")
    assert sst2.main(flags(folder, path, *grid, "--contenders", "mezo", "--seeds", "1")) == 0
    rows = Record(path).rows[1:]
    lost, *tried = (each for each in rows if each["is_grid"])
    assert lost["eval_loss"] is None
    assert lost["forwards"] < FORWARDS
    best = min(tried, key=lambda each: each["eval_loss"])
    assert {each["rate"] for each in rows if not each["is_grid"]} == {best["rate"]}


def test_it_goes_on_where_it_was_cut(folder: Path, path: Path, tmp_path: Path) -> None:
    """Amid the last line but one: that run is made again, to the same losses."""
    lines = path.read_bytes().splitlines(keepends=True)
    cut = tmp_path / "rows.jsonl"
    cut.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    assert sst2.main(flags(folder, cut)) == 0
    num_again = sum(json.loads(line).get("contender") == "lora" for line in lines[-2:])
    assert without_seconds(cut)[: len(lines) - 2] == without_seconds(path)[:-1]
    assert without_seconds(cut)[-num_again:] == without_seconds(path)[-num_again:]
    whole = cut.read_bytes()
    assert sst2.main(flags(folder, cut)) == 0
    assert cut.read_bytes() == whole, "nothing is left to run"


def test_rows_of_other_settings_are_refused(folder: Path, path: Path) -> None:
    with pytest.raises(RecordError, match="forwards 18, not 20"):
        sst2.main(flags(folder, path, "--forwards", "20"))


def test_table_and_curves_are_made_from_the_file_alone(
    folder: Path, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sst2_table.main([str(path), "--draw", str(tmp_path / "again.png")]) == 0
    printed = capsys.readouterr().out
    assert all(f"| {name} | 2 |" in printed for name in NAMES)
    assert (tmp_path / "again.png").read_bytes() == (folder / "curve.png").read_bytes()


def test_the_untuned_model_is_where_adapters_begin(folder: Path, path: Path) -> None:
    bench = sst2.Bench(sst2.parsed(flags(folder, path)))
    model = sst2.opened(bench.folder, "float32", "adapters", seed=1)
    seen = sst2.look(model, bench.task.batches(bench.task.dev.dataset, 32))
    sst2.close(model)
    assert seen.items() <= sst2_table.untuned(bench.record).items()


@pytest.mark.parametrize("name", ["mezo", "fzoo-adapters"])
def test_bytes_of_a_step_are_those_that_a_streamed_one_moves(
    name: str, folder: Path, tmp_path: Path
) -> None:
    """The copy is made before the second step; from the third on what is read is written."""
    contender = CONTENDERS[name]
    has_adapter = contender.trains == "adapters"
    streamed = Streamed(
        folder / "model",
        torch.ones(2, 8, dtype=torch.long),
        estimator=contender.estimator,
        fold=None if has_adapter else Fold(tmp_path, 1),
        has_adapter=has_adapter,
    )
    with torch.no_grad():
        for _ in range(5):
            streamed.step()
    engine = streamed.streamer.engine
    engine.await_stores()
    ops = [op for op in engine.trace if op.step == 4]
    moved = trace.read_bytes(ops) + sum(op.num_bytes for op in ops if op.lane is Lane.NVME_WRITE)
    streamed.close()
    assert moved == step_bytes(folder / "model", "float32", contender)
    assert moved > 0


def test_a_rate_that_falls_comes_to_nothing_over_the_run() -> None:
    falling, steady = (CONTENDERS[name] for name in ("fzoo-adapters-falling", "fzoo-adapters"))
    assert [falling.rate_after(0.4, done) for done in (0.0, 0.5, 1.0)] == [0.4, 0.2, 0.0]
    assert steady.rate_after(0.4, 0.25) == 0.4
    assert falling.how() != steady.how()
