"""What a step is made from: the shape of a model of equal blocks, and what is decided for a method.

`full_step.py` and `forward_step.py` make the ops of it. The engine runs no full steps, and forwards alone by plans of
its own (`method: zo`).
"""

from __future__ import annotations

import dataclasses

from ssdtune.schedule.choices import spread
from ssdtune.schedule.plan import PlanError, Tier


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model of equal blocks, and its batch.

    Attributes:
        num_blocks: decoder layers.
        block_parameters: of one.
        num_tokens: in a step.
        num_micro_batches: that the tokens are cut into.
        flop_per_token: of one block's forward; backward is twice that.
        input_bytes_per_token: a block's input, kept for backward.
        inner_bytes_per_token: what backward needs besides, where the block is not recomputed.
        embedding_parameters: stay on the device; only memory counts them.
    """

    num_blocks: int
    block_parameters: int
    num_tokens: int
    num_micro_batches: int = 1
    flop_per_token: float
    input_bytes_per_token: float = 0.0
    inner_bytes_per_token: float = 0.0
    embedding_parameters: int = 0

    def __post_init__(self) -> None:
        """Raises PlanError for what can't be."""
        _check_counts(
            num_blocks=self.num_blocks,
            num_tokens=self.num_tokens,
            num_micro_batches=self.num_micro_batches,
        )

    @property
    def num_parameters(self) -> int:
        """Of all blocks."""
        return self.num_blocks * self.block_parameters

    @property
    def micro_batch_tokens(self) -> float:
        """Tokens of one micro-batch."""
        return self.num_tokens / self.num_micro_batches


def gpt_shape(
    num_blocks: int,
    hidden: int,
    num_tokens: int,
    *,
    num_micro_batches: int = 1,
    vocabulary: int = 0,
) -> Shape:
    """A GPT's: 12 h² parameters a block, 2 FLOP each and token (attention's own products, s / 6h more, are left out).

    Kept in 16 bits: the input (h) or, besides, the outputs of the four linear layers (3h, h, 4h, h), from which the
    rest is recomputed without a product of matrices.
    """
    parameters = 12 * hidden**2
    return Shape(
        num_blocks=num_blocks,
        block_parameters=parameters,
        num_tokens=num_tokens,
        num_micro_batches=num_micro_batches,
        flop_per_token=2.0 * parameters,
        input_bytes_per_token=2.0 * hidden,
        inner_bytes_per_token=2.0 * 9 * hidden,
        embedding_parameters=vocabulary * hidden,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Full:
    """What is decided for a step of full fine-tuning.

    Attributes:
        weights: their tier between visits, NVMe or RAM.
        states: the optimizer's tier, NVMe or RAM.
        activations: tier of what is kept for backward; DEVICE: it stays.
        recompute_share: of the blocks keep only their input and run forward again, spread evenly.
        delayed_share: of the blocks are updated in the next forward, spread evenly.
        fresh_blocks: the first so many keep their new weights in RAM for the forward that follows.
        num_slots: for weights on the device.
        num_buffers: for weights between NVMe and the device, in RAM.
        num_chunks: that a block's optimizer states are cut into.
        chunk_buffers: that these pass through, in RAM.
        gradient_buffers: blocks' gradients in RAM that wait for their update; delayed blocks have their own besides.
        weight_bits: of the weights that compute uses.
        state_bytes: per parameter: 12 are Adam's two moments and the weights, in 32 bits; 6 with 16 and 8 bits.
    """

    weights: Tier = Tier.NVME
    states: Tier = Tier.NVME
    activations: Tier = Tier.RAM
    recompute_share: float = 1.0
    delayed_share: float = 0.0
    fresh_blocks: int = 0
    num_slots: int = 2
    num_buffers: int = 2
    num_chunks: int = 4
    chunk_buffers: int = 4
    gradient_buffers: int = 4
    weight_bits: float = 16.0
    state_bytes: float = 12.0

    def __post_init__(self) -> None:
        """Raises PlanError for what can't be."""
        _check_counts(
            num_slots=self.num_slots,
            num_buffers=self.num_buffers,
            num_chunks=self.num_chunks,
            chunk_buffers=self.chunk_buffers,
            gradient_buffers=self.gradient_buffers,
        )
        _check_home(weights=self.weights, states=self.states)
        for name, share in (
            ("recompute_share", self.recompute_share),
            ("delayed_share", self.delayed_share),
        ):
            if not 0 <= share <= 1:
                raise PlanError(f"{name} is {share}; a share lies between 0 and 1")

    @property
    def weight_bytes(self) -> float:
        """Per parameter."""
        return self.weight_bits / 8

    @property
    def written_bytes(self) -> float:
        """Per parameter and step, by the optimizer to NVMe."""
        states = self.state_bytes if self.states is Tier.NVME else 0.0
        return states + (self.weight_bytes if self.weights is Tier.NVME else 0.0)

    def recomputed(self, num_blocks: int) -> frozenset[int]:
        """The blocks that recompute."""
        return share_of(self.recompute_share, num_blocks)

    def delayed(self, num_blocks: int) -> frozenset[int]:
        """The blocks whose update waits for the next forward."""
        return share_of(self.delayed_share, num_blocks)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ForwardOnly:
    """What is decided for a zeroth-order step.

    Attributes:
        weights: their tier between visits, NVMe or RAM.
        num_forwards: each time a block is there.
        writes_back: whether weights change in place and go back down; a low-rank window's do not.
        num_slots: for weights on the device: one comes, one computes, one goes.
        num_buffers: for weights between NVMe and the device, in RAM.
        weight_bits: as stored and moved.
    """

    weights: Tier = Tier.NVME
    num_forwards: int = 2
    writes_back: bool = False
    num_slots: int = 3
    num_buffers: int = 2
    weight_bits: float = 16.0

    def __post_init__(self) -> None:
        """Raises PlanError for what can't be."""
        _check_counts(
            num_forwards=self.num_forwards, num_slots=self.num_slots, num_buffers=self.num_buffers
        )
        _check_home(weights=self.weights)

    @property
    def weight_bytes(self) -> float:
        """Per parameter."""
        return self.weight_bits / 8


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise PlanError(f"{name} is {count}; a step needs at least one")


def _check_home(**tiers: Tier) -> None:
    for name, tier in tiers.items():
        if tier is Tier.DEVICE:
            raise PlanError(f"{name} can't stay on the device here: choose ram or nvme")


def share_of(share: float, num: int) -> frozenset[int]:
    """So many of the numbers below `num`, as even as whole numbers can be."""
    return frozenset(spread(range(num), round(share * num)))
