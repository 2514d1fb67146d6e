"""The loops people write around a model work on a streamed one, with the results of memory.

A bare loop, accelerate, transformers' Trainer, TRL's SFTTrainer, generation; what happens when
something fails in the middle; what a step leaves behind.
"""

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from support import (
    ROUNDING,
    Pair,
    assert_same_gradients,
    assert_same_training,
    assert_same_weights,
    cut,
    digests,
    make_pair,
    num_items,
    num_misses,
    trained,
    with_lora,
)

import ssdtune
from ssdtune.errors import SSDTuneError
from ssdtune.schedule import trace
from ssdtune.schedule.plan import Kind

Stream = Callable[..., Any]


def batch(step: int = 0, name: str = "llama") -> dict[str, torch.Tensor]:
    return tiny_models.batch(name, 8, seed=step)


# ------------------------------------------------------------------ bare and accelerate


def test_a_bare_loop_trains(tmp_path: Path) -> None:
    """`model(**batch).loss.backward()`, nothing else: the loss falls, the files stay as they are."""
    tiny_models.save(tiny_models.build("llama"), tmp_path)
    before = digests(tmp_path)
    base = ssdtune.stream(tmp_path, offload={"ram": "2MB"}, micro_batch_size=2)
    model = with_lora(base)
    optimizer = torch.optim.AdamW([p for _, p in trained(model)], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    base.ssdtune.close()  # type: ignore[union-attr]
    assert losses[-1] < losses[0] - 0.5
    assert digests(tmp_path) == before


@pytest.fixture
def accelerate_state() -> Iterator[None]:
    """accelerate keeps its settings for the process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.mark.usefixtures("accelerate_state")
def test_an_accelerate_loop_in_bf16_equals(tmp_path: Path, stream: Stream) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # another test's, of other precision
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    pair = make_pair("qwen3", tmp_path, stream)
    sides = []
    for model in pair.models:
        optimizer = torch.optim.AdamW([p for _, p in trained(model)], lr=1e-2)
        sides.append(accelerator.prepare(model, optimizer))
    (plain, plain_optimizer), (streamed, optimizer) = sides
    for step in range(3):
        items = num_items([batch(step)])
        expected = torch.zeros(())
        for piece in cut(batch(step), 4):
            loss = plain(**piece, num_items_in_batch=items).loss
            accelerator.backward(loss)
            expected = expected + loss.detach()
        loss = streamed(**batch(step), num_items_in_batch=items).loss
        accelerator.backward(loss)
        assert torch.equal(loss.detach(), expected)
        assert_same_gradients(pair)
        for each, model in ((plain_optimizer, plain), (optimizer, streamed)):
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            each.step()
            each.zero_grad()
    assert_same_weights(pair)


# ------------------------------------------------------------------ Trainer, SFTTrainer


def rows(count: int = 24, length: int = 17) -> Any:
    """A data set of single rows."""
    made = tiny_models.batch("llama", count, length)
    return [{key: value[i] for key, value in made.items()} for i in range(count)]


def fit(model: Any, folder: Path, *, rows_at_once: int, accumulated: int, **more: Any) -> list[Any]:
    """(loss, gradient norm) of three steps of transformers' own Trainer."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=rows_at_once,
        gradient_accumulation_steps=accumulated,
        max_steps=3,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=5,
        **more,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows())
    trainer.train()
    return [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]


@pytest.mark.usefixtures("accelerate_state")
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16 autocast"])
def test_a_plain_trainer_with_8_cut_in_4_equals_2_with_4_accumulated(
    bf16: bool, tmp_path: Path, stream: Stream
) -> None:
    pair = make_pair("llama", tmp_path / "model", stream)
    plain = fit(pair.plain, tmp_path / "a", rows_at_once=2, accumulated=4, bf16=bf16)
    streamed = fit(pair.streamed, tmp_path / "b", rows_at_once=8, accumulated=1, bf16=bf16)
    assert len(plain) == 3
    assert streamed == plain
    assert_same_weights(pair)


@pytest.mark.usefixtures("accelerate_state")
@pytest.mark.parametrize(
    "more",
    [{"gradient_checkpointing": True}, {"label_smoothing_factor": 0.1}],
    ids=lambda m: next(iter(m)),
)
def test_options_of_the_trainer_work(more: dict[str, Any], tmp_path: Path, stream: Stream) -> None:
    """Checkpointing is ours already; label smoothing reads the joined logits (to rounding)."""
    pair = make_pair("llama", tmp_path / "model", stream)
    fit(pair.plain, tmp_path / "a", rows_at_once=8, accumulated=1, **more)
    fit(pair.streamed, tmp_path / "b", rows_at_once=8, accumulated=1, **more)
    assert_same_weights(pair, rounding=1e-2)


@pytest.mark.usefixtures("accelerate_state")
def test_the_trainer_evaluates_a_streamed_model(tmp_path: Path, stream: Stream) -> None:
    from transformers import Trainer, TrainingArguments

    pair = make_pair("llama", tmp_path / "model", stream)
    found = []
    for model in pair.models:
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "out"),
            per_device_eval_batch_size=8,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, eval_dataset=rows())
        found.append(trainer.evaluate()["eval_loss"])
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def tiny_tokenizer() -> Any:
    """Words w0 … w198, each a token: TRL wants a tokenizer even for tokenized rows."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(tiny_models.VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w3"
    )


@pytest.mark.usefixtures("accelerate_state")
@pytest.mark.parametrize(
    ("loss_type", "is_even"),
    [("nll", False), ("chunked_nll", False), ("nll", True)],
    ids=["nll", "chunked_nll", "nll, rows of one length"],
)
def test_trl_sft_equals_its_twin_in_memory(
    loss_type: str, is_even: bool, tmp_path: Path, stream: Stream
) -> None:
    """TRL takes head and loss into its own hands. Weights to rounding, as rows are padded to other lengths; bits where
    all have one length. Losses to rounding: TRL adds up all rows of the streamed batch in one sum."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    if is_even:
        texts = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows()])
    else:
        words = [[f"w{token}" for token in row["input_ids"].tolist()] for row in rows()]
        texts = Dataset.from_list(
            [{"text": " ".join(line[: 6 + i % 11])} for i, line in enumerate(words)]
        )
    pair = make_pair("llama", tmp_path / "model", stream)
    logs = []
    for model, rows_at_once in ((pair.plain, 2), (pair.streamed, 8)):
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=rows_at_once,
            gradient_accumulation_steps=8 // rows_at_once,
            max_steps=3,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            max_length=32,
            loss_type=loss_type,
        )
        trainer = trl.SFTTrainer(
            model=model, args=arguments, train_dataset=texts, processing_class=tiny_tokenizer()
        )
        trainer.train()
        logs.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert len(logs[0]) == 3
    assert logs[1] == pytest.approx(logs[0], rel=1e-6 if is_even else 1e-5)
    assert_same_weights(pair, rounding=None if is_even else 1e-3)


def test_checkpointing_underneath_is_no_third_forward(tmp_path: Path, stream: Stream) -> None:
    tiny_models.save(tiny_models.build("llama"), tmp_path)
    model = with_lora(stream(tmp_path))
    model.gradient_checkpointing_enable()
    calls = []
    layer = model.get_base_model().model.layers[1]
    layer.mlp.register_forward_hook(lambda *_: calls.append(1))
    model(**batch()).loss.backward()
    assert len(calls) == 8  # 4 micro-batches, forward and recompute


# ------------------------------------------------------------------ generation, evaluation


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mixtral", "mamba2", "bart"])
def test_generation_gives_the_same_tokens(name: str, tmp_path: Path, stream: Stream) -> None:
    """Greedy, beams and left-padded prompts of different lengths."""
    pair = make_pair(name, tmp_path, stream)
    prompts = tiny_models.batch(name, 3, 9)
    padded = {key: prompts[key].clone() for key in ("input_ids", "attention_mask")}
    if name not in tiny_models.SEQ2SEQ:
        for row, pad in enumerate((0, 2, 5)):
            padded["input_ids"][row, :pad] = 0
            padded["attention_mask"][row, :pad] = 0
    for options in ({}, {"num_beams": 3}, {"do_sample": True}, {"use_cache": False}):
        answers = []
        for model in pair.models:
            torch.manual_seed(11)
            answers.append(
                model.eval().generate(
                    **padded, max_new_tokens=6, pad_token_id=0, **{"use_cache": True, **options}
                )
            )
        assert torch.equal(*answers), options
        assert answers[0].shape[1] > 1


def test_every_token_reads_the_model_once(tmp_path: Path, stream: Stream) -> None:
    """As planned: the logits too, which are computed when generation reads them."""
    pair = make_pair("llama", tmp_path, stream)
    prompt = tiny_models.batch("llama", 3, 9)["input_ids"]
    pair.streamed.eval().generate(prompt, max_new_tokens=6, min_new_tokens=6, use_cache=True)
    assert num_misses(pair.engine) == 0
    for ops in list(trace.steps(pair.engine.trace).values())[-3:-1]:
        read = [op.block for op in ops if op.kind is Kind.LOAD]
        assert sorted(read) == sorted(block.name for block in pair.engine.plan.blocks)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart"])
def test_logits_may_be_read_after_the_run(name: str, tmp_path: Path, stream: Stream) -> None:
    """A loss of one's own, logits between steps: they bring the head in outside of any run."""
    pair = make_pair(name, tmp_path, stream)
    for step in range(3):
        inputs = batch(step, name)
        labels = inputs.pop("labels")
        with torch.no_grad():
            expected = torch.cat(
                [pair.plain(**x, labels=y).logits for x, y in pieces(inputs, labels)]
            )
            assert torch.equal(pair.streamed(**inputs, labels=labels).logits, expected)
        for x, y in pieces(inputs, labels):
            own_loss(pair.plain(**x, labels=y).logits, y).backward()
        logits = pair.streamed(**inputs, labels=labels).logits
        (own_loss(logits, labels) * 4).backward()
        assert_same_gradients(pair, rounding=ROUNDING[torch.float32])


def pieces(inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> Any:
    return zip(cut(inputs, 4), labels.chunk(4), strict=True)


def own_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("name", ["llama", "gemma3n", "deepseek_v3", "gemma3_vlm", "t5"])
def test_evaluation_gives_the_same_logits(name: str, tmp_path: Path, stream: Stream) -> None:
    pair = make_pair(name, tmp_path, stream)
    with torch.no_grad():
        expected = [pair.plain.eval()(**piece) for piece in cut(batch(name=name), 4)]
        got = pair.streamed.eval()(**batch(name=name))
    assert torch.equal(got.logits, torch.cat([output.logits for output in expected]))


# ------------------------------------------------------------------ failures


class Trouble(Exception):
    """Raised by a model's own code."""


def fail_once(
    module: torch.nn.Module, *, at_call: int, error: Callable[[], BaseException] = Trouble
) -> None:
    """The module raises at its at_call-th call from now on, counted from 0, and never again."""
    plain, calls = module.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == at_call + 1:
            raise error()
        return plain(*args, **kwargs)

    module.forward = forward  # type: ignore[method-assign]


def layer_of(pair: Pair, index: int) -> Any:
    return pair.streamed.get_base_model().model.layers[index]


def test_a_failing_micro_batch_is_named_and_the_model_lives_on(
    tmp_path: Path, stream: Stream
) -> None:
    """Twice in a row. Micro-batches pass in descending order: the second to pass layer 2 is no. 2."""
    pair = make_pair("llama", tmp_path, stream)
    for _ in range(2):
        fail_once(layer_of(pair, 2).mlp, at_call=1, error=lambda: Trouble("no good"))
        with pytest.raises(Trouble, match="no good") as caught:
            pair.streamed(**batch())
        (note,) = caught.value.__notes__
        assert "micro-batch 2 of 4" in note
        assert "model.layers.2" in note
        assert not pair.streamed.get_base_model().ssdtune.is_running
    assert_same_training(pair, [batch(step) for step in range(2)])


def test_an_error_before_the_first_block_says_so(tmp_path: Path, stream: Stream) -> None:
    pair = make_pair("llama", tmp_path, stream)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds") as caught:
        pair.streamed(labels=batch()["labels"])
    assert "before its first block" in caught.value.__notes__[0]
    assert_same_training(pair, [batch()])


def test_the_others_are_unwound(tmp_path: Path, stream: Stream) -> None:
    """Code that waits in a `try … finally` of another micro-batch gets to its `finally`."""
    pair = make_pair("llama", tmp_path, stream)
    decoder = pair.streamed.get_base_model().model
    plain, ended = decoder.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        try:
            return plain(*args, **kwargs)
        finally:
            ended.append(int(kwargs["input_ids"][0, 0]))

    decoder.forward = forward
    fail_once(layer_of(pair, 1).mlp, at_call=0)
    with pytest.raises(Trouble):
        pair.streamed(**batch())
    assert sorted(ended) == sorted(batch()["input_ids"][::2, 0].tolist())
    decoder.forward = plain
    assert_same_training(pair, [batch()])


def test_an_interrupt_leaves_the_model_usable(tmp_path: Path, stream: Stream) -> None:
    pair = make_pair("llama", tmp_path, stream)
    fail_once(layer_of(pair, 2).mlp, at_call=2, error=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        pair.streamed(**batch())
    assert_same_training(pair, [batch()])


def run_steps(model: Any, num_steps: int) -> None:
    for step in range(num_steps):
        model(**batch(step)).loss.backward()


@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_a_failing_recompute_leaves_the_model_usable(
    factor: float, tmp_path: Path, stream: Stream
) -> None:
    """An error in backward, after 4 forwards through the layer."""
    pair = make_pair("llama", tmp_path, stream, factor=factor)
    for _ in range(2):
        fail_once(layer_of(pair, 1).mlp, at_call=5, error=lambda: Trouble("in backward"))
        loss = pair.streamed(**batch()).loss
        with pytest.raises(Trouble, match="in backward"):
            loss.backward()
        pair.streamed.zero_grad()
    with torch.no_grad():
        pair.streamed(**batch())
    assert_same_training(pair, [batch(step) for step in range(2)])


def test_a_shard_that_shrinks_under_the_run_is_named(tmp_path: Path, stream: Stream) -> None:
    """The block that could not be read and its file; whole again, the file can be trained from."""
    pair = make_pair("llama", tmp_path, stream)
    assert_same_training(pair, [batch()])
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    contents = {shard: shard.read_bytes() for shard in shards}
    for shard in shards:
        with shard.open("r+b") as file:
            file.truncate(1000)
    for _ in range(2):
        with pytest.raises(SSDTuneError) as caught:
            run_steps(pair.streamed, 3)
        message = " ".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
        assert any(shard.name in message for shard in shards), message
        assert any(name in message for name in pair.streamed.get_base_model().ssdtune.blocks), (
            message
        )
    for shard, content in contents.items():
        with shard.open("r+b") as file:
            file.write(content)
    pair.streamed.zero_grad()
    assert_same_training(pair, [batch(step) for step in range(2)])


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.half(),
        lambda model: model.to(torch.bfloat16),
        lambda model: model.get_base_model().save_pretrained("nowhere"),
    ],
    ids=["half", "to(bfloat16)", "save_pretrained"],
)
def test_what_would_touch_the_base_weights_is_refused(
    change: Callable[[Any], Any], tmp_path: Path, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_pair("llama", tmp_path / "model", stream)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SSDTuneError):
        change(pair.streamed)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert_same_training(pair, [batch()])


def test_moving_to_where_it_is_does_nothing(tmp_path: Path, stream: Stream) -> None:
    pair = make_pair("llama", tmp_path, stream)
    pair.streamed.to("cpu").to(torch.float32).cpu()
    assert_same_training(pair, [batch()])


# ------------------------------------------------------------------ what a step leaves behind


def watch_inputs(pair: Pair) -> list[weakref.ref[torch.Tensor]]:
    """References to every hidden state that enters a layer from now on."""
    seen: list[weakref.ref[torch.Tensor]] = []
    for layer in pair.streamed.get_base_model().model.layers:
        layer.register_forward_pre_hook(lambda _module, args: seen.append(weakref.ref(args[0])))
    return seen


def num_alive(seen: list[weakref.ref[torch.Tensor]]) -> int:
    return sum(reference() is not None for reference in seen)


def test_no_block_input_outlives_backward(tmp_path: Path, stream: Stream) -> None:
    """Not while the loss is held, and without the help of the garbage collector."""
    pair = make_pair("llama", tmp_path, stream)
    pair.streamed(**batch()).loss.backward()
    gc.collect()
    gc.disable()
    try:
        seen = watch_inputs(pair)
        output = pair.streamed(**batch())
        assert len(seen) == 16
        assert num_alive(seen) == 16  # kept for backward
        output.loss.backward()
        assert num_alive(seen) == 0
        assert output.loss is not None
    finally:
        gc.enable()


def test_block_inputs_go_as_backward_comes(tmp_path: Path, stream: Stream) -> None:
    """When layer 0 is recomputed, the inputs of layers 2 and 3 are gone."""
    pair = make_pair("llama", tmp_path, stream)
    seen = watch_inputs(pair)
    alive: list[int] = []
    first = layer_of(pair, 0).mlp
    output = pair.streamed(**batch())
    first.register_forward_hook(lambda *_: alive.append(num_alive(seen[8:])))
    output.loss.backward()
    assert alive == [0, 0, 0, 0]


def test_evaluation_keeps_no_block_input(tmp_path: Path, stream: Stream) -> None:
    pair = make_pair("llama", tmp_path, stream)
    seen = watch_inputs(pair)
    with torch.no_grad():
        output = pair.streamed(**batch())
    gc.collect()
    assert len(seen) == 16
    assert num_alive(seen) == 0
    assert output.loss is not None


def test_a_failed_step_keeps_no_block_input(tmp_path: Path, stream: Stream) -> None:
    pair = make_pair("llama", tmp_path, stream)
    seen = watch_inputs(pair)
    fail_once(layer_of(pair, 3).mlp, at_call=1)
    with pytest.raises(Trouble):
        pair.streamed(**batch())
    gc.collect()
    assert seen
    assert num_alive(seen) == 0


def test_weights_outside_their_visits_are_placeholders(tmp_path: Path, stream: Stream) -> None:
    """No module holds a view of a slot between steps: its content would change under it."""
    from ssdtune.visit.placeholder import Placeholder

    pair = make_pair("gpt2", tmp_path, stream)
    for run in (lambda: None, lambda: pair.streamed(**batch(name="gpt2")).loss.backward()):
        run()
        base = pair.streamed.get_base_model()
        frozen = [p for p in base.transformer.h.parameters() if not p.requires_grad]
        assert frozen
        assert all(isinstance(p, Placeholder) for p in frozen)


def test_a_head_that_late_logits_brought_in_is_out_when_a_step_begins(
    tmp_path: Path, stream: Stream
) -> None:
    """Its slot is filled with another block as soon as the next step has begun."""
    from ssdtune.visit.placeholder import Placeholder

    base = make_pair("llama", tmp_path, stream).streamed.get_base_model()
    with torch.no_grad():
        inputs = {"input_ids": batch()["input_ids"]}
        first = base(**inputs).logits.argmax(-1)
        seen = []
        base.model.register_forward_pre_hook(lambda *_: seen.append(base.lm_head.weight))
        assert torch.equal(base(**inputs).logits.argmax(-1), first)
    assert seen
    assert all(isinstance(weight, Placeholder) for weight in seen)


def test_reading_a_weight_between_steps_gives_the_files_values(
    tmp_path: Path, stream: Stream
) -> None:
    pair = make_pair("llama", tmp_path, stream)
    pair.streamed(**batch()).loss.backward()
    expected = dict(pair.plain.named_parameters())
    for name, parameter in pair.streamed.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter + 0, expected[name]), name
