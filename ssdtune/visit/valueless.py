"""A model's code on tensors that have shapes but no values: what it looks at meanwhile, and parameters for it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import masking_utils

CHECKS_OFF = "TRANSFORMERS_DISABLE_TORCH_CHECK"  # see transformers.utils.torch_compilable_check


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """No code of transformers or torch looks at values, for a `with` block."""
    with _unpacked(), _ungrouped(), _unchecked():
        yield


def without_memory(parameter: torch.Tensor, device: torch.device) -> nn.Parameter:
    """Inside a FakeTensorMode: a parameter like this one on the device, weights that are nowhere yet included."""
    made = torch.empty_strided(
        parameter.shape, parameter.stride(), dtype=parameter.dtype, device=device
    )
    return nn.Parameter(made, requires_grad=parameter.requires_grad)


@contextlib.contextmanager
def _unpacked() -> Iterator[None]:
    """transformers looks at the positions' values for packed rows and, where it can't, builds a full mask. Batches
    cut at the front door have no packed rows."""
    finder = getattr(masking_utils, "find_packed_sequence_indices", None)
    try:
        if finder is not None:
            masking_utils.find_packed_sequence_indices = lambda position_ids: None
        yield
    finally:
        if finder is not None:
            masking_utils.find_packed_sequence_indices = finder


@contextlib.contextmanager
def _unchecked() -> Iterator[None]:
    """transformers compares values that are not there, image tokens with the images' features above all; it has a
    variable that turns such checks off."""
    before = os.environ.get(CHECKS_OFF)
    os.environ[CHECKS_OFF] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[CHECKS_OFF]
        else:
            os.environ[CHECKS_OFF] = before


@contextlib.contextmanager
def _ungrouped() -> Iterator[None]:
    """Experts as one: how many rows each gets is not known without values, their sum is, and with it the product's
    FLOP. (Tensors without memory know grouped products in bf16 alone.)"""
    grouped = F.grouped_mm

    def as_one(rows: torch.Tensor, experts: torch.Tensor, **more: Any) -> torch.Tensor:
        return rows @ experts[0]

    F.grouped_mm = as_one
    try:
        yield
    finally:
        F.grouped_mm = grouped
