"""A run that was stopped, killed or resumed ends with the bits of one that never was."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import support
import tiny_models
import tiny_runs
import torch
from test_trainer import arguments, in_memory, make_rows
from transformers import TrainerCallback

from ssdtune.data import CausalCollator
from ssdtune.durable import MARKER_NAME, remove_abandoned
from ssdtune.trainer import SSDConfig, SSDTrainer, ZOTrainer, checkpoint
from ssdtune.trainer.checkpoint import CheckpointError, fault_of, newest, read_identity, steps_of
from ssdtune.trainer.interrupt import Interruption

STEPS = 6  # of two epochs and a bit: 7 micro-batches in groups of 3, 3 and 1
LORA = {"lora_dropout": 0.1}  # so that random states matter


@pytest.fixture(autouse=True)
def _interrupts_as_in_a_terminal():
    """A process started in the background by a shell ignores SIGINT, and so do its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Recording(SSDTrainer):
    """Notes which rows were trained, by their first tokens, which are all different."""

    def __init__(self, *args, **kwargs):
        self.seen = []
        super().__init__(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen.append(inputs["input_ids"][:, :4].tolist())
        return super().training_step(model, inputs, num_items_in_batch)


class SignalAt(TrainerCallback):
    def __init__(self, step, number=signal.SIGINT):
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            signal.raise_signal(self.number)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    model = tiny_runs.llama(num_hidden_layers=2, vocab_size=tiny_models.VOCAB)
    return tiny_models.save(model, tmp_path_factory.mktemp("llama"))


def new_trainer(model, output_dir, *, rows=None, callbacks=(), **given):
    given = {
        "max_steps": STEPS,
        "gradient_accumulation_steps": 3,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 2,
        "lr_scheduler_type": "linear",
        **given,
    }
    return Recording(
        model,
        arguments(SSDConfig, output_dir, **given),
        CausalCollator(0),
        make_rows() if rows is None else rows,
        eval_dataset=make_rows(4, seed=9),
        callbacks=list(callbacks),
    )


@pytest.fixture
def make(llama, stream, tmp_path):
    """A trainer on the streamed model; every call is a new process's: model, adapter, random states."""
    num_processes = 0

    def made(output_dir="run", *, folder=llama, dtype=torch.float32, lora=LORA, **given):
        nonlocal num_processes
        num_processes += 1
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(num_processes)  # whatever a new process starts with
        model = support.with_lora(stream(folder, dtype=dtype), **lora)
        return new_trainer(model, tmp_path / output_dir, **given)

    return made


@dataclasses.dataclass
class Straight:
    history: list
    weights: dict
    seen: list


@pytest.fixture(scope="module")
def straight(llama, tmp_path_factory):
    """The run that nothing happened to."""
    model = support.with_lora(support.streamed(llama), **LORA)
    trainer = new_trainer(model, tmp_path_factory.mktemp("straight"), save_strategy="no")
    trainer.train()
    trainer.streamer.close()
    return Straight(history(trainer), support.weights(model), trainer.seen)


def history(trainer):
    keys = ("step", "loss", "grad_norm", "learning_rate", "epoch", "num_tokens")
    return [{k: r[k] for k in keys} for r in trainer.state.log_history if "grad_norm" in r]


def assert_ends_as(straight, trainer):
    assert trainer.state.global_step == STEPS
    assert history(trainer) == straight.history
    support.assert_equal(straight.weights, support.weights(trainer.model), "weights")


# ------------------------------------------------------------------ going on


def test_interrupted_twice_it_sees_the_same_rows_and_ends_with_the_same_bits(make, straight):
    first = make(callbacks=[SignalAt(1)])
    first.train()
    assert first.was_interrupted
    assert first.state.global_step == 1
    second = make(callbacks=[SignalAt(4, signal.SIGTERM)])
    second.train(resume_from_checkpoint=True)
    assert second.was_interrupted
    assert second.state.global_step == 4
    third = make()
    third.train(resume_from_checkpoint=True)
    assert not third.was_interrupted
    assert first.state.epoch < 1 < second.state.epoch < 2  # both in the middle of an epoch
    seen = [batch for trainer in (first, second, third) for batch in trainer.seen]
    assert seen == straight.seen
    assert_ends_as(straight, third)


def test_resumed_from_a_regular_checkpoint_at_an_epochs_end_it_ends_with_the_same_bits(
    make, straight
):
    trainer = make(save_steps=3)
    trainer.train()
    shutil.rmtree(Path(trainer.args.output_dir) / f"checkpoint-{STEPS}")
    resumed = make(save_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert len(resumed.seen) == 7  # the second epoch's
    assert_ends_as(straight, resumed)


def test_a_second_signal_stops_at_once():
    interruption = Interruption()
    with interruption.watched(is_enabled=True):
        signal.raise_signal(signal.SIGINT)
        assert interruption.is_requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_after_the_last_step_has_interrupted_nothing(make):
    class Ends(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

        def on_train_end(self, args, state, control, **kwargs):
            signal.raise_signal(signal.SIGINT)

    trainer = make(callbacks=[Ends()])
    trainer.train()
    assert trainer.state.global_step == 1
    assert not trainer.was_interrupted


def test_without_saving_a_signal_is_what_it_always_is(make):
    trainer = make(save_strategy="no", callbacks=[SignalAt(2)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


# ------------------------------------------------------------------ what a checkpoint is


def test_a_checkpoint_is_a_trainers_and_an_adapter_and_holds_no_code(make, llama, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trainer = make(max_steps=2)
    trainer.checkpoints.extra_files["ssdtune.yaml"] = b"lora_r: 4\n"
    trainer.train()
    folder = Path(trainer.args.output_dir) / "checkpoint-2"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "trainer_state.json"}
    assert names >= {"optimizer.pt", "scheduler.pt", "rng_state.pth", "README.md", MARKER_NAME}
    assert "training_args.bin" not in names
    assert (folder / "ssdtune.yaml").read_bytes() == b"lora_r: 4\n"
    assert json.loads((folder / "training_args.json").read_text())["max_steps"] == 2
    torch.load(folder / "optimizer.pt", weights_only=True)
    torch.load(folder / "scheduler.pt", weights_only=True)
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(llama), str(folder), is_trainable=True
    )
    support.assert_equal(support.weights(trainer.model), support.weights(loaded), "weights")


def test_the_base_is_known_by_its_fingerprint_and_another_is_refused(make, llama, tmp_path):
    make(max_steps=2).train()
    other = tmp_path / "other"
    shutil.copytree(llama, other)
    shard = sorted(other.glob("*.safetensors"))[0]
    with shard.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"\x11\x22")
    with pytest.raises(CheckpointError, match="base model's files are not those") as caught:
        make(folder=other, max_steps=4).train(resume_from_checkpoint=True)
    assert "checkpoint-2" in str(caught.value)
    assert "resume_from_checkpoint: false" in str(caught.value)


def test_another_order_of_rows_or_dtype_is_refused(make):
    make(max_steps=2).train()
    changes = [
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size was 2 and is 1"),
        ({"gradient_accumulation_steps": 6}, "gradient_accumulation_steps was 3 and is 6"),
        ({"seed": 8}, "seed was 3 and is 8"),
        ({"rows": make_rows(13, seed=1)}, "the training rows are others"),
        ({"rows": make_rows(14)}, "num_rows was 13 and is 14"),
        ({"dtype": torch.bfloat16}, "dtype was float32 and is bfloat16, float32"),  # of adapters
    ]
    for given, said in changes:
        with pytest.raises(CheckpointError, match=said):
            make(max_steps=4, **given).train(resume_from_checkpoint=True)


def test_another_adapter_or_optimizer_is_refused(make, llama, tmp_path):
    make(max_steps=2).train()
    changes = [
        ({"lora": {**LORA, "lora_alpha": 3}}, r"the adapter's lora_alpha was \d+ and is 3"),
        ({"lora": {**LORA, "use_dora": True}}, "the adapter's use_dora was False and is True"),
        ({"lora": {**LORA, "targets": ["q_proj"]}}, "the adapter's target_modules was"),
        ({"optim": "sgd"}, r"optim was \w+ and is sgd"),
    ]
    for given, said in changes:
        with pytest.raises(CheckpointError, match=said) as caught:
            make(max_steps=4, **given).train(resume_from_checkpoint=True)
        assert ";" not in str(caught.value), "nothing else"
    model = support.with_lora(support.streamed(llama), **LORA)
    args = arguments(SSDConfig, tmp_path / "run", max_steps=4, gradient_accumulation_steps=3)
    trainer = ZOTrainer(model, args, CausalCollator(0), make_rows())
    with pytest.raises(CheckpointError, match="it was trained by gradients"):
        trainer.train(resume_from_checkpoint=True)
    model.ssdtune.close()


def test_more_steps_may_be_asked_for_and_another_rate_is_not_taken_in_silence(make, capsys):
    make(max_steps=2, learning_rate=2e-3).train()
    trainer = make(max_steps=3, learning_rate=1e-3)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
    assert "note: learning_rate stays 0.002, and 0.001 is for" in capsys.readouterr().err


def test_what_no_whole_checkpoint_is_named_and_the_one_before_is_taken(make, straight, capsys):
    trainer = make()
    trainer.train()
    run = Path(trainer.args.output_dir)
    assert list(steps_of(run)) == [4, 6]
    damaged = run / "checkpoint-6"
    with (damaged / "optimizer.pt").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(CheckpointError, match=r"damaged: optimizer.pt has 100 bytes of"):
        make().train(resume_from_checkpoint=str(damaged))
    assert newest(run) == run / "checkpoint-4"
    assert "checkpoint-6 is passed over: optimizer.pt has 100 bytes" in capsys.readouterr().err
    resumed = make()
    resumed.train(resume_from_checkpoint=True)
    assert_ends_as(straight, resumed)
    assert fault_of(damaged) is None  # saved again in its place


def test_nothing_to_resume_from_is_an_error_only_if_it_was_asked_for(make, tmp_path):
    with pytest.raises(CheckpointError, match="no whole checkpoint to resume from"):
        make().train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        make().train(resume_from_checkpoint=str(tmp_path))


# ------------------------------------------------------------------ a save that dies


class Killed(BaseException):
    """Nothing that a program catches."""


WRITERS = (
    "save_model",
    "_save_optimizer_and_scheduler",
    "_save_scaler",
    "_save_rng_state",
    "identity",
)


@pytest.mark.parametrize("writer", [*WRITERS, "before the rename", "after the rename"])
def test_a_save_killed_between_files_leaves_the_old_one_or_the_new(
    writer, make, straight, monkeypatch
):
    trainer = make()

    def kills(inner, *, is_after):
        def wrapped(*args, **kwargs):
            result = inner(*args, **kwargs) if is_after or trainer.state.global_step < 4 else None
            if trainer.state.global_step == 4:
                raise Killed
            return result

        return wrapped

    if writer in WRITERS:
        monkeypatch.setattr(trainer, writer, kills(getattr(trainer, writer), is_after=True))
    else:
        is_after = writer == "after the rename"
        commit = kills(checkpoint.commit_folder, is_after=is_after)
        monkeypatch.setattr(checkpoint, "commit_folder", commit)
    with pytest.raises(Killed):
        trainer.train()
    monkeypatch.undo()
    run = Path(trainer.args.output_dir)
    expected = 4 if writer == "after the rename" else 2
    assert newest(run) == run / f"checkpoint-{expected}"
    remove_abandoned(run)
    assert {path.name for path in run.iterdir()} == {f"checkpoint-{n}" for n in steps_of(run)}
    assert all(fault_of(folder) is None for folder in steps_of(run).values())
    if writer in ("_save_rng_state", "after the rename"):
        resumed = make()
        resumed.train(resume_from_checkpoint=True)
        assert_ends_as(straight, resumed)


def test_a_save_that_fails_says_so_and_cleans_up_after_itself(make, monkeypatch):
    trainer = make()

    def full(folder):
        if trainer.state.global_step == 4:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "_save_scaler", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    run = Path(trainer.args.output_dir)
    assert [path.name for path in run.iterdir()] == ["checkpoint-2"]
    assert fault_of(run / "checkpoint-2") is None


def test_older_ones_go_only_after_the_new_one_is_there(make, monkeypatch):
    trainer = make(save_total_limit=1)
    removed = []

    def remove(folder):
        run = Path(trainer.args.output_dir)
        current = run / f"checkpoint-{trainer.state.global_step}"
        assert fault_of(current) is None
        assert folder != current
        removed.append(folder.name)
        shutil.rmtree(folder)

    monkeypatch.setattr(checkpoint, "remove_folder_we_made", remove)
    trainer.train()
    assert removed == ["checkpoint-2", "checkpoint-4"]


def test_a_checkpoint_that_somebody_put_a_file_into_is_left_alone(make, capsys):
    class AddsNotes(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 2:
                (Path(args.output_dir) / "checkpoint-2" / "notes.txt").write_text("mine")

    trainer = make(save_total_limit=1, callbacks=[AddsNotes()])
    trainer.train()
    run = Path(trainer.args.output_dir)
    assert list(steps_of(run)) == [2, 6]
    assert "notes.txt" in capsys.readouterr().err


def test_the_best_one_is_kept_and_loaded_at_the_end(make):
    best = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,  # the first is the worst loss: not the newest
        "save_total_limit": 1,
    }
    trainer = make(learning_rate=1e-3, **best)
    trainer.train()
    run = Path(trainer.args.output_dir)
    kept = Path(trainer.state.best_model_checkpoint)
    assert kept in steps_of(run).values()
    losses = {r["step"]: r["eval_loss"] for r in trainer.state.log_history if "eval_loss" in r}
    assert kept.name == f"checkpoint-{max(losses, key=losses.get)}"
    assert trainer.evaluate()["eval_loss"] == max(losses.values())


def test_an_interrupted_run_keeps_its_newest_checkpoint_beside_the_best(make):
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = make(save_total_limit=1, callbacks=[SignalAt(5)], **best)
    trainer.train()
    assert trainer.was_interrupted
    run = Path(trainer.args.output_dir)
    assert newest(run) == run / "checkpoint-5"
    assert Path(trainer.state.best_model_checkpoint) in steps_of(run).values()


def test_a_model_in_memory_is_saved_and_resumed_the_same_way(llama, tmp_path):
    def made(output_dir, **given):
        given = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **given}
        args = arguments(SSDConfig, tmp_path / output_dir, **given)
        return SSDTrainer(in_memory(llama, **LORA), args, CausalCollator(0), make_rows())

    straight = made("straight", save_strategy="no")
    straight.train()
    made("run", max_steps=4).train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    resumed = made("run")
    resumed.train(resume_from_checkpoint=True)
    assert read_identity(tmp_path / "run" / "checkpoint-2")["base"] is None
    support.assert_equal(support.weights(straight.model), support.weights(resumed.model), "weights")


# ------------------------------------------------------------------ a real kill

KILLED = """
    import os, signal, sys
    import support, test_resume as t
    from pathlib import Path

    folder, out, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    trainer = t.new_trainer(support.with_lora(support.streamed(folder), **t.LORA), out, max_steps=4)
    opened = 0

    def count(event, args):  # the n-th file opened for writing in the second save
        global opened
        if event == "open" and isinstance(args[0], str) and trainer.state.global_step == 4:
            if args[2] & (os.O_WRONLY | os.O_RDWR) and ".ssdtune-" in args[0]:
                opened += 1
                if opened == limit:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    trainer.train()
    trainer.streamer.close()
    os._exit(7)
"""


@pytest.mark.slow
def test_killed_at_the_nth_file_of_a_save_the_old_one_is_whole_until_the_new_one_is(
    llama, tmp_path
):
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here}:{here.parent}", "OMP_NUM_THREADS": "1"}
    found = []
    for limit in (1, 6, 100):
        run = tmp_path / f"run-{limit}"
        command = [sys.executable, str(script), str(llama), str(run), str(limit)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode in (-signal.SIGKILL, 7), done.stderr[-2000:]
        last = newest(run)
        assert last is not None
        found.append((done.returncode, last.name))
    assert (-signal.SIGKILL, "checkpoint-2") in found
    assert found[-1] == (7, "checkpoint-4")
    assert (7, "checkpoint-2") not in found
