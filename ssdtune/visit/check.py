"""An architecture is checked, not trusted, the first time it is streamed.

Blocks that talk past their arguments (an attribute written here, read there) lose gradients when a
block is recomputed, without any error. So a small random copy of the user's config trains both
ways, in memory and streamed (trial.py), and a difference is refused with the parameter's name. What
was found is kept in a folder, under a key that changes with the config's flags, the model's code,
the libraries and our own code.

A config that can't be made small (shrink.py), or whose copy can't be trained, is *unchecked*.
"""

from __future__ import annotations

import gc
import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

from ssdtune.durable import write_file_atomically
from ssdtune.errors import SSDTuneError
from ssdtune.visit import shrink, trial

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

OWN_CODE = ("visit", "swap", "schedule")  # what streams; a change there makes findings worthless
REMOTE_CODE = "transformers_modules"  # where transformers puts modules that a repository brings
NOT_ABOUT_SHAPE = (
    "_name_or_path transformers_version architectures dtype torch_dtype id2label label2id use_cache "
    "initializer_range auto_map"
).split()
CPU_ATTENTION = (None, "eager", "sdpa")
CPU_EXPERTS = (None, "eager", "batched_mm", "grouped_mm")


class ArchitectureError(SSDTuneError):
    """A model whose streamed training would differ from training in memory, or was not compared."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check came to. `reason`: the difference, or why nothing could be compared."""

    outcome: Literal["same", "differs", "unchecked"]
    reason: str = ""
    seconds: float = 0.0
    note: str = ""


def ensure_checked(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    *,
    allow_unchecked: bool = False,
    findings: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Finding:
    """Checks this class with this config, unless that is known already. Raises ArchitectureError.

    allow_unchecked: let pass what could not be compared, never what differed. findings: the folder
    of what is known; None, or one that can't be written: checked anew each time.
    """
    name = model_class.__name__
    finding = _known(model_class, config, findings)
    if finding is None:
        finding = examine(model_class, config)
        if finding.outcome == "same":
            more = f"; {finding.note}" if finding.note else ""
            say(f"checking {name} once: streamed = in memory ✓ ({finding.seconds:.1f} s{more})")
        _remember(finding, model_class, config, findings)
    if finding.outcome == "differs":
        raise ArchitectureError(
            f"{name} can't be streamed: a small random copy does not train as it does in memory:\n"
            f"{finding.reason}.\n"
            "Please report this with the model's config.json. Nothing was trained."
        )
    if finding.outcome == "unchecked" and not allow_unchecked:
        raise ArchitectureError(
            f"{name} is unchecked: {finding.reason}.\n"
            "Streamed, it might train wrongly without an error. To take that risk, set\n"
            "offload.allow_unchecked: true."
        )
    if finding.outcome == "unchecked":
        say(f"note: {name} is unchecked ({finding.reason}); offload.allow_unchecked lets it pass")
    return finding


def examine(model_class: type[PreTrainedModel], config: PretrainedConfig) -> Finding:
    """Compares a small copy trained both ways. Nothing is looked up or kept."""
    if _is_remote(model_class):
        return Finding(outcome="unchecked", reason="it brings its own code")
    start = perf_counter()
    reason = "its config gives no small copy"
    try:
        for small in _candidates(config):
            try:
                outcome = trial.compare(model_class, small)
            except trial.TrialError as error:
                reason = f"no small copy of it trains in memory ({_one_line(error)})"
                continue
            note = "" if outcome.images or not hasattr(config, "vision_config") else "text only"
            return Finding(
                outcome="differs" if outcome.difference else "same",
                reason=outcome.difference or "",
                seconds=round(perf_counter() - start, 2),
                note=note,
            )
    except OSError as error:
        reason = f"its small copy can't be written: {_one_line(error)}"
    except Exception as error:  # a config may hold anything, and so may raise anything
        reason = f"its config can't be made small ({type(error).__name__}: {_one_line(error)})"
    finally:
        gc.collect()  # models and hooks refer to each other; a small budget has no room for them
    seconds = round(perf_counter() - start, 2)
    return Finding(outcome="unchecked", reason=reason, seconds=seconds)


def _is_remote(model_class: type[PreTrainedModel]) -> bool:
    return model_class.__module__.partition(".")[0] == REMOTE_CODE


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _candidates(config: PretrainedConfig) -> Any:
    """Small configs that run on a CPU: a kernel for devices only is replaced."""
    for small in shrink.candidates(config):
        for part in _with_parts(small):
            if part._attn_implementation not in CPU_ATTENTION:
                part._attn_implementation_internal = None
            if getattr(part, "_experts_implementation", None) not in CPU_EXPERTS:
                part._experts_implementation_internal = None
        if small.is_encoder_decoder and getattr(small, "decoder_start_token_id", None) is None:
            small.decoder_start_token_id = getattr(small, "pad_token_id", None) or 0
        yield small


def _with_parts(config: PretrainedConfig) -> Any:
    yield config
    for key in config.sub_configs:
        part = getattr(config, key, None)
        if part is not None:
            yield from _with_parts(part)


# ------------------------------------------------------------------ what is known


def finding_path(
    model_class: type[PreTrainedModel], config: PretrainedConfig, folder: Path
) -> Path | None:
    """The file of this finding; None where the config gives no key."""
    import torch
    import transformers

    from ssdtune import __version__

    try:
        small = next(iter(_candidates(config)))
        flags = json.dumps(_about_shape(small.to_dict()), sort_keys=True, default=str)
    except Exception:  # what can't be made small is found out again, which is quick
        return None
    known = hashlib.sha256()
    for text in (
        f"{model_class.__module__}.{model_class.__qualname__}",
        flags,
        str(small._attn_implementation),
        f"{torch.__version__} {transformers.__version__} {__version__}",
        _code_of(model_class),
        *(_digest(path) for part in OWN_CODE for path in _sources(part)),
    ):
        known.update(text.encode() + b"\0")
    return folder / f"{model_class.__name__}-{known.hexdigest()[:20]}.json"


def _about_shape(values: Any) -> Any:
    if isinstance(values, dict):
        kept = {str(k): v for k, v in values.items() if k not in NOT_ABOUT_SHAPE}
        return {k: _about_shape(v) for k, v in kept.items()}
    return values


def _sources(part: str) -> list[Path]:
    return sorted((Path(__file__).parent.parent / part).glob("*.py"))


def _code_of(model_class: type[PreTrainedModel]) -> str:
    try:
        return _digest(Path(inspect.getfile(model_class)))
    except (OSError, TypeError):  # typed into a notebook
        return ""


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _known(
    model_class: type[PreTrainedModel], config: PretrainedConfig, findings: Path | None
) -> Finding | None:
    if findings is None or _is_remote(model_class):
        return None
    path = finding_path(model_class, config, findings)
    try:
        finding = Finding(**json.loads(path.read_bytes())) if path is not None else None
    except (OSError, ValueError, TypeError):
        return None
    is_ours = finding is not None and finding.outcome in ("same", "differs", "unchecked")
    return finding if is_ours else None


def _remember(
    finding: Finding,
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    findings: Path | None,
) -> None:
    """Keeps a finding. Not "unchecked": that takes a moment, and its cause may go away."""
    if findings is None or finding.outcome == "unchecked":
        return
    path = finding_path(model_class, config, findings)
    if path is None:
        return
    try:
        findings.mkdir(parents=True, exist_ok=True)
        write_file_atomically(path, json.dumps(asdict(finding), indent=1).encode() + b"\n")
    except (OSError, SSDTuneError):
        pass  # a home that can't be written: checked again next time
