"""Quantities as users write and read them: rates, delays, amounts of memory. And text of a peer, as users may see it.

Converts text to numbers in bytes and seconds, and back. Knows no settings.
"""

from __future__ import annotations

import math

from parablock_rt.errors import ConfigError


def parse_rate(text: str) -> float:
    """Bytes per second from "50mbit", "1gbit", "800kbit" or a plain number of bits per second.

    0, the value of "0", "none" and "unlimited", means no limit. Raises ConfigError for other text.
    """
    units = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "bit": 1.0}
    lowered = text.strip().lower()
    if lowered in ("", "none", "unlimited"):
        return 0.0
    unit = next((unit for unit in units if lowered.endswith(unit)), "")
    bits = _number(lowered.removesuffix(unit)) * units.get(unit, 1.0)
    if not (bits >= 0 and math.isfinite(bits)):
        raise ConfigError(f"expected a rate such as 50mbit, 1gbit or 800kbit, found {text!r}")
    return bits / 8


def parse_delay(text: str) -> float:
    """Seconds from "40ms", "0.5s" or a plain number of seconds, at most 5 s. Raises ConfigError for other text."""
    lowered = text.strip().lower()
    seconds = _number(lowered[:-2]) / 1e3 if lowered.endswith("ms") else _number(lowered.removesuffix("s"))
    if not (0 <= seconds <= 5):
        raise ConfigError(f"expected a delay of at most 5s, such as 40ms or 0.5s, found {text!r}")
    return seconds


def parse_bytes(text: str) -> int:
    """Bytes from "8gib", "512mib", "64kib" or a plain number. Raises ConfigError for other text."""
    units = {"kib": 2**10, "mib": 2**20, "gib": 2**30}
    lowered = text.strip().lower()
    unit = next((unit for unit in units if lowered.endswith(unit)), "")
    value = _number(lowered.removesuffix(unit)) * units.get(unit, 1)
    if not (value >= 0 and math.isfinite(value)):
        raise ConfigError(f"expected an amount of memory such as 8gib, 512mib or 64kib, found {text!r}")
    return int(value)


def format_bytes(count: int) -> str:
    """An amount of memory or traffic as text, such as "21.67 GB". Units are decimal, like those of network rates."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"


def printable(text: str, most: int = 500) -> str:
    """Text that a peer wrote, fit for a terminal or a log: "?" stands for what cannot be printed, such as a terminal's
    control characters and line breaks. Of a longer text, an ellipsis ends the first `most` characters."""
    clipped = text if len(text) <= most else f"{text[: most - 1]}…"
    return "".join(letter if letter.isprintable() else "?" for letter in clipped)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
