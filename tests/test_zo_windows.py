"""LOZO's windows as matrices of low rank: streamed runs equal the same written plainly in memory, bit for bit."""

import math
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
    ARCHITECTURES,
    DECAY,
    LEARNING_RATE,
    NUM_STEPS,
    SEED,
    InMemory,
    Stream,
    all_weights,
    batches,
    looked_up,
    matrix,
    num_trained,
    rounded,
    streamed_step,
    train_alike,
)

from ssdtune.kernels import philox
from ssdtune.schedule.cost import missed_steps
from ssdtune.schedule.plan import Lane
from ssdtune.zeroth_order import LOZO, EstimatorError, Fold, MeZO, Rule, ZerothOrder
from ssdtune.zeroth_order import windows as windows_module
from ssdtune.zeroth_order.estimators import Shift
from ssdtune.zeroth_order.log import LOW_RANK, Header, LogWriter, read_log
from ssdtune.zeroth_order.method import replayed
from ssdtune.zeroth_order.packed import KEPT, MOVED, PackedError
from ssdtune.zeroth_order.windows import along
from ssdtune.zeroth_order.work import moves_of

WINDOW, RANK = 4, 2
ESTIMATOR = LOZO(eps=1e-2, num_directions=2, rank=RANK, window=WINDOW)
FEW = LOZO(eps=1e-2, rank=RANK, window=WINDOW)  # variants, for many steps
RULES = {"sgd": Rule(), "lozo_m": Rule(kind="lozo_m", beta1=0.7)}
GAUSSIAN = "gaussian"


# ------------------------------------------------------------------ the algorithm, in memory


class WindowsInMemory(InMemory):
    """Every parameter is made anew from what it was when its window began and from a sum, A, of the window's steps."""

    def __init__(
        self,
        model: Any,
        parameters: dict[str, torch.Tensor],
        rule: Rule,
        estimator: LOZO = ESTIMATOR,
    ) -> None:
        super().__init__(model, estimator, parameters)
        self.rule = rule
        self.base = {name: p.clone() for name, p in parameters.items()}
        self.sums = {name: torch.zeros(self.rows(p)) for name, p in parameters.items()}
        self.momenta: dict[str, torch.Tensor] = {}
        self.drawn: dict[tuple[str, int], torch.Tensor] = {}
        self.decays = dict.fromkeys(parameters, 1.0)
        self.has_steps = False
        self.last_window = 0  # that had steps

    def rows(self, p: torch.Tensor) -> tuple[int, ...]:
        return tuple(p.shape) if p.dim() < 2 else (RANK, matrix(p)[0])

    def v(self, name: str, p: torch.Tensor, window: int) -> torch.Tensor:
        if (name, window) not in self.drawn:
            key = philox.key_of(SEED, window, philox.number_of(name + " of the window"))
            numel = RANK * matrix(p)[1]
            self.drawn[name, window] = looked_up(key, numel, 1.0, GAUSSIAN).view(RANK, -1)
        return self.drawn[name, window]

    def u(self, name: str, p: torch.Tensor, j: int, scale: float) -> torch.Tensor:
        key = philox.key_of(SEED, self.num_steps, j, philox.number_of(name))
        return looked_up(key, math.prod(self.rows(p)), scale, GAUSSIAN).view(self.rows(p))

    def made(self, name: str, p: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """theta_0 * decay + A V^T in float32, from left to right."""
        total = self.base[name].float()
        if p.dim() < 2:
            return total + a
        total = total * torch.tensor(self.decays[name])
        v = self.v(name, p, self.last_window)
        for k in range(RANK):
            total = total + (a[k][:, None] * v[k][None, :]).view(p.shape)
        return total

    def shift(self, pristine: dict[str, torch.Tensor], shift: Shift | None) -> None:
        assert shift is not None
        self.last_window = self.num_steps // WINDOW
        for name, p in self.parameters.items():
            a = self.sums[name] + self.u(name, p, shift.direction, shift.scale)
            p.copy_(self.made(name, p, a).to(p.dtype))

    def update(self, pristine: dict[str, torch.Tensor], gradients: Sequence[float]) -> None:
        decay = 1 - LEARNING_RATE * DECAY
        for name, p in self.parameters.items():
            a = self.sums[name]
            if p.dim() > 1:
                a = a * torch.tensor(decay)
                self.decays[name] *= decay
            if self.rule.kind == "sgd":
                for j, g in enumerate(gradients):
                    a = a + self.u(name, p, j, -(LEARNING_RATE * g))
            else:
                a = a + self.momentum(name, p, gradients) * -LEARNING_RATE
            self.sums[name] = a
        self.has_steps = True
        self.end_step()

    def momentum(self, name: str, p: torch.Tensor, gradients: Sequence[float]) -> torch.Tensor:
        beta, share = self.rule.beta1, 1 - self.rule.beta1
        n = self.momenta.get(name)
        if n is None:
            n, share = torch.zeros(self.rows(p)), 1.0
        elif self.turned_from is not None and p.dim() > 1:
            old, new = (self.v(name, p, w).double() for w in (self.turned_from, self.last_window))
            turned = torch.zeros_like(n)
            for b in range(RANK):
                for a in range(RANK):
                    inner = math.fsum(float(x) for x in old[a] * new[b]) / new.shape[1]
                    turned[b] = turned[b] + n[a] * torch.tensor(inner)
            n = turned
        n = n * torch.tensor(beta)
        for j, g in enumerate(gradients):
            n = n + self.u(name, p, j, share * g)
        self.momenta[name] = n
        return n

    @property
    def turned_from(self) -> int | None:
        """The window whose V the momentum has, where it is another."""
        return self.last_window - 1 if self.num_steps % WINDOW == 0 else None

    def skip(self) -> None:
        """A step whose loss is no number."""
        self.end_step()
        self.num_steps += 1

    @torch.no_grad()
    def end_step(self) -> None:
        is_over = self.num_steps % WINDOW == WINDOW - 1
        for name, p in self.parameters.items():
            if self.has_steps:
                total = self.made(name, p, self.sums[name])
                p.copy_(rounded(total, name, self.num_steps, p.dtype) if is_over else total.to(p.dtype))  # fmt: skip
            if is_over:
                self.base[name] = p.clone()
                self.sums[name], self.decays[name] = torch.zeros(self.rows(p)), 1.0
        self.has_steps = self.has_steps and not is_over


def assert_same_weights(pair: Any, reference: WindowsInMemory) -> None:
    for key, value in reference.parameters.items():
        assert torch.equal(pair.streamed.get_parameter(key).clone(), value), key


def made_pair(
    folder: Path,
    stream: Stream,
    *,
    name: str = "llama",
    dtype: torch.dtype = torch.bfloat16,
    is_smaller: bool = False,
) -> Any:
    how: dict[str, Any] = {"dtype": dtype, "is_smaller": is_smaller}
    return make_pair(name, folder, stream, adapt=lambda model: model, **how)


def every_run() -> list[Any]:
    """A few steps of the usual ones, and 20 of all, of smaller models."""
    few = [
        ("llama", "sgd", torch.bfloat16, WINDOW, 2 * WINDOW + 1),
        ("llama", "lozo_m", torch.float32, None, WINDOW + 1),
    ]
    many = [
        (name, rule, dtype, 2 * WINDOW, NUM_STEPS)
        for name in ARCHITECTURES
        for rule in RULES
        for dtype in (torch.float32, torch.bfloat16)
    ]
    many += [
        ("llama", rule, dtype, every, NUM_STEPS)
        for rule in RULES
        for dtype in (torch.float32, torch.bfloat16)
        for every in (None, WINDOW)
    ]
    return [
        pytest.param(*each, id="-".join(str(x).replace("torch.", "") for x in each))
        for each in (*few, *many)
    ]


@pytest.mark.parametrize(("name", "rule", "dtype", "every", "num_steps"), every_run())
def test_windows_train_as_in_memory(
    name: str,
    rule: str,
    dtype: torch.dtype,
    every: int | None,
    num_steps: int,
    tmp_path: Path,
    stream: Stream,
) -> None:
    """Whole windows and a part of one, folded to a working copy or taken anew at each read."""
    is_long = num_steps == NUM_STEPS
    estimator = FEW if is_long else ESTIMATOR
    pair = made_pair(tmp_path / "model", stream, name=name, dtype=dtype, is_smaller=is_long)
    before = digests(tmp_path / "model")
    fold = None if every is None else Fold(tmp_path / "scratch", every)
    how: dict[str, Any] = {"rule": RULES[rule], "seed": SEED, "fold": fold, "low_rank": True}
    method = ZerothOrder(pair.streamed, estimator, **how)
    reference = WindowsInMemory(pair.plain, all_weights(pair.plain), RULES[rule], estimator)
    train_alike(pair, method, reference, num_steps)
    assert_same_weights(pair, reference)
    method.close()
    assert digests(tmp_path / "model") == before, "the user's files"


def test_nothing_is_written_before_a_window_is_over(tmp_path: Path, stream: Stream) -> None:
    """By the trace: the copy is made after the first window, and written to in the first step of each later one."""
    pair = made_pair(tmp_path / "model", stream)
    fold = Fold(tmp_path / "scratch", 1)
    method = ZerothOrder(pair.streamed, ESTIMATOR, seed=SEED, fold=fold, low_rank=True)
    last = 2 * WINDOW + 2
    for number, batch in enumerate(batches("llama", last + 1)):
        if number == WINDOW:
            assert not stores(pair), "in the first window"
        streamed_step(method, cut(batch, 2), num_trained(batch))
        assert method.copy is not None
        assert method.copy.is_there == (number >= WINDOW)
    engine = pair.streamed.ssdtune.engine
    read = {v.block for v in engine.plan.sequences["forward"].visits if v.is_filled_for}
    assert read
    written = [(op.step - engine.step + last, op.block) for op in stores(pair)]
    expected = [(2 * WINDOW, engine.recipes[block].name) for block in read]
    assert sorted(written) == sorted(expected)
    method.close()


def stores(pair: Any) -> list[Any]:
    return [op for op in pair.streamed.ssdtune.engine.trace if op.lane is Lane.NVME_WRITE]


def test_a_block_that_is_read_takes_one_product_whatever_it_has_missed(
    tmp_path: Path, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step makes two variants of each block, and nothing else, before the window is over."""
    pair = made_pair(tmp_path, stream)
    method = ZerothOrder(pair.streamed, LOZO(window=50), seed=SEED, low_rank=True)
    products: list[int] = []
    plain = windows_module.add_low_rank

    def counting(to: Any, base: Any, factors: Sequence[Any], **how: Any) -> None:
        products.append(len(factors))
        plain(to, base, factors, **how)

    monkeypatch.setattr(windows_module, "add_low_rank", counting)
    engine, streamer = pair.streamed.ssdtune.engine, pair.streamed.ssdtune
    visits = engine.plan.sequences["forward"].visits
    assert any(visit.is_filled_for for visit in visits), "blocks come from their files"
    matrices = sum(
        len(view.shape) > 1 for visit in visits for view in engine.recipes[visit.block].tensors
    )
    for number, batch in enumerate(batches("llama", 4)):
        products.clear()
        streamed_step(method, cut(batch, 2), num_trained(batch))
        if number:  # in the first one there is no sum yet
            assert products == [1] * (2 * matrices)
    assert streamer.method.updates == [], "what is stored has not changed"


def test_everybody_sees_the_weights_of_a_window_under_way(tmp_path: Path, stream: Stream) -> None:
    pair = made_pair(tmp_path, stream, dtype=torch.float32)
    method = ZerothOrder(pair.streamed, ESTIMATOR, seed=SEED, low_rank=True)
    reference = WindowsInMemory(pair.plain, all_weights(pair.plain), Rule())
    batch = batches("llama", 1)[0]
    pair.streamed.ssdtune.micro_batch_size = None
    for num in (1, WINDOW - 1):  # within a window, and where one has just ended
        train_alike(pair, method, reference, num)
        with torch.no_grad():
            assert torch.equal(pair.streamed.eval()(**batch).loss, pair.plain(**batch).loss)
            new = {"max_new_tokens": 3, "do_sample": False}
            prompt = batch["input_ids"][:1, :5]
            found, expected = (m.generate(prompt, **new) for m in (pair.streamed, pair.plain))
            assert torch.equal(found, expected)


@pytest.mark.parametrize("every", [pytest.param(None, marks=pytest.mark.slow), 1])
def test_a_window_ends_though_its_last_step_is_skipped(
    every: int | None, tmp_path: Path, stream: Stream
) -> None:
    """And what a window without any step leaves is what it found."""
    pair = made_pair(tmp_path / "model", stream)
    fold = None if every is None else Fold(tmp_path / "scratch", every)
    method = ZerothOrder(pair.streamed, ESTIMATOR, seed=SEED, fold=fold, low_rank=True)
    reference = WindowsInMemory(pair.plain, all_weights(pair.plain), Rule())
    train_alike(pair, method, reference, WINDOW - 1)
    for _ in range(WINDOW + 1):
        nothing = [lambda: math.nan] * 2
        assert method.step(nothing, learning_rate=LEARNING_RATE).update is None
        reference.skip()
    assert_same_weights(pair, reference)
    train_alike(pair, method, reference, 1)
    assert_same_weights(pair, reference)
    method.close()


@pytest.mark.parametrize("rule", [pytest.param("sgd", marks=pytest.mark.slow), "lozo_m"])
def test_a_log_makes_the_weights_of_any_step_and_a_run_go_on(
    rule: str, tmp_path: Path, stream: Stream
) -> None:
    """From the updates alone: in the midst of a window, where one ends, and past it."""
    folder = tmp_path / "model"
    pair = made_pair(folder, stream)
    how: dict[str, Any] = {"rule": RULES[rule], "seed": SEED, "low_rank": True}
    method = ZerothOrder(pair.streamed, ESTIMATOR, **how)
    reference = WindowsInMemory(pair.plain, all_weights(pair.plain), RULES[rule])
    family = ESTIMATOR.family
    header = Header(
        base=None,
        dtype="bfloat16",
        seed=SEED,
        kind=family.kind,
        rank=family.rank,
        window=family.window,
        rule=RULES[rule],
        trains=LOW_RANK,
    )
    writer, weights = LogWriter(tmp_path / "log", header), {}
    for number, batch in enumerate(batches("llama", WINDOW + 2)):
        pieces, items = cut(batch, 2), num_trained(batch)
        reference.step(pieces, items)
        writer.append(number, 0.0, streamed_step(method, pieces, items).update)
        weights[number + 1] = {n: p.clone() for n, p in reference.parameters.items()}
    log = read_log(writer.content(), "log")
    for num in (2, WINDOW, WINDOW + 2):
        model = stream(folder, model_class=type(pair.plain))
        replayed(model, log, num_steps=num)
        for name, value in weights[num].items():
            assert torch.equal(model.get_parameter(name).clone(), value), (num, name)
    other = stream(folder, model_class=type(pair.plain))
    fold = Fold(tmp_path / "scratch", 1)
    going_on = ZerothOrder(other, ESTIMATOR, fold=fold, **how)
    going_on.resume(log.updates, log.num_steps)
    for batch in batches("llama", 2):
        pieces, items = cut(batch, 2), num_trained(batch)
        assert streamed_step(going_on, pieces, items) == streamed_step(method, pieces, items)
    going_on.close()


@pytest.mark.parametrize("kind", ["4", pytest.param("nf4", marks=pytest.mark.slow)])
def test_windows_over_a_base_that_stays_packed(kind: str, tmp_path: Path, stream: Stream) -> None:
    """Never written: it is decoded, and takes the windows that are over and the one under way."""
    keep = lambda model: model  # noqa: E731
    pair = make_packed_pair(
        "llama", tmp_path, stream, FORMATS[kind], dtype=torch.bfloat16, adapt=keep
    )
    before = digests(tmp_path)
    why = "no plain sums" if kind == "4" else "codes of NF4"
    with pytest.raises(PackedError, match=why):
        ZerothOrder(pair.streamed, ESTIMATOR, seed=SEED, packed=MOVED, low_rank=True)
    method = ZerothOrder(pair.streamed, ESTIMATOR, seed=SEED, packed=KEPT, low_rank=True)
    reference = WindowsInMemory(pair.plain, all_weights(pair.plain), Rule())
    train_alike(pair, method, reference, WINDOW + 2)
    assert_same_weights(pair, reference)
    assert digests(tmp_path) == before


# ------------------------------------------------------------------ LOZO-M


def test_momentum_is_that_of_the_authors_code() -> None:
    """`lowrank_zo_update_momentum` of optsuite/LOZO in float64, over three windows, with other numbers for u and v."""
    torch.manual_seed(0)
    m, n, beta, rate, every = 7, 40, 0.7, 0.1, 4
    vs = [torch.randn(n, RANK) for _ in range(3)]
    theirs, weight = torch.zeros(m, RANK).double(), torch.zeros(m, n).double()
    ours, sums = torch.zeros(RANK, m), torch.zeros(m, n)
    for t in range(3 * every):
        v, u, g = vs[t // every], torch.randn(m, RANK), float(torch.randn(()))
        if t == 0:
            theirs, ours = g * u.double(), g * u.T
        else:
            if t % every == 0:
                old = vs[t // every - 1]
                theirs = theirs @ old.double().T @ v.double() / n
                ours = along(ours, old.T.contiguous(), v.T.contiguous())
            theirs = beta * theirs + (1 - beta) * g * u.double()
            ours = beta * ours + (1 - beta) * g * u.T
        weight = weight - rate * (theirs @ v.double().T)
        sums = sums - rate * (ours.T @ v.T)
    torch.testing.assert_close(sums.double(), weight, rtol=1e-5, atol=1e-6)
    assert weight.abs().max() > 0.1


# ------------------------------------------------------------------ predictions, what is refused


@pytest.mark.parametrize("rule", RULES)
def test_what_a_window_holds_is_in_the_prediction(
    rule: str, tmp_path: Path, stream: Stream
) -> None:
    pair = made_pair(tmp_path, stream)
    how: dict[str, Any] = {"rule": RULES[rule], "seed": SEED}
    plain = ZerothOrder(pair.streamed, ESTIMATOR, seed=SEED).extra_bytes()
    method = ZerothOrder(pair.streamed, ESTIMATOR, low_rank=True, **how)
    for batch in batches("llama", 2):
        streamed_step(method, cut(batch, 2), num_trained(batch))
    sums = method.weights.directions._sums.values()  # type: ignore[union-attr]
    held = sum(t.nbytes for _, s in sums for t in (s.left, s.momentum) if t is not None)
    kept = sum(p.nbytes for p in method.weights.residents.outside.values())
    assert kept > 0
    more = method.extra_bytes()
    assert more.pop("held beside the weights") == held + kept
    assert more == plain


def test_the_work_of_a_window_is_that_of_its_variants() -> None:
    lozo = LOZO(rank=2, window=10)
    shapes = {0: [(8, 4), (6,)]}
    moves = moves_of(shapes, lozo, trains_blocks=True, num_missed=0.5, low_rank=True)
    shifts = {(op.kind, op.size): n for op, n in moves.shifts[0].operators.items()}
    assert shifts == {
        ("perturb", 2 * (8 + 4)): 2,
        ("perturb", 2 * 8): 1,  # what the step before added to the sum
        ("perturb", 6): 2 + 1,
        ("pointwise", 8 * 8 * 4): 2,
    }
    assert moves.window == 10
    updates = {(op.kind, op.size): n for op, n in moves.updates[0].operators.items()}
    assert updates == {("perturb", 2 * (8 + 4)): 1, ("pointwise", 8 * 8 * 4): 1}


@pytest.mark.parametrize(
    ("num_steps", "fold_steps", "window"),
    [(100, 0, 10), (57, 0, 10), (1000, 10, 10), (1000, 30, 10)],
)
def test_missed_windows_are_counted(num_steps: int, fold_steps: int, window: int) -> None:
    """Visit by visit: a block misses the windows that are over and not on the drive, which has them after the visit
    that wrote it."""
    missed, stored = 0, 0
    for step in range(num_steps):
        over = step // window
        missed += over - stored
        if fold_steps and over - stored >= fold_steps // window:
            stored = over
    found = missed_steps(num_steps, fold_steps, window)
    assert found == pytest.approx(missed / num_steps, rel=0.05)


def test_what_holds_no_windows_is_refused(tmp_path: Path, stream: Stream) -> None:
    pair = made_pair(tmp_path, stream)
    with pytest.raises(EstimatorError, match="other estimators have none"):
        ZerothOrder(pair.streamed, MeZO(), low_rank=True)
    with pytest.raises(EstimatorError, match="not with lozo_m, unless"):
        ZerothOrder(pair.streamed, ESTIMATOR, rule=RULES["lozo_m"])
    with pytest.raises(EstimatorError, match="lozo_m is LOZO's momentum"):
        ZerothOrder(pair.streamed, MeZO(), rule=RULES["lozo_m"])
    with pytest.raises(EstimatorError, match="an adapter trains"):
        ZerothOrder(with_lora(pair.streamed, tiny_models.lora_targets(pair.plain)), ESTIMATOR, low_rank=True)  # fmt: skip
