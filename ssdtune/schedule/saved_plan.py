"""Plans read back from the JSON that they were saved as, whole or in parts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ssdtune.schedule.plan import (
    BlockShape,
    Budgets,
    Decoding,
    Direction,
    Kind,
    Lane,
    Op,
    Plan,
    PlanError,
    StepPlan,
    Tier,
    Visit,
)
from ssdtune.schedule.validate import validate


def plan_from(text: str) -> Plan:
    """Reads what `Plan.to_json` wrote, and validates it. Raises PlanError."""
    try:
        plan = _plan_of(json.loads(text))
        validate(plan)
    except PlanError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"this is no plan: {type(error).__name__}: {error}") from error
    return plan


def _plan_of(raw: Mapping[str, Any]) -> Plan:
    return Plan(
        blocks=blocks_from(raw["blocks"]),
        tiers=tuple(Tier(t) for t in raw["tiers"]),
        slots=tuple(raw["slots"]),
        buffers=tuple(raw["buffers"]),
        on_device=raw["on_device"],
        budgets=Budgets(**raw["budgets"]),
        sequences={kind: _sequence_from(steps) for kind, steps in raw["sequences"].items()},
        block_inputs=Tier(raw["block_inputs"]),
        chunk_tokens=raw["chunk_tokens"],
        buffers_on_device=raw["buffers_on_device"],
        activation_bytes=raw["activation_bytes"],
        nvme_activation_bytes=raw["nvme_activation_bytes"],
    )


def blocks_from(raw: Sequence[Mapping[str, Any]]) -> tuple[BlockShape, ...]:
    """Of blocks as mappings. Raises TypeError, KeyError or ValueError for anything else."""
    return tuple(map(_block_from, raw))


def _block_from(raw: Mapping[str, Any]) -> BlockShape:
    typed: dict[str, Any] = {"decoding": _decoding_from(raw["decoding"])}
    return BlockShape(**{**raw, **typed})


def _decoding_from(raw: Sequence[Sequence[Any]]) -> Decoding:
    return tuple((str(kind), int(num_bytes)) for kind, num_bytes in raw)


def _sequence_from(raw: Mapping[str, Any]) -> StepPlan:
    visits = tuple(_visit_from(visit) for visit in raw["visits"])
    return StepPlan(visits=visits, ops=tuple(op_from(op) for op in raw["ops"]))


def _visit_from(raw: Mapping[str, Any]) -> Visit:
    keeps = raw["keeps"]
    typed: dict[str, Any] = {
        "direction": Direction(raw["direction"]),
        "keeps": None if keeps is None else Tier(keeps),
    }
    return Visit(**{**raw, **typed})


def op_from(raw: Mapping[str, Any]) -> Op:
    """Of an op as a mapping, enums by their values. Raises ValueError, KeyError or TypeError for anything else."""
    typed: dict[str, Any] = {
        "kind": Kind(raw["kind"]),
        "lane": Lane(raw["lane"]),
        "direction": Direction(raw["direction"]),
        "decoding": _decoding_from(raw["decoding"]),
        "after": tuple(raw["after"]),
        "after_previous": tuple(raw["after_previous"]),
    }
    return Op(**{**raw, **typed})
