"""Rows to labels: every answer trained exactly, every loss counted, every error with its place."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
import torch
from tiny_runs import CHATML, make_tokenizer

from ssdtune.data import (
    CausalCollator,
    DataError,
    choose_pad_token,
    load_dataset_rows,
    preview,
    tokenize_rows,
)
from ssdtune.data.formats import FORMATS, to_sample
from ssdtune.data.splits import parse_split

MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED_WITHOUT_END = MARKED.replace(
    "<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"
)
TRIMMING = CHATML.replace("{{ message['content'] }}", "{{ message['content'] | trim }}")
# As Qwen3: only the last answer carries an empty thought.
LAST_DIFFERS = CHATML.replace(
    "{{ message['content'] }}",
    "{% if loop.last and message['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message['content'] }}",
)
# As gpt-oss: the last answer ends with another token.
LAST_RETURNS = CHATML.replace(
    "<|im_end|>\n{% endfor %}",
    "{% if loop.last and message['role'] == 'assistant' %}<|return|>{% else %}<|im_end|>\n"
    "{% endif %}{% endfor %}",
)
# As reasoning models: the generation prompt opens a thought that the chats do not have.
OPENS_THOUGHT = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
NO_GENERATION_PROMPT = CHATML.split("{% if add_generation_prompt %}")[0]
# As Mistral 0.3: the system message moves to the last user turn.
MOVES_SYSTEM = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST]"
    "{% if loop.last or loop.index == messages | length - 1 %}be brief {% endif %}"
    "{{ message['content'] }}[/INST]{% else %}{{ message['content'] }}<|im_end|>{% endif %}{% endfor %}"
)
ALTERNATING = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML
)
NO_END_TOKEN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}" + (
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

TWO_TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "What colour is the sky?"},
    {"role": "assistant", "content": "It is blue."},
    {"role": "user", "content": "And the grass?"},
    {"role": "assistant", "content": "Green, çà et là 草 🌱."},
]
THREE_TURNS = [
    *TWO_TURNS,
    {"role": "user", "content": "Thanks!"},
    {"role": "assistant", "content": "  Any time.\n"},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(
        datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets-cache")
    )
    datasets.disable_progress_bars()


@pytest.fixture
def write(tmp_path):
    def write_rows(rows, name="rows.jsonl"):
        path = tmp_path / name
        if isinstance(rows, list):
            rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_bytes(rows if isinstance(rows, bytes) else rows.encode())
        return path

    return write_rows


def tokenize(path, tokenizer=None, split="train", format="auto", **options):
    rows = load_dataset_rows({"path": str(path), "split": split, "format": format})
    return tokenize_rows(rows, tokenizer or make_tokenizer(), **options)


def trained(tokenized, tokenizer=None, row_idx=0):
    """The trained runs of one row as text; checks that labels are the ids or -100."""
    tokenizer = tokenizer or make_tokenizer()
    row = tokenized.dataset[row_idx]
    runs, last = [], None
    for position, (token, label) in enumerate(zip(row["input_ids"], row["labels"], strict=True)):
        assert label in (-100, token)
        if label != -100:
            if last != position - 1:
                runs.append([])
            runs[-1].append(token)
            last = position
    return [tokenizer.decode(run) for run in runs]


def error_of(call, *args, **options):
    with pytest.raises(DataError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert len(message.splitlines()) <= 4, message
    return message


# ---- labels stand exactly on the answers ---------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, MARKED, LAST_DIFFERS, LAST_RETURNS, OPENS_THOUGHT])
@pytest.mark.parametrize("trim_offsets", [False, True])
def test_every_answer_of_a_chat_is_trained_with_its_end_token(write, template, trim_offsets):
    tokenizer = make_tokenizer(template, trim_offsets=trim_offsets)
    tokenized = tokenize(write([{"messages": TWO_TURNS}]), tokenizer)
    thought = "<think>\n\n</think>\n\n" if template == LAST_DIFFERS else ""
    end = "<|return|>" if template == LAST_RETURNS else "<|im_end|>"
    assert trained(tokenized, tokenizer) == [
        "It is blue.<|im_end|>",
        f"{thought}Green, çà et là 草 🌱.{end}",
    ]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_token_ids_of_a_chat_are_those_of_the_tokenizers_own_template(write, template):
    tokenizer = make_tokenizer(template, bos=True)
    tokenized = tokenize(write([{"messages": THREE_TURNS}]), tokenizer)
    want = tokenizer.apply_chat_template(THREE_TURNS, tokenize=True, return_dict=True)["input_ids"]
    assert tokenized.dataset[0]["input_ids"] == want


def test_white_space_that_a_template_trims_does_not_shift_labels(write):
    chat = [{"role": r, "content": f"  {r} said 草\n"} for r in ("user", "assistant") * 3]
    tokenizer = make_tokenizer(TRIMMING)
    tokenized = tokenize(write([{"messages": chat}]), tokenizer)
    assert trained(tokenized, tokenizer) == ["assistant said 草<|im_end|>"] * 3
    untrimmed = tokenize(write([{"messages": chat}]))
    assert trained(untrimmed) == ["  assistant said 草\n<|im_end|>"] * 3


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_train_on_last_is_the_last_answer_only(write, template):
    tokenizer = make_tokenizer(template)
    tokenized = tokenize(write([{"messages": TWO_TURNS}]), tokenizer, train_on="last")
    assert trained(tokenized, tokenizer) == ["Green, çà et là 草 🌱.<|im_end|>"]


def test_train_on_all_is_every_token_but_the_first(write):
    tokenized = tokenize(write([{"messages": TWO_TURNS}]), train_on="all")
    row = tokenized.dataset[0]
    assert row["labels"] == [-100, *row["input_ids"][1:]]
    assert tokenized.stats.num_trained_tokens == tokenized.stats.num_tokens - 1


def test_sharegpt_conversations_are_the_same_chat(write):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    rows = [
        {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in TWO_TURNS]}
    ]
    shared = tokenize(write(rows, "shared.jsonl"))
    plain = tokenize(write([{"messages": TWO_TURNS}]))
    assert shared.dataset[:] == plain.dataset[:]
    assert any("conversations" in note for note in shared.stats.notes)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_completion_of_messages_trains_no_answer_of_the_prompt(write, template):
    tokenizer = make_tokenizer(template)
    path = write([{"prompt": THREE_TURNS[:4], "completion": THREE_TURNS[4:5]}])
    assert trained(tokenize(path, tokenizer), tokenizer) == ["Green, çà et là 草 🌱.<|im_end|>"]
    every = tokenize(path, tokenizer, train_on="assistant")
    assert trained(every, tokenizer)[0] == "It is blue.<|im_end|>"


@pytest.mark.parametrize("bos", [False, True])
def test_plain_completion_is_trained_with_one_end_token(write, bos):
    tokenizer = make_tokenizer(bos=bos)
    path = write(
        [
            {"prompt": "the sky is", "completion": " blue 🌱"},
            {"prompt": "the grass is", "completion": " green<|im_end|>"},
        ]
    )
    tokenized = tokenize(path, tokenizer)
    assert trained(tokenized, tokenizer) == [" blue 🌱<|im_end|>"]
    assert trained(tokenized, tokenizer, 1) == [" green<|im_end|>"]
    assert (tokenizer.decode(tokenized.dataset[0]["input_ids"][:1]) == "<s>") == bos
    assert any("no chat template is applied" in note for note in tokenized.stats.notes)


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_white_space_at_the_end_of_a_completion_is_trained(write, trim_offsets):
    tokenizer = make_tokenizer(trim_offsets=trim_offsets)
    tokenized = tokenize(write([{"prompt": "Say:\n", "completion": "blue\n  "}]), tokenizer)
    assert trained(tokenized, tokenizer) == ["blue\n  <|im_end|>"]


def test_text_is_trained_whole_and_closed_by_one_end_token(write):
    tokenizer = make_tokenizer(bos=True)
    tokenized = tokenize(write([{"text": "the sky is blue"}, {"text": "é<|im_end|>"}]), tokenizer)
    assert trained(tokenized, tokenizer) == ["the sky is blue<|im_end|>"]  # <s> has no predecessor
    assert trained(tokenized, tokenizer, 1) == ["é<|im_end|>"]


ALPACA = {"instruction": "Name the colour.", "input": "the sky", "output": "blue"}


def test_alpaca_becomes_turns_where_there_is_a_template_and_says_so(write):
    path = write([ALPACA, {**ALPACA, "input": None}])
    tokenized = tokenize(path)
    assert trained(tokenized) == trained(tokenized, row_idx=1) == ["blue<|im_end|>"]
    text = make_tokenizer().decode(tokenized.dataset[0]["input_ids"])
    assert text.startswith("<|im_start|>user\nName the colour.\n\nthe sky<|im_end|>\n")
    assert any("user's turn" in note for note in tokenized.stats.notes)
    bare = make_tokenizer(None)
    tokenized = tokenize(path, bare)
    assert trained(tokenized, bare) == ["blue<|im_end|>"]
    assert any("no chat template" in note for note in tokenized.stats.notes)


def test_question_and_answer_are_mapped_aloud(write):
    tokenized = tokenize(write([{"question": "What?", "answer": "blue"}]))
    assert trained(tokenized) == ["blue<|im_end|>"]
    assert "question becomes the user's turn" in " ".join(tokenized.stats.lines())


def test_a_template_without_generation_prompt_still_trains_only_the_content(write):
    tokenizer = make_tokenizer(NO_GENERATION_PROMPT)
    tokenized = tokenize(write([{"messages": TWO_TURNS}]), tokenizer)
    assert trained(tokenized, tokenizer)[0] == "It is blue.<|im_end|>"


def test_a_chat_may_begin_with_the_assistant(write):
    chat = [{"role": "assistant", "content": "Hello!"}, *TWO_TURNS[1:3]]
    assert trained(tokenize(write([{"messages": chat}]))) == [
        "Hello!<|im_end|>",
        "It is blue.<|im_end|>",
    ]


def test_an_end_token_left_out_of_the_templates_mask_is_trained_and_said(write):
    tokenizer = make_tokenizer(MARKED_WITHOUT_END, eos_token="<|return|>")
    tokenized = tokenize(write([{"messages": TWO_TURNS}]), tokenizer)
    assert trained(tokenized, tokenizer)[0] == "It is blue.<|im_end|>"
    assert trained(tokenized, tokenizer)[1].endswith("🌱.<|im_end|>")
    assert any("before the end token" in note for note in tokenized.stats.notes)


def test_a_template_without_end_token_is_said(write):
    tokenizer = make_tokenizer(NO_END_TOKEN)
    tokenized = tokenize(write([{"messages": TWO_TURNS[1:]}]), tokenizer)
    assert trained(tokenized, tokenizer)[0] == "It is blue.\n"
    assert any("not taught to stop" in note for note in tokenized.stats.notes)


def test_a_token_across_the_seam_and_a_missing_space_are_said(write):
    tokenized = tokenize(write([{"prompt": "the s", "completion": "ky"}]))
    assert trained(tokenized)[0].endswith("ky<|im_end|>")
    notes = " ".join(tokenized.stats.notes)
    assert "one token holds" in notes
    assert "nothing separates" in notes


def test_keys_that_other_rows_have_are_not_defined_in_this_one(write):
    template = CHATML.replace(
        "{{ message['content'] }}",
        "{% if message.thought is defined %}T{{ message.thought }}{% endif %}{{ message['content'] }}",
    )
    tokenizer = make_tokenizer(template)
    thinking = [TWO_TURNS[1], {**TWO_TURNS[2], "thought": "hm "}]
    path = write([{"messages": thinking}, {"messages": TWO_TURNS[1:3]}])
    tokenized = tokenize(path, tokenizer)
    assert trained(tokenized, tokenizer) == ["Thm It is blue.<|im_end|>"]
    assert trained(tokenized, tokenizer, 1) == ["It is blue.<|im_end|>"]


def test_nulls_are_taken_out_of_messages_and_tools_at_every_depth():
    call = {"name": "look", "arguments": {"at": "sky", "not_at": None}}
    message = {"role": "assistant", "content": None, "name": None, "tool_calls": [call]}
    row = {"messages": [message], "tools": [{"name": "look", "strict": None}]}
    sample = to_sample(row, FORMATS["messages"], has_template=True)
    assert sample.messages == (
        {"role": "assistant", "tool_calls": [{"name": "look", "arguments": {"at": "sky"}}]},
    )
    assert sample.tools == ({"name": "look"},)


def test_a_message_the_template_drops_is_said(write):
    template = CHATML.replace("%}<|im_start|>", "if message['role'] != 'system' %}<|im_start|>", 1)
    tokenizer = make_tokenizer(template)
    tokenized = tokenize(write([{"messages": TWO_TURNS}]), tokenizer)
    assert any("in 1 row the chat template leaves out" in note for note in tokenized.stats.notes)


def test_a_template_file_replaces_the_tokenizers_own(write, tmp_path):
    (tmp_path / "own.jinja").write_text(CHATML.replace("<|im_end|>", "<|return|>"))
    path = write([{"messages": TWO_TURNS}])
    tokenized = tokenize(path, chat_template=str(tmp_path / "own.jinja"))
    assert trained(tokenized)[0] == "It is blue.<|return|>"


# ---- nothing is cut or dropped uncounted ---------------------------------------------------


def token_counts(*texts):
    tokenizer = make_tokenizer()
    return [len(tokenizer(text)["input_ids"]) + 1 for text in texts]


def test_cut_rows_and_cut_tokens_are_counted(write):
    texts = ["the sky is blue " * 9, "the sky", "grass " * 30]
    lengths = token_counts(*texts)
    stats = tokenize(write([{"text": text} for text in texts]), max_length=12).stats
    over = [length for length in lengths if length > 12]
    assert len(over) == stats.num_cut == 2
    assert stats.tokens_cut == sum(over) - 24
    assert stats.num_tokens == sum(min(length, 12) for length in lengths)
    assert (stats.longest_row, stats.longest_source_row) == (12, max(lengths))
    assert stats.cut_share == stats.tokens_cut / sum(lengths)
    assert "2 rows over 12 cut" in stats.lines()[0]


def test_a_cut_row_keeps_its_start_and_gets_no_end_token(write):
    path = write([{"text": "the sky is blue " * 9}])
    whole = tokenize(path).dataset[0]
    cut = tokenize(path, max_length=12).dataset[0]
    assert cut == {name: values[:12] for name, values in whole.items()}


def test_overlong_rows_are_dropped_and_counted(write):
    texts = ["the sky is blue " * 9, "the sky", "grass " * 30]
    lengths = token_counts(*texts)
    tokenized = tokenize(write([{"text": text} for text in texts]), max_length=12, overlong="drop")
    assert len(tokenized) == tokenized.stats.num_rows == 1
    assert tokenized.stats.num_dropped == 2
    assert tokenized.stats.tokens_dropped == lengths[0] + lengths[2]
    assert tokenized.stats.tokens_cut == tokenized.stats.num_cut == 0
    assert "2 longer than max_length" in tokenized.stats.lines()[1]


def test_overlong_error_names_the_longest_row_and_what_to_set(write):
    texts = ["the sky", "grass " * 30, "the sky is blue " * 9]
    path = write([{"text": text} for text in texts])
    message = error_of(tokenize, path, max_length=12, overlong="error")
    longest = max(token_counts(*texts))
    assert "2 of 3 rows" in message
    assert f"{path} line 3" in message
    assert f"Set max_length: {longest}" in message


def test_rows_that_lose_their_answer_are_dropped_by_reason(write):
    rows = [
        {"prompt": "the sky is blue " * 9, "completion": " yes"},
        {"prompt": "", "completion": ""},
        {"prompt": "the sky", "completion": " is blue"},
    ]
    tokenized = tokenize(write(rows), max_length=12)
    assert trained(tokenized) == [" is blue<|im_end|>"]
    assert tokenized.stats.dropped == {
        "without a token": 1,
        "whose answer lies behind max_length": 1,
    }
    chats = [{"messages": TWO_TURNS[:2]}, {"messages": TWO_TURNS}]
    assert tokenize(write(chats)).stats.dropped == {"without an answer to train on": 1}


def test_an_empty_text_is_dropped_and_counted(write):
    tokenized = tokenize(write([{"text": ""}, {"text": "the sky"}]))
    assert tokenized.stats.dropped == {"without a token": 1}


def test_an_empty_answer_is_said(write):
    notes = tokenize(write([{"prompt": "the sky", "completion": ""}])).stats.notes
    assert any("in 1 row an answer is empty" in note for note in notes)


def test_all_masked_is_an_error_with_the_reason_and_the_remedy(write):
    path = write([{"prompt": "the sky is blue " * 9, "completion": " yes"}])
    message = error_of(tokenize, path, max_length=12)
    assert "every label is masked" in message
    assert f"{path} line 1" in message
    assert "Raise max_length (12; rows have up to" in message
    message = error_of(tokenize, write([{"messages": TWO_TURNS[:2]}], "asks.jsonl"))
    assert "1 without an answer" in message
    assert "role assistant" in message


def test_the_longest_row_is_pointed_at(write):
    tokenized = tokenize(write([{"text": t} for t in ("", "the", "the sky is blue", "sky")]))
    row = tokenized.dataset[tokenized.stats.longest_row_idx]
    assert (
        len(row["input_ids"]) == tokenized.stats.longest_row == token_counts("the sky is blue")[0]
    )


def test_stats_line_reads_as_a_sentence(write):
    stats = tokenize(write([{"messages": TWO_TURNS}] * 3)).stats
    share = round(100 * stats.num_trained_tokens / stats.num_tokens)
    assert stats.lines()[0] == (
        f"data      3 chats → {stats.num_tokens} tokens · trained on {share} %"
    )


def test_several_datasets_are_laid_end_to_end_and_counted_together(write):
    chats = load_dataset_rows(str(write([{"messages": TWO_TURNS}] * 2, "chats.jsonl")))
    texts = load_dataset_rows(str(write([{"text": "the sky"}, {"text": ""}], "texts.jsonl")))
    both = tokenize_rows([texts, chats], make_tokenizer())
    alone = [tokenize_rows(rows, make_tokenizer()) for rows in (texts, chats)]
    assert both.dataset[:]["labels"] == [row["labels"] for part in alone for row in part.dataset]
    assert both.stats.num_tokens == sum(part.stats.num_tokens for part in alone)
    assert both.stats.num_dropped == 1
    assert both.stats.format == "text + messages"
    longest = both.dataset[both.stats.longest_row_idx]["input_ids"]
    assert len(longest) == both.stats.longest_row == max(map(len, both.dataset["input_ids"]))


def test_preview_marks_what_is_trained(write):
    tokenizer = make_tokenizer()
    tokenized = tokenize(write([{"messages": TWO_TURNS[1:3]}]), tokenizer)
    assert preview(tokenized, tokenizer, max_chars=None) == (
        "<|im_start|>user\nWhat colour is the sky?<|im_end|>\n"
        "<|im_start|>assistant\n【It is blue.<|im_end|>】\n"
    )
    assert len(preview(tokenized, tokenizer, max_chars=60)) < 80


def test_the_second_run_reads_the_first_ones_rows(write, monkeypatch):
    from ssdtune.data.labels import Encoder

    path = write([{"messages": TWO_TURNS}])
    first = tokenize(path)
    used = make_tokenizer()
    used("call it, with settings", truncation=True, max_length=3)
    calls = []
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda *a: calls.append(a) or encode(*a))
    again = tokenize(path, used)
    assert not calls
    assert again.stats == first.stats
    assert again.dataset[:] == first.dataset[:]
    for options in (
        {"max_length": 60},
        {"train_on": "last"},
        {"tokenizer": make_tokenizer(MARKED)},
    ):
        calls.clear()
        tokenize(path, **options)
        assert calls, options
    for again in (False, True):
        calls.clear()
        tokenize_rows(load_dataset_rows(str(path), seed=1), make_tokenizer())
        assert bool(calls) is not again


# ---- rows keep their place ------------------------------------------------------------------


@pytest.mark.parametrize(
    "split",
    [
        "train",
        "train[:98%]",
        "train[98%:]",
        "train[3:7]",
        "train[-5:]",
        "train[:33%]",
        "train[33%:-20%]",
    ],
)
@pytest.mark.parametrize("num_rows", [7, 51, 150])
def test_splits_are_those_of_datasets(split, num_rows):
    rows = datasets.Dataset.from_dict({"k": list(range(num_rows))})
    spec = datasets.ReadInstruction.from_spec(split).to_absolute({"train": num_rows})[0]
    start, stop = spec.from_, spec.to
    try:
        got = parse_split(split)[0].bounds(num_rows, "x")
    except DataError:
        assert (start or 0) >= (num_rows if stop is None else stop)
    else:
        assert rows[slice(*got)] == rows[slice(start, stop)]


def test_train_and_eval_slices_share_no_row_and_miss_none(write):
    path = write([{"text": f"row {k}"} for k in range(137)])
    both = [
        load_dataset_rows({"path": str(path), "split": split}).dataset["text"][:]
        for split in ("train[:98%]", "train[98%:]")
    ]
    assert both[0] + both[1] == [f"row {k}" for k in range(137)]


def test_a_seed_shuffles_the_slice_and_rows_remember_their_lines(write):
    path = write([{"text": f"row {k}"} for k in range(20)])
    spec = {"path": str(path), "split": "train[:5]+train[10:]"}
    rows = load_dataset_rows(spec, seed=3)
    plain = load_dataset_rows(spec)
    assert rows.dataset["text"][:] != plain.dataset["text"][:]
    assert sorted(rows.dataset["text"][:]) == sorted(plain.dataset["text"][:])
    assert rows.dataset["text"][:] == load_dataset_rows(spec, seed=3).dataset["text"][:]
    for k, text in enumerate(rows.dataset["text"][:]):
        assert rows.where(k) == f"{path} line {int(text.split()[1]) + 1}"


def test_blank_lines_do_not_shift_line_numbers(write):
    rows = load_dataset_rows(str(write('\n{"text": "a"}\n\n  \n{"text": "b"}\n')))
    assert [rows.where(k).split()[-1] for k in range(2)] == ["2", "5"]


def test_a_spec_may_be_a_path_a_mapping_or_a_dataclass(write):
    @dataclass(frozen=True, slots=True)
    class Spec:
        path: str
        format: str = "auto"
        split: str = "train"

    path = str(write([{"text": "a"}]))
    for spec in (path, {"path": path}, Spec(path)):
        assert load_dataset_rows(spec).dataset["text"][:] == ["a"]


def test_importing_the_package_loads_no_heavy_library():
    heavy = "{'torch', 'transformers', 'datasets', 'numpy', 'pyarrow'}"
    code = f"import sys, ssdtune.data; print(*({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_pattern_opens_all_its_files(write, tmp_path):
    write([{"text": "a"}, {"text": "b"}], "part-1.jsonl")
    second = write([{"text": "c"}], "part-2.jsonl")
    rows = load_dataset_rows(str(tmp_path / "part-*.jsonl"))
    assert rows.dataset["text"][:] == ["a", "b", "c"]
    assert rows.where(2) == f"{second} line 1"


def test_a_folder_has_the_splits_that_its_files_name(write, tmp_path):
    write([{"text": f"train {k}"} for k in range(4)], "train.jsonl")
    write([{"text": f"test {k}"} for k in range(3)], "test.jsonl")
    rows = load_dataset_rows({"path": str(tmp_path), "split": "train[1:]+test[1:]"}, seed=0)
    for k, text in enumerate(rows.dataset["text"][:]):
        split, number = text.split()
        assert rows.where(k) == f"{tmp_path} ({split}) row {int(number) + 1}"
    assert "can't open" in error_of(load_dataset_rows, {"path": str(tmp_path), "split": "nope"})
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text": \n')
    assert "train.jsonl" in error_of(load_dataset_rows, {"path": str(tmp_path)})


def test_a_fault_at_a_lines_end_is_in_its_last_column(write):
    said = error_of(load_dataset_rows, str(write('{"text": "a"}\n{"text": "b"\n', "rows.jsonl")))
    assert "rows.jsonl line 2: " in said
    assert "(column 13)" in said


def test_parquet_csv_tsv_and_json_lists_hold_the_same_rows(write, tmp_path):
    rows = [{"prompt": "007", "completion": "NA"}, {"prompt": "a, b", "completion": "x\ny"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    files = [
        tmp_path / "rows.parquet",
        write('prompt,completion\n007,NA\n"a, b","x\ny"\n', "rows.csv"),
        write('prompt\tcompletion\n007\tNA\na, b\t"x\ny"\n', "rows.tsv"),
        write(json.dumps(rows), "rows.json"),
        write(rows),
    ]
    for file in files:
        assert list(load_dataset_rows(str(file)).dataset) == rows, file


def test_lines_swallowed_by_a_stray_quote_mark_are_said(write):
    path = write('text\tlabel\n"so it goes\t1\nfine\t0\nthe end"\t1\n', "rows.tsv")
    rows = load_dataset_rows(str(path))
    assert len(rows) == 1
    assert any("3 lines hold 1 rows" in note for note in rows.notes)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_answers_that_look_like_dates_stay_as_written(write, name):
    rows = [
        {"prompt": "When? ", "completion": "2024-05-01"},
        {"prompt": "?", "completion": "2024-05-02"},
    ]
    path = write(rows if name == "rows.jsonl" else json.dumps(rows), name)
    assert list(load_dataset_rows(str(path)).dataset) == rows
    rows[0]["completion"] = "2025-05-01"
    write(rows if name == "rows.jsonl" else json.dumps(rows), name)
    assert list(load_dataset_rows(str(path)).dataset) == rows


def test_dates_in_a_later_chunk_stay_as_written(write):
    filler = "x" * 5000
    rows = [{"prompt": filler, "completion": "none"} for _ in range(2200)]
    rows += [{"prompt": filler, "completion": "2024-05-01"} for _ in range(2200)]
    read = load_dataset_rows(str(write(rows))).dataset["completion"][:]
    assert set(read) == {"none", "2024-05-01"}


# ---- bad input names its place and the way out ----------------------------------------------

BAD_LINES = {
    "no comma": ('{"text": "a"}\n\n{"text": "b" "c"}\n', "line 3", "delimiter"),
    "cut short": ('{"text": "a"}\n{"text": "b', "line 2", "Unterminated"),
    "a list": ('{"text": "a"}\n[1, 2]\n', "line 2", "a list where an object belongs"),
    "not utf-8": (b'{"text": "a"}\n{"text": "\xe9"}\n', "line 2", "byte 0xe9"),
    "half a pair": ('{"text": "a"}\n{"text": "\\ud83d x"}\n', "line 2", "surrogate"),
    "a key twice": ('{"text": "a"}\n{"text": "b", "text": "c"}\n', "line 2", "twice"),
    "too deep": ('{"text": "a"}\n{"text":' + "[" * 9000 + "]" * 9000 + "}\n", "line 2", "nested"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named(write, case):
    content, line, reason = BAD_LINES[case]
    path = write(content)
    message = error_of(load_dataset_rows, str(path))
    assert f"{path} {line}: " in message
    assert reason in message
    assert "Mend or remove that line" in message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", "\n \n", "only blank lines"),
        ("a.json", "[]", "no rows"),
        ("a.csv", "prompt,completion\n", "no rows"),
        ("a.json", '[{"text": "a"},\n{"text" "b"}]', "line 2"),
        ("a.csv", "prompt,completion\nx,y\nx,y,z\n", "line 3"),
        ("a.parquet", "PAR1 and then nothing", "can't be read as parquet"),
        ("a.csv", b"prompt,completion\nx,\xe9\n", "Save the file as UTF-8"),
        ("a.json", b'[{"text": "\xe9"}]', "Save the file as UTF-8"),
        ("a.txt", "words", "no known kind"),
    ],
)
def test_a_bad_file_is_named(write, name, content, words):
    path = write(content, name)
    message = error_of(load_dataset_rows, str(path))
    assert str(path) in message
    assert words in message


def test_a_missing_file_is_named_with_the_nearest_one(write, tmp_path):
    write([{"text": "a"}], "chats.jsonl")
    message = error_of(load_dataset_rows, str(tmp_path / "chat.jsonl"))
    assert f"Did you mean {tmp_path / 'chats.jsonl'}?" in message
    assert "does not exist either" in error_of(load_dataset_rows, str(tmp_path / "no/chat.jsonl"))
    assert "no file matches" in error_of(load_dataset_rows, str(tmp_path / "z*.jsonl"))


@pytest.mark.parametrize(
    "second", [{"prompt": "b", "note": "n"}, {"prompt": "b", "completion": None}]
)
def test_a_row_without_the_field_is_named_with_what_it_has(write, second):
    path = write([{"prompt": "a", "completion": "b", "id": 7}, second])
    message = error_of(load_dataset_rows, str(path))
    assert f"{path} line 2: no field 'completion'" in message
    assert f"has: {', '.join(k for k, v in second.items() if v)}" in message
    assert "Add 'completion'" in message
    assert len(load_dataset_rows({"path": str(path), "split": "train[:1]"})) == 1


def test_unknown_fields_are_listed_with_the_formats(write):
    path = write([{"query": "a", "reply": "b"}])
    message = error_of(load_dataset_rows, str(path))
    assert "query, reply" in message
    assert "prompt + completion" in message
    message = error_of(load_dataset_rows, {"path": str(path), "format": "messages"})
    assert f"{path} line 1: no field 'messages'" in message


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "completion": 3}, "completion a int"),
        ({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}, "Both must be"),
        ({"messages": []}, "an empty list"),
        ({"messages": [{"content": "b"}]}, "messages[0] has no role. It has: content"),
        ({"messages": [{"role": "user"}]}, "messages[0] (user) has no content"),
        ({"messages": ["hello"]}, "messages[0] is a str"),
        ({"messages": "hello"}, "messages is a str"),
        ({"text": 3}, "text is a int"),
    ],
)
def test_a_bad_value_is_named_by_line(write, row, words):
    good = {"messages": TWO_TURNS} if "messages" in row else {"text": "a"}
    path = write([good if good.keys() == row.keys() else {"prompt": "a", "completion": "b"}, row])
    message = error_of(tokenize, path)
    assert f"{path} line 2: " in message
    assert words in message


def test_a_failed_run_leaves_no_half_written_file_and_the_rows_untouched(write):
    path = write([{"text": "a"}] * 300 + [{"text": "b"}, {"text": 3}])
    before = path.read_bytes(), path.stat().st_mtime_ns
    error_of(tokenize, path)
    cached = [file.name for file in Path(datasets.config.HF_DATASETS_CACHE).rglob("*")]
    assert any(name.endswith(".arrow") for name in cached)
    for name in cached:
        assert not name.startswith(("tmp", "cache-")), name
        assert not name.endswith("incomplete"), name
    assert before == (path.read_bytes(), path.stat().st_mtime_ns)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_chat_the_template_refuses_is_named_with_its_roles(write):
    path = write([{"messages": TWO_TURNS[1:]}, {"messages": [TWO_TURNS[1], *TWO_TURNS[1:3]]}])
    message = error_of(tokenize, path, make_tokenizer(ALTERNATING))
    assert f"{path} line 2: the chat template refuses it: roles must alternate" in message
    assert "user, user, assistant" in message


def test_a_template_that_rewrites_earlier_turns_is_refused_by_row(write):
    path = write([{"messages": TWO_TURNS[1:3]}, {"messages": TWO_TURNS[1:]}])
    tokenizer = make_tokenizer(MOVES_SYSTEM)
    message = error_of(tokenize, path, tokenizer)
    assert f"{path} line 2: the chat template rewrites earlier turns" in message
    assert "train_on: last" in message
    last = tokenize(path, tokenizer, train_on="last")
    assert trained(last, tokenizer, 1) == ["Green, çà et là 草 🌱.<|im_end|>"]


def test_chats_without_a_template_are_refused_with_the_remedies(write):
    message = error_of(tokenize, write([{"messages": TWO_TURNS}]), make_tokenizer(None))
    assert "no chat template" in message
    assert "Instruct version" in message
    assert "chat_template:" in message


def test_bad_settings_are_named(write, tmp_path):
    path = write([{"text": "a"}, {"text": "b"}])
    assert "train_on: all" in error_of(tokenize, path, train_on="assistant")
    assert "not one of assistant" in error_of(tokenize, path, train_on="everything")
    assert "truncate, drop, error" in error_of(tokenize, path, overlong="cut")
    assert "max_length: 1" in error_of(tokenize, path, max_length=1)
    assert "a file has one split" in error_of(tokenize, path, split="test")
    assert "reaches past its 2 rows" in error_of(tokenize, path, split="train[:9]")
    assert "selects none" in error_of(tokenize, path, split="train[99%:]")
    assert "mixes rows and percents" in error_of(tokenize, path, split="train[33%:-1]")
    assert "can't read 'train[1'" in error_of(tokenize, path, split="train[1")
    assert "Did you mean messages?" in error_of(tokenize, path, format="mesages")
    assert "Did you mean split?" in error_of(
        load_dataset_rows, {"path": str(path), "spilt": "train"}
    )
    assert "can't read" in error_of(tokenize, path, chat_template=str(tmp_path / "no.jinja"))
    (tmp_path / "bad.jinja").write_text("fine\n{% for %}")
    assert "bad.jinja line 2" in error_of(tokenize, path, chat_template=str(tmp_path / "bad.jinja"))


# ---- the collator ----------------------------------------------------------------------------

FEATURES = [
    {"input_ids": [5, 6, 1], "labels": [-100, 6, 1], "other": 3},
    {"input_ids": [7, 1], "labels": [-100, 1]},
]


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_are_padded_to_the_longest_of_their_batch(side):
    batch = CausalCollator(pad_token_id=1, padding_side=side)(FEATURES)
    short = {
        "right": ([7, 1, 1], [1, 1, 0], [-100, 1, -100]),
        "left": ([1, 7, 1], [0, 1, 1], [-100, -100, 1]),
    }
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert all(tensor.dtype == torch.long for tensor in batch.values())
    assert tuple(batch[name][1].tolist() for name in batch) == short[side]
    assert batch["input_ids"][0].tolist() == [5, 6, 1]


def test_a_real_end_token_stays_trained_where_it_is_the_pad_token():
    batch = CausalCollator(pad_token_id=1)(FEATURES)
    assert (batch["labels"] == 1).sum() == 2


def test_the_mask_is_there_for_rows_of_one_length():
    batch = CausalCollator(pad_token_id=0)([FEATURES[0], FEATURES[0]])
    assert batch["attention_mask"].tolist() == [[1, 1, 1]] * 2


def test_length_is_rounded_up_where_asked():
    batch = CausalCollator(pad_token_id=0, pad_to_multiple_of=8)(FEATURES)
    assert batch["input_ids"].shape == (2, 8)
    assert batch["attention_mask"].sum() == 5


@pytest.mark.parametrize(
    ("special", "token", "words"),
    [
        ({"pad_token": "<s>"}, "<s>", None),
        ({"pad_token": "<|im_end|>"}, "<|im_end|>", "real ends stay trained"),
        ({"unk_token": "<s>"}, "<s>", "has none"),
        ({}, "<|im_end|>", "has none"),
    ],
)
def test_the_pad_token_is_chosen_aloud_and_never_added(special, token, words):
    tokenizer = make_tokenizer(**special)
    num_tokens = len(tokenizer)
    choice = choose_pad_token(tokenizer)
    assert (choice.token, choice.token_id) == (token, tokenizer.convert_tokens_to_ids(token))
    assert len(tokenizer) == num_tokens
    assert (words is None and choice.note is None) or words in choice.note


def test_a_plain_trainer_learns_from_it(write, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    tokenizer = make_tokenizer()
    tokenized = tokenize(write([{"messages": TWO_TURNS}, {"messages": THREE_TURNS}]), tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    options = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    trainer = Trainer(
        LlamaForCausalLM(config),
        TrainingArguments(
            str(tmp_path),
            max_steps=6,
            learning_rate=1e-2,
            logging_steps=1,
            per_device_train_batch_size=2,
            **options,
        ),
        train_dataset=tokenized.dataset,
        data_collator=CausalCollator(choose_pad_token(tokenizer).token_id),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


# ---- real tokenizer, real rows ----------------------------------------------------------------

SMOLLM2 = Path(os.path.expanduser("~/.cache/ssdtune/smollm2-135m-instruct"))
GSM8K = Path(__file__).resolve().parents[2] / "shared/data/gsm8k_train.jsonl"


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="the quickstart's model is not in the cache")
def test_smollm2_trains_exactly_the_answers(write):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    tokenized = tokenize(write([{"messages": THREE_TURNS}]), tokenizer)
    answers = [message["content"] for message in THREE_TURNS if message["role"] == "assistant"]
    # This tokenizer makes one token of the header's line break and the spaces of the last answer.
    *whole, last = trained(tokenized, tokenizer)
    assert whole == [f"{answer}<|im_end|>" for answer in answers[:2]]
    assert last == f"\n{answers[2]}<|im_end|>"
    assert any("in 1 row one token holds" in note for note in tokenized.stats.notes)
    want = tokenizer.apply_chat_template(THREE_TURNS, tokenize=True, return_dict=True)["input_ids"]
    assert tokenized.dataset[0]["input_ids"] == want


@pytest.mark.skipif(not GSM8K.is_file(), reason="no GSM8K rows beside the repository")
def test_gsm8k_rows_keep_every_answer(write):
    rows = load_dataset_rows({"path": str(GSM8K), "split": "train[:200]"})
    tokenizer = make_tokenizer()
    tokenized = tokenize_rows(rows, tokenizer)
    assert tokenized.stats.num_rows == 200
    for k in range(200):
        assert trained(tokenized, tokenizer, k) == [rows.dataset[k]["answer"] + "<|im_end|>"]
