"""What several processes of a run must do alike, and what one of them alone; this one plays each."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import support
import tiny_runs
import torch

from ssdtune import Offload, memory
from ssdtune.api import options_for
from ssdtune.peft import fingerprint_of
from ssdtune.trainer import SSDConfig, SSDTrainer, TrainerError, ZOTrainer, checkpoint, processes
from ssdtune.trainer.interrupt import Interruption
from ssdtune.trainer.settling import _with_drive
from ssdtune.trainer.together import ProcessError, together

Stream = Callable[..., Any]
ROWS: Any = [{name: [5, 6, 7, k] for name in ("input_ids", "labels")} for k in range(4)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.save(tiny_runs.llama(), tmp_path_factory.mktemp("llama"))


def collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def zo_trainer(model: Any, folder: Path, **given: Any) -> ZOTrainer:
    args = tiny_runs.arguments(folder, per_device_train_batch_size=2, **given)
    return ZOTrainer(model, args, collate, train_dataset=ROWS)


# ------------------------------------------------------------------ zeroth order


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """This process is the second of two; what it hands to the others is noted, and the first hands it 0.25 as every value
    and what is in the list's last place."""
    heard: list[Any] = []

    def broadcast(tensors: Sequence[torch.Tensor], from_process: int) -> None:
        for tensor in tensors:
            tensor.fill_(0.25)

    monkeypatch.setattr(SSDConfig, "world_size", 2)
    monkeypatch.setattr(processes, "broadcast", broadcast)
    monkeypatch.setattr(
        processes, "gather_object", lambda told: [heard[-1] if heard else told[0], *told]
    )
    return heard


def test_every_process_begins_with_the_first_ones_adapter(
    second: list[Any], llama: Path, stream: Stream, tmp_path: Path
) -> None:
    """A random state of its own gives each another, whose steps would be none of the one that is saved."""
    model = support.with_lora(stream(llama))
    trainer = zo_trainer(model, tmp_path)
    values = dict(support.trained(model))
    assert all((value == 0.25).all() for value in values.values())
    assert trainer.log_writer.header.adapter == fingerprint_of(values)


def test_processes_that_would_take_other_steps_are_refused(
    second: list[Any], llama: Path, stream: Stream, tmp_path: Path
) -> None:
    model = stream(llama)
    second.append(zo_trainer(model, tmp_path, seed=7).log_writer.header)
    with pytest.raises(TrainerError, match="same steps: seed: 7 in process 0, 8 in process 1"):
        zo_trainer(model, tmp_path, seed=8)


# ------------------------------------------------------------------ stopping


def test_a_signal_that_comes_while_processes_ask_one_another_is_heard_at_the_next_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The others have left for the next step by then, and this one must, too."""
    interruption = Interruption()
    args: Any = SimpleNamespace(world_size=2, device="cpu")
    state: Any = SimpleNamespace(global_step=1, max_steps=9)

    def all_reduce(flag: torch.Tensor, op: Any) -> None:
        interruption.is_requested = True  # as a handler does, after the flag was made

    def stops_after_step() -> bool:
        control: Any = SimpleNamespace(should_save=False, should_training_stop=False)
        interruption.callback.on_step_end(args, state, control)
        assert control.should_save == control.should_training_stop == interruption.has_stopped
        return interruption.has_stopped

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    assert [stops_after_step(), stops_after_step()] == [False, True]


# ------------------------------------------------------------------ memory


def test_processes_on_one_machine_share_what_is_free(
    llama: Path, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has said how much each may take: all of them together take what one would."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(memory, "free_ram", lambda: 8000)
    usage = shutil.disk_usage(llama)._replace(free=8000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    files = list(llama.glob("*.safetensors"))
    assert options_for(Offload(), files).budgets.ram_bytes == 1000
    request = _with_drive(stream(llama).ssdtune.replanner.request, llama)
    assert request.budgets.nvme_activation_bytes == 1000


def test_a_model_on_another_processs_device_is_refused(
    llama: Path, stream: Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened before anything has picked one, all processes' models are on the first."""
    model = stream(llama)
    monkeypatch.setattr(model.ssdtune.engine.slots, "device", torch.device("cuda", 0))
    monkeypatch.setattr(SSDConfig, "device", torch.device("cuda", 1))
    with pytest.raises(TrainerError, match=r"streamed to cuda:0, and .* trains on cuda:1"):
        zo_trainer(model, tmp_path)


# ------------------------------------------------------------------ together


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """This process is the first of two: what it tells the other, whose part fails at its second act."""
    heard: list[Any] = []

    def gather(mine: list[Any]) -> list[Any]:
        heard.extend(mine)
        return [*mine, [None, "OSError: no room" if len(heard) == 2 else None]]

    monkeypatch.setattr("accelerate.utils.gather_object", gather)
    monkeypatch.setattr(checkpoint, "together", lambda act, what, num: together(act, what, 2))
    return heard


def test_a_checkpoint_that_another_process_could_not_fill_is_none(
    told: list[Any], llama: Path, stream: Stream, tmp_path: Path
) -> None:
    model, run = support.with_lora(stream(llama)), tmp_path / "run"
    args = tiny_runs.arguments(run, save_strategy="steps", per_device_train_batch_size=2)
    trainer = SSDTrainer(model, args, collate, ROWS)
    with pytest.raises(ProcessError, match=r"process 1 could not save .*checkpoint-2: OSError: no"):
        trainer.train()
    assert list(run.iterdir()) == []


def test_what_fails_in_this_process_is_told_to_the_others(told: list[Any]) -> None:
    def fails() -> None:
        raise OSError("no room here")

    assert together(lambda: 5, "count", 2) == 5
    with pytest.raises(OSError, match="no room here"):
        together(fails, "save", 2)
    assert told == [[5, None], [None, "OSError: no room here"]]
