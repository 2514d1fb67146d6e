"""Zeroth-order training of other kinds of models and with other kinds of adapters: the bits of training in memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import cut, digests, make_pair, trained, with_adapter
from test_peft_variants import EXACT, PROMPTS
from test_zeroth_order import (
    DECAY,
    ESTIMATORS,
    LEARNING_RATE,
    SEED,
    InMemory,
    Stream,
    all_weights,
    batches,
    train_alike,
)

from ssdtune.schedule.plan import Lane
from ssdtune.zeroth_order import Fold, ZerothOrder

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("variant", [*EXACT, *PROMPTS])
def test_an_adapter_trains_as_in_memory(variant: str, tmp_path: Path, stream: Stream) -> None:
    config = (EXACT | PROMPTS)[variant]
    pair = make_pair("llama", tmp_path, stream, adapt=lambda m: with_adapter(m, config()))
    before = digests(tmp_path)
    method = ZerothOrder(pair.streamed, ESTIMATORS["mezo"], seed=SEED)
    parameters = dict(trained(pair.plain))
    at_first = {name: p.detach().clone() for name, p in parameters.items()}
    train_alike(pair, method, InMemory(pair.plain, ESTIMATORS["mezo"], parameters), 2)
    for name, value in parameters.items():
        assert torch.equal(pair.streamed.get_parameter(name), value), name
        assert not torch.equal(value, at_first[name]), f"{name} has moved"
    assert Lane.NVME_WRITE not in {op.lane for op in pair.engine.trace}
    assert digests(tmp_path) == before


class Means(InMemory):
    """Half of the sum of two micro-batches' own means."""

    def loss(self, piece: dict[str, Any], items: int) -> Any:
        return self.model(**piece).loss / 2


@pytest.mark.parametrize("every", [None, 1])
@pytest.mark.parametrize("name", ["t5", "bart", "gemma3_vlm", "gemma3n", "qwen3_next"])
def test_all_weights_of_another_kind_of_model_train_as_in_memory(
    name: str, every: int | None, tmp_path: Path, stream: Stream
) -> None:
    """Encoder and decoder, images, inputs of each layer, linear attention; from the log's steps and written back."""
    pair = make_pair(name, tmp_path / "model", stream, adapt=lambda m: m)
    before = digests(tmp_path / "model")
    fold = None if every is None else Fold(tmp_path / "scratch", every)
    method = ZerothOrder(pair.streamed, ESTIMATORS["mezo"], seed=SEED, fold=fold)
    reference = Means(pair.plain, ESTIMATORS["mezo"], all_weights(pair.plain))
    for batch in batches(name, 4):
        pieces = cut(batch, 2)
        calls = [lambda p=p: method.model(**p).loss / 2 for p in pieces]
        found = method.step(calls, learning_rate=LEARNING_RATE, weight_decay=DECAY)
        assert list(found.losses) == reference.step(pieces, 0)
    for key, value in all_weights(pair.plain).items():
        assert torch.equal(pair.streamed.get_parameter(key).clone(), value), key
    method.close()
    assert digests(tmp_path / "model") == before
