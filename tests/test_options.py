"""Rows with a label: put into words, trained as a choice among options, by gradients and without, accuracy told."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import tiny_runs
import torch
from support import streamed, with_lora
from tiny_runs import in_order, make_tokenizer, write_rows
from tokenizers import normalizers
from torch.nn import functional as F

from ssdtune.config import ConfigError, load_config, to_yaml
from ssdtune.data import DataError, OptionsCollator, load_dataset_rows, preview, tokenize_rows
from ssdtune.trainer import SSDConfig, SSDTrainer, ZOTrainer, train_from_config
from ssdtune.trainer.options import option_scores
from ssdtune.zeroth_order import MeZO
from ssdtune.zeroth_order.rules import Term

TEMPLATE = "{text} It was {label}"
WORDS = {"0": "terrible", "1": "great"}
LONG_WORDS = {"no": "not blue at all", "yes": "blue", "perhaps": "blue at times"}
YAML = """
model_name_or_path: {model}
dataset: [{{path: {data}, template: "{{text}} It was {{label}}", label_words: {{0: terrible, 1: great}}}}]
eval_dataset: [{{path: {data}, template: "{{text}} It was {{label}}", label_words: {{0: terrible, 1: great}}}}]
output_dir: {output}
method: {method}
lora_r: 4
per_device_train_batch_size: 4
gradient_accumulation_steps: 2
max_steps: {steps}
learning_rate: 3.0e-3
lr_scheduler_type: constant
eval_strategy: steps
eval_steps: {steps}
eval_on_start: true
save_strategy: "no"
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.save(tiny_runs.llama(), tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    texts = ("the sky is blue and bright", "the grass is grey")
    rows = [{"text": texts[k % 2] + " now" * (k % 3) + " ", "label": 1 - k % 2} for k in range(16)]
    return write_rows(tmp_path / "rows.jsonl", rows)


def tokenized(path: Path, words: dict[str, str] = WORDS, **options: Any) -> Any:
    spec = {"path": str(path), "template": TEMPLATE, "label_words": words}
    return tokenize_rows(load_dataset_rows(spec), make_tokenizer(), **options)


# ------------------------------------------------------------------ rows


def test_a_row_becomes_a_text_for_each_label(data: Path) -> None:
    tokenizer, found = make_tokenizer(), tokenized(data)
    row = found.dataset[1]
    texts = [tokenizer.decode(ids) for ids in row["options"]]
    assert texts == [f"the grass is grey now It was {word}" for word in WORDS.values()]
    for ids, length, word in zip(
        row["options"], row["option_lengths"], WORDS.values(), strict=True
    ):
        assert tokenizer.decode(ids[-length:]) == f" {word}"
        prompt = tokenizer("the grass is grey now It was")["input_ids"]
        assert ids[: len(ids) - length] == prompt, "as the prompt alone is cut into tokens"
    assert row["label"] == 0
    assert row["input_ids"] == row["options"][0]
    assert preview(found, tokenizer, row_idx=1).endswith("was【 terrible】")
    assert found.num_options == 2


def test_what_follows_the_label_belongs_to_the_option(data: Path) -> None:
    spec = {"path": str(data), "template": "{text}: {label}, so {text}", "label_words": WORDS}
    tokenizer = make_tokenizer()
    row = tokenize_rows(load_dataset_rows(spec), tokenizer).dataset[1]
    option = row["options"][1][-row["option_lengths"][1] :]
    assert tokenizer.decode(option) == " great, so the grass is grey now"


def test_a_long_row_loses_its_beginning(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "grey " * 40, "label": "1"}])
    tokenizer: Any = make_tokenizer(bos=True)
    spec = {"path": str(path), "template": TEMPLATE, "label_words": WORDS}
    rows = load_dataset_rows(spec)
    found = tokenize_rows(rows, tokenizer, max_length=20)
    for ids, word in zip(found.dataset[0]["options"], WORDS.values(), strict=True):
        assert len(ids) <= 20
        assert tokenizer.decode(ids).startswith("<s>")
        assert tokenizer.decode(ids).endswith(f"It was {word}")
    assert found.stats.num_cut == 1
    with pytest.raises(DataError, match="none has a token"):
        tokenize_rows(rows, tokenizer, max_length=20, overlong="drop")
    with pytest.raises(DataError, match=r"line 1: an option has \d+ tokens, and max_length is 3"):
        tokenize_rows(rows, tokenizer, max_length=3)


@pytest.mark.parametrize(
    ("template", "words", "row", "told"),
    [
        ("{text} {label} {label}", WORDS, {}, "needs {label} once"),
        ("{text!r} {label}", WORDS, {}, "more than the name of a field"),
        ("{text.x} {label}", WORDS, {}, "more than the name of a field"),
        ("{text {label}", WORDS, {}, "can't read"),
        ("{film} {label}", WORDS, {}, "no field 'film'"),
        ("{label}", WORDS, {}, "nothing before {label}"),
        (TEMPLATE, {"0": "bad"}, {}, "two labels or more"),
        (TEMPLATE, {"0": "bad", "1": "good", "2": "bad"}, {}, "0 and 2 are both 'bad'"),
        (TEMPLATE, {"0": "bad", "1": " "}, {}, "1 has no words"),
        (TEMPLATE, {"0": "", "1": "good"}, {}, "0 has no words"),
        (TEMPLATE, None, {}, "label_words is not given"),
        (TEMPLATE, WORDS, {"label": 2}, "line 1: label is '2', and label_words has 0, 1"),
        (TEMPLATE, WORDS, {"label": None}, "no field 'label'"),
    ],
)
def test_what_can_not_be_put_into_words_is_said(
    template: str, words: Any, row: dict[str, Any], told: str, tmp_path: Path
) -> None:
    rows = [{"text": "a film", "label": 0, **row}, {"text": "a film", "label": 1}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    spec = {"path": str(path), "template": template, "label_words": words}
    with pytest.raises(DataError) as error:
        tokenize_rows(load_dataset_rows(spec), make_tokenizer())
    assert told in str(error.value)


def test_words_that_a_tokenizer_does_not_tell_apart_are_refused(data: Path) -> None:
    spec = {"path": str(data), "template": TEMPLATE, "label_words": {"0": "Grey", "1": "grey"}}
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(DataError, match="line 1: two labels have the same tokens"):
        tokenize_rows(load_dataset_rows(spec), tokenizer)


def test_a_mixture_with_texts_is_refused(data: Path) -> None:
    spec = {"path": str(data), "template": TEMPLATE, "label_words": WORDS}
    rows = [load_dataset_rows(spec), load_dataset_rows(str(data))]
    with pytest.raises(DataError, match="different numbers of label_words"):
        tokenize_rows(rows, make_tokenizer())


# ------------------------------------------------------------------ scores


def test_texts_that_are_the_same_are_one_sequence() -> None:
    collate = OptionsCollator(0, 2, 1)
    row = {"options": [[5, 6, 7], [5, 6, 8]], "option_lengths": [1, 1], "label": 1}
    batch = collate([row, {**row, "options": [[9, 7], [9, 8]], "label": 0}])
    assert batch["input_ids"].tolist() == [[5, 6], [9, 0]]
    assert batch["logits_to_keep"].tolist() == [0, 1]
    assert batch["picks"].tolist() == [
        [0, 1, 7, 0, 0],
        [0, 1, 8, 1, 0],
        [1, 0, 7, 2, 0],
        [1, 0, 8, 3, 0],
    ]
    assert batch["labels"].tolist() == [1, 0]


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "mamba2"])
def test_scores_are_mean_log_probabilities_of_the_options(name: str, tmp_path: Path) -> None:
    """Each text by itself, as the authors' code evaluates, to rounding: padding and batches round otherwise."""
    model: Any = tiny_models.build(name).eval()
    rows = [
        {"text": "the sky is blue", "label": "yes"},
        {"text": "rain", "label": "no"},
        {"text": "the sky is grey today", "label": "perhaps"},
    ]
    found = tokenized(write_rows(tmp_path / "rows.jsonl", rows), LONG_WORDS)
    size = model.config.vocab_size
    clipped = [
        {**row, "options": [[t % size for t in ids] for ids in row["options"]]}
        for row in found.dataset
    ]
    batch = found.collator(0)(clipped)
    assert found.sequences_per_row == 3
    with torch.no_grad():
        scores = option_scores(model, batch)
        for k, row in enumerate(clipped):
            for o, (ids, length) in enumerate(
                zip(row["options"], row["option_lengths"], strict=True)
            ):
                logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
                told = logits[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
                assert scores[k, o].item() == pytest.approx(told[-length:].mean().item(), rel=1e-4)


# ------------------------------------------------------------------ training


def micro_batches(data: Path, words: dict[str, str]) -> list[dict[str, torch.Tensor]]:
    found = tokenized(data, words)
    collate = found.collator(0)
    return [collate([found.dataset[k] for k in range(i, i + 4)]) for i in range(0, 16, 4)]


def plain_loss(model: Any, batch: dict[str, torch.Tensor], num_rows: int) -> torch.Tensor:
    """The published loss on the same sequences, in memory, pick by pick."""
    kept = batch["logits_to_keep"]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    found = model(**inputs, logits_to_keep=kept).logits
    sequence, position, token, option, place = batch["picks"].T
    probabilities = found[sequence, position].log_softmax(-1)
    picked = probabilities.gather(1, token[:, None])[:, 0]
    table = torch.zeros(int(option.max()) + 1, int(place.max()) + 1)
    scores = table.index_put((option, place), picked).sum(1) / torch.bincount(option)
    scores = scores.view(len(batch["labels"]), -1)
    return F.cross_entropy(scores, batch["labels"], reduction="sum") / num_rows


def arguments(folder: Path, **more: Any) -> SSDConfig:
    more |= {"per_device_train_batch_size": 4, "data_seed": 0, "max_grad_norm": 0.0}
    return tiny_runs.arguments(folder, logging_steps=1, **more)


@pytest.mark.parametrize("words", [WORDS, {"0": "grey at last", "1": "blue"}])
def test_gradients_train_the_choice_as_in_memory(
    words: dict[str, str], model: Path, data: Path, tmp_path: Path
) -> None:
    plain = with_lora(tiny_models.auto_class("llama").from_pretrained(model))
    adapted = with_lora(streamed(model, micro_batch_size=None))
    found = tokenized(data, words)
    trainer = in_order(
        SSDTrainer(
            adapted,
            arguments(tmp_path, optim="sgd"),
            found.collator(0),
            train_dataset=found.dataset,
        )
    )
    trainer.train()
    batches = micro_batches(data, words)
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=1e-2)
    for step in range(2):
        for batch in batches[2 * step : 2 * step + 2]:
            plain_loss(plain, batch, 8).backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.get_base_model().ssdtune.close()
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, trained[name]), name


def test_losses_alone_train_the_choice_as_in_memory(
    model: Path, data: Path, tmp_path: Path
) -> None:
    """Losses of all variants of a first step, of micro-batches that have other sizes at the end of an epoch too."""
    plain = tiny_models.auto_class("llama").from_pretrained(model).eval()
    base: Any = streamed(model, micro_batch_size=None)
    found = tokenized(data)
    trainer = in_order(
        ZOTrainer(
            base,
            arguments(tmp_path),
            found.collator(0),
            train_dataset=found.dataset.select(range(6)),
            eval_dataset=found.dataset,
            estimator=MeZO(eps=1e-2),
        )
    )
    trainer.args.max_steps = 1
    trainer.train()
    collate = found.collator(0)
    parts = [collate([found.dataset[k] for k in ks]) for ks in (range(4), range(4, 6))]
    directions = trainer.method.weights.directions
    base_values = {n: p.clone() for n, p in plain.named_parameters()}
    losses = []
    for scale in (1e-2, -1e-2):
        for name, parameter in plain.named_parameters():
            directions.make(parameter.data, base_values[name], name, Term(0, 0, scale))
        with torch.no_grad():
            losses.append(sum(float(plain_loss(plain, part, 6)) for part in parts))
    base.ssdtune.close()
    assert trainer.last_step is not None
    assert list(trainer.last_step.losses) == losses


@pytest.mark.parametrize("method", ["lora", "zo"])
def test_accuracy_is_told(
    method: str, model: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    steps = 40 if method == "lora" else 2
    content = YAML.format(
        model=model, data=data, output=tmp_path / "run", method=method, steps=steps
    )
    path.write_text(content)
    result = train_from_config(load_config(path))
    told = capfd.readouterr()
    assert "% right @" in told.out + told.err
    assert "accuracy" in told.out + told.err
    assert 0 <= result.metrics["eval_accuracy"] <= 1
    if method == "lora":
        assert result.metrics["eval_accuracy"] == 1.0, "two kinds of rows are told apart"
        assert result.metrics["eval_loss"] < result.metrics["eval_loss_first"]


# ------------------------------------------------------------------ keys


def test_the_keys_come_back_from_a_written_configuration(
    model: Path, data: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(YAML.format(model=model, data=data, output=tmp_path, method="zo", steps=1))
    config = load_config(path).config
    assert config.dataset[0].label_words == (("0", "terrible"), ("1", "great"))
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert load_config(again).config == config


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ('template: "{label}"', "template and label_words go together"),
        ("label_words: {0: a, 1: b}", "template and label_words go together"),
        ("template: nothing, label_words: {0: a}", "template: got 'nothing'"),
        ('template: "{label}", label_words: [a, b]', "label_words: got"),
        ('template: "{label}", label_words: {0: [a]}', "label_words: got a list for 0"),
    ],
)
def test_keys_that_are_wrong_are_named(given: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model_name_or_path: m\noutput_dir: o\ndataset: [{{path: a.jsonl, {given}}}]\n"
    )
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert told in str(error.value)
