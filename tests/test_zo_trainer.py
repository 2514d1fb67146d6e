"""Zeroth-order runs from a YAML file: learned, logged, resumed to the same bits, replayed."""

import dataclasses
import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import support
import tiny_runs
import torch
from safetensors.torch import load_file
from tiny_runs import make_tokenizer
from transformers import AutoModelForCausalLM, TrainerCallback

from ssdtune.cli import main
from ssdtune.config import load_config
from ssdtune.durable import MARKER_NAME, commit_folder, new_temporary_folder
from ssdtune.generate import GenerateError, find_adapter, generate_from_run
from ssdtune.run_files import LOG_NAME
from ssdtune.strict_yaml import ConfigError
from ssdtune.trainer import TrainerError, train_from_config
from ssdtune.trainer import run as run_module
from ssdtune.trainer.zeroth_order import ZOTrainer
from ssdtune.zeroth_order import FZOO, Fold
from ssdtune.zeroth_order.log import Header, LogError, LogWriter, read_log
from ssdtune.zeroth_order.method import replayed
from ssdtune.zeroth_order.rules import Update

YAML = """
model_name_or_path: {model}
dataset: {data}
eval_dataset: [{{path: {data}, split: "train[:4]"}}]
output_dir: {output}
method: zo
zo_trains: {trains}
zo_eps: 1.0e-2
lora_r: 4
max_length: 24
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
max_steps: 6
learning_rate: 1.0e-3
eval_strategy: steps
eval_steps: 3
save_steps: 2
offload: {{ram: 2500KB}}
"""
SIZES = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.save(tiny_runs.llama(**SIZES), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    return tiny_runs.write_rows(path, tiny_runs.texts(16))


@pytest.fixture
def load(model: Path, data: Path, tmp_path: Path) -> Any:
    def loaded(output: str, trains: str, *flags: str) -> Any:
        path = tmp_path / f"{output}.yaml"
        path.write_text(
            YAML.format(model=model, data=data, output=tmp_path / output, trains=trains)
        )
        return load_config(path, flags)

    return loaded


class StopAt(TrainerCallback):
    """Ctrl-C after so many steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


# Steps that hang on earlier ones: what a run that goes on must have again.
ADAM = ("--zo_update", "adam", "--zo_horizon", "3", "--zo_mask", "magnitude")
MOMENTUM = ("--zo_update", "momentum", "--zo_horizon", "4", "--zo_mask", "random")
# A window that ends in the midst of the run, after the crash, and the next.
LOW_RANK = ("--zo_estimator", "lozo", "--zo_window", "4", "--zo_fold_steps", "4", "--zo_update", "lozo_m")  # fmt: skip
SHORT = ("--max_steps", "2", "--eval_strategy", "no")
FLAGS = {"all": ADAM, "adapters": MOMENTUM, "low_rank": LOW_RANK}


def interrupted(
    load: Any, monkeypatch: pytest.MonkeyPatch, trains: str, flags: Sequence[str]
) -> None:
    """A run that is killed after its third step, one past its checkpoint."""
    made = run_module._make_trainer

    def with_stop(*args: Any) -> Any:
        trainer, telemetry = made(*args)
        trainer.add_callback(StopAt(3))
        return trainer, telemetry

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "_make_trainer", with_stop)
        with pytest.raises(KeyboardInterrupt):
            train_from_config(load("stopped", trains, *flags))


@pytest.mark.parametrize(
    "trains", ["all", "low_rank", pytest.param("adapters", marks=pytest.mark.slow)]
)
def test_a_run_that_was_killed_goes_on_to_the_same_bits(
    trains: str, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_from_config(load("whole", trains, *FLAGS[trains]))
    interrupted(load, monkeypatch, trains, FLAGS[trains])
    assert (tmp_path / "stopped" / "checkpoint-2").is_dir()
    resumed = train_from_config(load("stopped", trains, *FLAGS[trains]))
    logs = [(tmp_path / run / LOG_NAME).read_bytes() for run in ("whole", "stopped")]
    assert logs[0] == logs[1]
    assert len(logs[0].splitlines()) == 1 + 6
    assert resumed.metrics["eval_loss"] == whole.metrics["eval_loss"]
    if trains == "adapters":
        one, two = (
            load_file(tmp_path / run / "adapter_model.safetensors") for run in ("whole", "stopped")
        )
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("trains", ["all", pytest.param("low_rank", marks=pytest.mark.slow)])
def test_all_weights_are_replayed_from_the_log(
    trains: str, load: Any, model: Path, tmp_path: Path
) -> None:
    before = support.digests(model)
    train_from_config(load("run", trains, *FLAGS[trains]))
    assert support.digests(model) == before
    assert not list((tmp_path / "run").glob("*.safetensors"))
    assert main(["replay", str(tmp_path / "run"), "--out", str(tmp_path / "new")]) == 0
    assert (
        main(["replay", str(tmp_path / "run"), "--out", str(tmp_path / "old"), "--step", "0"]) == 0
    )
    base, new, old = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (model, tmp_path / "new", tmp_path / "old")
    )
    assert base.keys() == new.keys() == old.keys()
    assert all(torch.equal(base[name], old[name]) for name in base)
    assert not any(torch.equal(base[name], new[name]) for name in base)
    streamed = support.streamed(model)
    try:
        log = read_log((tmp_path / "run" / LOG_NAME).read_bytes(), "log")
        replayed(streamed, log)
        assert all(
            torch.equal(streamed.get_parameter(n).clone(), new[n])
            for n in ("lm_head.weight", "model.norm.weight")
        )
    finally:
        streamed.ssdtune.close()


@pytest.mark.slow
def test_masters_go_on_and_are_replayed(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read from files of bfloat16, from the working copy, and made again from a log."""
    half = tiny_runs.save(tiny_runs.llama(dtype=torch.bfloat16, **SIZES), tmp_path / "half")
    before = support.digests(half)
    flags = ("--model_name_or_path", str(half), "--zo_master", "true", "--zo_fold_steps", "2")
    whole = train_from_config(load("whole", "all", *flags))
    interrupted(load, monkeypatch, "all", flags)
    resumed = train_from_config(load("stopped", "all", *flags))
    logs = [(tmp_path / run / LOG_NAME).read_bytes() for run in ("whole", "stopped")]
    assert logs[0] == logs[1]
    assert read_log(logs[0], "log").header.trains == "masters"
    assert resumed.metrics["eval_loss"] == whole.metrics["eval_loss"]
    assert support.digests(half) == before
    assert main(["replay", str(tmp_path / "whole"), "--out", str(tmp_path / "new")]) == 0
    base, new = (
        AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
        for folder in (half, tmp_path / "new")
    )
    assert {name: t.dtype for name, t in base.items()} == {n: t.dtype for n, t in new.items()}
    assert not any(torch.equal(base[name], new[name]) for name in base if "norm" not in name)


def test_a_working_copy_leaves_nothing_behind(load: Any, tmp_path: Path) -> None:
    for every in ("never", "2"):
        train_from_config(load(every, "all", "--zo_fold_steps", every))
    logs = [(tmp_path / every / LOG_NAME).read_bytes() for every in ("never", "2")]
    assert logs[0] == logs[1]
    assert not [p for p in (tmp_path / "2").rglob("*") if "weights-" in p.name or ".tmp" in p.name]


@pytest.mark.parametrize(
    ("num", "trains"),
    [
        (2, "all"),
        pytest.param(4, "all", marks=pytest.mark.slow),
        pytest.param(2, "low_rank", marks=pytest.mark.slow),
        pytest.param(2, "adapters", marks=pytest.mark.slow),
        pytest.param(4, "adapters", marks=pytest.mark.slow),
    ],
)
def test_several_processes_take_the_same_steps_as_one(
    num: int, trains: str, load: Any, tmp_path: Path
) -> None:
    """They exchange losses alone; the log, hence every weight, is the same to the bit, and a resumed run's too."""
    flags = ["--eval_strategy", "no", "--lr_scheduler_type", "constant"]
    flags += LOW_RANK if trains == "low_rank" else ()
    train_from_config(load("one", trains, "--gradient_accumulation_steps", "4", *flags))
    whole = ["--config", str(load("more", trains, *flags).path), *flags]
    whole += ["--gradient_accumulation_steps", str(4 // num)]
    runs = [[*whole, "--max_steps", "4"], whole] if trains == "all" else [whole]
    # Four processes start anew to go on, two are the same, which takes half as long.
    for started in [runs] if num == 2 else [[run] for run in runs]:
        tiny_runs.launch(num, *started)
    logs = [(tmp_path / run / LOG_NAME).read_bytes() for run in ("one", "more")]
    assert logs[0] == logs[1]
    if trains == "adapters":
        one, two = (
            load_file(tmp_path / run / "adapter_model.safetensors") for run in ("one", "more")
        )
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_objective_without_a_gradient_trains(model: Path, tmp_path: Path) -> None:
    """How many tokens are less likely than the right one: flat almost everywhere, so that no gradient knows it."""

    def rank(output: Any, batch: Any) -> torch.Tensor:
        logits = output.logits[:, :-1]
        right = logits.gather(-1, batch["input_ids"][:, 1:, None])
        return (logits < right).float().mean((-1, -2))

    rows = [{"input_ids": [5 + (k + j) % 7 for j in range(8)]} for k in range(4)]
    streamed = support.streamed(model)
    arguments = tiny_runs.arguments(
        tmp_path, per_device_train_batch_size=2, max_steps=30, learning_rate=3e-4, logging_steps=1
    )
    trainer = ZOTrainer(
        streamed,
        arguments,
        lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])},
        train_dataset=rows,
        estimator=FZOO(eps=1e-2, num_directions=8),
        objective=rank,
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    log, content = tmp_path / LOG_NAME, (tmp_path / LOG_NAME).read_bytes()
    os.link(log, tmp_path / "before")
    trainer.save_model()
    assert log.read_bytes() == content
    assert not log.samefile(tmp_path / "before"), "replaced: to write over it might lose it"
    streamed.ssdtune.close()
    assert all(-1 <= loss <= 0 for loss in losses)
    assert sum(losses[-5:]) < sum(losses[:5]), "minus the rank falls"


def zo_trainer(model: Path, folder: Path, **more: Any) -> tuple[Any, ZOTrainer]:
    """A streamed model, and what trains all of its weights by a few rows; more: arguments that differ."""
    streamed = support.streamed(model)
    given = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, **more}
    trainer = ZOTrainer(
        streamed,
        tiny_runs.arguments(folder, **given),
        lambda rows: {name: torch.tensor([row[name] for row in rows]) for name in rows[0]},
        train_dataset=[{key: [5, 6, 7, k] for key in ("input_ids", "labels")} for k in range(6)],
    )
    return streamed, trainer


def test_a_step_without_a_loss_is_skipped_and_logged(model: Path, tmp_path: Path) -> None:
    """An objective that is infinite one way for one variant and the other way for the other."""
    signs = itertools.cycle((1, -1))

    def value(output: Any, batch: Any) -> torch.Tensor:
        is_good = trainer.method.num_steps != 1
        return torch.full((2,), 0.5 if is_good else next(signs) * math.inf)

    streamed, trainer = zo_trainer(model, tmp_path, max_steps=3, logging_steps=1)
    trainer.objective = value
    trainer.train()
    streamed.ssdtune.close()
    log = read_log((tmp_path / LOG_NAME).read_bytes(), "log")
    assert log.num_steps == 3
    assert [update.step for update in log.updates] == [0, 2]
    told = [row.get("skipped_steps", 0) for row in trainer.state.log_history if "loss" in row]
    assert told == [0, 1, 1]


def test_a_run_that_trains_an_adapter_answers_by_its_checkpoint_until_it_is_finished(
    model: Path, tmp_path: Path
) -> None:
    """Its log lies in the run's folder from the first step on, and is none of the base's weights."""
    header = Header(base=None, dtype="float32", seed=7, kind="gaussian", trains="adapters")
    writer = LogWriter(tmp_path / LOG_NAME, header)
    writer.append(0, 1.5, Update(0, (0.1,), 1e-3))
    with pytest.raises(GenerateError, match="holds no adapter"):
        find_adapter(tmp_path)
    made = new_temporary_folder(tmp_path / "checkpoint-1")
    (made / "adapter_config.json").write_text("{}")
    commit_folder(made, tmp_path / "checkpoint-1")
    assert find_adapter(tmp_path) == tmp_path / "checkpoint-1"
    streamed = support.streamed(model)
    with pytest.raises(LogError, match="of an adapter"):
        replayed(streamed, read_log(writer.content(), "log"))
    streamed.ssdtune.close()


def test_a_run_of_all_weights_answers(
    load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_from_config(load("run", "all", *SHORT))
    found = generate_from_run(tmp_path / "run", ["the sky is"], max_new_tokens=3)
    assert "takes all 2 steps of the run again, for every token" in capsys.readouterr().out
    assert main(["replay", str(tmp_path / "run"), "--out", str(tmp_path / "new")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    tokenizer = make_tokenizer()
    from ssdtune.generate import answer

    assert answer(model, tokenizer, ["the sky is"], max_new_tokens=3) == found


@pytest.mark.slow  # at once: test_an_objective_without_a_gradient_trains
def test_losses_fall(load: Any) -> None:
    """FZOO on a tiny model and few rows, many steps: the evaluation loss ends lower."""
    flags = ["--zo_estimator", "fzoo", "--max_steps", "40", "--learning_rate", "3e-4"]
    result = train_from_config(
        load("run", "all", *flags, "--eval_steps", "20", "--save_steps", "40", "--eval_on_start")
    )
    losses = [row["eval_loss"] for row in result.log_history if "eval_loss" in row]
    assert losses[-1] < losses[0] - 0.05, losses


def test_a_checkpoint_whose_log_has_other_steps_is_refused(model: Path, tmp_path: Path) -> None:
    """Of another program, without our list of files: nobody has compared their sizes."""
    folder = tmp_path / "run" / "checkpoint-2"
    streamed, trainer = zo_trainer(model, tmp_path / "run", save_strategy="steps", save_steps=2)
    trainer.train()
    streamed.ssdtune.close()
    (folder / MARKER_NAME).unlink()
    *whole, last = (folder / LOG_NAME).read_bytes().splitlines(keepends=True)
    for rest, told in ((b"", "after step 1, and"), (last[:-4], "after step 1, amid a line")):
        (folder / LOG_NAME).write_bytes(b"".join(whole) + rest)
        streamed, trainer = zo_trainer(model, tmp_path / "on", max_steps=3)
        with pytest.raises(LogError, match=told):
            trainer.train(resume_from_checkpoint=str(folder))
        streamed.ssdtune.close()
        assert not (tmp_path / "on" / LOG_NAME).exists()


def test_a_finished_run_keeps_its_log(model: Path, tmp_path: Path) -> None:
    """Of all weights it is the result: neither saving nor training anew in its folder, to the same bits even, loses it."""
    log, kept = tmp_path / LOG_NAME, []
    for seed in (1, 2, 2):
        streamed, trainer = zo_trainer(model, tmp_path, max_steps=2, seed=seed)
        trainer.save_model()
        assert not kept or log.read_bytes() == kept[-1], "no step was taken yet"
        trainer.train()
        kept.append(log.read_bytes())
        streamed.ssdtune.close()
    beside = [log.with_suffix(f".{number}.jsonl") for number in (1, 2)]
    assert [path.read_bytes() for path in [*beside, log]] == kept


def test_a_process_without_the_steps_saves_no_log(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainer lets every process save, and all but the first have a log of no step."""
    streamed, trainer = zo_trainer(model, tmp_path, max_steps=1)
    trainer.train()
    log = (tmp_path / LOG_NAME).read_bytes()
    monkeypatch.setattr(type(trainer.args), "should_save", False)
    trainer.log_writer = LogWriter(tmp_path / "nowhere", trainer.log_writer.header)
    trainer.save_model()
    trainer.save_model(str(tmp_path / "new"))
    assert (tmp_path / LOG_NAME).read_bytes() == log
    assert not (tmp_path / "new").exists()
    streamed.ssdtune.close()


def test_a_log_of_other_weights_is_refused(
    load: Any, tmp_path: Path, model: Path, capsys: Any
) -> None:
    train_from_config(load("run", "all", *SHORT))
    other = tiny_runs.save(tiny_runs.llama(2, **SIZES), tmp_path / "other")
    path = tmp_path / "run" / "ssdtune.yaml"
    path.write_text(path.read_text().replace(str(model), str(other)))
    assert main(["replay", str(tmp_path / "run"), "--out", str(tmp_path / "new")]) == 2
    assert "other weights" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_fzoo_needs_directions_to_spread(load: Any) -> None:
    with pytest.raises(ConfigError, match="zo_num_directions"):
        load("run", "all", "--zo_estimator", "fzoo", "--zo_num_directions", "1")


# ------------------------------------------------------------------ the log by itself

HEADER = Header(base="abc", dtype="float32", seed=7, kind="gaussian", trains="all")


def written(path: Path) -> bytes:
    writer = LogWriter(path, HEADER)
    writer.append(0, 1.5, Update(0, (0.1, -1e-17), 1e-3, 0.999))
    writer.append(1, float("nan"), None)
    writer.append(2, 1.25, Update(2, (3.0, 0.5), 0.1))
    assert path.read_bytes() == writer.content()
    return writer.content()


def test_a_log_reads_back_every_bit(tmp_path: Path) -> None:
    log = read_log(written(tmp_path / "log"), "log")
    assert log.header == HEADER
    assert log.updates == (Update(0, (0.1, -1e-17), 1e-3, 0.999), Update(2, (3.0, 0.5), 0.1))
    assert log.num_steps == 3
    assert not log.is_cut


def test_steps_that_are_made_again_leave_no_second_log(tmp_path: Path) -> None:
    """A killed run goes on from its checkpoint, some steps before the end of its log; with other ones it is kept."""
    path = tmp_path / "log.jsonl"
    whole = written(path)
    first = b"".join(whole.splitlines(keepends=True)[:2])
    for loss, num_files in ((float("nan"), 1), (1.75, 2)):
        writer = LogWriter(path, HEADER)
        writer.go_on(first)
        writer.append(1, loss, None)
        assert path.read_bytes().startswith(first)
        assert len(list(tmp_path.iterdir())) == num_files
        path.write_bytes(whole)
    assert (tmp_path / "log.1.jsonl").read_bytes() == whole


def test_a_last_line_that_was_cut_off_did_not_happen(tmp_path: Path) -> None:
    content = written(tmp_path / "log")
    log = read_log(content[:-4], "log")
    assert log.is_cut
    assert log.num_steps == 2


@pytest.mark.parametrize("line", [0, 1, 3])
def test_a_damaged_line_is_named(line: int, tmp_path: Path) -> None:
    lines = written(tmp_path / "log").splitlines(keepends=True)
    lines[line] = lines[line].replace(b"1", b"2", 1).replace(b"7", b"8", 1)
    with pytest.raises(LogError, match=f"the/log, line {line + 1}: damaged"):
        read_log(b"".join(lines), "the/log")


def test_a_step_that_is_missing_is_named(tmp_path: Path) -> None:
    lines = written(tmp_path / "log").splitlines(keepends=True)
    with pytest.raises(LogError, match="step 2 where 1 was to come"):
        read_log(b"".join(lines[:2] + lines[3:]), "log")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--zo_update", "adam", "--zo_estimator", "lozo"), "zo_update: adam does not go with"),
        (("--zo_mask", "random", "--zo_estimator", "lozo"), "zo_mask: random does not go with"),
        (("--fp16", "true"), "fp16: true scales losses"),
        (
            ("--zo_trains", "all", "--load_best_model_at_end", "true", "--save_steps", "3"),
            "a checkpoint holds no weights to load",
        ),
        (("--zo_mask", "magnitude"), "an adapter's are none of them"),
        (("--zo_trains", "low_rank"), "windows, and mezo has none"),
        (("--zo_update", "lozo_m", "--zo_estimator", "lozo"), "zo_update: lozo_m is the momentum"),
    ],
)
def test_keys_that_do_not_go_together_are_named(
    flags: tuple[str, ...], told: str, load: Any
) -> None:
    with pytest.raises(ConfigError, match=told):
        load("run", "adapters", *flags)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("fp16", "bf16=True"),
        ("load_best_model_at_end", "ssdtune replay"),
        ("neftune_noise_alpha", "eval mode"),
    ],
)
def test_arguments_that_a_forward_alone_can_not_honour_are_refused(
    name: str, told: str, model: Path, tmp_path: Path
) -> None:
    streamed = support.streamed(model)
    arguments = tiny_runs.arguments(tmp_path, per_device_train_batch_size=2)
    setattr(arguments, name, True)
    with pytest.raises(TrainerError, match=told):
        ZOTrainer(streamed, arguments)
    assert streamed.ssdtune.method is None, "the model is as it was"
    streamed.ssdtune.close()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"optimizers": (torch.optim.SGD([torch.zeros(1)]), None)}, "^optimizers and"),
        (
            {"optimizer_cls_and_kwargs": (torch.optim.SGD, {})},
            "optimizer_cls_and_kwargs: there are",
        ),
        ({"fold": Fold(Path(), 2)}, "^fold: an adapter"),
    ],
    ids=["optimizers", "class", "fold"],
)
def test_arguments_that_would_do_nothing_are_refused(
    more: dict[str, Any], told: str, model: Path, tmp_path: Path
) -> None:
    base: Any = support.streamed(model)
    with pytest.raises(TrainerError, match=told):
        ZOTrainer(
            support.with_lora(base),
            tiny_runs.arguments(tmp_path, per_device_train_batch_size=2),
            **more,
        )
    assert base.ssdtune.method is None, "the model is as it was"
    base.ssdtune.close()


def test_more_rows_than_may_pass_at_once_are_refused(model: Path, tmp_path: Path) -> None:
    """Variants meet at every block, so that even the one micro-batch of a step is not cut."""
    streamed = support.streamed(model, micro_batch_size=2)
    arguments = tiny_runs.arguments(
        tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=1
    )
    with pytest.raises(TrainerError, match="size=2, gradient_accumulation_steps=4"):
        ZOTrainer(streamed, arguments)
    streamed.ssdtune.close()


def test_a_log_of_another_rule_is_another_run(load: Any, tmp_path: Path) -> None:
    train_from_config(load("run", "all", *SHORT))
    with pytest.raises(LogError, match="rule: "):
        train_from_config(load("run", "all", "--zo_update", "sign"))
    path = tmp_path / "run" / LOG_NAME
    log = read_log(path.read_bytes(), "log")
    other = dataclasses.replace(log.header, seed=log.header.seed + 1, trains="masters")
    assert [said.split(":")[0] for said in other.differences(log.header)] == ["seed", "trains"]


PACKED = ("--quantization", "4", "--eval_strategy", "no")


@pytest.mark.slow
def test_packed_weights_train_themselves(load: Any, tmp_path: Path) -> None:
    """However often they are written back; replayed, what they stand for."""
    for every in ("never", "2"):
        flags = ("--zo_packed", "moved", "--zo_fold_steps", every)
        train_from_config(load(every, "all", *flags, *PACKED))
    logs = [(tmp_path / every / LOG_NAME).read_bytes() for every in ("never", "2")]
    assert logs[0] == logs[1]
    assert read_log(logs[0], "log").header.trains == "codes"
    weights = []
    for step in ("0", "6"):
        out = tmp_path / f"at {step}"
        assert main(["replay", str(tmp_path / "2"), "--out", str(out), "--step", step]) == 0
        files = out.glob("*.safetensors")
        weights.append({name: t for file in files for name, t in load_file(file).items()})
    matrix = "model.layers.0.mlp.up_proj.weight"
    is_changed = weights[0][matrix] != weights[1][matrix]
    assert 0 < is_changed.float().mean() < 1, "a code moves by whole steps, or not at all"


@pytest.mark.slow
def test_a_base_that_is_kept_packed_gives_the_log_of_a_decoded_one(
    load: Any, tmp_path: Path
) -> None:
    never = ("--zo_packed", "kept", "--zo_fold_steps", "never")
    train_from_config(load("kept", "all", *never, *PACKED))
    train_from_config(load("decoded", "all", *PACKED))
    logs = [(tmp_path / run / LOG_NAME).read_bytes() for run in ("kept", "decoded")]
    assert logs[0] == logs[1]


def test_a_base_that_is_not_packed_is_told_before_a_step(load: Any) -> None:
    with pytest.raises(Exception, match="nothing of this one is packed"):
        train_from_config(load("run", "all", "--zo_packed", "moved"))
