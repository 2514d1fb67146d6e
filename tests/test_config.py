"""A configuration is a value or a message with file, line, key and remedy; nothing is ignored."""

import dataclasses
import random
import subprocess
import sys
from pathlib import Path

import pytest

from ssdtune.config import (
    DatasetSource,
    Offload,
    TrainConfig,
    help_text,
    load_config,
    reference_markdown,
    to_yaml,
)
from ssdtune.errors import SSDTuneError
from ssdtune.foreign_keys import AS_WITHOUT, NOT_SUPPORTED, TRANSLATED
from ssdtune.settings import OneOf, Record, Refused, settings_of, walk_settings
from ssdtune.strict_yaml import ConfigError, Node

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
HEADER = "model_name_or_path: some/model\ndataset: chats.jsonl\noutput_dir: runs/x\n"
REQUIRED = {"model_name_or_path": "some/model", "dataset": "chats.jsonl", "output_dir": "runs/x"}
KEYS = [key for key, _ in walk_settings(TrainConfig)]

# One value beside the default for every key: how it is typed, and what it becomes.
OTHER_VALUES = {
    "model_name_or_path": ("~/m", str(Path.home() / "m")),
    "model_revision": ("v1.0", "v1.0"),
    "trust_remote_code": ("true", True),
    "attn_implementation": ("sdpa", "sdpa"),
    "quantization": ("4", "4"),
    "dtype": ("bf16", "bfloat16"),
    "bf16": ("yes", True),
    "fp16": ("on", True),
    "method": ("lora", "lora"),
    "lora_r": ("64", 64),
    "lora_alpha": ("1_000", 1000),
    "lora_dropout": ("5e-2", 0.05),
    "lora_target_modules": ("q_proj, v_proj", ("q_proj", "v_proj")),
    "lora_modules_to_save": ("[lm_head]", ("lm_head",)),
    "init_lora_weights": ("gaussian", "gaussian"),
    "loftq_source": ("~/models/m", str(Path.home() / "models/m")),
    "use_rslora": ("true", True),
    "use_dora": ("true", True),
    "zo_trains": ("all", "all"),
    "zo_estimator": ("fzoo", "fzoo"),
    "zo_eps": ("1e-4", 1e-4),
    "zo_num_directions": ("4", 4),
    "zo_rank": ("4", 4),
    "zo_window": ("20", 20),
    "zo_update": ("adam", "adam"),
    "zo_momentum": ("0.8", 0.8),
    "zo_beta2": ("0.99", 0.99),
    "zo_horizon": ("5", 5),
    "zo_mask": ("random", "random"),
    "zo_mask_ratio": ("0.5", 0.5),
    "zo_clip": ("10", 10.0),
    "zo_fold_steps": ("50", 50),
    "zo_master": ("true", True),
    "zo_packed": ("kept", "kept"),
    "dataset": (
        '[{path: a.jsonl, split: "train[:98%]"}, b.csv]',
        (DatasetSource(path="a.jsonl", split="train[:98%]"), DatasetSource(path="b.csv")),
    ),
    "eval_dataset": ("e.jsonl", (DatasetSource(path="e.jsonl"),)),
    "chat_template": ("t/own.jinja", "t/own.jinja"),
    "train_on": ("last", "last"),
    "max_length": ("512", 512),
    "overlong": ("error", "error"),
    "per_device_train_batch_size": ("4", 4),
    "per_device_eval_batch_size": ("3", 3),
    "gradient_accumulation_steps": ("16", 16),
    "num_train_epochs": ("0.5", 0.5),
    "max_steps": ("12", 12),
    "optim": ("sgd", "sgd"),
    "learning_rate": ("1e-5", 1e-5),
    "weight_decay": (".01", 0.01),
    "adam_beta1": ("0.8", 0.8),
    "adam_beta2": ("0.99", 0.99),
    "adam_epsilon": ("1E-6", 1e-6),
    "max_grad_norm": ("0", 0.0),
    "lr_scheduler_type": ("cosine", "cosine"),
    "warmup_steps": ("0.03", 0.03),
    "seed": ("0", 0),
    "data_seed": ("7", 7),
    "eval_strategy": ("no", "no"),
    "eval_steps": ("0.1", 0.1),
    "eval_on_start": ("false", False),
    "save_strategy": ("epoch", "epoch"),
    "save_steps": ("20", 20),
    "save_total_limit": ("none", None),
    "load_best_model_at_end": ("false", False),
    "metric_for_best_model": ("eval_loss", "eval_loss"),
    "resume_from_checkpoint": ("runs/x/checkpoint-3", "runs/x/checkpoint-3"),
    "output_dir": ("~/runs/y", Path.home() / "runs/y"),
    "logging_steps": ("5", 5),
    "report_to": ("tensorboard,wandb", ("tensorboard", "wandb")),
    "run_name": ("012", "012"),
    "dataloader_num_workers": ("2", 2),
    "offload.path": ("~/swap", Path.home() / "swap"),
    "offload.vram": ("1.5GiB", 3 * 2**29),
    "offload.ram": ("300MB", 300 * 10**6),
    "offload.prefetch": ("0", 0),
    "offload.block_inputs": ("nvme", "nvme"),
    "offload.micro_batch_size": ("auto", "auto"),
    "offload.activations": ("2GB", 2 * 10**9),
    "offload.nvme_activations": ("50GB", 50 * 10**9),
    "offload.max_writes": ("200GB", 200 * 10**9),
    "offload.storage": ("buffered", "buffered"),
    "offload.reader_threads": ("4", 4),
    "offload.loss_chunk_tokens": ("1024", 1024),
    "offload.allow_unchecked": ("true", True),
}


def write(tmp_path: Path, body: str, *, header: str = HEADER) -> Path:
    path = tmp_path / "train.yaml"
    path.write_text(header + body)
    return path


def get(config: TrainConfig, key: str):
    name, _, member = key.partition(".")
    value = getattr(config, name)
    return getattr(value, member) if member else value


def error_of(tmp_path: Path, body: str, *flags: str, header: str = HEADER) -> str:
    with pytest.raises(SSDTuneError) as caught:
        load_config(write(tmp_path, body, header=header), flags)
    message = str(caught.value)
    assert message.count("\n") < 4
    assert all(len(line) < 200 + len(str(tmp_path)) for line in message.split("\n"))
    assert all(line.isprintable() for line in message.split("\n"))
    return message


# ------------------------------------------------------------------ every key


def test_every_key_is_described_and_has_a_default_that_its_own_reader_accepts():
    for key, setting in walk_settings(TrainConfig):
        assert len(setting.help) > 3, key
        assert setting.reader.allowed, key
        if setting.is_required:
            assert setting.example, key
        else:
            node = Node.of(setting.default, "")
            assert setting.reader.read(node, key) == setting.default, key


def test_every_default_and_example_can_be_typed_as_a_flag():
    for key, setting in walk_settings(TrainConfig):
        for text in filter(None, (setting.default_text, setting.example)):
            flags = [part for name, value in REQUIRED.items() for part in (f"--{name}", value)]
            load_config(None, [*flags, "--eval_dataset", "e.jsonl", f"--{key}", text])


def test_every_key_is_tried_below():
    assert set(OTHER_VALUES) == set(KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_reachable_by_yaml_and_by_flag(tmp_path, key):
    text, expected = OTHER_VALUES[key]
    name, _, member = key.partition(".")
    header = "".join(f"{k}: {v}\n" for k, v in REQUIRED.items() if k != key)
    lines = f"{name}:\n  {member}: {text}\n" if member else f"{name}: {text}\n"
    from_file = load_config(write(tmp_path, lines, header=header))
    assert get(from_file.config, key) == expected
    assert from_file.sources[key].startswith(str(tmp_path / "train.yaml:"))

    path = write(tmp_path, "", header=HEADER)
    for flag in (f"--{key}", f"--{key.replace('_', '-')}"):
        from_flag = load_config(path, [flag, text])
        assert get(from_flag.config, key) == expected
        assert from_flag.sources[key] == "command line"
    assert get(load_config(path, [f"--{key}={text}"]).config, key) == expected


@pytest.mark.parametrize("key", KEYS)
def test_every_key_refuses_what_it_cannot_mean_with_file_line_and_remedy(tmp_path, key):
    name, _, member = key.partition(".")
    header = "".join(f"{k}: {v}\n" for k, v in REQUIRED.items() if k != key)
    nonsense = "[[1], {a: b}]"
    lines = f"{name}:\n  {member}: {nonsense}\n" if member else f"{name}: {nonsense}\n"
    message = error_of(tmp_path, lines, header=header)
    line = header.count("\n") + (2 if member else 1)
    assert message.startswith(f"{tmp_path / 'train.yaml'}:{line}: {key}: got ")
    assert "Allowed: " in message
    assert "Write for instance `" in message


@pytest.mark.parametrize("key", KEYS)
def test_reading_a_value_again_changes_nothing(key):
    setting = dict(walk_settings(TrainConfig))[key]
    _, value = OTHER_VALUES[key]
    assert setting.reader.read(Node.of(value, ""), key) == value
    written = setting.reader.write(value)
    assert setting.reader.read(Node.of(written, ""), key) == value


def test_help_and_reference_name_every_key_and_default():
    shown, reference = help_text(), reference_markdown()
    for key, setting in walk_settings(TrainConfig):
        assert f"  --{key}  (" in shown
        assert f"| `{key}` |" in reference
        assert setting.help in shown
    for title in TrainConfig.groups.values():
        assert f"\n### {title}\n" in "\n" + reference
    assert set(TrainConfig.groups) <= set(settings_of(TrainConfig))
    columns = {
        line.replace("\\|", "").count("|") for line in reference.split("\n") if line[:1] == "|"
    }
    assert columns == {5}


def test_names_of_keys_and_of_other_tools_do_not_collide():
    settings = settings_of(TrainConfig)
    names = [*settings, *(name for each in settings.values() for name in each.aliases), *TRANSLATED]
    assert len(names) == len(set(names))
    for name in names:
        for pattern in NOT_SUPPORTED:
            is_hit = name == pattern or (pattern[-1] == "*" and name.startswith(pattern[:-1]))
            assert not is_hit, (name, pattern)


def test_data_formats_and_rules_are_those_of_the_data_module():
    formats = pytest.importorskip("ssdtune.data.formats")
    known = settings_of(DatasetSource)["format"].reader
    rules = settings_of(TrainConfig)["train_on"].reader
    assert isinstance(known, OneOf)
    assert isinstance(rules, OneOf)
    assert set(known.words) == {"auto", *formats.FORMATS}
    assert set(rules.words) == {"auto", *formats.TRAIN_ON}


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("body", "line", "says", "remedy"),
    [
        ("lora_rnak: 64", 4, "lora_rnak: ssdtune has no such key", "Did you mean lora_r"),
        ("\n\nlearning_rte: 1", 6, "learning_rte: ssdtune has no", "Did you mean learning_rate?"),
        ("ram: 54GB", 4, "ram: ssdtune has no such key", "Did you mean offload.ram?"),
        ("offload: {rma: 54GB}", 4, "offload.rma: ssdtune has no", "Did you mean offload.ram?"),
        (
            "offload:\n  ram: 54",
            5,
            "offload.ram: 54 has no unit; did you mean 54GB?",
            "--help|300MB",
        ),
        ("xyzzy: 1", 4, "xyzzy: ssdtune has no such key", "`ssdtune train --help` lists them all"),
        ("lora_r: abc", 4, "lora_r: got 'abc', which is not a number", "`lora_r: 16`"),
        ("lora_r: 0", 4, "lora_r: got '0', which is out of range", "from 1 to 65536"),
        ("lora_r: 1.5", 4, "lora_r: got '1.5', which is not whole", "a whole number from 1"),
        ("lora_r: 012", 4, "got 012: YAML reads a leading 0 as octal", "write 12"),
        ("max_steps: 1:30", 4, "got 1:30: YAML reads colons as base 60", "a plain number"),
        ("max_steps: 0", 4, "max_steps: got '0', which is out of range", "1 or more, or -1"),
        ("learning_rate: .nan", 4, "learning_rate: got '.nan'", "a number, 0 or more"),
        ("learning_rate: 1e999", 4, "which is not finite", "`learning_rate: 0.0001`"),
        ("learning_rate: -1e-4", 4, "which is out of range", "0 or more"),
        ("lora_dropout: 1", 4, "lora_dropout: got '1'", "0 or more, below 1"),
        ("warmup_steps: 1.5", 4, "from 1 on it counts steps", "a share of the run"),
        ("seed: true", 4, "seed: got 'true', which is not a number", "`seed: 42`"),
        ("seed:", 4, "seed: got nothing (null)", "leave it out for the default"),
        ("bf16: maybe", 4, "bf16: got 'maybe'", "true or false"),
        ("dtype: bfloat61", 4, "did you mean bfloat16?", "auto, bfloat16"),
        ("optim: adamw_8bit", 4, "optim: 'adamw_8bit' is not supported yet", "adamw_torch"),
        ("method: full", 4, "method: 'full' is not supported yet", "lora, rslora, dora"),
        ("method: full", 4, "method: 'full' is not supported yet", "`method: lora`"),
        ("quantization: 9", 4, "quantization: got '9'", "none, 1, 2"),
        ("bnb_4bit_quant_type: nf4", 4, "bnb_4bit_quant_type: not supported", "quantization: 4"),
        ("packing: true", 4, "packing: not supported yet", "Delete this key"),
        ("sample_packing: true", 4, "sample_packing: not supported yet", "Delete this key"),
        ("load_in_4bit: perhaps", 4, "load_in_4bit: got 'perhaps'", "true or false"),
        ("zo_epsilon: 1e-3", 4, "zo_epsilon: ssdtune has no such key", "Did you mean zo_eps?"),
        ("push_to_hub: true", 4, "push_to_hub: not supported yet", "Delete this key"),
        ("offload: {max_writes: 200}", 4, "max_writes: 200 has no unit", "did you mean 200GB?"),
        ("offload: {max_writes: 0}", 4, "is less than one byte", "300MB"),
        ("val_size: 0.1", 4, "val_size: not supported yet", "eval_dataset"),
        ("sample_packing: perhaps", 4, "sample_packing: not supported yet", "Delete this key"),
        ("sample_packing:", 4, "sample_packing: not supported yet", "Delete this key"),
        ("save_safetensors: false", 4, "save_safetensors: not supported yet", "always"),
        ("stage: dpo", 4, "stage: not supported yet", "the verb says it"),
        ("seed: 1\nseed: 2", 5, "seed: given twice, first at", "Keep one"),
        ("lora_r: 1\nlora_rank: 2", 5, "given twice by different names", "Keep one"),
        ("lora_r: !!int 3", 4, "the tag tag:yaml.org,2002:int is not read", "plain value"),
        ("run_name: !!python/object:os.system x", 4, "python/object:os.system", "plain value"),
        ("seed: &a 1", 4, "anchors (&) and aliases (*) are not read", "Write the value out"),
        ("run_name: *a", 4, "anchors (&) and aliases (*)", "Write the value out"),
        ("lora_target_modules: '.*_proj'", 4, "patterns are not read", "`lora_target_modules: q"),
        ("lora_target_modules: []", 4, "got an empty list", "all-linear, or names"),
        ("report_to: all", 4, "report_to: got 'all'", "none, or some of tensorboard"),
        ("run_name: ''", 4, "got an empty text", "`run_name: first`"),
        ('run_name: "a\\e[31m"', 4, r"got 'a\x1b[31m'", "one line of printable text"),
        ("chat_template: llama3", 4, "chat_template: got 'llama3'", ".jinja"),
        (
            "eval_dataset: [{path: a, splt: t}]",
            4,
            "eval_dataset[0].splt: ssdt",
            "dataset[0].split?",
        ),
        ("eval_dataset:\n- path: a\n- format: text", 6, "eval_dataset[1].path is missing", "Add"),
        ("eval_dataset: [{path: a, split: 'train[3]'}]", 4, "[0].split: got", "train[:98%]"),
        ("eval_dataset: [{path: a, format: cvs}]", 4, "eval_dataset[0].format: got 'cvs'", "auto"),
        ("offload: fast", 4, "offload: got 'fast'", "a mapping of path, vram, ram"),
        ("bf16: true\nfp16: true", 5, "bf16 and fp16 are both true", "Keep one"),
        ("eval_strategy: steps", 4, "needs an eval_dataset", "train[98%:]"),
        ("eval_on_start: true", 4, "needs an eval_dataset", "eval_on_start: false"),
        ("load_best_model_at_end: true", 4, "eval_strategy is no", "Set both to steps"),
        (
            "load_best_model_at_end: true\neval_strategy: steps\neval_dataset: e\n"
            "eval_steps: 30\nsave_steps: 100",
            4,
            "save_steps 100 is no multiple of eval_steps 30",
            "Set save_steps to 30",
        ),
        ("warmup_ratio: 3", 4, "warmup_ratio: got '3'", "warmup_steps: 0.03"),
        ("gradient_checkpointing: 7", 4, "gradient_checkpointing: got '7'", "delete it"),
        ("a b: [", 5, "not YAML", "Check this line"),
        ("seed: 1\n\tlora_r: 2", 5, "not YAML", "no tabs"),
        ("? [a]\n: 1", 4, "a key is a list or a mapping", "key: value"),
        ("---\nseed: 1", 4, "a second document begins here", "without `---`"),
        ("run_name: \x07", 4, "is not allowed in YAML", "Remove it"),
    ],
)
def test_a_refusal_names_file_line_key_and_remedy(tmp_path, body, line, says, remedy):
    message = error_of(tmp_path, body + "\n")
    assert message.startswith(f"{tmp_path / 'train.yaml'}:{line}: ")
    assert says in message
    assert any(each in message for each in remedy.split("|"))


def test_missing_keys_are_named_with_an_example(tmp_path):
    message = error_of(tmp_path, "seed: 1\n", header="")
    assert f"{tmp_path / 'train.yaml'}: model_name_or_path is missing" in message
    assert "Add for instance `model_name_or_path: meta-llama/" in message
    assert "model_name_or_path is missing" in error_of(tmp_path, "", header="")


@pytest.mark.parametrize(
    ("flags", "says", "remedy"),
    [
        (["--lora_rnak", "3"], "command line: lora_rnak: ssdtune has no", "Did you mean lora_r"),
        (["--lora_r", "x"], "command line: lora_r: got 'x'", "`--lora_r 16`"),
        (["--offload.ram", "54"], "offload.ram: 54 has no unit; did you", "`--offload.ram 300MB`"),
        (["--offload.rma", "1GB"], "offload.rma: ssdtune has no", "Did you mean offload.ram?"),
        (["--lora_r.x", "1"], "lora_r: got a mapping", "`--lora_r 16`"),
        (["--lora_r"], "lora_r: the flag has no value", "`--lora_r 16`"),
        (["--lora_r", "--bf16"], "lora_r: the flag has no value", "`--lora_r 16`"),
        (["lora_r", "3"], "'lora_r' is neither a flag", "`--lora_r 32`"),
        (["-r", "3"], "'-r' is neither a flag", "`--lora_r 32`"),
        (["--dataset", "[{path: a"], "--dataset:1: not YAML", "quotes"),
        (["--packing"], "command line: packing: not supported yet", "Delete this key"),
        (["--bf16", "--fp16"], "command line: bf16 and fp16", "Keep one"),
        (["--run_name", "\udcff"], "run_name: got '\\udcff'", "`--run_name first`"),
    ],
)
def test_a_wrong_flag_is_refused_with_a_remedy(tmp_path, flags, says, remedy):
    message = error_of(tmp_path, "", *flags)
    assert says in message
    assert remedy in message


def test_files_that_cannot_be_read_are_messages(tmp_path):
    write(tmp_path, "")
    with pytest.raises(ConfigError, match=r"No such file") as caught:
        load_config(tmp_path / "trian.yaml")
    assert f"Did you mean {tmp_path / 'train.yaml'}?" in str(caught.value)
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(tmp_path)
    for name, content, says in [
        ("latin.yaml", b"seed: 1\nrun_name: caf\xe9\n", "latin.yaml:2: not UTF-8"),
        ("list.yaml", b"- a\n", "list.yaml:1: a list instead of keys"),
        ("text.yaml", b"hello", "text.yaml:1: 'hello' instead of keys"),
        ("data.jsonl", b'{"text": "x"}\n' * 100_000, "no configuration"),
        ("zero.yaml", b"\0" * 9, "is not allowed in YAML"),
        ("deep.yaml", b"[" * 200_000, "deep.yaml:1: deeper than"),
        ("deep2.yaml", b"{a: " * 50_000, "deep2.yaml:1: deeper than"),
        ("wide.yaml", b"dataset: [" + b"a," * 20_000 + b"]", "more than 10,000 values"),
        ("bomb.yaml", b"a: &a [x]\nb: &b [*a,*a]\nc: [*b,*b]\n", "bomb.yaml:1: anchors"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=says):
            load_config(tmp_path / name)


def test_a_file_with_a_byte_order_mark_or_windows_line_ends_is_read(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + (HEADER + "lora_r: 3\n").replace("\n", "\r\n").encode())
    assert load_config(path).config.lora_r == 3


# ------------------------------------------------------------------ other tools' names, precedence


@pytest.mark.parametrize(
    ("body", "key", "value", "note"),
    [
        ("lora_rank: 9", "lora_r", 9, "lora_rank: read as lora_r"),
        ("lora_target: q_proj", "lora_target_modules", ("q_proj",), "as lora_target_modules"),
        ("cutoff_len: 99", "max_length", 99, "read as max_length"),
        ("sequence_len: 99", "max_length", 99, "read as max_length"),
        ("max_seq_length: 99", "max_length", 99, "read as max_length"),
        ("micro_batch_size: 3", "per_device_train_batch_size", 3, "as per_device_train_batch_size"),
        ("num_epochs: 2", "num_train_epochs", 2.0, "read as num_train_epochs"),
        ("optimizer: sgd", "optim", "sgd", "read as optim"),
        ("lr_scheduler: cosine", "lr_scheduler_type", "cosine", "read as lr_scheduler_type"),
        ("warmup_ratio: 0.1", "warmup_steps", 0.1, "below 1 is a share of the run"),
        ("load_in_4bit: true", "quantization", "nf4", "read as quantization: nf4"),
        ("load_in_8bit: yes", "quantization", "8", "read as quantization: 8"),
        ("load_in_4bit: false", "quantization", "none", "false is how it is"),
        ("packing: false", "lora_r", 16, "packing: false is how it is without this key"),
        ("sample_packing: no", "lora_r", 16, "no is how it is without this key"),
        ("save_safetensors: true", "lora_r", 16, "true is how it is without this key"),
        ("stage: sft", "method", "lora", "sft is how it is without this key"),
        ("val_set_size: 0.0", "eval_dataset", (), "0.0 is how it is without this key"),
        ("template: llama3", "chat_template", "auto", "'llama3' is another tool's"),
        ("template: my.jinja", "chat_template", "my.jinja", "read as chat_template"),
        ("gradient_checkpointing: true", "lora_r", 16, "replaced by ssdtune's own"),
        ("activation_checkpointing: true", "lora_r", 16, "replaced by ssdtune's own"),
        ("max_steps: 3\nnum_train_epochs: 2", "max_steps", 3, "has no effect, because max_steps"),
        ("eval_steps: 3", "eval_steps", 3, "no effect, because eval_strategy is no"),
        ("eval_dataset: e", "eval_strategy", "no", "nothing is evaluated during training"),
    ],
)
def test_what_is_read_otherwise_is_said_in_one_line(tmp_path, body, key, value, note):
    path = write(tmp_path, body)
    loaded = load_config(path)
    assert getattr(loaded.config, key) == value
    (only,) = loaded.notes
    assert only.startswith(f"{path}:")
    assert note in only


ZO = "method: zo\n"


@pytest.mark.parametrize(
    ("body", "idle"),
    [
        ("zo_estimator: fzoo\nzo_eps: 1.0e-2\nzo_trains: adapters", "zo_estimator zo_eps"),
        ("optim: sgd\nadam_beta2: 0.95\nmax_grad_norm: 2", "adam_beta2"),
        ("loftq_source: m", "loftq_source"),
        (ZO + "optim: sgd\nadam_beta1: 0.5\nmax_grad_norm: 2", "optim adam_beta1 max_grad_norm"),
        (
            ZO + "lora_dropout: 0.1\nlora_r: 4\nweight_decay: 0.1\nloftq_source: m",
            "lora_dropout loftq_source",
        ),
        (
            ZO + "zo_trains: all\nlora_r: 4\nlora_alpha: 32\nuse_dora: true\nzo_fold_steps: 5",
            "lora_r use_dora",
        ),
        (ZO + "zo_rank: 4\nzo_window: 7\nzo_fold_steps: 5", "zo_fold_steps zo_rank zo_window"),
        (ZO + "zo_estimator: lozo\nzo_rank: 4\nzo_window: 7", ""),
        (ZO + "zo_momentum: 0.5\nzo_horizon: 3\nzo_beta2: 0.5", "zo_momentum zo_beta2 zo_horizon"),
        (ZO + "zo_update: momentum\nzo_momentum: 0.5\nzo_horizon: 3\nzo_beta2: 0.5", "zo_beta2"),
        (ZO + "zo_update: adam\nzo_momentum: 0.5\nzo_horizon: 3\nzo_beta2: 0.5", ""),
        (ZO + "zo_mask_ratio: 0.5\nzo_clip: 3\nzo_num_directions: 2", "zo_mask_ratio"),
        (ZO + "zo_mask: random\nzo_mask_ratio: 0.5", ""),
        (
            ZO + "offload: {block_inputs: nvme, activations: 2GB, nvme_activations: 2GB, ram: 1GB}",
            "offload.block_inputs offload.activations offload.nvme_activations",
        ),
        ("offload: {block_inputs: nvme, nvme_activations: 2GB}", ""),
    ],
)
def test_a_key_without_effect_is_said_with_the_reason(tmp_path, body, idle):
    """Not where it says what it is by default."""
    loaded = load_config(write(tmp_path, body))
    assert [note.split(": ")[1] for note in loaded.notes] == idle.split()
    for note in loaded.notes:
        assert note.startswith(f"{loaded.path}:")
        assert "has no effect, because" in note


@pytest.mark.parametrize("body", ["", ZO, ZO + "zo_trains: all"])
def test_a_run_that_goes_on_from_the_keys_that_it_wrote_has_nothing_to_say(tmp_path, body):
    path = write(tmp_path, body)
    path.write_text(to_yaml(load_config(path).config))
    assert not load_config(path).notes


@pytest.mark.parametrize("name", AS_WITHOUT)
def test_a_key_that_asks_for_what_happens_anyway_changes_nothing(name):
    """Not a key of ours that would be overruled; one that is refused with any other value."""
    value = AS_WITHOUT[name][1]
    required = [word for key, value in REQUIRED.items() for word in (f"--{key}", value)]
    plain, given = (load_config(None, [*required, *more]) for more in ([], [f"--{name}={value}"]))
    assert given.config == plain.config
    assert given.notes == (
        f"command line: {name}: {str(value).lower()} is how it is without this key",
    )
    with pytest.raises(ConfigError, match=f"{name}: not supported yet"):
        load_config(None, [*required, f"--{name}=7"])


def test_qlora_is_lora_on_nf4(tmp_path):
    config = load_config(write(tmp_path, "method: qlora")).config
    assert (config.method, config.quantization) == ("lora", "nf4")
    config = load_config(write(tmp_path, "method: qlora\nquantization: 3")).config
    assert (config.method, config.quantization) == ("lora", "3")


def test_base_model_is_a_name_of_model_name_or_path(tmp_path):
    header = HEADER.replace("model_name_or_path", "base_model")
    loaded = load_config(write(tmp_path, "", header=header))
    assert loaded.config.model_name_or_path == "some/model"
    assert loaded.notes == (f"{loaded.path}:1: base_model: read as model_name_or_path",)


def test_a_plain_configuration_leaves_no_note(tmp_path):
    assert load_config(write(tmp_path, "")).notes == ()


def test_a_flag_beats_the_file_and_the_file_beats_the_default(tmp_path):
    path = write(tmp_path, "lora_rank: 9\noffload:\n  ram: 1GB\n  vram: 2GB\n")
    loaded = load_config(path, ["--offload.ram", "3GB", "--lora_r", "1", "--lora-rank", "5"])
    assert (loaded.config.lora_r, loaded.config.lora_alpha) == (5, 32)
    assert loaded.config.offload == Offload(ram="3GB", vram="2GB")  # type: ignore[arg-type]
    where = [loaded.sources[key] for key in ("offload.ram", "offload.vram", "lora_alpha")]
    assert where == ["command line", f"{path}:7", "default"]


def test_an_empty_offload_block_means_auto(tmp_path):
    assert load_config(write(tmp_path, "offload:\n")).config.offload == Offload()
    loaded = load_config(write(tmp_path, "offload:\n"), ["--offload.ram", "3GB"])
    assert loaded.config.offload.ram == 3 * 10**9


def test_yaml_guesses_nothing(tmp_path):
    body = 'run_name: 1:30\nlearning_rate: 1e-4\neval_strategy: no\nlora_r: "8"\nmodel_revision: 2024-05-01\n'
    config = load_config(write(tmp_path, body)).config
    assert config.run_name == "1:30"
    assert config.learning_rate == 1e-4
    assert config.eval_strategy == "no"
    assert config.lora_r == 8
    assert config.model_revision == "2024-05-01"


@pytest.mark.parametrize("text", ["none", "false", "no", "off", "False", "0"])
def test_no_activations_are_said_in_any_of_the_ways_to_say_no(tmp_path, text):
    config = load_config(write(tmp_path, f"offload: {{activations: {text}}}")).config
    assert config.offload.activations == 0
    assert Offload(activations=0) == Offload(activations=False) == config.offload
    assert "offload.ram" in error_of(tmp_path, f"offload: {{ram: {text}}}"), "it needs some"


def test_loftq_does_not_go_with_dora(tmp_path):
    body = "init_lora_weights: loftq\nmethod: dora"
    assert "use_dora" in error_of(tmp_path, body)


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("False", False), ("gaussian", "gaussian")]
)
def test_adapters_begin_in_the_ways_that_peft_names(tmp_path, text, value):
    config = load_config(write(tmp_path, f"init_lora_weights: {text}")).config
    assert config.init_lora_weights is value or config.init_lora_weights == value
    assert "pissa" in error_of(tmp_path, "init_lora_weights: pissa")


@pytest.mark.parametrize(
    ("text", "value"), [("auto", "auto"), ("true", True), ("false", False), ("a/b", "a/b")]
)
def test_resume_knows_auto_true_false_and_a_path(tmp_path, text, value):
    loaded = load_config(write(tmp_path, f"resume_from_checkpoint: {text}"))
    assert loaded.config.resume_from_checkpoint == value
    assert type(loaded.config.resume_from_checkpoint) is type(value)


def test_dora_and_rslora_as_methods_are_lora_with_their_flag(tmp_path):
    config = load_config(write(tmp_path, "method: dora")).config
    assert (config.method, config.use_dora, config.use_rslora) == ("lora", True, False)


def test_what_follows_from_other_keys_is_resolved(tmp_path):
    config = load_config(write(tmp_path, "per_device_train_batch_size: 3\nsave_steps: 7")).config
    assert config.per_device_eval_batch_size == 3
    assert config.eval_steps == 7


# ------------------------------------------------------------------ round trip, Python, files


def every_value_config(tmp_path: Path) -> TrainConfig:
    flags = []
    for key, (text, _) in OTHER_VALUES.items():
        if key not in ("fp16", "eval_strategy"):
            flags += [f"--{key}", text]
    return load_config(None, flags).config


def test_the_resolved_configuration_loads_to_an_equal_value(tmp_path):
    for config in (load_config(write(tmp_path, "")).config, every_value_config(tmp_path)):
        path = tmp_path / "resolved.yaml"
        path.write_text(to_yaml(config))
        again = load_config(path)
        assert again.config == config
        assert hash(again.config) == hash(config)
        # Each key is written, defaults too, so that a later release's defaults change nothing.
        assert "default" not in again.sources.values()


def test_texts_that_look_like_other_things_survive_the_round_trip(tmp_path):
    for name in ["012", "true", "null", "1e-4", "~x", "a: b", "- a", "#x", "é", "'", '"', "*a"]:
        config = TrainConfig(**REQUIRED, run_name=name)  # type: ignore[arg-type]
        path = tmp_path / "resolved.yaml"
        path.write_text(to_yaml(config), encoding="utf-8")
        assert load_config(path).config == config


def test_python_is_checked_like_yaml():
    config = TrainConfig(**REQUIRED, offload={"ram": "300MB"}, learning_rate="1e-3")  # type: ignore[arg-type]
    assert config.offload.ram == 300 * 10**6
    assert config.dataset == (DatasetSource(path="chats.jsonl"),)
    assert config.learning_rate == 1e-3
    with pytest.raises(ConfigError, match="TrainConfig: lora_r: got 0, which is out of range"):
        TrainConfig(**REQUIRED, lora_r=0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs an eval_dataset"):
        TrainConfig(**REQUIRED, eval_strategy="steps")  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lora_r = 3  # type: ignore[misc]
    assert dataclasses.replace(config, lora_r=4).lora_r == 4


def test_offload_of_takes_a_dict_an_offload_or_nothing():
    made = Offload.of({"ram": "1.5GiB", "vram": 2**33, "path": Path("/nvme"), "prefetch": "auto"})
    assert made == Offload(ram=3 * 2**29, vram=2**33, path=Path("/nvme"))
    assert Offload.of(made) is made
    assert Offload.of(None) == Offload() == Offload.of({})


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"ram": 54}, "Offload: ram: 54 has no unit; did you mean 54GB?"),
        ({"rma": "1GB"}, "Offload: rma: ssdtune has no such key"),
        ({"prefetch": -1}, "Offload: prefetch: got -1, which is out of range"),
        ({"storage": "dirct"}, "did you mean direct?"),
        ({"max_writes": 54}, "Offload: max_writes: 54 has no unit; did you mean 54GB?"),
        ({3: 4}, "Offload: 3: ssdtune has no such key"),
        ("300MB", 'Write offload={"ram": "300MB"}'),
        ({"ram": ["1GB"]}, "ram: got a list"),
    ],
)
def test_offload_of_refuses_with_a_remedy(value, says):
    with pytest.raises(SSDTuneError) as caught:
        Offload.of(value)
    assert says in str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_shipped_configuration_loads_without_a_note(path):
    loaded = load_config(path)
    assert loaded.notes == ()
    assert path.read_text().startswith("# ")


def test_the_shipped_configurations_are_the_four_of_the_readme():
    names = {path.stem for path in CONFIGS}
    assert names >= {"quickstart", "llama3-8b-8gb", "qwen3-32b-16gb", "llama33-70b-24gb"}


# ------------------------------------------------------------------ fuzz


def mutations(text: str, rng: random.Random) -> str:
    """One to four random edits: characters, lines, indentation, YAML's own signs, odd values."""
    signs = [*"&*!|>%@`{}[]:,#?-'\"\\\t\n \0\x1b~", "é", "\u2028", "\ud7ff", "<<: ", "!!set "]
    values = ["null", "1e400", "-0", ".inf", "0x10", "1_0_0", "''", "[]", "{}", "é", "9" * 50, "-1"]
    for _ in range(rng.randint(1, 4)):
        lines = text.split("\n")
        at, row = rng.randrange(len(text) + 1), rng.randrange(len(lines))
        kind = rng.randrange(6)
        if kind == 0:
            text = text[:at] + rng.choice(signs) + text[at:]
        elif kind == 1:
            text = text[:at] + text[at + rng.randint(1, 5) :]
        elif kind == 2:
            lines.insert(rng.randrange(len(lines) + 1), lines[row])
        elif kind == 3:
            lines[row] = " " * rng.randint(0, 4) + lines[row].lstrip()
        elif kind == 4:
            lines[row] = f"{lines[row].partition(':')[0]}: {rng.choice(values)}"
        else:
            lines[row] = rng.choice(KEYS).replace(".", ": ") + f": {rng.choice(values)}"
        if kind >= 2:
            text = "\n".join(lines)
    return text


@pytest.mark.parametrize("seed", range(3))
def test_a_mutated_configuration_gives_a_value_or_a_message(tmp_path, seed):
    rng = random.Random(seed)
    originals = [path.read_text() for path in CONFIGS]
    originals.append(to_yaml(every_value_config(tmp_path)))
    outcomes = {"value": 0, "message": 0}
    for _ in range(100):
        path = tmp_path / "fuzzed.yaml"
        text = mutations(rng.choice(originals), rng)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        config = message = None
        try:
            config = load_config(path).config
        except SSDTuneError as error:
            message = str(error)
        if config is None:
            assert message is not None
            assert "fuzzed.yaml" in message
            assert message.count("\n") < 4
            outcomes["message"] += 1
        else:
            (tmp_path / "again.yaml").write_text(to_yaml(config), encoding="utf-8")
            assert load_config(tmp_path / "again.yaml").config == config
            outcomes["value"] += 1
    assert all(outcomes.values()), outcomes  # how many of each hangs on every file's length


def test_random_python_values_are_values_or_messages():
    odd = [None, True, -1, 0.5, float("nan"), 10**400, "", "x" * 10_000, b"x", [], [[]], {}, {1: 2}]
    odd += [object(), Path("~"), (), ("a", 1), {"path": 3}, "\ud800", float("-inf"), 1j]
    for name, setting in settings_of(TrainConfig).items():
        for value in odd:
            node = Node.of(value, "here")
            try:
                read = setting.reader.read(node, name)
            except (Refused, SSDTuneError):
                continue
            assert isinstance(setting.reader, Record) or read == setting.reader.read(
                Node.of(read, "here"), name
            )


# ------------------------------------------------------------------ speed


def test_importing_the_configuration_is_quick_and_pulls_in_nothing_heavy(tmp_path):
    script = (
        "import time, sys, dataclasses, pathlib, re, typing\n"
        "t = time.process_time(); import ssdtune.config; t = time.process_time() - t\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'yaml', 'peft'} & set(sys.modules)\n"
        "print(t, sorted(heavy))"
    )
    environment = {"PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": str(tmp_path)}
    times = []
    for _ in range(5):  # the first one compiles
        result = subprocess.run(
            [sys.executable, "-c", script],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        seconds, heavy = result.stdout.split(maxsplit=1)
        assert heavy.strip() == "[]"
        times.append(float(seconds))
    assert min(times) < 0.05  # CPU time beside what dataclasses and pathlib take by themselves


def test_a_small_size_with_its_unit_may_be_read_again():
    """`ram: 200KB` is right; a bare 200000 lacks its unit, wherever it comes from."""
    assert Offload(ram="200KB").ram == 200_000
    assert Offload.of({"ram": "200KB"}).ram == 200_000
    with pytest.raises(SSDTuneError, match="has no unit"):
        Offload(ram=200_000)


# ------------------------------------------------------------------ the same rows, cut otherwise


def test_a_micro_batch_size_cuts_the_same_rows_otherwise(tmp_path):
    batch = "per_device_train_batch_size: 2\ngradient_accumulation_steps: 6\n"
    path = write(tmp_path, f"{batch}offload: {{micro_batch_size: 4}}\n")
    config = load_config(path).config
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (4, 3)
    path.write_text(to_yaml(config))
    assert load_config(path).config == config, "read again, it is what it was"


def test_a_micro_batch_size_that_does_not_divide_the_rows_is_told_which_do(tmp_path):
    batch = "per_device_train_batch_size: 2\ngradient_accumulation_steps: 3\n"
    message = error_of(tmp_path, f"{batch}offload:\n  micro_batch_size: 4\n")
    assert "4 does not divide the 6 rows" in message
    assert "1, 2, 3, 6" in message
    assert "train.yaml:" in message
