"""`ZOTrainer`: `transformers.Trainer` that estimates gradients from losses (`ssdtune.zeroth_order`).

All micro-batches of a step pass all variants of the weights in one visit of each block; there is no backward and no
optimizer state. What trains is an adapter, where the model has one, or all weights: then the base files stay as they
are and the run is its log, from which `ssdtune replay` makes the weights of any step; `model.save_pretrained(folder)`
writes those that the model has now.

Several processes deal the micro-batches out among them, begin with the first one's adapter and exchange losses, nothing
else: with the same seed each makes the same update, and the run is the one of a single process, bit for bit.

Learning-rate schedules, callbacks, evaluation, logging and resuming are the Trainer's own.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerState
from transformers.trainer_pt_utils import find_batch_size
from transformers.utils.generic import TransformersKwargs

from ssdtune.data import choose_pad_token
from ssdtune.peft import fingerprint_of
from ssdtune.run_files import LOG_NAME
from ssdtune.schedule.cost import Moves
from ssdtune.schedule.memory import Passes
from ssdtune.trainer.checkpoint import STATE_NAME
from ssdtune.trainer.generations import READ, Generation, answers
from ssdtune.trainer.processes import begin_alike, check_alike, gathered
from ssdtune.trainer.trainer import SSDTrainer, TrainerError
from ssdtune.visit.base import base_of as model_of
from ssdtune.visit.base import dtype_of, weights_of
from ssdtune.zeroth_order import FZOO, LOZO, Estimator, Fold, Mask, MeZO, Rule, Step, ZerothOrder
from ssdtune.zeroth_order.log import (
    ADAPTERS,
    ALL,
    CODES,
    LOW_RANK,
    MASTERS,
    Header,
    Log,
    LogError,
    LogWriter,
    read_log,
    replace_log,
)
from ssdtune.zeroth_order.masks import NONE
from ssdtune.zeroth_order.method import that_train
from ssdtune.zeroth_order.packed import DECODED, MOVED
from ssdtune.zeroth_order.rules import ADAM, LOZO_M, MOMENTUM

if TYPE_CHECKING:
    from ssdtune.config import TrainConfig


def fold_of(config: TrainConfig) -> Fold | None:
    """As zo_fold_steps and offload.path say."""
    if config.zo_fold_steps is None or config.zo_trains == "adapters":
        return None
    return Fold(config.offload.path or config.output_dir, config.zo_fold_steps)


def estimator_of(config: TrainConfig) -> Estimator:
    """As the zo_* keys say."""
    given: dict[str, Any] = {"eps": config.zo_eps}
    if config.zo_num_directions is not None:
        given["num_directions"] = config.zo_num_directions
    if config.zo_mask != NONE:
        given["mask"] = Mask(config.zo_mask, config.zo_mask_ratio)
    if config.zo_estimator == "lozo":
        return LOZO(**given, rank=config.zo_rank, window=config.zo_window)
    return {"mezo": MeZO, "fzoo": FZOO}[config.zo_estimator](**given)


def rule_of(config: TrainConfig) -> Rule:
    """As zo_update and its keys say."""
    kind, beta1 = config.zo_update, config.zo_momentum
    if kind not in (MOMENTUM, ADAM, LOZO_M):
        return Rule(kind=kind)
    if beta1 is None:
        beta1 = 0.9 if kind == MOMENTUM else 0.7
    if kind == LOZO_M:
        return Rule(kind=kind, beta1=beta1)
    beta2 = config.zo_beta2 if kind == ADAM else 0.0
    return Rule(kind=kind, beta1=beta1, beta2=beta2, horizon=config.zo_horizon)


class ZOTrainer(SSDTrainer):
    """An SSDTrainer that needs forward passes alone.

    Args:
        estimator: MeZO(...) by default, FZOO(...) or LOZO(...).
        rule: what steps make of estimates; None: they follow them.
        clip: bounds each projected gradient; None: as it comes.
        fold: where and how often a working copy of all weights is written; None: never.
        packed: what slots hold of a packed base, and what trains: "decoded", "kept" or "moved".
        low_rank: whether LOZO's windows are held as matrices of low rank beside all weights.
        master: whether all weights of 16 bits train in float32.
        objective: (the model's output, a micro-batch) -> a value of each row, the more the better, [rows]: accuracy, a
            reward; it needs no gradient. With `generation` it gets the answers to the micro-batch's prompts instead of an
            output: a list of texts, of lists of ids where there is no processing_class. The micro-batch is the collator's,
            whole; forward gets what it takes of it. So references may lie beside the ids: with
            `args.remove_unused_columns=False`, without which Trainer strips rows of them. None: the model's own loss.
        generation: how answers are made for the objective.

    The rest is as in SSDTrainer. `args.optim` and `args.max_grad_norm` mean nothing here.
    """

    needs_gradients = False

    def __init__(  # noqa: PLR0913 - each has its default, and stands alone
        self,
        *args: Any,
        estimator: Estimator | None = None,
        rule: Rule | None = None,
        clip: float | None = None,
        fold: Fold | None = None,
        packed: str = DECODED,
        low_rank: bool = False,
        master: bool = False,
        objective: Callable[[Any, Any], Any] | None = None,
        generation: Generation | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.objective, self.generation = objective, generation
        if generation is not None and objective is None:
            raise TrainerError("generation without an objective.\nPass objective=f(texts, batch).")
        if self.streamer is None:
            raise TrainerError(
                "ZOTrainer trains streamed models.\nOpen the model with ssdtune.stream(name)."
            )
        self._check_idle(fold)
        has_others = self.args.world_size > 1
        if has_others:
            begin_alike(that_train(self.model).values())
        self.args.max_grad_norm = 0.0  # there is no gradient to measure
        self.method = ZerothOrder(
            self.model,
            estimator or MeZO(),
            rule=rule,
            seed=self.args.seed,
            clip=clip,
            fold=fold,
            exchange=gathered if has_others else None,
            packed=packed,
            low_rank=low_rank,
            master=master,
        )
        if has_others:  # there is no gradient that DistributedDataParallel could sum
            self.accelerator.prepare_model = lambda model, **_: model  # type: ignore[method-assign]
        family = self.method.estimator.family
        header = Header(
            **weights_of(self.model),
            dtype=dtype_of(self.model),
            seed=self.args.seed,
            **{f.name: getattr(family, f.name) for f in dataclasses.fields(family)},
            rule=self.method.rule,
            trains=self._what_trains(packed),
            adapter=None if self.method.trains_blocks else fingerprint_of(that_train(self.model)),
        )
        if has_others:
            check_alike(header)
        self.log_writer = LogWriter(Path(str(self.args.output_dir)) / LOG_NAME, header)
        self.last_step: Step | None = None
        self.num_skipped = 0  # steps that `Step` says left the weights alone

    def check_arguments(self, model: Any, args: Any) -> None:
        """Refuses what needs a backward pass or training mode, and of all weights what needs their files."""
        if args.fp16:
            raise TrainerError(
                "fp16 scales losses for a backward pass, and ZOTrainer has none.\n"
                "Pass bf16=True, or open the model with dtype=torch.bfloat16."
            )
        if args.neftune_noise_alpha is not None:
            raise TrainerError(
                "neftune_noise_alpha: its noise is for training mode, and all variants pass in eval mode.\nLeave it out."
            )
        if args.load_best_model_at_end and not any(p.requires_grad for p in model.parameters()):
            raise TrainerError(
                "load_best_model_at_end: a checkpoint of all weights holds none to load; they are replayed.\n"
                "Leave it out; the log makes those of any step: ssdtune.zeroth_order.replayed(model, log, num_steps=N) on "
                "the model opened anew, then model.save_pretrained(folder), or `ssdtune replay` of what `ssdtune train` ran."
            )

    def _check_idle(self, fold: Fold | None) -> None:
        """Refuses arguments that would do nothing."""
        if (self.optimizer, self.lr_scheduler) != (None, None) or self.optimizer_cls_and_kwargs:
            raise TrainerError(
                "optimizers and optimizer_cls_and_kwargs: there are no gradients that an optimizer could step by.\n"
                "Leave them out: args.learning_rate, args.lr_scheduler_type and args.weight_decay say how far a step goes, "
                "rule=Rule(…) what it makes of estimates."
            )
        if fold is not None and that_train(self.model):
            raise TrainerError(
                "fold: an adapter lies in memory, and nothing of it is written back.\nLeave it out."
            )

    def _what_trains(self, packed: str) -> str:
        """As the log names it."""
        if not self.method.trains_blocks:
            return ADAPTERS
        if self.method.low_rank:
            return LOW_RANK
        if self.method.master:
            return MASTERS
        return CODES if packed == MOVED else ALL

    def passes(self) -> Passes:
        """All micro-batches pass every variant."""
        variants = len(self.method.estimator.variants)
        return Passes(
            kind="forward",
            num=variants * self.args.gradient_accumulation_steps,
            more=self.method.extra_bytes(),
            writes_back=self.method.fold is not None,
        )

    def moves(self, num_rows: int) -> Moves:
        """Variants of the weights, and the updates that blocks have missed when they come."""
        args = self.args
        num_steps = args.max_steps
        if num_steps <= 0:
            at_once = args.per_device_train_batch_size * args.gradient_accumulation_steps
            num_steps = math.ceil(args.num_train_epochs * num_rows / (at_once * args.world_size))
        return self.method.moves(max(num_steps, 1))

    def release(self) -> None:
        """Removes the working copy of the weights: the log makes it again."""
        self.method.close()

    def num_trainable(self) -> int:
        """Parameters that train."""
        return self.method.num_trained

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As SSDTrainer does, once: a run that goes on is resumed. Raises TrainerError for a second one."""
        if self.method.num_steps and not resume_from_checkpoint:
            another = "make another ZOTrainer, which begins with the adapter as it is"
            if self.method.trains_blocks:
                another = "open the model anew with ssdtune.stream, for another ZOTrainer"
            raise TrainerError(
                f"this trainer has made a run of {self.method.num_steps} steps, and its log holds no second one.\n"
                f"Go on from a checkpoint with train(resume_from_checkpoint=True), or {another}."
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    # ---- a step ----------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Holds the learning rate for schedulers; the weights move in `training_step`."""
        if self.optimizer is None:
            self.optimizer = _Rate(self.args.learning_rate, self.args.weight_decay)
        return self.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """One micro-batch's share of the step's loss. With the first of a step, all of them run."""
        if inputs is self._group[0]:
            loss = self._step(model, num_items_in_batch)
            self._losses = [loss / len(self._group)] * len(self._group)
        return self._losses.pop(0)

    def _step(self, model: nn.Module, num_items_in_batch: Any) -> torch.Tensor:
        assert self.optimizer is not None
        self.log_writer.check()
        # Of the whole step's loss: Trainer makes the mean over processes of what each has.
        scale, num_rows = 1 / self.args.world_size, None
        if self.objective is not None:
            rows: list[Any] = [find_batch_size(self._for_forward(each)) for each in self._group]
            num_rows = sum(rows)
        elif not self._is_scaled_for_accumulation(num_items_in_batch):
            scale /= self.current_gradient_accumulation_steps
        prepare = self._prepare_inputs if self.objective is None else self._prepare_input
        calls = [
            partial(self._share, model, prepare(inputs), num_items_in_batch, scale)
            for inputs in self._group
        ]
        group = self.optimizer.param_groups[0]
        number = self.method.num_steps
        with self.compute_loss_context_manager():
            step = self.method.step(
                calls,
                learning_rate=group["lr"],
                weight_decay=group["weight_decay"],
                num_rows=num_rows,
            )
        if self.args.process_index == 0:
            Path(str(self.args.output_dir)).mkdir(parents=True, exist_ok=True)
            self.log_writer.append(number, step.loss, step.update)
        self.last_step = step
        self.num_skipped += step.update is None
        return torch.tensor(step.loss, device=self.args.device)

    def _share(self, model: nn.Module, inputs: Any, num_items: Any, scale: float) -> torch.Tensor:
        if self.objective is not None:
            if self.generation is not None:
                judged: Any = self._answers(model, inputs)
            else:
                judged = model(**self._for_forward(inputs))
            values = torch.as_tensor(self.objective(judged, inputs))
            rows = find_batch_size(self._for_forward(inputs))
            if values.shape != (rows,):
                raise TrainerError(
                    f"the objective gave values of the shape {list(values.shape)} for a micro-batch of {rows} rows.\n"
                    f"It must give one of each row, [{rows}]: their mean is taken over the whole step."
                )
            return -values.detach().double().sum()
        loss: Any = self.compute_loss(model, inputs, num_items_in_batch=num_items)
        return loss * scale if scale != 1.0 else loss

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """For evaluation Trainer's own, without what is there for an objective."""
        prepared = super()._prepare_inputs(inputs)
        is_whole = self.objective is None or self.has_options
        return prepared if is_whole else self._for_forward(prepared)

    def _for_forward(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What forward takes of a batch."""
        return {name: value for name, value in inputs.items() if name in self._forward_names}

    @cached_property
    def _forward_names(self) -> frozenset[str]:
        """Of its arguments; where it hands keywords on, of those that layers and losses know, too."""
        parameters = inspect.signature(model_of(self.model).forward).parameters
        hands_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        return frozenset({*parameters, *(TransformersKwargs.__annotations__ if hands_on else ())})

    def _answers(self, model: nn.Module, inputs: Any) -> list[Any]:
        """Texts, or ids, of a variant's answers, padding left out."""
        assert self.generation is not None
        unread = sorted(self._for_forward(inputs).keys() - READ)
        if unread:
            raise TrainerError(
                f"generation: answers are made of input_ids alone, and the batch has {', '.join(unread)} besides.\n"
                "Leave that out, or let the objective judge the model's output, without generation."
            )
        tokenizer: Any = self.processing_class
        pad = 0 if tokenizer is None else choose_pad_token(tokenizer).token_id
        step = self.method.num_steps
        ids = answers(
            model, inputs, self.generation, seed=self.args.seed, step=step, pad_token_id=pad
        )
        if tokenizer is None:
            return ids.tolist()
        return [tokenizer.decode(row, skip_special_tokens=True) for row in ids]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's own, with the last step's projected gradient (its largest) and how many steps were skipped."""
        if self.last_step is not None and "loss" in logs:
            logs.pop("grad_norm", None)
            logs["projected_gradient"] = max(map(abs, self.last_step.gradients), default=0.0)
            if self.num_skipped:
                logs["skipped_steps"] = self.num_skipped
        super().log(logs, start_time)

    # ---- saving, resuming ------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.checkpoints.extra_files[LOG_NAME] = self.log_writer.content()
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """An adapter as ever; of all weights, the log, the tokenizer and the arguments."""
        if not self.method.trains_blocks:
            super()._save(output_dir, state_dict)
            return
        # Trainer calls this in every process, and one alone has the steps.
        if not self.args.should_save:
            return
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / LOG_NAME
        # Where it is the run's own folder, this is the one log there is, and before a step it is an earlier run's.
        if self.method.num_steps or not log.is_file():
            replace_log(log, self.log_writer.content())
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)  # type: ignore[union-attr]
        self.checkpoints.replace_pickled_arguments(str(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The adapter from its files, all weights from the log."""
        path = Path(resume_from_checkpoint) / LOG_NAME
        if not path.is_file():
            raise LogError(f"{path} is not there: the checkpoint is of another method.")
        content = path.read_bytes()
        log = read_log(content, str(path))
        differences = self.log_writer.header.differences(log.header)
        if differences:
            raise LogError(f"{path} belongs to another run: {'; '.join(differences)}.")
        _check_steps(log, path)
        if not self.method.trains_blocks:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.method.resume(log.updates, log.num_steps)
        self.log_writer.go_on(content)


def _check_steps(log: Log, path: Path) -> None:
    """Raises LogError for a checkpoint's log that has not the steps of its other files."""
    num_steps = TrainerState.load_from_json(str(path.parent / STATE_NAME)).global_step
    if log.is_cut or log.num_steps != num_steps:
        how = ", amid a line" if log.is_cut else ""
        raise LogError(
            f"{path} ends after step {log.num_steps}{how}, and {STATE_NAME} beside it is of step {num_steps}.\n"
            "Resume from another checkpoint, or start anew: resume_from_checkpoint: false."
        )


class _Rate(torch.optim.Optimizer):
    """A learning rate and a weight decay where schedulers look for them."""

    def __init__(self, learning_rate: float, weight_decay: float) -> None:
        nothing = nn.Parameter(torch.zeros(()), requires_grad=False)
        super().__init__([nothing], {"lr": learning_rate, "weight_decay": weight_decay})

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Nothing: the step has been taken."""
