"""What an adapter is apart from its values: a checkpoint's must be that of the run that goes on with it."""

from __future__ import annotations

import json
from typing import Any

# Where values begin, where the base lies, and who wrote the file: the same adapter whatever they say.
NOT_COMPARED = frozenset(
    {
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "auto_mapping",
        "peft_version",
        "runtime_config",
        "loftq_config",
        "corda_config",
        "eva_config",
    }
)


def adapter_of(model: Any) -> dict[str, Any] | None:
    """A peft model's active configuration as JSON has it: `r`, `lora_alpha`, `target_modules` …; None for other models."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return None
    told = {
        name: value
        for name, value in model.active_peft_config.to_dict().items()
        if name not in NOT_COMPARED and not name.startswith("init_")
    }
    return json.loads(json.dumps(told, default=_jsonable))


def _jsonable(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, set | frozenset) else str(value)
