"""What a machine can do: rates that were measured (`ssdtune probe`) or published, as one value.

Sizes of curves (`curve.py`) are FLOP, bytes or parameters; times are seconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from ssdtune.schedule.curve import Curve, ProfileError
from ssdtune.schedule.products import Grid, seconds_in
from ssdtune.schedule.refit import work_name

# Kinds of operators, each measured per number format, and of transfers. Autocast changes the format of PRODUCTS.
PRODUCTS = ("matmul", "matmul_transposed", "attention", "attention_backward")
OPERATORS = (*PRODUCTS, "pointwise", "special")
FRESH = "fresh"  # bytes of memory that the kernel has just given: what its pages take beyond being written
# Elements that move along one random direction (`kernels/noise.py`): of normal numbers, or of signs.
PERTURB, PERTURB_SIGNS = "perturb", "perturb_signs"
MAY_LACK = (FRESH, PERTURB, PERTURB_SIGNS)  # in older profiles, and FRESH on devices: take no time
TRANSFERS = ("nvme_read", "nvme_write", "unpack", "decode", "h2d", "d2h", "d2d")
MIXED = "nvme_mixed"  # bytes of the drive, half of them read while the others are written
LINK_MIXED = "link_mixed"  # bytes of the link to a device, half of them each way at once
# Bytes written beyond a drive's cache; only where it was asked for.
SUSTAINED = "nvme_write_sustained"
DECODE = "decode"  # bytes that narrow packed weights are decoded to on the CPU
DEVICE_DECODE = "device_decode"  # and by a device
# What stands in for it in a profile that is older: decoding writes as many bytes as a copy and reads fewer.
STAND_INS = {DECODE: "unpack", "d2h": "h2d", DEVICE_DECODE: "d2d"}
# Number formats whose rates are taken for one that was not measured, the nearest first: as many bits, the same units of
# a GPU. `ssdtune probe` leaves it out, to be done within a minute.
FORMAT_STAND_INS = {"float16": ("bfloat16", "float32")}
BUSY_CORES = 0.15  # of others, from which on a measurement is not to be trusted
REMEDY = "Measure this machine with `ssdtune probe`."


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InModel:
    """What operators take inside a model beyond their curves, which are of one operator again and again.

    overhead_s: of each call that a model's code makes: that code, the framework's own work, threads that wake up.
    autograd_overhead_s: the same of calls that autograd makes. factor: on the curves: caches that other operators have
    used. is_hidden: whether the calls' overhead passes while a device computes: the longer of the two counts, not
    their sum. no_grad_overhead_s, no_grad_factor: of a model's calls where nothing is recorded for autograd; None: as
    the others.
    """

    overhead_s: float = 0.0
    autograd_overhead_s: float = 0.0
    factor: float = 1.0
    is_hidden: bool = False
    no_grad_overhead_s: float | None = None
    no_grad_factor: float | None = None

    def seconds(
        self,
        num_calls: float,
        num_autograd_calls: float,
        curves_s: float,
        *,
        is_recorded: bool = True,
    ) -> float:
        """So many calls by a model's code and by autograd, whose curves say `curves_s` in all. is_recorded: for a
        backward pass."""
        each, factor = self.overhead_s, self.factor
        if not is_recorded and self.no_grad_overhead_s is not None:
            each = self.no_grad_overhead_s
        if not is_recorded and self.no_grad_factor is not None:
            factor = self.no_grad_factor
        calls = num_calls * each + num_autograd_calls * self.autograd_overhead_s
        work = factor * curves_s
        return max(calls, work) if self.is_hidden else calls + work

    def times(self, factor: float) -> InModel:
        """Where each call's overhead takes so many times as long."""
        each = self.no_grad_overhead_s
        return dataclasses.replace(
            self,
            overhead_s=factor * self.overhead_s,
            autograd_overhead_s=factor * self.autograd_overhead_s,
            no_grad_overhead_s=None if each is None else factor * each,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A machine's curves.

    Attributes:
        name: for people.
        operators: dtype -> kind -> curve. "matmul": FLOP of matrix products of blocks' shapes;
            "matmul_transposed": of those whose right matrix lies by columns; "attention" and "attention_backward": FLOP
            of fused attention; "pointwise": bytes read and written; "special": the same, of exp, tanh, rsqrt and their
            like; "perturb" and "perturb_signs": elements moved along a random direction.
        transfers: lane's work -> curve over bytes. Those of a device are missing where there is none.
        decoding: DECODE or DEVICE_DECODE -> kind of packed weights (`kernels/kinds.py`) -> how many times as long as that
            curve says; 1 where it is missing.
        in_model: dtype -> what is to be added inside a model; nothing where it was not measured.
        reading_takes: seconds that compute loses for each byte that is read meanwhile: cores and memory are shared.
        copy_overlap: seconds of compute alone and of a copy in RAM alone that the processor does in a second of both: 1,
            they take turns; 2, neither slows the other. None: a device computes, or an older probe did not say.
        price_per_hour: dollars that the machine costs; nothing measures it, its owner may write it into the file.
        products: dtype -> "matmul" or "matmul_transposed" -> what few rows by a large matrix take.
        optimizer: torch's way to step AdamW on the CPU ("foreach", "fused") -> parameters to seconds.
        busy_cores: that other processes used while this was measured: rates are too low by as much.
        device_bytes: free of the device that was measured; None: there was none, or an older probe did not say.
        refit: factors that runs have found since (`refit.py`): their work -> lane -> factor; no part of what was measured.
    """

    name: str
    operators: Mapping[str, Mapping[str, Curve]]
    transfers: Mapping[str, Curve]
    decoding: Mapping[str, Mapping[str, float]] = dataclasses.field(
        default_factory=dict[str, Mapping[str, float]]
    )
    in_model: Mapping[str, InModel] = dataclasses.field(default_factory=dict[str, InModel])
    reading_takes: float = 0.0
    copy_overlap: float | None = None
    price_per_hour: float | None = None
    products: Mapping[str, Mapping[str, Grid]] = dataclasses.field(
        default_factory=dict[str, Mapping[str, Grid]]
    )
    optimizer: Mapping[str, Curve] = dataclasses.field(default_factory=dict[str, Curve])
    busy_cores: float = 0.0
    device_bytes: int | None = None
    refit: Mapping[str, Mapping[str, float]] = dataclasses.field(
        default_factory=dict[str, Mapping[str, float]]
    )

    def refit_for(self, kind: str, dtype: str, autocast: str | None) -> Mapping[str, float]:
        """Lane -> factor for such steps; none where no run has found any."""
        return self.refit.get(work_name(kind, dtype, autocast), {})

    def format_for(self, dtype: str) -> str:
        """The number format whose rates are taken for this one: its own, or a near one's where it was not measured."""
        near = (dtype, *FORMAT_STAND_INS.get(dtype, ()))
        return next((name for name in near if name in self.operators), dtype)

    def assumed_of(self, *dtypes: str | None) -> tuple[str, ...]:
        """What times of these number formats assume, in words; nothing where they were measured, or of None."""
        taken = {dtype: self.format_for(dtype) for dtype in dtypes if dtype is not None}
        return tuple(
            f"{dtype} as fast as {name}, which was measured"
            for dtype, name in taken.items()
            if name != dtype
        )

    def curves(self, dtype: str) -> Mapping[str, Curve]:
        """All kinds of operators in this number format, or in what stands in for it; empty: nothing does."""
        return self.operators.get(self.format_for(dtype), {})

    def inside(self, dtype: str) -> InModel:
        """What is to be added inside a model."""
        return self.in_model.get(self.format_for(dtype), InModel())

    def under_autocast(self, dtype: str, products: str) -> Profile:
        """As a model of `dtype` finds it whose products and attention autocast to the format `products`: these at its
        rates, all else at its own. Raises ProfileError where they were not measured."""
        cast = {kind: self.operator(products, kind) for kind in PRODUCTS}
        grids = self.products.get(self.format_for(products), {})
        return dataclasses.replace(
            self,
            operators={**self.operators, dtype: {**self.curves(dtype), **cast}},
            products={**self.products, dtype: grids},
            in_model={**self.in_model, dtype: self.inside(dtype)},
        )

    def operator(self, dtype: str, kind: str) -> Curve:
        """Raises ProfileError where neither it was measured nor what stands in for its number format."""
        try:
            return self.curves(dtype)[kind]
        except KeyError:
            raise ProfileError(
                f"profile {self.name}: operators.{dtype}.{kind} is missing.\n{REMEDY}"
            ) from None

    def few_rows_s(self, dtype: str, kind: str, flop: float, num_rows: int) -> float | None:
        """Seconds of a product of few rows with a large matrix; None where only its FLOP count. kind: of product."""
        grid = self.products.get(self.format_for(dtype), {}).get(kind)
        if grid is None:
            return None
        return seconds_in(grid, self.operator(dtype, kind), flop, num_rows)

    def transfer(self, name: str) -> Curve:
        """Raises ProfileError where it was not measured."""
        if name not in self.transfers:
            name = STAND_INS.get(name, name)
        if name not in self.transfers:
            raise ProfileError(f"profile {self.name}: transfers.{name} is missing.\n{REMEDY}")
        return self.transfers[name]

    def decoding_s(
        self, name: str, num_bytes: float, decoding: Iterable[tuple[str, float]]
    ) -> float:
        """Seconds of decoding packed weights to so many bytes, by a curve, DECODE or DEVICE_DECODE. decoding: of these,
        (kind, bytes) of weights that are not narrow. Raises ProfileError for a curve that is missing."""
        factors = self.decoding.get(name, {})
        more = sum((factors.get(kind, 1.0) - 1) * part for kind, part in decoding)
        return self.transfer(name).seconds(num_bytes + more)

    @property
    def knows_writes(self) -> bool:
        """Whether writing to the drive was measured."""
        return "nvme_write" in self.transfers

    @property
    def drive_overlap(self) -> float | None:
        """Seconds of reads alone and of writes alone that the drive does in a second of both: 1, they take turns; 2,
        neither slows the other. None where that was not measured."""
        return self._overlap(MIXED, "nvme_read", "nvme_write")

    @property
    def link_overlap(self) -> float | None:
        """The same of copies to a device and copies from it."""
        return self._overlap(LINK_MIXED, "h2d", "d2h")

    def _overlap(self, mixed: str, *names: str) -> float | None:
        """From the largest mixed point, n bytes one way and n the other in t seconds. Alone they take a <= b seconds;
        beside each other both run at c/2 until a is done, the rest of b alone: t = 2 a / c + b - a."""
        if not {mixed, *names} <= self.transfers.keys():
            return None
        num_bytes, t = self.transfers[mixed].points[-1]
        a, b = sorted(self.transfer(name).seconds(num_bytes / 2) for name in names)
        return min(2.0, max(1.0, 2 * a / (t - b + a))) if t > b - a else 2.0

    @property
    def writes(self) -> str:
        """The transfer that is written with in every step: a drive's cache is full by then, where that was measured."""
        return SUSTAINED if SUSTAINED in self.transfers else "nvme_write"

    @property
    def lacks(self) -> list[str]:
        """What a probe of today would have measured besides, in words: an older one did not."""
        kinds = {kind for curves in self.operators.values() for kind in curves}
        on_device = "h2d" in self.transfers
        entries = {
            "products of few tokens with large matrices": bool(self.products),
            "perturbing weights": PERTURB in kinds,
            "decoding by kinds of packed weights": bool(self.decoding),
            "writing to the drive": self.knows_writes,
            "reading and writing at once": MIXED in self.transfers,
            "the optimizer on the CPU": bool(self.optimizer),
            "copying in RAM beside compute": on_device or self.copy_overlap is not None,
            "copies to and from the device at once": not on_device or LINK_MIXED in self.transfers,
        }
        return [words for words, is_there in entries.items() if not is_there]

    @property
    def has_p90(self) -> bool:
        """Whether it knows more than medians."""
        return any(curve.slow for curve in self.transfers.values())

    @property
    def at_p90(self) -> Profile:
        """The same machine when all that it does takes as long as one time in ten."""

        def slow(curves: Mapping[Any, Curve]) -> dict[Any, Curve]:
            return {key: curve.at_p90 for key, curve in curves.items()}

        return dataclasses.replace(
            self,
            operators={dtype: slow(curves) for dtype, curves in self.operators.items()},
            transfers=slow(self.transfers),
            products={
                dtype: {kind: slow(grid) for kind, grid in grids.items()}
                for dtype, grids in self.products.items()
            },
            optimizer=slow(self.optimizer),
        )

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for YAML, times to four digits; `saved_profile.profile_from` reads them."""
        told = {
            "copy_overlap": self.copy_overlap,
            "price_per_hour": self.price_per_hour,
            "device_bytes": self.device_bytes,
        }
        return {
            "name": self.name,
            "operators": {
                dtype: {kind: curve.listed() for kind, curve in curves.items()}
                for dtype, curves in self.operators.items()
            },
            "products": {
                dtype: {
                    kind: {rows: curve.listed() for rows, curve in grid.items()}
                    for kind, grid in grids.items()
                }
                for dtype, grids in self.products.items()
            },
            "transfers": {name: curve.listed() for name, curve in self.transfers.items()},
            "decoding": {name: dict(factors) for name, factors in self.decoding.items()},
            "optimizer": {name: curve.listed() for name, curve in self.optimizer.items()},
            "in_model": {dtype: dataclasses.asdict(each) for dtype, each in self.in_model.items()},
            "reading_takes": self.reading_takes,
            **{name: value for name, value in told.items() if value is not None},
            "busy_cores": self.busy_cores,
        }
