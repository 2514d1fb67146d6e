"""`ssdtune train` on input that is wrong: one short error that names it, nothing written, the model as it was."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pytest
import tiny_runs
import torch
from safetensors.torch import load_file, save_file
from support import digests

from ssdtune.cli import EXIT_USER_ERROR, main

INDEX = "model.safetensors.index.json"
WEIGHT = "model.layers.1.mlp.up_proj.weight"
GHOST = "model.layers.1.mlp.ghost.weight"


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory) -> Iterator[None]:
    """Tokenized rows are cached; not in the user's cache. While they are, no bar is drawn on stderr."""
    datasets.disable_progress_bars()
    with tiny_runs.own_datasets_cache(tmp_path_factory.mktemp("datasets-cache")):
        yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A folder with a model, `rows.jsonl` and the configuration `train.yaml`, of which everything is right."""
    folder = tmp_path_factory.mktemp("good")
    tiny_runs.save(tiny_runs.llama(), folder / "model")
    tiny_runs.write_rows(folder / "rows.jsonl", tiny_runs.texts(4))
    (folder / "train.yaml").write_text(
        "model_name_or_path: model\ndataset: rows.jsonl\noutput_dir: run\nmax_steps: 1\n"
        "per_device_train_batch_size: 1\nmax_length: 64\n"
    )
    return folder


# ------------------------------------------------------------------ what is made wrong, and the name that must be said


def change_key(key: str, value: str) -> None:
    path = Path("train.yaml")
    lines = [line for line in path.read_text().splitlines() if not line.startswith(f"{key}:")]
    path.write_text("\n".join([*lines, f"{key}: {value}\n"]))


def shard_of(name: str) -> Path:
    return Path("model", json.loads(Path("model", INDEX).read_text())["weight_map"][name])


def change_index(name: str, shard: str) -> None:
    path = Path("model", INDEX)
    index = json.loads(path.read_text())
    index["weight_map"][name] = shard
    path.write_text(json.dumps(index))


def missing_model() -> str:
    change_key("model_name_or_path", "./models/model")
    return "no such folder or file: ./models/model"


def missing_gguf() -> str:
    change_key("model_name_or_path", "model.gguf")
    return "no such folder or file: model.gguf"


def file_as_model() -> str:
    change_key("model_name_or_path", "rows.jsonl")
    return "rows.jsonl is a file"


def model_that_was_never_fetched() -> str:
    change_key("model_name_or_path", "nobody/nothing")
    return "HF_HUB_OFFLINE"


def metric_that_nobody_measures() -> str:
    for key, value in {
        "eval_dataset": "rows.jsonl",
        "eval_strategy": "steps",
        "load_best_model_at_end": "true",
        "metric_for_best_model": "eval_bleu",
    }.items():
        change_key(key, value)
    return "metric_for_best_model: eval_bleu is not measured"


def tracker_that_is_not_installed() -> str:
    change_key("report_to", "clearml")
    return "pip install clearml"


def missing_shard() -> str:
    shard = shard_of(WEIGHT)
    shard.unlink()
    return shard.name


def truncated_file() -> str:
    shard = shard_of(WEIGHT)
    shard.write_bytes(shard.read_bytes()[:-100])
    return shard.name


def lying_header() -> str:
    """The last tensor ends where the file does not."""
    shard = shard_of(WEIGHT)
    content = shard.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header[WEIGHT]["shape"][0] += 1
    lie = json.dumps(header).encode()
    shard.write_bytes(len(lie).to_bytes(8, "little") + lie + content[8 + size :])
    return shard.name


def tensor_that_is_nowhere() -> str:
    change_index(GHOST, shard_of(WEIGHT).name)
    return GHOST


def other_dtype() -> str:
    shard = shard_of(WEIGHT)
    tensors = load_file(shard)
    tensors[WEIGHT] = tensors[WEIGHT].to(torch.uint8)
    save_file(tensors, shard, metadata={"format": "pt"})
    return WEIGHT


def small_budget() -> str:
    with open("train.yaml", "a") as file:
        file.write("offload: {ram: 1KB}\n")
    return "offload.ram"


def empty_data() -> str:
    Path("rows.jsonl").write_text("")
    return "rows.jsonl"


def missing_field() -> str:
    tiny_runs.write_rows(Path("rows.jsonl"), [{"prompt": "what colour is it"}])
    return "completion"


def all_labels_masked() -> str:
    """The prompt alone fills every row."""
    row = {"prompt": "the sky is blue and " * 20, "completion": "the grass is green"}
    tiny_runs.write_rows(Path("rows.jsonl"), [row])
    return "max_length"


CASES: list[Callable[[], str]] = [
    missing_model,
    missing_gguf,
    file_as_model,
    model_that_was_never_fetched,
    metric_that_nobody_measures,
    tracker_that_is_not_installed,
    missing_shard,
    truncated_file,
    lying_header,
    tensor_that_is_nowhere,
    other_dtype,
    small_budget,
    empty_data,
    missing_field,
    all_labels_masked,
]


@pytest.mark.parametrize("spoil", CASES, ids=lambda spoil: spoil.__name__)
def test_wrong_input_is_one_short_error_and_nothing_is_written(
    spoil, good, tmp_path, monkeypatch, capfd
):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    name = spoil()
    before = digests(tmp_path)
    assert main(["train", "train.yaml"]) == EXIT_USER_ERROR
    told = capfd.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") <= 4, told
    assert name in told
    assert digests(tmp_path / "model") == {
        key.removeprefix("model/"): value
        for key, value in before.items()
        if key.startswith("model/")
    }
    made = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert not [path for path in made - set(before) if ".tmp" in path or "adapter" in path]
