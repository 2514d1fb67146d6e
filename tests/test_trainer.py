"""SSDTrainer on a streamed model is a plain Trainer in memory: same logs, same events, same bits."""

import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import support
import tiny_models
import tiny_runs
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_runs import make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ssdtune.data import CausalCollator
from ssdtune.schedule.plan import Direction, Kind, Lane
from ssdtune.schedule.trace import steps
from ssdtune.trainer import SSDConfig, SSDTrainer, TrainerError
from ssdtune.visit.accumulation import AccumulationWarning, AccumulationWatch

LOGGED = ("loss", "grad_norm", "learning_rate", "epoch", "eval_loss")
NUM_ROWS = 13  # 7 batches of 2: groups of 4 and 3, the last batch of one row


def make_rows(num_rows=NUM_ROWS, seed=0):
    random = np.random.default_rng(seed)
    rows = []
    for length in random.integers(5, 20, num_rows):
        ids = random.integers(3, tiny_models.IMAGE_TOKEN, length).tolist()
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return datasets.Dataset.from_list(rows)


def arguments(kind, output_dir, **more):
    given = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return kind(output_dir=str(output_dir), **{**given, **more})


def save_tiny(name, folder, dtype=torch.float32):
    return tiny_models.save(tiny_models.build(name, dtype=dtype), folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Two layers are enough for what a trainer does."""
    model = tiny_runs.llama(num_hidden_layers=2, vocab_size=tiny_models.VOCAB)
    return tiny_models.save(model, tmp_path_factory.mktemp("llama"))


def in_memory(folder, dtype=torch.float32, **lora):
    return support.with_lora(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), **lora)


def logs(trainer):
    """What was logged, by step; times and counts of tokens left out."""
    rows = [{k: row[k] for k in LOGGED if k in row} for row in trainer.state.log_history]
    return [row for row in rows if len(row) > 1]


def train_both(
    folder, stream, tmp_path, *, plain=Trainer, ours=SSDTrainer, dtype=torch.float32, **given
):
    """A plain Trainer in memory and ours on the streamed model, after training."""
    lora = given.pop("lora", {})
    rest = {"data_collator": CausalCollator(0), "train_dataset": make_rows()}
    rest |= given.pop("trainer", {})
    a = plain(
        in_memory(folder, dtype, **lora),
        arguments(TrainingArguments, tmp_path / "a", **given),
        **rest,
    )
    b = ours(
        support.with_lora(stream(folder), **lora),
        arguments(SSDConfig, tmp_path / "b", **given),
        **rest,
    )
    a.train()
    b.train()
    return a, b


def assert_same_run(a, b):
    assert logs(a) == logs(b)
    assert len(logs(a)) >= a.state.max_steps
    assert a.state.global_step == b.state.global_step
    assert a.state.epoch == b.state.epoch
    support.assert_equal(support.weights(a.model), support.weights(b.model), "weights")


# ------------------------------------------------------------------ a step


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", torch.float32),
        ("llama", torch.bfloat16),
        ("gpt2", torch.float32),  # tied
        ("qwen3_moe", torch.bfloat16),
    ],
)
def test_a_step_of_four_micro_batches_equals_plain_accumulation_bit_for_bit(
    name, dtype, stream, tmp_path
):
    folder = save_tiny(name, tmp_path / "model", dtype)
    a, b = train_both(folder, stream, tmp_path, dtype=dtype)
    assert b.state.epoch > 1  # over the short last group of an epoch
    assert_same_run(a, b)


def test_every_block_is_fetched_at_most_twice_a_step_and_none_out_of_order(llama, stream, tmp_path):
    trainer = SSDTrainer(
        support.with_lora(stream(llama)),
        arguments(SSDConfig, tmp_path),
        CausalCollator(0),
        make_rows(),
    )
    trainer.train()
    trace = trainer.streamer.engine.trace
    assert not any(op.is_miss for op in trace)
    train_steps = [
        ops
        for ops in steps(trace).values()
        if any(op.direction is Direction.BACKWARD for op in ops)
    ]
    assert len(train_steps) == 3
    for ops in train_steps:
        loads = [op.block for op in ops if op.lane is Lane.NVME_READ]
        visits = [op.block for op in ops if op.kind is Kind.COMPUTE]
        assert max(loads.count(block) for block in loads) <= 2
        assert max(visits.count(block) for block in visits) <= 2


@pytest.mark.parametrize(
    "given",
    [
        {"bf16": True},
        {"label_smoothing_factor": 0.1},
        {"max_grad_norm": 0.0, "optim": "adafactor"},
        {"gradient_accumulation_steps": 1},
        {"logging_steps": 2},
        {"max_steps": -1, "num_train_epochs": 2, "dataloader_drop_last": True},
    ],
    ids=lambda given: "-".join(f"{k}={v}" for k, v in given.items()),
)
def test_arguments_mean_what_they_mean_in_memory(given, llama, stream, tmp_path):
    a, b = train_both(llama, stream, tmp_path, **given)
    assert [r["loss"] for r in logs(a) if "loss" in r] == [
        r["loss"] for r in logs(b) if "loss" in r
    ]
    support.assert_equal(support.weights(a.model), support.weights(b.model), "weights")


def test_compute_loss_func_gets_the_logits_of_each_micro_batch(llama, stream, tmp_path):
    def mean_over_step(outputs, labels, num_items_in_batch=None):
        logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        total = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        return total / num_items_in_batch

    given = {"compute_loss_func": mean_over_step}
    assert_same_run(*train_both(llama, stream, tmp_path, trainer=given))


class MeanPerMicroBatch:
    """A subclass's own loss: the mean over a micro-batch, plus something."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs.loss + 0.01 * outputs.loss**2
        return (loss, outputs) if return_outputs else loss


@pytest.mark.skipif(
    not hasattr(Trainer, "loss_is_scaled_for_ga"), reason="Trainer asks for it from 5.19 on"
)
def test_a_subclass_with_its_own_compute_loss_is_divided_by_the_group(llama, stream, tmp_path):
    plain = type("Plain", (MeanPerMicroBatch, Trainer), {})
    ours = type("Ours", (MeanPerMicroBatch, SSDTrainer), {})
    assert_same_run(*train_both(llama, stream, tmp_path, plain=plain, ours=ours))


class Recorder(TrainerCallback):
    def __init__(self):
        self.events = []

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)
        return lambda args, state, control, **kwargs: self.events.append(
            (name, state.global_step, round(state.epoch or 0, 6))
        )


def test_callbacks_see_the_same_events_at_the_same_steps(llama, stream, tmp_path):
    recorders = [Recorder(), Recorder()]
    rows = {"data_collator": CausalCollator(0), "train_dataset": make_rows()}
    a = Trainer(
        in_memory(llama), arguments(TrainingArguments, tmp_path), callbacks=[recorders[0]], **rows
    )
    b = SSDTrainer(
        support.with_lora(stream(llama)),
        arguments(SSDConfig, tmp_path),
        callbacks=[recorders[1]],
        **rows,
    )
    a.train()
    b.train()
    assert recorders[0].events == recorders[1].events
    assert [e for e, *_ in recorders[1].events].count("on_substep_end") == 3 + 2 + 3


def test_a_callback_that_stops_training_stops_it(llama, stream, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    trainer = SSDTrainer(
        support.with_lora(stream(llama)),
        arguments(SSDConfig, tmp_path),
        CausalCollator(0),
        make_rows(),
        callbacks=[Stop()],
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert not trainer.was_interrupted


def test_logs_count_tokens_without_padding(llama, stream, tmp_path):
    rows = make_rows(8)
    trainer = SSDTrainer(
        support.with_lora(stream(llama)),
        arguments(SSDConfig, tmp_path, max_steps=1),
        CausalCollator(0),
        rows,
    )
    trainer.train()
    assert trainer.state.log_history[0]["num_tokens"] == sum(map(len, rows["input_ids"]))


def test_a_failure_in_one_micro_batch_names_it_and_leaves_the_model_usable(llama, stream, tmp_path):
    class Fails(SSDTrainer):
        left = 2

        def compute_loss(self, model, inputs, **kwargs):
            self.left -= 1
            if self.left == 0:
                raise RuntimeError("no such luck")
            return super().compute_loss(model, inputs, **kwargs)

    trainer = Fails(
        support.with_lora(stream(llama)),
        arguments(SSDConfig, tmp_path),
        CausalCollator(0),
        make_rows(),
    )
    with pytest.raises(RuntimeError, match="no such luck") as caught:
        trainer.train()
    assert "micro-batch 2 of 4" in "".join(caught.value.__notes__)
    trainer.train()
    assert trainer.state.global_step == 3


# ------------------------------------------------------------------ a plain Trainer


def test_a_plain_trainer_with_batch_8_cut_in_4_equals_batch_2_with_4_steps_of_accumulation(
    llama, stream, tmp_path
):
    # Of one length, so that cut and separate micro-batches are the same tensors.
    rows = datasets.Dataset.from_list(
        [{"input_ids": row["input_ids"][:5], "labels": row["labels"][:5]} for row in make_rows(24)]
    )
    rest = {"data_collator": CausalCollator(0), "train_dataset": rows}
    a = Trainer(in_memory(llama), arguments(TrainingArguments, tmp_path / "a"), **rest)
    whole = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    model = support.with_lora(stream(llama, micro_batch_size=2))
    b = Trainer(model, arguments(TrainingArguments, tmp_path / "b", **whole), **rest)
    a.train()
    b.train()
    assert_same_run(a, b)


def test_a_plain_trainer_with_accumulation_is_told_once_how_often_blocks_are_fetched(
    llama, stream, tmp_path
):
    args = arguments(TrainingArguments, tmp_path, max_steps=4)
    model = support.with_lora(stream(llama))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Trainer(model, args, data_collator=CausalCollator(0), train_dataset=make_rows()).train()
    told = [str(w.message) for w in caught if w.category is AccumulationWarning]
    assert len(told) == 1
    assert "fetched 4 times" in told[0]
    assert "SSDTrainer" in told[0]
    assert "micro_batch_size" in told[0]


def test_a_loop_that_steps_after_every_run_is_told_nothing():
    parameter = torch.nn.Parameter(torch.zeros(3))
    watch = AccumulationWatch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for set_to_none in (True, False, True, False, True, True):
            watch.begin([parameter])
            parameter.grad = torch.ones(3)
            torch.optim.SGD([parameter], lr=0.1).zero_grad(set_to_none=set_to_none)


def test_ssd_trainer_is_told_nothing(llama, stream, tmp_path):
    model = support.with_lora(stream(llama))
    args = arguments(SSDConfig, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", AccumulationWarning)
        SSDTrainer(model, args, CausalCollator(0), make_rows()).train()


def test_on_a_model_in_memory_it_is_a_plain_trainer(llama, stream, tmp_path):
    rest = {"data_collator": CausalCollator(0), "train_dataset": make_rows()}
    a = Trainer(in_memory(llama), arguments(TrainingArguments, tmp_path / "a"), **rest)
    b = SSDTrainer(in_memory(llama), arguments(SSDConfig, tmp_path / "b"), **rest)
    a.train()
    b.train()
    assert_same_run(a, b)


# ------------------------------------------------------------------ evaluation


def test_evaluation_equals_plain_and_reads_the_model_once_per_group(llama, stream, tmp_path):
    rest = {"data_collator": CausalCollator(0), "eval_dataset": make_rows(19, seed=5)}
    given = {"per_device_eval_batch_size": 3}  # 7 batches, the last of one row: groups of 4 and 3
    a = Trainer(in_memory(llama), arguments(TrainingArguments, tmp_path, **given), **rest)
    model = support.with_lora(stream(llama, micro_batch_size=None))
    b = SSDTrainer(model, arguments(SSDConfig, tmp_path, **given), **rest)
    before = b.streamer.step
    assert a.evaluate()["eval_loss"] == b.evaluate()["eval_loss"]
    assert b.streamer.step - before == 2


def test_metrics_see_the_same_logits_in_the_same_order(llama, stream, tmp_path):
    seen = []

    def compute_metrics(prediction):
        seen.append((prediction.predictions, prediction.label_ids))
        return {"count": len(prediction.label_ids)}

    rest = {
        "data_collator": CausalCollator(0),
        "eval_dataset": make_rows(10, seed=5),
        "compute_metrics": compute_metrics,
    }
    given = {
        "per_device_eval_batch_size": 4
    }  # the last batch is short: gathering must not cut others
    a = Trainer(in_memory(llama), arguments(TrainingArguments, tmp_path, **given), **rest)
    model = support.with_lora(stream(llama, micro_batch_size=None))
    b = SSDTrainer(model, arguments(SSDConfig, tmp_path, **given), **rest)
    a.evaluate()
    b.evaluate()
    np.testing.assert_array_equal(seen[0][0], seen[1][0])
    np.testing.assert_array_equal(seen[0][1], seen[1][1])
    assert seen[1][1].shape[0] == 10


def test_training_goes_on_the_same_after_an_evaluation(llama, stream, tmp_path):
    given = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2}
    rest = {"eval_dataset": make_rows(7, seed=5)}
    a, b = train_both(llama, stream, tmp_path, trainer=rest, **given)
    assert sum("eval_loss" in row for row in logs(b)) == 2  # at 2, and at the end
    assert_same_run(a, b)


# ------------------------------------------------------------------ arguments


def test_a_name_a_budget_and_a_peft_config_are_enough(llama, tmp_path):
    args = arguments(
        SSDConfig,
        tmp_path,
        max_steps=1,
        offload={"ram": "2500KB"},
        model_init_kwargs={"dtype": "float32"},
    )
    trainer = SSDTrainer(
        str(llama),
        args,
        CausalCollator(0),
        make_rows(),
        peft_config=LoraConfig(target_modules="all-linear"),
    )
    try:
        assert trainer.streamer.engine.plan.ram_bytes <= 2_500_000
        trainer.train()
    finally:
        trainer.streamer.close()
    targets = set(trainer.model.peft_config["default"].target_modules)
    assert targets == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_an_adapter_on_embedding_and_head_is_saved_and_goes_on(llama, stream, tmp_path):
    """Without those matrices, which a streamed model has on the drive."""
    adapters = []
    for folder in ("whole", "resumed"):
        torch.manual_seed(0)
        targets = ["embed_tokens", "lm_head", "q_proj"]
        model = get_peft_model(stream(llama), LoraConfig(r=4, target_modules=targets))
        args = arguments(SSDConfig, tmp_path / folder, save_strategy="steps", save_steps=2)
        trainer = SSDTrainer(model, args, CausalCollator(0), make_rows())
        if folder == "resumed":
            trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
        else:
            trainer.train()
        saved = load_file(tmp_path / folder / "checkpoint-3" / "adapter_model.safetensors")
        assert all("lora_" in name for name in saved)
        adapters.append(saved)
    support.assert_equal(*adapters, "adapters")


def test_texts_of_a_formatting_func_are_tokenized_to_their_end(llama, stream, tmp_path):
    rows = datasets.Dataset.from_list([{"q": "what colour", "a": "blue"}])
    tokenizer = make_tokenizer()
    trainer = SSDTrainer(
        support.with_lora(stream(llama)),
        arguments(SSDConfig, tmp_path),
        CausalCollator(0),
        rows,
        processing_class=tokenizer,
        formatting_func=lambda row: f"{row['q']}? {row['a']}",
    )
    (row,) = trainer.train_dataset
    assert tokenizer.decode(row["input_ids"]) == "what colour? blue<|im_end|>"
    assert row["labels"] == row["input_ids"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"torch_compile": True}, "torch_compile is not supported"),
        ({"bf16_full_eval": True}, "bf16_full_eval is not supported"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size is not supported"),
        (
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
            "gradient_accumulation_steps=6",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_streaming_cannot_honour_is_refused(given, said, llama, stream, tmp_path):
    model = support.with_lora(stream(llama, micro_batch_size=2))
    with pytest.raises(TrainerError) as caught:
        SSDTrainer(model, arguments(SSDConfig, tmp_path, **given), CausalCollator(0), make_rows())
    assert said in str(caught.value)


def test_a_model_without_an_adapter_has_nothing_to_train(llama, stream, tmp_path):
    with pytest.raises(TrainerError, match="nothing to train"):
        SSDTrainer(stream(llama), arguments(SSDConfig, tmp_path), CausalCollator(0), make_rows())


# ------------------------------------------------------------------ several processes

TWO_PROCESSES = """
    import sys
    import support, test_trainer as t, torch
    from ssdtune.data import CausalCollator
    from ssdtune.trainer import SSDConfig, SSDTrainer
    from transformers import Trainer, TrainingArguments
    from pathlib import Path

    folder, out, find_unused = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "find_unused"
    rest = {"data_collator": CausalCollator(0), "train_dataset": t.make_rows(26)}
    rest["eval_dataset"] = t.make_rows(11, seed=5)  # the last batch is short, and filled up
    more = {"ddp_backend": "gloo", "ddp_find_unused_parameters": find_unused}
    more |= {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 2}
    saved = {}
    for name in ("plain", "streamed"):
        kind, trainer, model = (
            (TrainingArguments, Trainer, t.in_memory(folder)) if name == "plain" else
            (SSDConfig, SSDTrainer, support.with_lora(support.streamed(folder)))
        )
        made = trainer(model, t.arguments(kind, out / name, **more), **rest)
        assert made.args.world_size == 2
        made.train()
        saved[name] = {"logs": t.logs(made), "weights": support.weights(made.model)}
        saved[name]["epoch"] = made.state.epoch
    model.ssdtune.close()
    torch.save(saved, out / f"rank{made.args.process_index}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain_ddp", "find_unused"])
def test_two_processes_equal_their_twin_in_memory_to_rounding(mode, llama, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(textwrap.dedent(TWO_PROCESSES))
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here}:{here.parent}", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
    ]
    done = subprocess.run(
        [*command, str(script), str(llama), str(tmp_path), mode],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    support.assert_equal(
        ranks[0]["streamed"]["weights"], ranks[1]["streamed"]["weights"], "weights of two ranks"
    )
    plain, ours = ranks[0]["plain"], ranks[0]["streamed"]
    support.assert_equal(plain["weights"], ours["weights"], "weights", rounding=1e-4)
    assert len(plain["logs"]) == len(ours["logs"]) == 3 + 1
    for a, b in zip(plain["logs"], ours["logs"], strict=True):
        assert a.keys() == b.keys()
        for key in {"loss", "grad_norm", "eval_loss"} & a.keys():
            assert b[key] == pytest.approx(a[key], rel=1e-5)
