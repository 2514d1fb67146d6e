"""Streamed against plain: the two models of one folder, the same steps, what must be equal.

The plain side is what anybody would write: `from_pretrained`, a loop over micro-batches, `backward`
after each. Nothing of ssdtune is used there, its cutting and counting neither.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tiny_models
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from ssdtune.schedule.plan import Budgets
from ssdtune.swap.storage import Storage, choose_storage
from ssdtune.visit.assemble import assemble
from ssdtune.visit.build import MetaModel, build_meta
from ssdtune.visit.draft import Options, smallest_budgets

Batch = dict[str, Any]
LORA_TARGETS = {"mamba2": ["in_proj"]}  # peft refuses the others: Mamba's fused kernels bypass them
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 4e-2}  # relative; sums in another order


# ------------------------------------------------------------------ the two models


def smallest_ram(meta: MetaModel, storage: Storage) -> int:
    """Bytes of RAM with which any plan works: one slot, one buffer where one is needed."""
    return smallest_budgets(meta, cpu_options(storage, Budgets(ram_bytes=1))).ram_bytes


def cpu_options(storage: Storage, budgets: Budgets, **more: Any) -> Options:
    """Streaming on the CPU within `budgets`."""
    return Options(device=torch.device("cpu"), budgets=budgets, storage=storage, **more)


def streamed(
    folder: Path,
    *,
    factor: float = 1.0,
    micro_batch_size: int | None = 2,
    timeout_s: float = 20.0,
    activation_bytes: int = 0,
    nvme_activation_bytes: int = 0,
    options: Mapping[str, Any] | None = None,
    **build: Any,
) -> PreTrainedModel:
    """The model of `folder` streamed on the CPU, with `factor` times the smallest RAM that works.

    activation_bytes: that may stay until backward; nvme_activation_bytes: that may wait on a drive. options: further
    fields of `draft.Options`. build: as `build_meta` takes them, or `meta`, what it has made.
    """
    meta = build.pop("meta", None) or build_meta(folder, **build)
    storage = choose_storage(folder).storage
    ram = int(smallest_ram(meta, storage) * factor)
    return assemble(
        meta,
        cpu_options(
            storage,
            Budgets(
                ram_bytes=ram,
                activation_bytes=activation_bytes,
                nvme_activation_bytes=nvme_activation_bytes,
            ),
            micro_batch_size=micro_batch_size,
            timeout_s=timeout_s,
            **(options or {}),
        ),
    )


def with_adapter(model: PreTrainedModel, config: PeftConfig, seed: int = 2) -> Any:
    """The peft model in training mode, all that trains moved off its initial value.

    Zeros (LoRA's B) would hide a lost gradient of A. The same numbers for the same seed.
    """
    torch.manual_seed(seed)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for _, parameter in trained(adapted):
            parameter.add_(torch.randn(parameter.shape).to(parameter.dtype), alpha=0.05)
    return adapted.train()


def with_lora(model: PreTrainedModel, targets: Sequence[str] | None = None, **more: Any) -> Any:
    """LoRA of rank 4 on all linear layers, or on `targets`."""
    chosen = list(targets) if targets is not None else tiny_models.lora_targets(model)
    return with_adapter(model, LoraConfig(r=4, target_modules=chosen, **more))


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields names and parameters that train."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


@dataclasses.dataclass
class Pair:
    """The same adapted model twice, and where its weights lie."""

    name: str
    folder: Path
    plain: Any
    streamed: Any

    @property
    def models(self) -> tuple[Any, Any]:
        """Both."""
        return self.plain, self.streamed

    @property
    def engine(self) -> Any:
        """The streamed one's engine."""
        return self.streamed.get_base_model().ssdtune.engine

    def num_micro(self, batch: Batch) -> int:
        """Micro-batches that the streamed one cuts it into."""
        size = self.streamed.get_base_model().ssdtune.micro_batch_size
        return len(batch["labels"]) // size if size else 1


def make_pair(
    name: str,
    folder: Path,
    stream: Callable[..., PreTrainedModel],
    *,
    dtype: torch.dtype = torch.float32,
    adapt: Callable[[PreTrainedModel], Any] | None = None,
    config: Mapping[str, Any] | None = None,
    is_smaller: bool = False,
    **options: Any,
) -> Pair:
    """Writes tiny model `name` to `folder` and opens it both ways.

    stream: the fixture of that name. adapt: model -> peft model, LoRA on all linear layers by
    default. config: values of the model's config to override. is_smaller: of `tiny_models.SMALLER`.
    options: as `streamed` takes them, `model_class` and `attn_implementation` go to both.
    """
    base = tiny_models.build(name, dtype=dtype, is_smaller=is_smaller)
    base.config.update(dict(config or {}))
    tiny_models.save(base, folder, "30KB" if is_smaller else "200KB")
    targets = LORA_TARGETS.get(name, tiny_models.lora_targets(base))
    adapt = adapt or (lambda model: with_lora(model, targets))
    kind = options.setdefault("model_class", type(base))
    attention = {k: v for k, v in options.items() if k == "attn_implementation"}
    plain = adapt(kind.from_pretrained(folder, dtype=dtype, **attention))
    return Pair(name, folder, plain, adapt(stream(folder, **options)))


# ------------------------------------------------------------------ batches


def cut(batch: Mapping[str, Any], num_pieces: int) -> list[Batch]:
    """The batch in equal parts along every tensor's first axis."""
    pieces: list[Batch] = [{} for _ in range(num_pieces)]
    for key, value in batch.items():
        parts = value.chunk(num_pieces) if isinstance(value, torch.Tensor) else [value] * num_pieces
        for piece, part in zip(pieces, parts, strict=True):
            piece[key] = part
    return pieces


def num_items(pieces: Sequence[Mapping[str, Any]], *, is_causal: bool = True) -> int:
    """Labels that count; a causal model predicts none at the first position."""
    first = 1 if is_causal else 0
    return sum(int((piece["labels"][:, first:] != -100).sum()) for piece in pieces)


def padded(batch: Batch, lengths: Sequence[int]) -> Batch:
    """Row i keeps `lengths[i]` tokens; the rest is padding on the right, masked and unlabelled."""
    cutoff = torch.tensor(lengths)[:, None]
    is_pad = torch.arange(batch["input_ids"].shape[1])[None] >= cutoff
    return {
        **batch,
        "input_ids": batch["input_ids"].masked_fill(is_pad, 0),
        "attention_mask": (~is_pad).long(),
        "labels": batch["labels"].masked_fill(is_pad, -100),
    }


# ------------------------------------------------------------------ steps and comparisons


def accumulate(model: Any, pieces: Sequence[Batch], items: int | None = None) -> torch.Tensor:
    """Plain gradient accumulation; the step's loss. items: the model's `num_items_in_batch`."""
    more = {} if items is None else {"num_items_in_batch": items}
    total = None
    for piece in pieces:
        loss = model(**piece, **more).loss
        loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    return total


def accumulate_means(model: Any, pieces: Sequence[Batch], *, is_causal: bool) -> torch.Tensor:
    """The same for a model that takes the mean over each micro-batch's labels and no count."""
    items = num_items(pieces, is_causal=is_causal)
    total = None
    for piece in pieces:
        loss = model(**piece).loss * (num_items([piece], is_causal=is_causal) / items)
        loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    return total


def gradients(model: Any) -> dict[str, torch.Tensor | None]:
    """Copies of the gradients of all that trains."""
    return {n: None if p.grad is None else p.grad.clone() for n, p in trained(model)}


def weights(model: Any) -> dict[str, torch.Tensor | None]:
    """Copies of all that trains."""
    return {n: p.detach().clone() for n, p in trained(model)}


def assert_equal(
    expected: Mapping[str, torch.Tensor | None],
    got: Mapping[str, torch.Tensor | None],
    what: str = "gradients",
    *,
    rounding: float | None = None,
) -> None:
    """Same keys and the same bits, or within `rounding` of the largest value."""
    assert expected.keys() == got.keys()
    assert expected, f"no {what} to compare"
    different = {}
    for name, wanted in expected.items():
        found = got[name]
        if wanted is None or found is None:
            if wanted is not found and not _is_zero(wanted) and not _is_zero(found):
                different[name] = "only one side has any"
        elif not torch.equal(wanted, found):
            error = float((wanted - found).abs().max() / wanted.abs().max().clamp_min(1e-30))
            if rounding is None or not error <= rounding:
                different[name] = f"off by {error:.1e} of the largest"
    assert not different, f"{what} differ in {len(different)} of {len(expected)}: {different}"


def assert_same_gradients(pair: Pair, *, rounding: float | None = None) -> None:
    """Both models hold the same gradients now."""
    assert_equal(gradients(pair.plain), gradients(pair.streamed), rounding=rounding)


def assert_same_weights(pair: Pair, *, rounding: float | None = None) -> None:
    """All that trains is the same in both models now."""
    assert_equal(weights(pair.plain), weights(pair.streamed), "weights", rounding=rounding)


def _is_zero(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and not tensor.any()


def assert_same_training(
    pair: Pair,
    batches: Sequence[Batch],
    *,
    num_micro: int | None = None,
    rounding: float | None = None,
    plain_step: Callable[[Any, Sequence[Batch]], torch.Tensor] | None = None,
    count: bool = True,
) -> None:
    """Both models take one clipped AdamW step per batch; losses, norms, gradients, weights agree.

    num_micro: micro-batches of the plain side; by default as many as the streamed model makes. Fewer than three prove
    nothing of the order in which gradients are added. plain_step: model, micro-batches -> loss after backward; plain accumulation
    by default.
    count: whether the streamed model is told `num_items_in_batch`, as trainers do.
    """
    models = pair.models
    assert [n for n, _ in trained(models[0])] == [n for n, _ in trained(models[1])]
    parameters = [[p for _, p in trained(model)] for model in models]
    optimizers = [torch.optim.AdamW(p, lr=1e-2) for p in parameters]
    for batch in batches:
        pieces = cut(batch, num_micro or pair.num_micro(batch))
        items = num_items(pieces)
        step_of = plain_step or partial(accumulate, items=items)
        expected = step_of(pair.plain, pieces)
        loss = pair.streamed(**batch, **({"num_items_in_batch": items} if count else {})).loss
        loss.backward()
        assert_equal({"loss": expected}, {"loss": loss.detach()}, "losses", rounding=rounding)
        assert_same_gradients(pair, rounding=rounding)
        norms = [{"norm": nn.utils.clip_grad_norm_(p, 1.0)} for p in parameters]
        assert_equal(norms[0], norms[1], "gradient norms", rounding=rounding)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    if rounding is None:
        assert_same_weights(pair)


def num_misses(engine: Any) -> int:
    """Blocks that were fetched on demand, out of the plan's order, since the start."""
    return sum(op.is_miss for op in engine.trace)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
