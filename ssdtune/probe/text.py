"""A profile as a person reads it."""

from __future__ import annotations

from collections.abc import Sequence

from ssdtune.schedule.profile import InModel, Profile


def profile_lines(profile: Profile) -> Sequence[str]:
    """The rates at the largest sizes."""
    lines = [f"machine   {profile.name}"]
    for dtype, curves in profile.operators.items():
        rates = (
            f"matmul {curves['matmul'].rate / 1e9:,.3g} / {curves['matmul_transposed'].rate / 1e9:,.3g} GFLOP/s · attention "
            f"{curves['attention'].rate / 1e9:,.3g} GFLOP/s · values {curves['pointwise'].rate / 1e9:.3g} GB/s"
        )
        inside = profile.in_model.get(dtype, InModel())
        rates += f" · in a model {inside.factor:.2f} x + {inside.overhead_s * 1e6:.0f} us a call, {inside.autograd_overhead_s * 1e6:.0f} by autograd"
        lines.append(f"{dtype:9} {rates}")
    told = [f"{name} {curve.rate / 1e9:.3g} GB/s" for name, curve in profile.transfers.items()]
    lines.append(
        f"bytes     {' · '.join(told)} · compute loses {profile.reading_takes * 1e12:.0f} ms for each GB read"
    )
    return lines
