"""Quantities as users write and read them: rates, delays, amounts of memory.

Text in, numbers in bytes and seconds out, and back. Knows no setting.
"""

from __future__ import annotations

import math

from parablock_rt.errors import ConfigError


def parse_rate(text: str) -> float:
    """Bytes a second from "50mbit", "1gbit", "800kbit" or a plain number of bits a second; "0" or "none": unlimited.

    Raises ConfigError when the text is none of these.
    """
    units = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "bit": 1.0}
    lowered = text.strip().lower()
    if lowered in ("", "none", "unlimited"):
        return 0.0
    unit = next((unit for unit in units if lowered.endswith(unit)), "")
    bits = _number(lowered.removesuffix(unit)) * units.get(unit, 1.0)
    if not (bits >= 0 and math.isfinite(bits)):
        raise ConfigError(f"a rate looks like 50mbit, 1gbit or 800kbit; found {text!r}")
    return bits / 8


def parse_delay(text: str) -> float:
    """Seconds from "40ms", "0.5s" or a plain number of seconds. Raises ConfigError when the text is none of these."""
    lowered = text.strip().lower()
    seconds = _number(lowered[:-2]) / 1e3 if lowered.endswith("ms") else _number(lowered.removesuffix("s"))
    if not (0 <= seconds <= 5):
        raise ConfigError(f"a delay looks like 40ms or 0.5s and is at most 5s; found {text!r}")
    return seconds


def parse_bytes(text: str) -> int:
    """Bytes from "8gib", "512mib", "64kib" or a plain number. Raises ConfigError when the text is none of these."""
    units = {"kib": 2**10, "mib": 2**20, "gib": 2**30}
    lowered = text.strip().lower()
    unit = next((unit for unit in units if lowered.endswith(unit)), "")
    value = _number(lowered.removesuffix(unit)) * units.get(unit, 1)
    if not (value >= 0 and math.isfinite(value)):
        raise ConfigError(f"an amount of memory looks like 8gib, 512mib or 64kib; found {text!r}")
    return int(value)


def format_bytes(count: int) -> str:
    """An amount of memory or traffic to read, "21.67 GB": decimal, as network rates are."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
