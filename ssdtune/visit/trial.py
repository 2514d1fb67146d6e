"""A small random model trained both ways, from the same files: in memory, and streamed.

Two steps of four micro-batches; adapters of rank 4 on every linear layer but the head; every loss,
every gradient and every weight compared. The plain side is gradient accumulation as anybody would
write it and uses nothing of ours. Rows are padded, labels masked, dropout is off in both.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ssdtune.schedule.plan import Budgets
from ssdtune.swap.storage import choose_storage
from ssdtune.visit.assemble import assemble
from ssdtune.visit.build import build_meta
from ssdtune.visit.draft import Options, smallest_budgets
from ssdtune.visit.front_door import accepts, accepts_extra
from ssdtune.visit.trial_batch import Batch, make_batches

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

RANK = 4
NOISE = 0.02  # on all weights: zeros and ones would hide one that landed at the wrong place
RATE = 0.1  # of plain SGD; AdamW would turn the last bit of a tiny gradient into a whole step
NUM_STEPS, NUM_MICRO, ROWS = 2, 4, 2
MAX_PARAMETERS = 64_000_000
ROUNDING = 1e-4  # of the largest value: what sums in another order may differ by in fp32
GROWTH = 100  # of such a difference from one step to the next: an update makes it larger
TIMEOUT_S = 60.0


class TrialError(Exception):
    """The small model cannot be built, run or trained in memory: there is nothing to compare with."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """`difference`: None, or what differed first, with the parameter's name. `images`: seen or not."""

    difference: str | None
    images: bool


def compare(model_class: type[PreTrainedModel], small: PretrainedConfig) -> Outcome:
    """Trains a small model of this config both ways, on the CPU in fp32.

    Random state, default dtype and verbosity are as before afterwards. Raises TrialError where the
    plain side fails, OSError where there is no room for the files (some megabytes).
    """
    with _undisturbed(), tempfile.TemporaryDirectory(prefix="ssdtune-check-") as name:
        folder = Path(name)
        try:
            _plant(model_class, small, folder)
            plain = model_class.from_pretrained(
                folder, config=copy.deepcopy(small), dtype=torch.float32
            )
            adapted = _adapt(plain)
            batches, with_images = make_batches(
                plain, num_steps=NUM_STEPS, num_micro=NUM_MICRO, rows=ROWS
            )
            counts = _counts_items(plain, batches[0])
            expected = [_step(plain, adapted, pieces, counts=counts) for pieces in batches]
        except OSError:
            raise
        except Exception as error:  # whatever a model's own code raises
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise TrialError(reason[:300]) from error
        _require_signal(expected)
        del plain
        found = _streamed_steps(model_class, small, folder, batches)
        if isinstance(found, str):
            return Outcome(found, with_images)
        rounding = ROUNDING if small.is_encoder_decoder else 0.0
        return Outcome(_first_difference(expected, found, rounding), with_images)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """fp32 on the CPU with gradients, silently, whatever the caller has set; then as it was."""
    from transformers.utils import logging

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_default_dtype, dtype)
        stack.callback(logging.set_verbosity, verbosity)
        if has_bars:
            stack.callback(logging.enable_progress_bar)
            logging.disable_progress_bar()
        logging.set_verbosity_error()
        torch.set_default_dtype(torch.float32)
        for context in (
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            warnings.catch_warnings(),
        ):
            stack.enter_context(context)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed devices as well
        yield


# ------------------------------------------------------------------ the model and its files


def _plant(model_class: type[PreTrainedModel], small: PretrainedConfig, folder: Path) -> None:
    """Writes a random model to `folder` in the hub's form. Raises TrialError if it is not small."""
    with torch.device("meta"):
        sketch = model_class._from_config(copy.deepcopy(small), dtype=torch.float32)
    numel = sum(p.numel() for p in sketch.parameters())
    if numel > MAX_PARAMETERS:
        raise TrialError(f"its small copy would have {numel:,} parameters")
    del sketch
    model = model_class._from_config(copy.deepcopy(small), dtype=torch.float32)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape), alpha=NOISE)
    # Every process of a group tries in a folder of its own; transformers would have the first one alone write.
    vars(model)["should_save_on_this_rank"] = lambda is_main_process: True
    model.save_pretrained(folder, max_shard_size="1MB")


def _adapt(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Adds a trained pair of low-rank matrices to each linear layer but the head; name -> matrix.

    By a hook, so that modules keep class, name and place: some models look at them.
    """
    generator = torch.Generator().manual_seed(1)
    model.train().requires_grad_(False)
    head = model.get_output_embeddings()
    adapted: dict[str, nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        shape = _linear_shape(module)
        if shape is None or module is head:
            continue
        for key, (rows, columns) in (("a", (shape[0], RANK)), ("b", (RANK, shape[1]))):
            values = torch.randn(rows, columns, generator=generator) * rows**-0.5
            parameter = nn.Parameter(values)
            module.register_parameter(f"ssdtune_{key}", parameter)
            adapted[f"{name} ({key.upper()} of its adapter)"] = parameter
        module.register_forward_hook(_add_adapter, with_kwargs=True)
    return adapted


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Widths in and out of a linear layer, None for anything else."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":  # transformers' linear layer, weight transposed
        return int(module.nx), int(module.nf)  # type: ignore[arg-type]
    return None


def _add_adapter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    if not isinstance(output, torch.Tensor):  # a router's scores and logits
        return output
    given = args[0] if args else next(iter(kwargs.values()))
    return output + (given @ module.ssdtune_a) @ module.ssdtune_b


# ------------------------------------------------------------------ steps


@dataclasses.dataclass(frozen=True)
class Step:
    """What a step came to: loss, gradients, and the weights after it. Gradients may be None."""

    loss: torch.Tensor
    gradients: Mapping[str, torch.Tensor | None]
    weights: Mapping[str, torch.Tensor]


def _step(
    plain: Any, adapted: Mapping[str, nn.Parameter], pieces: Sequence[Batch], *, counts: bool
) -> Step:
    """Plain gradient accumulation and an update. counts: the model divides by the batch's labels."""
    items = [_num_labels(piece, plain.config.is_encoder_decoder) for piece in pieces]
    more: dict[str, Any] = {"num_items_in_batch": sum(items)} if counts else {}
    if accepts(plain.forward, "use_cache"):
        more["use_cache"] = False  # nobody trains with a cache, and its copies round otherwise
    total = torch.zeros(())
    for piece, num in zip(pieces, items, strict=True):
        loss = plain(**piece, **more).loss
        if not counts:
            loss = loss * (num / sum(items))
        loss.backward()
        total = total + loss.detach()
    return _update(adapted, total)


def _update(adapted: Mapping[str, nn.Parameter], loss: torch.Tensor) -> Step:
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in adapted.items()}
    nn.utils.clip_grad_norm_(adapted.values(), 1.0)
    with torch.no_grad():
        for parameter in adapted.values():
            if parameter.grad is not None:
                parameter.add_(parameter.grad, alpha=-RATE)
                parameter.grad = None
    weights = {n: p.detach().clone() for n, p in adapted.items()}
    return Step(loss.detach(), gradients, weights)


def _num_labels(piece: Batch, is_encoder_decoder: bool) -> int:
    """Labels that count: a causal model predicts none at the first position."""
    labels = piece["labels"] if is_encoder_decoder else piece["labels"][:, 1:]
    return int((labels != -100).sum())


def _counts_items(plain: Any, pieces: Sequence[Batch]) -> bool:
    """Whether the model's loss is divided by `num_items_in_batch` when it is given: tried."""
    if not accepts_extra(plain.forward):
        return False
    with torch.no_grad():
        alone = plain(**pieces[0]).loss
        shared = plain(**pieces[0], num_items_in_batch=10_000).loss
    return not torch.equal(alone, shared)


def _streamed_steps(
    model_class: type[PreTrainedModel],
    small: PretrainedConfig,
    folder: Path,
    batches: Sequence[Sequence[Batch]],
) -> list[Step] | str:
    """The same steps streamed with the least memory that works; or why they could not be taken."""
    streamed: Any = None
    try:
        meta = build_meta(
            folder, config=copy.deepcopy(small), model_class=model_class, dtype=torch.float32
        )
        storage = choose_storage(folder).storage
        options = Options(
            device=torch.device("cpu"),
            budgets=Budgets(ram_bytes=0),
            storage=storage,
            timeout_s=TIMEOUT_S,
        )
        options = dataclasses.replace(options, budgets=smallest_budgets(meta, options))
        streamed = assemble(meta, options)
        adapted = _adapt(streamed)
        steps = []
        for pieces in batches:
            loss = streamed(micro_batches=[dict(piece) for piece in pieces]).loss
            loss.backward()
            steps.append(_update(adapted, loss))
        return steps
    except OSError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return f"it trains in memory, but streaming it fails: {reason[:300]}"
    finally:
        if streamed is not None:
            streamed.ssdtune.close()


# ------------------------------------------------------------------ comparing


def _require_signal(steps: Sequence[Step]) -> None:
    """A comparison of nothing would pass. Raises TrialError."""
    if not all(torch.isfinite(step.loss) for step in steps):
        raise TrialError(f"its small random copy has a loss of {float(steps[-1].loss)}")
    if not any(g is not None and g.any() for g in steps[0].gradients.values()):
        raise TrialError("no linear layer of its small copy gets a gradient")


def _first_difference(
    expected: Sequence[Step], found: Sequence[Step], rounding: float
) -> str | None:
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True), 1):
        limit = rounding * GROWTH ** (number - 1)
        for what in ("gradients", "weights"):
            wanted, got = getattr(theirs, what), getattr(ours, what)
            for name, value in wanted.items():
                error = _error(value, got[name])
                if error > limit:
                    return f"the {what[:-1]} of {name} differs in step {number}, {_amount(error)}"
        error = _error(theirs.loss, ours.loss)
        if error > limit:
            return f"the loss of step {number} differs ({_amount(error)}), all gradients agree"
    return None


def _error(wanted: torch.Tensor | None, got: torch.Tensor | None) -> float:
    """The largest difference in units of the largest value; 0 for equal bits. None is zeros."""
    if wanted is None and got is None:
        return 0.0
    if wanted is None or got is None:
        some = wanted if got is None else got
        return 1.0 if some is not None and bool(some.any()) else 0.0
    if torch.equal(wanted, got):
        return 0.0
    return float((wanted - got).abs().max() / wanted.abs().max().clamp_min(1e-30))


def _amount(error: float) -> str:
    return f"by {error:.1e} of its largest value"
