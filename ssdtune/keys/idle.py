"""Keys that change nothing beside the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ssdtune.keys.adapter import AdapterKeys
from ssdtune.keys.zeroth_order import ZerothOrderKeys

if TYPE_CHECKING:
    from ssdtune.keys.train import TrainConfig

_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
_LORA = tuple(f.name for f in dataclasses.fields(AdapterKeys) if f.name != "method")
_FOR_BACKWARD = tuple(f"offload.{n}" for n in ("block_inputs", "activations", "nvme_activations"))
_ZO = tuple(f.name for f in dataclasses.fields(ZerothOrderKeys))
_RULES = {  # what some of zo_update's rules alone make use of
    "zo_momentum": ("momentum", "adam", "lozo_m"),
    "zo_beta2": ("adam",),
    "zo_horizon": ("momentum", "adam"),
}


def idle_keys(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """Yields (key, why) of each whose value does not matter, given or not."""
    yield from _of_the_run(config)
    if config.method == "zo":
        yield from _beside_zo(config)
    else:
        for name in _ZO:
            yield name, "method is not zo"
        if not config.optim.startswith("adamw"):
            for name in _ADAM:
                yield name, f"optim is {config.optim}"
    has_adapter = config.method != "zo" or config.zo_trains == "adapters"
    if has_adapter and config.init_lora_weights != "loftq":
        yield "loftq_source", "init_lora_weights is not loftq"


def _of_the_run(config: TrainConfig) -> Iterator[tuple[str, str]]:
    if config.eval_strategy != "steps" and config.eval_steps != config.save_steps:  # as auto has it
        yield "eval_steps", f"eval_strategy is {config.eval_strategy}"
    if config.save_strategy != "steps":
        yield "save_steps", f"save_strategy is {config.save_strategy}"
    if config.eval_strategy == "no" and not config.eval_on_start:
        yield "eval_dataset", "eval_strategy is no: nothing is evaluated during training"
    if config.max_steps > 0:
        yield "num_train_epochs", f"max_steps is {config.max_steps}"
    if not config.load_best_model_at_end:
        yield "metric_for_best_model", "load_best_model_at_end is false"


def _beside_zo(config: TrainConfig) -> Iterator[tuple[str, str]]:
    for name in ("optim", *_ADAM, "max_grad_norm"):
        yield name, "method is zo: there are no gradients, and zo_update is the rule"
    for name in _FOR_BACKWARD:
        yield name, "method is zo: nothing waits for a backward"
    if config.zo_trains == "adapters":
        yield "lora_dropout", "method is zo: all variants pass without dropout"
        yield "zo_fold_steps", "zo_trains is adapters: nothing is written back"
    else:
        for name in _LORA:
            yield name, f"zo_trains is {config.zo_trains}: there is no adapter"
    if config.zo_estimator != "lozo":
        yield "zo_rank", f"zo_estimator is {config.zo_estimator}"
        yield "zo_window", f"zo_estimator is {config.zo_estimator}"
    for name, rules in _RULES.items():
        if config.zo_update not in rules:
            yield name, f"zo_update is {config.zo_update}"
    if config.zo_mask == "none":
        yield "zo_mask_ratio", "zo_mask is none"
