"""Float32 masters of bfloat16 weights: streamed runs equal the same written plainly in memory, bit for bit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from support import cut, digests, make_pair, with_lora
from test_packing import FORMATS
from test_packing import make_pair as make_packed_pair
from test_zeroth_order import (
    FEW,
    NUM_STEPS,
    SEED,
    Stream,
    all_weights,
    batches,
    num_trained,
    streamed_step,
    train_alike,
)
from test_zo_rules import MASKS, RULES, Ruled

from ssdtune.schedule.plan import Lane, PlanError
from ssdtune.zeroth_order import Fold, MeZO, Rule, ZerothOrder
from ssdtune.zeroth_order.estimators import Shift
from ssdtune.zeroth_order.log import MASTERS, Header, LogWriter, read_log
from ssdtune.zeroth_order.masters import MasterError
from ssdtune.zeroth_order.method import replayed

MEZO = MeZO(eps=1e-2, num_directions=2)
FACTOR = 3.0  # of the smallest RAM


class MastersInMemory(Ruled):
    """What moves is a float32 copy of every parameter; the model's own are rounded from it."""

    def __init__(
        self, model: Any, estimator: Any, parameters: dict[str, torch.Tensor], rule: Rule
    ) -> None:
        self.read = parameters
        masters = {name: p.detach().float() for name, p in parameters.items()}
        super().__init__(model, estimator, masters, rule)

    def shift(self, pristine: dict[str, torch.Tensor], shift: Shift | None) -> None:
        super().shift(pristine, shift)
        self.round()

    def update(self, pristine: dict[str, torch.Tensor], gradients: Sequence[float]) -> None:
        super().update(pristine, gradients)
        self.round()

    def round(self) -> None:
        for name, p in self.read.items():
            p.copy_(self.parameters[name].to(p.dtype))


def assert_same_weights(model: Any, reference: MastersInMemory) -> None:
    for key, value in reference.read.items():
        weight = model.get_parameter(key)
        assert weight.dtype == value.dtype
        assert torch.equal(weight.clone(), value), key


def made(folder: Path, stream: Stream, name: str = "llama", *, is_smaller: bool = False) -> Any:
    """With room for slots of twice the size, and for buffers, but not for all blocks."""
    smaller = (
        2.2 if name == "mixtral" else 2.6
    )  # the smallest holds a buffer already where experts are stacked
    how: dict[str, Any] = {"factor": smaller if is_smaller else FACTOR, "is_smaller": is_smaller}
    return make_pair(name, folder, stream, dtype=torch.bfloat16, adapt=lambda model: model, **how)


@pytest.mark.parametrize(
    ("name", "estimator", "rule", "every", "num_steps"),
    [
        ("llama", MEZO, Rule(), 3, 6),
        ("gpt2", MEZO, Rule(), None, 3),
        ("llama", MeZO(eps=1e-2, mask=MASKS["magnitude"]), RULES["adam"], 2, 5),
        *(
            (name, estimator, rule, every, NUM_STEPS)
            for name, estimator, rule, every in (
                ("llama", FEW["mezo"], Rule(), 3),
                ("llama", FEW["mezo"], RULES["momentum"], None),
                ("llama", FEW["fzoo"], RULES["sign"], 1),
                ("mixtral", FEW["mezo"], Rule(), 2),
                ("gemma3", FEW["mezo"], Rule(), None),
                ("mamba2", FEW["mezo"], Rule(), 7),
            )
        ),
    ],
)
def test_masters_train_as_in_memory(
    name: str,
    estimator: Any,
    rule: Rule,
    every: int | None,
    num_steps: int,
    tmp_path: Path,
    stream: Stream,
) -> None:
    """The files' blocks are widened on their way; the working copy holds them as they lie in a slot."""
    pair = made(tmp_path / "model", stream, name, is_smaller=num_steps == NUM_STEPS)
    before = digests(tmp_path / "model")
    widths = [shape.slot_bytes for shape in pair.streamed.ssdtune.engine.plan.blocks]
    fold = None if every is None else Fold(tmp_path / "scratch", every)
    method = ZerothOrder(pair.streamed, estimator, rule=rule, seed=SEED, fold=fold, master=True)
    reference = MastersInMemory(pair.plain, estimator, all_weights(pair.plain), rule)
    train_alike(pair, method, reference, num_steps)
    assert_same_weights(pair.streamed, reference)
    engine = pair.streamed.ssdtune.engine
    wide = [shape.slot_bytes for shape in engine.plan.blocks]
    assert sum(wide) > 1.5 * sum(widths), "page by page"
    visits = engine.plan.sequences["forward"].visits
    assert any(visit.is_filled_for for visit in visits), "blocks come from the drive"
    if every is not None:
        assert any(op.lane is Lane.NVME_WRITE for op in engine.trace)
    method.close()
    assert digests(tmp_path / "model") == before, "the user's files"


def test_what_a_step_adds_is_not_lost_below_bfloat16(tmp_path: Path, stream: Stream) -> None:
    """A weight moves in sum though no single step moves it by half of a bfloat16's distance."""
    pair = made(tmp_path, stream)
    method = ZerothOrder(pair.streamed, MeZO(eps=1e-2), seed=SEED, clip=1e-3, master=True)
    name = "model.norm.weight"  # near 1, whose neighbours are 2^-8 and 2^-7 away
    before = pair.streamed.get_parameter(name).clone()
    batch = batches("llama", 1)[0]
    for _ in range(8):
        streamed_step(method, cut(batch, 2), num_trained(batch))
    assert torch.equal(pair.streamed.get_parameter(name), before)
    master = method.weights.residents._stored[name]
    assert (master != before).float().mean() > 0.9


def test_a_log_makes_the_weights_again_and_a_run_go_on(tmp_path: Path, stream: Stream) -> None:
    folder = tmp_path / "model"
    pair = made(folder, stream)
    method = ZerothOrder(pair.streamed, MEZO, seed=SEED, master=True)
    reference = MastersInMemory(pair.plain, MEZO, all_weights(pair.plain), Rule())
    header = Header(base=None, dtype="bfloat16", seed=SEED, kind="gaussian", trains=MASTERS)
    writer = LogWriter(tmp_path / "log", header)
    for number, update in enumerate(train_alike(pair, method, reference, 4)):
        writer.append(number, 0.0, update)
    log = read_log(writer.content(), "log")
    model = stream(folder, model_class=type(pair.plain), factor=FACTOR)
    replayed(model, log)
    assert_same_weights(model, reference)
    other = stream(folder, model_class=type(pair.plain), factor=FACTOR)
    fold = Fold(tmp_path / "scratch", 1)
    going_on = ZerothOrder(other, MEZO, seed=SEED, fold=fold, master=True)
    going_on.resume(log.updates, log.num_steps)
    for batch in batches("llama", 3):
        pieces, items = cut(batch, 2), num_trained(batch)
        assert streamed_step(going_on, pieces, items) == streamed_step(method, pieces, items)
    going_on.close()


def test_what_has_no_master_is_refused(tmp_path: Path, stream: Stream) -> None:
    pair = make_pair("llama", tmp_path / "float32", stream, adapt=lambda model: model)
    engine = pair.streamed.ssdtune.engine
    with pytest.raises(MasterError, match="in float32 already"):
        ZerothOrder(pair.streamed, MEZO, master=True)
    assert pair.streamed.ssdtune.engine is engine, "all as it was"
    pair = made(tmp_path / "bfloat16", stream)
    with pytest.raises(MasterError, match="an adapter has its own"):
        ZerothOrder(with_lora(pair.streamed, tiny_models.lora_targets(pair.plain)), MEZO, master=True)  # fmt: skip
    (tmp_path / "packed").mkdir()
    pair = make_packed_pair(
        "llama", tmp_path / "packed", stream, FORMATS["4"], dtype=torch.bfloat16, adapt=lambda m: m
    )
    with pytest.raises(MasterError, match="a packed base"):
        ZerothOrder(pair.streamed, MEZO, master=True)


def test_budgets_too_small_for_masters_leave_all_as_it_was(tmp_path: Path, stream: Stream) -> None:
    narrow: dict[str, Any] = {"dtype": torch.bfloat16, "adapt": lambda model: model, "factor": 1.0}
    pair = make_pair("llama", tmp_path, stream, **narrow)
    streamer = pair.streamed.ssdtune
    engine, request = streamer.engine, streamer.replanner.request
    with pytest.raises(PlanError, match="budget"):
        ZerothOrder(pair.streamed, MEZO, master=True)
    assert streamer.engine is engine
    assert streamer.replanner.request is request
    streamer.reopen(engine.plan)
    for weight in streamer.weights:
        assert torch.equal(weight.read(), pair.plain.get_parameter(weight.name)), weight.name
