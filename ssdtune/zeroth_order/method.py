"""A step of zeroth-order training: losses of all variants in one visit of each block, then one short update."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ssdtune.schedule.cost import Moves, missed_steps
from ssdtune.visit.base import base_of, dtype_of, weights_of
from ssdtune.visit.streamer import Streamer
from ssdtune.zeroth_order.compatible import (
    Place,
    check_dtypes,
    check_estimator,
    check_is_plain,
    check_place,
)
from ssdtune.zeroth_order.estimators import Estimator
from ssdtune.zeroth_order.log import ADAPTERS, CODES, LOW_RANK, MASTERS, Header, Log, LogError
from ssdtune.zeroth_order.packed import DECODED, MOVED
from ssdtune.zeroth_order.rules import Rule, Update
from ssdtune.zeroth_order.updates import Directions
from ssdtune.zeroth_order.weights import MovedError, MovingWeights, check_unmoved
from ssdtune.zeroth_order.windows import Windows
from ssdtune.zeroth_order.work import moves_of, with_decoding
from ssdtune.zeroth_order.working_copy import WorkingCopy, check_folder


@dataclasses.dataclass(frozen=True, slots=True)
class Fold:
    """A working copy of all weights, each block of it written back after every `num_steps` steps. folder: where; a fast
    drive."""

    folder: Path
    num_steps: int

    def whole(self, window: int) -> Fold:
        """After whole windows of so many steps."""
        return dataclasses.replace(self, num_steps=-(-self.num_steps // window) * window)


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """What a step came to. loss: the mean over the variants. update: None where a loss was infinite or no number, or the
    step too large for float32 or for their dtype, and it left the weights alone."""

    loss: float
    losses: tuple[float, ...]
    gradients: tuple[float, ...]
    update: Update | None


class ZerothOrder:
    """Zeroth-order training of a streamed model.

    What trains: with an adapter on the model, the parameters that require a gradient; without one, all weights. A
    block is read once a step; while it is there, all micro-batches pass through every variant of it.

    Args:
        model: what `ssdtune.stream` returned, with a peft adapter or not.
        estimator: MeZO(...), FZOO(...) or LOZO(...).
        rule: what steps make of estimates; None: they follow them, as SGD does.
        seed: 64 bits; with it and the updates, the weights of any step can be made again.
        clip: bounds each g_j to -clip ... clip; None: as it comes.
        fold: where and how often a working copy of all weights is written; None: never.
        exchange: gives every process the shares of all of them: a flat list of numbers -> one such list of each
            process. All that they exchange: with the same seed each makes the same update. None: there is one process.
        packed: what slots hold of a packed base, and what trains: "decoded", "kept" or "moved" (`packed.py`).
        low_rank: whether the steps of each of LOZO's windows are held as one matrix of low rank for each weight, and what
            is stored of all weights changes when a window is over (`windows.py`).
        master: whether all weights of 16 bits train in float32, and compute reads what that is rounded to (`masters.py`).
    """

    def __init__(  # noqa: PLR0913 - each has its default, and stands alone
        self,
        model: Any,
        estimator: Estimator,
        *,
        rule: Rule | None = None,
        seed: int = 0,
        clip: float | None = None,
        fold: Fold | None = None,
        exchange: Callable[[list[float]], list[list[float]]] | None = None,
        packed: str = DECODED,
        low_rank: bool = False,
        master: bool = False,
    ) -> None:
        self._exchange = exchange or (lambda shares: [shares])
        self.rule = rule or Rule()
        check_estimator(estimator, self.rule, low_rank=low_rank)
        self._taken: list[Update] = []
        self.model, self.estimator, self.seed, self.clip = model, estimator, seed, clip
        self.streamer: Streamer = base_of(model).ssdtune
        check_unmoved(self.streamer)
        trained = that_train(model)
        trains_blocks = not trained
        check_place(
            Place(
                trains_blocks=trains_blocks,
                mask=estimator.family.mask.kind,
                has_copy=fold is not None,
                packed=packed,
                low_rank=low_rank,
                master=master,
            )
        )
        if trains_blocks:
            check_is_plain(model)
            trained = outside_of_blocks(model, self.streamer)
            if fold is not None:
                check_folder(fold.folder)
        moved = [*trained.values()]
        if trains_blocks:
            moved += [w.placeholder for w in self.streamer.weights if w.placeholder is not None]
        dtypes = {p.dtype for p in moved if p.dtype.is_floating_point}
        check_dtypes(dtypes)
        self.num_trained = sum(p.numel() for p in moved)
        # Half of what their dtype holds, since a step is added to something.
        self._most = min(torch.finfo(dtype).max / 2 for dtype in dtypes)
        self.weights = MovingWeights(
            self.streamer,
            trained,
            (Windows if low_rank else Directions)(seed, estimator.family, self.rule),
            trains_blocks=trains_blocks,
            packed=packed,
            master=master,
        )
        self.trains_blocks, self.low_rank, self.master = trains_blocks, low_rank, master
        self.packed = packed
        # Steps that change together what is stored.
        self._window = estimator.family.window if low_rank else 1
        self.streamer.method = self.weights
        self.num_steps = 0
        self._is_torn = False  # whether a step was interrupted while what lies in memory took it
        self.fold = fold.whole(self._window) if fold is not None and trains_blocks else None
        self.copy = None if self.fold is None else WorkingCopy(self.streamer, self.fold.folder)

    def extra_bytes(self) -> dict[str, int]:
        """Memory that it takes beside a forward's, by what it is for."""
        return self.weights.extra_bytes(self.estimator.variants)

    def moves(self, num_steps: int) -> Moves:
        """What a visit does to weights, for predictions. num_steps: of the run."""
        every = 0 if self.fold is None else self.fold.num_steps
        moves = moves_of(
            self.weights.shapes(),
            self.estimator,
            trains_blocks=self.trains_blocks,
            num_missed=missed_steps(num_steps, every, self._window),
            low_rank=self.low_rank,
            rule=self.rule,
        )
        moves = dataclasses.replace(moves, fold_steps=every if every < num_steps else 0)
        engine = self.streamer.engine
        return with_decoding(
            moves,
            engine.recipes,
            self.estimator,
            way=self.packed,
            trains_blocks=self.trains_blocks,
            on_device=engine.slots.device.type != "cpu",
        )

    def resume(self, updates: Sequence[Update], num_steps: int) -> None:
        """Goes on after so many steps whose updates are these; adapters are loaded by whoever saved them. Raises
        MovedError where all weights have taken other steps than those."""
        taken = list(updates)
        is_here = (self.num_steps, self._taken) == (num_steps, taken)
        if self.trains_blocks and (self._is_torn or not is_here):
            self.weights.replay(self.rule.linked(taken), num_steps)
        self.num_steps, self._taken, self._is_torn = num_steps, taken, False

    def close(self) -> None:
        """Removes the working copy, where there is one; the model can't be read afterwards."""
        if self.copy is not None:
            self.copy.close()

    def step(
        self,
        calls: Sequence[Callable[[], Any]],
        *,
        learning_rate: float,
        weight_decay: float = 0.0,
        num_rows: int | None = None,
    ) -> Step:
        """Estimates and updates once.

        calls: one for each micro-batch, its share of the step's loss: a number, a tensor of one, or an output with
        `.loss`; they add up. num_rows: where shares are sums over rows, how many rows all calls have: the loss is the
        mean over those of all processes.

        Raises MovedError where another method has the model by now.
        """
        if self.streamer.method is not self.weights:
            raise MovedError(
                "another method, or a replayed log, has this model's weights by now.\n"
                "Train with that one, or open the model anew with ssdtune.stream."
            )
        if self._is_torn:
            raise MovedError(
                f"step {self.num_steps} was interrupted while weights in memory took it: some have, others have not.\n"
                "Go on from a checkpoint, with the model opened anew."
            )
        self._fold_if_due()
        shifts = self.estimator.variants
        self.weights.begin(self.num_steps, shifts)
        with _evaluating(self.model), torch.no_grad():
            found = self.streamer.run(
                [call for _ in shifts for call in calls],
                variants=[v for v in range(len(shifts)) for _ in calls],
            )
        by_process = self._exchange([*map(_number, found), num_rows or 0])
        # Rounded once, whatever the order, and then divided: the same bits however micro-batches are dealt out.
        num_all = sum(rows for *_, rows in by_process) or 1
        losses = [
            _sum(x for *shares, _ in by_process for x in _of_variant(shares, v, len(shifts)))
            / num_all
            for v in range(len(shifts))
        ]
        return self._update(losses, learning_rate, weight_decay)

    def _fold_if_due(self) -> None:
        """Makes the working copy when the first blocks are due; from then on the visits write them back. At a step's
        beginning, so that what a step costs is paid by the next one, if there is any. Where all blocks stay in their
        slots nothing is taken twice and there is nothing to save."""
        if self.fold is None or self.copy is None or self.copy.is_there:
            return
        period = self.fold.num_steps // self._window
        is_due = len(self.weights.updates) >= period
        if is_due and self.streamer.engine.plan.sequences["forward"].read_bytes:
            self.copy.write()
            self.weights.all_stored(period)

    def _update(self, losses: list[float], learning_rate: float, weight_decay: float) -> Step:
        loss = _sum(losses) / len(losses)
        number, update, self._is_torn = self.num_steps, None, True
        if math.isfinite(loss):  # nor is it where one of them is not
            update = self._take(number, losses, learning_rate, weight_decay)
        self.weights.ended(number + 1)
        self.num_steps, self._is_torn = number + 1, False
        return Step(loss, tuple(losses), () if update is None else update.gradients, update)

    def _take(
        self, number: int, losses: Sequence[float], learning_rate: float, weight_decay: float
    ) -> Update | None:
        """The step that these losses make, taken; None where it is too large to be."""
        gradients = self.estimator.gradients(losses)
        if self.clip is not None:
            gradients = [max(-self.clip, min(self.clip, g)) for g in gradients]
        decay = 1.0 - learning_rate * weight_decay
        update = Update(number, tuple(gradients), learning_rate, decay)
        linked = self.rule.after(update, self._taken)
        if not self.rule.fits(linked, self.estimator.family.reach, self._most):
            return None
        self.weights.take(linked)
        self._taken.append(update)
        return update


def replayed(model: Any, log: Log, *, num_steps: int | None = None) -> None:
    """From now on the streamed model has the weights after so many steps of a log; None: all. Of an adapter's log the
    model has that adapter, in the values that the run began with. Raises LogError where it has none or another, where the
    log has fewer steps, is of other files or of another dtype, MovedError where the weights are no longer the files'."""
    header, streamer = log.header, base_of(model).ssdtune
    num_steps = log.num_steps if num_steps is None else num_steps
    if not 0 <= num_steps <= log.num_steps:
        raise LogError(
            f"the log has {log.num_steps} steps, and num_steps is {num_steps}.\nGive one of 0 to {log.num_steps}."
        )
    check_weights(header, model)
    check_unmoved(streamer)
    trains_blocks = header.trains != ADAPTERS
    if trains_blocks:
        _check_all(header, model)
    else:
        _check_adapter(header, model)
    trained = outside_of_blocks(model, streamer) if trains_blocks else that_train(model)
    linked = header.rule.linked(log.updates)
    updates = [u for u in linked if u.step < num_steps]
    kind = Windows if header.trains == LOW_RANK else Directions
    weights = MovingWeights(
        streamer,
        trained,
        kind(header.seed, header.family, header.rule),
        trains_blocks=trains_blocks,
        packed=MOVED if header.trains == CODES else DECODED,
        master=header.trains == MASTERS,
    )
    weights.replay(updates, num_steps)
    streamer.method = weights


def check_weights(header: Header, model: Any, where: str = "the log") -> None:
    """Raises LogError where a log was written over other weights than those that a streamed model begins with. where: the
    log's file."""
    here = weights_of(model)
    if header.base is None or (header.base, header.reading) == (here["base"], here["reading"]):
        return
    what = "other files"
    if header.base == here["base"]:
        then, now = (
            f"in {bits} bits" if bits else "as stored" for bits in (header.reading, here["reading"])
        )
        what = f"its codes were read {then} and are {now}"
    raise LogError(
        f"{where} was written over other weights than those of this base model: {what}.\n"
        "Open the one that the run had: model_name_or_path and quantization in its configuration."
    )


def _check_all(header: Header, model: Any) -> None:
    """Raises LogError for a model that the steps of all weights were not rounded for, or that has an adapter besides."""
    if hasattr(model, "peft_config"):
        raise LogError(
            "the log is of all weights, and the model has an adapter.\n"
            "Open the model without it, take the steps, and model.save_pretrained(folder) for one to adapt."
        )
    if dtype_of(model) != header.dtype:
        raise LogError(
            f"the log's steps were rounded to {header.dtype}, and the model's weights are {dtype_of(model)}: they would come "
            "to others.\nOpen the model with the dtype that the run had."
        )


def _check_adapter(header: Header, model: Any) -> None:
    """Raises LogError for a model without the adapter that the log's run began with."""
    from ssdtune.peft import fingerprint_of

    trained = that_train(model)
    if not trained:
        raise LogError(
            "the log is of an adapter: its steps are not those of the model's weights.\n"
            "Load the adapter, PeftModel.from_pretrained(…, is_trainable=True)."
        )
    if header.adapter not in (None, fingerprint_of(trained)):
        raise LogError(
            "the model's adapter has not the values that the log's run began with: its steps would come to others.\n"
            "Give it those; `ssdtune replay` makes them again of what `ssdtune train` ran."
        )


def that_train(model: Any) -> dict[str, torch.Tensor]:
    """A model's parameters that require a gradient, by name: those of an adapter, where it has one."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def outside_of_blocks(model: Any, streamer: Streamer) -> dict[str, torch.Tensor]:
    """A streamed model's own parameters that lie in memory and hold numbers that can be moved, by name."""
    streamed = {id(w.placeholder) for w in streamer.weights}
    return {
        name: p
        for name, p in model.named_parameters()
        if id(p) not in streamed and p.is_floating_point()
    }


def _sum(numbers: Iterable[float]) -> float:
    """Rounded once, whatever the order. NaN where there is no sum: infinite both ways, or beyond all floats."""
    try:
        return math.fsum(numbers)
    except (ValueError, OverflowError):
        return math.nan


def _of_variant(shares: Sequence[float], variant: int, num: int) -> Sequence[float]:
    """Its micro-batches' shares among those of all variants, one variant after the other."""
    size = len(shares) // num
    return shares[variant * size : (variant + 1) * size]


def _number(found: Any) -> float:
    loss = getattr(found, "loss", found)
    return float(loss)


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Dropout off, as MeZO has it: both sides of a difference must be the same function."""
    were_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in were_training:  # not by train(), which takes along what is below
            module.training = True
