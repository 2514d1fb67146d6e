"""What a step does with gradients, at which rate, and the seeds."""

from dataclasses import dataclass

from ssdtune.settings import Number, OneOf, Or, Whole, key


@dataclass(frozen=True, kw_only=True, init=False, eq=False, repr=False)
class OptimizerKeys:
    """The optimizer and its schedule."""

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
