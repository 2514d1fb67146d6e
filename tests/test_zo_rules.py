"""Masks and rules: streamed runs equal the published algorithms written plainly in memory, bit for bit."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import support
import torch
from support import make_pair
from test_zeroth_order import (
    DECAY,
    LEARNING_RATE,
    NUM_STEPS,
    SEED,
    InMemory,
    Stream,
    all_weights,
    batches,
    cut,
    drawn,
    looked_up,
    num_trained,
    rounded,
    streamed_step,
    train_alike,
)

from ssdtune.kernels import philox
from ssdtune.kernels.noise import TILE, Direction, add_directions
from ssdtune.zeroth_order import FZOO, LOZO, EstimatorError, Fold, Mask, MeZO, Rule, ZerothOrder
from ssdtune.zeroth_order.estimators import Shift
from ssdtune.zeroth_order.masks import MaskError, smallest_magnitude
from ssdtune.zeroth_order.rules import RuleError, Term, Update
from ssdtune.zeroth_order.updates import Directions
from ssdtune.zeroth_order.windows import Windows

RULES = {
    "sign": Rule(kind="sign"),
    "momentum": Rule(kind="momentum", beta1=0.9, horizon=4),
    "adam": Rule(kind="adam", beta1=0.7, beta2=0.9, horizon=3),
}
MASKS = {"random": Mask("random", 0.25), "magnitude": Mask("magnitude", 0.3)}
ESTIMATORS = {"mezo": MeZO, "fzoo": FZOO}


class Ruled(InMemory):
    """In memory, a G of every step kept: sum_j g_j z_j, element by element."""

    def __init__(self, model: Any, estimator: Any, parameters: Any, rule: Rule) -> None:
        super().__init__(model, estimator, parameters)
        self.rule, self.mask = rule, estimator.mask
        self.pasts: list[tuple[int, list[float]]] = []
        self.limits = {
            name: p.float().abs().flatten().kthvalue(max(1, round(self.mask.share * p.numel())))[0]
            for name, p in parameters.items()
        }

    def z(self, name: str, p: torch.Tensor, step: int, j: int, scale: float) -> torch.Tensor:
        key = philox.key_of(SEED, step, j, philox.number_of(name))
        return looked_up(key, p.numel(), scale, self.estimator.family.kind).view(p.shape)

    def moving(self, name: str, p: torch.Tensor) -> torch.Tensor:
        if self.mask.kind == "none":
            return torch.ones_like(p, dtype=torch.bool)
        if self.mask.kind == "magnitude":
            return p.float().abs() <= self.limits[name]
        key = philox.key_of(SEED, philox.number_of(name + " of the mask"))
        fields = drawn(key, p.numel(), 8, philox.DIRECTION)
        return (fields < round(256 * self.mask.share)).view(p.shape)

    def shift(self, pristine: dict[str, torch.Tensor], shift: Shift | None) -> None:
        for name, p in self.parameters.items():
            base = pristine[name]
            p.copy_(base)
            if shift is not None:
                z = self.z(name, p, self.num_steps, shift.direction, shift.scale)
                moved = (base.float() + z).to(p.dtype)
                p.copy_(torch.where(self.moving(name, base), moved, base))

    def update(self, pristine: dict[str, torch.Tensor], gradients: Sequence[float]) -> None:
        self.pasts.append((self.num_steps, list(gradients)))
        for name, p in self.parameters.items():
            base = pristine[name]
            total = base.float()
            if p.dim() > 1:
                total = total * torch.tensor(1 - LEARNING_RATE * DECAY)
            moved = rounded(self.updated(total, name, p), name, self.num_steps, p.dtype)
            p.copy_(torch.where(self.moving(name, base), moved, base))

    def updated(self, total: torch.Tensor, name: str, p: torch.Tensor) -> torch.Tensor:
        rule = self.rule
        if rule.kind == "sgd":
            step, gradients = self.pasts[-1]
            for j, g in enumerate(gradients):
                total = total + self.z(name, p, step, j, -(LEARNING_RATE * g))
            return total
        window = list(enumerate(reversed(self.pasts[-rule.horizon :])))[::-1]
        if rule.kind == "momentum":
            for age, (step, gradients) in window:
                for j, g in enumerate(gradients):
                    scale = -(LEARNING_RATE * (math.prod([rule.beta1] * age) * g))
                    total = total + self.z(name, p, step, j, scale)
            return total
        estimates = [(age, self.estimate(name, p, *past)) for age, past in window]
        if rule.kind == "sign":
            return total + -LEARNING_RATE * estimates[-1][1].sign()
        m = v = torch.zeros_like(total)
        for age, found in estimates:
            m = m + found * ((1 - rule.beta1) * math.prod([rule.beta1] * age))
            v = v + found * found * ((1 - rule.beta2) * math.prod([rule.beta2] * age))
        return total + m / (v + rule.epsilon).sqrt() * -LEARNING_RATE

    def estimate(
        self, name: str, p: torch.Tensor, step: int, gradients: list[float]
    ) -> torch.Tensor:
        total = torch.zeros(p.shape)
        for j, g in enumerate(gradients):
            total = total + self.z(name, p, step, j, g)
        return total


def compare(
    tmp_path: Path,
    stream: Stream,
    estimator: Any,
    *,
    rule: Rule | None = None,
    dtype: torch.dtype = torch.bfloat16,
    fold: int | None = None,
    num_steps: int = 6,
) -> None:
    how: dict[str, Any] = {"dtype": dtype, "is_smaller": num_steps == NUM_STEPS}
    pair = make_pair("llama", tmp_path / "model", stream, adapt=lambda m: m, **how)
    folded = None if fold is None else Fold(tmp_path / "scratch", fold)
    method = ZerothOrder(pair.streamed, estimator, rule=rule, seed=SEED, fold=folded)
    reference = Ruled(pair.plain, estimator, all_weights(pair.plain), rule or Rule())
    before = {n: p.clone() for n, p in all_weights(pair.plain).items()}
    train_alike(pair, method, reference, num_steps)
    for key, value in all_weights(pair.plain).items():
        assert torch.equal(pair.streamed.get_parameter(key).clone(), value), key
        assert not torch.equal(value, before[key]), f"{key} has moved"
    method.close()


def estimator_for(name: str, num_steps: int, **more: Any) -> Any:
    """With two directions; for many steps, with as few as there can be. FZOO's steps are as long as 1 / eps: with less, the
    model is soon one whose losses are all the same."""
    is_one = name == "mezo" and num_steps == NUM_STEPS
    eps = 1e-1 if name == "fzoo" else 1e-2
    return ESTIMATORS[name](eps=eps, num_directions=1 if is_one else 2, **more)


def every(values: dict[str, Any]) -> list[Any]:
    """Of each, a few steps of one kind in float32; 20 steps of all, of a smaller model."""
    kinds = [(e, d) for e in ESTIMATORS for d in (torch.float32, torch.bfloat16)]
    return [
        pytest.param(name, e, d, steps, id=f"{name}-{e}-{str(d)[6:]}-{steps}")
        for name in values
        for e, d in kinds
        for steps in (4, NUM_STEPS)
        if steps == NUM_STEPS or (e, d) == ("mezo", torch.float32)
    ]


@pytest.mark.parametrize(("name", "estimator", "dtype", "num_steps"), every(RULES))
def test_a_rule_moves_the_weights_as_in_memory(
    name: str, estimator: str, dtype: torch.dtype, num_steps: int, tmp_path: Path, stream: Stream
) -> None:
    made = estimator_for(estimator, num_steps)
    compare(tmp_path, stream, made, rule=RULES[name], dtype=dtype, num_steps=num_steps)


@pytest.mark.parametrize(
    "name", ["momentum", *(pytest.param(n, marks=pytest.mark.slow) for n in ("sign", "adam"))]
)
def test_a_rule_moves_an_adapter_by_fzoo_as_in_memory(
    name: str, tmp_path: Path, stream: Stream
) -> None:
    """Of a base in bfloat16, masked."""
    pair = make_pair("llama", tmp_path, stream, dtype=torch.bfloat16)
    estimator = FZOO(eps=1e-2, num_directions=2, mask=MASKS["random"])
    method = ZerothOrder(pair.streamed, estimator, rule=RULES[name], seed=SEED)
    trained = dict(support.trained(pair.plain))
    train_alike(pair, method, Ruled(pair.plain, estimator, trained, RULES[name]), 4)
    support.assert_same_weights(pair)


@pytest.mark.parametrize(("name", "estimator", "dtype", "num_steps"), every(MASKS))
def test_a_mask_lets_move_what_it_does_in_memory(
    name: str, estimator: str, dtype: torch.dtype, num_steps: int, tmp_path: Path, stream: Stream
) -> None:
    made = estimator_for(estimator, num_steps, mask=MASKS[name])
    compare(tmp_path, stream, made, dtype=dtype, num_steps=num_steps)


@pytest.mark.parametrize(
    "every_steps",
    [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(7, marks=pytest.mark.slow)],
)
def test_how_often_blocks_are_written_back_changes_no_bit(
    every_steps: int, tmp_path: Path, stream: Stream
) -> None:
    """Moments of a mask's elements, of blocks that take one step or several at a time."""
    estimator = MeZO(eps=1e-2, mask=MASKS["magnitude"])
    compare(
        tmp_path,
        stream,
        estimator,
        rule=RULES["adam"],
        fold=every_steps,
        num_steps=max(6, every_steps + 2),
    )


def test_a_run_that_goes_on_has_the_moments_that_it_had(tmp_path: Path, stream: Stream) -> None:
    """A method made anew from the updates so far makes the same steps, of an adapter too."""
    for adapt in (lambda model: model, None):
        folder = tmp_path / str(adapt is None)
        pair = make_pair("llama", folder, stream, adapt=adapt)
        other = make_pair("llama", folder, stream, adapt=adapt)
        rule, estimator = RULES["momentum"], MeZO(eps=1e-2)
        whole = ZerothOrder(pair.streamed, estimator, rule=rule, seed=SEED)
        first, updates = ZerothOrder(other.streamed, estimator, rule=rule, seed=SEED), []
        taken = batches("llama", 5)
        for batch in taken[:3]:
            streamed_step(whole, cut(batch, 2), num_trained(batch))
            updates.append(streamed_step(first, cut(batch, 2), num_trained(batch)).update)
        if adapt is not None:
            first = ZerothOrder(
                stream(folder, model_class=type(other.plain)), estimator, rule=rule, seed=SEED
            )
        else:  # its adapter is where it was: whoever saves it brings it back
            first = ZerothOrder(other.streamed, estimator, rule=rule, seed=SEED)
        first.resume([u for u in updates if u is not None], 3)
        for batch in taken[3:]:
            pieces, items = cut(batch, 2), num_trained(batch)
            expected = streamed_step(whole, pieces, items)
            assert streamed_step(first, pieces, items) == expected


# ------------------------------------------------------------------ parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_parts_of_a_tensor_are_those_of_the_whole(kind: str, dtype: torch.dtype) -> None:
    base = torch.randn(5 * TILE + 77).to(dtype)
    directions = [Direction(3, 0.1, kind), Direction(4, -0.2, kind)]
    how: dict[str, Any] = {"decay": 0.9, "rounding_key": 5}
    whole, parted, plain = torch.empty_like(base), torch.empty_like(base), torch.empty_like(base)
    add_directions(whole, base, directions, **how)
    for first in range(0, len(base), 2 * TILE):
        part = slice(first, first + 2 * TILE)
        add_directions(parted[part], base[part], directions, **how, first=first)
        add_directions(plain[part], base[part], directions, **how, first=first, suffix="")
    assert torch.equal(parted, whole)
    assert torch.equal(plain, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_smallest_magnitudes_are_counted(dtype: torch.dtype) -> None:
    values = torch.randn(3000).to(dtype)
    values[:10] = 0
    for k in (1, 10, 11, 1500, 3000):
        assert smallest_magnitude(values, k) == values.float().abs().kthvalue(k)[0].item()


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)])
def test_a_parameter_without_elements_is_moved_by_nothing(shape: tuple[int, ...]) -> None:
    update, lozo = Update(0, (1.0,), 0.1), LOZO(window=3).family
    windows = Windows(SEED, lozo)
    windows.take(update)
    masked = [MeZO(mask=mask).family for mask in MASKS.values()]
    for directions in (windows, *(Directions(SEED, family) for family in (lozo, *masked))):
        weight = torch.empty(shape)
        for term in (None, Term(1, 0, 1e-3)):
            directions.make(weight, weight, "w", term)
        directions.apply(weight, "w", [update])
        assert weight.shape == shape


def test_a_direction_of_low_rank_is_so_for_each_expert() -> None:
    """Of a stack of matrices, which have a U of their own each."""
    directions = Directions(SEED, LOZO(rank=2, window=3).family)
    made = torch.empty(3, 6, 8)
    directions.make(made, torch.zeros_like(made), "experts", Term(4, 0, 1.0))
    assert torch.linalg.matrix_rank(made, rtol=1e-5).tolist() == [2, 2, 2]
    assert torch.linalg.matrix_rank(made.view(3, 48), rtol=1e-5) == 3, "none is another's multiple"


def test_what_earlier_steps_count_is_a_product() -> None:
    """Which no C library's pow rounds as it likes: it has other bits on processors without fused multiply-add."""
    earlier = tuple(Update(step, (1.0,), 1.0) for step in range(300))
    update = Update(300, (1.0,), 1.0, earlier=earlier)
    for beta in (0.9, 0.7):
        terms = Rule(kind="momentum", beta1=beta, horizon=301).terms(update)
        share = 1.0
        for term in reversed(terms):
            assert term.scale == -share
            share *= beta
        assert len(terms) == 301


def test_what_makes_no_step_is_refused(tmp_path: Path, stream: Stream) -> None:
    with pytest.raises(MaskError, match="share of 0"):
        Mask("random", 0.0)
    with pytest.raises(MaskError, match="'odd'"):
        Mask("odd", 0.5)
    with pytest.raises(RuleError, match="'lion'"):
        Rule(kind="lion")
    with pytest.raises(RuleError, match="beta1 is 1"):
        Rule(kind="momentum", beta1=1.0)
    with pytest.raises(EstimatorError, match="no mask"):
        LOZO(mask=MASKS["random"])
    pair = make_pair("llama", tmp_path, stream, adapt=lambda model: model)
    with pytest.raises(EstimatorError, match="not with adam"):
        ZerothOrder(pair.streamed, LOZO(), rule=RULES["adam"])
    adapter = make_pair("llama", tmp_path, stream)
    with pytest.raises(EstimatorError, match="a mask by magnitude"):
        ZerothOrder(adapter.streamed, MeZO(mask=MASKS["magnitude"]))
