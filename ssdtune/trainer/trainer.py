"""`SSDTrainer`: `transformers.Trainer` whose micro-batches of a step meet at every block.

A plain Trainer calls the model once per micro-batch, so that a streamed model's blocks would be
fetched once per accumulation step. Here the first `training_step` of an optimizer step runs
`compute_loss` of *all* its micro-batches in one visit sequence and takes one backward of their sum;
the others return the losses that were computed then. All else (callbacks, counters, clipping,
logging, the short last group of an epoch) is the Trainer's own loop, unaware of it.

    losses, gradients, gradient norms and weights equal those of a plain in-memory Trainer with the
    same batch and accumulation, bit for bit: gradients are added in the same order (visit/meet.py).

Evaluation does the same with its batches, as many at a time as training has micro-batches.
On a model that isn't streamed this is a plain Trainer that saves durably.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback

from ssdtune.errors import SSDTuneError
from ssdtune.schedule.cost import Moves
from ssdtune.schedule.memory import Passes
from ssdtune.trainer.checkpoint import Checkpoints, RunIdentity
from ssdtune.trainer.config import SSDConfig
from ssdtune.trainer.interrupt import Interruption
from ssdtune.trainer.lookahead import LookAhead
from ssdtune.trainer.options import OptionsTrainer
from ssdtune.visit.base import dtype_of, weights_of
from ssdtune.visit.saving import unstreamed_state
from ssdtune.zeroth_order.weights import check_unmoved

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, TrainingArguments

    from ssdtune.visit.streamer import Streamer


class TrainerError(SSDTuneError):
    """Arguments that don't go with a streamed model, or with one another."""


class SSDTrainer(OptionsTrainer):
    """A Trainer for streamed models, arguments in the order of TRL's `SFTTrainer`.

    Args:
        model: what `ssdtune.stream` returned, with an adapter or not; any other model of
            transformers; or a name, which is streamed with `args.offload`.
        args: an SSDConfig, or TrainingArguments.
        data_collator: rows to one micro-batch; `ssdtune.data.CausalCollator` pads ids and labels,
            `OptionsCollator` lays out rows with a label for the choice among their options.
        train_dataset: rows with the collator's columns, tokenized.
        peft_config: an adapter for a model without one. `all-linear` as in `ssdtune.peft`.
        formatting_func: row -> text, for datasets that are not tokenized; needs processing_class.

    The rest is as in Trainer. Raises TrainerError for arguments that streaming can't honour.
    """

    needs_gradients = True  # whether something must be trainable by backward

    def __init__(  # noqa: PLR0913 - the order of SFTTrainer, which people know
        self,
        model: str | PreTrainedModel | PeftModel | nn.Module,
        args: SSDConfig | TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[..., Any] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
    ) -> None:
        args = SSDConfig(output_dir="tmp_trainer") if args is None else args
        opened: Any = _stream(model, args) if isinstance(model, str) else model
        if peft_config is not None:
            opened = _adapt(opened, peft_config)
        if formatting_func is not None:
            train_dataset, eval_dataset = (
                _tokenize(rows, formatting_func, processing_class)
                for rows in (train_dataset, eval_dataset)
            )
        self.streamer: Streamer | None = getattr(opened, "ssdtune", None)
        if self.streamer is not None:
            _check_streamed(opened, args, self.streamer, needs_gradients=self.needs_gradients)
            self.check_arguments(opened, args)
        self._group: list[Any] = []  # the micro-batches of the step under way
        self._losses: list[torch.Tensor] = []  # of those whose training_step is still to come
        self._eval_group: list[Any] = []
        self._eval_results: list[Any] = []
        self.interruption = Interruption()
        self.checkpoints = Checkpoints(self)
        super().__init__(
            model=opened,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.add_callback(self.interruption.callback)

    def check_arguments(self, model: Any, args: Any) -> None:
        """Raises TrainerError for those that the method can't honour with a streamed model, before it is touched."""

    def passes(self) -> Passes:
        """What passes a block in one visit."""
        return Passes(num=self.args.gradient_accumulation_steps)

    def moves(self, num_rows: int) -> Moves | None:
        """What is done to weights in a visit; None: nothing. num_rows: of the data that are trained on."""
        return None

    def release(self) -> None:
        """Gives back what the run took beside the model; the model can't be used afterwards."""

    def num_trainable(self) -> int:
        """Parameters that train."""
        assert self.model is not None
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def was_interrupted(self) -> bool:
        """Whether the last `train()` ended early because of a signal, with everything saved."""
        return self.interruption.has_stopped

    # ---- a step ----------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> Any:
        """The micro-batches of the next optimizer step and their number of trained tokens."""
        if self.state.global_step >= self.state.max_steps:
            # A finished run that is resumed within an epoch: Trainer's loop would make one step more.
            self.control.should_training_stop = True
            self._group = []
            return [], None
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._group, self._losses = batches if self.streamer is not None else [], []
        return batches, num_items

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The loss of one micro-batch. With the first of a step, all of them run, backward too."""
        if len(self._group) < 2:
            return super().training_step(model, inputs, num_items_in_batch)
        if inputs is self._group[0]:
            self._losses = self._run_group(model, num_items_in_batch)
        elif not self._losses:  # a subclass made other inputs: one by one is right, if slow
            return super().training_step(model, inputs, num_items_in_batch)
        return self._losses.pop(0)

    def _run_group(self, model: nn.Module, num_items_in_batch: Any) -> list[torch.Tensor]:
        """Forward of all micro-batches in one visit sequence, one backward; the detached losses."""
        assert self.streamer is not None
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # type: ignore[union-attr] # schedule-free optimizers
        calls = [
            partial(
                self.compute_loss,
                model,
                self._prepare_inputs(inputs),
                num_items_in_batch=num_items_in_batch,
            )
            for inputs in self._group
        ]
        with _gradients_synced(model):
            with self.compute_loss_context_manager():
                losses = self.streamer.run(calls)
            del calls
            if not self._is_scaled_for_accumulation(num_items_in_batch):
                losses = [loss / self.current_gradient_accumulation_steps for loss in losses]
            _prepare_reducer(model, losses)
            # One after the other, as plain accumulation adds them up.
            self.accelerator.backward(sum(losses[1:], losses[0]))
        return [loss.detach() for loss in losses]

    def _is_scaled_for_accumulation(self, num_items_in_batch: Any) -> bool:
        """Trainer.training_step's rule: whether a loss is a share of the step's loss already."""
        stated = getattr(self, "loss_is_scaled_for_ga", None)
        if stated is not None:
            return stated
        counts_items = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return counts_items or self.compute_loss_func is not None

    # ---- evaluation ------------------------------------------------------------------------------

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own, over a loader that shows several batches ahead (see lookahead.py)."""
        size = self.args.gradient_accumulation_steps
        if self.streamer is None or size < 2 or not hasattr(dataloader, "__len__"):
            return super().evaluation_loop(dataloader, *args, **kwargs)
        try:
            ahead: Any = LookAhead(dataloader, size, self._begin_eval_group)
            return super().evaluation_loop(ahead, *args, **kwargs)
        finally:
            self._begin_eval_group([])

    def _begin_eval_group(self, group: list[Any]) -> None:
        self._eval_group, self._eval_results = group, []

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """Loss, logits and labels of one batch; with the first of a group, all of them run."""
        step = partial(
            super().prediction_step,
            model,
            prediction_loss_only=prediction_loss_only,
            ignore_keys=ignore_keys,
        )
        if len(self._eval_group) < 2 or self.streamer is None:
            return step(inputs)
        if inputs is self._eval_group[0]:
            with torch.no_grad():
                calls = [partial(step, batch) for batch in self._eval_group]
                self._eval_results = self.streamer.run(calls)
        elif not self._eval_results:
            return step(inputs)
        return self._eval_results.pop(0)

    # ---- saving, resuming, stopping --------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Trains. resume_from_checkpoint: True for the newest whole one in `output_dir`, a path,
        or None. Raises CheckpointError where it is incomplete or of another base, data or batch.
        """
        found = self.checkpoints.find(resume_from_checkpoint)
        if found is not None:
            self.checkpoints.check(found, self.identity())
            if self.args.process_index == 0:
                sys.stderr.writelines(f"{line}\n" for line in self.checkpoints.kept(found))
        may_save = self.args.save_strategy != "no" and getattr(self.args, "save_on_interrupt", True)
        with self.interruption.watched(is_enabled=may_save):
            return super().train(None if found is None else str(found), trial, ignore_keys_for_eval)

    def identity(self) -> RunIdentity:
        """What a checkpoint of this run must agree with to be resumed."""
        if self.streamer is None:
            return RunIdentity.of(self, base=None, reading=None, dtype=None)
        return RunIdentity.of(self, **weights_of(self.model), dtype=dtype_of(self.model))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.checkpoints.save(model, trial)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own, but with `save_total_limit: 1` it would remove the newest checkpoint where another is the best: of
        an interrupted run the one that it was saved in."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Trainer's own, its pickled arguments replaced by JSON."""
        if state_dict is None and self.streamer is not None:
            state_dict = unstreamed_state(self.model)
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.checkpoints.replace_pickled_arguments(str(output_dir or self.args.output_dir))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's own, with `num_tokens`: tokens seen since the first step, padding left out."""
        if self.args.include_num_input_tokens_seen != "no":
            logs["num_tokens"] = self.state.num_input_tokens_seen
        super().log(logs, start_time)


# ------------------------------------------------------------------ arguments


def _stream(name: str, args: Any) -> PreTrainedModel:
    from ssdtune.api import stream

    keywords = dict(getattr(args, "model_init_kwargs", None) or {})
    offload = getattr(args, "offload", None)
    _ = args.device  # picks this process's device among several, which stream() then takes
    return stream(
        name, offload=offload, micro_batch_size=args.per_device_train_batch_size, **keywords
    )


def _adapt(model: Any, peft_config: PeftConfig) -> Any:
    from ssdtune.peft import attach

    if hasattr(model, "peft_config"):
        raise TrainerError(
            "the model has an adapter already and peft_config asks for another.\n"
            "Pass one of the two."
        )
    return attach(model, peft_config)


def _tokenize(rows: Any, formatting_func: Callable[[dict[str, Any]], str], tokenizer: Any) -> Any:
    """Texts of `formatting_func`, tokenized with an end token, all of each trained."""
    if rows is None:
        return None
    if tokenizer is None:
        raise TrainerError(
            "formatting_func needs processing_class=tokenizer to tokenize its texts."
        )
    end = tokenizer.eos_token or ""

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        text = formatting_func(row)
        ids = tokenizer(text if text.endswith(end) else text + end)["input_ids"]
        return {"input_ids": ids, "labels": list(ids)}

    return rows.map(encode, remove_columns=rows.column_names)


def _check_streamed(model: Any, args: Any, streamer: Streamer, *, needs_gradients: bool) -> None:
    """Refuses what would fail later or be ignored; settles what has one right answer."""
    refused = {
        "fsdp": args.fsdp,
        "deepspeed": args.deepspeed,
        "torch_compile": args.torch_compile,
        "bf16_full_eval": args.bf16_full_eval,
        "fp16_full_eval": args.fp16_full_eval,
        "auto_find_batch_size": args.auto_find_batch_size,
        "push_to_hub": args.push_to_hub,
    }
    for name, value in refused.items():
        if value:
            raise TrainerError(
                f"{name} is not supported for a streamed model.\nLeave it out of the arguments."
            )
    here, wanted = streamer.engine.slots.device, args.device
    if here.type == wanted.type == "cuda" and wanted.index not in (None, here.index):
        raise TrainerError(
            f"the model is streamed to {here}, and this process trains on {wanted}.\n"
            "Make the arguments and read args.device before ssdtune.stream: that picks the process's device among several."
        )
    if needs_gradients:
        check_unmoved(streamer)  # checkpoints name the files' weights
    if needs_gradients and not any(p.requires_grad for p in model.parameters()):
        raise TrainerError(
            "nothing to train: the weights of a streamed model are frozen.\n"
            "Pass peft_config=LoraConfig(…), or a model with an adapter."
        )
    loose = next((name for name, p in model.named_parameters() if p.requires_grad), None)
    if loose and args.save_strategy != "no" and not hasattr(model, "peft_config"):
        raise TrainerError(
            f"{loose} trains outside of an adapter, and no checkpoint would hold it.\n"
            'Let peft have it, LoraConfig(modules_to_save=[…]), or pass save_strategy="no" and save it yourself.'
        )
    rows, most = args.per_device_train_batch_size, streamer.micro_batch_size
    steps = args.gradient_accumulation_steps
    # One micro-batch alone comes to the front door, which cuts it. Several, or variants of one, are in a run by then.
    is_run = steps > 1 or not needs_gradients
    if is_run and most is not None and rows > most:
        raise TrainerError(
            f"per_device_train_batch_size {rows} is more than the model's micro_batch_size {most}: "
            "a micro-batch of the trainer passes a block whole.\n"
            f"The same step within that memory: per_device_train_batch_size={most}, "
            f"gradient_accumulation_steps={-(-rows * steps // most)}."
        )
    args._n_gpu = min(args.n_gpu, 1)  # DataParallel would copy placeholders; torchrun takes several
    if args.ddp_find_unused_parameters is None:
        # Every trainable parameter of a block is an input of its visit, used or not.
        args.ddp_find_unused_parameters = False


# ------------------------------------------------------------------ several processes


@contextlib.contextmanager
def _gradients_synced(model: nn.Module) -> Iterator[None]:
    """Lifts the `no_sync` that Trainer's loop puts around all but a step's last micro-batch."""
    before = getattr(model, "require_backward_grad_sync", None)
    if before is None:
        yield
        return
    model.require_backward_grad_sync = True  # type: ignore[assignment]
    try:
        yield
    finally:
        model.require_backward_grad_sync = before


def _prepare_reducer(model: nn.Module, losses: list[torch.Tensor]) -> None:
    """Every forward has told the reducer which parameters *it* used; backward is of them all."""
    if getattr(model, "find_unused_parameters", False) and not getattr(model, "static_graph", 0):
        model.reducer.prepare_for_backward(losses)  # type: ignore[operator]
