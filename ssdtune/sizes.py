"""Sizes of memory as people write them: "300MB", "1.5GiB", plain bytes, or "auto".

GB is 10**9 bytes and GiB is 2**30, as drives and as kernels count. A number without a unit is
refused below 10**6: `ram: 54` is far likelier 54 GB forgotten than 54 bytes meant.
"""

import re

from ssdtune.errors import SSDTuneError

_DECIMAL = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BINARY = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
UNITS = {"B": 1, **_DECIMAL, **_BINARY}
_UNIT_OF = {unit.lower(): unit for unit in UNITS}
_AMBIGUOUS = ("k", "m", "g", "t")
_SIZE = re.compile(r"(\d{1,20}(?:\.\d{0,20})?|\.\d{1,20})\s*([A-Za-z]*)")
_SMALLEST_WITHOUT_UNIT = 10**6
_LARGEST = 2**60  # 1 EiB: above it somebody's keyboard is stuck

ALLOWED = 'a size such as "300MB", "1.5GiB" or "21GB" (GB is 10**9, GiB is 2**30), or auto'


class SizeError(SSDTuneError):
    """A size that cannot be read; the message quotes it and says what would be right."""


def parse_size(value: str | int | float | None) -> int | None:
    """Bytes, or None for "auto" (and for None, so that reading twice changes nothing).

    value: text with a unit, or a whole number of bytes from 10**6 up, as number or as text.
    A fraction of a byte is dropped ("0.3KB" is 300, "0.0015KB" is 1). Raises SizeError.
    """
    if value is None or (isinstance(value, str) and value.strip().lower() == "auto"):
        return None
    text = _text_of(value)
    match = _SIZE.fullmatch(text)
    if match is None:
        raise SizeError(f"{_quoted(text)} is not a size; write it like 300MB, 1.5GiB or auto")
    number, unit = match.groups()
    whole, _, fraction = number.partition(".")  # in integers: a float would round 0.3GiB
    num_bytes = int(whole + fraction or "0") * _bytes_per(unit, number) // 10 ** len(fraction)
    if num_bytes > _LARGEST:
        raise SizeError(f"{_quoted(text)} is more than 1 EiB; write it like 300MB or 1.5GiB")
    if num_bytes < 1:
        raise SizeError(f"{_quoted(text)} is less than one byte; write it like 300MB or 1.5GiB")
    return num_bytes


def format_size(num_bytes: int) -> str:
    """For people, three digits, decimal units: 20234567890 -> "20.2 GB". parse_size reads it."""
    if num_bytes < 0:
        return "-" + format_size(-num_bytes)
    for unit, factor in reversed(_DECIMAL.items()):
        # The limit lies a half digit below the unit, so that 999.96 MB is not shown as 1000 MB.
        if num_bytes >= factor * 0.9995:
            amount = num_bytes / factor
            digits = 2 if amount < 9.995 else 1 if amount < 99.95 else 0
            return f"{amount:.{digits}f} {unit}"
    return f"{num_bytes} B"


def format_size_exactly(num_bytes: int | None) -> str:
    """For files: parse_size gives the same number back. 21 * 10**9 -> "21GB"; None -> "auto"."""
    if num_bytes is None:
        return "auto"
    spellings = [f"{num_bytes}B"]
    for unit in (*_DECIMAL, *_BINARY):
        thousandths, remainder = divmod(num_bytes * 1000, UNITS[unit])
        if remainder == 0 and thousandths > 0:
            whole, rest = divmod(thousandths, 1000)
            fraction = f".{rest:03}".rstrip("0") if rest else ""
            spellings.append(f"{whole}{fraction}{unit}")
    return min(spellings, key=len)


def _text_of(value: str | int | float) -> str:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value) if abs(value) <= 2**63 else "a number beyond 2**63"
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**63:
        return str(int(value))
    raise SizeError(f"{value!r:.60} is not a size; write it like 300MB, 1.5GiB or auto")


def _bytes_per(unit: str, number: str) -> int:
    if not unit:
        amount = float(number)
        if amount == 0 or (amount >= _SMALLEST_WITHOUT_UNIT and "." not in number):
            return 1
        likely = "GB" if amount <= 1024 else "MB"
        raise SizeError(f"{number} has no unit; did you mean {number}{likely}?")
    if unit.lower() in _AMBIGUOUS:
        letter = unit.upper()
        raise SizeError(
            f"{number}{unit} is ambiguous; write {number}{letter}B or {number}{letter}iB"
        )
    known = _UNIT_OF.get(unit.lower())
    if known is None:
        raise SizeError(f"{unit[:20]!r} is not a unit; one of {', '.join(UNITS)}")
    return UNITS[known]


def _quoted(text: str) -> str:
    return ascii(text if len(text) <= 40 else text[:40] + "…")
