"""A profile as a person reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ssdtune.schedule.curve import Curve
from ssdtune.schedule.products import Grid
from ssdtune.schedule.profile import PERTURB, InModel, Profile


def profile_lines(profile: Profile) -> Iterator[str]:
    """Yields the rates at the largest sizes, and of transfers what they take before the first byte and how much longer
    one in ten of them takes."""
    yield f"machine   {profile.name}"
    for dtype, curves in profile.operators.items():
        yield f"{dtype:9} {_operators_line(curves, profile.in_model.get(dtype, InModel()))}"
        grids = profile.products.get(dtype)
        if grids:
            yield f"{'':9} {_few_rows_line(grids)}"
    told = [_transfer(name, curve) for name, curve in profile.transfers.items()]
    for i in range(0, len(told), 4):
        yield f"{'bytes' if not i else '':9} {' · '.join(told[i : i + 4])}"
    for name, factors in profile.decoding.items():
        kinds = (f"{kind} {factor:.3g}" for kind, factor in factors.items())
        yield f"{'':9} {name}, times as long: {' · '.join(kinds)}"
    yield f"{'':9} {_beside_line(profile)}"
    if profile.optimizer:
        rates = (f"{way} {curve.rate / 1e6:.3g}" for way, curve in profile.optimizer.items())
        yield f"AdamW     {' · '.join(rates)} million parameters/s on the CPU"


def _operators_line(curves: Mapping[str, Curve], inside: InModel) -> str:
    parts = [
        f"matmul {curves['matmul'].rate / 1e9:,.3g} / {curves['matmul_transposed'].rate / 1e9:,.3g} GFLOP/s",
        f"attention {curves['attention'].rate / 1e9:,.3g} GFLOP/s",
        f"values {curves['pointwise'].rate / 1e9:.3g} GB/s",
    ]
    if PERTURB in curves:
        parts.append(f"perturbing {curves[PERTURB].rate / 1e6:,.3g} million/s")
    line = (
        f"in a model {inside.factor:.2f} x + {inside.overhead_s * 1e6:.0f} us a call, "
        f"{inside.autograd_overhead_s * 1e6:.0f} by autograd"
    )
    if inside.no_grad_overhead_s is not None and inside.no_grad_factor is not None:
        line += (
            f", without it {inside.no_grad_factor:.2f} x + {inside.no_grad_overhead_s * 1e6:.0f} us"
        )
    parts.append(line)
    return " · ".join(parts)


def _beside_line(profile: Profile) -> str:
    told = f"compute loses {profile.reading_takes * 1e12:.0f} ms for each GB read"
    if profile.copy_overlap is not None:
        told += f" · beside copies in RAM both go at {profile.copy_overlap / 2:.0%} of their pace"
    return told


def _few_rows_line(grids: Mapping[str, Grid]) -> str:
    """Rates of the largest matrices; a kind of product may have been measured at fewer rows than another."""

    def told(rows: int) -> str:
        rates = [f"{g[rows].rate / 1e9:.3g}" if rows in g else "-" for g in grids.values()]
        return f"{rows}: {' / '.join(rates)}"

    measured = sorted({rows for grid in grids.values() for rows in grid})
    return f"few tokens by a large matrix, GFLOP/s: {', '.join(map(told, measured))}"


def _transfer(name: str, curve: Curve) -> str:
    """As a latency and a rate."""
    latency_s, rate = curve.line
    told = f"{name} {rate / 1e9:.3g} GB/s"
    if latency_s * 1e6 >= 1:
        told += f" + {latency_s * 1e6:.0f} us"
    slower = curve.at_p90.points[-1][1] / curve.points[-1][1] - 1
    return f"{told} (p90 +{slower:.0%})" if curve.slow else told
