"""The streamer: ties a model's modules to the engine. One for each streamed model, at `model.ssdtune`."""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ssdtune.errors import SSDTuneError
from ssdtune.schedule.plan import Direction, Plan, Tier
from ssdtune.swap.engine import Engine
from ssdtune.swap.kept import InputStore, Kept
from ssdtune.swap.recipe import BlockRecipe
from ssdtune.swap.source import Checkpoint
from ssdtune.swap.storage import Storage
from ssdtune.visit.accumulation import AccumulationWatch
from ssdtune.visit.activations import Activations
from ssdtune.visit.build import Origin
from ssdtune.visit.function import visit
from ssdtune.visit.installed import Installed, Weight
from ssdtune.visit.meet import Hub
from ssdtune.visit.replanner import Replanner


class Meeting:
    """The forward of a module where micro-batches meet. Deep-copies to the plain forward of the copied module:
    `modules_to_save` copies modules in order to train them, outside of any streaming."""

    def __init__(self, streamer: Streamer, point: int, block: int, module: nn.Module) -> None:
        self.streamer, self.point, self.block, self.module = streamer, point, block, module
        self.inner: Callable[..., Any] = module.forward
        self.__wrapped__ = self.inner  # for inspect.signature
        self._trainable: tuple[int, list[nn.Parameter]] = (-1, [])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Waits for the other micro-batches where there are any, then passes the block."""
        self.streamer.arrive(self.point, self.block)
        return self.streamed(*args, **kwargs)

    def streamed(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, recomputed in backward; its weights are present."""
        if not torch.is_grad_enabled():
            return self.inner(*args, **kwargs)
        return visit(self.streamer, self.block, self.inner, self.trainable(), args, kwargs)

    def trainable(self) -> list[nn.Parameter]:
        """The module's parameters that train, looked up once a step."""
        step = self.streamer.step
        if self._trainable[0] != step:
            self._trainable = (step, [p for p in self.module.parameters() if p.requires_grad])
            if any(p.is_meta for p in self._trainable[1]):
                raise SSDTuneError(
                    f"an adapter on {self.streamer.blocks[self.block]} has no memory: it is on the meta device.\n"
                    f"Leave out low_cpu_mem_usage=True in get_peft_model, or load the adapter's weights first."
                )
        return self._trainable[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The plain forward, bound to the copy of the module."""
        copied = memo.get(id(self.module))
        return types.MethodType(
            type(self.module).forward, copied if copied is not None else copy.copy(self.module)
        )


class Weights(Protocol):
    """What a method makes of weights on their way from a slot to compute, and of those outside of blocks.

    trains_blocks: whether streamed weights become others than their files hold.
    """

    trains_blocks: bool

    def refresh(self, block: int, slot: int) -> None:
        """Brings the block's tensors in a slot up to date, in place."""
        ...

    def stand_in(
        self, block: int, tensors: Sequence[torch.Tensor], variant: int | None
    ) -> Sequence[torch.Tensor]:
        """The tensors that compute reads instead of those in the slot, for a variant of the weights; None: for the
        weights as they are. After `refresh` of the same slot."""
        ...

    def read(self, block: int, index: int) -> torch.Tensor:
        """What a weight is now, in memory of its own."""
        ...

    def outside(self, variant: int | None) -> None:
        """Puts what lies outside of blocks, and adapters, in the state of a variant; None: as they are."""
        ...


class OpenEngine(Protocol):
    """Opens engines, one after the other. recipes, storage: how blocks are read, and by what."""

    recipes: Sequence[BlockRecipe]
    storage: Storage

    def __call__(self, plan: Plan, before: Engine | None) -> Engine:
        """An engine for the plan, after another for the same blocks, which is closed."""
        ...


class Streamer:
    """Brings blocks' weights into their modules for their visits and takes them out again.

    `blocks`: names of the engine's blocks. `installed.blocks`: the weights of each, in the engine's order.
    """

    def __init__(self, blocks: Sequence[str]) -> None:
        self.engine: Engine
        self.open_engine: OpenEngine
        self.checkpoint: Checkpoint  # the user's files
        self.origin: Origin  # where the weights are that they were packed from
        self.replanner: Replanner
        self.make_input_store: Callable[..., InputStore | None]  # tier, folder=…
        self.make_activation_store: Callable[..., InputStore]  # folder=…
        self.blocks = list(blocks)
        self.step = 0
        # Rows that the front door lets through at once; None: all.
        self.micro_batch_size: int | None = None
        # Whether this run's losses are shares of the batch's: they add up.
        self.loss_counts_items = False
        self.meetings: list[Meeting] = []
        # Visits of the step under way, as they came.
        self.observed: list[tuple[int, Direction]] = []
        # Told when a step is over; before one begins; before each micro-batch's pass through a block.
        self.on_step: Callable[[str, list[tuple[int, Direction]]], None] | None = None
        self.on_begin: Callable[[], None] | None = None
        self.before_pass: Callable[[], None] | None = None
        # Where block inputs wait for backward; None: on the device, with autograd.
        self.input_store: InputStore | None = None
        self.activations = Activations()
        self.gradless: dict[Any, tuple[int, ...]] = {}  # see visit/function.py
        self.accumulation = AccumulationWatch()
        self.method: Weights | None = None  # what it makes of weights; None: they stay as stored
        self.installed = Installed()
        self._variants: dict[int, tuple[Any, ...]] = {}  # of the step under way, by block
        self._variant: int | None = None  # of the weights that the running micro-batch wants
        self._hub: Hub | None = None
        self._kind = "forward"
        self._awaits_end = False
        self._interned: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = {}

    def names(self, block: int) -> list[str]:
        """The block's weights, in its recipe's order."""
        return [weight.name for weight in self.installed.blocks[block]]

    @property
    def weights(self) -> list[Weight]:
        """All streamed weights."""
        return [weight for weights in self.installed.blocks for weight in weights]

    # ---- runs ----------------------------------------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        """Whether a run of micro-batches is under way."""
        return self._hub is not None

    @property
    def has_variants(self) -> bool:
        """Whether the running micro-batch is of a variant of the weights: part of a method's step."""
        return self._variant is not None

    def run(
        self, calls: Sequence[Callable[[], Any]], variants: Sequence[int] | None = None
    ) -> list[Any]:
        """Runs all calls, each a forward of one micro-batch, block by block; their results in order.

        Inside a run it just calls them: the outermost front door is where a batch is cut.

        variants: of the weights, as the method numbers them, that each call wants; calls of one variant beside each
        other, so that it is made once a visit.
        """
        if self._hub is not None:
            assert variants is None
            return [call() for call in calls]
        self._begin("train" if torch.is_grad_enabled() else "forward")
        self._hub = Hub(
            lambda point: self.present(self.meetings[point].block, Direction.FORWARD),
            self._point_name,
            None if variants is None else lambda m: self._use(variants[m]),
        )
        try:
            return self._hub.run(calls)
        finally:
            self._hub = None
            self.installed.take_out()
            self._use(None)
            if self._kind == "forward":
                self.engine.leave()
                self._interned.clear()

    def _use(self, variant: int | None) -> None:
        """The weights of this variant, from now on."""
        if variant != self._variant:
            self._variant = variant
            assert self.method is not None
            self.method.outside(variant)

    def _point_name(self, point: int) -> str:
        return self.blocks[self.meetings[point].block]

    def _begin(self, kind: str) -> None:
        self.installed.take_out()  # logits that were read after the last run brought their head in once more
        if self._kind == "forward":
            self._tell_order()
        self.step += 1
        self._kind = kind
        if self.on_begin is not None:
            self.on_begin()
        self.observed = []
        self._awaits_end = False
        self._interned.clear()
        self._variants.clear()
        if self.input_store is not None:
            self.input_store.begin_step(self.step)
        self.activations.begin_step(self.step)
        if kind == "train":
            self.accumulation.begin(p for meeting in self.meetings for p in meeting.trainable())
        self.activations.follow(self.engine.plan)
        self.engine.begin_step(kind)

    def _end(self) -> None:
        """Backward has come back: the step's last visit is over."""
        self.installed.take_out()
        self.engine.leave()
        self._awaits_end = False
        self._interned.clear()
        self._tell_order()

    def _tell_order(self) -> None:
        """Tells in what order the step visited its blocks. One of forward alone is known when the next step begins:
        its logits may be computed after the run, when somebody reads them."""
        if self.on_step is not None and self.observed:
            self.on_step(self._kind, self.observed)

    # ---- visits --------------------------------------------------------------------------------------------------

    def arrive(self, point: int, block: int) -> None:
        """A forward came to a meeting point: returns with the block's weights present."""
        if self._hub is not None and self._hub.is_mine():
            self._hub.wait(point)
        # After a wait too: it costs nothing where the hub made the block present, and a micro-batch
        # on a stream of its own must wait for the copy on that stream.
        self.present(block, Direction.FORWARD)
        if self.before_pass is not None:
            self.before_pass()

    def present(self, block: int, direction: Direction) -> None:
        """Makes the block's weights present in its modules, in the place of their placeholders."""
        if not self.observed or self.observed[-1] != (block, direction):
            self.observed.append((block, direction))
        if direction is Direction.BACKWARD and not self._awaits_end:
            self._awaits_end = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end)  # type: ignore[attr-defined]
        if direction is Direction.BACKWARD and self.before_pass is not None:
            self.before_pass()
        slot = self.engine.enter(block, direction)
        place = (block, slot, self._variant)
        if self.installed.place == place:
            return
        self.installed.take_out()
        tensors: Sequence[torch.Tensor]
        tensors = in_slot = self.engine.slots.tensors(block, slot)
        if self.method is not None:
            self.method.refresh(block, slot)
            tensors = self.method.stand_in(block, tensors, self._variant)
        self.installed.put_in(place, tensors, are_in_slot=tensors is in_slot)

    def slot_memory(self) -> torch.Tensor:
        """The slot whose block is present, uint8."""
        assert self.installed.place is not None
        return self.engine.slots.memory[self.installed.place[1]]

    def variant(self, block: int) -> tuple[Any, ...]:
        """Which adapters of the block are in use in this step: peft's switches, of every module that has them."""
        if block not in self._variants:
            modules = (
                m
                for meeting in self.meetings
                if meeting.block == block
                for m in meeting.module.modules()
            )
            self._variants[block] = tuple(
                (m._disable_adapters, str(getattr(m, "_active_adapter", None)))
                for m in modules
                if hasattr(m, "_disable_adapters")
            )
        return self._variants[block]

    # ---- block inputs (see visit/function.py) --------------------------------------------------------------------

    def keep_inputs_in(self, tier: Tier, folder: Path | None) -> None:
        """From now on block inputs wait there for backward; between steps. folder: for the scratch file on NVMe.

        Raises ScratchError, InputsError, all as it was.
        """
        assert self._hub is None, "a forward is under way"
        store = self.make_input_store(tier, folder=folder)
        if self.input_store is not None:
            self.input_store.close()
        self.input_store = store

    def keep_activations_in(self, folder: Path | None) -> None:
        """From now on activations that the plan has on NVMe wait in a scratch file there; between steps.

        Raises ScratchError, InputsError, all as it was.
        """
        assert self._hub is None, "a forward is under way"
        self.activations.wait_in(self.make_activation_store(folder=folder))

    @property
    def inputs_leave(self) -> bool:
        """Whether block inputs are kept off the device until backward."""
        return self.input_store is not None

    def keep(self, tensor: torch.Tensor) -> Kept | None:
        """Gives an input of the block under way to the input store; None where it stays with autograd."""
        if self.input_store is None:
            return None
        return self.input_store.keep(tensor, self.blocks[self.observed[-1][0]])

    def intern(self, tensor: torch.Tensor) -> torch.Tensor:
        """An equal tensor kept by another micro-batch of this step, or this one: equal masks are stored once."""
        known = getattr(tensor, "_ssdtune_interned", None)
        if known is not None and known[0] == self.step:
            return tensor if known[1] is None else known[1]
        equals = self._interned.setdefault((tensor.shape, tensor.dtype), [])
        found = next((t for t in equals if torch.equal(t, tensor)), None)
        # None stands for the tensor itself: by its own name it would hold itself until garbage is collected.
        tensor._ssdtune_interned = (self.step, found)  # type: ignore[attr-defined]
        if found is not None:
            return found
        equals.append(tensor)
        return tensor

    def reopen(self, plan: Plan) -> None:
        """Another plan with other slots, between steps: the engine is closed, its memory freed, and a new one goes on
        from its step. What was resident is read again.

        Raises SwapError, all as it was, where a block was not stored: the new engine would read what the drive has."""
        assert self._hub is None, "a forward is under way"
        assert not self._awaits_end, "a backward is under way"
        self.installed.take_out()
        before = self.engine
        before.await_stores()
        before.close()
        before.free()
        self.installed.forget()
        self.engine = self.open_engine(plan, before)

    def read_from(self, recipes: Sequence[BlockRecipe], storage: Storage) -> None:
        """From now on blocks are read by other recipes, with the same tensors in the same places; between steps.

        Raises PlanError where the budgets are too small for them, SwapError as `reopen` does; all as it was.
        """
        opener, replanner = self.open_engine, self.replanner
        before = opener.recipes, opener.storage
        shapes = tuple(recipe.shape for recipe in recipes)
        request = dataclasses.replace(replanner.request, blocks=shapes)
        opener.recipes, opener.storage = recipes, storage
        try:
            replanner.adopt(self, request, replanner.layout)
        except BaseException:
            opener.recipes, opener.storage = before
            raise

    def close(self) -> None:
        """Stops the engine. The model can't run afterwards."""
        self.engine.close()
        if self.input_store is not None:
            self.input_store.close()
        self.activations.close()
