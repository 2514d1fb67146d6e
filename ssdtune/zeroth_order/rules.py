"""From gradient estimates to a step: what is done with sum_j g_j z_j, this step's and earlier ones'.

Nothing is stored. Estimates of earlier steps are made again from the log, as many as the horizon says, so that a step
is still its few numbers. With G_t = sum_j g_{t,j} z_{t,j}, theta_{t+1} = theta_t x decay - lr x what follows:

    sgd        G_t
    sign       sign(G_t), element by element: ZO-SGD-Sign (Liu et al., "signSGD via zeroth-order oracle", ICLR 2019; as
               in the benchmark of Zhang et al., arXiv 2402.11592)
    momentum   sum_{i < horizon} beta1^i G_{t-i}: ZO-SGD-MMT (arXiv 2402.11592; torch's SGD with momentum) without what
               is older than the horizon
    adam       m_t / sqrt(v_t + epsilon), m_t = (1 - beta1) sum_{i < horizon} beta1^i G_{t-i}, v_t = (1 - beta2)
               sum_{i < horizon} beta2^i G_{t-i}^2: AdaMeZO (Cai et al., arXiv 2605.00650). Their code has neither
               1 - beta nor epsilon under the root, multiplies by 100 and takes MeZO's steps until the horizon is full.
    lozo_m     N_t V^T, N kept in LOZO's other factor: LOZO-M; only where windows are held as matrices of low rank
               (`windows.py`, which has the equations)

Ages i count steps that were taken; one that was skipped is none.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch

from ssdtune.errors import SSDTuneError

SGD, SIGN, MOMENTUM, ADAM, LOZO_M = "sgd", "sign", "momentum", "adam", "lozo_m"
KINDS = (SGD, SIGN, MOMENTUM, ADAM, LOZO_M)
# Of what a step is made of. Half of what float32 holds: what it is added to has room, and what is rounded to bfloat16.
LARGEST = 2.0**127


class RuleError(SSDTuneError):
    """A rule that makes no step."""


@dataclasses.dataclass(frozen=True, slots=True)
class Update:
    """One step. step: its number, which its directions hang on. gradients: g_j of each direction. rate: the learning
    rate. decay: what parameters of two and more dimensions are multiplied by, 1 - lr x weight decay. earlier: the steps
    taken before it that it hangs on, oldest first."""

    step: int
    gradients: tuple[float, ...]
    rate: float
    decay: float = 1.0
    earlier: tuple[Update, ...] = dataclasses.field(default=(), compare=False, repr=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Term:
    """scale x z_j of a step."""

    step: int
    j: int
    scale: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """See above. beta1, beta2, epsilon, horizon: where the kind has them."""

    kind: str = SGD
    beta1: float = 0.0
    beta2: float = 0.0
    epsilon: float = 1e-8
    horizon: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RuleError(f"rule {self.kind!r} is not one of {', '.join(KINDS)}.")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.horizon >= 1):
            raise RuleError(
                f"beta1 is {self.beta1:g}, beta2 {self.beta2:g}, horizon {self.horizon}: "
                "betas are from 0 to below 1, and a horizon is 1 or more."
            )

    @property
    def is_linear(self) -> bool:
        """Whether steps are sums of directions."""
        return self.kind in (SGD, MOMENTUM)

    @property
    def num_earlier(self) -> int:
        """Steps before it that a step hangs on."""
        return self.horizon - 1 if self.kind in (MOMENTUM, ADAM) else 0

    def after(self, update: Update, earlier: Sequence[Update]) -> Update:
        """The update with those of the steps before it that it hangs on; earlier: all, oldest first."""
        num = min(self.num_earlier, len(earlier))
        return dataclasses.replace(update, earlier=tuple(earlier[len(earlier) - num :]))

    def fits(self, update: Update, reach: float, most: float = LARGEST) -> bool:
        """Whether float32 holds all that a step is made of, and the weights what comes of it. reach: `Family.reach`. most:
        what the weights may move by."""
        if self.is_linear:
            largest = change = reach * sum(abs(term.scale) for term in self.terms(update))
        else:
            largest = reach * max(sum(map(abs, past.gradients)) for _, past in _aged(update))
            change = update.rate * (largest if self.kind == LOZO_M else 1.0)  # of adam about
            largest *= max(1.0, largest if self.kind == ADAM else update.rate)
        return largest <= LARGEST and change <= most  # NaN is not

    def linked(self, updates: Sequence[Update]) -> list[Update]:
        """Updates as a log has them, each with those that it hangs on."""
        num = self.num_earlier
        return [self.after(u, updates[max(0, i - num) : i]) for i, u in enumerate(updates)]

    def terms(self, update: Update) -> list[Term]:
        """What is added to theta x decay, in this order; of a linear rule."""
        beta = self.beta1 if self.kind == MOMENTUM else 0.0
        shares = powers(beta, 1 + len(update.earlier))
        return [
            Term(past.step, j, -(update.rate * (shares[age] * g)))
            for age, past in _aged(update)
            for j, g in enumerate(past.gradients)
            if g
        ]

    def change(self, update: Update, estimate: Callable[[Update], torch.Tensor]) -> torch.Tensor:
        """What is added to theta x decay, float32, each operation rounded by itself; of any other rule.

        estimate: gives G of a step, a tensor of its own, which is worked on in place.
        """
        if self.kind == SIGN:
            return estimate(update).sign_().mul_(-update.rate)
        num = 1 + len(update.earlier)
        firsts, seconds = powers(self.beta1, num), powers(self.beta2, num)
        first = second = None
        for age, past in _aged(update):
            found = estimate(past)
            v = (found * found).mul_((1 - self.beta2) * seconds[age])
            m = found.mul_((1 - self.beta1) * firsts[age])
            first = m if first is None else first.add_(m)
            second = v if second is None else second.add_(v)
        assert first is not None
        assert second is not None
        return first.div_(second.add_(self.epsilon).sqrt_()).mul_(-update.rate)


FOLLOW = Rule()  # the estimates as they are


@functools.lru_cache(maxsize=64)
def powers(beta: float, num: int) -> tuple[float, ...]:
    """beta^0 ... beta^(num - 1), each the one before it times beta. The C library's pow has other last bits on a processor
    without fused multiply-add."""
    return tuple(itertools.accumulate(range(1, num), lambda power, _: power * beta, initial=1.0))


def estimate_terms(update: Update) -> list[Term]:
    """What adds up to a step's G."""
    return [Term(update.step, j, g) for j, g in enumerate(update.gradients) if g]


def _aged(update: Update) -> Iterator[tuple[int, Update]]:
    """(age, step), oldest first, the step itself at the end."""
    for place, past in enumerate(update.earlier):
        yield len(update.earlier) - place, past
    yield 0, update
