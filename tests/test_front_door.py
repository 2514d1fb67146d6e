"""Where a batch is cut into micro-batches and their outputs are joined: what is cut, what is refused."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from support import (
    ROUNDING,
    Pair,
    accumulate,
    assert_equal,
    assert_same_gradients,
    assert_same_training,
    cut,
    make_pair,
    num_items,
    padded,
)
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from ssdtune.errors import SSDTuneError
from ssdtune.visit import front_door
from ssdtune.visit.front_door import FrontDoorError

Stream = Callable[..., Any]
ROWS, LENGTH, IMAGE = 5, 7, 190
PLAIN_CONFIG = SimpleNamespace()
VISION_CONFIG = SimpleNamespace(
    image_token_id=IMAGE, vision_config=SimpleNamespace(spatial_merge_size=2)
)


def numbered(*shape: int) -> torch.Tensor:
    """Every element another number, so that a wrong cut shows."""
    return torch.arange(torch.Size(shape).numel()).view(shape)


def cut_one(name: str, value: Any, size: int = 2) -> list[Any]:
    """How `value` is cut beside input_ids of ROWS rows."""
    batch = {"input_ids": numbered(ROWS, LENGTH), name: value}
    return [piece[name] for piece in front_door.cut(batch, size, PLAIN_CONFIG)]


# ------------------------------------------------------------------ what is cut


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_rows_stay_in_order_and_the_last_micro_batch_may_be_smaller(size: int) -> None:
    pieces = cut_one("attention_mask", numbered(ROWS, LENGTH), size)
    assert [len(piece) for piece in pieces[:-1]] == [size] * (len(pieces) - 1)
    assert 0 < len(pieces[-1]) <= size
    assert torch.equal(torch.cat(pieces), numbered(ROWS, LENGTH))


@pytest.mark.parametrize(
    ("name", "shape", "axis"),
    [
        ("attention_mask", (ROWS, LENGTH), 0),
        ("attention_mask", (ROWS, 1, LENGTH, LENGTH), 0),
        ("labels", (ROWS, LENGTH), 0),
        ("labels", (ROWS,), 0),
        ("token_type_ids", (ROWS, LENGTH), 0),
        ("inputs_embeds", (ROWS, LENGTH, 16), 0),
        ("position_ids", (ROWS, LENGTH), 0),
        ("position_ids", (3, ROWS, LENGTH), 1),  # multimodal rotary positions: t, h, w
        ("position_ids", (4, ROWS, LENGTH), 1),  # and the text's own
        ("position_ids", (ROWS, ROWS, LENGTH), 1),  # as many position kinds as rows
        ("anything_else", (ROWS, 2), 0),
    ],
)
def test_a_known_axis_is_cut(name: str, shape: tuple[int, ...], axis: int) -> None:
    pieces = cut_one(name, numbered(*shape))
    assert [piece.shape[axis] for piece in pieces] == [2, 2, 1]
    assert torch.equal(torch.cat(pieces, axis), numbered(*shape))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("position_ids", numbered(1, LENGTH)),
        ("cache_position", numbered(LENGTH)),
        ("cache_position", numbered(ROWS)),  # the length happens to be the number of rows
        ("num_items_in_batch", torch.tensor(12)),
        ("num_items_in_batch", 12),
        ("logits_to_keep", 1),
        ("logits_to_keep", numbered(ROWS)),
        ("output_hidden_states", True),
        ("scale", torch.tensor(0.5)),
        ("attention_mask", None),
    ],
)
def test_what_has_no_rows_goes_to_every_micro_batch(name: str, value: Any) -> None:
    assert all(piece is value for piece in cut_one(name, value))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("past_key_values", DynamicCache()),
        ("cu_seq_lens_q", numbered(3)),
        ("cu_seq_lens_k", numbered(ROWS)),  # has ROWS entries and still no rows
        ("position_ids", numbered(LENGTH)),
        ("position_ids", numbered(3, ROWS + 1, LENGTH)),
        ("attention_mask", {"full_attention": numbered(ROWS, LENGTH)}),
        ("attention_mask", numbered(1, 1, LENGTH, LENGTH)),
        ("encoder_outputs", (numbered(ROWS + 1, LENGTH),)),
        ("encoder_outputs", [numbered(ROWS, LENGTH)]),
        ("pixel_values", numbered(ROWS + 1, 3)),
        ("pixel_values_videos", numbered(64, 3)),
    ],
)
def test_what_has_no_known_axis_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(FrontDoorError, match=name) as caught:
        cut_one(name, value)
    assert "micro_batches=[" in str(caught.value)


@pytest.mark.parametrize("name", ["past_key_values", "cache", "cache_params"])
def test_only_an_empty_cache_comes_into_training(name: str) -> None:
    cache = DynamicCache()
    front_door.refuse_filled_cache({name: cache})
    cache.update(torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4), 0)
    with pytest.raises(FrontDoorError, match=f"{name} brings a cache of 3 positions"):
        front_door.refuse_filled_cache({name: cache})


@pytest.mark.parametrize("size", [ROWS, ROWS + 3])
def test_a_batch_that_is_small_enough_is_passed_as_it_is(size: int) -> None:
    """With arguments that could not be cut, too."""
    batch = {"input_ids": numbered(ROWS, LENGTH), "past_key_values": DynamicCache()}
    (piece,) = front_door.cut(batch, size, PLAIN_CONFIG)
    assert piece.keys() == batch.keys()
    assert all(piece[key] is batch[key] for key in batch)


def test_the_encoders_outputs_are_cut_inside() -> None:
    states, hidden = numbered(ROWS, LENGTH, 4), (numbered(ROWS, 2), numbered(ROWS, 3))
    given = BaseModelOutput(last_hidden_state=states, hidden_states=hidden)  # type: ignore[arg-type]
    pieces = cut_one("encoder_outputs", given)
    assert all(isinstance(piece, BaseModelOutput) for piece in pieces)
    assert torch.equal(torch.cat([piece.last_hidden_state for piece in pieces]), states)
    for i in range(2):
        assert torch.equal(torch.cat([piece.hidden_states[i] for piece in pieces]), hidden[i])
    assert [piece[0].shape[0] for piece in cut_one("encoder_outputs", (states,))] == [2, 2, 1]


def image_rows(*images_per_row: int, tokens: int = 2) -> torch.Tensor:
    """input_ids whose row i holds so many images of `tokens` image tokens each."""
    ids = torch.ones(len(images_per_row), LENGTH, dtype=torch.long)
    for row, number in enumerate(images_per_row):
        ids[row, : number * tokens] = IMAGE
    return ids


@pytest.mark.parametrize(
    ("images_per_row", "expected"),
    [
        ((1, 1, 1, 1), [2, 2]),
        ((2, 0, 0, 1), [2, 1]),
        ((0, 0, 3, 1), [0, 4]),
        ((0, 3, 0, 0), [3, 0]),
    ],
)
def test_images_follow_the_rows_that_show_them(
    images_per_row: tuple[int, ...], expected: list[int]
) -> None:
    """Even where there are as many images as rows: row 0 may show two and row 1 none."""
    num_images = sum(images_per_row)
    batch = {
        "input_ids": image_rows(*images_per_row),
        "pixel_values": numbered(num_images, 3, 4, 4),
        "image_sizes": numbered(num_images, 2),
    }
    pieces = front_door.cut(batch, 2, VISION_CONFIG)
    for name in ("pixel_values", "image_sizes"):
        assert [len(piece[name]) for piece in pieces] == expected
        assert torch.equal(torch.cat([piece[name] for piece in pieces]), batch[name])


def test_patches_follow_their_images_grid() -> None:
    """Qwen-VL's pixels: one row per patch; merged 2 x 2, a grid of 4 patches is one image token."""
    grid = torch.tensor([[1, 4, 4], [1, 2, 4], [1, 2, 2]])  # 4, 2 and 1 image tokens
    ids = torch.ones(4, LENGTH, dtype=torch.long)
    ids[0, :6] = IMAGE  # the first two images
    ids[3, 2] = IMAGE
    batch = {"input_ids": ids, "pixel_values": numbered(28, 6), "image_grid_thw": grid}
    first, second = front_door.cut(batch, 2, VISION_CONFIG)
    assert torch.equal(first["image_grid_thw"], grid[:2])
    assert torch.equal(first["pixel_values"], batch["pixel_values"][:24])
    assert torch.equal(second["image_grid_thw"], grid[2:])
    assert torch.equal(second["pixel_values"], batch["pixel_values"][24:])


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": image_rows(1, 1, 1), "pixel_values": numbered(2, 3, 4, 4)},
        {"input_ids": image_rows(0, 0, 0), "pixel_values": numbered(3, 3, 4, 4)},
        {"input_ids": image_rows(1, 2, 1, tokens=1), "pixel_values": numbered(3, 3, 4, 4)},
        {
            "input_ids": image_rows(1, 1, 1),
            "pixel_values": numbered(16, 6),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
        },
    ],
    ids=["odd", "no tokens", "between rows", "grid of other size"],
)
def test_images_that_do_not_fit_their_tokens_are_refused(batch: dict[str, torch.Tensor]) -> None:
    with pytest.raises(FrontDoorError, match="pixel_values"):
        front_door.cut(batch, 2, VISION_CONFIG)


# ------------------------------------------------------------------ what is joined


def test_outputs_are_joined_row_by_row() -> None:
    logits = [numbered(2, 3) + 10 * i for i in range(3)]
    pieces: list[Any] = [CausalLMOutput(logits=x, loss=torch.tensor(1.0)) for x in logits]
    joined: Any = front_door.join(pieces, torch.tensor(0.25))
    assert type(joined) is CausalLMOutput
    assert torch.equal(joined["logits"], torch.cat(logits))
    assert joined.loss == 0.25


def test_outputs_of_other_lengths_stay_apart() -> None:
    pieces = [CausalLMOutput(logits=numbered(2, length, 3)) for length in (4, 5)]
    joined = front_door.join(pieces, None)
    assert isinstance(joined.logits, tuple)
    assert all(got is piece.logits for got, piece in zip(joined.logits, pieces, strict=True))


def test_outputs_of_no_known_kind_are_refused_by_type() -> None:
    with pytest.raises(FrontDoorError, match="SimpleNamespace"):
        front_door.join([SimpleNamespace(), SimpleNamespace()], None)


# ------------------------------------------------------------------ through a model


def ragged(name: str = "llama") -> list[dict[str, torch.Tensor]]:
    """Micro-batches of different lengths, as one collates them one by one."""
    return [tiny_models.batch(name, 2, length, seed=length) for length in (17, 9, 30, 4)]


def test_separately_collated_micro_batches_equal_accumulation(
    tmp_path: Path, stream: Stream
) -> None:
    pair = make_pair("llama", tmp_path, stream, micro_batch_size=None)
    pieces = ragged()
    items = num_items(pieces)
    expected = accumulate(pair.plain, pieces, items)
    output = pair.streamed(micro_batches=pieces, num_items_in_batch=items)
    output.loss.backward()
    assert torch.equal(output.loss.detach(), expected)
    assert_same_gradients(pair)
    assert [logits.shape[1] for logits in output.logits] == [17, 9, 30, 4]


def test_the_items_of_separate_micro_batches_are_counted(tmp_path: Path, stream: Stream) -> None:
    """Without num_items_in_batch the loss is the mean over all labels, not over micro-batches."""
    pair = make_pair("llama", tmp_path, stream, micro_batch_size=None)
    expected = accumulate(pair.plain, ragged(), num_items(ragged()))
    pair.streamed(micro_batches=ragged()).loss.backward()
    assert_same_gradients(pair)
    assert torch.equal(pair.streamed(micro_batches=ragged()).loss.detach(), expected)


@pytest.mark.parametrize(
    ("pieces", "match"),
    [
        ([], "a list of batches"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.long)}, "a list of batches"),
        (
            [{"input_ids": torch.ones(2, 3, dtype=torch.long)}, {"labels": None}],
            r"micro_batches\[1\]",
        ),
        ([torch.ones(2, 3, dtype=torch.long)], r"micro_batches\[0\]"),
    ],
    ids=["empty", "a dict", "other keys", "tensors"],
)
def test_what_is_no_list_of_batches_is_refused(
    pieces: Any, match: str, tmp_path: Path, stream: Stream
) -> None:
    tiny_models.save(tiny_models.build("llama"), tmp_path)
    model = stream(tmp_path)
    with pytest.raises(SSDTuneError, match=match):
        model(micro_batches=pieces)


def whole_batch(pair: Pair, batch: dict[str, torch.Tensor]) -> None:
    """The streamed loss and gradients are those of the unmodified model on the uncut batch."""
    rounding = ROUNDING[torch.float32]
    expected = pair.plain(**batch).loss
    expected.backward()
    loss = pair.streamed(**batch).loss
    loss.backward()
    losses = ({"loss": expected.detach()}, {"loss": loss.detach()})
    assert_equal(losses[0], losses[1], "losses", rounding=rounding)
    assert_same_gradients(pair, rounding=rounding)


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "gemma3_vlm"])
def test_the_loss_is_that_of_the_uncut_batch(name: str, tmp_path: Path, stream: Stream) -> None:
    """Rows with few labels count for few: a mean of micro-batches' means would be another number."""
    pair = make_pair(name, tmp_path, stream)
    whole_batch(pair, padded(tiny_models.batch(name, 8), [17, 16, 7, 8, 12, 17, 8, 9]))


@pytest.mark.parametrize("name", tiny_models.SEQ2SEQ)
def test_a_model_without_an_item_count_is_weighted_by_labels(
    name: str, tmp_path: Path, stream: Stream
) -> None:
    """An encoder-decoder's loss is over all label positions, the first one included."""
    pair = make_pair(name, tmp_path, stream)
    batch = tiny_models.batch(name, 8)
    batch["labels"][:2, 1:] = -100
    batch["labels"][5, 3:] = -100
    whole_batch(pair, batch)


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_a_micro_batch_without_labels_takes_no_part(
    name: str, tmp_path: Path, stream: Stream
) -> None:
    """The mean over its labels would be NaN."""
    pair = make_pair(name, tmp_path, stream)
    batch = tiny_models.batch(name, 8)
    batch["labels"][2:4] = -100
    whole_batch(pair, batch)


def test_rows_that_do_not_divide_evenly_all_count(tmp_path: Path, stream: Stream) -> None:
    pair = make_pair("llama", tmp_path, stream)
    whole_batch(pair, tiny_models.batch("llama", 7))


def test_positional_arguments_and_tuples_work(tmp_path: Path, stream: Stream) -> None:
    pair = make_pair("llama", tmp_path, stream)
    batch = tiny_models.batch("llama", 8)
    items = num_items([batch])
    loss, logits = pair.streamed(
        batch["input_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        return_dict=False,
        num_items_in_batch=items,
    )[:2]
    loss.backward()
    expected = accumulate(pair.plain, cut(batch, 4), items)
    assert torch.equal(loss.detach(), expected)
    assert logits.shape == (8, 17, tiny_models.VOCAB)
    assert_same_gradients(pair)


def test_embeddings_given_by_the_caller_are_cut_and_get_their_gradient(
    tmp_path: Path, stream: Stream
) -> None:
    pair = make_pair("llama", tmp_path, stream)
    batch = tiny_models.batch("llama", 8)
    items = num_items([batch])
    given = [
        torch.randn(8, 17, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        for _ in "12"
    ]
    labels = batch["labels"]
    for embeds, mine in zip(given[0].chunk(4), labels.chunk(4), strict=True):
        pair.plain(inputs_embeds=embeds, labels=mine, num_items_in_batch=items).loss.backward()
    pair.streamed(inputs_embeds=given[1], labels=labels, num_items_in_batch=items).loss.backward()
    assert_equal({"embeds": given[0].grad}, {"embeds": given[1].grad})
    assert_same_gradients(pair)


def test_several_images_in_one_row_train_as_in_memory(tmp_path: Path, stream: Stream) -> None:
    """Row 0 shows two images, row 3 none."""
    pair = make_pair("gemma3_vlm", tmp_path, stream)
    batch = tiny_models.batch("gemma3_vlm", 4)
    image = slice(1, 3 + tiny_models.TOKENS_PER_IMAGE)
    ids, kinds = batch["input_ids"], batch["token_type_ids"]
    for tensor in (ids, kinds):
        tensor[0, 9 : 9 + image.stop - 1] = tensor[3, image].clone()
    ids[3, image] = 5
    kinds[3, image] = 0
    batch["labels"] = ids.clone()
    per_micro = [slice(0, 3), slice(3, 4)]
    items = num_items([batch])
    pieces = [
        {
            **{k: v[2 * m : 2 * m + 2] for k, v in batch.items() if k != "pixel_values"},
            "pixel_values": batch["pixel_values"][images],
        }
        for m, images in enumerate(per_micro)
    ]
    expected = accumulate(pair.plain, pieces, items)
    loss = pair.streamed(**batch, num_items_in_batch=items).loss
    loss.backward()
    assert torch.equal(loss.detach(), expected)
    assert_same_gradients(pair)


def test_without_a_micro_batch_size_a_batch_passes_whole(tmp_path: Path, stream: Stream) -> None:
    pair = make_pair("llama", tmp_path, stream, micro_batch_size=None)
    assert_same_training(pair, [tiny_models.batch("llama", 8)], num_micro=1)
