"""Streamed zeroth-order training equals the published algorithm written plainly, in memory, bit for bit."""

import dataclasses
import decimal
import errno
import functools
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from engines import wait_for
from pairs import by_turns
from support import cut, digests, make_pair, num_misses, with_lora

from ssdtune.kernels import philox
from ssdtune.kernels.noise import GAUSSIAN, QUANTILES, UNIT
from ssdtune.schedule.plan import Budgets, Direction, Lane, PlanError
from ssdtune.swap import stores
from ssdtune.swap.fills import SwapError
from ssdtune.zeroth_order import FZOO, LOZO, EstimatorError, Fold, MeZO, ZerothOrder
from ssdtune.zeroth_order.estimators import Shift
from ssdtune.zeroth_order.updates import Directions, Family
from ssdtune.zeroth_order.weights import MovedError
from ssdtune.zeroth_order.working_copy import WorkingCopyError

ARCHITECTURES = ("llama", "gemma3", "opt", "gpt2", "mixtral", "mamba2")
SEED, LEARNING_RATE, DECAY = 3, 1e-2, 0.1
Stream = Callable[..., Any]
NUM_STEPS = 20
TABLE = torch.tensor([*(-q for q in QUANTILES[::-1]), *QUANTILES], dtype=torch.float64)
ESTIMATORS = {
    "mezo": MeZO(eps=1e-2, num_directions=2),
    "fzoo": FZOO(eps=1e-2, num_directions=3),
    "lozo": LOZO(eps=1e-2, num_directions=2, rank=2, window=3),
}
FEW = {  # as few variants as each can have, for tests of many steps
    "mezo": MeZO(eps=1e-2),
    "fzoo": FZOO(eps=1e-2, num_directions=2),
    "lozo": LOZO(eps=1e-2, rank=2, window=3),
}


# ------------------------------------------------------------------ the algorithm, in memory


def points(estimator: Any) -> list[Shift | None]:
    """Where losses are wanted: both sides of each direction, of FZOO the weights and one side."""
    count, eps = estimator.num_directions, estimator.eps
    if isinstance(estimator, FZOO):
        return [None] + [Shift(j, eps) for j in range(count)]
    return [Shift(j, sign * eps) for j in range(count) for sign in (+1, -1)]


def estimates(estimator: Any, losses: Sequence[float]) -> list[float]:
    """g_j as the papers have it (MeZO's Definition 1, FZOO's equations, LOZO's Algorithm 1), rounded at each operation;
    FZOO's deviation once, from fractions."""
    count, eps = estimator.num_directions, estimator.eps
    if isinstance(estimator, FZOO):
        exact = [Fraction(loss) for loss in losses[1:]]
        variance = sum((x - sum(exact) / count) ** 2 for x in exact) / (count - 1)
        with decimal.localcontext(prec=60):
            sigma = float((decimal.Decimal(variance.numerator) / variance.denominator).sqrt())
        return [(loss - losses[0]) / (eps * count * sigma) for loss in losses[1:]]
    found = [(losses[2 * j] - losses[2 * j + 1]) / (2 * eps) / count for j in range(count)]
    return [g / estimator.rank for g in found] if isinstance(estimator, LOZO) else found


def matrix(p: torch.Tensor) -> tuple[int, int]:
    """Rows and columns; experts' matrices lie below each other."""
    rows = p.shape[0] * p.shape[1] if p.dim() == 3 else p.shape[0]
    return rows, p.numel() // rows


def terms(
    name: str, like: torch.Tensor, step: int, j: int, scale: float, family: Family
) -> Iterator[torch.Tensor]:
    """What adds up to scale x z, float32, in the order in which it is added."""
    key = philox.key_of(SEED, step, j, philox.number_of(name))
    if not family.rank or like.dim() < 2:
        yield looked_up(key, like.numel(), scale, family.kind).view(like.shape)
        return
    rows, columns = matrix(like)
    u = looked_up(key, family.rank * rows, scale, GAUSSIAN).view(family.rank, rows)
    window = philox.key_of(SEED, step // family.window, philox.number_of(name + " of the window"))
    v = looked_up(window, family.rank * columns, 1.0, GAUSSIAN).view(family.rank, columns)
    for k in range(family.rank):
        yield (u[k][:, None] * v[k][None, :]).view(like.shape)


def looked_up(key: int, count: int, scale: float, kind: str) -> torch.Tensor:
    """scale x z, float32: looked up as `kernels.noise` states it."""
    found = drawn(key, count, 8 if kind == GAUSSIAN else 1, philox.DIRECTION)
    if kind == GAUSSIAN:
        values = scale * (TABLE * UNIT)
    else:
        values = torch.tensor([-scale, scale], dtype=torch.float64)
    return values.float()[found]


@functools.lru_cache(maxsize=4096)
def drawn(key: int, count: int, bits: int, domain: int) -> torch.Tensor:
    """The fields of a tensor's elements, int32 [count], as `kernels.philox` states them, of all counters at once. What a
    direction is looked up by is the same for both of its variants, the update, and every dtype."""
    tile = philox.tile_size(bits)
    counters = np.arange(-(-count // tile) * philox.LANES, dtype=np.uint64)
    zeros = np.zeros_like(counters)
    output = philox.philox((counters, zeros, zeros + domain, zeros), (key & philox.MASK, key >> 32))  # type: ignore[arg-type]
    words = np.stack(output).reshape(4, -1, 1, philox.LANES).swapaxes(0, 1)
    fields = (words >> np.arange(0, 32, bits, dtype=np.uint64)[:, None]) & (2**bits - 1)
    return torch.from_numpy(fields.reshape(-1)[:count].astype(np.int32))


def rounded(values: torch.Tensor, name: str, step: int, dtype: torch.dtype) -> torch.Tensor:
    """float32 to the weights' dtype, at random where that loses bits."""
    if dtype == torch.float32:
        return values
    key = philox.key_of(SEED, step, philox.number_of(name))
    random = drawn(key, values.numel(), 16, philox.ROUNDING)
    if dtype == torch.float16:
        return in_half(values.reshape(-1), random).view(values.shape)
    cut_off = (values.view(torch.int32).reshape(-1) + random.int()) >> 16 << 16
    return cut_off.view(torch.float32).view(values.shape).to(dtype)


def in_half(values: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """Of the two numbers of float16 around a value, the one that 16 random bits choose."""
    size = values.abs().double()
    below = size.half().view(torch.int16)  # magnitudes are in the order of their bits
    below = below - (below.view(torch.float16).double() > size).short()
    low, high = (bits.view(torch.float16).double() for bits in (below, below + 1))
    is_high = ((size - low) / (high - low) * 2**16).floor() + random >= 2**16
    return torch.where(is_high, high, low).copysign(values.double()).half()


class InMemory:
    """Every parameter is shifted, all losses are taken, every parameter is put back and updated."""

    rate, weight_decay = LEARNING_RATE, DECAY

    def __init__(self, model: Any, estimator: Any, parameters: dict[str, torch.Tensor]) -> None:
        self.model, self.estimator, self.parameters = model.eval(), estimator, parameters
        self.num_steps = 0

    @torch.no_grad()
    def step(self, pieces: Sequence[dict[str, Any]], items: int) -> list[float]:
        pristine = {name: p.clone() for name, p in self.parameters.items()}
        losses = []
        for shift in points(self.estimator):
            self.shift(pristine, shift)
            losses.append(math.fsum(float(self.loss(piece, items)) for piece in pieces))
        self.update(pristine, estimates(self.estimator, losses))
        self.num_steps += 1
        return losses

    def loss(self, piece: dict[str, Any], items: int) -> Any:
        """A micro-batch's share of the step's loss."""
        return self.model(**piece, num_items_in_batch=items).loss

    def update(self, pristine: dict[str, torch.Tensor], gradients: Sequence[float]) -> None:
        for name, p in self.parameters.items():
            total = pristine[name].float()
            if p.dim() > 1:
                total = total * torch.tensor(1 - self.rate * self.weight_decay)
            for j, g in enumerate(gradients):
                scale = -(self.rate * g)
                for term in terms(name, p, self.num_steps, j, scale, self.estimator.family):
                    total = total + term
            p.copy_(rounded(total, name, self.num_steps, p.dtype))

    def shift(self, pristine: dict[str, torch.Tensor], shift: Shift | None) -> None:
        for name, p in self.parameters.items():
            value = pristine[name]
            if shift is not None:
                total = value.float()
                j, family = shift.direction, self.estimator.family
                for term in terms(name, p, self.num_steps, j, shift.scale, family):
                    total = total + term
                value = total.to(p.dtype)
            p.copy_(value)


# ------------------------------------------------------------------ both ways


def batches(name: str, num_steps: int) -> list[dict[str, Any]]:
    return [tiny_models.batch(name, 4, 13 - s % 2, seed=s) for s in range(num_steps)]


def num_trained(batch: dict[str, Any]) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


def streamed_step(method: ZerothOrder, pieces: Sequence[dict[str, Any]], items: int) -> Any:
    calls = [lambda p=p: method.model(**p, num_items_in_batch=items) for p in pieces]
    return method.step(calls, learning_rate=LEARNING_RATE, weight_decay=DECAY)


def steps_of_both(
    pair: Any, method: ZerothOrder, reference: Any, num_steps: int
) -> Iterator[tuple[list[float], Any]]:
    """The reference's losses and the method's step, of one batch after the other."""
    for batch in batches(pair.name, num_steps):
        pieces, items = cut(batch, 2), num_trained(batch)
        expected = reference.step(pieces, items)
        yield expected, streamed_step(method, pieces, items)


def train_both(
    pair: Any, method: ZerothOrder, reference: InMemory, num_steps: int
) -> list[tuple[list[float], list[float]]]:
    both = steps_of_both(pair, method, reference, num_steps)
    return [(expected, list(step.losses)) for expected, step in both]


def train_alike(pair: Any, method: ZerothOrder, reference: Any, num_steps: int) -> list[Any]:
    """Both ways, with the same losses; the method's updates."""
    updates = []
    for expected, step in steps_of_both(pair, method, reference, num_steps):
        assert list(step.losses) == expected
        updates.append(step.update)
    return updates


def all_weights(model: Any) -> dict[str, torch.Tensor]:
    return {n: p for n, p in model.named_parameters() if p.is_floating_point()}


def every_run() -> Iterator[Any]:
    """(name, estimator, dtype, steps): all for a few steps, and one for 20. At once every architecture in bfloat16 and
    every estimator in both dtypes; the other combinations are slow by their number only. 20 steps of each, of smaller
    models: test_zo_full.py."""
    for (i, name), (e, estimator) in itertools.product(
        enumerate(ARCHITECTURES), enumerate(ESTIMATORS)
    ):
        for dtype in (torch.float32, torch.bfloat16):
            is_at_once = e == i % 3 if dtype == torch.bfloat16 else i < 3 and e == (i + 1) % 3
            is_first = (name, estimator, dtype) == ("llama", "mezo", torch.bfloat16)
            steps = NUM_STEPS if is_first else 3
            told = f"{name}-{estimator}-{str(dtype)[6:]}-{steps}"
            marks = [] if is_at_once else [pytest.mark.slow]
            yield pytest.param(name, estimator, dtype, steps, id=told, marks=marks)
    for estimator in ESTIMATORS:  # the third dtype by its own rounding
        marks = [] if estimator == "mezo" else [pytest.mark.slow]
        yield pytest.param(
            "llama", estimator, torch.float16, 3, id=f"llama-{estimator}-float16-3", marks=marks
        )


@pytest.mark.parametrize(("name", "estimator", "dtype", "num_steps"), list(every_run()))
def test_all_weights_train_as_in_memory(
    name: str, estimator: str, dtype: torch.dtype, num_steps: int, tmp_path: Path, stream: Stream
) -> None:
    pair = make_pair(name, tmp_path, stream, dtype=dtype, adapt=lambda model: model)
    before = digests(tmp_path)
    method = ZerothOrder(pair.streamed, ESTIMATORS[estimator], seed=SEED)
    reference = InMemory(pair.plain, ESTIMATORS[estimator], all_weights(pair.plain))
    for expected, found in train_both(pair, method, reference, num_steps):
        assert found == expected
    assert digests(tmp_path) == before, "the user's files"
    for key, value in all_weights(pair.plain).items():
        weight = pair.streamed.get_parameter(key)
        assert torch.equal(weight.clone(), value), key
    assert num_misses(pair.streamed.ssdtune.engine) == 0


@pytest.mark.parametrize("num_directions", [1, 2])
def test_lozo_divides_by_its_rank(num_directions: int) -> None:
    losses = [3.0, 1.0] * num_directions
    found = LOZO(eps=0.5, rank=4, num_directions=num_directions).gradients(losses)
    assert found == [2.0 / 4 / num_directions] * num_directions


def adapter_runs() -> Iterator[Any]:
    """(name, dtype, steps): each name for a few steps, in both dtypes by turns; a smaller one in both for 20."""
    for few in by_turns(ARCHITECTURES):
        if not few.marks:
            yield pytest.param(*few.values, 6, id=f"{few.id}-6")
        yield pytest.param(*few.values, NUM_STEPS, id=f"{few.id}-20")


@pytest.mark.parametrize(("name", "dtype", "num_steps"), adapter_runs())
def test_adapters_train_as_in_memory(
    name: str, dtype: torch.dtype, num_steps: int, tmp_path: Path, stream: Stream
) -> None:
    """And nothing is written: not the user's files, nor anything else, by the trace."""
    is_long = num_steps == NUM_STEPS
    estimator = (FEW if is_long else ESTIMATORS)["mezo"]
    pair = make_pair(name, tmp_path, stream, dtype=dtype, is_smaller=is_long)
    before = digests(tmp_path)
    method = ZerothOrder(pair.streamed, estimator, seed=SEED)
    trained = {n: p for n, p in pair.plain.named_parameters() if p.requires_grad}
    reference = InMemory(pair.plain, estimator, trained)
    for expected, found in train_both(pair, method, reference, num_steps):
        assert found == expected
    for key, value in trained.items():
        assert torch.equal(pair.streamed.get_parameter(key), value), key
    lanes = {op.lane for op in pair.engine.trace}
    assert Lane.NVME_READ in lanes
    assert Lane.NVME_WRITE not in lanes
    assert digests(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "every"),
    [
        ("llama", 1),
        ("llama", 3),
        ("gpt2", 3),
        pytest.param("llama", 7, marks=pytest.mark.slow),
        pytest.param("mixtral", 1, marks=pytest.mark.slow),
    ],
)
def test_a_working_copy_changes_no_bit(
    name: str, every: int, tmp_path: Path, stream: Stream
) -> None:
    """bfloat16, rounded at random at every step; blocks of files that need copies on their way, too."""
    model, scratch = tmp_path / "model", tmp_path / "scratch"
    pair = make_pair(name, model, stream, dtype=torch.bfloat16, adapt=lambda m: m)
    before = digests(model)
    fold = Fold(scratch, every)
    method = ZerothOrder(pair.streamed, ESTIMATORS["mezo"], seed=SEED, fold=fold)
    reference = InMemory(pair.plain, ESTIMATORS["mezo"], all_weights(pair.plain))
    for expected, found in train_both(pair, method, reference, 8):
        assert found == expected
    engine = pair.streamed.ssdtune.engine
    stored = [op for op in engine.trace if op.lane is Lane.NVME_WRITE]
    assert (len(stored) > 0) == (every < 7), (
        "in eight steps the first copy is all that seven steps need"
    )
    for key, value in all_weights(pair.plain).items():
        assert torch.equal(pair.streamed.get_parameter(key).clone(), value), key
    assert digests(model) == before
    assert method.copy is not None
    assert method.copy.is_there
    assert not list(scratch.iterdir()), (
        "a file without a name: a process that is killed leaves nothing"
    )
    method.close()
    with pytest.raises(SwapError, match="gave 0 of"):
        pair.streamed.get_parameter(pair.streamed.ssdtune.names(0)[0]).clone()


@pytest.mark.parametrize("every", [None, 1])
def test_a_step_that_was_interrupted_amid_a_block_is_taken_again(
    every: int | None, tmp_path: Path, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in a notebook while a block takes its updates: nothing of it is left in the slot."""
    pair = make_pair("llama", tmp_path / "model", stream, adapt=lambda m: m)
    fold = None if every is None else Fold(tmp_path / "scratch", every)
    method = ZerothOrder(pair.streamed, ESTIMATORS["mezo"], seed=SEED, fold=fold)
    reference = InMemory(pair.plain, ESTIMATORS["mezo"], all_weights(pair.plain))
    for expected, found in train_both(pair, method, reference, 3):
        assert found == expected
    plain, calls = Directions.apply, [0]

    def interrupted(self: Directions, *given: Any) -> None:
        calls[0] += 1
        if calls[0] == 12:
            raise KeyboardInterrupt
        plain(self, *given)

    batch = batches("llama", 1)[0]
    with monkeypatch.context() as patched:
        patched.setattr(Directions, "apply", interrupted)
        with pytest.raises(KeyboardInterrupt):
            streamed_step(method, cut(batch, 2), num_trained(batch))
    for expected, found in train_both(pair, method, reference, 3):
        assert found == expected
    method.close()


def test_a_step_that_was_interrupted_as_it_was_taken_is_the_last(
    tmp_path: Path, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of an adapter has moved: no step may follow before it is loaded again."""
    pair = make_pair("llama", tmp_path, stream, is_smaller=True)
    method = ZerothOrder(pair.streamed, FEW["mezo"], seed=SEED)
    trained = {n: p for n, p in pair.streamed.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in trained.items()}
    plain, calls = Directions.apply, [0]

    def interrupted(self: Directions, *given: Any) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        plain(self, *given)

    batch = batches("llama", 1)[0]
    pieces, items = cut(batch, 2), num_trained(batch)
    with monkeypatch.context() as patched:
        patched.setattr(Directions, "apply", interrupted)
        with pytest.raises(KeyboardInterrupt):
            streamed_step(method, pieces, items)
    with pytest.raises(MovedError, match="step 0 was interrupted"):
        streamed_step(method, pieces, items)
    for name, p in trained.items():
        p.data.copy_(before[name])
    method.resume([], 0)
    parameters = {n: p for n, p in pair.plain.named_parameters() if p.requires_grad}
    train_alike(pair, method, InMemory(pair.plain, FEW["mezo"], parameters), 2)


def test_a_drive_without_room_changes_nothing(
    tmp_path: Path, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_pair("llama", tmp_path / "model", stream, adapt=lambda m: m)
    method = ZerothOrder(pair.streamed, MeZO(), seed=SEED, fold=Fold(tmp_path / "scratch", 1))
    batch = batches("llama", 1)[0]
    streamed_step(method, cut(batch, 2), num_trained(batch))

    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(WorkingCopyError, match="ENOSPC"):
            streamed_step(method, cut(batch, 2), num_trained(batch))
    assert not list((tmp_path / "scratch").iterdir())
    streamed_step(method, cut(batch, 2), num_trained(batch))
    method.close()


def test_a_working_copy_without_a_plan_changes_nothing(tmp_path: Path, stream: Stream) -> None:
    """Its blocks lie as in slots: they may need more of them than the budgets hold."""
    pair = make_pair("llama", tmp_path / "model", stream, adapt=lambda m: m)
    method = ZerothOrder(pair.streamed, MeZO(), seed=SEED, fold=Fold(tmp_path / "scratch", 1))
    batch = batches("llama", 1)[0]
    streamed_step(method, cut(batch, 2), num_trained(batch))
    replanner = pair.streamed.ssdtune.replanner
    request = replanner.request
    replanner.request = dataclasses.replace(request, budgets=Budgets(ram_bytes=1))
    with pytest.raises(PlanError):
        streamed_step(method, cut(batch, 2), num_trained(batch))
    replanner.request = request
    streamed_step(method, cut(batch, 2), num_trained(batch))
    assert method.copy is not None
    assert method.copy.is_there, "made now"
    method.close()


def test_a_working_copy_in_ram_is_refused_before_a_step(tmp_path: Path, stream: Stream) -> None:
    if not os.path.ismount("/dev/shm"):
        pytest.skip("no file system in RAM at /dev/shm")
    pair = make_pair("llama", tmp_path, stream, adapt=lambda m: m)
    fold = Fold(Path("/dev/shm/not/there"), 1)
    with pytest.raises(WorkingCopyError, match=r"(?s)lies in RAM.*offload\.path.*zo_fold_steps"):
        ZerothOrder(pair.streamed, MeZO(), fold=fold)
    ZerothOrder(with_lora(pair.streamed, tiny_models.lora_targets(pair.plain)), MeZO(), fold=fold)


def test_a_block_that_was_not_stored_is_told_before_another_plan_reads_it(
    tmp_path: Path, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_pair("llama", tmp_path / "model", stream, adapt=lambda m: m)
    method = ZerothOrder(pair.streamed, MeZO(), seed=SEED, fold=Fold(tmp_path / "scratch", 1))
    for batch in batches("llama", 3):
        streamed_step(method, cut(batch, 2), num_trained(batch))
    streamer = pair.streamed.ssdtune
    engine = streamer.engine
    engine.await_stores()

    def failing(*given: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(stores, "write_all", failing)
    engine.begin_step("forward")
    assert engine.store(0, engine.enter(0, Direction.FORWARD), lambda: None)
    engine.leave()
    with pytest.raises(SwapError, match="could not write"):
        streamer.reopen(engine.plan)
    method.close()


def test_a_weight_that_is_read_while_its_block_is_stored_takes_each_step_once(
    tmp_path: Path, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_pair("llama", tmp_path / "model", stream, adapt=lambda m: m)
    method = ZerothOrder(
        pair.streamed, ESTIMATORS["mezo"], seed=SEED, fold=Fold(tmp_path / "scratch", 1)
    )
    reference = InMemory(pair.plain, ESTIMATORS["mezo"], all_weights(pair.plain))
    train_both(pair, method, reference, 2)
    plain, engine = stores.write_all, pair.streamed.ssdtune.engine
    written, may_go, per_step = [], threading.Event(), 0

    def held(*given: Any) -> None:
        """A step's last write waits."""
        written.append(given)
        if len(written) == 2 * per_step:
            assert may_go.wait(30)
        plain(*given)

    monkeypatch.setattr(stores, "write_all", held)
    train_both(pair, method, reference, 1)
    wait_for(lambda: not engine._claims.storing)
    per_step = len(written)
    train_both(pair, method, reference, 1)
    assert engine._claims.storing, "some block's store is under way"
    threading.Timer(0.2, may_go.set).start()
    for block in list(engine._claims.storing):
        name = pair.streamed.ssdtune.names(block)[0]
        assert torch.equal(
            pair.streamed.get_parameter(name).clone(), pair.plain.get_parameter(name)
        )
    method.close()


def test_a_block_is_read_once_a_step(tmp_path: Path, stream: Stream) -> None:
    pair = make_pair("llama", tmp_path, stream, adapt=lambda model: model)
    method = ZerothOrder(pair.streamed, FZOO(num_directions=5), seed=SEED)
    engine = pair.streamed.ssdtune.engine
    for batch in batches("llama", 4):
        streamed_step(method, cut(batch, 2), num_trained(batch))
    loads = [op for op in engine.trace if op.step == 3 and op.num_bytes and "read" in op.lane]
    names = [op.block for op in loads]
    assert len(names) == len(set(names))


def test_a_variant_of_a_block_is_made_once_a_visit(tmp_path: Path, stream: Stream) -> None:
    pair = make_pair("llama", tmp_path, stream, adapt=lambda model: model)
    method = ZerothOrder(pair.streamed, FZOO(num_directions=3), seed=SEED)
    made: list[tuple[int, int]] = []
    plain = method.weights.stand_in
    method.weights.stand_in = lambda block, tensors, variant: (  # type: ignore[method-assign]
        made.append((block, variant)) or plain(block, tensors, variant)
    )
    batch = batches("llama", 1)[0]
    streamed_step(method, cut(batch, 2), num_trained(batch))
    num_visits = len(pair.streamed.ssdtune.engine.plan.sequences["forward"].visits)
    assert len(made) == num_visits * 4, "the weights and three directions"


@pytest.mark.parametrize("fold_steps", [None, 1])
def test_everybody_sees_the_weights_as_they_are_now(
    fold_steps: int | None, tmp_path: Path, stream: Stream
) -> None:
    """Evaluation, a parameter that is read, and generation after a step: the updated weights, from a working copy too,
    while blocks go back to it. The next step's as well."""
    pair = make_pair("llama", tmp_path / "model", stream, adapt=lambda model: model)
    fold = None if fold_steps is None else Fold(tmp_path / "scratch", fold_steps)
    method = ZerothOrder(pair.streamed, ESTIMATORS["mezo"], seed=SEED, fold=fold)
    reference = InMemory(pair.plain, ESTIMATORS["mezo"], all_weights(pair.plain))
    for _ in range(2):
        for expected, found in train_both(pair, method, reference, 2):
            assert found == expected
        assert_seen(pair)
    assert (method.copy is None) == (fold is None)
    assert method.copy is None or method.copy.is_there
    method.close()


def assert_seen(pair: Any) -> None:
    """Whoever looks at the streamed weights finds the plain model's."""
    batch = batches("llama", 1)[0]
    pair.streamed.ssdtune.micro_batch_size = None
    with torch.no_grad():
        assert torch.equal(pair.streamed.eval()(**batch).loss, pair.plain(**batch).loss)
        prompt = batch["input_ids"][:1, :5]
        new = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(
            pair.streamed.generate(prompt, **new), pair.plain.generate(prompt, **new)
        )
    for key, value in all_weights(pair.plain).items():
        assert torch.equal(pair.streamed.get_parameter(key).clone(), value), key


INF = math.inf
NO_LOSSES = {  # of two micro-batches in each of two variants
    "nan": (1.0, math.nan, 1.0, 1.0),
    "inf": (INF, 1.0, 1.0, INF),
    "variants": (INF, 1.0, -INF, 1.0),
    "micro-batches": (INF, -INF, 1.0, 1.0),
    "too large": (1.7e308, 1.7e308, 1.0, 1.0),
}


@pytest.mark.parametrize("values", NO_LOSSES.values(), ids=NO_LOSSES)
def test_a_loss_that_is_no_number_changes_nothing(
    values: Sequence[float], tmp_path: Path, stream: Stream
) -> None:
    pair = make_pair("llama", tmp_path, stream, adapt=lambda model: model)
    method = ZerothOrder(pair.streamed, MeZO(), seed=SEED)
    batch, left = batches("llama", 1)[0], iter(values)
    before = {n: p.clone() for n, p in all_weights(pair.streamed).items()}

    def call() -> float:
        pair.streamed(**batch)
        return next(left)

    step = method.step([call, call], learning_rate=LEARNING_RATE)
    assert step.update is None
    assert not math.isfinite(step.loss)
    assert method.num_steps == 1
    for key, value_before in before.items():
        assert torch.equal(pair.streamed.get_parameter(key).clone(), value_before), key


def test_a_step_leaves_every_module_in_its_mode(tmp_path: Path, stream: Stream) -> None:
    """Somebody may train with a frozen encoder's dropout off."""
    pair = make_pair("llama", tmp_path, stream, adapt=lambda model: model)
    model, batch = pair.streamed, batches("llama", 1)[0]
    method = ZerothOrder(model, MeZO(), seed=SEED)
    for is_training in (True, False):
        model.train(is_training).model.layers[0].train(not is_training)
        before = {name: module.training for name, module in model.named_modules()}
        streamed_step(method, cut(batch, 2), num_trained(batch))
        assert before == {name: module.training for name, module in model.named_modules()}
        assert len(set(before.values())) == 2


@pytest.mark.parametrize("eps", [0.0, -1e-3, math.nan, 1e-50])
def test_an_eps_that_moves_nothing_is_refused(eps: float) -> None:
    with pytest.raises(EstimatorError, match="eps"):
        MeZO(eps=eps)


def test_fzoo_scales_by_the_spread_of_its_losses() -> None:
    found = FZOO(eps=0.5, num_directions=2).gradients([1.0, 2.0, 4.0])
    spread = math.sqrt(2.0)  # of 2 and 4
    assert found == pytest.approx([1 / (0.5 * 2 * spread), 3 / (0.5 * 2 * spread)])
    assert FZOO(num_directions=2).gradients([1.0, 2.0, 2.0]) == [0.0, 0.0]


def test_mezo_is_the_mean_over_its_directions() -> None:
    assert MeZO(eps=0.5, num_directions=2).gradients([3.0, 1.0, 1.0, 2.0]) == [1.0, -0.5]


class Clipped(InMemory):
    """Bounds each g_j. limit: amid those of the first step, so that it bounds some."""

    limit = 0.0

    def update(self, pristine: dict[str, torch.Tensor], gradients: Sequence[float]) -> None:
        sizes = sorted(map(abs, gradients))
        self.limit = self.limit or (sizes[0] + sizes[-1]) / 2
        assert self.num_steps > 0 or sizes[0] < self.limit < sizes[-1]
        super().update(pristine, [math.copysign(min(abs(g), self.limit), g) for g in gradients])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_clipped_gradient_is_no_larger(estimator: str, tmp_path: Path, stream: Stream) -> None:
    pair = make_pair("llama", tmp_path, stream, adapt=with_lora)
    trained = {n: p for n, p in pair.plain.named_parameters() if p.requires_grad}
    method = ZerothOrder(pair.streamed, ESTIMATORS[estimator], seed=SEED)
    reference = Clipped(pair.plain, ESTIMATORS[estimator], trained)
    for batch in batches("llama", 2):
        pieces, items = cut(batch, 2), num_trained(batch)
        losses = reference.step(pieces, items)
        method.clip = reference.limit
        step = streamed_step(method, pieces, items)
        assert list(step.losses) == losses
        assert max(map(abs, step.gradients)) <= reference.limit
    for key, value in trained.items():
        assert torch.equal(pair.streamed.get_parameter(key), value), key
