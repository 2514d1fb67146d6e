"""Those who train: each is a model, its optimizer and `step()`, alone in a process of its own.

A contestant is built from a spec (JSON) and takes optimizer steps on one batch; what it says of
itself goes into the row. The batch, the seed, the adapters' first values and the optimizer are
the same for all that train the same thing.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

Spec = dict[str, Any]
Batch = dict[str, torch.Tensor]
QUIET_S = 0.05  # no read for so long, and three times as long as the longest one took: no more come


class Contestant(Protocol):
    """What the worker needs. `step` returns the step's loss; all its work is done when it returns."""

    trains: str

    def step(self) -> float: ...
    def settle(self) -> float | None:
        """Waits until the step left no work behind; when that ended (perf_counter), if later."""
        ...

    def about_step(self) -> dict[str, Any]: ...
    def about(self) -> dict[str, Any]: ...
    def set(self, settings: Spec) -> None: ...
    def close(self) -> None: ...


class Base:
    """Nothing left behind, nothing to set."""

    trains = ""

    def settle(self) -> float | None:
        return None

    def about_step(self) -> dict[str, Any]:
        return {}

    def about(self) -> dict[str, Any]:
        return {}

    def set(self, settings: Spec) -> None:
        raise ValueError(f"{type(self).__name__} has no settings, got {sorted(settings)}")

    def close(self) -> None:
        return None


# ---------------------------------------------------------------------------- shared by all


def make_batch(rows: Sequence[Sequence[int]]) -> Batch:
    """int64 [rows, length] each; every token counts."""
    ids = torch.tensor(rows, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def cut(batch: Batch, rows: int) -> list[Batch]:
    """Micro-batches of `rows` rows."""
    parts = {key: value.split(rows) for key, value in batch.items()}
    return [{key: value[i] for key, value in parts.items()} for i in range(len(parts["input_ids"]))]


def num_predicted(batch: Batch) -> int:
    """Labels that count: a causal model predicts none at the first position."""
    return int((batch["labels"][:, 1:] != -100).sum())


def with_lora(model: Any, spec: Spec) -> Any:
    """The peft model in training mode; its first values depend on the seed alone."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(spec["seed"])
    rank = spec["lora_rank"]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return get_peft_model(model, config).train()


def make_optimizer(model: nn.Module, spec: Spec) -> torch.optim.Optimizer:
    """AdamW without decay over all that trains."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=spec["learning_rate"], weight_decay=0.0, fused=True)


def trained_elements(model: nn.Module) -> int:
    """How many numbers train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def load_plain(spec: Spec) -> Any:
    """`from_pretrained`, the whole model in memory, gradient checkpointing as torch advises it."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    folder = spec["model"]
    names = AutoConfig.from_pretrained(folder).architectures or [""]
    is_causal = names[0].endswith("ForCausalLM")
    kind: Any = AutoModelForCausalLM if is_causal else AutoModelForImageTextToText
    model: Any = kind.from_pretrained(folder, dtype=getattr(torch, spec["dtype"]))
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": spec.get("use_reentrant", False)})
    return model


def flop_shape(model: Any) -> dict[str, int]:
    """What `measures.step_flops` needs, counted before adapters are put on."""
    config = model.config.get_text_config()
    inside = [m for n, m in model.named_modules() if ".layers." in n or ".h." in n]
    block = sum(m.weight.numel() for m in inside if isinstance(m, nn.Linear))
    every = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return {
        "block_weights": block,
        "head_weights": every - block,
        "adapter_weights": 0,
        "num_blocks": config.num_hidden_layers,
        "attention_width": width,
    }


# ------------------------------------------------------------------------------- in memory


class InMemory(Base):
    """The whole model in memory. spec: `what` ("lora" or "full"), `micro_rows`: rows at a time."""

    def __init__(self, spec: Spec) -> None:
        torch.manual_seed(spec["seed"])
        model = load_plain(spec)
        self.shape = flop_shape(model)
        self.trains = spec["what"]
        self.model = with_lora(model, spec) if self.trains == "lora" else model.train()
        if self.trains == "lora":
            self.shape["adapter_weights"] = trained_elements(self.model)
        self.batch = make_batch(spec["batch"])
        self.micro_batches = cut(self.batch, spec["micro_rows"])
        self.num_items = num_predicted(self.batch)
        self.optimizer = make_optimizer(self.model, spec)

    def step(self) -> float:
        total = torch.zeros(())
        for micro in self.micro_batches:
            loss = self.model(**micro, num_items_in_batch=self.num_items).loss
            loss.backward()
            total = total + loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(total)

    def about(self) -> dict[str, Any]:
        return {
            "flop_shape": self.shape,
            "trained_elements": trained_elements(self.model),
            "micro_batches": len(self.micro_batches),
        }


# ------------------------------------------------------------------------------------ ours


class Ours(Base):
    """LoRA on the streamed model, with slots enough to overlap and no decoder layer resident.

    spec: `micro_rows`, `prefetch`, `chunk_tokens`; `throttled`: whether `set` may slow the reader.
    """

    trains = "lora"

    def __init__(self, spec: Spec) -> None:
        from ssdtune.swap.storage import ThrottledStorage, choose_storage
        from ssdtune.visit.build import build_meta

        folder = Path(spec["model"])
        choice = choose_storage(folder)
        self.choice, self.throttle = choice, None
        storage: Any = choice.storage
        if spec["throttled"]:
            self.throttle = storage = ThrottledStorage(choice.storage, 1e15)  # until `set`
        meta = build_meta(folder, dtype=spec["dtype"])
        options = streaming_options(meta, storage, spec)
        from ssdtune.visit.assemble import assemble

        base = assemble(meta, options)
        self.streamer: Any = base.ssdtune
        self.model = with_lora(base, spec)
        self.batch = make_batch(spec["batch"])
        self.num_items = num_predicted(self.batch)
        self.optimizer = make_optimizer(self.model, spec)
        self._marked_s = 0.0  # on the trace's clock: what ended before is of earlier steps

    @property
    def trace(self) -> list[Any]:
        return self.streamer.engine.trace

    @property
    def plan(self) -> Any:
        return self.streamer.engine.plan

    def step(self) -> float:
        self.mark()
        loss = self.model(**self.batch, num_items_in_batch=self.num_items).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def forward(self) -> float:
        """The loss alone."""
        self.mark()
        with torch.no_grad():
            return float(self.model(**self.batch, num_items_in_batch=self.num_items).loss)

    def mark(self) -> None:
        """What the trace holds now is of earlier steps."""
        self._marked_s = time.perf_counter()

    def ops(self) -> list[Any]:
        """What the trace holds of the last step."""
        return [op for op in list(self.trace) if op.end_s >= self._marked_s]

    def settle(self) -> float | None:
        """Blocks that are read ahead for the next step belong to a steady step's cost: the step is
        over when they are there, as they were when it began."""
        longest = max((r.end_s - r.start_s for r in self._reads()), default=0.0)
        quiet = max(QUIET_S, 3 * longest)
        began = time.perf_counter()
        while True:
            ends = [r.end_s for r in self._reads()]
            if time.perf_counter() - max([began, *ends]) > quiet:
                return max(ends, default=None)
            time.sleep(quiet / 10)

    def _reads(self) -> list[Any]:
        from ssdtune.schedule.plan import Lane

        return [op for op in self.ops() if op.lane is Lane.NVME_READ]

    def about_step(self) -> dict[str, Any]:
        from ssdtune.schedule import trace

        ops = self.ops()
        return {
            "lane_s": {str(lane): s for lane, s in trace.lane_seconds(ops).items()},
            "stall_s": trace.stall_seconds(ops),
            "streamed_bytes": trace.read_bytes(ops),
            "misses": sum(op.is_miss for op in ops),
            "planned_bytes": self.plan.sequences["train"].read_bytes,
            "visits": self._visits(ops),
        }

    def _visits(self, ops: list[Any]) -> list[tuple[int, int, float, str]]:
        """The plan's visits: slot, bytes to read for it, how long it computed in this step, direction.

        Empty where the step's visits are not the plan's, as in the first steps of a model."""
        from ssdtune.schedule.plan import Lane

        sequence = self.plan.sequences["train"]
        computed = [op.end_s - op.start_s - op.wait_s for op in ops if op.lane is Lane.COMPUTE]
        if len(computed) != len(sequence.visits):
            return []
        reads: dict[int, int] = {}
        for op in sequence.ops:
            if op.lane is Lane.NVME_READ:
                reads[op.visit] = reads.get(op.visit, 0) + op.num_bytes
        return [
            (visit.slot, reads.get(i, 0), seconds, str(visit.direction))
            for i, (visit, seconds) in enumerate(zip(sequence.visits, computed, strict=True))
        ]

    def about(self) -> dict[str, Any]:
        from ssdtune.schedule.plan import Tier

        plan = self.plan
        resident = [b for b, t in zip(plan.blocks, plan.tiers, strict=True) if t is not Tier.NVME]
        return {
            "trained_elements": trained_elements(self.model),
            "reads": self.choice.storage.name,
            "reads_why": self.choice.reason,
            "ram_budget_bytes": plan.budgets.ram_bytes,
            "model_bytes": plan.model_bytes,
            "slot_bytes": plan.slot_bytes,
            "num_slots": len(plan.slots),
            "resident_blocks": [b.name for b in resident],
            "resident_bytes": sum(b.slot_bytes for b in resident),
            "resident_layers": sum(".layers." in b.name or ".h." in b.name for b in resident),
            "kept_passes": self.streamer.activations.num_kept,
            "recomputed_for_lack_of_room": self.streamer.activations.num_over,
            "plan": list(plan.lines()),
        }

    def set(self, settings: Spec) -> None:
        """`bytes_per_s`: what the pretended drive gives from now on."""
        assert self.throttle is not None, "this contestant was not started throttled"
        self.throttle.bytes_per_s = float(settings["bytes_per_s"])

    def close(self) -> None:
        self.streamer.close()


def streaming_options(meta: Any, storage: Any, spec: Spec) -> Any:
    """`draft.Options` with the smallest RAM budget that holds all slots of this prefetch depth.

    `activation_bytes` are for activations that stay. `resident_share` of all blocks' bytes more are for residents.
    Without it nothing is left for them: only blocks that their class's slots hold anyway, such as a tied embedding and
    head, which is a class of its own, stay.
    """
    from ssdtune.schedule.choices import size_classes
    from ssdtune.schedule.plan import Budgets
    from ssdtune.visit.draft import Options, draft

    options = Options(
        device=torch.device("cpu"),
        budgets=Budgets(ram_bytes=2**60),  # replaced below
        storage=storage,
        prefetch=spec["prefetch"],
        micro_batch_size=spec["micro_rows"],
        chunk_tokens=spec["chunk_tokens"],
    )
    shapes = [recipe.shape for recipe in draft(meta, options).recipes]
    num_slots = [min(len(c), 1 + options.prefetch) for c in size_classes(shapes)]
    slots = sum(
        n * shapes[c[0]].slot_bytes for n, c in zip(num_slots, size_classes(shapes), strict=True)
    )
    staged = [s.file_bytes for s in shapes if s.is_staged]
    buffers = max(staged) * max(1, min(options.prefetch, len(staged))) if staged else 0
    more = int(spec.get("resident_share", 0.0) * sum(shape.slot_bytes for shape in shapes))
    budgets = Budgets(
        ram_bytes=slots + buffers + more, activation_bytes=spec.get("activation_bytes", 0)
    )
    return dataclasses.replace(options, budgets=budgets)


def builders() -> dict[str, Callable[[Spec], Contestant]]:
    """Contestants by kind. Peers import their package when they are built."""
    from benchmarks.peers.airllm_lora import AirLLM, AirLLMTwin
    from benchmarks.peers.deepspeed_zero3 import DeepSpeedNvme

    return {
        "memory": InMemory,
        "ours": Ours,
        "deepspeed": DeepSpeedNvme,
        "airllm": AirLLM,
        "airllm-twin": AirLLMTwin,
    }
