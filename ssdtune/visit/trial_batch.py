"""Batches that a small random model can be trained on, whatever it is: text, pairs, text with images.

What a model takes of an image is not written down anywhere but in its processor, so a few usual
forms are tried on the model itself. Where none fits, it is trained on text alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from ssdtune.visit.config_numbers import role_of
from ssdtune.visit.front_door import accepts

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Batch = dict[str, torch.Tensor]
LENGTH = 12
NUM_PADDED = 3
IMAGE_TOKENS = (4, 16, 1, 64, 2, 9, 49)  # how many an image may become, the likely ones first
GRID = 4  # patches a side, for models that take patches


def make_batches(
    plain: PreTrainedModel, *, num_steps: int, num_micro: int, rows: int
) -> tuple[list[list[Batch]], bool]:
    """For each step its micro-batches, and whether they hold images.

    Every second micro-batch has a padded row, so that masks and numbers of labels differ.
    """
    generator = torch.Generator().manual_seed(2)
    image = _image_form(plain, generator)
    steps = [
        [
            _with_image(plain, _text(plain, rows, generator, is_padded=m % 2 == 1), image)
            for m in range(num_micro)
        ]
        for _ in range(num_steps)
    ]
    return steps, image is not None


def _text(
    plain: PreTrainedModel, rows: int, generator: torch.Generator, *, is_padded: bool
) -> Batch:
    config: Any = plain.config
    text = config.get_text_config()
    ids = _plain_ids(config, int(text.vocab_size))
    shape = (rows, LENGTH)
    input_ids = ids[torch.randint(len(ids), shape, generator=generator)]
    mask = torch.ones_like(input_ids)
    labels = input_ids.clone()
    if is_padded:
        pad = getattr(text, "pad_token_id", None)
        input_ids[-1, -NUM_PADDED:] = pad if isinstance(pad, int) and pad >= 0 else int(ids[0])
        mask[-1, -NUM_PADDED:] = 0
        labels[-1, -NUM_PADDED:] = -100
    if config.is_encoder_decoder:
        labels = labels[:, LENGTH // 2 :].contiguous()
    batch = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    return _accepted(plain, batch)


def _accepted(plain: PreTrainedModel, batch: Batch) -> Batch:
    """What the model's forward names; all of it where it names nothing (`*args, **kwargs`)."""
    if not accepts(plain.forward, "input_ids"):
        return batch
    return {name: value for name, value in batch.items() if accepts(plain.forward, name)}


def _plain_ids(config: PretrainedConfig, vocab_size: int) -> torch.Tensor:
    """Ids that mean nothing special to the model."""
    special = set(_special_ids(config))
    return torch.tensor([i for i in range(3, vocab_size) if i not in special])


def _special_ids(config: PretrainedConfig) -> Iterator[int]:
    for name, value in vars(config).items():
        if hasattr(value, "model_type"):
            yield from _special_ids(value)
        elif role_of(name) == "token":
            yield from (v for v in (value if isinstance(value, list) else [value]) if v is not None)


# ------------------------------------------------------------------ images

_Form = tuple[str, int]  # kind of pixels, tokens that an image becomes


def _image_form(plain: PreTrainedModel, generator: torch.Generator) -> _Form | None:
    """The form of image that the model takes; None for a model without images, or of none of these."""
    config: Any = plain.config
    if _image_token(config) is None or not hasattr(config, "vision_config"):
        return None
    state = generator.get_state()
    for kind in ("patches",) if _is_grid(config) else ("pixels", "sized pixels", "several pixels"):
        for num_tokens in IMAGE_TOKENS:
            text = _text(plain, 1, generator, is_padded=False)
            try:
                with torch.no_grad():
                    plain(**_with_image(plain, copy.copy(text), (kind, num_tokens)))
            except Exception:  # whatever the model's own code raises: not this form
                continue
            generator.set_state(state)
            return kind, num_tokens
    generator.set_state(state)
    return None


def _image_token(config: Any) -> int | None:
    return getattr(config, "image_token_id", getattr(config, "image_token_index", None))


def _is_grid(config: Any) -> bool:
    return hasattr(config.vision_config, "temporal_patch_size")


def _with_image(plain: PreTrainedModel, text: Batch, form: _Form | None) -> Batch:
    """The batch with an image at each row's start, where the model takes any."""
    if form is None:
        return text
    kind, num_tokens = form
    config: Any = plain.config
    rows = len(text["input_ids"])
    start = getattr(config, "vision_start_token_id", getattr(config, "boi_token_index", None))
    lead = [] if start is None else [start]
    image = [*lead, *[_image_token(config)] * num_tokens]
    ids = torch.tensor([image] * rows)
    is_image = torch.zeros(rows, ids.shape[1] + LENGTH, dtype=torch.long)
    is_image[:, len(lead) : ids.shape[1]] = 1
    made = {
        "input_ids": torch.cat([ids, text["input_ids"]], 1),
        "attention_mask": torch.cat([torch.ones_like(ids), text["attention_mask"]], 1),
        "labels": torch.cat([torch.full_like(ids, -100), text["labels"]], 1),
        **_pixels(config.vision_config, kind, rows),
    }
    for name in ("token_type_ids", "mm_token_type_ids"):
        made[name] = is_image
    return _accepted(plain, made)


def _pixels(vision: Any, kind: str, rows: int) -> Batch:
    generator = torch.Generator().manual_seed(3)
    if kind == "patches":
        channels = getattr(vision, "in_channels", getattr(vision, "in_chans", 3))
        width = channels * vision.temporal_patch_size * vision.patch_size**2
        return {
            "pixel_values": torch.randn(rows * GRID**2, width, generator=generator),
            "image_grid_thw": torch.tensor([[1, GRID, GRID]] * rows),
        }
    side = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
    shape = (rows, 1, 3, side, side) if kind == "several pixels" else (rows, 3, side, side)
    made = {"pixel_values": torch.randn(shape, generator=generator)}
    if kind == "sized pixels":
        made["image_sizes"] = torch.tensor([[side, side]] * rows)
    return made
