"""How it trains, and the adapter that does."""

from dataclasses import dataclass

from ssdtune.settings import Names, Number, OneOf, Or, Text, Whole, YesNo, YesNoOr, key


@dataclass(frozen=True, kw_only=True, init=False, eq=False, repr=False)
class AdapterKeys:
    """The method and its low-rank adapter."""

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
