"""`SSDConfig`: TrainingArguments with the few things a streamed model adds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from ssdtune.trainer.errors import RunError

if TYPE_CHECKING:
    from ssdtune.config import TrainConfig

# Keys of TrainConfig that are TrainingArguments of the same name.
SHARED = (
    "adam_beta1 adam_beta2 adam_epsilon bf16 data_seed dataloader_num_workers eval_on_start "
    "eval_steps eval_strategy fp16 gradient_accumulation_steps learning_rate load_best_model_at_end "
    "logging_steps lr_scheduler_type max_grad_norm max_steps metric_for_best_model "
    "num_train_epochs optim per_device_eval_batch_size per_device_train_batch_size run_name "
    "save_steps save_strategy save_total_limit seed warmup_steps weight_decay"
).split()


@dataclass
class SSDConfig(TrainingArguments):
    """Arguments of `SSDTrainer`. `per_device_train_batch_size` rows are one micro-batch.

    All `gradient_accumulation_steps` micro-batches of a step pass a block before it leaves, so that
    more of them cost no reading. Defaults are TrainingArguments' own but for
    `include_num_input_tokens_seen`.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "offload", "model_init_kwargs"]  # noqa: RUF012

    include_num_input_tokens_seen: str | bool = field(
        default="non_padding",
        metadata={"help": "Count tokens, padding left out, and log them as `num_tokens`."},
    )
    offload: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Budgets and paths for a model given by name; see `ssdtune.Offload`."},
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keywords of `ssdtune.stream` for a model given by name."},
    )
    save_on_interrupt: bool = field(
        default=True,
        metadata={
            "help": "At SIGINT (Ctrl-C) or SIGTERM: save when the step under way is done, then "
            "stop. A second signal stops at once. Has no effect with save_strategy='no'."
        },
    )

    def __post_init__(self) -> None:
        """Without a GPU, torchrun's processes must be told to meet on the CPU: accelerate would take each for the
        only one."""
        import torch

        self.use_cpu = self.use_cpu or not torch.cuda.is_available()
        super().__post_init__()


def training_arguments(config: TrainConfig, **more: Any) -> SSDConfig:
    """The SSDConfig of a TrainConfig: keys of the same name, nothing else set. more: overrides. Raises RunError for a
    tracker that is not installed."""
    import torch

    _check_trackers(config)
    fields = {name: getattr(config, name) for name in SHARED}
    known = {f.name for f in dataclasses.fields(SSDConfig)}
    assert set(fields) <= known, set(fields) - known
    return SSDConfig(
        output_dir=str(config.output_dir),
        report_to=list(config.report_to) or "none",
        dataloader_pin_memory=torch.cuda.is_available(),
        **{**fields, **more},
    )


def _check_trackers(config: TrainConfig) -> None:
    from transformers.integrations.integration_utils import (
        get_available_reporting_integrations,
    )

    there = get_available_reporting_integrations() if config.report_to else []
    if missing := [name for name in config.report_to if name not in there]:
        raise RunError(
            f"report_to: {', '.join(missing)}: not installed here.\n"
            f"Install it (pip install {' '.join(missing)}), or leave it out."
        )
