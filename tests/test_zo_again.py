"""A trainer, or a model, that is used once more in the same process: a run that goes on, or a refusal by name."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import support
import tiny_runs
import torch
from test_zeroth_order import Stream
from transformers import TrainerCallback

from ssdtune.run_files import LOG_NAME
from ssdtune.trainer import SSDTrainer, TrainerError
from ssdtune.trainer.checkpoint import CheckpointError
from ssdtune.trainer.zeroth_order import ZOTrainer
from ssdtune.visit.base import base_of
from ssdtune.zeroth_order import LOZO, EstimatorError, MeZO, Rule
from ssdtune.zeroth_order.log import LogError, read_log
from ssdtune.zeroth_order.method import replayed
from ssdtune.zeroth_order.weights import MovedError

MOMENTUM = Rule(kind="momentum", beta1=0.9, horizon=4)
KINDS = {
    "all": {"estimator": MeZO(eps=1e-2), "rule": MOMENTUM},
    "low_rank": {"estimator": LOZO(eps=1e-2, window=2), "low_rank": True},
    "adapters": {"estimator": MeZO(eps=1e-2), "rule": MOMENTUM},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.save(tiny_runs.llama(), tmp_path_factory.mktemp("model"))


def opened(stream: Stream, model: Path, trains: str) -> Any:
    streamed = stream(model)
    return support.with_lora(streamed) if trains == "adapters" else streamed


def trainer_of(streamed: Any, folder: Path, trains: str, *callbacks: TrainerCallback) -> ZOTrainer:
    """Four steps of two rows, a checkpoint after every other one."""
    arguments = tiny_runs.arguments(
        folder,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
    )
    return ZOTrainer(
        streamed,
        arguments,
        lambda rows: {name: torch.tensor([row[name] for row in rows]) for name in rows[0]},
        train_dataset=[{key: [5, 6, 7, k] for key in ("input_ids", "labels")} for k in range(8)],
        callbacks=list(callbacks),
        **KINDS[trains],
    )


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class EndAfter(TrainerCallback):
    """Ctrl-C amid the third step, one past a checkpoint, and if `twice` once more at its end; in the first run alone."""

    def __init__(self, *, twice: bool) -> None:
        self.trainer: Any = None
        self.twice, self.is_over = twice, False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 and not self.is_over:
            self.trainer.interruption.is_requested = True
            self.is_over = not self.twice

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3 and not self.is_over:
            self.is_over = True
            raise KeyboardInterrupt


def interrupted(streamed: Any, folder: Path, trains: str, *, twice: bool) -> ZOTrainer:
    """The model's trainer after a run that ended in the midst."""
    ending = EndAfter(twice=twice)
    ending.trainer = trainer = trainer_of(streamed, folder, trains, ending)
    if twice:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    else:
        trainer.train()
    assert trainer.method.num_steps == 3
    return trainer


Ended = tuple[Path, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ended]:
    """What trains -> the folder and the weights of a run in one go."""
    made: dict[str, Ended] = {}

    def found(trains: str) -> Ended:
        if trains not in made:
            folder = tmp_path_factory.mktemp("whole")
            streamed = opened(support.streamed, model, trains)
            trainer_of(streamed, folder, trains).train()
            made[trains] = folder, weights_of(streamed)
            base_of(streamed).ssdtune.close()
        return made[trains]

    return found


@pytest.mark.parametrize(
    ("trains", "told"),
    [
        ("all", "open the model anew"),
        pytest.param("low_rank", "open the model anew", marks=pytest.mark.slow),
        pytest.param("adapters", "another ZOTrainer, which begins", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_saved_goes_on_with_the_trainer_at_hand_once(
    trains: str,
    told: str,
    model: Path,
    tmp_path: Path,
    stream: Stream,
    whole: Callable[[str], Ended],
) -> None:
    """Its weights are those of the checkpoint: there is nothing to replay. A run after it would stand in no log."""
    streamed = opened(stream, model, trains)
    trainer = interrupted(streamed, tmp_path, trains, twice=False)
    trainer.train(resume_from_checkpoint=True)
    folder, weights = whole(trains)
    log = (folder / LOG_NAME).read_bytes()
    assert (tmp_path / LOG_NAME).read_bytes() == log
    support.assert_equal(weights, weights_of(streamed), "weights")
    with pytest.raises(TrainerError, match=rf"(?s)a run of 4 steps.*{told}"):
        trainer.train()
    assert (tmp_path / LOG_NAME).read_bytes() == log


def test_an_adapter_goes_back_to_its_checkpoint(
    model: Path, tmp_path: Path, stream: Stream, whole: Callable[[str], Ended]
) -> None:
    """With the moments that it had there: no step counts twice."""
    streamed = opened(stream, model, "adapters")
    trainer = interrupted(streamed, tmp_path, "adapters", twice=True)
    trainer.train(resume_from_checkpoint=True)
    folder, weights = whole("adapters")
    assert (tmp_path / LOG_NAME).read_bytes() == (folder / LOG_NAME).read_bytes()
    support.assert_equal(weights, weights_of(streamed), "weights")
    with pytest.raises(TrainerError, match="another ZOTrainer, which begins with the adapter"):
        trainer.train()


@pytest.mark.parametrize("trains", ["all", pytest.param("low_rank", marks=pytest.mark.slow)])
def test_all_weights_do_not_go_back(
    trains: str, model: Path, tmp_path: Path, stream: Stream
) -> None:
    trainer = interrupted(opened(stream, model, trains), tmp_path, trains, twice=True)
    with pytest.raises(MovedError, match=r"(?s)taken 3 steps.*Open the model anew"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("trains", ["all", pytest.param("low_rank", marks=pytest.mark.slow)])
def test_a_model_whose_weights_have_moved_is_none_to_begin_with(
    trains: str, model: Path, tmp_path: Path, stream: Stream
) -> None:
    """Another trainer, of all weights or of an adapter, and another log's steps: nothing of it is touched."""
    streamed = opened(stream, model, trains)
    another = trainer_of(streamed, tmp_path / "another", trains)  # as long as nothing has moved
    trainer = trainer_of(streamed, tmp_path / "run", trains)
    trainer.args.max_steps = 1
    trainer.train()
    log = read_log((tmp_path / "run" / LOG_NAME).read_bytes(), "log")
    before = weights_of(streamed)
    with pytest.raises(MovedError, match="another method"):
        another.train()
    with pytest.raises(MovedError, match="Open the model anew"):
        trainer_of(streamed, tmp_path / "another", trains)
    with pytest.raises(MovedError, match="Open the model anew"):
        replayed(streamed, log)
    support.assert_equal(before, weights_of(streamed), "weights")
    adapted = support.with_lora(streamed)
    with pytest.raises(MovedError, match="Open the model anew"):
        trainer_of(adapted, tmp_path / "another", "adapters")
    with pytest.raises(MovedError, match="Open the model anew"):
        SSDTrainer(adapted, tiny_runs.arguments(tmp_path / "another"))
    anew = opened(stream, model, trains)
    replayed(anew, log)
    support.assert_equal(before, weights_of(anew), "weights")
    with pytest.raises(MovedError, match="Open the model anew"):
        trainer_of(anew, tmp_path / "another", trains)


def test_a_log_of_other_weights_is_refused(
    model: Path, tmp_path: Path, stream: Stream, whole: Callable[[str], Ended]
) -> None:
    """Other files, the same codes in other bits, an adapter that begins elsewhere: each would come to other weights."""
    other = stream(tiny_runs.save(tiny_runs.llama(2), tmp_path / "other"))
    logs = {t: read_log((whole(t)[0] / LOG_NAME).read_bytes(), "log") for t in ("all", "adapters")}
    with pytest.raises(LogError, match=r"over other weights than those .*: other files"):
        replayed(other, logs["all"])
    for num_steps in (-1, 5):
        with pytest.raises(LogError, match="has 4 steps, and num_steps is"):
            replayed(stream(model), logs["all"], num_steps=num_steps)
    in_bits = dataclasses.replace(logs["all"].header, reading="4")
    with pytest.raises(LogError, match="codes were read in 4 bits and are as stored"):
        replayed(stream(model), dataclasses.replace(logs["all"], header=in_bits))
    with pytest.raises(LogError, match="other files"):
        replayed(support.with_lora(other), logs["adapters"])
    adapted = support.with_lora(stream(model))
    replayed(adapted, logs["adapters"])
    support.assert_equal(whole("adapters")[1], weights_of(adapted), "weights")
    with pytest.raises(LogError, match="has not the values that the log's run began with"):
        replayed(adapted, logs["adapters"])


def test_gradients_do_not_go_on_where_losses_have_stopped(
    model: Path, stream: Stream, whole: Callable[[str], Ended]
) -> None:
    """The adapter is there, what an optimizer would go on with is not."""
    folder, _ = whole("adapters")
    adapted = support.with_lora(stream(model))
    trainer = SSDTrainer(
        adapted,
        tiny_runs.arguments(
            folder, per_device_train_batch_size=2, gradient_accumulation_steps=1, max_steps=6
        ),
        train_dataset=[{key: [5, 6, 7, k] for key in ("input_ids", "labels")} for k in range(8)],
    )
    with pytest.raises(CheckpointError, match="it was trained with method: zo"):
        trainer.train(resume_from_checkpoint=True)


def test_an_adapter_that_does_not_train_is_no_reason_to_train_all_weights(
    model: Path, tmp_path: Path, stream: Stream, whole: Callable[[str], Ended]
) -> None:
    """As peft loads one: its own numbers would move too, and all names would be others."""
    streamed = stream(model)
    adapted = support.with_lora(streamed).requires_grad_(False)
    before = weights_of(adapted)
    with pytest.raises(EstimatorError, match=r"does not train.*\n.*is_trainable=True"):
        trainer_of(adapted, tmp_path, "all")
    with pytest.raises(LogError, match="of all weights, and the model has an adapter"):
        replayed(adapted, read_log((whole("all")[0] / LOG_NAME).read_bytes(), "log"))
    assert streamed.ssdtune.method is None
    support.assert_equal(before, weights_of(adapted), "weights")


def test_a_log_of_another_dtype_is_refused(
    model: Path, tmp_path: Path, stream: Stream, whole: Callable[[str], Ended]
) -> None:
    """Its steps, rounded otherwise, would come to other weights."""
    folder, _ = whole("all")
    half = stream(model, dtype=torch.bfloat16)
    with pytest.raises(LogError, match="rounded to float32, and the model's weights are bfloat16"):
        replayed(half, read_log((folder / LOG_NAME).read_bytes(), "log"))
    with pytest.raises(CheckpointError, match="dtype was float32 and is bfloat16"):
        trainer_of(half, tmp_path, "all").train(resume_from_checkpoint=str(folder / "checkpoint-2"))
