"""From a YAML file to an adapter, and back to an answer."""

import dataclasses
import json
import os
import re
import shutil
import signal

import pytest
import support
import tiny_models
import tiny_runs
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_scheduling import a_profile
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ssdtune.cli import main
from ssdtune.config import load_config
from ssdtune.data import CausalCollator, DataError, load_dataset_rows, tokenize_rows
from ssdtune.durable import DurableError, lock_folder
from ssdtune.generate import GenerateError, generate_from_run
from ssdtune.packing import once
from ssdtune.profiles import own_profile_path, save_profile
from ssdtune.report import duration
from ssdtune.run_files import PLAN_NAME
from ssdtune.schedule.compare import Prediction, compare
from ssdtune.schedule.plan import Kind
from ssdtune.trainer import opening, train_from_config
from ssdtune.trainer import run as run_module
from ssdtune.trainer.checkpoint import CheckpointError, fault_of, steps_of
from ssdtune.trainer.errors import RunError
from ssdtune.trainer.scheduling import Watch
from ssdtune.trainer.telemetry import TRACED_STEPS

STEPS = 5
RAM = 2_500_000  # of 3.4 MB of weights
YAML = """
model_name_or_path: {model}
dataset: {data}
eval_dataset: [{{path: {data}, split: "train[:5]"}}]
output_dir: {output}
lora_r: 4
lora_alpha: 8
lora_dropout: 0.1
max_length: 24
per_device_train_batch_size: 2
gradient_accumulation_steps: 3
max_steps: 5
learning_rate: 1.0e-2
eval_strategy: steps
eval_steps: 3
save_steps: 2
offload: {{ram: 2500KB}}
"""


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Tokenized rows are cached; not in the user's cache."""
    with tiny_runs.own_datasets_cache(tmp_path_factory.mktemp("datasets-cache")):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3}
    return tiny_runs.save(
        tiny_runs.llama(**sizes), tmp_path_factory.mktemp("model"), max_shard_size="2MB"
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = []
    for k in range(16):
        answer = "the sky is blue and the grass is green " * (1 + k % 3)
        turns = [{"role": "user", "content": f"what colour is it {k}"}]
        rows.append({"messages": [*turns, {"role": "assistant", "content": answer}]})
    return tiny_runs.write_rows(path, rows)


@pytest.fixture
def load(model, data, tmp_path):
    def loaded(output="run", *flags, model=model, data=data):
        path = tmp_path / f"{output}.yaml"
        path.write_text(YAML.format(model=model, data=data, output=tmp_path / output))
        return load_config(path, flags)

    return loaded


@pytest.fixture(scope="module")
def finished(model, data, tmp_path_factory):
    """A run that nothing happened to: (its result, what the model's files were before)."""
    folder = tmp_path_factory.mktemp("finished")
    path = folder / "train.yaml"
    path.write_text(YAML.format(model=model, data=data, output=folder / "run"))
    before = support.digests(model)
    return train_from_config(load_config(path)), before


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class SignalAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            signal.raise_signal(signal.SIGINT)


@pytest.fixture
def interrupt(monkeypatch):
    """Makes the next runs get a SIGINT during one step."""

    def at(step):
        make = run_module._make_trainer

        def with_signal(*args):
            trainer, telemetry = make(*args)
            trainer.add_callback(SignalAt(step))
            return trainer, telemetry

        monkeypatch.setattr(run_module, "_make_trainer", with_signal)

    return at


# ------------------------------------------------------------------ a run


def test_a_run_leaves_an_adapter_its_card_its_configuration_and_what_was_measured(finished):
    result, _ = finished
    names = {path.name for path in result.output_dir.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert names >= {"README.md", "ssdtune.yaml", "ssdtune.json", "metrics.jsonl", "results.json"}
    assert names >= {"trace.jsonl", "chat_template.jinja", "checkpoint-4", "checkpoint-5"}
    assert not any(name.endswith(".tmp") for name in names)
    assert lines_of(result.output_dir / "metrics.jsonl") == json.loads(
        json.dumps(result.log_history)
    )
    assert json.loads((result.output_dir / "results.json").read_text())["global_step"] == STEPS
    card = (result.output_dir / "README.md").read_text()
    for said in ("base_model:", "| lora_r | 4 |", "16 chats", "rows,", "loss |", "transformers 5"):
        assert said in card


def test_the_resolved_configuration_reads_back_as_the_same_run(finished):
    result, _ = finished
    again = load_config(result.output_dir / "ssdtune.yaml").config
    assert again.output_dir == result.output_dir
    assert (again.lora_r, again.max_steps, again.offload.ram) == (4, STEPS, RAM)
    checkpoint = load_config(result.output_dir / "checkpoint-4" / "ssdtune.yaml").config
    assert checkpoint == again


def test_metrics_say_what_bounded_the_steps(finished):
    metrics = finished[0].metrics
    assert metrics["loss_last"] < metrics["loss_first"]
    assert metrics["eval_loss"] < metrics["eval_loss_first"]
    assert metrics["num_misses"] == 0
    assert 0 < metrics["busy_share"]["compute"] <= 1
    assert metrics["ratio_to_limit"] >= 1
    assert metrics["train_tokens_per_second"] > 0
    assert metrics["peak_rss_bytes"] > 50e6
    assert metrics["read_bytes_per_step"] > 1e6  # what the budget does not hold
    assert metrics["num_trainable"] == sum(
        p.numel() for p in adapter(finished[0].output_dir).values()
    )


def test_the_trace_holds_the_last_steps_only(finished):
    trace = finished[0].trace
    numbers = {op.step for op in trace}
    assert max(numbers) - min(numbers) <= TRACED_STEPS
    first = lines_of(finished[0].output_dir / "trace.jsonl")[0]
    assert first == json.loads(json.dumps(dataclasses.asdict(trace[0])))


def test_the_models_files_are_byte_for_byte_as_before(finished, model):
    assert support.digests(model) == finished[1]


def test_a_run_tells_plan_data_first_sample_progress_and_summary(load, capsys):
    train_from_config(load("told", "--max_steps", "2", "--eval_steps", "1"))
    told = capsys.readouterr().out
    for said in (
        r"data      16 chats → \d+ tokens · trained on \d+ % · \d+ rows over 24 cut",
        r"eval data 5 chats",
        r"first sample: <\|im_start\|>user↵what colour is it 0<\|im_end\|>.*【the sky is blue",
        r"weights   3.\d+ MB in 5 blocks",
        r"adapter   LoRA r4 on down_proj, gate_proj, k_proj",
        r"trains    \d+,\d+ parameters",
        r"job       3 micro-batches × 2 rows a step · 2 steps",
        r"1/2  loss \d\.\d+  gnorm .* s  [\d,]+ tok/s  NVMe read .*-bound, stall .*ETA",
        r"2/2  loss \d\.\d+ \(eval \d\.\d+ @2\)",
        r"done      .*told",
        r"loss \d\.\d+ → \d\.\d+   eval \d\.\d+ → \d\.\d+   peak RSS [\d.]+ [MG]B",
        r"reads \d\.\d+ MB a step",
        r"busy NVMe read \d+\.\d% · compute \d+\.\d% · step / \w+ alone \d\.",
        r"ssdtune generate .*told -p",
    ):
        assert re.search(said, told), said


def test_losses_and_weights_equal_a_plain_in_memory_trainer(load, model, data, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = tokenize_rows(load_dataset_rows({"path": str(data)}), tokenizer, max_length=24)
    set_seed(42)
    kinds = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=sorted(kinds), task_type="CAUSAL_LM")
    plain = get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora)
    args = TrainingArguments(
        output_dir=str(tmp_path / "plain"),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        learning_rate=1e-2,
        logging_steps=1,
        optim="adamw_torch",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(plain, args, CausalCollator(1), rows.dataset)
    trainer.train()
    ours = train_from_config(load("exact", "--eval_strategy", "no", "--lora_dropout", "0"))
    expected = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert [row["loss"] for row in ours.log_history if "loss" in row] == expected
    saved = adapter(ours.output_dir)
    trained = {
        name.replace(".default", ""): value for name, value in support.weights(plain).items()
    }
    support.assert_equal(trained, saved, "weights")


# ------------------------------------------------------------------ on a machine that was measured


def test_a_run_tells_its_plan_first_and_what_it_predicted_of_each_lane_last(
    load, capsys, monkeypatch, tmp_path
):
    monkeypatch.setenv("SSDTUNE_CACHE", str(tmp_path / "cache"))
    save_profile(a_profile(write_rate=1e9), own_profile_path())
    kept: list[bool] = []
    whole = tmp_path / "measured" / "adapter_model.safetensors"
    monkeypatch.setattr(Watch, "keep", lambda watch: kept.append(whole.exists()))
    result = train_from_config(load("measured", "--max_steps", "4", "--eval_strategy", "no"))
    assert kept == [True], "what the run says of the profile, once its result is saved"
    told = capsys.readouterr().out
    places = []
    for said in (
        r"decided   offload\.block_inputs: auto is device \(device ",
        r"predicted \S+ s a step of \d+ tokens · [\d,]+ tokens/s · .*-bound",
        r"\n4/4  loss ",
        r"predicted, measured: step \S+, \S+ s \([+-]\d+%\) · .*NVMe read \S+, \S+ s",
    ):
        found = re.search(said, told)
        assert found, said
        places.append(found.start())
    assert places == sorted(places)
    compared = result.metrics["predicted_and_measured"]
    assert set(compared) >= {"step", "compute", "nvme_read"}
    assert all(min(pair) > 0 for pair in compared.values())
    prediction = Prediction.from_json((result.output_dir / PLAN_NAME).read_text())
    assert compared["step"][0] == pytest.approx(prediction.step_s, rel=0.01)
    beside = compare(prediction, result.trace, 3)
    assert {pair.op.kind for pair in beside.pairs} >= {Kind.LOAD, Kind.COMPUTE}
    assert beside.unplanned == ()
    assert beside.measured_s > 0


@pytest.mark.slow  # two runs; what they plan is tested in test_grid
@pytest.mark.parametrize(
    ("flags", "write_rate", "said"),
    [
        (("--dtype", "float16"), 1e9, "assumed   float16 as fast as float32, which was measured"),
        (("--offload.block_inputs", "nvme"), None, "note: times are not predicted: writing to"),
    ],
    ids=["format", "writes"],
)
def test_what_was_not_measured_keeps_nobody_from_training(
    load, capsys, monkeypatch, tmp_path, flags, write_rate, said
):
    monkeypatch.setenv("SSDTUNE_CACHE", str(tmp_path / "cache"))
    save_profile(a_profile(write_rate=write_rate), own_profile_path())
    flags = (*flags, "--max_steps", "1", "--eval_strategy", "no")
    result = train_from_config(load("unmeasured", *flags))
    assert said in capsys.readouterr().out
    assert result.metrics["global_step"] == 1


# ------------------------------------------------------------------ stopped, and again


def test_activations_that_wait_on_the_drive_change_no_bit(load, finished, capsys):
    result = train_from_config(load("stored", "--offload.nvme_activations", "1GB"))
    told = capsys.readouterr().out
    assert re.search(
        r"activations of \d blocks wait on NVMe for backward, within 1\.00 GB", told
    ), told
    expected, found = adapter(finished[0].output_dir), adapter(result.output_dir)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    kinds = {line["kind"] for line in lines_of(result.output_dir / "trace.jsonl")}
    assert {"store_activations", "fetch_activations"} <= kinds
    assert not list(result.output_dir.glob(".ssdtune-scratch*"))


def test_the_same_command_again_goes_on_to_the_same_bits(load, finished, interrupt, capsys):
    loaded = load("again")
    interrupt(3)
    stopped = train_from_config(loaded)
    told = capsys.readouterr().out
    assert stopped.was_interrupted
    assert re.search(r"saved     .*checkpoint-3 in \d+\.\d s\. Resume: ssdtune train .*yaml", told)
    assert not (stopped.output_dir / "adapter_model.safetensors").exists()
    result = train_from_config(loaded)
    assert "resuming  " in capsys.readouterr().out
    assert not result.was_interrupted
    support.assert_equal(adapter(finished[0].output_dir), adapter(result.output_dir), "weights")
    numbers = [
        row["step"] for row in lines_of(result.output_dir / "metrics.jsonl") if "loss" in row
    ]
    assert numbers == [1, 2, 3, 4, 5]


def test_block_inputs_lie_in_output_dir_and_packed_models_in_the_cache(load, monkeypatch):
    """Where offload.path names no folder for both."""
    folders, build = [], once.build_packed

    def build_packed(*args, beside, **more):
        folders.append(beside)
        return build(*args, beside=beside, **more)

    monkeypatch.setattr(once, "build_packed", build_packed)
    loaded = load("inputs", "--offload.block_inputs", "nvme")
    model = opening.open_model(loaded.config)
    model.ssdtune.close()
    assert folders == [None], "as `ssdtune plan` has it: the cache"
    assert model.ssdtune.input_store.file.folder == loaded.config.output_dir


@pytest.mark.slow  # three runs
def test_adapters_begin_at_what_packing_took_away_once(load, interrupt, capsys):
    """LoftQ's first values are of a run that starts; one that goes on has its own."""
    flags = ("--quantization", "3", "--init_lora_weights", "loftq", "--eval_strategy", "no")
    flags = (*flags, "--max_steps", "3")
    whole = train_from_config(load("whole", *flags))
    line = re.search(
        r"loftq     (\d+) matrices: off by (.*)% of .* by (.*)%", capsys.readouterr().out
    )
    assert int(line[1]) == 21
    assert float(line[3]) < float(line[2])
    card = (whole.output_dir / "README.md").read_text()
    assert "| init_lora_weights | loftq |" in card
    assert "quantization: 3" in card
    interrupt(2)
    stopped = train_from_config(load("cut", *flags))
    assert stopped.was_interrupted
    assert "loftq     " in capsys.readouterr().out
    result = train_from_config(load("cut", *flags))
    assert "loftq     " not in capsys.readouterr().out
    support.assert_equal(adapter(whole.output_dir), adapter(result.output_dir), "weights")


def test_the_printed_command_resumes_whatever_was_asked_before(
    load, finished, interrupt, capsys, monkeypatch
):
    interrupt(2)
    train_from_config(load("printed", "--resume_from_checkpoint", "false"))
    command = re.search(r"Resume: ssdtune (.*)", capsys.readouterr().out).group(1)
    monkeypatch.undo()
    assert "--resume_from_checkpoint auto" in command
    assert main(command.split()) == 0
    run = load("printed").config.output_dir
    support.assert_equal(adapter(finished[0].output_dir), adapter(run), "weights")


def test_a_finished_run_started_again_changes_nothing(load, capsys):
    loaded = load("twice", "--max_steps", "2", "--eval_strategy", "no")
    first = adapter(train_from_config(loaded).output_dir)
    result = train_from_config(loaded)
    assert result.metrics["global_step"] == 2
    told = capsys.readouterr().out
    assert "3/2" not in told
    assert "note: all 2 steps had been made" in told
    support.assert_equal(first, adapter(result.output_dir), "weights")


def test_starting_anew_forgets_what_is_there(load, finished):
    flags = ("--resume_from_checkpoint", "false", "--max_steps", "1", "--eval_strategy", "no")
    train_from_config(load("anew", *flags))
    result = train_from_config(load("anew", *flags))
    assert [row["step"] for row in result.log_history if "loss" in row] == [1]


def test_resuming_with_other_data_is_refused(load, interrupt, data, tmp_path):
    interrupt(2)
    train_from_config(load("other"))
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(data.read_text().splitlines(keepends=True)[:12]))
    record = load("other").config.output_dir / "ssdtune.yaml"
    before = record.read_bytes()
    with pytest.raises(CheckpointError, match="num_rows was 16 and is 12"):
        train_from_config(load("other", data=fewer))
    assert record.read_bytes() == before, "it is still that of the run"


def test_a_second_process_on_the_same_folder_is_refused(load):
    loaded = load("locked")
    loaded.config.output_dir.mkdir()
    with (
        lock_folder(loaded.config.output_dir),
        pytest.raises(DurableError, match="in use by another"),
    ):
        train_from_config(loaded)


def test_what_a_killed_run_left_half_written_goes(load):
    from ssdtune.durable import new_temporary_folder

    loaded = load("left", "--max_steps", "1", "--eval_strategy", "no")
    left = new_temporary_folder(loaded.config.output_dir / "checkpoint-1")
    train_from_config(loaded)
    assert not left.exists()
    assert all(fault_of(folder) is None for folder in steps_of(loaded.config.output_dir).values())


# ------------------------------------------------------------------ bad input


def test_a_data_error_comes_before_the_model_is_opened(load, tmp_path, monkeypatch):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    monkeypatch.setattr(opening, "open_model", lambda config: pytest.fail("opened"))
    with pytest.raises(DataError, match=r"empty\.jsonl"):
        train_from_config(load("bad", data=empty))


def test_a_tokenizer_of_another_model_is_refused(load, model, tmp_path):
    small = tmp_path / "small"
    shutil.copytree(model, small)
    tiny_models.save(tiny_runs.llama(vocab_size=64, num_hidden_layers=2), tmp_path / "m")
    for path in [*small.glob("*.safetensors"), *small.glob("*.index.json"), small / "config.json"]:
        path.unlink()
    for path in (tmp_path / "m").iterdir():
        shutil.copy(path, small)
    with pytest.raises(
        RunError, match=r"the tokenizer gives id \d+, the model has embeddings for 64"
    ):
        train_from_config(load("ids", model=small))


def test_a_model_without_a_tokenizer_is_named(load, tmp_path):
    bare = tmp_path / "bare"
    tiny_models.save(tiny_models.build("llama"), bare)
    with pytest.raises(RunError, match="has no tokenizer") as caught:
        train_from_config(load("bare", model=bare))
    assert str(bare) in str(caught.value)


def test_a_layer_that_is_not_there_is_refused_with_the_nearest_name(load):
    with pytest.raises(ValueError, match="no layer of this model is called q_porj") as caught:
        train_from_config(load("typo", "--lora_target_modules", "q_porj"))
    assert "Did you mean q_proj" in str(caught.value)


# ------------------------------------------------------------------ answering


def test_a_trained_model_answers_as_its_twin_in_memory(finished, capsys):
    run = finished[0].output_dir
    prompts = ["what colour is it 3", "and the grass?"]
    plain = AutoPeftModelForCausalLM.from_pretrained(run).eval()
    tokenizer = AutoTokenizer.from_pretrained(run)
    expected = []
    for prompt in prompts:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        made = plain.generate(**inputs, max_new_tokens=6, do_sample=False)
        text = tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        expected.append(text.strip())
    assert generate_from_run(run, prompts[:1], max_new_tokens=6) == expected[:1]
    assert capsys.readouterr().out.strip() == expected[0]
    assert generate_from_run(run, prompts, max_new_tokens=6) == expected
    assert f"> {prompts[1]}\n{expected[1]}" in capsys.readouterr().out


def test_an_unfinished_run_answers_from_its_newest_checkpoint(load, interrupt, capsys):
    interrupt(2)
    run = train_from_config(load("unfinished")).output_dir
    assert len(generate_from_run(run, ["hello"], max_new_tokens=2)) == 1
    assert "checkpoint-2 answers" in capsys.readouterr().out


def test_another_base_than_the_adapters_is_refused(finished, model, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    shard = sorted(other.glob("*.safetensors"))[0]
    with shard.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"\x11\x22")
    with pytest.raises(GenerateError, match="was trained on other weights"):
        generate_from_run(
            finished[0].output_dir, ["hi"], overrides=["--model_name_or_path", str(other)]
        )


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(GenerateError, match="there is no folder"):
        generate_from_run(tmp_path / "nowhere", ["hi"])
    with pytest.raises(GenerateError, match="holds no adapter") as caught:
        generate_from_run(tmp_path, ["hi"])
    assert "Give the output_dir of a run" in str(caught.value), (
        "it has no configuration to train by"
    )


# ------------------------------------------------------------------ small things


def test_durations_are_said_in_the_unit_that_fits():
    said = {3.25: "3.2 s", 42.6: "43 s", 75: "1 m 15 s", 34_560: "9 h 36 m", 0.012: "0.012 s"}
    assert {seconds: duration(seconds) for seconds in said} == said


# ------------------------------------------------------------------ several processes


def test_two_processes_train_one_adapter_and_resume_it(load, tmp_path):
    loaded = load("two", "--eval_strategy", "no")
    flags = ["--config", str(loaded.path), "--eval_strategy", "no", "--max_steps"]
    told = tiny_runs.launch(2, [*flags, "2"], [*flags, "4"])
    assert told.count("first sample") == 2  # of two processes one speaks, in each run
    assert told.count("resuming  ") == 1
    run = loaded.config.output_dir
    assert fault_of(run / "checkpoint-4") is None
    assert (run / "checkpoint-4" / "rng_state_1.pth").is_file()
    losses = [row["loss"] for row in lines_of(run / "metrics.jsonl") if "loss" in row]
    assert len(losses) == 4


@pytest.mark.slow  # a process that imports all
def test_accelerate_launches_the_same_run(load, finished):
    loaded = load("launched")
    launcher = "accelerate.commands.launch --cpu --num_processes 1"
    script = tiny_runs.CHECKOUT / "launch" / "train.py"
    tiny_runs.started(launcher, script, "--config", str(loaded.path))
    expected, found = adapter(finished[0].output_dir), adapter(loaded.config.output_dir)
    support.assert_equal(expected, found, "weights")
