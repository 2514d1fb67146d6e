"""A trainer, or a model, that is used once more in the same process: a run that goes on, or a refusal by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import support
import tiny_runs
import torch
from transformers import TrainerCallback

from ssdtune.run_files import LOG_NAME
from ssdtune.trainer import TrainerError
from ssdtune.trainer.zeroth_order import ZOTrainer
from ssdtune.zeroth_order import LOZO, MeZO, Rule
from ssdtune.zeroth_order.log import read_log
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


def opened(model: Path, trains: str) -> Any:
    streamed = support.streamed(model)
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


def interrupted(model: Path, folder: Path, trains: str, *, twice: bool) -> tuple[Any, ZOTrainer]:
    """A model and its trainer after a run that ended in the midst."""
    streamed, ending = opened(model, trains), EndAfter(twice=twice)
    ending.trainer = trainer = trainer_of(streamed, folder, trains, ending)
    if twice:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    else:
        trainer.train()
    assert trainer.method.num_steps == 3
    return streamed, trainer


Ended = tuple[bytes, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ended]:
    """What trains -> the log and the weights of a run in one go."""
    made: dict[str, Ended] = {}

    def found(trains: str) -> Ended:
        if trains not in made:
            streamed, folder = opened(model, trains), tmp_path_factory.mktemp("whole")
            trainer_of(streamed, folder, trains).train()
            made[trains] = (folder / LOG_NAME).read_bytes(), weights_of(streamed)
        return made[trains]

    return found


@pytest.mark.parametrize(
    ("trains", "told"),
    [
        ("all", "open the model anew"),
        pytest.param("low_rank", "open the model anew", marks=pytest.mark.slow),
        ("adapters", "another ZOTrainer, which begins"),
    ],
)
def test_a_run_that_was_saved_goes_on_with_the_trainer_at_hand_once(
    trains: str, told: str, model: Path, tmp_path: Path, whole: Callable[[str], Ended]
) -> None:
    """Its weights are those of the checkpoint: there is nothing to replay. A run after it would stand in no log."""
    streamed, trainer = interrupted(model, tmp_path, trains, twice=False)
    trainer.train(resume_from_checkpoint=True)
    log, weights = whole(trains)
    assert (tmp_path / LOG_NAME).read_bytes() == log
    support.assert_equal(weights, weights_of(streamed), "weights")
    with pytest.raises(TrainerError, match=rf"(?s)a run of 4 steps.*{told}"):
        trainer.train()
    assert (tmp_path / LOG_NAME).read_bytes() == log


def test_an_adapter_goes_back_to_its_checkpoint(
    model: Path, tmp_path: Path, whole: Callable[[str], Ended]
) -> None:
    """With the moments that it had there: no step counts twice."""
    streamed, trainer = interrupted(model, tmp_path, "adapters", twice=True)
    trainer.train(resume_from_checkpoint=True)
    log, weights = whole("adapters")
    assert (tmp_path / LOG_NAME).read_bytes() == log
    support.assert_equal(weights, weights_of(streamed), "weights")


@pytest.mark.parametrize("trains", ["all", pytest.param("low_rank", marks=pytest.mark.slow)])
def test_all_weights_do_not_go_back(trains: str, model: Path, tmp_path: Path) -> None:
    _, trainer = interrupted(model, tmp_path, trains, twice=True)
    with pytest.raises(MovedError, match=r"(?s)taken 3 steps.*Open the model anew"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("trains", ["all", pytest.param("low_rank", marks=pytest.mark.slow)])
def test_a_model_whose_weights_have_moved_is_none_to_begin_with(
    trains: str, model: Path, tmp_path: Path
) -> None:
    """Another trainer, of all weights or of an adapter, and another log's steps: nothing of it is touched."""
    streamed = opened(model, trains)
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
    with pytest.raises(MovedError, match="Open the model anew"):
        trainer_of(support.with_lora(streamed), tmp_path / "another", "adapters")
    anew = opened(model, trains)
    replayed(anew, log)
    support.assert_equal(before, weights_of(anew), "weights")
    with pytest.raises(MovedError, match="Open the model anew"):
        trainer_of(anew, tmp_path / "another", trains)
