"""The model class that a config is of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssdtune.visit.asked import BuildError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def choose_class(
    config: PretrainedConfig, asked: type | None, folder: Path, *, trust_remote_code: bool
) -> type[PreTrainedModel]:
    """The model class: the one asked for, the repository's own code, or transformers' for it."""
    if asked is not None and not hasattr(asked, "_model_mapping"):
        return asked
    autos = _auto_classes(config) if asked is None else [asked]
    references = getattr(config, "auto_map", None) or {}
    for auto in autos:
        if trust_remote_code and auto.__name__ in references:
            return _remote_class(references[auto.__name__], folder)
        if type(config) in auto._model_mapping:
            from transformers.models.auto.auto_factory import _get_model_class

            return _get_model_class(config, auto._model_mapping)
    if any(auto.__name__ in references for auto in autos):
        raise BuildError(
            f"{folder} brings its own model code (auto_map in config.json).\n"
            "Read it, then pass trust_remote_code=True to run it."
        )
    raise BuildError(
        f"model_type {config.model_type!r} is no language model that transformers knows "
        f"({', '.join(auto.__name__ for auto in autos)}); name its class with model_class."
    )


def _auto_classes(config: PretrainedConfig) -> list[Any]:
    """In the order in which to ask: a config may be in several tables."""
    import transformers

    causal, images = transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText
    if getattr(config, "is_encoder_decoder", False):
        return [transformers.AutoModelForSeq2SeqLM, images, causal]
    return [images, causal, transformers.AutoModelForSeq2SeqLM]


def _remote_class(reference: str, folder: Path) -> type[PreTrainedModel]:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

    model_class = get_class_from_dynamic_module(reference, str(folder))
    return add_generation_mixin_to_remote_model(model_class)


def own_config(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PretrainedConfig:
    """The text part, where the class is a language model and the config a multimodal one's."""
    text_class = config.sub_configs.get("text_config")
    if text_class is not None and model_class.config_class == text_class:
        return config.get_text_config()
    return config
