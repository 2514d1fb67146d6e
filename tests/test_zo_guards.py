"""Steps that say nothing, or too much, or that no log has: equal losses, sums that are no mean yet, steps beyond float32,
a drive that is full."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import support
import tiny_runs
import torch
from test_full_disk import no_file_longer_than
from test_zeroth_order import SEED, Stream, all_weights, batches

from ssdtune.run_files import LOG_NAME
from ssdtune.trainer import TrainerError
from ssdtune.trainer.zeroth_order import ZOTrainer
from ssdtune.zeroth_order import FZOO, LOZO, EstimatorError, MeZO, Rule, ZerothOrder
from ssdtune.zeroth_order.log import LogError, read_log
from ssdtune.zeroth_order.rules import LARGEST, Update


@pytest.mark.parametrize("loss", [0.6, 600.0, 1e-30])
def test_what_rounding_leaves_of_equal_losses_is_no_spread(loss: float) -> None:
    fzoo = FZOO(num_directions=2)
    assert fzoo.gradients([1.0, -loss, -math.nextafter(loss, 0)]) == [0.0, 0.0]
    assert all(fzoo.gradients([1.0, loss, loss * (1 + 2.0**-24)])), "float32 tells them apart"


def test_equal_accuracies_are_equal_however_micro_batches_share_them(
    tmp_path: Path, stream: Stream
) -> None:
    """Of 5 rows each: 1 + 5 right are as many as 2 + 4, though a tenth of each does not add up to the same."""
    right = [(3, 4), (1, 5), (2, 4)]  # of each variant, in each micro-batch
    assert math.fsum(k * 0.1 for k in right[1]) != math.fsum(k * 0.1 for k in right[2])
    model = stream(tiny_runs.save(tiny_runs.llama(), tmp_path / "model"), micro_batch_size=5)
    before = {name: p.clone() for name, p in all_weights(model).items()}

    def is_right(output: Any, batch: Any) -> torch.Tensor:
        num = right[model.ssdtune._variant][int(batch["input_ids"][0, 0]) - 5]
        return torch.arange(5) < num

    trainer = ZOTrainer(
        model,
        tiny_runs.arguments(tmp_path / "run", per_device_train_batch_size=5, max_steps=1),
        lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])},
        train_dataset=[{"input_ids": [5 + k // 5, 6, 7]} for k in range(10)],
        estimator=FZOO(num_directions=2),
        objective=is_right,
    )
    tiny_runs.in_order(trainer).train()
    step = trainer.last_step
    assert step is not None
    assert step.losses == (-0.7, -0.6, -0.6)
    assert step.gradients == (0.0, 0.0)
    support.assert_equal(before, {n: p.clone() for n, p in all_weights(model).items()}, "weights")


@pytest.mark.parametrize(
    "values", [torch.tensor(0.5), torch.rand(2, 1), torch.rand(3)], ids=["mean", "matrix", "more"]
)
def test_an_objective_gives_a_value_for_each_row(
    values: torch.Tensor, tmp_path: Path, stream: Stream
) -> None:
    """A mean would count once where its rows do."""
    model = stream(tiny_runs.save(tiny_runs.llama(), tmp_path / "model"))
    trainer = ZOTrainer(
        model,
        tiny_runs.arguments(tmp_path / "run", per_device_train_batch_size=2, max_steps=1),
        lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])},
        train_dataset=[{"input_ids": [5, 6, 7]}] * 4,
        objective=lambda output, batch: values,
    )
    with pytest.raises(TrainerError, match=r"micro-batch of 2 rows.*\n.*one of each row, \[2\]"):
        trainer.train()


def test_what_no_checkpoint_would_hold_is_refused(tmp_path: Path, stream: Stream) -> None:
    """Weights that train and are no adapter's; without checkpoints they do."""
    model = stream(tiny_runs.save(tiny_runs.llama(), tmp_path / "model"), micro_batch_size=None)
    model.model.norm.weight.requires_grad_(True)
    before = model.model.norm.weight.detach().clone()
    rows = [{key: [5, 6, 7] for key in ("input_ids", "labels")}] * 8
    arguments = tiny_runs.arguments(tmp_path / "run", max_steps=1)
    arguments.save_strategy = "steps"
    with pytest.raises(TrainerError, match=r"norm.weight trains outside of an adapter"):
        ZOTrainer(model, arguments)
    arguments.save_strategy = "no"
    collate = lambda rows: {n: torch.tensor([row[n] for row in rows]) for n in rows[0]}  # noqa: E731
    ZOTrainer(model, arguments, collate, train_dataset=rows).train()
    assert not torch.equal(model.model.norm.weight, before)


def step_of(method: ZerothOrder, losses: Sequence[float], **how: Any) -> Any:
    """A step whose variants have these losses."""
    batch = batches("llama", 1)[0]

    def call() -> float:
        method.model(**batch)
        return losses[method.streamer._variant or 0]

    return method.step([call], **{"learning_rate": 1e-2, **how})


def test_a_mean_is_over_the_rows_of_all_processes(tmp_path: Path, stream: Stream) -> None:
    """Which need not have as many."""
    model = stream(tiny_runs.save(tiny_runs.llama(), tmp_path))
    other = [1.0, 5.0, 4]  # shares of both variants, rows
    method = ZerothOrder(model, MeZO(), exchange=lambda shares: [shares, other])
    assert step_of(method, [2.0, 3.0], num_rows=6).losses == (0.3, 0.8)


@pytest.mark.parametrize("rule", ["sgd", "sign", "adam"])
def test_a_step_beyond_float32_is_skipped(rule: str, tmp_path: Path, stream: Stream) -> None:
    """The next ones are taken from the weights as they were."""
    model = stream(tiny_runs.save(tiny_runs.llama(), tmp_path))
    before = {name: p.clone() for name, p in all_weights(model).items()}
    method = ZerothOrder(model, MeZO(eps=1e-3), rule=Rule(kind=rule), seed=SEED)
    step = step_of(method, [1e38, 0.0])
    assert step.update is None
    assert step.losses == (1e38, 0.0)
    support.assert_equal(before, {n: p.clone() for n, p in all_weights(model).items()}, "weights")
    assert step_of(method, [1.5, 1.0]).update is not None
    method.clip = 1.0
    assert step_of(method, [1e38, 0.0]).update == Update(2, (1.0,), 1e-2)
    for name, p in all_weights(model).items():
        assert p.clone().isfinite().all(), name
        assert not torch.equal(p.clone(), before[name]), name


def test_weights_that_hold_more_than_float32_are_refused(tmp_path: Path, stream: Stream) -> None:
    """A step of rate 0 would cut them."""
    model = stream(tiny_runs.save(tiny_runs.llama(dtype=torch.float64), tmp_path))
    with pytest.raises(EstimatorError, match="cut weights of float64"):
        ZerothOrder(model, MeZO())
    assert model.ssdtune.method is None, "the model is as it was"


@pytest.mark.parametrize("rule", ["sgd", "sign"])
def test_a_step_beyond_float16_is_skipped(rule: str, tmp_path: Path, stream: Stream) -> None:
    """Whose largest number is 65504: weights of it would be infinite, and all later steps skipped."""
    folder = tiny_runs.save(tiny_runs.llama(dtype=torch.float16), tmp_path)
    method = ZerothOrder(stream(folder), MeZO(eps=1e-3), rule=Rule(kind=rule), seed=SEED)
    assert step_of(method, [0.0, 1.0], learning_rate=1e5).update is None
    assert step_of(method, [1.0, 1.0 - 1e-3], learning_rate=1e-2).update is not None
    assert all(p.clone().isfinite().all() for p in all_weights(method.model).values())


def test_what_float32_holds_of_a_step_hangs_on_its_directions_and_its_rule() -> None:
    """The tables that a step is made from are finite, products of low rank and squares too."""
    whole, signs, low = MeZO().family, FZOO().family, LOZO(rank=4).family
    assert 1.0 == signs.reach < whole.reach < low.reach == pytest.approx(4 * whole.reach**2)
    for family in (whole, signs, low):
        edge = LARGEST / family.reach
        for rule, g in (
            (Rule(), edge / 0.5),
            (Rule(kind="momentum", beta1=0.5, horizon=2), edge / 0.5),
            (Rule(kind="sign"), edge),
            (Rule(kind="adam"), math.sqrt(LARGEST) / family.reach),
        ):
            assert rule.fits(Update(0, (g * 0.999,), 0.5), family.reach), rule
            assert not rule.fits(Update(0, (g * 1.001,), 0.5), family.reach), rule
            assert not rule.fits(Update(0, (math.inf,), 0.5), family.reach), rule
    momentum, past = Rule(kind="momentum", beta1=0.5, horizon=2), Update(0, (LARGEST,), 1.0)
    assert not momentum.fits(Update(1, (LARGEST / 2,), 1.0, earlier=(past,) * 2), 1.0)


@pytest.mark.parametrize("number", [0, 1])
def test_a_step_that_the_drive_takes_no_line_of_is_the_last(
    number: int, tmp_path: Path, stream: Stream
) -> None:
    """What is there of its line goes; nothing moves after it, and the log stays one that can be read."""
    limit = ExitStack()

    def fill(output: Any, batch: Any) -> torch.Tensor:
        if trainer.method.num_steps == number:
            there = len(log.read_bytes()) if number else 0
            limit.enter_context(no_file_longer_than(there + 20))
        return torch.rand(2)

    log = tmp_path / "run" / LOG_NAME
    trainer = ZOTrainer(
        stream(tiny_runs.save(tiny_runs.llama(), tmp_path / "model")),
        tiny_runs.arguments(
            tmp_path / "run", per_device_train_batch_size=2, gradient_accumulation_steps=1
        ),
        lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])},
        train_dataset=[{"input_ids": [5, 6, 7]}] * 6,
        objective=fill,
    )
    said = rf"(?s)step {number} could not be written: .*EFBIG.*anew"
    with limit, pytest.raises(LogError, match=said):
        trainer.train()
    read = read_log(trainer.log_writer.content(), "log")
    assert (read.num_steps, read.is_cut, log.is_file()) == (number, False, number > 0)
    assert trainer.method.num_steps == number + 1
    model: Any = trainer.model
    before = {name: p.clone() for name, p in all_weights(model).items()}
    with pytest.raises(LogError, match="lacks a step"):
        trainer._step(model, None)
    with pytest.raises(LogError, match="lacks a step"):
        trainer.log_writer.append(2, 1.0, None)
    after = {name: p.clone() for name, p in all_weights(model).items()}
    support.assert_equal(before, after, "weights")
    assert read_log(trainer.log_writer.content(), "log") == read
