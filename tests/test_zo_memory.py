"""What a zeroth-order step allocates is what was announced: hidden states of every variant, and one variant of a block."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from support import cut, num_items, with_lora
from test_zeroth_order import Stream

from ssdtune.schedule.memory import HOLES, Passes
from ssdtune.visit import memory
from ssdtune.visit.lazy_logits import LazyLogits
from ssdtune.visit.live_bytes import LiveBytes
from ssdtune.visit.rehearsal import rehearse
from ssdtune.zeroth_order import FZOO, LOZO, Fold, MeZO, ZerothOrder
from ssdtune.zeroth_order.estimators import Estimator

# There before a step, or of the process and its heap, not of tensors.
NOT_OF_A_STEP = ("process before the model", "math libraries", "weights outside blocks", HOLES)
THERE_ALREADY = ("adapters", "slots", "buffers")


class Real(LiveBytes):
    """Of tensors that have memory: logits that are not computed have none."""

    def _meet(self, tensor: torch.Tensor, *, is_made: bool) -> None:
        if not isinstance(tensor, LazyLogits):
            super()._meet(tensor, is_made=is_made)


def mezo(num_directions: int) -> MeZO:
    return MeZO(num_directions=num_directions)


@pytest.mark.parametrize(
    ("trains", "estimator"),
    [
        ("log", mezo(2)),
        ("adapters", mezo(2)),
        ("low rank", LOZO(num_directions=2)),
        ("copy", FZOO(num_directions=4)),
        ("masters", mezo(1)),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (
                ("log", mezo(1)),
                ("log", mezo(4)),
                ("adapters", mezo(1)),
                ("adapters", mezo(4)),
            )
        ),
    ],
)
def test_a_step_takes_what_was_announced(
    trains: str, estimator: Estimator, tmp_path: Path, stream: Stream
) -> None:
    """Two to eight variants. Live bytes of tensors, operator by operator, and the places that a first step made."""
    is_master = trains == "masters"
    base = tiny_models.build("llama", torch.bfloat16 if is_master else torch.float32)
    base.config.use_cache = True  # as most published models have it
    tiny_models.save(base, tmp_path / "model")
    model: Any = stream(
        tmp_path / "model",
        factor=4.0 if is_master else 1.0,  # slots are of float32 then
        model_class=type(base),
        options={"chunk_tokens": 64},
        dtype=base.dtype,
    )
    if trains == "adapters":
        model = with_lora(model, tiny_models.lora_targets(base))
    method = ZerothOrder(
        model,
        estimator,
        fold=Fold(tmp_path / "copy", 1) if trains == "copy" else None,
        low_rank=trains == "low rank",
        master=is_master,
    )
    pieces = cut(tiny_models.batch("llama", 4, 128), 2)
    footprint = rehearse(model, pieces[0]).footprint
    assert footprint.how.startswith("rehearsed")
    passes = Passes(kind="forward", num=2 * len(estimator.variants), more=method.extra_bytes())
    parts = memory.predict(model, footprint, passes, base_bytes=0).ram
    announced = sum(n for part, n in parts.items() if part not in NOT_OF_A_STEP + THERE_ALREADY)
    items = num_items(pieces)
    # Losses alone, as trainers have it: an output would keep its last hidden state.
    calls = [lambda p=p: model(**p, num_items_in_batch=items).loss for p in pieces]
    for _ in range(2):  # the second makes the working copy, and slots anew
        method.step(calls, learning_rate=1e-3)
    with Real() as live:
        method.step(calls, learning_rate=1e-3)
    places = (method.weights._scratch, method.weights.residents._scratch)
    taken = live.peak + sum(place.nbytes for place in places if place is not None)
    assert taken == pytest.approx(announced, rel=0.05)


def test_a_step_holds_no_keys_and_values(tmp_path: Path, stream: Stream) -> None:
    """With labels and without, unless they are asked for."""
    base = tiny_models.build("llama")
    base.config.use_cache = True
    tiny_models.save(base, tmp_path)
    model: Any = stream(tmp_path, model_class=type(base))
    piece = tiny_models.batch("llama")
    ids = piece["input_ids"]
    has_cache: dict[str, bool] = {}

    def share(name: str, *args: Any, **more: Any) -> float:
        has_cache[name] = model(*args, **more).past_key_values is not None
        return 1.0

    calls = [
        lambda: share("labels", **piece),
        lambda: share("logits", ids),
        lambda: share("asked for", ids, use_cache=True),
    ]
    ZerothOrder(model, MeZO()).step(calls, learning_rate=1e-3)
    assert has_cache == {"labels": False, "logits": False, "asked for": True}
