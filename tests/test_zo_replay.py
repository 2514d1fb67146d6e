"""Runs from a YAML file against the algorithm in memory: their weights, what `ssdtune replay` makes of their logs, and
what a run comes to that ended amid a step and went on."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import support
import tiny_runs
import torch
from safetensors.torch import load_file
from test_zeroth_order import DECAY, LEARNING_RATE, SEED, all_weights
from test_zo_masters import MastersInMemory
from test_zo_rules import Ruled
from test_zo_trainer import ADAM, LOW_RANK, SIZES, YAML
from test_zo_windows import ESTIMATOR, WindowsInMemory
from transformers import AutoModelForCausalLM, TrainerCallback

from ssdtune.cli import main
from ssdtune.config import load_config
from ssdtune.generate import generate_from_run
from ssdtune.run_files import LOG_NAME
from ssdtune.trainer import run as run_module
from ssdtune.trainer import train_from_config
from ssdtune.trainer.zeroth_order import ZOTrainer, estimator_of, rule_of
from ssdtune.visit.base import base_of
from ssdtune.zeroth_order.log import LogError

Load = Callable[..., Any]
NO_EVAL = ("--eval_strategy", "no")
MOMENTS = ("--zo_update", "adam", "--zo_horizon", "3", "--zo_mask", "random")
EXACT = (
    *NO_EVAL,
    *("--seed", str(SEED), "--lr_scheduler_type", "constant"),
    *("--learning_rate", str(LEARNING_RATE), "--weight_decay", str(DECAY)),
)


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """A run's configuration; its model is `base`, of the dtype asked for first."""
    data = tiny_runs.write_rows(tmp_path / "rows.jsonl", tiny_runs.texts(16))

    def loaded(output: str, trains: str, *flags: str, dtype: torch.dtype = torch.float32) -> Any:
        model, path = tmp_path / "base", tmp_path / f"{output}.yaml"
        if not model.exists():
            tiny_runs.save(tiny_runs.llama(dtype=dtype, **SIZES), model)
        given = {"model": model, "data": data, "output": tmp_path / output, "trains": trains}
        path.write_text(YAML.format(**given))
        return load_config(path, flags)

    return loaded


# ------------------------------------------------------------------ what a run comes across


@dataclasses.dataclass
class Seen(TrainerCallback):
    """Of each step the micro-batches and the number of labels; at the end all weights, adapters too."""

    steps: list[tuple[list[dict[str, Any]], Any]] = dataclasses.field(default_factory=list)
    weights: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    def watch(self, trainer: ZOTrainer) -> None:
        plain = trainer._step

        def step(model: Any, num_items: Any) -> torch.Tensor:
            self.steps.append(([dict(inputs) for inputs in trainer._group], num_items))
            return plain(model, num_items)

        trainer._step = step  # type: ignore[method-assign]
        trainer.add_callback(self)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.weights = {name: p.detach().clone() for name, p in named}


def run(loaded: Any, monkeypatch: pytest.MonkeyPatch, *callbacks: TrainerCallback) -> Seen:
    """The whole run, or until a callback ends it."""
    made, seen = run_module._make_trainer, Seen()

    def with_callbacks(*args: Any) -> Any:
        trainer, telemetry = made(*args)
        assert isinstance(trainer, ZOTrainer)
        seen.watch(trainer)
        for callback in callbacks:
            trainer.add_callback(callback)
        return trainer, telemetry

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "_make_trainer", with_callbacks)
        train_from_config(loaded)
    return seen


# ------------------------------------------------------------------ a run, its log, the algorithm


def in_memory(model: Any, trains: str, config: Any) -> Any:
    """The algorithm of a run, written plainly."""
    weights, rule, estimator = all_weights(model), rule_of(config), estimator_of(config)
    if trains == "low_rank":
        assert estimator == ESTIMATOR
        return WindowsInMemory(model, weights, rule)
    kind = MastersInMemory if config.zo_master else Ruled
    return kind(model, estimator, weights, rule)


@pytest.mark.parametrize(
    ("trains", "dtype", "flags"),
    [
        pytest.param("all", torch.bfloat16, (*ADAM, "--zo_fold_steps", "2"), id="all-bf16"),
        *(
            pytest.param(trains, dtype, flags, id=told, marks=pytest.mark.slow)
            for told, trains, dtype, flags in (
                ("all", "all", torch.float32, ADAM),
                ("masters", "all", torch.bfloat16, ("--zo_master", "true", "--zo_fold_steps", "2")),
                ("low_rank", "low_rank", torch.bfloat16, (*LOW_RANK, "--zo_num_directions", "2")),
            )
        ),
    ],
)
def test_a_run_and_its_replay_have_the_weights_of_the_algorithm_in_memory(
    trains: str,
    dtype: torch.dtype,
    flags: tuple[str, ...],
    load: Load,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every tensor, and every step's loss; amid the run, at its end, and of a log whose last line was cut off."""
    loaded = load("run", trains, *EXACT, *flags, dtype=dtype)
    seen = run(loaded, monkeypatch)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    assert plain.dtype == dtype
    reference = in_memory(plain, trains, loaded.config)
    lines = (tmp_path / "run" / LOG_NAME).read_text().splitlines()[1:]
    assert len(lines) == len(seen.steps) == 6
    weights = {}
    for number, (line, step) in enumerate(zip(lines, seen.steps, strict=True), 1):
        losses = reference.step(*step)
        assert json.loads(line)["loss"] == math.fsum(losses) / len(losses)
        weights[number] = {name: t.clone() for name, t in plain.state_dict().items()}
    support.assert_equal(all_weights(plain), seen.weights, "the run's weights")
    for number in (3, 6):
        flags = ("--step", str(number)) if number < 6 else ()
        support.assert_equal(weights[number], replayed(tmp_path, *flags), f"after {number} steps")
    log = tmp_path / "run" / LOG_NAME
    assert "was cut off" not in capsys.readouterr().out
    log.write_bytes(log.read_bytes()[:-4])
    support.assert_equal(weights[5], replayed(tmp_path), "of a log that was cut")
    assert "its last line was cut off; that step did not happen" in capsys.readouterr().out


def replayed(folder: Path, *flags: str) -> dict[str, torch.Tensor]:
    """What `ssdtune replay` makes of the run."""
    out = folder / " ".join(("replayed", *flags))
    shutil.rmtree(out, ignore_errors=True)
    assert main(["replay", str(folder / "run"), "--out", str(out), *flags]) == 0
    return AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()


@pytest.mark.slow  # at once: test_zo_again.py
@pytest.mark.parametrize("trains", ["all", "adapters"])
def test_a_log_of_another_dtype_is_refused(trains: str, load: Load, tmp_path: Path) -> None:
    """Its steps, rounded otherwise, would come to other weights. An adapter has a dtype of its own, and answers."""
    train_from_config(load("run", trains, *NO_EVAL, "--max_steps", "2"))
    other = ("--dtype", "bfloat16")
    with pytest.raises(LogError, match=r"dtype: 'float32' in the log, 'bfloat16"):
        train_from_config(load("run", trains, *NO_EVAL, *other))
    refused = pytest.raises(LogError, match=r"rounded to float32, and .* are bfloat16")
    with refused if trains == "all" else contextlib.nullcontext():
        generate_from_run(tmp_path / "run", ["the sky"], max_new_tokens=1, overrides=other)


# ------------------------------------------------------------------ an adapter


@pytest.mark.parametrize(
    ("dtype", "flags"),
    [
        pytest.param(torch.float32, MOMENTS, id="adam"),
        pytest.param(torch.bfloat16, (), id="bf16", marks=pytest.mark.slow),
        pytest.param(torch.float32, ("--use_dora", "true"), id="dora", marks=pytest.mark.slow),
    ],
)
def test_the_adapter_of_any_step_is_made_again_from_the_log(
    dtype: torch.dtype, flags: tuple[str, ...], load: Load, tmp_path: Path
) -> None:
    """Those of all checkpoints, and the last one; from kilobytes."""
    keep = ("--save_total_limit", "none")
    train_from_config(load("run", "adapters", *NO_EVAL, *keep, *flags, dtype=dtype))
    kept = {step: tmp_path / "run" / f"checkpoint-{step}" for step in (2, 4)}
    kept[6] = tmp_path / "run"
    before = None
    for step, saved in kept.items():
        out = tmp_path / f"at {step}"
        words = ["replay", str(tmp_path / "run"), "--out", str(out)]
        assert main([*words, *(["--step", str(step)] if step < 6 else [])]) == 0
        wanted, found = (load_file(f / "adapter_model.safetensors") for f in (saved, out))
        support.assert_equal(wanted, found, f"the adapter after {step} steps")
        assert (out / "adapter_config.json").is_file()
        assert before is None or any(not torch.equal(before[n], found[n]) for n in found)
        before = found
    assert (tmp_path / "run" / LOG_NAME).stat().st_size < 4096


def test_an_adapter_that_began_with_other_values_is_refused(
    load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_from_config(load("run", "adapters", *NO_EVAL, "--max_steps", "1"))
    path = tmp_path / "run" / "ssdtune.yaml"
    path.write_text(path.read_text().replace("lora_r: 4", "lora_r: 8"))
    assert main(["replay", str(tmp_path / "run"), "--out", str(tmp_path / "new")]) == 2
    assert "began with can't be made again" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------ ended amid a step


class EndAmid(TrainerCallback):
    """Ctrl-C amid the fourth step: some blocks have had their visit, the next is about to."""

    def __init__(self, num_visits: int) -> None:
        self.num_visits = num_visits

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != 3:
            return
        engine, seen = base_of(kwargs["model"]).ssdtune.engine, set[int]()
        plain = engine.enter

        def entered(block: int, *given: Any) -> int:
            seen.add(block)
            if len(seen) > self.num_visits:
                raise KeyboardInterrupt
            return plain(block, *given)

        engine.enter = entered


FOLD = {"all": ("--zo_fold_steps", "1"), "low_rank": LOW_RANK, "adapters": ()}


@pytest.mark.parametrize(
    "trains", ["all", *(pytest.param(t, marks=pytest.mark.slow) for t in ("low_rank", "adapters"))]
)
def test_a_run_that_ended_between_two_visits_goes_on_to_the_same_bits(
    trains: str, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks before have gone back to the working copy, or are on their way, with steps that the others lack."""
    flags = (*NO_EVAL, *FOLD[trains])
    whole = run(load("whole", trains, *flags), monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(load("ended", trains, *flags), monkeypatch, EndAmid(2))
    assert_ended(tmp_path / "ended")
    resumed = run(load("ended", trains, *flags), monkeypatch)
    assert len(resumed.steps) == 4, "from the checkpoint after two"
    assert_same_run(tmp_path, "ended", whole, resumed)


@pytest.mark.slow
def test_a_run_that_was_killed_between_two_visits_goes_on_to_the_same_bits(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By SIGKILL, in a process of its own: nobody tidies up."""
    flags = (*NO_EVAL, *FOLD["all"])
    whole = run(load("whole", "all", *flags), monkeypatch)
    path = load("killed", "all", *flags).path
    script = Path(__file__).parent / "killed_run.py"
    done = subprocess.run(
        [sys.executable, str(script), str(path), *flags],
        env={**os.environ, "PYTHONPATH": str(tiny_runs.CHECKOUT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert_ended(tmp_path / "killed")
    resumed = run(load("killed", "all", *flags), monkeypatch)
    assert_same_run(tmp_path, "killed", whole, resumed)


def assert_ended(folder: Path) -> None:
    """In the fourth step, past a checkpoint after two."""
    assert (folder / "checkpoint-2").is_dir()
    assert not (folder / "checkpoint-4").exists()
    assert len((folder / LOG_NAME).read_bytes().splitlines()) == 1 + 3


def assert_same_run(folder: Path, other: str, whole: Seen, resumed: Seen) -> None:
    """Logs and all weights."""
    logs = [(folder / name / LOG_NAME).read_bytes() for name in ("whole", other)]
    assert logs[0] == logs[1]
    assert len(logs[0].splitlines()) == 1 + 6
    support.assert_equal(whole.weights, resumed.weights, "weights")
