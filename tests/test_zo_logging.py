"""What zeroth-order runs log and report: rates of a schedule, projected gradients, steps that were skipped."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import support
import tiny_models
import tiny_runs
import torch
from test_zeroth_order import (
    DECAY,
    LEARNING_RATE,
    SEED,
    InMemory,
    Stream,
    all_weights,
    estimates,
)
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.integrations import integration_utils

from ssdtune.run_files import LOG_NAME
from ssdtune.trainer.zeroth_order import ZOTrainer
from ssdtune.zeroth_order import MeZO

MEZO = MeZO(eps=1e-2)
ROWS = [{"input_ids": [5 + (k + j) % 7 for j in range(8)]} for k in range(20)]


class Reporter(TrainerCallback):
    """Keeps what is reported of training steps."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            self.logs.append(dict(kwargs["logs"]))


@pytest.fixture
def reporter(monkeypatch: pytest.MonkeyPatch) -> Reporter:
    """Stands where TensorBoard's callback would: `report_to` is the Trainer's own."""
    made = Reporter()
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", made)
    return made


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids}


def run(
    tmp_path: Path, stream: Stream, *, objective: Callable[..., Any] | None = None, **arguments: Any
) -> tuple[ZOTrainer, Any]:
    """A run of five steps of two micro-batches of two rows, in their order; its model in memory, untouched."""
    folder = tiny_models.save(tiny_models.build("llama"), tmp_path / "model")
    trainer = ZOTrainer(
        stream(folder),
        tiny_runs.arguments(
            tmp_path / "run",
            per_device_train_batch_size=2,
            max_steps=5,
            learning_rate=LEARNING_RATE,
            weight_decay=DECAY,
            logging_steps=1,
            report_to=["tensorboard"],
            seed=SEED,
            **arguments,
        ),
        collate,
        train_dataset=ROWS,
        estimator=MEZO,
        objective=objective,
    )
    tiny_runs.in_order(trainer).train()
    return trainer, AutoModelForCausalLM.from_pretrained(folder)


def pieces(step: int) -> list[dict[str, torch.Tensor]]:
    """A step's micro-batches."""
    return [collate(ROWS[first : first + 2]) for first in (4 * step, 4 * step + 2)]


def log_lines(tmp_path: Path) -> list[dict[str, Any]]:
    """Of the steps."""
    lines = (tmp_path / "run" / LOG_NAME).read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


def test_rates_and_decays_follow_the_schedule(
    tmp_path: Path, stream: Stream, reporter: Reporter
) -> None:
    """In the log, in the weights, and in what is reported."""
    trainer, plain = run(tmp_path, stream, lr_scheduler_type="linear")
    reference = InMemory(plain, MEZO, all_weights(plain))
    lines = log_lines(tmp_path)
    rates = [line["rate"] for line in lines]
    assert rates == pytest.approx([LEARNING_RATE * left / 5 for left in (5, 4, 3, 2, 1)])
    for step, line in enumerate(lines):
        reference.rate = line["rate"]
        losses = reference.step(pieces(step), sum(p["labels"][:, 1:].numel() for p in pieces(step)))
        assert line["loss"] == sum(losses) / 2
        assert line["gradients"] == estimates(MEZO, losses)
        assert line["decay"] == 1 - line["rate"] * DECAY
    support.assert_equal(reference.parameters, weights_of(trainer), "weights")
    told = [logs["projected_gradient"] for logs in reporter.logs]
    assert told == [abs(line["gradients"][0]) for line in lines]
    assert not any("skipped_steps" in logs or "grad_norm" in logs for logs in reporter.logs)


def weights_of(trainer: ZOTrainer) -> dict[str, torch.Tensor]:
    return {name: p.clone() for name, p in all_weights(trainer.model).items()}


def right_ones(output: Any, batch: Any) -> torch.Tensor:
    """How likely each row's tokens are, [rows]."""
    found = output.logits[:, :-1].log_softmax(-1)
    return found.gather(-1, batch["input_ids"][:, 1:, None]).mean((-1, -2))


class Judged(InMemory):
    """Trains an objective."""

    def loss(self, piece: dict[str, Any], items: int) -> Any:
        return -right_ones(self.model(input_ids=piece["input_ids"]), piece).double().sum() / items


@pytest.mark.parametrize("bad", [math.nan, pytest.param(math.inf, marks=pytest.mark.slow)])
def test_a_step_with_one_bad_loss_is_logged_as_skipped_and_changes_nothing(
    bad: float, tmp_path: Path, stream: Stream, reporter: Reporter
) -> None:
    """One micro-batch of one variant, in the second step. The next steps' bits are those of a run that did not take it."""
    calls: list[int] = []

    def objective(output: Any, batch: Any) -> torch.Tensor:
        calls.append(len(calls))
        is_bad = calls[-1] == 4 + 2
        found = right_ones(output, batch)  # waits for the head, where others catch up
        return found * bad if is_bad else found

    trainer, plain = run(tmp_path, stream, objective=objective, lr_scheduler_type="constant")
    assert len(calls) == 5 * 4, "two variants of two micro-batches"
    reference = Judged(plain, MEZO, all_weights(plain))
    lines = log_lines(tmp_path)
    assert [line["step"] for line in lines if line.get("skipped")] == [1]
    assert not math.isfinite(lines[1]["loss"])
    assert set(lines[1]) == {"step", "loss", "skipped", "crc"}
    for step, line in enumerate(lines):
        if step == 1:
            reference.num_steps += 1
            continue
        losses = reference.step(pieces(step), 4)
        assert line["loss"] == sum(losses) / 2
        assert line["gradients"] == estimates(MEZO, losses)
    support.assert_equal(reference.parameters, weights_of(trainer), "weights")
    assert [logs.get("skipped_steps") for logs in reporter.logs] == [None, 1, 1, 1, 1]
    assert reporter.logs[1]["projected_gradient"] == 0
