"""The README.md of an adapter: what it was trained from, on what, how, and how far it came."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import yaml

from ssdtune import __version__

if TYPE_CHECKING:
    from ssdtune.config import TrainConfig
    from ssdtune.data import DataStats

SHOWN = (
    "method lora_r lora_alpha lora_dropout lora_target_modules use_rslora use_dora init_lora_weights train_on "
    "max_length per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps "
    "optim learning_rate lr_scheduler_type warmup_steps weight_decay max_grad_norm seed dtype bf16 fp16"
).split()
ZO_SHOWN = (
    "method zo_trains zo_estimator zo_eps zo_num_directions zo_rank zo_window zo_update zo_momentum zo_beta2 "
    "zo_horizon zo_mask zo_mask_ratio zo_clip zo_fold_steps zo_master zo_packed train_on "
    "max_length per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps "
    "learning_rate lr_scheduler_type warmup_steps weight_decay seed dtype bf16 fp16"
).split()
PACKAGES = ("torch", "transformers", "peft")


def model_card(config: TrainConfig, stats: DataStats, metrics: Mapping[str, Any]) -> str:
    """Markdown with the header that model hubs read.

    stats: of the training rows. metrics: as `TrainResult.metrics` has them.
    """
    name = str(config.model_name_or_path)
    is_log = config.method == "zo" and config.zo_trains != "adapters"
    header: dict[str, Any] = {"base_model": name, "pipeline_tag": "text-generation"}
    if not is_log:
        header["library_name"] = "peft"
    header["tags"] = ["zeroth-order" if config.method == "zo" else "lora", "ssdtune"]
    lines = ["---", yaml.safe_dump(header, sort_keys=False).strip(), "---", ""]
    lines += [f"# {'All weights' if is_log else 'LoRA adapter'} for {name}", ""]
    lines += ["Trained with ssdtune; every value stands in `ssdtune.yaml`.", ""]
    lines += ["## Result", "", *_table(_results(metrics)), ""]
    lines += ["## Data", "", *_table(_data(config, stats)), ""]
    lines += ["## Hyper-parameters", "", *_table(_hyper_parameters(config)), ""]
    lines += ["## Use", "", *(_use_of_log(config) if is_log else _use_of_adapter(config)), ""]
    lines += [
        f"`ssdtune generate {config.output_dir} -p …` needs no memory for the whole model.",
        "",
    ]
    return "\n".join(lines)


def _use_of_adapter(config: TrainConfig) -> list[str]:
    load = f'model = AutoPeftModelForCausalLM.from_pretrained("{config.output_dir}")'
    code = ["```python", "from peft import AutoPeftModelForCausalLM", "", load, "```"]
    if config.init_lora_weights != "loftq":
        return code
    return [
        f"The adapter makes up for what packing took away (LoftQ): it belongs on the base as `quantization: "
        f"{config.quantization}` packs it. On the unpacked one, which this loads, it is off by that much.",
        "",
        *code,
    ]


def _use_of_log(config: TrainConfig) -> list[str]:
    """Weights are the base's and the log's steps."""
    return [
        "The run is its log: `zeroth_order.jsonl`. The weights are made from it and the base:",
        "",
        f"`ssdtune replay {config.output_dir} --out FOLDER`",
    ]


def _table(rows: Mapping[str, Any]) -> list[str]:
    cells = {k: str(v).replace("|", "\\|").replace("\n", " ") for k, v in rows.items()}
    return ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in cells.items())]


def _results(metrics: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "loss_first" in metrics:
        found["loss"] = f"{metrics['loss_first']:.4f} → {metrics['loss_last']:.4f}"
    if "eval_loss" in metrics:
        first = metrics.get("eval_loss_first")
        before = "" if first is None else f"{first:.4f} → "
        found["evaluation loss"] = f"{before}{metrics['eval_loss']:.4f}"
    if "eval_accuracy" in metrics:
        found["evaluation accuracy"] = f"{metrics['eval_accuracy']:.1%}"
    found["optimizer steps"] = metrics.get("global_step", 0)
    found["trained parameters"] = f"{metrics.get('num_trainable', 0):,}"
    versions = [f"ssdtune {__version__}", *(f"{name} {_version(name)}" for name in PACKAGES)]
    found["versions"] = ", ".join(versions)
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _data(config: TrainConfig, stats: DataStats) -> dict[str, Any]:
    return {
        "dataset": ", ".join(f"{source.path} ({source.split})" for source in config.dataset),
        "rows": f"{stats.num_rows:,} {stats.noun} ({stats.format})",
        "tokens": f"{stats.num_tokens:,}, {stats.num_trained_tokens:,} of them trained",
        "cut": f"{stats.num_cut:,} rows, {stats.tokens_cut:,} tokens",
        "dropped": f"{stats.num_dropped:,} rows",
    }


def _hyper_parameters(config: TrainConfig) -> dict[str, Any]:
    shown = list(SHOWN)
    if config.method == "zo":
        adapter = (
            [name for name in SHOWN if "lora" in name] if config.zo_trains == "adapters" else []
        )
        shown = [*ZO_SHOWN[:1], *adapter, *ZO_SHOWN[1:]]
    values = {name: getattr(config, name) for name in shown}
    return {
        name: ", ".join(value) if isinstance(value, tuple) else value
        for name, value in values.items()
    }
