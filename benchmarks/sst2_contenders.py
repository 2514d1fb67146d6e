"""Who learns in `sst2.py`, by which steps, and what a step moves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from ssdtune.trainer.options import option_scores
from ssdtune.visit.base import base_of
from ssdtune.zeroth_order import FZOO, LOZO, Estimator, MeZO, Rule, ZerothOrder
from ssdtune.zeroth_order.log import ADAPTERS, ALL, LOW_RANK
from ssdtune.zeroth_order.rules import ADAM, FOLLOW, LOZO_M, MOMENTUM

PASSES_OF_GRADIENTS = 3  # its forward, the recomputed one, and a backward of about as much
Batches = Sequence[Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """Who learns. trains: as logs name it. rate: the base of the grid. estimator: None: by gradients, with AdamW.
    falls: whether the rate falls to nothing over a run, in a line (Trainer's default)."""

    trains: str
    rate: float
    estimator: Estimator | None = None
    rule: Rule = FOLLOW
    falls: bool = False

    @property
    def forwards(self) -> int:
        """What a step counts."""
        return PASSES_OF_GRADIENTS if self.estimator is None else len(self.estimator.variants)

    def how(self) -> str:
        """All but the rate."""
        if self.estimator is None:
            return f"{self.trains}, AdamW"
        falls = ", falling rate" if self.falls else ""
        return f"{self.trains}, {self.estimator}, {self.rule}{falls}"

    def rate_after(self, rate: float, share: float) -> float:
        """What a run that began with `rate` takes where so much of it is done."""
        return rate * (1 - share) if self.falls else rate


# eps and the ratio of rates to each other are those of the methods' repositories: 1e-3 and 1e-6 to 1e-7 for all weights,
# 1e-2 and 1e-4 for LoRA (princeton-nlp/MeZO and optsuite/LOZO, large_models); FZOO's 5e-5 (DKmiyan/FZOO) leaves out the
# division by eps that its paper has, and `estimators.FZOO` with it. Those are rates for billions of weights and 20,000
# steps. SmolLM2-135M takes larger ones: MeZO and FZOO lowered the loss with 10 and 30 times them in 54 forward passes (in
# bfloat16, the first seed), and none diverged; the others' are as large. In bfloat16 an adapter's losses are rounded to
# about 0.01: eps of 1e-3 would drown in that.
WEIGHTS, ADAPTER = 1e-3, 1e-2  # eps
MANY = FZOO(eps=ADAPTER, num_directions=8)
CONTENDERS: dict[str, Contender] = {
    "mezo": Contender(trains=ALL, rate=1e-5, estimator=MeZO(eps=WEIGHTS)),
    "mezo-adapters": Contender(trains=ADAPTERS, rate=1e-3, estimator=MeZO(eps=ADAPTER)),
    "fzoo": Contender(trains=ALL, rate=1e-6, estimator=FZOO(eps=WEIGHTS)),
    "fzoo-adapters": Contender(trains=ADAPTERS, rate=1e-4, estimator=MANY),
    # FZOO divides by how far losses spread: without a falling rate its last steps are as long as its first.
    "fzoo-adapters-falling": Contender(trains=ADAPTERS, rate=1e-4, estimator=MANY, falls=True),
    "lozo": Contender(trains=LOW_RANK, rate=1e-5, estimator=LOZO(eps=WEIGHTS)),
    "lozo-m": Contender(
        trains=LOW_RANK,
        rate=1e-5,
        estimator=LOZO(eps=WEIGHTS),
        rule=Rule(kind=LOZO_M, beta1=0.7),
    ),
    "fzoo-adapters-momentum": Contender(
        trains=ADAPTERS,
        rate=2e-5,  # a step goes on in the ten after it, 6.5 times in all
        estimator=MANY,
        rule=Rule(kind=MOMENTUM, beta1=0.9, horizon=10),
    ),
    "fzoo-adapters-adam": Contender(
        trains=ADAPTERS,
        # An element moves about as far as with fzoo-adapters: rate / (eps x the root of 8 directions).
        rate=3e-3,
        estimator=MANY,
        rule=Rule(kind=ADAM, beta1=0.7, beta2=0.9, horizon=10),
    ),
    "lora": Contender(trains=ADAPTERS, rate=3e-4),
}


def shares(model: Any, batches: Batches) -> list[Callable[[], torch.Tensor]]:
    """Calls that make each micro-batch's share of the mean cross-entropy of all rows' options."""
    num_rows = sum(len(batch["labels"]) for batch in batches)

    def share(batch: Any) -> torch.Tensor:
        scores = option_scores(model, batch)
        return F.cross_entropy(scores, batch["labels"], reduction="sum") / num_rows

    return [partial(share, batch) for batch in batches]


def stepper(model: Any, contender: Contender, seed: int) -> Callable[[Batches, float], float]:
    """Takes a step on micro-batches at a rate, returns its loss: infinite for one that float32 does not hold."""
    if contender.estimator is None:
        return _by_gradients(model)
    method = ZerothOrder(
        model,
        contender.estimator,
        rule=contender.rule,
        seed=seed,
        low_rank=contender.trains == LOW_RANK,
    )

    def by_losses(batches: Batches, rate: float) -> float:
        step = method.step(shares(model, batches), learning_rate=rate)
        return math.inf if step.update is None else step.loss

    return by_losses


def _by_gradients(model: Any) -> Callable[[Batches, float], float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    streamer = base_of(model).ssdtune

    def by_gradients(batches: Batches, rate: float) -> float:
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train()
        losses = streamer.run(shares(model, batches))  # one fetch of each block, too
        loss = torch.stack(losses).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return by_gradients


def step_bytes(folder: Path, dtype: str, contender: Contender) -> int:
    """Read and written by a steady step where no block stays in memory between visits, by its plan.

    Of all weights, what is read is written back: after every step, as with `zo_fold_steps: 1` (a block takes each step
    once, as it does in a run where the model stays), or once for all steps of a window of low rank.
    """
    from benchmarks.contestants import streaming_options
    from ssdtune.schedule.plan import Lane
    from ssdtune.swap.storage import choose_storage
    from ssdtune.visit.build import build_meta
    from ssdtune.visit.draft import draft

    meta = build_meta(folder, dtype=getattr(torch, dtype))
    spec = {"prefetch": 2, "micro_rows": None, "chunk_tokens": 4096}
    plan = draft(
        meta, streaming_options(meta, choose_storage(folder).storage, spec)
    ).replanner.plan()
    if contender.estimator is None:
        return plan.sequences["train"].read_bytes
    steps = plan.sequences["forward"]
    if contender.trains == ADAPTERS:
        return steps.read_bytes
    back = {steps.visits[op.visit].block for op in steps.ops if op.lane is Lane.NVME_READ}
    written = sum(plan.blocks[block].slot_bytes for block in back)
    per_write = contender.estimator.family.window if contender.trains == LOW_RANK else 1
    return steps.read_bytes + round(written / per_write)
