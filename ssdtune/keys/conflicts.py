"""Keys that are right by themselves and not together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ssdtune.strict_yaml import ConfigError

if TYPE_CHECKING:
    from ssdtune.keys.train import TrainConfig


def conflicts(config: TrainConfig) -> Iterator[ConfigError]:
    """An error for each pair that excludes each other, worst first."""
    if config.bf16 and config.fp16:
        yield ConfigError("bf16 and fp16 are both true.\nKeep one of them.", keys=("fp16", "bf16"))
    if config.eval_on_start and not config.eval_dataset:
        yield ConfigError(
            "eval_on_start: true needs an eval_dataset.\nAdd one, or write eval_on_start: false.",
            keys=("eval_on_start",),
        )
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
        yield from _trainer_conflicts(config)
        yield from _zo_conflicts(config)
    if config.init_lora_weights == "loftq" and config.use_dora:
        yield ConfigError(
            "init_lora_weights: loftq does not go with use_dora (method: dora): its magnitudes are those of the quantized "
            "weights.\nSet one of them.",
            keys=("init_lora_weights", "use_dora"),
        )
    if config.load_best_model_at_end:
        yield from _best_model_conflicts(config)


def _trainer_conflicts(config: TrainConfig) -> Iterator[ConfigError]:
    """Of method: zo with keys that are Trainer's own."""
    if config.fp16:
        yield ConfigError(
            "fp16: true scales losses for a backward pass, and method: zo has none.\n"
            "Write bf16: true, or dtype: bfloat16, in its place.",
            keys=("fp16",),
        )
    if config.load_best_model_at_end and config.zo_trains != "adapters":
        yield ConfigError(
            f"load_best_model_at_end: with zo_trains: {config.zo_trains} a checkpoint holds no weights to load.\n"
            "Leave it out; `ssdtune replay OUTPUT_DIR --out FOLDER --step N` makes those of the best step, which "
            "metrics.jsonl tells.",
            keys=("load_best_model_at_end",),
        )


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
