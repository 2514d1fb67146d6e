"""Which estimators, rules and places for what trains go together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from ssdtune.zeroth_order.estimators import Estimator, EstimatorError
from ssdtune.zeroth_order.masks import MAGNITUDE
from ssdtune.zeroth_order.masters import MasterError
from ssdtune.zeroth_order.packed import DECODED, KEPT, MOVED, PackedError
from ssdtune.zeroth_order.rules import LOZO_M, SGD, Rule


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where what trains lives. trains_blocks: all weights, not an adapter. mask: kind of the estimator's. has_copy:
    with a working copy. packed, low_rank, master: as `ZerothOrder` has them."""

    trains_blocks: bool
    mask: str
    has_copy: bool
    packed: str
    low_rank: bool
    master: bool


def check_estimator(estimator: Estimator, rule: Rule, *, low_rank: bool) -> None:
    """Raises EstimatorError where these do not go together."""
    has_windows = bool(estimator.family.rank)
    if low_rank and not has_windows:
        raise EstimatorError(
            "low_rank holds the steps of LOZO's windows, and other estimators have none.\nTake LOZO, or leave it out."
        )
    known = (SGD, LOZO_M) if low_rank else (SGD,)
    if has_windows and rule.kind not in known:
        more = ", unless its windows are of low_rank" if rule.kind == LOZO_M else ""
        raise EstimatorError(f"LOZO goes with the rule {SGD}, not with {rule.kind}{more}.")
    if rule.kind == LOZO_M and not has_windows:
        raise EstimatorError(f"{LOZO_M} is LOZO's momentum: take LOZO, or another rule.")


def check_is_plain(model: Any) -> None:
    """Raises EstimatorError for a model with an adapter where all weights are to move: the adapter's would be among them,
    and peft's names would make other directions."""
    if hasattr(model, "peft_config"):
        raise EstimatorError(
            "all weights are to move, and the model has an adapter that does not train.\n"
            "Let it train, PeftModel.from_pretrained(…, is_trainable=True), or take the model without it."
        )


def check_dtypes(dtypes: Iterable[torch.dtype]) -> None:
    """Raises EstimatorError for weights that hold more than float32, in which all steps are made."""
    if torch.float64 in dtypes:
        raise EstimatorError(
            "steps and variants are made in float32, and would cut weights of float64.\n"
            "Open the model with dtype=torch.float32."
        )


def check_place(place: Place) -> None:
    """Raises PackedError, EstimatorError or MasterError where what trains can't be held so."""
    if place.trains_blocks and place.packed == KEPT and place.has_copy:
        raise PackedError(
            "packed: kept leaves all weights as they are stored, and a working copy would replace them.\n"
            "Set zo_fold_steps: never, or packed: moved."
        )
    if not place.trains_blocks and place.packed == MOVED:
        raise PackedError(
            "packed: moved trains all weights, and here an adapter trains.\n"
            "Take packed: kept, or train all weights: zo_trains: all."
        )
    if not place.trains_blocks and place.mask == MAGNITUDE:
        raise EstimatorError(
            "a mask by magnitude is of the base model's weights, and here an adapter trains: a run that goes on would find "
            "others of its weights small than the run before it did.\nTake a random mask or none, or train all weights."
        )
    if not place.trains_blocks and place.low_rank:
        raise EstimatorError(
            "low_rank is how steps of all weights are held, and here an adapter trains.\n"
            "Leave the adapter out, or low_rank."
        )
    if place.master and (place.low_rank or place.packed != DECODED or not place.trains_blocks):
        raise MasterError(
            "float32 masters are for steps of all weights, one by one: an adapter has its own, codes of packed weights are "
            "rounded at random, and windows of low rank add up in float32.\nLeave out master."
        )
