"""From `lora_*` keys to a peft model, and what `all-linear` means on a model of many parts.

`all-linear` is every linear layer of the language model except

* the head (peft's own convention), and routers, whose choices LoRA is not meant to move;
* a vision or audio tower and its projector, where there is one: adapters are for the text model,
  unless the tower's layers are named;
* experts that are stacked in one parameter, and what peft would take for them: of a mixture of
  128 experts, adapters on each have more parameters than a whole small model. Their names
  (`gate_up_proj`, `down_proj`) in `lora_target_modules` adapt them, through `target_parameters`.

What was left out is said. Nothing here reads a weight, except DoRA, which needs each one's norm, and LoftQ.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ssdtune.errors import SSDTuneError
from ssdtune.peft.errors import AdapterError
from ssdtune.peft.loftq import LOFTQ, replace_lora_weights_loftq
from ssdtune.sizes import format_size

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from ssdtune.config import TrainConfig

ALL_LINEAR = "all-linear"
ROUTERS = frozenset({"router", "shared_expert_gate", "modality_router"})
OTHER_MODALITIES = ("vision_config", "audio_config", "vision_tower_config")
# peft refuses these in Mamba models: their fused kernels read the weights past the layer.
MAMBA_KERNELS = frozenset({"out_proj", "conv1d"})
# Dense layers that peft, in models whose experts transformers 5 stacks, takes for the experts
# (peft/utils/transformers_weight_conversion.py): adapting them by name would adapt every expert.
TAKEN_FOR_EXPERTS = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
NAMED_AS_EXPERTS = "dense layers and shared experts"


@dataclass(frozen=True)
class Targets:
    """What an adapter goes on, in peft's terms.

    modules: last parts of names. excluded: a pattern of full names, None where there are none.
    """

    modules: tuple[str, ...]
    excluded: str | None


def lora_config(config: TrainConfig, model: PreTrainedModel) -> LoraConfig:
    """peft's LoraConfig of the `lora_*`, `use_dora` and `use_rslora` keys. Raises AdapterError."""
    from peft import LoraConfig

    made = LoraConfig(
        task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules
        if isinstance(config.lora_target_modules, str)
        else list(config.lora_target_modules),
        modules_to_save=list(config.lora_modules_to_save) or None,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        # LoftQ's values take the place of peft's, once the adapter is there.
        init_lora_weights=True if config.init_lora_weights == LOFTQ else config.init_lora_weights,  # type: ignore[arg-type]
    )
    return resolved(made, model)


def resolved(peft_config: PeftConfig, model: PreTrainedModel) -> Any:
    """A copy of the config whose targets are names of this model; without targets, itself.

    `all-linear` becomes a list; names of stacked experts move to `target_parameters`.
    """
    wanted = getattr(peft_config, "target_modules", None)
    if wanted is None:
        return peft_config
    made: Any = copy.deepcopy(peft_config)
    if isinstance(wanted, str):
        if wanted.lower() == ALL_LINEAR:
            targets = resolve_all_linear(model)
            made.target_modules = list(targets.modules)
            if targets.excluded and not made.exclude_modules:
                made.exclude_modules = targets.excluded
        return made
    stacked = {name.rpartition(".")[2] for name, _ in stacked_experts(model)}
    modules = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    experts = [n for n in wanted if n in stacked and (n not in modules or n in TAKEN_FOR_EXPERTS)]
    if experts and hasattr(made, "target_parameters"):
        made.target_parameters = sorted({*(made.target_parameters or ()), *experts})
        made.target_modules = [name for name in wanted if name not in experts]
    _require_known_names(made.target_modules, modules, stacked)
    return made


def attach(model: PreTrainedModel, peft_config: PeftConfig) -> PeftModel:
    """`peft.get_peft_model`, with targets resolved and refusals in words; with init_lora_weights="loftq" by
    `replace_lora_weights_loftq` instead of peft's own, which packs anew. Raises AdapterError."""
    from peft import get_peft_model

    made = resolved(peft_config, model)
    is_loftq = getattr(made, "init_lora_weights", None) == LOFTQ
    if is_loftq:  # a copy: what is saved must not begin anew where it is loaded
        made = copy.deepcopy(made)
        made.init_lora_weights, made.loftq_config = True, {}
    try:
        adapted: Any = get_peft_model(model, made)
    except SSDTuneError:
        raise
    except ValueError as error:
        reason = " ".join(str(error).split())[:300]
        raise AdapterError(
            f"peft can't put this adapter on {type(model).__name__}: {reason}\n"
            "Change lora_target_modules, or the method."
        ) from error
    if not any(p.requires_grad for p in adapted.parameters()):
        raise AdapterError(
            "the adapter has no parameter to train.\nName other layers in lora_target_modules."
        )
    if is_loftq:
        replace_lora_weights_loftq(adapted)
    return adapted


def announce(model: PeftModel) -> list[str]:
    """Lines that say what trains, how much of the model that is, and what `all-linear` left out."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    count = sum(p.numel() for _, p in trained)
    total = sum(p.numel() for p in model.get_base_model().parameters())
    settings: Any = model.peft_config[model.active_adapters[0]]
    kinds = Counter(_adapted_leaf(name) for name, _ in trained)
    what = settings.peft_type.value.replace("LORA", "LoRA")
    what = "DoRA" if getattr(settings, "use_dora", False) else what
    rank = f" r{settings.r}" if hasattr(settings, "r") else ""
    size = format_size(sum(p.numel() * p.element_size() for _, p in trained))
    lines = [
        f"adapter   {what}{rank} on {', '.join(sorted(kinds))}",
        f"trains    {count:,} parameters ({size}; {100 * count / total:.2g} % of the model's)",
    ]
    lines += [f"          not adapted: {what}" for what in _left_out(model)]
    return lines


def fingerprint_of(trained: Mapping[str, torch.Tensor]) -> str:
    """Of an adapter's parameters: names, dtypes, shapes and values, every bit of them."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in trained.items():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        values = parameter.detach().cpu().contiguous()
        digest.update(values.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def resolve_all_linear(model: PreTrainedModel) -> Targets:
    """Which layers `all-linear` names in this model; see the module's docstring."""
    taken: set[str] = set()
    refused: list[str] = []
    for name, module in _linear_layers(model):
        if _is_left_out(model, name, module):
            refused.append(name)
        else:
            taken.add(_leaf(name))
    if not taken:
        raise AdapterError(
            f"all-linear finds no linear layer in {type(model).__name__}.\n"
            "Name layers in lora_target_modules: the last part of their names, as in q_proj,v_proj."
        )
    # A suffix such as `q_proj` would match a tower's layer too.
    shadowed = [n for n in refused if _leaf(n) in taken]
    return Targets(tuple(sorted(taken)), _pattern(shadowed))


def stacked_experts(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields the parameters that hold the weights of all experts of a layer, stacked."""
    for name, parameter in model.named_parameters():
        owner, _, _ = name.rpartition(".")
        if parameter.dim() == 3 and owner.rpartition(".")[2] == "experts":
            yield name, parameter


# ------------------------------------------------------------------ which layers


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    from transformers.pytorch_utils import Conv1D

    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            yield name, module


def _is_left_out(model: PreTrainedModel, name: str, module: nn.Module) -> bool:
    """Whether `all-linear` leaves the layer alone: the head, other modalities, routers, what Mamba's kernels read, what
    peft would take for experts."""
    leaf = _leaf(name)
    text = _language_model_name(model)
    return (
        module is model.get_output_embeddings()
        or (text is not None and not name.startswith(f"{text}."))
        or leaf in ROUTERS
        or (leaf == "gate" and _has_experts(model))
        or (leaf in MAMBA_KERNELS and "mamba" in str(model.config.model_type))
        or (leaf in TAKEN_FOR_EXPERTS and _peft_converts(model))
    )


def _language_model_name(model: PreTrainedModel) -> str | None:
    """Dotted name of the text model inside a multimodal one; None where the whole is text."""
    if not any(getattr(model.config, key, None) is not None for key in OTHER_MODALITIES):
        return None
    decoder = model.get_decoder()
    return next(
        (name for name, module in model.named_modules() if module is decoder and name), None
    )


def _has_experts(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config()
    counts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any(getattr(config, key, None) for key in counts)


def _peft_converts(model: PreTrainedModel) -> bool:
    """Whether peft reads old names of experts in this architecture's targets (peft 0.19 and later)."""
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:
        return False
    families: Any = conversion.__dict__["_MODEL_TO_CONVERSION_PATTERN"]
    family = families.get(model.config.model_type)
    return family in conversion._MOE_TARGET_MODULE_MAPPING


def _leaf(name: str) -> str:
    """`q_proj` of `layers.0.self_attn.q_proj`; `projections.1` where the last part is a number."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def _pattern(names: Iterable[str]) -> str | None:
    """A pattern that matches exactly these names, numbers of layers made one."""
    shapes = {re.sub(r"\\\.\d+(?=\\\.|$)", r"\\.\\d+", re.escape(name)) for name in names}
    return "|".join(sorted(shapes)) or None


def _require_known_names(wanted: Iterable[str], modules: set[str], stacked: set[str]) -> None:
    for name in wanted:
        leaf = name.rpartition(".")[2]
        if leaf in modules or leaf in stacked or leaf in TAKEN_FOR_EXPERTS:
            continue
        near = difflib.get_close_matches(leaf, modules | stacked, n=1)
        hint = f"Did you mean {near[0]}?" if near else "`all-linear` takes every linear layer."
        raise AdapterError(f"lora_target_modules: no layer of this model is called {name}.\n{hint}")


# ------------------------------------------------------------------ in words


def _adapted_leaf(name: str) -> str:
    """`q_proj` of `…q_proj.lora_A.default.weight`."""
    adapted = re.split(r"\.(?:base_layer\.)*(?:lora_|modules_to_save)", name)[0]
    return _leaf(adapted if adapted != name else name.rpartition(".")[0])


def _left_out(model: PeftModel) -> list[str]:
    """What `all-linear` leaves out of models like this one and carries no adapter here either."""
    base: Any = model.get_base_model()
    said = []
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    experts = {n.rpartition(".")[2].removeprefix("base_layer.") for n, _ in stacked_experts(base)}
    if experts and not any(".experts." in name for name in trained):
        names = ", ".join(sorted(experts))
        said.append(f"the experts (name {names} in lora_target_modules to adapt them)")
        if _peft_converts(base):
            said.append(f"{NAMED_AS_EXPERTS} (peft takes their names for those of the experts)")
    text = _language_model_name(base)
    if text is not None and all(f".{text}." in name for name in trained):
        said.append("towers and projectors of other modalities (name their layers to adapt them)")
    return said
