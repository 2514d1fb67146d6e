"""Keys of other tools: those that mean something else here, and those that are refused.

Plain other names (`lora_rank` for lora_r) stand beside each key in keys/. Here are the ones whose
value changes too, and the known keys that do nothing yet, each with what to do instead, and with
the value, where there is one, that asks for what happens anyway.
"""

from collections.abc import Callable, Mapping

from ssdtune.settings import Number, OneOf, Reader, Refused, YesNo
from ssdtune.strict_yaml import ConfigError, Node, shown

_OWN_RECOMPUTE = "ssdtune recomputes each block by itself. Delete this key."
_DEVICES = "ssdtune places weights itself, see `offload`. Delete this key."
_FILE_SPLIT = 'Write eval_dataset: [{path: …, split: "train[98%:]"}] and split "train[:98%]".'
_NO_HUB = "Nothing is uploaded. Delete this key, and upload output_dir yourself."
_QUANTIZATION = "Write quantization: 4 (or nf4, 8, lossless, …). Delete this key."
_OWN_VERB = "Delete this key: the verb says it (`ssdtune train`)."

# Known keys of this and of other tools that do nothing here, and what to do instead. A key ending
# in * stands for all that begin so.
NOT_SUPPORTED: Mapping[str, str] = {
    "quantization_*": _QUANTIZATION,
    "bnb_*": _QUANTIZATION,
    "packing": "Each row is its own sequence. Delete this key.",
    "sample_packing": "Each row is its own sequence. Delete this key.",
    "push_to_hub": _NO_HUB,
    "hub_*": _NO_HUB,
    "deepspeed*": _DEVICES,
    "fsdp*": _DEVICES,
    "device_map": _DEVICES,
    "loftq_config": "Weights stay as they are packed. Write init_lora_weights: loftq. Delete this key.",
    "layer_offloading": _DEVICES,
    "gradient_checkpointing_kwargs": _OWN_RECOMPUTE,
    "activation_checkpointing_kwargs": _OWN_RECOMPUTE,
    "torch_compile*": "Delete this key.",
    "neftune_noise_alpha": "Delete this key.",
    "label_smoothing_factor": "Delete this key.",
    "use_liger_kernel": "The loss is computed in chunks already. Delete this key.",
    "auto_find_batch_size": "Set per_device_train_batch_size.",
    "lr_scheduler_kwargs": "Delete this key.",
    "optim_args": "Delete this key.",
    "val_size": _FILE_SPLIT,
    "val_set_size": _FILE_SPLIT,
    "dataset_dir": "Write the whole path under `dataset`.",
    "group_by_length": "Trainer has it no more. Delete this key.",
    "logging_dir": "Trainer has it no more. Delete this key.",
    "save_safetensors": "Checkpoints are safetensors always. Delete this key.",
    "overwrite_output_dir": "Write resume_from_checkpoint: false, or another output_dir.",
    "use_peft": "Delete this key: method: lora says it.",
    "stage": _OWN_VERB,
    "do_train": _OWN_VERB,
    "do_eval": "Set eval_strategy instead.",
}

# Those of them that may say what ssdtune does without them: how their value is read, and that one.
AS_WITHOUT: Mapping[str, tuple[Reader, object]] = {
    "packing": (YesNo(), False),
    "sample_packing": (YesNo(), False),
    "push_to_hub": (YesNo(), False),
    "torch_compile": (YesNo(), False),
    "use_liger_kernel": (YesNo(), False),
    "auto_find_batch_size": (YesNo(), False),
    "group_by_length": (YesNo(), False),
    "overwrite_output_dir": (YesNo(), False),
    "save_safetensors": (YesNo(), True),
    "do_train": (YesNo(), True),
    "stage": (OneOf(("sft",)), "sft"),
    "neftune_noise_alpha": (Number(), 0),
    "label_smoothing_factor": (Number(), 0),
    "val_size": (Number(), 0),
    "val_set_size": (Number(), 0),
}


def translate(name: str, node: Node) -> tuple[dict[str, Node], str] | None:
    """What a key of another tool becomes: (our entries, the line to print); None if not known."""
    rule = _RULES.get(name)
    if rule is not None:
        entries, what = rule(name, node)
        return entries, f"{node.place}: {name}: {what}"
    if _is_as_without(name, node):
        written = str(node.value).lower()
        return {}, f"{node.place}: {name}: {written} is how it is without this key"
    return None


def _is_as_without(name: str, node: Node) -> bool:
    """Whether a key that is not supported asks for what happens anyway. A value of the wrong kind does not."""
    reader, value = AS_WITHOUT.get(name, (None, None))
    try:
        return reader is not None and reader.read(node, name) == value
    except Refused:
        return False


def _gradient_checkpointing(name: str, node: Node) -> tuple[dict[str, Node], str]:
    try:
        YesNo().read(node, name)
    except Refused as refusal:
        raise ConfigError(
            f"{node.place}: {name}: {refusal}.\nAllowed: true or false.\n"
            "Better delete it: ssdtune recomputes each block by itself."
        ) from refusal
    return {}, "replaced by ssdtune's own: every block is recomputed in backward, always"


def _load_in(name: str, node: Node) -> tuple[dict[str, Node], str]:
    try:
        is_wanted = YesNo().read(node, name)
    except Refused as refusal:
        raise ConfigError(
            f"{node.place}: {name}: {refusal}.\nAllowed: true or false.\n"
            "Better write `quantization: 4`."
        ) from refusal
    if not is_wanted:
        return {}, "false is how it is without this key"
    word = {"load_in_4bit": "nf4", "load_in_8bit": "8"}[name]
    return {"quantization": Node(word, node.place)}, f"read as quantization: {word}"


def _warmup_ratio(name: str, node: Node) -> tuple[dict[str, Node], str]:
    try:
        Number(maximum=1, excludes_maximum=True).read(node, name)
    except Refused as refusal:
        raise ConfigError(
            f"{node.place}: {name}: {refusal}.\nAllowed: a share of the run, 0 to below 1.\n"
            "Write `warmup_steps: 0.03` for a share or `warmup_steps: 100` for steps."
        ) from refusal
    return {"warmup_steps": node}, "read as warmup_steps, which below 1 is a share of the run"


def _template(name: str, node: Node) -> tuple[dict[str, Node], str]:
    text = node.value if isinstance(node.value, str) else ""
    if text == "auto" or "." in text:
        return {"chat_template": node}, "read as chat_template"
    auto = Node("auto", node.place)
    return {"chat_template": auto}, (
        f"{shown(node.value)} is another tool's; read as chat_template: auto, the tokenizer's own"
    )


_RULES: Mapping[str, Callable[[str, Node], tuple[dict[str, Node], str]]] = {
    "gradient_checkpointing": _gradient_checkpointing,
    "activation_checkpointing": _gradient_checkpointing,
    "warmup_ratio": _warmup_ratio,
    "load_in_4bit": _load_in,
    "load_in_8bit": _load_in,
    "template": _template,
}
TRANSLATED = tuple(_RULES)
