"""Ranges that keys of several groups have."""

from ssdtune.settings import Number, Whole

COUNT = Whole(1, 2**24)
STEPS = Number(is_open=True, is_steps=True)
