"""Every key of ssdtune, described once: YAML key = dataclass field = Python keyword = --flag.

From these descriptions come the checks, `ssdtune train --help` and the reference in the docs. Flat
keys bear the names that TrainingArguments, TRL and peft gave them; what depends on the machine is
nested under `offload`, so that one file moves between machines with `--offload.ram 100GB`. Defaults
are Hugging Face's unless the help says why not. Importing this costs milliseconds: no torch here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ssdtune.foreign_keys import NOT_SUPPORTED
from ssdtune.settings import (
    Also,
    Names,
    Number,
    OneOf,
    Or,
    Record,
    Records,
    Size,
    Text,
    Whole,
    WordOr,
    Words,
    YesNo,
    YesNoOr,
    key,
    read_again,
    read_record,
)
from ssdtune.strict_yaml import ConfigError, Node, shown

_SPLIT = r"[A-Za-z_][\w.-]*(\[(-?\d+%?)?:(-?\d+%?)?\])?"
# Bits of the blocks of a nested file of 8: on average, or listed (packing/widths.py).
BITS_BY_BLOCK = r"([2-7]\.\d{1,2}|(?=.*[,x])(\d{1,4}x)?[2-8](,(\d{1,4}x)?[2-8])*)/8"
_FORMAT_SYNONYMS = (
    ("prompt", "prompt_completion"),
    ("sharegpt", "conversations"),
    ("chat", "messages"),
    ("chatml", "messages"),
    ("openai", "messages"),
    ("qa", "question_answer"),
    ("pretraining", "text"),
)
_DTYPE_SYNONYMS = (("bf16", "bfloat16"), ("fp32", "float32"), ("fp16", "float16"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Offload:
    """Where the weights and what is kept for backward may lie. None means auto. Sizes in bytes."""

    path: Path | None = key(  # noqa: RUF009 - key() makes a dataclass field
        Or("auto", Text("a folder on a fast drive", is_folder=True)),
        "folder for what ssdtune itself writes (block inputs and activations on NVMe); auto: in output_dir",
        default=None,
        example="/nvme/ssdtune",
    )
    vram: int | None = key(
        Size(), "most device memory to use; auto: what is free", default=None, example="7GB"
    )
    ram: int | None = key(
        Size(), "most RAM for weights; auto: what is free", default=None, example="300MB"
    )
    prefetch: int | None = key(
        Or("auto", Whole(0, 64)),
        "how many blocks are fetched ahead of compute; 0 fetches each when it is needed",
        default=None,
        example="2",
    )
    block_inputs: str = key(
        OneOf(("auto", "device", "ram", "nvme")),
        "where the inputs of blocks wait for backward; auto: what fits and is predicted to be the fastest, said before "
        "the first step",
        default="auto",
    )
    micro_batch_size: str | int | None = key(
        Or("none", WordOr("auto", Whole(1, 2**24))),
        "rows that pass a block at once, where that is to be another cut of the same step than "
        "per_device_train_batch_size; auto: what fits and is predicted to be the fastest of all that divide the step's "
        "rows",
        default=None,
        example="auto",
    )
    activations: int | None = key(
        Size(none_word="none"),
        "memory for activations that stay until backward, so that their blocks are not computed twice; "
        "auto: what is free beside the weights, where offload.ram (on a device offload.vram) is auto",
        default=None,
        example="2GB",
    )
    nvme_activations: int | None = key(
        Size(none_word="none"),
        "space of the drive (in offload.path) for activations that wait there until backward, as far as their blocks are "
        "not computed twice and not kept in memory; auto: as much as `ssdtune train` finds free and predicts to be worth "
        "it, which takes a profile. Every step writes them: none by default, for the drive's sake",
        default=0,
        example="50GB",
    )
    storage: str = key(
        OneOf(("auto", "direct", "buffered", "gds")),
        "how files are read: O_DIRECT, through the page cache, or GPUDirect Storage; "
        "auto: what a self-test at start finds fastest and right",
        default="auto",
    )
    reader_threads: int = key(
        Whole(1, 64), "threads that read; two reach the rate of most drives", default=2
    )
    loss_chunk_tokens: int | None = key(
        Or("auto", Whole(1, 2**24)),
        "tokens whose logits exist at once; a whole micro-batch is exact to the bit",
        default=None,
        example="1024",
    )
    allow_unchecked: bool = key(
        YesNo(),
        "stream an architecture whose self-check could not be run, at your own risk",
        default=False,
    )

    not_supported: ClassVar[Mapping[str, str]] = {
        "max_writes": NOT_SUPPORTED["max_writes"],
    }

    def __post_init__(self) -> None:
        read_again(self)

    @classmethod
    def of(cls, value: "Offload | Mapping[str, Any] | None") -> "Offload":
        """An Offload from what a caller gave: itself, a dict such as {"ram": "300MB"}, or None."""
        if isinstance(value, cls):
            return value
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(
                f"Offload: got {shown(value)}.\n"
                'Write offload={"ram": "300MB"} or offload=ssdtune.Offload(ram="300MB").'
            )
        return read_record(cls, Node.of(value or {}, "Offload"))


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSource:
    """One entry of `dataset` or `eval_dataset`."""

    path: str = key(
        Text("a file, a folder, a pattern or a hub id", is_path=True),
        "JSONL, JSON, CSV, TSV or Parquet file, pattern such as data/*.jsonl, folder or hub id",
        example="data/chats.jsonl",
    )
    format: str = key(
        OneOf(
            (
                "auto",
                "text",
                "prompt_completion",
                "messages",
                "conversations",
                "alpaca",
                "question_answer",
            ),
            synonyms=_FORMAT_SYNONYMS,
        ),
        "what a row is; auto recognises it by its fields and says so",
        default="auto",
    )
    split: str = key(
        Text(
            "a split such as train, train[:98%] or train[:10]+train[-10:]",
            pattern=rf"{_SPLIT}(\+{_SPLIT})*",
        ),
        "which rows",
        default="train",
        example="train[:98%]",
    )
    template: str | None = key(
        Or("none", Text("a text with {label} in it", has_lines=True, pattern=r".*\{label\}.*")),
        "for rows with a label: the text that a row becomes, its fields in braces, {label} for the label's words; what is "
        "trained is that the right words are likelier than the others",
        default=None,
        example='"{text} It was {label}"',
    )
    label_words: tuple[tuple[str, str], ...] = key(
        Words("a mapping of labels to words, such as {0: terrible, 1: great}"),
        "the words of each label, with a template",
        default=(),
        example="{0: terrible, 1: great}",
    )
    label_field: str = key(
        Text("a field's name"),
        "the field that holds a row's label, with a template",
        default="label",
    )

    def __post_init__(self) -> None:
        read_again(self)
        if bool(self.template) != bool(self.label_words):
            raise ConfigError(
                f"dataset entry {self.path}: template and label_words go together.\n"
                'Write both, for instance template: "{text} It was {label}", label_words: {0: terrible, 1: great}.'
            )


_DATASETS = Records(
    Record(DatasetSource), "the path of a data file, or {path: …, format: …, split: …}"
)
_STEPS = Number(is_open=True, is_steps=True)
_COUNT = Whole(1, 2**24)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """A fine-tuning run. Every value is checked, from YAML, flags and Python alike."""

    # Model
    model_name_or_path: str = key(
        Text("a folder or a Hugging Face model id", is_path=True),
        "the model: a folder with safetensors, or a hub id",
        aliases=("base_model", "model_name", "model"),
        example="meta-llama/Llama-3.1-8B-Instruct",
    )
    model_revision: str = key(
        Text("a branch, tag or commit"), "which version of a hub model", default="main"
    )
    trust_remote_code: bool = key(
        YesNo(), "run Python code that comes with the model", default=False
    )
    attn_implementation: str = key(
        OneOf(
            ("auto", "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"),
        ),
        "which attention kernel; auto: the model's own choice",
        default="auto",
    )
    dtype: str = key(
        OneOf(("auto", "bfloat16", "float32", "float16"), synonyms=_DTYPE_SYNONYMS),
        "type of the weights while they compute; auto: as they are stored",
        default="auto",
        aliases=("torch_dtype",),
    )
    quantization: str = key(
        Also(
            OneOf(
                (
                    "none",
                    *map(str, range(1, 9)),
                    *("6/8", "5/8", "4/8", "3/8", "2/8"),
                    *("nf4", "mxfp4", "nvfp4", "fp4-ue5m3", "lossless", "auto"),
                ),
                later=("fp8",),
            ),
            Text(
                "bits on average such as 4.5/8, or of each block such as 5,28x4,6/8",
                pattern=BITS_BY_BLOCK,
            ),
        ),
        "bits of the base weights on the drive and in RAM: 1 to 8, or a format; packed once into offload.path where the "
        "files are not (`ssdtune pack`); 4/8: 4 bits read of a file of 8; 4.5/8: so many on average, each block in its own "
        "width, chosen by errors of its weights; 5,28x4,6/8: the widths of the blocks in their order; none: as they are "
        "stored; auto: the most whose reading is predicted to be hidden behind compute, else the fastest of 4 and more",
        default="none",
        example="4",
    )
    bf16: bool = key(YesNo(), "autocast to bfloat16, as Trainer does", default=False)
    fp16: bool = key(
        YesNo(), "autocast to float16 with loss scaling, as Trainer does", default=False
    )

    # Adapter
    method: str = key(
        OneOf(
            ("lora", "rslora", "dora", "qlora", "zo"),
            synonyms=(("mezo", "zo"),),
            later=("full", "freeze", "vera", "ia3", "loha", "oft"),
        ),
        "how it trains; rslora and dora are lora with use_rslora or use_dora, qlora is lora with quantization: nf4, "
        "zo needs forward passes alone",
        default="lora",
        aliases=("finetuning_type", "adapter"),
    )
    lora_r: int = key(Whole(1, 65536), "rank", default=16, aliases=("lora_rank",))
    lora_alpha: int = key(Whole(1, 2**20), "the update counts lora_alpha / lora_r", default=32)
    lora_dropout: float = key(
        Number(maximum=1, excludes_maximum=True), "dropout before the adapter", default=0.0
    )
    lora_target_modules: str | tuple[str, ...] = key(
        Names(all_word="all-linear"),
        "which layers get an adapter: the last part of their names",
        default="all-linear",
        aliases=("lora_target",),
        example="q_proj,v_proj",
    )
    lora_modules_to_save: tuple[str, ...] = key(
        Names(none_word="none"),
        "modules trained and saved whole beside the adapter",
        default=(),
        aliases=("modules_to_save", "additional_target"),
        example="lm_head",
    )
    use_rslora: bool = key(
        YesNo(), "scale by 1/√r instead of 1/r (arXiv 2312.03732)", default=False
    )
    use_dora: bool = key(
        YesNo(),
        "weight-decomposed adapters (arXiv 2402.09353)",
        default=False,
        aliases=("peft_use_dora",),
    )
    init_lora_weights: bool | str = key(
        YesNoOr(
            OneOf(
                ("gaussian", "loftq"),
                later=("eva", "olora", "pissa", "corda", "orthogonal", "mica"),
            )
        ),
        "where adapters begin: true, gaussian: at no change; loftq: at what quantization took away from the weights (arXiv "
        "2310.08659), which are looked at once; false: at random",
        default=True,
        example="loftq",
    )
    loftq_source: str | None = key(
        Or("auto", Text("a folder or a Hugging Face model id", is_path=True)),
        "the model that was quantized; auto: where `ssdtune pack`, or `quantization`, took it from",
        default=None,
        example="/models/llama-3.1-8b",
    )

    # Zeroth order
    zo_trains: str = key(
        OneOf(("adapters", "all", "low_rank")),
        "what method: zo moves: an adapter of the lora_* keys; all weights, whose files stay as they are; or all weights by "
        "lozo, the steps of a window held as one matrix of low rank for each: one product for a block that is read however "
        "many steps it has missed, and nothing written before the window is over. Other weights than those of all, where "
        "each step is rounded by itself",
        default="adapters",
    )
    zo_estimator: str = key(
        OneOf(("mezo", "fzoo", "lozo")),
        "two-sided differences (arXiv 2305.17333); many one-sided ones scaled by their spread (arXiv 2506.09034); "
        "two-sided ones along matrices of low rank (arXiv 2410.07698)",
        default="mezo",
    )
    zo_eps: float = key(
        Number(is_open=True), "how far the weights are moved along a direction", default=1e-3
    )
    zo_num_directions: int | None = key(
        Or("auto", Whole(1, 1024)),
        "random directions of a step, all in one fetch of a block; auto: 1 for mezo and lozo, 8 for fzoo",
        default=None,
        example="8",
    )
    zo_rank: int = key(Whole(1, 1024), "rank of lozo's directions", default=2)
    zo_window: int = key(
        Whole(1, 2**24), "steps for which one factor of lozo's directions stays", default=50
    )
    zo_update: str = key(
        OneOf(("sgd", "sign", "momentum", "adam", "lozo_m")),
        "what is done with an estimate: followed; its sign; it and zo_horizon - 1 earlier ones, weighted (ZO-SGD-MMT, "
        "arXiv 2402.11592); their moments (AdaMeZO, arXiv 2605.00650). Earlier ones are made again from the log, so that "
        "momentum and adam draw zo_horizon times as many random numbers for a step. lozo_m: LOZO-M, lozo's momentum in its "
        "factor of low rank, with zo_trains: low_rank",
        default="sgd",
    )
    zo_momentum: float | None = key(
        Or("auto", Number(maximum=1, excludes_maximum=True)),
        "decay of the first moment of momentum, adam and lozo_m; auto: 0.9, 0.7 and 0.7",
        default=None,
        example="0.9",
    )
    zo_beta2: float = key(
        Number(maximum=1, excludes_maximum=True), "decay of adam's second moment", default=0.9
    )
    zo_horizon: int = key(
        Whole(1, 1000), "steps that the moments of momentum and adam reach back", default=10
    )
    zo_mask: str = key(
        OneOf(("none", "random", "magnitude")),
        "which weights move: all; the same random ones in all steps; of all weights (zo_trains: all) those of the smallest "
        "magnitude in each parameter (Sparse-MeZO, arXiv 2402.15751)",
        default="none",
    )
    zo_mask_ratio: float = key(
        Number(is_open=True, maximum=1),
        "share of each parameter that zo_mask lets move",
        default=0.25,
    )
    zo_clip: float | None = key(
        Or("none", Number(is_open=True)),
        "bound of a direction's gradient",
        default=None,
        example="100",
    )
    zo_fold_steps: int | None = key(
        Or("never", Whole(1, 2**24)),
        "with zo_trains: all, after so many steps a block is written back to a working copy in offload.path, since until "
        "then it takes all of them again each time it is read; the weights are the same either way. With low_rank, rounded "
        "up to whole windows",
        default=10,
    )
    zo_master: bool = key(
        YesNo(),
        "with zo_trains: all, keep weights of 16 bits in float32, in slots and working copy, which are twice as large then; "
        "compute reads them rounded to 16 bits. Without it steps are rounded to 16 bits at random",
        default=False,
    )
    zo_packed: str = key(
        OneOf(("decoded", "kept", "moved")),
        "what slots hold of a packed base: its decoded weights; its packed bytes, from which variants are made in one "
        "pass, with adapters or zo_fold_steps: never; or packed bytes that train themselves (zo_trains: all, affine codes), "
        "rounded at random to codes and written back packed",
        default="decoded",
        example="kept",
    )

    # Data
    dataset: tuple[DatasetSource, ...] = key(
        _DATASETS, "what to train on", aliases=("datasets",), example="data/chats.jsonl"
    )
    eval_dataset: tuple[DatasetSource, ...] = key(
        _DATASETS, "what to evaluate on", default=(), example="data/eval.jsonl"
    )
    chat_template: str = key(
        Text(
            "auto, or the path of a .jinja file",
            is_path=True,
            pattern=r"auto|.+\.(jinja|jinja2|j2)",
        ),
        "auto: the tokenizer's own template",
        default="auto",
    )
    train_on: str = key(
        OneOf(("auto", "assistant", "completion", "last", "all")),
        "tokens with a loss: every answer, the completion, the last answer, all; "
        "auto: the answers, or all of a plain text",
        default="auto",
    )
    max_length: int = key(
        Whole(2, 2**24),
        "tokens of a row at most",
        default=2048,
        aliases=("cutoff_len", "sequence_len", "max_seq_length", "max_seq_len"),
    )
    overlong: str = key(
        OneOf(("truncate", "drop", "error")),
        "what becomes of longer rows; always counted and printed",
        default="truncate",
    )

    # Batch and length of the run
    per_device_train_batch_size: int = key(
        _COUNT,
        "the micro-batch: rows that pass a block at once",
        default=1,
        aliases=("micro_batch_size",),
    )
    per_device_eval_batch_size: int = key(
        Or("auto", _COUNT),
        "the same in evaluation; auto: as in training",
        default=None,
        aliases=("eval_batch_size",),
        example="4",
    )
    gradient_accumulation_steps: int = key(
        _COUNT,
        "micro-batches of a step; all pass a block before it leaves, so more of them cost no I/O",
        default=8,
    )
    num_train_epochs: float = key(
        Number(is_open=True, maximum=10_000),
        "passes over the data",
        default=1.0,
        aliases=("num_epochs", "epochs"),
    )
    max_steps: int = key(
        Whole(1, besides=(-1,)),
        "steps to make instead; -1: as many as num_train_epochs needs",
        default=-1,
    )

    # Optimizer
    optim: str = key(
        OneOf(
            ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"),
            later=(
                "adamw_8bit",
                "adamw_bnb_8bit",
                "paged_adamw_8bit",
                "paged_adamw_32bit",
                "adamw_torch_8bit",
                "adamw_torch_4bit",
                "galore_adamw",
                "lomo",
                "muon",
            ),
        ),
        "the optimizer of the adapter",
        default="adamw_torch",
        aliases=("optimizer",),
    )
    learning_rate: float = key(
        Number(maximum=10),
        "peak learning rate; LoRA wants about ten times that of full fine-tuning",
        default=1e-4,
        aliases=("lr",),
    )
    weight_decay: float = key(Number(maximum=1), "AdamW's decoupled weight decay", default=0.0)
    adam_beta1: float = key(
        Number(maximum=1, excludes_maximum=True), "decay of the first moment", default=0.9
    )
    adam_beta2: float = key(
        Number(maximum=1, excludes_maximum=True), "decay of the second moment", default=0.999
    )
    adam_epsilon: float = key(
        Number(is_open=True, maximum=1), "added to the denominator", default=1e-8
    )
    max_grad_norm: float = key(
        Number(maximum=1e9), "gradients are clipped to this norm; 0: not", default=1.0
    )
    lr_scheduler_type: str = key(
        OneOf(
            (
                "linear",
                "cosine",
                "cosine_with_restarts",
                "polynomial",
                "constant",
                "constant_with_warmup",
                "inverse_sqrt",
            ),
            later=(
                "reduce_lr_on_plateau",
                "cosine_with_min_lr",
                "cosine_warmup_with_min_lr",
                "warmup_stable_decay",
                "greedy",
            ),
        ),
        "how the learning rate goes down",
        default="linear",
        aliases=("lr_scheduler",),
    )
    warmup_steps: float = key(
        Number(is_steps=True), "steps until the peak; below 1 a share of the run", default=0.0
    )
    seed: int = key(Whole(0, 2**32 - 1), "of adapters and dropout", default=42)
    data_seed: int | None = key(
        Or("auto", Whole(0, 2**32 - 1)),
        "of the order of rows; auto: as Trainer draws it from seed",
        default=None,
        example="7",
    )

    # Evaluate, save, resume
    eval_strategy: str = key(
        OneOf(("no", "steps", "epoch")),
        "when to evaluate",
        default="no",
        aliases=("evaluation_strategy",),
    )
    eval_steps: float = key(
        Or("auto", _STEPS), "steps between two; auto: save_steps", default=None, example="100"
    )
    eval_on_start: bool = key(
        YesNo(), "evaluate before the first step: what training has changed", default=False
    )
    save_strategy: str = key(
        OneOf(("no", "steps", "epoch"), later=("best",)), "when to save", default="steps"
    )
    save_steps: float = key(
        _STEPS, "steps between two (steps are long here, so fewer than Trainer's 500)", default=100
    )
    save_total_limit: int | None = key(
        Or("none", _COUNT),
        "checkpoints kept, the newest; none: all",
        default=2,
    )
    load_best_model_at_end: bool = key(
        YesNo(), "end with the best checkpoint instead of the last", default=False
    )
    metric_for_best_model: str = key(
        Text("the name of a metric"), "what best means", default="loss"
    )
    resume_from_checkpoint: bool | str = key(
        YesNoOr(Text("auto or the path of a checkpoint", is_path=True)),
        "auto: go on where output_dir stands, if it does; true: it must; false: start anew",
        default="auto",
    )
    output_dir: Path = key(  # noqa: RUF009
        Text("a folder", is_folder=True),
        "where the run goes; the same command again resumes there",
        example="runs/my-first",
    )

    # Log
    logging_steps: float = key(
        _STEPS, "steps between two lines (steps are long here: each one)", default=1
    )
    report_to: tuple[str, ...] = key(
        Names(
            none_word="none",
            words=("tensorboard", "wandb", "mlflow", "comet_ml", "clearml", "trackio", "swanlab"),
        ),
        "trackers; nothing leaves your machine unless named here",
        default=(),
        example="tensorboard",
    )
    run_name: str | None = key(
        Or("none", Text("a name")), "the run's name in trackers", default=None, example="first"
    )
    dataloader_num_workers: int = key(
        Whole(0, 64), "processes that collate rows; 0: none beside the main one", default=0
    )

    # Machine
    offload: Offload = key(Record(Offload), "see below", default=Offload())  # noqa: RUF009

    groups: ClassVar[Mapping[str, str]] = {  # first key of each -> title
        "model_name_or_path": "Model",
        "method": "Adapter",
        "zo_trains": "Zeroth order",
        "dataset": "Data",
        "per_device_train_batch_size": "Batch and length of the run",
        "optim": "Optimizer",
        "eval_strategy": "Evaluate, save, resume",
        "logging_steps": "Log",
        "offload": "Machine",
    }
    not_supported: ClassVar[Mapping[str, str]] = NOT_SUPPORTED

    @property
    def step_rows(self) -> int:
        """Of one process's optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def __post_init__(self) -> None:
        read_again(self)
        for name, value in _resolved(self).items():
            object.__setattr__(self, name, value)
        for conflict in _conflicts(self):
            raise conflict


def _resolved(config: TrainConfig) -> dict[str, Any]:
    """What follows from other keys; the resolved config says it in full."""
    resolved: dict[str, Any] = {}
    if config.method in ("rslora", "dora"):
        resolved |= {"method": "lora", f"use_{config.method}": True}
    if config.method == "qlora":
        resolved["method"] = "lora"
        if config.quantization == "none":
            resolved["quantization"] = "nf4"
    at_once, rows = config.offload.micro_batch_size, config.step_rows
    if isinstance(at_once, int) and rows % at_once == 0:
        resolved["per_device_train_batch_size"] = at_once
        resolved["gradient_accumulation_steps"] = rows // at_once
    if config.eval_steps is None:
        resolved["eval_steps"] = config.save_steps
    if config.per_device_eval_batch_size is None:
        resolved["per_device_eval_batch_size"] = config.per_device_train_batch_size
    return resolved


def _conflicts(config: TrainConfig) -> Iterator[ConfigError]:
    """Keys that are right by themselves and not together, worst first."""
    if config.bf16 and config.fp16:
        yield ConfigError("bf16 and fp16 are both true.\nKeep one of them.", keys=("fp16", "bf16"))
    if config.eval_strategy != "no" and not config.eval_dataset:
        yield ConfigError(
            f"eval_strategy: {config.eval_strategy} needs an eval_dataset.\n"
            'Add one, for instance a split "train[98%:]" of the training file, or write '
            "eval_strategy: no.",
            keys=("eval_strategy",),
        )
    at_once, rows = config.offload.micro_batch_size, config.step_rows
    if isinstance(at_once, int) and rows % at_once:
        sizes = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
        yield ConfigError(
            f"offload.micro_batch_size: {at_once} does not divide the {rows} rows of a step "
            "(per_device_train_batch_size × gradient_accumulation_steps).\n"
            f"Set it to one of {sizes}, or to auto.",
            keys=("offload.micro_batch_size",),
        )
    if config.zo_estimator == "fzoo" and config.zo_num_directions == 1:
        yield ConfigError(
            "zo_num_directions: fzoo divides by how far the losses of several directions spread; 1 has no spread.\n"
            "Set it to 2 or more.",
            keys=("zo_num_directions",),
        )
    if config.method == "zo":
        yield from _zo_conflicts(config)
    if config.init_lora_weights == "loftq" and config.use_dora:
        yield ConfigError(
            "init_lora_weights: loftq does not go with use_dora (method: dora): its magnitudes are those of the quantized "
            "weights.\nSet one of them.",
            keys=("init_lora_weights", "use_dora"),
        )
    if config.load_best_model_at_end:
        yield from _best_model_conflicts(config)


def _zo_conflicts(config: TrainConfig) -> Iterator[ConfigError]:
    is_low_rank = config.zo_trains == "low_rank"
    if is_low_rank and config.zo_estimator != "lozo":
        yield ConfigError(
            f"zo_trains: low_rank holds the steps of lozo's windows, and {config.zo_estimator} has none.\n"
            "Write zo_estimator: lozo, or zo_trains: all.",
            keys=("zo_trains",),
        )
    if config.zo_update == "lozo_m" and not is_low_rank:
        yield ConfigError(
            "zo_update: lozo_m is the momentum of windows that are held as matrices of low rank.\n"
            "Write zo_estimator: lozo and zo_trains: low_rank, or another zo_update.",
            keys=("zo_update",),
        )
    if config.zo_master and (config.zo_trains != "all" or config.zo_packed != "decoded"):
        yield ConfigError(
            "zo_master: true is for zo_trains: all on a base that is not packed.\nLeave it out, or change those.",
            keys=("zo_master",),
        )
    for name, known in (("zo_update", ("sgd", "lozo_m")), ("zo_mask", ("none",))):
        value, plain = getattr(config, name), known[0]
        if config.zo_estimator == "lozo" and value not in known:
            yield ConfigError(
                f"{name}: {value} does not go with zo_estimator: lozo.\n"
                f"Write {name}: {plain}, or take another estimator.",
                keys=(name,),
            )
    if config.zo_mask == "magnitude" and config.zo_trains == "adapters":
        yield ConfigError(
            "zo_mask: magnitude is of the base model's weights; an adapter's are none of them.\n"
            "Write zo_trains: all, or zo_mask: random.",
            keys=("zo_mask",),
        )


def _best_model_conflicts(config: TrainConfig) -> Iterator[ConfigError]:
    if config.eval_strategy == "no" or config.eval_strategy != config.save_strategy:
        yield ConfigError(
            "load_best_model_at_end: each checkpoint must be evaluated, but eval_strategy is "
            f"{config.eval_strategy} and save_strategy is {config.save_strategy}.\n"
            "Set both to steps, or both to epoch.",
            keys=("load_best_model_at_end",),
        )
    every, saved = config.eval_steps, config.save_steps
    if config.eval_strategy == "steps" and saved != every and (every < 1 or saved % every):
        yield ConfigError(
            f"load_best_model_at_end: save_steps {saved:g} is no multiple of eval_steps {every:g}.\n"
            f"Set save_steps to {every:g} or a multiple of it.",
            keys=("load_best_model_at_end",),
        )
