"""What a zeroth-order step does not hang on: how its batch is cut, and dropout."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from support import cut, make_pair, with_lora
from test_zeroth_order import (
    ESTIMATORS,
    SEED,
    InMemory,
    Stream,
    all_weights,
    batches,
    num_trained,
    streamed_step,
    train_alike,
)

from ssdtune.zeroth_order import ZerothOrder

DROPOUT = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}


def test_however_a_batch_is_cut_its_steps_are_the_same_to_rounding(
    tmp_path: Path, stream: Stream
) -> None:
    """Four rows in one, two and four micro-batches, float32: other sums of the same losses."""
    folder = tiny_models.save(tiny_models.build("llama"), tmp_path)
    at_first = {name: p.clone() for name, p in all_weights(stream(folder)).items()}
    losses: dict[int, list[float]] = {}
    weights: dict[int, dict[str, torch.Tensor]] = {}
    for num_pieces in (1, 2, 4):
        model = stream(folder)
        method = ZerothOrder(model, ESTIMATORS["mezo"], seed=SEED)
        losses[num_pieces] = [
            loss
            for batch in batches("llama", 3)
            for loss in streamed_step(method, cut(batch, num_pieces), num_trained(batch)).losses
        ]
        weights[num_pieces] = {name: p.clone() for name, p in all_weights(model).items()}
    for num_pieces in (2, 4):
        assert losses[num_pieces] == pytest.approx(losses[1], rel=1e-5)
        for name, value in weights[1].items():
            moved = (value - at_first[name]).abs().max()
            assert moved > 0
            assert (weights[num_pieces][name] - value).abs().max() < 1e-3 * moved, name


@pytest.mark.parametrize("trains", [pytest.param("all", marks=pytest.mark.slow), "adapters"])
def test_variants_have_no_dropout(trains: str, tmp_path: Path, stream: Stream) -> None:
    """Of the model and of the adapter, both of which are in training mode before and after."""
    adapt: Any = {
        "all": lambda model: model.train(),
        "adapters": partial(with_lora, targets=["c_attn", "c_fc"], lora_dropout=0.5),
    }[trains]
    pair = make_pair("gpt2", tmp_path, stream, config=DROPOUT, adapt=adapt)
    batch = batches("gpt2", 1)[0]
    with torch.no_grad():
        losses = [float(pair.streamed(**batch).loss) for _ in range(2)]
    assert losses[0] != losses[1], "there is dropout, outside of steps"
    method = ZerothOrder(pair.streamed, ESTIMATORS["mezo"], seed=SEED)
    trained = {n: p for n, p in pair.plain.named_parameters() if p.requires_grad}
    reference = InMemory(pair.plain, ESTIMATORS["mezo"], trained)
    train_alike(pair, method, reference, 2)
    for key, value in trained.items():
        assert torch.equal(pair.streamed.get_parameter(key).clone(), value), key
    assert pair.streamed.training
    assert all(m.training for m in pair.streamed.modules() if isinstance(m, torch.nn.Dropout))
